# SPDX-License-Identifier: Apache-2.0
"""The share of the CPU: rounding over layers, and where it settles on machines made up here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.balance import LEAST_SHARE, Balance, Pass


@given(share=st.floats(0, 1), count=st.integers(1, 16), layers=st.integers(1, 80))
def test_rounding_follows_the_share_over_all_layers(share, count, layers):
    heads = [Balance(share).heads(place, count) for place in range(layers)]
    assert all(0 <= n <= count for n in heads)
    assert abs(sum(heads) - share * count * layers) <= 1


def test_a_fixed_share_stays():
    balance = Balance(0.5)
    balance.observe(Pass(1.0, 0.1, 10, -0.5, 10, 1.0))
    assert balance.share == 0.5


@pytest.mark.parametrize("unknown", [{"link_rate": None}, {"near_bytes": 0}, {"near_s": 0.0}])
def test_nothing_is_concluded_from_half_a_measurement(unknown):
    balance = Balance(0.5, adapts=True)
    known = {"seconds": 1.0, "near_s": 0.1, "near_bytes": 5, "slack_s": -0.5, "loaded_bytes": 5}
    known["link_rate"] = 9.0
    balance.observe(Pass(**{**known, **unknown}))
    assert balance.share == 0.5


def one_pass(balance, *, cpu, link, gap, pause=0.0, ring=1.0, heads=8, layers=32):
    """A decode step on a machine made up here. Per layer the CPU attends and then the rest of the
    layer takes `gap`; the link goes on meanwhile, at most `ring` layers' worth of heads ahead, and
    pauses for a part of each copy that its own rate does not show. Rates in heads per second."""
    now = landed = kernel_s = slack = 0.0
    all_near = 0
    for place in range(layers):
        near = balance.heads(place, heads)
        # A layer's tiles can begin when those before have left the ring.
        begun = max(landed, now - ring * heads / link)
        landed = begun + (heads - near) / link * (1 + pause)
        answered = now + near / cpu
        slack += answered - max(landed, now)
        kernel_s += near / cpu
        all_near += near
        now = max(answered, landed) + gap
    return Pass(now - gap, kernel_s, all_near, slack, heads * layers - all_near, link)


@pytest.mark.parametrize("cpu", [500.0, 2000.0, 4000.0])
@pytest.mark.parametrize("link", [500.0, 2000.0])
@pytest.mark.parametrize("gap", [0.0001, 0.001])
@pytest.mark.parametrize("pause", [0.0, 0.1])
@pytest.mark.parametrize("ring", [0.2, 1.0])
@pytest.mark.parametrize("start", [0.1, 0.6, 1.0])
def test_it_settles_near_the_best_share(cpu, link, gap, pause, ring, start):
    """Whole heads do not divide a layer finely: where the CPU is eight times as fast as the link, one
    head more or less of eight streaming is a lot."""
    machine = {"cpu": cpu, "link": link, "gap": gap, "pause": pause, "ring": ring}
    limit = 1.12 if cpu <= 4 * link else 1.2
    shares = [Balance(share / 100) for share in range(2, 101)]
    best = min(one_pass(fixed, **machine).seconds for fixed in shares)
    balance, seconds = Balance(start, adapts=True), []
    for _ in range(40):
        found = one_pass(balance, **machine)
        balance.observe(found)
        seconds.append(found.seconds)
        assert LEAST_SHARE <= balance.share <= 1
    assert max(seconds[10:]) <= limit * best


def test_copies_slower_in_a_row_than_alone_do_not_push_heads_to_the_link():
    """As on the machine it was first seen on: 51.5 GB/s a copy, 47 GB/s in a row, CPU 92 GB/s."""
    machine = {"cpu": 1370.0, "link": 767.0, "gap": 0.00035, "pause": 0.09, "ring": 0.3}
    balance = Balance(0.62, adapts=True)
    first = one_pass(balance, **machine).seconds
    for _ in range(40):
        found = one_pass(balance, **machine)
        balance.observe(found)
    assert found.seconds <= 1.05 * first


def test_it_follows_a_machine_that_changes():
    balance = Balance(0.6, adapts=True)
    for cpu in (2000.0, 300.0, 4000.0):
        for _ in range(15):
            found = one_pass(balance, cpu=cpu, link=1000.0, gap=0.0005)
            balance.observe(found)
        shares = [Balance(share / 100) for share in range(2, 101)]
        best = min(one_pass(x, cpu=cpu, link=1000.0, gap=0.0005).seconds for x in shares)
        assert found.seconds <= 1.12 * best
