# SPDX-License-Identifier: Apache-2.0
"""Time on a device, and the time that is left for measuring."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headinfer.bench.machine import settle


class OutOfTime(Exception):
    """The time allowed is used up; the run under way counts for nothing."""


class Deadline:
    """`seconds` from now; None never comes."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Raises OutOfTime when it is past."""
        if self._end is not None and time.monotonic() >= self._end:
            raise OutOfTime


class Marks:
    """Moments in the work of a device, without making the host wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def add(self) -> None:
        """The device gets here."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def between(self) -> list[float]:
        """Seconds between one mark and the next; waits for the device."""
        settle(self._device)
        if self._device.type != "cuda":
            return [b - a for a, b in pairwise(self._marks)]
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._marks)]


@contextmanager
def attention_timed(model: PreTrainedModel, marks: Marks) -> Iterator[None]:
    """Every attention call of `model` has a mark before and one after it."""
    name = model.config._attn_implementation
    inner = ALL_ATTENTION_FUNCTIONS[name]

    def timed(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        marks.add()
        found: tuple[Tensor, Tensor | None] = inner(*args, **kwargs)
        marks.add()
        return found

    ALL_ATTENTION_FUNCTIONS.register(name, timed)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, inner)


def times(work: Any, device: torch.device, repeats: int, *, deadline: Deadline) -> list[float]:
    """Seconds of `repeats` calls of `work`, after one that does not count."""
    found = []
    for turn in range(repeats + 1):
        deadline.check()
        settle(device)
        start = time.perf_counter()
        work()
        settle(device)
        if turn:
            found.append(time.perf_counter() - start)
    return found
