# SPDX-License-Identifier: Apache-2.0
"""Decoders in which every layer has full attention over its own keys: all layers are kept head by head.

They differ in what surrounds attention: biases, q/k norms, fused projections, parallel blocks, position
encodings, one KV head, head sizes that are no power of two.
"""

from __future__ import annotations

from typing import Any

from headinfer.testing.zoo.record import GPTJ_SIZES, VOCAB_SIZE, entry

DENSE = (
    entry("llama", "LlamaForCausalLM", 2, num_attention_heads=8, head_dim=10),
    entry(
        "llama3-rope",
        "LlamaForCausalLM",
        2,
        model_type="llama",
        num_key_value_heads=1,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    entry("apertus", "ApertusForCausalLM", 2),
    entry("arcee", "ArceeForCausalLM", 2),
    entry("biogpt", "BioGptForCausalLM", 2),
    entry("bitnet", "BitNetForCausalLM", 2),
    entry(
        "codegen",
        "CodeGenForCausalLM",
        2,
        since="5.24",
        **GPTJ_SIZES,
    ),
    entry("cohere", "CohereForCausalLM", 2, use_qk_norm=True),
    entry("ernie4_5", "Ernie4_5ForCausalLM", 2, head_dim=16),
    entry("gemma", "GemmaForCausalLM", 2, head_dim=20),
    entry("glm", "GlmForCausalLM", 2, head_dim=16, attention_bias=True),
    entry("glm4", "Glm4ForCausalLM", 2, head_dim=16),
    entry("gpt2", "GPT2LMHeadModel", 2),
    entry("gpt_bigcode", "GPTBigCodeForCausalLM", 2, multi_query=True),
    entry("gpt_neox", "GPTNeoXForCausalLM", 2, rotary_pct=0.5),
    entry(
        "gptj",
        "GPTJForCausalLM",
        2,
        since="5.24",
        **GPTJ_SIZES,
    ),
    entry("granite", "GraniteForCausalLM", 2, attention_multiplier=0.3, residual_multiplier=0.7),
    entry("helium", "HeliumForCausalLM", 2, head_dim=8),
    entry("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", 2, head_dim=16),
    entry("hyperclovax", "HyperCLOVAXForCausalLM", 2),
    entry("jais2", "Jais2ForCausalLM", 2),
    entry("ministral3", "Ministral3ForCausalLM", 2, head_dim=16, sliding_window=None),
    entry("mistral", "MistralForCausalLM", 2, head_dim=24, sliding_window=None),
    entry("nanochat", "NanoChatForCausalLM", 2),
    entry("nemotron", "NemotronForCausalLM", 2, since="5.17", partial_rotary_factor=0.5),
    entry("olmo", "OlmoForCausalLM", 2, clip_qkv=4.0),
    entry("olmo2", "Olmo2ForCausalLM", 2),
    entry("opt", "OPTForCausalLM", 2, ffn_dim=48, word_embed_proj_dim=32, init_std=0.15),
    entry("persimmon", "PersimmonForCausalLM", 2),
    entry("phi", "PhiForCausalLM", 2, partial_rotary_factor=0.5, qk_layernorm=True),
    entry("phi3", "Phi3ForCausalLM", 2, sliding_window=None),
    entry(
        "qwen2", "Qwen2ForCausalLM", 2, num_attention_heads=7, hidden_size=42, num_key_value_heads=1
    ),
    entry("qwen3", "Qwen3ForCausalLM", 2, head_dim=16, num_key_value_heads=4),
    entry("seed_oss", "SeedOssForCausalLM", 2, head_dim=16),
    entry("smollm3", "SmolLM3ForCausalLM", 4, layers=4),
    entry("stablelm", "StableLmForCausalLM", 2, use_qkv_bias=True, qk_layernorm=True),
    entry("starcoder2", "Starcoder2ForCausalLM", 2, sliding_window=None),
)

_MOE: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}

MIXTURES = (
    entry(
        "aria_text", "AriaTextForCausalLM", 2, moe_num_experts=4, moe_topk=2, intermediate_size=24
    ),
    entry(
        "dbrx",
        "DbrxForCausalLM",
        2,
        tiny={
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 512,
            "vocab_size": VOCAB_SIZE,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 32,
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
    ),
    entry(
        "dots1",
        "Dots1ForCausalLM",
        2,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        **_MOE,
    ),
    entry(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        2,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=24,
    ),
    entry("flex_olmo", "FlexOlmoForCausalLM", 2, num_experts=4, num_experts_per_tok=2),
    entry(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        2,
        n_routed_experts=4,
        first_k_dense_replace=1,
        head_dim=16,
        **_MOE,
    ),
    entry("granitemoe", "GraniteMoeForCausalLM", 2, num_local_experts=4),
    entry(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        2,
        num_local_experts=4,
        shared_intermediate_size=24,
    ),
    entry("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", 2, num_experts=4, moe_topk=2, head_dim=16),
    entry("hy_v3", "HYV3ForCausalLM", 2, num_experts=4, head_dim=16, **_MOE),
    entry(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        2,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
    ),
    entry("mixtral", "MixtralForCausalLM", 2, num_local_experts=4, sliding_window=None),
    entry("olmoe", "OlmoeForCausalLM", 2, num_experts=4, num_experts_per_tok=2),
    entry("phimoe", "PhimoeForCausalLM", 2, num_local_experts=4, sliding_window=None),
    entry(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        2,
        num_experts=4,
        shared_expert_intermediate_size=24,
        **_MOE,
    ),
    entry("qwen3_moe", "Qwen3MoeForCausalLM", 2, num_experts=4, head_dim=16, **_MOE),
    entry("solar_open", "SolarOpenForCausalLM", 2, n_routed_experts=4, head_dim=16, **_MOE),
)
