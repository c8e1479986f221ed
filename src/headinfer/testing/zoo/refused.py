# SPDX-License-Identifier: Apache-2.0
"""Models the streaming path must refuse, each with its reason and whether materialising is exact for it.

A model whose attention never meets transformers' attention interface, or that edits cached keys, values or masks,
can only be served by gathering a layer at a time on the device.
"""

from __future__ import annotations

from typing import Any

from headinfer.testing.zoo.record import GPTJ_SIZES, refused

_LATENT: dict[str, Any] = {
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
}
_ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
}
_INDEXER: dict[str, Any] = {"index_topk": 16, "index_n_heads": 2, "index_head_dim": 8}
_OWN_MATH = "computes attention in its own code"
_TABLE = "picks its attention class from a table of its own"

REFUSALS = (
    refused("bloom", "BloomForCausalLM", _OWN_MATH, materializes=True, n_layer=2, n_head=4),
    refused(
        "codegen",
        "CodeGenForCausalLM",
        _OWN_MATH,
        materializes=True,
        until="5.24",
        **GPTJ_SIZES,
    ),
    refused(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        "sparse top-k attention slices the mask for its indexer",
        materializes=False,
        head_dim=4,
        first_k_dense_replace=1,
        **_LATENT,
        **_ROUTED,
        **_INDEXER,
    ),
    refused(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        "pads the attention mask itself",
        materializes=False,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    ),
    refused(
        "diffllama",
        "DiffLlamaForCausalLM",
        "transforms cached values after the update",
        materializes=True,
    ),
    refused("doge", "DogeForCausalLM", "edits the attention mask itself", materializes=True),
    refused(
        "falcon",
        "FalconForCausalLM",
        _TABLE,
        materializes=True,
        ffn_hidden_size=48,
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    refused(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        "sparse top-k attention slices the mask for its indexer",
        materializes=False,
        **_LATENT,
        **_ROUTED,
        **_INDEXER,
    ),
    refused(
        "gpt_neo",
        "GPTNeoForCausalLM",
        _TABLE,
        materializes=True,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    refused(
        "gptj",
        "GPTJForCausalLM",
        _TABLE,
        materializes=True,
        until="5.24",
        **GPTJ_SIZES,
    ),
    refused(
        "jetmoe",
        "JetMoeForCausalLM",
        "transforms cached keys after the update",
        materializes=True,
        kv_channels=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    refused(
        "mpt",
        "MptForCausalLM",
        _OWN_MATH,
        materializes=True,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=512,
    ),
    refused(
        "xglm",
        "XGLMForCausalLM",
        _OWN_MATH,
        materializes=True,
        d_model=32,
        ffn_dim=48,
        attention_heads=4,
        num_layers=2,
        init_std=0.15,
    ),
)
