# SPDX-License-Identifier: Apache-2.0
"""Makes a model of a shape: random weights, on the device at once."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headinfer.bench.shapes import Shape

POSITIONS = 2**21


def build(shape: Shape, dtype: str, device: str, *, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of that shape whose weights depend on `seed` alone."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config_of(shape, dtype)).eval()
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    return model


def config_of(shape: Shape, dtype: str) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype=dtype,
    )
