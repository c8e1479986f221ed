# SPDX-License-Identifier: Apache-2.0
"""Every bound reads the rows it names, and says what is missing where there are none."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from headinfer.bench.must_hold import BOUNDS, HOLDS, MISSES, UNKNOWN, judge
from headinfer.bench.results import Check, Results
from headinfer.bench.tables import report


def text_of(results: Results) -> str:
    console = Console(width=240, file=io.StringIO())
    console.print(report(results))
    return console.file.getvalue()


def test_a_file_with_all_rows_holds_every_bound(synthetic: Results) -> None:
    verdicts = judge(synthetic)
    assert len(verdicts) == len(BOUNDS)
    assert [(v.what, v.measured) for v in verdicts if v.state != HOLDS] == []


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("prefill of 128K", ("prefill-8b", "planned", "prefill", 12.0)),
        ("against transformers' offloaded", ("prefill-8b", "offloaded", "prefill", 30.0)),
        ("against the HeadInfer authors'", ("prefill-8b", "schedule", "prefill", 30.0)),
        ("attention inside a chunk", ("attention-8b", "all-resident", "attention", 0.8)),
        ("first token", ("prefill-8b", "streaming", "first token", 0.5)),
        ("decode at 128K", ("decode-8b", "mixed", "token", 0.19)),
        ("pure link floor", ("decode-8b", "mixed", "token", 0.25)),
        ("streaming only", ("decode-8b", "streaming", "token", 0.5)),
        ("8K, everything resident: prefill", ("resident-8b", "all-resident", "prefill", 0.4)),
        ("8K, everything resident: decode", ("resident-8b", "all-resident", "token", 0.4)),
        ("own CPU kernel", ("cpu-attention", "native", "attention", 0.03)),
        ("SmolLM2", ("smollm2-cpu", "planned", "token", 0.31)),
        ("page-locking", ("pinning", "headinfer arena", "again", 0.2)),
        ("predicted time of a prefill", ("predict-8b-24", "planned", "prefill", 12.0)),
        ("predicted time of a decoded", ("predict-8b-20", "planned", "token", 7.0)),
        ("predicted times on a CPU", ("predict-smollm2", "planned", "token", 13.0)),
        ("plan without arguments", ("plan-grid-8b", "planned", "prefill", 6.0)),
        ("do not come back", ("lossless-format", "codec", "wrong values", 1.0)),
        ("mixed decode of 128K keys", ("lossless-decode-8b", "mixed-lossless", "token", 0.16)),
        ("prefill over 128K", ("lossless-prefill-8b", "streaming-lossless", "prefill", 11.6)),
        ("1,000,000", ("lossless-million-8b", "planned-lossless", "token", 1.4)),
    ],
)
def test_a_worse_figure_misses_its_bound(synthetic: Results, what: str, change) -> None:
    case, contestant, metric, value = change
    context = next(
        row.context_tokens
        for row in reversed(synthetic.rows)
        if (row.case, row.contestant, row.metric) == (case, contestant, metric)
        and row.context_tokens in (0, 8192, 32768, 120 * 1024, 131072, 1_000_000)
        and (not case.endswith("decode-8b") or row.context_tokens == 131072)
    )
    synthetic.rows = [
        replace(row, median=value)
        if row.key == (case, contestant, context) and row.metric == metric
        else row
        for row in synthetic.rows
    ]
    states = {v.what: v.state for v in judge(synthetic)}
    assert [state for name, state in states.items() if what in name] == [MISSES]


@pytest.mark.parametrize(
    ("what", "name", "value"),
    [
        ("packed stream", "packed stream", 0.32),
        ("native kernel over packed", "native, packed", 0.03),
    ],
)
def test_slower_turns_miss_their_bound(
    synthetic: Results, what: str, name: str, value: float
) -> None:
    synthetic.rows = [
        replace(row, values=(value, 9.0)) if row.contestant == name else row
        for row in synthetic.rows
    ]
    assert [v.state for v in judge(synthetic) if what in v.what] == [MISSES]


@pytest.mark.parametrize(
    ("what", "held"),
    [("staging", {"staging_bytes": 300 * 2**20}), ("host RAM", {"host_bytes": 17 * 2**30})],
)
def test_more_memory_misses_its_bound(synthetic: Results, what: str, held: dict[str, int]) -> None:
    last = synthetic.find("decode-8b", "streaming", 131072, "token")
    assert last is not None
    synthetic.rows[synthetic.rows.index(last)] = replace(last, held={**last.held, **held})
    assert [v.state for v in judge(synthetic) if what in v.what] == [MISSES]


def test_nothing_measured_is_said_and_how_to_get_it() -> None:
    verdicts = judge(Results(checks=[Check("fine", True, 0.0, 1.0)]))
    assert {v.state for v in verdicts} == {UNKNOWN}
    assert all("run --case" in v.measured for v in verdicts)


def test_what_became_of_a_run_is_said(synthetic: Results) -> None:
    synthetic.rows = [r for r in synthetic.rows if r.contestant not in ("mixed", "streaming")]
    synthetic.rows.append(
        replace(
            synthetic.rows[-1], contestant="mixed", status="not available", note="", median=None
        )
    )
    (verdict,) = [v for v in judge(synthetic) if v.what == "decode at 128K, no resident heads"]
    assert (verdict.state, verdict.measured) == (UNKNOWN, "mixed: not available in this version")


@pytest.mark.parametrize("checks", [[], [Check("streaming is exact", False, 2.0, 1.0)]])
def test_unproven_exactness_withholds_every_ratio(synthetic: Results, checks: list[Check]) -> None:
    assert "3.55x" in text_of(synthetic)
    synthetic.checks = checks
    for bound, verdict in zip(BOUNDS, judge(synthetic), strict=True):
        assert (verdict.state == UNKNOWN) == bound.is_ratio
    shown = text_of(synthetic)
    assert "3.55x" not in shown
    assert "no speed-ups: exactness" in shown
    assert "11 s" in shown  # times are facts, and stay


def test_two_processes_and_busy_machines_are_marked(synthetic: Results) -> None:
    synthetic.rows = [
        replace(row, session=1, others_busy=0.5) if row.contestant == "offloaded" else row
        for row in synthetic.rows
    ]
    (verdict,) = [v for v in judge(synthetic) if "offloaded" in v.what]
    assert "two processes" in verdict.measured
    assert verdict.state == "holds, disturbed"
    assert "offloaded*" in text_of(synthetic)


def test_the_table_names_the_machine_and_peers(synthetic: Results) -> None:
    shown = text_of(synthetic)
    assert "NVIDIA H100, Some CPU, 16 CPU threads, torch 2.11.0" in shown
    assert "39 s / 44 s" in shown
    assert "decode-8b, resident at 128K: out of memory: no room" in shown
