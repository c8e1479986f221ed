# SPDX-License-Identifier: Apache-2.0
"""Forward passes as they are computed, not as they are enqueued.

A GPU's host can enqueue a whole prefill in a second and then show nothing for minutes. Passes are
therefore reported when the device has finished them, and at most two are outstanding, which keeps
the device busy and its queue, with the memory it holds, short.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from headinfer.progress import ForwardFinished, ForwardStarted, Observer

OUTSTANDING = 2
DECODE_TOKENS = 16
"""Passes up to this size follow a prompt rather than being part of it."""

Wait = Callable[[], None] | None
"""Waits for the device; None where it works while the host waits anyway."""


@dataclass(frozen=True, slots=True)
class _Pass:
    past_tokens: int
    new_tokens: int
    started: float
    wait: Wait


class Passes:
    """Tells an observer about passes in order.

    Args:
        observer: told when a pass begins and when it has been computed; None waits all the same.
        mark: returns what waits for everything enqueued so far.
    """

    def __init__(self, observer: Observer | None, mark: Callable[[], Wait]) -> None:
        self._observer = observer
        self._mark = mark
        self._outstanding: deque[_Pass] = deque()
        self._started = 0.0

    def begin(self, past_tokens: int, new_tokens: int) -> None:
        """A pass is about to be enqueued."""
        if new_tokens <= DECODE_TOKENS:
            self.flush()
        if self._observer is not None:
            self._observer.on_event(ForwardStarted(past_tokens, new_tokens))
        self._started = time.perf_counter()

    def end(self, past_tokens: int, new_tokens: int) -> None:
        """It has been enqueued."""
        self._outstanding.append(_Pass(past_tokens, new_tokens, self._started, self._mark()))
        while len(self._outstanding) >= OUTSTANDING or self._ready:
            self._report()
        if new_tokens <= DECODE_TOKENS:
            self._forget()

    @property
    def _ready(self) -> bool:
        return bool(self._outstanding) and self._outstanding[0].wait is None

    def flush(self) -> None:
        """Wait for what is outstanding and report it."""
        while self._outstanding:
            self._report()

    def drop(self) -> None:
        """Report no more of what is outstanding."""
        self._outstanding.clear()

    def _report(self) -> None:
        done = self._outstanding.popleft()
        if done.wait is not None:
            done.wait()
        self._tell(done)

    def _forget(self) -> None:
        """A token's pass is reported at once: whoever reads the token waits for it."""
        while self._outstanding:
            self._tell(self._outstanding.popleft())

    def _tell(self, done: _Pass) -> None:
        if self._observer is not None:
            seconds = time.perf_counter() - done.started
            self._observer.on_event(ForwardFinished(done.past_tokens, done.new_tokens, seconds))


def mark_on(device: torch.device) -> Callable[[], Wait]:
    """What makes marks on the current stream of `device`; on a CPU there is nothing to wait for."""

    def mark() -> Wait:
        if device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event.synchronize

    return mark
