# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a real model over a real text: the same bits in at most 0.757 of the bytes."""

from __future__ import annotations

import importlib.resources

import pytest
import torch

from headinfer.errors import InputError
from headinfer.formats.lossless import BlockLayout, decode, encode, point_to
from headinfer.hf.cache_name import cache_returned
from headinfer.hf.load import load_model
from headinfer.testing.blocks import fetch_from

TOKENS = 2048


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_comes_back_from_three_quarters_of_its_bytes():
    try:
        model, tokenizer = load_model("demo", dtype="bfloat16", device="cpu")
    except InputError as error:
        pytest.skip(f"the demo model is not here and cannot be fetched: {error}")
    text = importlib.resources.files("headinfer").joinpath("data", "small_desk.md").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    model.set_attn_implementation("sdpa")
    cache = cache_returned(model(ids, use_cache=True, logits_to_keep=1))
    stored = plain = 0
    for layer in cache.layers:
        for x in (layer.keys[0], layer.values[0]):
            dim = x.shape[-1]
            blocks = x.reshape(-1, 128, dim)
            packed = encode(blocks)
            point_to(packed, torch.arange(packed.entries.shape[0]))
            found = decode(packed.slots, dim, fetch_from(packed.entries), verify=True)
            assert torch.equal(found.view(torch.int16), blocks.view(torch.int16))
            raw = packed.entries.shape[0]
            stored += blocks.shape[0] * BlockLayout(dim).slot_bytes + packed.entries.numel()
            assert raw <= 0.01 * blocks.shape[0]
            plain += 2 * blocks.numel()
    assert stored / plain <= 0.757
