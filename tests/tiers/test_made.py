# SPDX-License-Identifier: Apache-2.0
"""What making host memory takes is counted, and what is waited for of it."""

from __future__ import annotations

import gc
import itertools
import threading
import time

from headinfer.budget import MIB
from headinfer.tiers import host
from headinfer.tiers.host import HostTier


def test_waiting_for_memory_that_is_being_made_is_counted(monkeypatch):
    may_end = threading.Event()

    class Slow(host._Mapping):
        def _register(self, touch):
            may_end.wait()

    monkeypatch.setattr(host, "_Mapping", Slow)
    tier = HostTier(pin=True)
    tier.prepare(MIB)
    threading.Timer(0.05, may_end.set).start()
    begun = time.perf_counter()
    tier.allocate(MIB)
    assert 0 < tier.waited_s <= time.perf_counter() - begun
    waited = tier.waited_s
    tier.prepare(2 * MIB)
    tier._ready[2 * MIB][0].result()
    tier.allocate(2 * MIB)
    assert tier.waited_s - waited < 0.05  # it was there
    assert tier.made_bytes == 3 * MIB
    tier.close()


def test_memory_is_made_with_pauses_until_somebody_waits_for_it(monkeypatch):
    """Page-locking keeps the driver from those who enqueue work: half of the time is theirs."""
    made = []

    class Slow(host._Mapping):
        def _register(self, touch):
            begun = time.perf_counter()
            time.sleep(0.05)
            made.append((begun, time.perf_counter()))

    monkeypatch.setattr(host, "_Mapping", Slow)
    tier = HostTier(pin=True)
    for _ in range(12):
        tier.prepare(MIB)
    while len(made) < 3:
        time.sleep(0.01)
    pauses = [later[0] - earlier[1] for earlier, later in itertools.pairwise(made)]
    assert all(pause >= 0.045 for pause in pauses)
    begun = time.perf_counter()
    for _ in range(12):
        tier.allocate(MIB)
    waited = [
        after - before for (_, before), (after, _) in itertools.pairwise(made) if before > begun
    ]
    assert len(waited) >= 7
    assert sorted(waited)[len(waited) // 2] < 0.045
    tier.close()


def test_nothing_is_made_beside_a_first_pass_that_makes_its_own(monkeypatch):
    """Two at a time take twice as long each, and the pass waits for its own, however long one takes."""
    made = []

    class Slow(host._Mapping):
        def _register(self, touch):
            time.sleep(0.5)
            made.append(threading.get_ident())

    monkeypatch.setattr(host, "_Mapping", Slow)
    monkeypatch.setattr(host, "PASS_GAP_S", 0.4)  # less than making one takes
    tier = HostTier(pin=True)
    for _ in range(3):
        tier.allocate(MIB)
        tier.prepare(2 * MIB)
    for _ in range(3):
        tier.allocate(2 * MIB)
    assert [thread == threading.get_ident() for thread in made] == [True] * 3 + [False] * 3
    tier.close()


def test_closing_waits_for_what_is_being_made_alone(monkeypatch):
    """Not for a pause, and not for what was to be made after it."""
    made = []

    class Slow(host._Mapping):
        def _register(self, touch):
            time.sleep(0.1)
            made.append(self)

    monkeypatch.setattr(host, "_Mapping", Slow)
    tier = HostTier(pin=True)
    for _ in range(8):
        tier.prepare(MIB)
    tier.allocate(MIB)
    tier.close()
    assert len(made) <= 3


def test_a_tier_that_is_gone_has_nothing_made(monkeypatch):
    made = []

    class Slow(host._Mapping):
        def _register(self, touch):
            time.sleep(0.05)
            made.append(1)

    monkeypatch.setattr(host, "_Mapping", Slow)
    tier = HostTier(pin=True)
    for _ in range(8):
        tier.prepare(MIB)
    thread = tier._thread
    del tier
    gc.collect()
    thread.shutdown(wait=True)
    assert len(made) <= 2
