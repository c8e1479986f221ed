# SPDX-License-Identifier: Apache-2.0
"""What several laws look at."""

from __future__ import annotations

import pytest

from headinfer import totals


@pytest.fixture
def staged_shapes(monkeypatch):
    """Shapes of keys, and strides of keys and values, of every call that is not causal, as if the
    kernel were built anew for each."""
    monkeypatch.setattr(totals, "built_per_shape", lambda *spec: True)
    seen = set()
    attended = totals.attend

    def recorded(q, k, v, **how):
        if not how["causal"]:
            seen.add((tuple(k.shape), k.stride(1), v.stride(1)))
        return attended(q, k, v, **how)

    monkeypatch.setattr(totals, "attend", recorded)
    return seen
