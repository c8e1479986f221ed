# SPDX-License-Identifier: Apache-2.0
"""What the host takes to enqueue a chunk: tiles as they are cut, calls as they are made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer import enqueueing
from headinfer.attention.few_shapes import fills_alone, key_spans
from headinfer.budget import GIB, MemoryBudget
from headinfer.cost import chunk_time
from headinfer.layout import HeadGroup, tiles
from headinfer.options import Options
from headinfer.plan import make_plan
from headinfer.testing.recorded import FULL, H200, LLAMA3_8B

SLOW_HOST = replace(H200, chunk_layer_s=2.5e-3, streamed_layer_s=2.5e-3)
"""Whose host took 1.9 to 3.1 ms to enqueue a layer, resident or streamed alike, from one measurement to the
next."""


def streaming(chunk: int, tokens: int = 262_144, **more):
    options = Options(
        budget=MemoryBudget(gpu_bytes=24 * GIB, host_bytes=200 * GIB),
        expected_tokens=tokens,
        chunk_tokens=chunk,
        resident_heads=0,
        near_data=0.0,
        **more,
    )
    return make_plan(LLAMA3_8B, options, device="cuda")


@pytest.mark.parametrize(
    ("chunk", "past", "least_ms", "most_ms"),
    [(2048, 64, 278, 511), (4096, 72, 468, 543)],
)
def test_short_chunks_take_what_their_host_takes(chunk, past, least_ms, most_ms):
    """Chunks whose host was busy all the time, and the GPU done within 2 ms of it: four of each, nothing
    resident, packed keys, Llama-3-8B's shape. Without their calls they would be said to take 80 ms."""
    plan = streaming(chunk, tokens=past * 1024 + 12 * chunk, kv_format="lossless")
    step = chunk_time(plan, SLOW_HOST, past=past * 1024, new=chunk)
    assert least_ms * 0.8 < step.parts["launching"] * 1e3 < most_ms
    assert step.limit == "launching"


@settings(max_examples=200, deadline=None)
@given(
    heads=st.integers(1, 8),
    past=st.integers(0, 2**20),
    new=st.sampled_from([256, 2048, 4096, 16_384]),
    tile_bytes=st.sampled_from([None, 2**20, 16 * 2**20, 2**28]),
)
def test_tiles_are_counted_as_they_are_cut(heads, past, new, tile_bytes):
    plan = streaming(new, tile_bytes=tile_bytes)
    found, _ = enqueueing._tiles_and_calls(plan, FULL, heads, past, new)
    slot, token = plan.slot_bytes, 2 * 128 * 2
    cut = list(tiles(0, HeadGroup(0, heads), past, slot_bytes=slot, token_bytes=token))
    assert found == len(cut)


@pytest.mark.parametrize("new", [1024, 2048, 4096, 8192, 16_384])
@pytest.mark.parametrize(
    ("first", "last"), [(0, 131_072), (131_072, 262_144), (786_432, 1_048_576)]
)
@pytest.mark.parametrize("per_kv", [4, 7])
def test_calls_are_counted_as_they_are_made(new, first, last, per_kv):
    """Over the chunks of a stretch of a prompt, by what attends them: `few_shapes` and `totals`."""
    layer = replace(FULL, num_query_heads=8 * per_kv)
    plan = streaming(new, tokens=2 * last)
    said = made = 0.0
    for past in range(first, last, new):
        said += enqueueing._tiles_and_calls(plan, layer, 8, past, new)[1]
        cut = list(tiles(0, HeadGroup(0, 8), past, slot_bytes=plan.slot_bytes, token_bytes=512))
        apart = fills_alone(per_kv * new, 132)
        made += 8 if apart or not cut else len({tile.group for tile in cut})
        for tile in cut:
            keys = torch.empty((1, 1, tile.span.tokens, 128), device="meta")
            made += len(key_spans(keys, new)) * (tile.group.heads if apart else 1)
    assert said == pytest.approx(made, rel=0.15)


def test_without_layers_of_chunks_those_of_tokens_count():
    unknown = replace(SLOW_HOST, chunk_layer_s=None)
    found = enqueueing.chunk_s(streaming(4096), unknown, past=100_000, new=4096)
    assert found == pytest.approx(32 * H200.layer_s + H200.token_s)
