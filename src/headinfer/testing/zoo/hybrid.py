# SPDX-License-Identifier: Apache-2.0
"""Decoders that mix attention with convolutions, state-space or linear-attention layers.

Recurrent states stay stock and on the device; the attention layers, and the attention half of layers that have
both, are kept head by head.
"""

from __future__ import annotations

from typing import Any

from headinfer.testing.zoo.record import Flaw, entry

FULL = "full_attention"
LINEAR = "linear_attention"
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MOE: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 24}
_STATE = "its recurrent state does not continue over a chunk of several tokens"
_SCAN = Flaw(_STATE)
_OLD_SCAN = Flaw(_STATE, fixed_in="5.17")

HYBRID = (
    entry("bamba", "BambaForCausalLM", 1, 3, attn_layer_indices=[1], unchunkable=_SCAN, **_MAMBA2),
    entry(
        "falcon_h1",
        "FalconH1ForCausalLM",
        2,
        unchunkable=_OLD_SCAN,
        head_dim=8,
        mamba_d_ssm=64,
        **_MAMBA2,
    ),
    entry(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        1,
        3,
        unchunkable=_OLD_SCAN,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=4,
        shared_intermediate_size=24,
        **_MAMBA2,
    ),
    entry(
        "jamba",
        "JambaForCausalLM",
        1,
        4,
        attn_layer_period=4,
        attn_layer_offset=2,
        num_experts=4,
        mamba_d_state=8,
        use_mamba_kernels=False,
        unchunkable=_SCAN,
    ),
    entry(
        "kimi_linear",
        "KimiLinearForCausalLM",
        1,
        3,
        layer_types=[LINEAR, FULL, LINEAR],
        mlp_layer_types=["dense", "sparse", "sparse"],
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=10,
        num_key_value_heads=4,
        linear_head_dim=8,
        linear_num_heads=4,
    ),
    entry(
        "lfm2",
        "Lfm2ForCausalLM",
        2,
        4,
        unchunkable=_OLD_SCAN,
        layer_types=["conv", FULL, "conv", FULL],
        block_multiple_of=8,
    ),
    entry(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        2,
        4,
        unchunkable=_OLD_SCAN,
        layer_types=["conv", FULL, "conv", FULL],
        num_dense_layers=1,
        **_MOE,
    ),
    entry(
        "nemotron_h",
        "NemotronHForCausalLM",
        1,
        4,
        since="5.17",
        layers_block_type=["mamba", "attention", "mlp", "moe"],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        use_mamba_kernels=False,
    ),
    entry(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        1,
        3,
        since="5.17",
        layer_types=[LINEAR, FULL, LINEAR],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
    ),
    entry(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        1,
        3,
        unchunkable=_OLD_SCAN,
        layer_types=[LINEAR, FULL, LINEAR],
        head_dim=16,
        **_DELTA,
    ),
    entry(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        1,
        3,
        unchunkable=_OLD_SCAN,
        layer_types=[LINEAR, FULL, LINEAR],
        head_dim=16,
        **_DELTA,
        **_MOE,
        **_SHARED,
    ),
    entry(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        1,
        3,
        unchunkable=_OLD_SCAN,
        layer_types=[LINEAR, FULL, LINEAR],
        head_dim=16,
        initializer_range=0.08,
        **_DELTA,
        **_MOE,
        **_SHARED,
    ),
    entry(
        "zamba2",
        "Zamba2ForCausalLM",
        1,
        3,
        unchunkable=_OLD_SCAN,
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=4,
        chunk_size=8,
        num_key_value_heads=4,
        use_mamba_kernels=False,
        use_mem_rope=True,
    ),
)
