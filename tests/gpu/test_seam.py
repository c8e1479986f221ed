# SPDX-License-Identifier: Apache-2.0
"""Families of every kind on a GPU: streamed answers equal the resident cache's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.hf.cache_name import cache_argument, cache_returned
from headinfer.testing.numerics import check
from headinfer.testing.zoo import ZOO
from headinfer.testing.zoo.measure import BOUND, prompt, relative_error

pytestmark = pytest.mark.gpu

FAMILIES = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "mixtral",
    "deepseek_v3",
    "qwen3_next",
    "falcon_h1",
    "gpt2",
    "phi3",
]
STEPS = (48, 48, 48, 48, 62, 1, 1, 1, 1)
DEVICE = "cuda"
STREAMED = {"chunk_tokens": 48, "tile_bytes": 4096, "poison": True}


@torch.no_grad()
def logits(model, cache):
    ids, start, found = prompt().to(DEVICE), 0, []
    for step in STEPS:
        output = model(ids[:, start : start + step], **cache_argument(model, cache), use_cache=True)
        cache, start = cache_returned(output), start + step
        found.append(output.logits)
    return torch.cat(found, dim=1)


def generate(model):
    ids = prompt(1, 200).to(DEVICE)
    return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)


def resident(model, run):
    model.set_attn_implementation("eager")
    return run(model)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("residents", "near"),
    [(0, 0.0), (0, 0.5), (0, 1.0), (1, 0.5), (None, None)],
    ids=["streamed", "half near", "near", "one resident", "auto"],
)
def test_streamed_answers_equal_the_resident_cache(name, residents, near):
    if name not in ZOO:
        pytest.skip(f"{name} is not in the zoo")
    model = ZOO[name].build().to(DEVICE).eval()
    expected = resident(model, lambda m: logits(m, DynamicCache(config=m.config)))
    tokens = resident(model, generate)
    with headinfer.attach(model, resident_heads=residents, near_data=near, **STREAMED) as run:
        found = logits(model, None)
        stats = run.stats
        assert relative_error(expected, found) <= BOUND
        assert torch.equal(generate(model), tokens)
    if residents == 0:
        assert near == 1 or stats.loaded_tiles > 0
        assert stats.host_bytes > 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_obey_the_rule_against_float32(name, dtype):
    model = ZOO[name].build().to(DEVICE).eval()
    half = copy.deepcopy(model).to(dtype)
    exact = resident(model, lambda m: logits(m, DynamicCache(config=m.config))).double()
    same = resident(half, lambda m: logits(m, DynamicCache(config=m.config)))
    with headinfer.attach(half, resident_heads=0, **STREAMED):
        check(logits(half, None), same, exact)


def test_heads_leave_the_gpu_as_the_budget_fills():
    model = ZOO["llama"].build().to(DEVICE).eval()
    expected = resident(model, lambda m: logits(m, DynamicCache(config=m.config)))
    with headinfer.attach(model, resident_heads=0, **STREAMED) as run:
        logits(model, None)
        least = run.plan.gpu_bytes
    for known in ({}, {"expected_tokens": 60}):
        with headinfer.attach(model, gpu_memory=least + 50_000, **STREAMED, **known) as run:
            found = logits(model, None)
            assert run.stats.demoted_heads > 0
            assert run.stats.resident_bytes <= 52_000
        assert relative_error(expected, found) <= BOUND


def test_closing_a_cache_gives_all_gpu_memory_back():
    model = ZOO["llama"].build().to(DEVICE).eval()
    with headinfer.attach(model, **STREAMED) as run:
        generate(model)
        run.cache.close()
    del run
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with headinfer.attach(model, **STREAMED):
            generate(model)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before
