# SPDX-License-Identifier: Apache-2.0
"""Remaining time follows the quadratic cost of attention, where a linear bar would lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.progress import PrefillClock


def run(clock, chunk, until, linear, quadratic):
    seconds, done = 0.0, 0
    while done < until:
        new = min(chunk, clock.total_tokens - done)
        seconds += linear * new + quadratic * new * (done + new / 2)
        done += new
        clock.observe(done, seconds)
    return seconds


@given(
    linear=st.floats(1e-6, 1e-2),
    quadratic=st.floats(1e-12, 1e-7),
    chunks=st.integers(3, 40),
    seen=st.integers(2, 39),
)
def test_the_true_remaining_time_is_found_from_a_few_chunks(linear, quadratic, chunks, seen):
    total = chunks * 512
    clock = PrefillClock(total)
    passed = run(clock, 512, min(seen, chunks) * 512, linear, quadratic)
    whole = linear * total + quadratic * total * total / 2
    assert clock.eta_s() == pytest.approx(whole - passed, rel=1e-3, abs=1e-6 * whole)
    assert 0 <= clock.fraction() <= 1


def test_at_half_the_tokens_far_less_than_half_the_time_has_passed():
    clock = PrefillClock(65536)
    run(clock, 4096, 32768, 1e-5, 1e-8)
    assert clock.fraction() < 0.35


def test_before_the_first_chunk_nothing_is_claimed():
    clock = PrefillClock(1000)
    assert clock.eta_s() is None
    assert clock.fraction() == 0.0


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 10)), min_size=1, max_size=20))
def test_any_timing_gives_a_finite_non_negative_answer(chunks):
    clock = PrefillClock(200_000)
    done, seconds = 0, 0.0
    for tokens, took in chunks:
        done, seconds = done + tokens, seconds + took
        clock.observe(done, seconds)
        eta = clock.eta_s()
        assert eta is not None
        assert 0 <= eta < float("inf")


def test_the_end_is_the_end():
    clock = PrefillClock(1024)
    run(clock, 256, 1024, 1e-4, 1e-8)
    assert clock.eta_s() == 0.0
    assert clock.fraction() == 1.0
