# SPDX-License-Identifier: Apache-2.0
"""Seconds of work on a device, whatever the host does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BUSY, BUSY_TIMES = 8192, 2
"""Rows of the matrices that keep a GPU busy while the host enqueues what is timed, and how often they are
multiplied."""
LASTING_S = 0.15


class Clock:
    """Seconds of work on a device, of several runs after one that warms up.

    On a GPU the shortest, by its own clock, from when it begins to when it is done, and it is kept busy
    while the host enqueues: a host that is slow, or just now slowed down, is measured elsewhere. On a CPU
    the median: whatever else goes on there will go on while a model runs. With `shortest` the shortest
    there too, which is what a machine can do.
    """

    def __init__(self, device: torch.device, *, shortest: bool = False) -> None:
        self._shortest = shortest
        self._device = device
        self._busy: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda":
            x = torch.zeros((BUSY, BUSY), dtype=torch.bfloat16, device=device)
            self._busy = x, torch.empty_like(x)

    def seconds(self, run: Callable[[], Any], *, times: int = 5) -> float:
        run()
        if self._busy is not None:
            return min(self._on_device(run, *self._busy) for _ in range(times))
        found = []
        for _ in range(times):
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
        return min(found) if self._shortest else sorted(found)[times // 2]

    def lasting_seconds(self, run: Callable[[], Any], *, times: int) -> float:
        """Of one of many runs on end: a GPU that multiplies for longer than an instant slows down, for
        the power it takes."""
        once = self.seconds(run, times=times)
        if self._busy is None:
            return once
        count = max(int(LASTING_S / once), 1)

        def again() -> None:
            for _ in range(count):
                run()

        return self._on_device(again, *self._busy) / count

    def wait(self) -> None:
        """Return when the device has nothing to do."""
        if self._busy is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def _on_device(self, run: Callable[[], Any], x: Tensor, out: Tensor) -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(BUSY_TIMES):
            torch.mm(x, x, out=out)
        begun.record()
        run()
        ended.record()
        self.wait()
        return float(begun.elapsed_time(ended)) / 1e3
