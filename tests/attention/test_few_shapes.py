# SPDX-License-Identifier: Apache-2.0
"""Calls that are cut so that a kernel which is built anew for every shape is built a few times."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headinfer.attention.api import built_per_shape
from headinfer.attention.few_shapes import fills_alone, key_spans, of_one_stride
from headinfer.attention.types import AttentionSpec


def keys(count, *, heads=1, batch=1, room=0, dim=4):
    """Keys [b, h, s, d] that are a part of memory with room for more."""
    whole = torch.empty((heads, batch, count + room, dim), device="meta")
    return whole[:, :, :count].transpose(0, 1)


@given(units=st.integers(0, 3000), rows=st.integers(1, 8192), rest=st.integers(0, 100))
def test_spans_cover_the_keys_in_order(units, rows, rest):
    count = units * rows + rest
    spans = key_spans(keys(count), rows)
    assert spans[0][0] == 0
    assert spans[-1][1] == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("how", [{}, {"heads": 8, "room": 10**7}, {"batch": 2, "room": 10**7}])
def test_a_prompt_of_a_thousand_chunks_needs_ten_shapes(how):
    found = {
        stop - start
        for chunk in range(1, 1024)
        for start, stop in key_spans(keys(chunk * 1024, **how), 1024)
    }
    assert found == {1024 << power for power in range(10)}


@pytest.mark.parametrize("how", [{"heads": 2}, {"batch": 3}])
def test_heads_as_far_apart_as_the_keys_are_long_are_not_cut(how):
    """Their stride is another one for every length, and so would every span's shape be."""
    assert key_spans(keys(7 * 512, **how), 512) == [(0, 7 * 512)]


def test_a_last_chunk_is_not_cut():
    assert key_spans(keys(7 * 8192), 5000) == [(0, 7 * 8192)]


def test_a_full_tile_is_not_cut():
    """It comes again with every chunk, also of a length that does not divide it."""
    assert key_spans(keys(65_536), 9216) == [(0, 65_536)]


def test_what_is_no_whole_chunk_has_a_span_of_its_own():
    """A context that goes on, and segments that grow without a known length."""
    found = {
        stop - start
        for chunk in range(1, 129)
        for start, stop in key_spans(keys(1000 + chunk * 8192), 8192)
    }
    assert found == {1000} | {8192 << power for power in range(8)}


@pytest.mark.parametrize("heads", [1, 8, 32, 128])
def test_a_stride_fits_32_bits(heads):
    """The plan's key has no more, and of many heads a row is long."""
    fresh = torch.empty(1, 64, heads, 128).transpose(1, 2)[:, :1]
    assert max(of_one_stride(fresh).stride()) < 2**31


@pytest.mark.parametrize("count", [1, 7, 512])
def test_one_head_has_one_stride_whatever_its_length(count):
    x = torch.randn(3, 2, count, 8)
    one = of_one_stride(x[1:2, :1])
    assert torch.equal(one, x[1:2, :1])
    assert one.stride() == of_one_stride(torch.randn(1, 1, 99, 8)).stride()
    assert of_one_stride(x) is x


def test_only_cudnn_is_built_per_shape():
    spec = AttentionSpec("cpu", torch.bfloat16, 64, 64, 4, 64, False, False, False)
    assert not built_per_shape(spec)


@pytest.mark.parametrize(
    ("rows", "multiprocessors", "alone"),
    [
        (32_768, 132, True),  # an H200: two waves, all but full
        (16_384, 132, True),
        (8_192, 132, False),  # half of them idle
        (16_384, 108, False),  # an A100: twenty blocks in a second wave
        (16_384, 128, True),  # an RTX 4090
        (8_192, 24, False),
        (8_192, 16, True),
        (1, 1, True),
    ],
)
def test_a_head_has_calls_of_its_own_where_it_fills_the_device(rows, multiprocessors, alone):
    assert fills_alone(rows, multiprocessors) == alone
