# SPDX-License-Identifier: Apache-2.0
"""What a run reports while it works, and how long it will still take.

Events are plain records handed to an `Observer`. `PrefillClock` turns them into a remaining time:
attention makes the time per token grow with the tokens already read, so a linear bar would lie.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ForwardStarted:
    """One forward pass of the model is enqueued from now on: `new_tokens` on top of `past_tokens`."""

    past_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class ForwardFinished:
    """One forward pass of a prompt has been computed; one of a single token, enqueued.

    `seconds` is host time since the matching `ForwardStarted`. On a GPU it comes while the next
    pass is being computed.
    """

    past_tokens: int
    new_tokens: int
    seconds: float


Event = ForwardStarted | ForwardFinished


class Observer(Protocol):
    """Receives events on the thread that runs the model; must return quickly and never raise."""

    def on_event(self, event: Event) -> None: ...


@dataclass(slots=True)
class PrefillClock:
    """Remaining time of a prefill from the chunks seen so far.

    The model: a chunk of n tokens after p tokens takes `a * n + b * n * (p + n / 2)` seconds,
    projections and MLP linear, attention proportional to the keys each query sees. `a` and `b`
    are fitted by least squares over the observed chunks, both kept at 0 or above.

    Attributes:
        total_tokens: prompt length.
    """

    total_tokens: int
    _done: int = 0
    _seconds: float = 0.0
    _rows: list[tuple[float, float, float]] = field(default_factory=list)

    def resume(self, done_tokens: int) -> None:
        """The first `done_tokens` were there already and took no time."""
        self._done = done_tokens

    def observe(self, done_tokens: int, seconds: float) -> None:
        """Record that `done_tokens` in all were finished `seconds` after the start."""
        new = done_tokens - self._done
        if new <= 0:
            return
        work = new * (self._done + new / 2)
        self._rows.append((float(new), float(work), max(seconds - self._seconds, 0.0)))
        self._done, self._seconds = done_tokens, seconds

    @property
    def done_tokens(self) -> int:
        return self._done

    def eta_s(self) -> float | None:
        """Seconds still to go; None before the first observation."""
        if not self._rows:
            return None
        left = max(self.total_tokens - self._done, 0)
        linear, quadratic = self._fit()
        return linear * left + quadratic * left * (self._done + left / 2)

    def fraction(self) -> float:
        """Share of the predicted time that has passed, between 0 and 1."""
        eta = self.eta_s()
        if eta is None:
            return 0.0
        whole = self._seconds + eta
        return 1.0 if whole <= 0 else min(self._seconds / whole, 1.0)

    def _fit(self) -> tuple[float, float]:
        nn = sum(n * n for n, _, _ in self._rows)
        nw = sum(n * w for n, w, _ in self._rows)
        ww = sum(w * w for _, w, _ in self._rows)
        ns = sum(n * s for n, _, s in self._rows)
        ws = sum(w * s for _, w, s in self._rows)
        det = nn * ww - nw * nw
        # One chunk, or chunks of identical work, cannot tell the two terms apart.
        if len(self._rows) > 1 and det > 1e-9 * nn * ww:
            linear, quadratic = (ns * ww - ws * nw) / det, (nn * ws - nw * ns) / det
            if linear >= 0 and quadratic >= 0:
                return linear, quadratic
            if linear < 0:
                return 0.0, max(ws / ww, 0.0)
        return ns / nn, 0.0
