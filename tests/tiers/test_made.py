# SPDX-License-Identifier: Apache-2.0
"""What making host memory takes is counted, and what is waited for of it."""

from __future__ import annotations

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
