# SPDX-License-Identifier: Apache-2.0
"""A real model on a real document: token-identical to the resident cache, one KV head at a time."""

from __future__ import annotations

import importlib.resources

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.errors import InputError
from headinfer.hf.cache_name import cache_argument
from headinfer.hf.load import load_model

TOKENS, CHUNK, NEW = 4224, 1024, 24
HEAD_BYTES = 2**20
"""Less than one KV head over the context: 4,224 tokens x 2 x 64 dims x 4 bytes are 2.1 MiB."""


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_model("demo", dtype="float32", device="cpu")
    except InputError as error:
        pytest.skip(f"the demo model is not here and cannot be fetched: {error}")


@torch.no_grad()
def prefill(model, ids, cache):
    logits = []
    for chunk in ids.split(CHUNK, dim=1):
        output = model(chunk, **cache_argument(model, cache), use_cache=True, logits_to_keep=64)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.slow
def test_smollm2_at_4096_tokens_is_identical_to_the_resident_cache(smollm2):
    model, tokenizer = smollm2
    text = importlib.resources.files("headinfer").joinpath("data", "small_desk.md").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    assert ids.shape[1] >= 4096

    model.set_attn_implementation("sdpa")
    resident = DynamicCache(config=model.config)
    expected = prefill(model, ids, resident)
    tokens = model.generate(
        torch.cat([ids, expected[:, -1:].argmax(-1)], dim=1),
        **cache_argument(model, resident),
        max_new_tokens=NEW,
        do_sample=False,
    )
    options = {"chunk_tokens": CHUNK, "staging": True, "tile_bytes": HEAD_BYTES, "poison": True}
    with headinfer.attach(model, **options) as run:
        cache = run.new_cache()
        found = prefill(model, ids, cache)
        same = model.generate(
            torch.cat([ids, found[:, -1:].argmax(-1)], dim=1),
            **cache_argument(model, cache),
            max_new_tokens=NEW,
            do_sample=False,
        )
        stats = run.stats
    assert (found - expected).abs().max() <= 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert torch.equal(same, tokens)
    # One head at a time: every tile that was staged is a part of one head.
    assert stats.loaded_tiles > 0
    assert stats.loaded_bytes <= stats.loaded_tiles * HEAD_BYTES
    assert stats.dropped_tiles == 0
