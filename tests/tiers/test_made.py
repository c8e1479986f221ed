# SPDX-License-Identifier: Apache-2.0
"""What making host memory takes is counted, and what is waited for of it."""

from __future__ import annotations

import time

from headinfer.budget import MIB
from headinfer.tiers import host
from headinfer.tiers.host import HostTier


def test_waiting_for_memory_that_is_being_made_is_counted(monkeypatch):
    class Slow(host._Mapping):
        def _register(self, touch):
            time.sleep(0.05)

    monkeypatch.setattr(host, "_Mapping", Slow)
    tier = HostTier(pin=True)
    tier.prepare(MIB)
    tier.allocate(MIB)
    assert 0.01 < tier.waited_s < 5
    waited = tier.waited_s
    tier.prepare(2 * MIB)
    while not all(made.done() for made in tier._ready[2 * MIB]):
        time.sleep(0.001)
    tier.allocate(2 * MIB)
    assert tier.waited_s - waited < 0.05  # it was there
    assert tier.made_bytes == 3 * MIB
    assert tier.made_s >= 0.1
    tier.close()
