# SPDX-License-Identifier: Apache-2.0
"""Predicted beside measured, for the latest request of a session.

Times come from the events of forward passes: a prompt is read until the first pass of a single
token begins, and from then on a token takes what lies between two of these.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from headinfer.budget import format_bytes
from headinfer.cost import Prediction
from headinfer.decision import Plan
from headinfer.layer import Stats
from headinfer.progress import Event, ForwardFinished, ForwardStarted, Observer


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity; None where it was not predicted, or not measured. `unit` is "s" or "bytes"."""

    name: str
    predicted: float | None
    measured: float | None
    unit: str

    def __str__(self) -> str:
        shown = [_shown(value, self.unit) for value in (self.predicted, self.measured)]
        off = ""
        if self.predicted and self.measured:
            off = f" ({self.measured / self.predicted - 1:+.0%})"
        return f"{self.name}: predicted {shown[0]}, measured {shown[1]}{off}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was said beforehand of a request, beside what came."""

    figures: tuple[Figure, ...]

    def as_dict(self) -> dict[str, dict[str, float | None]]:
        """Plain values, for JSON."""
        return {
            figure.name: {
                f"predicted_{figure.unit}": figure.predicted,
                f"measured_{figure.unit}": figure.measured,
            }
            for figure in self.figures
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self.figures))


@dataclass(slots=True)
class RequestClock:
    """An observer that times the latest request, and tells another observer everything, too.

    Attributes:
        inner: told first; None for nobody.
        prompt_tokens: read by the latest request.
        prefill_s: until its first token was chosen; None before that.
        gaps: seconds between single tokens.
    """

    inner: Observer | None = None
    now: Callable[[], float] = time.perf_counter
    prompt_tokens: int = 0
    prefill_s: float | None = None
    gaps: list[float] = field(default_factory=list)
    _began: float | None = None
    _last: float | None = None

    def on_event(self, event: Event) -> None:
        if self.inner is not None:
            self.inner.on_event(event)
        if isinstance(event, ForwardStarted):
            self._started(event)
        elif isinstance(event, ForwardFinished) and event.new_tokens > 1:
            self.prompt_tokens = event.past_tokens + event.new_tokens

    def _started(self, event: ForwardStarted) -> None:
        now = self.now()
        if event.past_tokens == 0:
            self.prompt_tokens, self.prefill_s, self._began = 0, None, now
            self.gaps.clear()
            self._last = None
        elif event.new_tokens == 1:
            if self.prefill_s is None and self._began is not None:
                self.prefill_s = now - self._began
            elif self._last is not None:
                self.gaps.append(now - self._last)
            self._last = now

    @property
    def token_s(self) -> float | None:
        """The median token; None with fewer than two."""
        return statistics.median(self.gaps) if self.gaps else None


def compare(
    plan: Plan,
    stats: Stats,
    clock: RequestClock,
    prediction: Prediction | None,
    gpu_peak_bytes: int | None,
) -> Comparison:
    """Every quantity that is predicted or measured."""
    return Comparison(tuple(_figures(plan, stats, clock, prediction, gpu_peak_bytes)))


def _figures(
    plan: Plan,
    stats: Stats,
    clock: RequestClock,
    prediction: Prediction | None,
    gpu_peak_bytes: int | None,
) -> Iterator[Figure]:
    ttft = None if prediction is None else prediction.prefill_s
    token = None if prediction is None else prediction.decode_s
    yield Figure("time to the first token", ttft, clock.prefill_s, "s")
    yield Figure("time per token", token, clock.token_s, "s")
    if gpu_peak_bytes is not None:
        yield Figure("GPU peak", plan.gpu_bytes, gpu_peak_bytes, "bytes")
    if plan.expected_tokens is not None:
        yield Figure("keys and values in host memory", plan.host_bytes, stats.host_bytes, "bytes")


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return format_bytes(int(value))
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"
