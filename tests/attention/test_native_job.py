# SPDX-License-Identifier: Apache-2.0
"""A job over several runs of keys is attention over all of them, and says when it failed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.attention import native, packed
from headinfer.attention.native_job import KeyRun, NativeJob, PackedKeys
from headinfer.attention.types import Partial
from headinfer.blocks import BlockLayout
from headinfer.errors import InputError, LosslessCorrupt
from headinfer.formats.overflow import Overflow
from headinfer.testing.numerics import check, eager, oracle

ABSENT = native.why_absent()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make(dtype, *, b=1, h=2, g=2, t=1, s=700, d=64, e=48, seed=0):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random).to(dtype)

    return normal(b, h * g, t, d), normal(b, h, s, d), normal(b, h, s, e)


def place(q, e):
    return Partial(torch.full((*q.shape[:3], e), 7.0), torch.full(q.shape[:3], 7.0))


def attended(q, k, v, cuts, bias=None, **how):
    cuts = [0, *cuts, k.shape[2]]
    runs = [
        KeyRun(k[:, :, a:b], v[:, :, a:b], None if bias is None else bias[..., a:b])
        for a, b in pairwise(cuts)
    ]
    found = place(q, v.shape[-1])
    how = {"scale": q.shape[-1] ** -0.5, "softcap": None, **how}
    job = NativeJob(q, runs, found, **how)
    job.run()
    return found, job


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    b=st.integers(1, 2),
    g=st.integers(1, 8),
    t=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 700), max_size=4).map(sorted),
    softcap=st.sampled_from([None, 3.0]),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cuts_do_not_change_the_answer(dtype, b, g, t, cuts, softcap, biased, seed):
    q, k, v = make(dtype, b=b, g=g, t=t, seed=seed)
    bias = None
    if biased:
        bias = torch.rand((b, 1, 1, 700), generator=torch.Generator().manual_seed(seed)) < 0.5
    found, _ = attended(q, k, v, cuts, bias, softcap=softcap)
    how = {"scale": q.shape[-1] ** -0.5, "softcap": softcap, "bias": bias}
    check(found.out, eager(q, k, v, **how).out, oracle(q, k, v, **how).out)


def test_one_run_has_the_bits_of_a_call():
    q, k, v = make(torch.bfloat16, t=3)
    found, _ = attended(q, k, v, [])
    call = native.attend(q, k, v, scale=q.shape[-1] ** -0.5)
    assert torch.equal(found.out, call.out)
    assert torch.equal(found.lse, call.lse)


def test_hidden_runs_do_not_count_and_rows_that_see_nothing_are_zero():
    q, k, v = make(torch.float32)
    bias = torch.zeros((1, 1, 1, 700), dtype=torch.bool)
    nothing, _ = attended(q, k, v, [300], bias)
    assert not nothing.out.any()
    assert bool((nothing.lse == -torch.inf).all())
    bias[..., 300:] = True
    some, _ = attended(q, k, v, [300], bias)
    only, _ = attended(q, k[:, :, 300:], v[:, :, 300:], [])
    assert torch.equal(some.out, only.out)
    assert torch.equal(some.lse, only.lse)


def test_what_is_not_finite_in_one_run_shows():
    q, k, v = make(torch.float32, t=2)
    k[0, 0, 10] = torch.nan
    found, _ = attended(q, k, v, [300, 500])
    assert bool(found.lse[:, :2].isnan().all())
    assert not bool(found.lse[:, 2:].isnan().any())


def test_it_runs_on_any_thread_and_says_when():
    q, k, v = make(torch.bfloat16, s=5000)
    before = time.perf_counter()
    with ThreadPoolExecutor(1) as thread:
        _, job = thread.submit(attended, q, k, v, [1000]).result()
    started, ended = job.times()
    assert before <= started < ended <= time.perf_counter()


def test_a_job_again_reads_what_is_there_then_and_has_times_of_its_own():
    q, k, v = make(torch.bfloat16)
    (first, job), how = attended(q, k, v, [300]), {"cuts": [300]}
    expected = first.out.clone()
    times, second = job.times(), job.again()
    with pytest.raises(InputError):
        second.times()
    q.mul_(-1)
    second.run()
    assert second.address != job.address
    assert job.times() == times
    assert second.times()[0] >= times[1]
    assert not torch.equal(first.out, expected)
    assert torch.equal(first.out, attended(q, k, v, **how)[0].out)


def test_a_job_that_did_not_run_or_failed_raises_and_leaves_nan():
    q, k, v = make(torch.float32)
    found = place(q, v.shape[-1])
    job = NativeJob(q, [KeyRun(k, v)], found, scale=1.0, softcap=None)
    with pytest.raises(InputError, match="near the data"):
        job.times()
    wrong = NativeJob(q, [KeyRun(k, v)] * 2, found, scale=1.0, softcap=-1.0)
    wrong.run()
    with pytest.raises(InputError, match="do not belong together"):
        wrong.times()
    assert bool(found.out.isnan().all())
    assert bool(found.lse.isnan().all())


def test_a_job_needs_runs_and_agreeing_shapes():
    q, k, v = make(torch.float32)
    with pytest.raises(InputError, match="no runs"):
        NativeJob(q, [], place(q, 48), scale=1.0, softcap=None)
    with pytest.raises(InputError, match="disagree"):
        NativeJob(q, [KeyRun(k, v[:, :, 1:])], place(q, 48), scale=1.0, softcap=None)
    with pytest.raises(InputError, match="0 threads"):
        NativeJob(q, [KeyRun(k, v)], place(q, 48), scale=1.0, softcap=None, num_threads=0)


def packed_keys(k, v):
    """k, v [1, h, s, d], whole blocks, as the lossless format stores them."""
    found = []
    for x in (k, v):
        heads, tokens, dim = x.shape[1:]
        layout = BlockLayout(dim)
        overflow = Overflow(
            dim, lambda n: torch.zeros(n, dtype=torch.uint8), torch.device("cpu"),
            wait=lambda ticket, block: True,
        )  # fmt: skip
        blocks = tokens // 128
        overflow.reserve(heads * blocks)
        slots = torch.zeros((heads, 1, blocks, layout.slot_bytes), dtype=torch.uint8)
        run = packed.PackedRun(slots, overflow)
        packed.encode(x.transpose(0, 1).contiguous(), run)
        found.append(run)
    return found


def test_packed_runs_have_the_bits_of_plain_ones():
    q, k, v = make(torch.bfloat16, t=2, s=640, e=64)
    v[0, 0, 130, :40] = torch.inf  # a block that is stored raw has to be found, too
    first = PackedKeys(*packed_keys(k[:, :, :384], v[:, :, :384]), 384)
    second = PackedKeys(*packed_keys(k[:, :, 384:], v[:, :, 384:]), 200)
    plain = [KeyRun(k[:, :, :384], v[:, :, :384]), KeyRun(k[:, :, 384:584], v[:, :, 384:584])]
    results = []
    for runs in ([first, second], [first, plain[1]], plain):
        found = place(q, 64)
        NativeJob(q, runs, found, scale=0.125, softcap=None).run()
        results.append(found)
    for found in results[:2]:
        assert torch.equal(found.out.nan_to_num(7.0), results[2].out.nan_to_num(7.0))
        assert torch.equal(found.lse, results[2].lse)


def test_a_damaged_block_of_any_run_is_named_and_leaves_nan():
    q, k, v = make(torch.bfloat16, s=512, e=64)
    runs = [
        PackedKeys(*packed_keys(k[:, :, a:b], v[:, :, a:b]), b - a)
        for a, b in ((0, 256), (256, 512))
    ]
    slots = runs[1].v.slots
    slots[1, 0, 1, BlockLayout(64).header :] = 255
    found = place(q, 64)
    job = NativeJob(q, runs, found, scale=0.125, softcap=None)
    job.run()
    with pytest.raises(LosslessCorrupt, match="values are damaged: row 0, head 1, block 1"):
        job.times()
    assert bool(found.out.isnan().all())
