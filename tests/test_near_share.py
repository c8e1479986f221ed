# SPDX-License-Identifier: Apache-2.0
"""The CPU's share of the heads in a runner whose share adapts: it moves from wherever it began."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headinfer import tile_loop
from headinfer.attention.masks import Causal
from headinfer.layer import RunnerSettings
from headinfer.near import Lap, NearData
from headinfer.runner import Runner
from headinfer.totals import Query

LAYERS, HEADS, DIM = 4, 4, 16


def a_pass(runner: Runner, length: int) -> int:
    """One token through all layers; heads of the CPU after it."""
    for index in range(LAYERS):
        k, v = torch.randn(2, 1, HEADS, 1, DIM)
        q = torch.randn(1, HEADS, 1, DIM)
        runner.append(index, k, v)
        runner.attend(index, length + 1, Query(q, 0.25, Causal(length), DIM))
    return runner.stats().near_heads


@pytest.mark.parametrize("first", [0.02, 0.5, 1.0])
def test_a_share_moves_from_wherever_it_began(
    first: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all heads on the CPU there is no tile to list, and lists are where shares are dealt out."""
    slack: list[float] = [0.0]

    def lap(near: Any) -> Lap | None:
        near._finished.clear()
        return Lap(0.1, near_s=0.1, near_bytes=1000, slack_s=slack[0])

    monkeypatch.setattr(NearData, "lap", lap)
    monkeypatch.setattr(tile_loop, "NEAR_BYTES", 0)
    settings = RunnerSettings(
        staging=True, slot_bytes=2**14, num_slots=4, write_bytes=2**14,
        near_share=first, near_adapts=True,
    )  # fmt: skip
    runner = Runner(settings)
    for index in range(LAYERS):
        k, v = torch.randn(2, 1, HEADS, 256, DIM)
        runner.append(index, k, v)
        q = torch.randn(1, HEADS, 256, DIM)
        runner.attend(index, 256, Query(q, 0.25, Causal(0), DIM))
    length = 256
    for late, wanted in ((9.0, 1), (-9.0, LAYERS * HEADS), (9.0, 1)):
        slack[0] = late
        for _ in range(40):
            found = a_pass(runner, length)
            length += 1
        assert found == wanted
    runner.close()
