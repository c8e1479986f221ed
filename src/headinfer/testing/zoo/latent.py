# SPDX-License-Identifier: Apache-2.0
"""Decoders with multi-head latent attention, whose cache may hold one latent and one rotary row per token.

Whether the cache sees the latent or the expanded heads depends on the version of transformers; both are head-wise.
"""

from __future__ import annotations

from typing import Any

from headinfer.testing.zoo.record import TINY, VOCAB_SIZE, entry

_LATENT: dict[str, Any] = {
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
}
_MOE: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_ROUTED: dict[str, Any] = {"n_routed_experts": 4, **_MOE}

LATENT = (
    entry("axk1", "AXK1ForCausalLM", 2, **_LATENT, **_ROUTED, mlp_layer_types=["dense", "sparse"]),
    entry(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        2,
        head_dim=4,
        first_k_dense_replace=1,
        **_LATENT,
        **_ROUTED,
    ),
    entry("deepseek_v3", "DeepseekV3ForCausalLM", 2, first_k_dense_replace=1, **_LATENT, **_ROUTED),
    entry(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        2,
        **_LATENT,
        **_ROUTED,
        mlp_layer_types=["dense", "sparse"],
    ),
    entry(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        4,
        4,
        tiny={
            **{
                k: v for k, v in TINY.items() if k not in ("num_hidden_layers", "intermediate_size")
            },
            "vocab_size": VOCAB_SIZE,
            "num_layers": 2,
        },
        head_dim=4,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=24,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        **_LATENT,
    ),
    entry(
        "minicpm3", "MiniCPM3ForCausalLM", 2, head_dim=4, dim_model_base=16, scale_emb=2, **_LATENT
    ),
    entry("youtu", "YoutuForCausalLM", 2, embedding_initializer_range=0.15, **_LATENT),
)
