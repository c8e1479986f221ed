# SPDX-License-Identifier: Apache-2.0
"""Merge is a commutative monoid with identity (0, -inf): empty spans allowed, never NaN."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.attention.api import attend
from headinfer.attention.merge import add_sink, identity, merge, merge_into
from headinfer.attention.types import Partial
from headinfer.testing.numerics import check, eager, oracle


def part(seed, *, hidden=()):
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn((1, 2, 3, 4), generator=generator)
    lse = torch.randn((1, 2, 3), generator=generator) * 10
    for row in hidden:
        out[:, :, row], lse[:, :, row] = 0.0, -torch.inf
    return Partial(out, lse)


def same(a, b):
    torch.testing.assert_close(a.out, b.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-6, atol=1e-6)


def test_the_identity_changes_nothing():
    a = part(0, hidden=[1])
    none = identity((1, 2, 3, 4), device=torch.device("cpu"))
    for merged in (merge(a, none), merge(none, a)):
        assert torch.equal(merged.out, a.out)
        assert torch.equal(merged.lse, a.lse)


@given(seeds=st.lists(st.integers(0, 99), min_size=3, max_size=3, unique=True))
@settings(max_examples=30, deadline=None)
def test_order_and_grouping_do_not_matter(seeds):
    a, b, c = part(seeds[0], hidden=[0]), part(seeds[1], hidden=[0, 1]), part(seeds[2])
    same(merge(a, b), merge(b, a))
    same(merge(merge(a, b), c), merge(a, merge(b, c)))


def test_rows_nobody_saw_stay_zero_and_finite():
    merged = merge(part(0, hidden=[2]), part(1, hidden=[2]))
    assert not merged.out[:, :, 2].any()
    assert bool((merged.lse[:, :, 2] == -torch.inf).all())
    assert not merged.out.isnan().any()
    assert not merged.lse.isnan().any()


def test_extreme_logits_do_not_overflow():
    a = Partial(torch.ones(1, 1, 1, 2), torch.tensor([[[3e38]]]))
    b = Partial(torch.zeros(1, 1, 1, 2), torch.tensor([[[-3e38]]]))
    merged = merge(a, b)
    assert torch.equal(merged.out, a.out)
    assert torch.equal(merged.lse, a.lse)


def test_in_place_merge_equals_merge():
    a, b = part(0, hidden=[0]), part(1, hidden=[0])
    expected = merge(a, b)
    total = Partial(a.out.clone(), a.lse.clone())
    merge_into(total, b)
    same(total, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(cuts=st.sets(st.integers(1, 299), max_size=6), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_merged_spans_equal_the_whole(dtype, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn((1, 4, 3, 32), generator=generator).to(dtype)
    k, v = (torch.randn((1, 2, 300, 32), generator=generator).to(dtype) for _ in range(2))
    edges = [0, *sorted(cuts), 300]
    total = identity((1, 4, 3, 32), device=torch.device("cpu"))
    for start, stop in pairwise(edges):
        piece = attend(q, k[:, :, start:stop], v[:, :, start:stop], scale=0.2)
        merge_into(total, piece)
    check(total.out, eager(q, k, v, scale=0.2).out, oracle(q, k, v, scale=0.2).out)


def test_a_sink_is_one_more_logit_with_value_zero():
    a = part(3, hidden=[1])
    sink = torch.tensor([0.5, -1.0])
    with_sink = add_sink(a, sink)
    none = Partial(torch.zeros_like(a.out), sink.view(1, 2, 1).expand(1, 2, 3).contiguous())
    same(with_sink, merge(a, none))
    assert (with_sink.out - a.out).abs().max() > 1e-3  # a dropped sink would show
