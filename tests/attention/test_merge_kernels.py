# SPDX-License-Identifier: Apache-2.0
"""The kernels that merge partials, and the thread that compiles them ahead: for real on a GPU, elsewhere
through Triton's interpreter in a process of its own."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

from headinfer import totals
from headinfer.attention import merge
from headinfer.attention.masks import Causal
from headinfer.attention.merge import add_sink, identity, merge_all, merge_into, write_merged
from headinfer.attention.merge_ahead import merge_everything
from headinfer.attention.types import Partial
from headinfer.heads import Piece
from headinfer.testing.interpreter import INTERPRETED, interpreter, run_interpreted
from headinfer.totals import Query, Total

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter's process compiles nothing")
gpu_only = pytest.mark.gpu if not INTERPRETED else pytest.mark.skip(reason="too large here")
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def runs(test):
    """On a GPU, or in the interpreter's process."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture(scope="module", autouse=True)
def in_the_interpreter():
    with interpreter() if INTERPRETED else nullcontext():
        yield


@needs_triton
@compiles
def test_through_the_interpreter():
    """Everything below, on the CPU."""
    run_interpreted(__file__)


def part(seed, dtype=torch.float32, *, shape=(2, 3, 5, 40), hidden=()):
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    lse = (torch.randn(shape[:3], generator=generator) * 10).to(DEVICE)
    for row in hidden:
        out[:, :, row], lse[:, :, row] = 0.0, -torch.inf
    return Partial(out, lse)


def in_torch(parts, sink=None):
    """The merge in float64 by merge.py's torch code."""
    total = identity(tuple(parts[0].out.shape), device=torch.device(DEVICE))
    total = Partial(total.out.double(), total.lse.double())
    for each in parts:
        merge_into(total, Partial(each.out.double(), each.lse.double()))
    return total if sink is None else add_sink(total, sink.double())


def fused(parts, *, out=None, sink=None):
    """The merge by the kernels, wherever they run."""
    found = torch.empty(parts[0].out.shape, device=DEVICE) if out is None else out
    lse = torch.empty(parts[0].lse.shape, device=DEVICE)
    merge._merge_fused(parts, found, lse, sink)
    return Partial(found, lse)


def same(found, exact, *, rtol=1e-6):
    torch.testing.assert_close(found.out.double(), exact.out, rtol=rtol, atol=rtol)
    torch.testing.assert_close(found.lse.double(), exact.lse, rtol=1e-6, atol=1e-6)


@runs
@every_type
@pytest.mark.parametrize("count", [2, 3, 4, 7, 33, 70])
def test_partials_merge_as_in_torch(dtype, count):
    parts = [part(seed, dtype, hidden=[1, 1 + seed % 4]) for seed in range(count)]
    found = fused(parts)
    same(found, in_torch(parts), rtol=3e-6)
    assert not found.out[:, :, 1].any()
    assert bool((found.lse[:, :, 1] == -torch.inf).all())


@runs
def test_merging_in_place_and_into_some_rows():
    a, b = part(0), part(1, torch.float16, shape=(2, 3, 2, 40))
    total = Partial(a.out.clone(), a.lse.clone())
    here = Partial(total.out[:, :, 2:4], total.lse[:, :, 2:4])
    expected = in_torch([Partial(a.out[:, :, 2:4], a.lse[:, :, 2:4]), b])
    merge._merge_fused([here, b], here.out, here.lse, None)
    same(here, expected)
    for rows in (slice(0, 2), slice(4, 5)):
        assert torch.equal(total.out[:, :, rows], a.out[:, :, rows])


@runs
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_results_are_written_in_their_own_layout_and_type(count):
    parts = [part(seed, hidden=[2]) for seed in range(count)]
    sink = torch.tensor([0.5, -20.0, 3.0], device=DEVICE)
    whole = torch.full((2, 5, 7, 40), torch.nan, device=DEVICE, dtype=torch.float16)
    out = whole[:, :, 2:5].transpose(1, 2)
    merge._merge_fused(parts, out, None, sink)
    exact = in_torch(parts, sink)
    torch.testing.assert_close(out.double(), exact.out, rtol=2e-3, atol=2e-3)
    assert whole[:, :, :2].isnan().all()
    assert whole[:, :, 5:].isnan().all()
    assert (out.double() - in_torch(parts).out).abs().max() > 1e-2  # a dropped sink would show


@runs
@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("laid_out", ["sum first", "as attention writes", "each in its own way"])
def test_large_partials_are_merged_without_being_stacked(monkeypatch, count, laid_out):
    """A sum in float32 and what came after it; keys of one call; of several kernels."""
    monkeypatch.setattr(merge, "STACKED_BYTES", 0)
    monkeypatch.setattr(torch, "stack", None)
    parts = [part(seed, torch.float16, hidden=[1, 1 + seed % 4]) for seed in range(count)]
    if laid_out == "sum first":
        parts[0] = part(0, hidden=[1])
    else:
        odd = 2 if laid_out == "each in its own way" else 1
        for place in range(0, count, odd):
            out = parts[place].out.transpose(1, 2).contiguous().transpose(1, 2)
            parts[place] = Partial(out, parts[place].lse)
    same(fused(parts), in_torch(parts), rtol=3e-6)
    sink, out = torch.randn(3, device=DEVICE), torch.empty((2, 5, 3, 40), device=DEVICE)
    merge._merge_fused(parts, out.transpose(1, 2), None, sink)
    exact = in_torch(parts, sink)
    torch.testing.assert_close(out.transpose(1, 2).double(), exact.out, rtol=3e-6, atol=3e-6)


@runs
def test_the_identity_changes_no_bit():
    a = part(0, hidden=[1])
    none = identity((2, 3, 5, 40), device=torch.device(DEVICE))
    for parts in ([a, none], [none, a], [none, a, none]):
        found = fused(parts)
        assert torch.equal(found.out, a.out)
        assert torch.equal(found.lse, a.lse)


@runs
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, where a GPU rounds to inf
def test_extreme_logits_do_not_overflow():
    a = Partial(torch.ones(1, 1, 1, 2), torch.tensor([[[3e38]]]))
    b = Partial(torch.zeros(1, 1, 1, 2), torch.tensor([[[-3e38]]]))
    a, b = (Partial(*(x.to(DEVICE) for x in each)) for each in (a, b))
    for parts in ([a, b], [b, a], [a, b, b]):
        found = fused(parts)
        assert torch.equal(found.out, a.out)
        assert torch.equal(found.lse, a.lse)


@gpu_only
@every_type
def test_merges_on_the_gpu_equal_those_in_torch(dtype):
    shape = (2, 8, 700, 128)
    parts = [part(seed, dtype, shape=shape, hidden=[3]) for seed in range(3)]
    same(merge_all(parts), in_torch(parts), rtol=3e-6)
    total = identity(shape, device=torch.device(DEVICE))
    for each in parts:
        merge_into(total, each)
    same(total, in_torch(parts), rtol=3e-6)
    out = torch.empty((2, 700, 8, 128), dtype=dtype, device=DEVICE)
    sink = torch.randn(8, device=DEVICE)
    write_merged(parts, out.transpose(1, 2), sink=sink)
    expected = in_torch(parts, sink).out.to(dtype)
    torch.testing.assert_close(out.transpose(1, 2), expected)


@runs
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("held", [2, 3, 4])
def test_everything_is_merged_once_to_be_compiled(monkeypatch, held, sink):
    """Every number of partials that a prompt of a million tokens leaves, held as they are held there."""
    seen = set()
    fused = merge._merge_fused

    def recorded(parts, out, lse, sink):
        kinds = tuple(part.out.dtype for part in parts)
        seen.add((len(parts) > merge.FEW or kinds, out.dtype, lse is None, sink is None))
        fused(parts, out, lse, sink)

    monkeypatch.setattr(merge, "_merge_fused", recorded)
    monkeypatch.setattr(merge, "_fused", lambda *parts, **how: True)
    merge_everything(torch.device(DEVICE), torch.float16, 64, sink=sink)
    compiled_for = set(seen)
    monkeypatch.setattr(
        totals, "attend", lambda q, k, v, **how: part(0, torch.float16, shape=(1, 2, 9, 64))
    )
    monkeypatch.setattr(totals.Total, "_full", lambda total: len(total._parts) >= held)
    q = torch.zeros(1, 2, 9, 64, dtype=torch.float16, device=DEVICE)
    for count in range(2, 12):
        logit = torch.zeros(2, dtype=torch.float16, device=DEVICE) if sink else None
        query = Query(q, 1.0, Causal(10**6), 64, sink=logit)
        total = Total(query, q, (0, 2), "auto", collect=False)
        for place in range(count):
            total.add(Piece(9 * place, q, q))
        total.finish(torch.empty(1, 9, 2, 64, dtype=torch.float16, device=DEVICE))
    assert seen == compiled_for


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merging_in_place_gives_the_bits_of_merging_aside(dtype):
    """Several warps read a row's log-sum-exp, and one of them overwrites it."""
    shape = (2, 8, 700, 128)
    total, other = part(0, shape=shape), part(1, dtype, shape=shape)
    aside = fused([total, other])
    for _ in range(20):
        here = Partial(total.out.clone(), total.lse.clone())
        merge._merge_fused([here, other], here.out, here.lse, None)
        assert torch.equal(here.out, aside.out)
        assert torch.equal(here.lse, aside.lse)


@gpu_only
def test_gradients_are_merged_in_torch():
    parts = [part(seed) for seed in range(2)]
    parts[0].out.requires_grad_()
    merge_all(parts).out.sum().backward()
    assert parts[0].out.grad is not None
