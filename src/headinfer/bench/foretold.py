# SPDX-License-Identifier: Apache-2.0
"""Predicted beside measured: which rows have both, how far apart they are, and the worst of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headinfer.bench.cases import CASES, KNOWN, format_tokens
from headinfer.bench.findings import Finding
from headinfer.bench.results import Results, Row
from headinfer.cost import ANSWER_TOKENS

TIMED = ("prefill", "last chunk", "chunk", "token")
"""Metrics that the cost model predicts."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One quantity of one run: `unit` is "s" or "bytes"."""

    row: Row
    what: str
    predicted: float
    measured: float
    unit: str

    @property
    def off(self) -> float:
        """Measured over predicted, less 1."""
        return self.measured / self.predicted - 1

    @property
    def where(self) -> str:
        case = CASES.get(self.row.case)
        cap = f", {case.cap} cap" if case is not None and case.cap else ""
        return f"{format_tokens(self.row.context_tokens)}{cap}"


def pairs(results: Results) -> list[Pair]:
    """Everything that was both predicted and measured, as planned, in order."""
    found: list[Pair] = []
    peaks = set()
    for row in results.rows:
        if row.contestant != "planned" or row.median is None:
            continue
        peak, said = row.held.get("gpu_peak_bytes"), row.predicted.get("gpu_peak_bytes")
        if peak and said and row.key not in peaks:
            peaks.add(row.key)
            found.append(Pair(row, "GPU peak", said, float(peak), "bytes"))
        seconds = row.predicted.get("seconds")
        if seconds and row.metric in TIMED:
            found.append(Pair(row, row.metric, seconds, row.median, "s"))
    return found


def worst_peak(results: Results, *, above: bool) -> Finding:
    """Of predicted peaks of GPU memory, the one that was exceeded, or fallen below, the most."""
    found = [pair for pair in pairs(results) if pair.what == "GPU peak"]
    if not found:
        return Finding(None, "run --case 'predict-*'")
    pick = max if above else min
    worst = pick(found, key=lambda pair: pair.measured / pair.predicted)
    value = worst.measured / worst.predicted
    return Finding(value, f"{value:.1%} of it, {worst.where}, {worst.row.case}", "", (worst.row,))


def worst_time(metrics: Sequence[str], device: str) -> Callable[[Results], Finding]:
    """The largest distance between predicted and measured seconds on a device."""

    def find(results: Results) -> Finding:
        found = [
            pair
            for pair in pairs(results)
            if pair.what in metrics and CASES[pair.row.case].device == device
            if pair.row.case.startswith("predict-")
        ]
        if not found:
            case = "predict-smollm2" if device == "cpu" else "'predict-*'"
            return Finding(None, f"run --case {case}")
        worst = max(found, key=lambda pair: abs(pair.off))
        text = f"{worst.off:+.0%}, {worst.what} at {worst.where}"
        return Finding(abs(worst.off), text, rows=(worst.row,))

    return find


def eta_at_a_tenth(results: Results) -> Finding:
    """How far the remaining time named at a tenth of a prefill was off; the worst of long ones."""
    found = [
        (row.predicted["eta_error"], row)
        for row in results.rows
        if row.metric == "prefill" and row.context_tokens >= 128 * 1024
        if row.predicted.get("eta_error") is not None
    ]
    if not found:
        return Finding(None, "run --case predict-8b-24 --contexts 128K")
    error, row = max(found, key=lambda each: abs(each[0] or 0.0))
    text = f"{error:+.1%} at {format_tokens(row.context_tokens)}"
    return Finding(abs(error or 0.0), text, rows=(row,))


def plan_against_grid(results: Results) -> Finding:
    """Time of a request by the best settings of the grid, over its time as planned."""
    worst: tuple[float, str, Row] | None = None
    for case in (case for case in CASES.values() if case.name.startswith("plan-grid")):
        for context in dict.fromkeys(r.context_tokens for r in results.rows if r.case == case.name):
            times = {
                name: _request_s(results, case.name, name, context) for name in case.contestants
            }
            planned = times.pop("planned", None)
            tried = {name: seconds for name, seconds in times.items() if seconds is not None}
            row = results.find(case.name, "planned", context, "prefill")
            if planned is None or not tried or row is None:
                continue
            best = min(tried, key=lambda name: tried[name])
            value = tried[best] / planned
            text = f"{value:.2f}x of {KNOWN[best].label} ({case.name}, {format_tokens(context)})"
            if worst is None or value < worst[0]:
                worst = value, text, row
    if worst is None:
        return Finding(None, "run --case 'plan-grid-*'")
    return Finding(worst[0], worst[1], rows=(worst[2],))


def _request_s(results: Results, case: str, name: str, context: int) -> float | None:
    """Seconds of the prompt and an answer."""
    prefill = results.value(case, name, context, "prefill")
    token = results.value(case, name, context, "token")
    return None if prefill is None or token is None else prefill + ANSWER_TOKENS * token
