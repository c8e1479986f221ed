# SPDX-License-Identifier: Apache-2.0
"""The share of the CPU: rounding over layers, and where it settles on machines made up here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.balance import LEAST_SHARE, Balance, Pass


def shared_out(balance, counts):
    """Heads of layers with `counts` offloaded ones that the CPU attends."""
    return [balance.heads(sum(counts[:place]), count) for place, count in enumerate(counts)]


@given(
    share=st.floats(0, 1),
    counts=st.lists(st.integers(0, 16), min_size=1, max_size=80),
    adapts=st.booleans(),
)
def test_rounding_follows_the_share_over_all_layers(share, counts, adapts):
    """Whichever layers are resident, as a whole or in part."""
    heads = shared_out(Balance(share, adapts), counts)
    assert all(0 <= n <= count for n, count in zip(heads, counts, strict=True))
    assert abs(sum(heads) - share * sum(counts)) <= 1


@given(
    share=st.floats(LEAST_SHARE, 1), counts=st.lists(st.integers(0, 16), min_size=1, max_size=80)
)
def test_while_it_adapts_one_head_is_attended_by_the_cpu(share, counts):
    """Without any its rate would not be seen, and the share would stay where it is."""
    assert sum(shared_out(Balance(share, adapts=True), counts)) >= min(sum(counts), 1)


def test_a_fixed_share_stays():
    balance = Balance(0.5)
    balance.observe(Pass(1.0, 0.1, 10, -0.5, 10, 1.0))
    assert balance.share == 0.5


@pytest.mark.parametrize("unknown", [{"near_bytes": 0}, {"near_s": 0.0}])
def test_nothing_is_concluded_from_half_a_measurement(unknown):
    balance = Balance(0.5, adapts=True)
    known = {"seconds": 1.0, "near_s": 0.1, "near_bytes": 5, "slack_s": -0.5, "loaded_bytes": 5}
    known["link_rate"] = 9.0
    balance.observe(Pass(**{**known, **unknown}))
    assert balance.share == 0.5


def test_a_cpu_that_was_given_everything_gives_some_to_a_link_nobody_has_seen():
    """Where no tile was ever copied the link's rate is not known, and would never be."""
    balance = Balance(1.0, adapts=True)
    late = Pass(0.1, near_s=0.09, near_bytes=3_400, slack_s=0.093, loaded_bytes=0, link_rate=None)
    balance.observe(late)
    assert LEAST_SHARE < balance.share < 0.9
    settled = Balance(1.0, adapts=True)
    settled.observe(replace(late, slack_s=-0.01))
    assert settled.share == 1.0


def one_pass(balance, *, cpu, link, gap, pause=0.0, ring=1.0, heads=8, layers=32, resident=()):
    """A decode step on a machine made up here. Per layer the CPU attends and then the rest of the
    layer takes `gap`; the link goes on meanwhile, at most `ring` layers' worth of heads ahead, and
    pauses for a part of each copy that its own rate does not show. Rates in heads per second."""
    now = landed = kernel_s = slack = 0.0
    all_near = all_heads = 0
    for place in range(layers):
        if place in resident:
            now += gap
            continue
        near = balance.heads(all_heads, heads)
        all_heads += heads
        # A layer's tiles can begin when those before have left the ring.
        begun = max(landed, now - ring * heads / link)
        landed = begun + (heads - near) / link * (1 + pause)
        answered = now + near / cpu
        slack += answered - max(landed, now)
        kernel_s += near / cpu
        all_near += near
        now = max(answered, landed) + gap
    return Pass(now - gap, kernel_s, all_near, slack, all_heads - all_near, link)


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


@pytest.mark.parametrize(
    ("layers", "heads"), [(28, 2), (36, 2), (24, 2), (61, 1), (28, 4), (32, 8)]
)
@pytest.mark.parametrize("start", [0.25, 0.5, 0.02])
@pytest.mark.parametrize(("cpu", "link"), [(1370.0, 767.0), (2000.0, 500.0)])
def test_it_settles_where_every_second_layer_is_resident(layers, heads, start, cpu, link):
    machine = {"cpu": cpu, "link": link, "gap": 0.0003, "ring": 0.5, "heads": heads}
    machine |= {"layers": layers, "resident": range(0, layers, 2)}
    best = min(one_pass(Balance(share / 100), **machine).seconds for share in range(2, 101))
    balance = Balance(start, adapts=True)
    seconds = []
    for _ in range(60):
        found = one_pass(balance, **machine)
        balance.observe(found)
        seconds.append(found.seconds)
    assert max(seconds[20:]) <= (1.35 if heads < 4 else 1.2) * best


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
