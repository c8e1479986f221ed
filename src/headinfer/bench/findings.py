# SPDX-License-Identifier: Apache-2.0
"""Reads single quantities off the rows of a file, or says which run would give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headinfer.bench.cases import CASES, CONTESTANTS, KIB, format_tokens
from headinfer.bench.results import MEASURED, NOT_AVAILABLE, Results, Row

LONG = 128 * KIB
TORCH_CPU_ATTENTION = ("cpu-flash", "reference", "torch sdpa", "torch sdpa, packed", "torch matmul")
"""What torch offers; any other implementation measured beside them is a kernel of our own."""
OURS_ALONE = ("mixed", "streaming")
"""Who stands for headinfer with nothing resident, best first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What the rows say about one bound.

    Attributes:
        value: the figure to hold against the bound; None where a row is missing.
        text: the figure with its unit, or why there is none.
        peer: what a peer took in the same file; empty where none was measured.
        rows: those it was read from.
    """

    value: float | None
    text: str
    peer: str = ""
    rows: tuple[Row, ...] = ()


def time(
    case: str, contestants: Sequence[str], context: int, metric: str
) -> Callable[..., Finding]:
    """Seconds of the first of `contestants` that was measured; peers' times beside."""

    def find(results: Results) -> Finding:
        for name in contestants:
            row = results.find(case, name, context, metric)
            if row is not None and row.median is not None:
                who = "" if name == contestants[0] else f" ({CONTESTANTS[name].label})"
                text = f"{seconds(row.median)}{who}"
                peers = _peers(results, case, context, metric)
                return Finding(row.median, text, peers, (row,))
        return Finding(None, _missing(results, case, contestants[0], context))

    return find


def speedup(case: str, ours: str, peer: str, context: int, metric: str) -> Callable[..., Finding]:
    """How many times faster `ours` is than `peer`."""

    def find(results: Results) -> Finding:
        mine, theirs = (results.find(case, name, context, metric) for name in (ours, peer))
        for row, name in ((mine, ours), (theirs, peer)):
            if row is None or row.median is None:
                return Finding(None, _missing(results, case, name, context))
        if mine is None or theirs is None or not mine.median or theirs.median is None:
            return Finding(None, "no time")
        value = theirs.median / mine.median
        text = f"{value:.2f}x{_apart(mine, theirs)}"
        took = f"{seconds(theirs.median)} against {seconds(mine.median)}"
        return Finding(value, text, took, (mine, theirs))

    return find


def quicker(case: str, ours: str, other: str, context: int, metric: str) -> Callable[..., Finding]:
    """How many times faster `ours` is than `other` by the best of their turns: rows of one run, on a
    machine whose neighbours come and go."""

    def find(results: Results) -> Finding:
        mine, theirs = (results.find(case, name, context, metric) for name in (ours, other))
        if mine is None or theirs is None or not mine.values or not theirs.values:
            return Finding(None, f"run --case {case}")
        value = min(theirs.values) / min(mine.values)
        medians = f"medians {seconds(mine.median or 0.0)} against {seconds(theirs.median or 0.0)}"
        return Finding(value, f"{value:.2f}x ({medians})", rows=(mine, theirs))

    return find


def row_value(case: str, name: str, context: int, metric: str) -> Callable[..., Finding]:
    """What one row says."""

    def find(results: Results) -> Finding:
        row = results.find(case, name, context, metric)
        if row is None or row.median is None:
            return Finding(None, f"run --case {case}")
        return Finding(row.median, f"{row.median:,.0f} {row.unit}", rows=(row,))

    return find


def first_token(results: Results) -> Finding:
    """The worst of ours: first token after a prefill over a steady one."""
    found: list[tuple[float, Row]] = []
    for row in _ours(results, "prefill-8b", "first token"):
        steady = results.value(row.case, row.contestant, row.context_tokens, "token")
        if steady and row.median:
            found.append((row.median / steady, row))
    if not found:
        return Finding(None, _missing(results, "prefill-8b", "planned", LONG))
    value, worst = max(found, key=lambda each: each[0])
    where = f"{worst.contestant}, {format_tokens(worst.context_tokens)}"
    peer = _peers(results, "prefill-8b", LONG, "first token")
    return Finding(value, f"{value:.2f}x at worst ({where})", peer, (worst,))


def link_floor(results: Results) -> Finding:
    """Time of all keys and values over the link alone, over the time taken."""
    rate = results.rate("h2d")
    for name in OURS_ALONE:
        row = results.find("decode-8b", name, LONG, "token")
        if row is None or not row.median or rate is None:
            continue
        value = row.held["kv_bytes"] / rate / row.median
        who = "" if name == OURS_ALONE[0] else f" ({CONTESTANTS[name].label})"
        return Finding(value, f"{value:.2f}x faster{who}", rows=(row,))
    if rate is None:
        return Finding(None, _missing(results, "rates", "machine", 0))
    return Finding(None, _missing(results, "decode-8b", OURS_ALONE[0], LONG))


def streaming_rate(results: Results) -> Finding:
    rate, row = results.rate("h2d"), results.find("decode-8b", "streaming", LONG, "token")
    if rate is None:
        return Finding(None, _missing(results, "rates", "machine", 0))
    if row is None or not row.median or "h2d" not in row.moved_bytes:
        return Finding(None, _missing(results, "decode-8b", "streaming", LONG))
    achieved = row.moved_bytes["h2d"] / row.median
    text = f"{achieved / rate:.1%} of {rate / 1e9:.1f} GB/s"
    return Finding(achieved / rate, text, rows=(row,))


def chunk_attention(results: Results) -> Finding:
    context = CASES["attention-8b"].contexts[0]
    streamed, there = (
        results.find("attention-8b", name, context, "attention")
        for name in ("streaming", "all-resident")
    )
    if streamed is None or there is None or not streamed.median or not there.median:
        absent = "streaming" if streamed is None else "all-resident"
        return Finding(None, _missing(results, "attention-8b", absent, context))
    value = there.median / streamed.median
    return Finding(value, f"{value:.1%}{_apart(streamed, there)}", rows=(streamed, there))


def staging(results: Results) -> Finding:
    rows = [row for row in _ours(results, "*", "") if row.held.get("staging_bytes")]
    rows = [row for row in rows if row.case.endswith("8b")]
    if not rows:
        return Finding(None, _missing(results, "decode-8b", "streaming", LONG))
    most = max(row.held["staging_bytes"] for row in rows)
    longest = max(row.context_tokens for row in rows)
    return Finding(most, f"{most / 2**20:.0f} MiB, up to {format_tokens(longest)}")


def host_memory(results: Results) -> Finding:
    """Host memory of runs with nothing resident, per byte of keys and values held."""
    shares = [
        row.held["host_bytes"] / row.held["kv_bytes"]
        for row in _ours(results, "*", "")
        if row.held.get("host_bytes")
        and not row.held.get("resident_bytes")
        and row.context_tokens >= 32 * KIB
        and row.case.endswith("8b")
    ]
    if not shares:
        return Finding(None, _missing(results, "decode-8b", "streaming", LONG))
    peers = [
        f"{row.contestant} {row.held['pinned_bytes'] / row.held['kv_bytes']:.1f}x pinned"
        for row in results.rows
        if row.key[0] == "decode-8b" and row.context_tokens == LONG and row.metric == "token"
        and row.held.get("pinned_bytes") and not CONTESTANTS[row.contestant].ours
    ]  # fmt: skip
    return Finding(max(shares), f"{max(shares):.3f}x", ", ".join(peers))


def native(results: Results) -> Finding:
    context = CASES["cpu-attention"].contexts[0]
    rows = [
        row
        for row in results.rows
        if row.case == "cpu-attention" and row.status == MEASURED and row.context_tokens == context
    ]
    torchs = {
        r.contestant: r.median for r in rows if r.median and r.contestant in TORCH_CPU_ATTENTION
    }
    ours = {
        r.contestant: r.median for r in rows if r.median and r.contestant not in TORCH_CPU_ATTENTION
    }
    if not torchs:
        return Finding(None, _missing(results, "cpu-attention", "cpu-flash", context))
    best, fastest = min((median, name) for name, median in torchs.items())
    peer = f"{fastest} {seconds(best)}"
    if not ours:
        return Finding(None, "no kernel of our own in this version", peer)
    mine, name = min((median, name) for name, median in ours.items())
    text = f"{best / mine:.2f}x ({name} {seconds(mine)})"
    return Finding(best / mine, text, peer, tuple(rows))


def pinning(results: Results) -> Finding:
    ours, torchs = (
        results.find("pinning", name, 0, "again")
        for name in ("headinfer arena", "torch pin_memory")
    )
    if ours is None or torchs is None or not ours.median or not torchs.median:
        return Finding(None, _missing(results, "pinning", "headinfer arena", 0))
    value = torchs.median / ours.median
    took = f"{torchs.median:.2f} against {ours.median:.2f} s/GiB"
    return Finding(value, f"{value:.1f}x", took, (ours, torchs))


def _ours(results: Results, case: str, metric: str) -> list[Row]:
    """Measured rows of headinfer; "*" and "" for any case and metric."""
    return [
        row
        for row in results.rows
        if row.status == MEASURED
        and row.contestant in CONTESTANTS
        and CONTESTANTS[row.contestant].ours
        and case in ("*", row.case)
        and metric in ("", row.metric)
    ]


def _peers(results: Results, case: str, context: int, metric: str) -> str:
    names = [name for name, each in CONTESTANTS.items() if not each.ours]
    found = [(name, results.value(case, name, context, metric)) for name in names]
    return ", ".join(f"{name} {seconds(value)}" for name, value in found if value is not None)


def _missing(results: Results, case: str, contestant: str, context: int) -> str:
    """Why there is no row: what became of the run, or how to get it."""
    for row in results.rows:
        if row.key == (case, contestant, context) and row.status != MEASURED:
            return f"{contestant}: {row.status}" + (
                " in this version" if row.status == NOT_AVAILABLE else ""
            )
    length = f" --contexts {format_tokens(context)}" if context else ""
    return f"run --case {case}{length}"


def _apart(one: Row, other: Row) -> str:
    return "" if one.session == other.session else " (two processes)"


def seconds(value: float) -> str:
    """With three digits and the unit that suits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
