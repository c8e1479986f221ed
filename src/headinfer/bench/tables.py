# SPDX-License-Identifier: Apache-2.0
"""Results as tables: what was measured, who is how many times faster, which bounds hold.

Speed-ups appear only when exactness was checked on the same machine and version; without that
there is a sentence in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headinfer.bench.cases import CONTESTANTS, KNOWN, format_tokens
from headinfer.bench.findings import seconds
from headinfer.bench.foretold import Pair, pairs
from headinfer.bench.must_hold import HOLDS, MISSES, judge
from headinfer.bench.results import BUSY, MEASURED, Results, Row
from headinfer.budget import format_bytes

COMPARED = ("prefill", "first token", "token", "attention")
"""Metrics whose times are compared between contestants."""
_STYLES = {HOLDS: "green", MISSES: "red"}


def report(results: Results) -> RenderableType:
    """Everything there is to say about a file."""
    parts: list[RenderableType] = [_heading(results), _checks(results), _rates(results)]
    parts += list(_measured(results))
    parts += [_foretold(results)] if pairs(results) else []
    parts += [_speedups(results), _must_hold(results), Text(_footnotes(results))]
    return Group(*parts)


def markdown(results: Results) -> str:
    """The bounds and every time, as tables for a page."""
    lines = [*_heading(results).plain.splitlines(), ""]
    header = ("what", "bound", "measured", "peers here", "peers, H100 of the bounds", "")
    cells = [(v.what, v.bound, v.measured, v.peer_here, v.peer, v.state) for v in judge(results)]
    lines += [*_markdown_table(header, cells), ""]
    times = [
        (row.case, format_tokens(row.context_tokens), row.contestant + _mark(row), row.metric,
         _figure(row, row.median), _percent(row.achieved_bytes), _percent(row.achieved_flops),
         _against(row, "gpu_peak_bytes"))
        for row in sorted(results.rows, key=lambda row: (row.case, _order(row)))
        if row.unit == "s" and row.metric in COMPARED and row.median is not None
    ]  # fmt: skip
    columns = ("case", "context", "contestant", "metric", "median", "of bytes floor",
              "of FLOPs floor", "GPU peak (predicted)")  # fmt: skip
    lines += [*_markdown_table(columns, times), "", *_footnotes(results).splitlines()]
    if pairs(results):
        lines += ["", *_markdown_table(_FORETOLD, list(map(_pair, pairs(results))))]
    return "\n".join(lines)


def _foretold(results: Results) -> RenderableType:
    """What the plan and the cost model said, beside what was measured."""
    table = _table("predicted and measured", _FORETOLD)
    for pair in pairs(results):
        table.add_row(*_pair(pair))
    return table


_FORETOLD = ("case", "context", "what", "predicted", "measured", "measured is")


def _pair(pair: Pair) -> tuple[str, ...]:
    if pair.unit == "bytes":
        shown = [format_bytes(int(value)) for value in (pair.predicted, pair.measured)]
    else:
        shown = [seconds(value) for value in (pair.predicted, pair.measured)]
    simulated = " (after a simulated context)" if pair.row.simulated else ""
    where = format_tokens(pair.row.context_tokens)
    what = f"{pair.what}{_mark(pair.row)}{simulated}"
    return (pair.row.case, where, what, *shown, f"{pair.off:+.1%}")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _heading(results: Results) -> Text:
    lines = list(dict.fromkeys(str(session) for session in results.sessions))
    return Text("\n".join(lines) or "no session")


def _checks(results: Results) -> Text:
    if not results.checks:
        return Text("exactness: not checked", style="red")
    failed = [check for check in results.checks if not check.ok]
    count = len(results.checks)
    text = f"exactness: {count - len(failed)} of {count} checks hold"
    for check in failed:
        why = check.note or f"error {check.error} exceeds {check.bound}"
        text += f"\n  {'FAILED' if check.gates else 'differs'}: {check.name}: {why}"
    return Text(text, style="" if results.verified else "red")


def _rates(results: Results) -> RenderableType:
    table = _table("rates of this machine", ("rate", "median", "p20", "p80", "n", ""))
    for row in results.rows:
        if row.case == "rates" and row.median is not None:
            figures = (f"{value:.3g}" for value in (row.median, row.p20 or 0, row.p80 or 0))
            table.add_row(row.metric, *figures, str(row.n), row.unit + _mark(row))
    return table


def _measured(results: Results) -> Iterator[RenderableType]:
    for case in dict.fromkeys(row.case for row in results.rows if row.case != "rates"):
        rows = sorted((row for row in results.rows if row.case == case), key=_order)
        columns = [
            (name, [cell(row) for row in rows if row.median is not None]) for name, cell in _CELLS
        ]
        # A column that says nothing here is left out: most cases concern one memory only.
        columns = [(name, cells) for name, cells in columns if any(cells)]
        if columns:
            table = _table(case, [name for name, _ in columns])
            for cells in zip(*(cells for _, cells in columns), strict=True):
                table.add_row(*cells)
            yield table
        missing = [row for row in rows if row.status != MEASURED]
        if missing:
            yield Text("\n".join(_absent(case, missing)), style="yellow")


def _absent(case: str, rows: Sequence[Row]) -> Iterator[str]:
    """One line for each reason, with the lengths it was met at."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        lengths = reasons.setdefault((row.contestant, row.status, row.note), [])
        lengths.append(format_tokens(row.context_tokens))
    for (contestant, status, note), lengths in reasons.items():
        yield f"{case}, {contestant} at {', '.join(lengths)}: {status}: {_short(note, 200)}"


def _figure(row: Row, value: float | None) -> str:
    return "" if value is None else seconds(value) if row.unit == "s" else f"{value:.3g}"


def _spread(row: Row) -> str:
    return f"{_figure(row, row.p20)} - {_figure(row, row.p80)}" if row.n > 1 else ""


def _moved(row: Row) -> str:
    moved = row.moved_bytes.items()
    return ", ".join(f"{path} {format_bytes(int(count))}" for path, count in moved if count)


_CELLS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("contestant", lambda row: row.contestant + _mark(row)),
    ("context", lambda row: format_tokens(row.context_tokens) if row.context_tokens else ""),
    ("metric", lambda row: row.metric + ("" if row.unit == "s" else f", {row.unit}")),
    ("median", lambda row: _figure(row, row.median)),
    ("p20 - p80", _spread),
    ("n", lambda row: str(row.n)),
    ("of bytes floor", lambda row: _percent(row.achieved_bytes)),
    ("of FLOPs floor", lambda row: _percent(row.achieved_flops)),
    ("bytes moved", _moved),
    ("GPU peak (predicted)", lambda row: _against(row, "gpu_peak_bytes")),
    ("host (predicted)", lambda row: _against(row, "host_bytes")),
)


def _speedups(results: Results) -> RenderableType:
    """Times of peers over times of ours, where both were measured."""
    if not results.verified:
        return Text(f"no speed-ups: {results.why_unverified()}", style="bold red")
    peers = [name for name, each in CONTESTANTS.items() if not each.ours]
    header = ("case", "context", "metric", "headinfer", *(f"against {name}" for name in peers))
    table = _table("times faster", header)
    for row in sorted(results.rows, key=lambda row: (row.case, _order(row))):
        mine = KNOWN.get(row.contestant)
        if mine is None or not mine.ours or row.metric not in COMPARED or not row.median:
            continue
        theirs = [results.find(row.case, peer, row.context_tokens, row.metric) for peer in peers]
        if any(theirs):
            where = (row.case, format_tokens(row.context_tokens), row.metric)
            table.add_row(*where, row.contestant, *(_ratio(row, peer) for peer in theirs))
    return table if table.row_count else Text("no speed-ups: nobody to compare with was measured")


def _ratio(mine: Row, theirs: Row | None) -> str:
    if theirs is None or theirs.median is None or not mine.median:
        return ""
    return f"{theirs.median / mine.median:.2f}x{_mark(mine) or _mark(theirs)}"


def _must_hold(results: Results) -> RenderableType:
    header = ("what", "bound", "measured", "peers here", "peers, H100 of the bounds", "")
    table = _table("must hold", header, first_may_wrap=True)
    for verdict in judge(results):
        state = Text(verdict.state, style=_STYLES.get(verdict.state, "dim"))
        table.add_row(
            verdict.what, verdict.bound, verdict.measured, verdict.peer_here, verdict.peer, state
        )
    return table


def _footnotes(results: Results) -> str:
    lines = [
        "The bounds were set for one H100 with PCIe 5 and 16 vCPU; measured is the machine above.",
        "Floors: bytes moved over measured bandwidth, FLOPs over measured rate; 100 % is the limit.",
    ]
    if any(row.simulated for row in results.rows):
        lines.append("Decode and attention cases: random keys and values stand for the context.")
    if any(_mark(row) for row in results.rows):
        lines.append(
            f"*: other processes took more than {BUSY:.0%} of the CPUs meanwhile: not to be relied on."
        )
    return "\n".join(lines)


def _table(title: str, header: Sequence[str], *, first_may_wrap: bool = False) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for index, name in enumerate(header):
        wrap = index == 0 and first_may_wrap
        table.add_column(name, no_wrap=False, min_width=24 if wrap else None)
    return table


def _order(row: Row) -> tuple[int, int]:
    names = list(KNOWN)
    place = names.index(row.contestant) if row.contestant in names else len(names)
    return row.context_tokens, place


def _mark(row: Row) -> str:
    return "*" if row.disturbed else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _against(row: Row, what: str) -> str:
    held, predicted = row.held.get(what), row.predicted.get(what)
    if not held:
        return ""
    text = format_bytes(int(held))
    return f"{text} ({format_bytes(int(predicted))})" if predicted else text


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
