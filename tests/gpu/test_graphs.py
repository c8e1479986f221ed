# SPDX-License-Identifier: Apache-2.0
"""Decode steps replayed as CUDA graphs: the same tokens, or a reason why not."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.attention.compiling import finish_compiling
from headinfer.hf.cache_name import cache_argument
from headinfer.testing.numerics import check
from headinfer.testing.zoo import ZOO
from headinfer.testing.zoo.measure import prompt

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
NEW = 24
STREAMED = {"chunk_tokens": 48, "tile_bytes": 4096, "poison": True}


def generate(model, ids, **how):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **how)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "mixtral", "gemma3"])
@pytest.mark.parametrize(
    ("residents", "near"), [(0, 0.0), (0, 0.5), (None, None)], ids=["streamed", "near", "auto"]
)
def test_replayed_steps_give_the_same_tokens(name, residents, near):
    model = ZOO[name].build().to(DEVICE).eval()
    ids = prompt(1, 200).to(DEVICE)
    model.set_attn_implementation("eager")
    expected = generate(model, ids)
    options = {**STREAMED, "resident_heads": residents, "near_data": near}
    with headinfer.attach(model, **options) as run:
        assert torch.equal(generate(model, ids), expected)
        assert run.graphs is not None
        assert run.graphs.replayed > 0 or run.graphs.refused or name in {"gemma3", "gpt2"}
        if name in {"llama", "qwen3"}:
            assert run.graphs.refused == ""
            assert run.graphs.replayed >= NEW - 4
        assert torch.equal(generate(model, ids), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_with_everything_resident_a_step_is_one_graph(name):
    """In half precision; the second context is another cache in another place."""
    model = ZOO[name].build().to(DEVICE, torch.bfloat16).eval()
    config = model.config
    exact = copy.deepcopy(model).double()
    tokens = [prompt(1, 200).to(DEVICE), prompt(1, 340).flip(1).to(DEVICE)]
    with headinfer.attach(model, resident_heads=config.num_key_value_heads) as run, torch.no_grad():
        generate(model, tokens[0])
        finish_compiling()
        generate(model, tokens[0])
        assert run.graphs.refused == ""
        assert any(len(step.pieces) == 1 for step in run.graphs._steps.values())
        before = run.graphs.replayed
        found = []
        for ids in tokens:
            cache = run.new_cache(expected_tokens=ids.shape[1])
            found.append(teacher_forced(model, ids, cache))
        assert run.graphs.replayed > before + 50
    model.set_attn_implementation("eager")
    for logits, ids in zip(found, tokens, strict=True):
        same = teacher_forced(model, ids, DynamicCache(config=config))
        exact.set_attn_implementation("eager")
        check(logits, same, teacher_forced(exact, ids, DynamicCache(config=config)))


@torch.no_grad()
def teacher_forced(model, ids, cache):
    """Logits of the last 40 tokens, one by one after a prompt of the others."""
    first = ids.shape[1] - 40
    model(input_ids=ids[:, :first], **cache_argument(model, cache))
    logits = []
    for at in range(first, ids.shape[1]):
        logits.append(model(input_ids=ids[:, at : at + 1], **cache_argument(model, cache)).logits)
    return torch.cat(logits, dim=1)


def test_a_padded_batch_and_beams():
    model = ZOO["llama"].build().to(DEVICE).eval()
    ids = prompt(2, 200).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    model.set_attn_implementation("eager")
    expected = generate(model, ids, attention_mask=mask), generate(model, ids, num_beams=3)
    with headinfer.attach(model, near_data=0.5, **STREAMED) as run:
        assert torch.equal(generate(model, ids, attention_mask=mask), expected[0])
        assert torch.equal(generate(model, ids, num_beams=3), expected[1])
        assert run.graphs is not None
        assert run.graphs.replayed > NEW


def test_a_step_that_reads_the_gpu_goes_on_unrecorded():
    """What invalidates a recording ends it, not the generation."""
    model = ZOO["llama"].build().to(DEVICE).eval()
    ids = prompt(1, 100).to(DEVICE)
    model.set_attn_implementation("eager")
    expected = generate(model, ids)
    mlp = model.model.layers[1].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) * (1.0 if x.sum().item() == x.sum().item() else 2.0)
    for _ in range(2):
        with headinfer.attach(model, resident_heads=0, **STREAMED) as run:
            assert torch.equal(generate(model, ids), expected)
            assert "captur" in run.graphs.refused
    del mlp.forward
    with headinfer.attach(model, resident_heads=0, **STREAMED) as run:
        assert torch.equal(generate(model, ids), expected)
        assert run.graphs.replayed > 0
