# SPDX-License-Identifier: Apache-2.0
"""Plots of a result: time of a token, of a prefill, and peak memory, over the context.

One figure per case and quantity, as PNG and SVG, the same bytes for the same file. Needs
matplotlib and no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headinfer.bench.cases import CASES, CONTESTANTS, KIB, format_tokens
from headinfer.bench.results import MEASURED, OUT_OF_MEMORY, Results, Row
from headinfer.errors import InputError

GIB = 2**30

_METADATA = {"png": ("Software",), "svg": ("Date", "Creator", "Format", "Type")}
"""What matplotlib would write into a file and shall not."""

STYLES: dict[str, tuple[str, str, str]] = {
    "resident": ("#000000", "s", "-"),
    "offloaded": ("#D55E00", "^", "-"),
    "schedule": ("#CC79A7", "v", "-"),
    "streaming": ("#56B4E9", "o", "--"),
    "near-data": ("#F0E442", "D", "--"),
    "mixed": ("#009E73", "P", "-"),
    "planned": ("#0072B2", "o", "-"),
    "unrecorded": ("#E69F00", "*", "-"),
    "all-resident": ("#999999", "X", "--"),
    "streaming-lossless": ("#56B4E9", "h", ":"),
    "mixed-lossless": ("#009E73", "p", ":"),
    "planned-lossless": ("#0072B2", "d", ":"),
}
"""Colour, marker and line: the palette of Okabe and Ito, told apart without colour as well."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """What one kind of figure shows.

    Attributes:
        name: in file names.
        metric: of the rows it is read from; empty for any.
        title, label: over the figure, and of the axis with its unit.
        value: of a row; None where the row has none.
    """

    name: str
    metric: str
    title: str
    label: str
    value: Callable[[Row], float | None]


def _median(row: Row) -> float | None:
    return row.median


def _gpu_peak(row: Row) -> float | None:
    held = row.held.get("gpu_peak_bytes")
    return None if held is None else held / GIB


def _host_growth(row: Row) -> float | None:
    held = row.held.get("host_rss_growth_bytes")
    return None if held is None or "gpu_peak_bytes" in row.held else held / GIB


QUANTITIES = (
    Quantity("token", "token", "Time per decoded token", "seconds per token", _median),
    Quantity("prefill", "prefill", "Time to read the prompt", "seconds", _median),
    Quantity("peak", "", "Peak GPU memory, weights included", "GiB", _gpu_peak),
    Quantity("host", "", "Growth of the process in memory", "GiB", _host_growth),
)


def plot(results: Results, folder: Path) -> list[Path]:
    """The files written to `folder`; it is made if need be.

    Raises:
        InputError: matplotlib is missing, or no case was measured at two lengths.
    """
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    settings = {"svg.hashsalt": "headinfer", "font.size": 10, "svg.fonttype": "path"}
    with plt.rc_context({**plt.rcParamsDefault, **settings, "backend": "Agg"}):
        for case, quantity in _figures(results):
            figure = _draw(plt, results, case, quantity)
            for kind in ("png", "svg"):
                path = folder / f"{case}-{quantity.name}.{kind}"
                # Without dates and programs the bytes depend on the figures alone.
                metadata = dict.fromkeys(_METADATA[kind])
                figure.savefig(path, metadata=metadata)
                written.append(path)
            plt.close(figure)
    if not written:
        raise InputError(
            "nothing to plot: a curve needs a prefill or decode case measured at two lengths; run "
            "headinfer bench with more --contexts"
        )
    return written


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "plots need matplotlib, which is not installed; install the extra headinfer[bench]"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _figures(results: Results) -> Iterator[tuple[str, Quantity]]:
    for case in dict.fromkeys(row.case for row in results.rows):
        for quantity in QUANTITIES:
            lengths = {length for row, length, _ in _points(results, case, quantity)}
            if len(lengths) > 1:
                yield case, quantity


def _points(results: Results, case: str, quantity: Quantity) -> Iterator[tuple[Row, int, float]]:
    """Row, length and value; one row per run."""
    seen = set()
    for row in results.rows:
        value = quantity.value(row) if row.status == MEASURED else None
        fits = row.case == case and row.context_tokens and row.contestant in STYLES
        if not fits or value is None or (quantity.metric and row.metric != quantity.metric):
            continue
        if row.key not in seen:
            seen.add(row.key)
            yield row, row.context_tokens, value


def _draw(plt: Any, results: Results, case: str, quantity: Quantity) -> Any:
    figure, axes = plt.subplots(figsize=(7.6, 4.9), dpi=150)
    points = list(_points(results, case, quantity))
    for name in STYLES:
        mine = sorted((length, value) for row, length, value in points if row.contestant == name)
        if mine:
            _curve(axes, results, case, quantity, name, mine)
    _out_of_memory(axes, results, case)
    _axes(axes, results, case, quantity, points)
    drawn = zip(*axes.get_legend_handles_labels(), strict=True)
    entries = sorted(drawn, key=lambda entry: OUT_OF_MEMORY in entry[1])
    lines = (len(entries) + 1) // 2
    figure.subplots_adjust(left=0.105, right=0.985, top=0.92, bottom=0.22 + 0.042 * lines)
    handles, labels = zip(*entries, strict=True)
    figure.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.54, 0.09),
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    caption = _caption(results, case, quantity)
    figure.text(0.01, 0.015, caption, fontsize=7, color="#444444", wrap=True)
    return figure


def _curve(
    axes: Any,
    results: Results,
    case: str,
    quantity: Quantity,
    name: str,
    points: list[tuple[int, float]],
) -> None:
    colour, marker, line = STYLES[name]
    lengths, values = zip(*points, strict=True)
    spread = None
    if quantity.metric:
        rows = [results.find(case, name, length, quantity.metric) for length in lengths]
        # Bars reach from p20 to p80, which need not lie evenly around the median.
        ends = [(row.p20, row.p80) if row else (None, None) for row in rows]
        spread = [
            [value - (low or value) for (low, _), value in zip(ends, values, strict=True)],
            [(high or value) - value for (_, high), value in zip(ends, values, strict=True)],
        ]
    axes.errorbar(
        lengths,
        values,
        yerr=spread,
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=1.8,
        elinewidth=1.0,
        capsize=3,
        markersize=6,
        markeredgecolor="#333333",
        markeredgewidth=0.5,
        label=CONTESTANTS[name].label,
    )


def _out_of_memory(axes: Any, results: Results, case: str) -> None:
    """A cross on the upper edge, at every length that did not fit."""
    for name, (colour, _, _) in STYLES.items():
        lengths = sorted(
            row.context_tokens
            for row in results.rows
            if (row.case, row.contestant, row.status) == (case, name, OUT_OF_MEMORY)
        )
        if not lengths:
            continue
        where = axes.get_xaxis_transform()
        label = f"{CONTESTANTS[name].label}: out of memory"
        axes.plot(
            lengths,
            [0.975] * len(lengths),
            linestyle="",
            marker="x",
            color=colour,
            markersize=8,
            markeredgewidth=2,
            transform=where,
            label=label,
        )


def _axes(
    axes: Any,
    results: Results,
    case: str,
    quantity: Quantity,
    points: list[tuple[Row, int, float]],
) -> None:
    from matplotlib import ticker

    ticks = sorted({row.context_tokens for row in results.rows if row.case == case})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [format_tokens(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"context, tokens (1K = {KIB:,})")
    axes.set_ylabel(quantity.label)
    values = [value for _, _, value in points]
    # Curves of two decades would lie on each other at a linear scale; memory is compared by length.
    if quantity.metric and min(values) > 0 and max(values) / min(values) > 4:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, place: "")
    else:
        axes.set_ylim(bottom=0, top=max(values) * 1.15 or 1)
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.set_title(quantity.title, loc="left", fontweight="bold", fontsize=11)


def _caption(results: Results, case: str, quantity: Quantity) -> str:
    """The machine and the work, on two lines."""
    indices = [row.session for row in results.rows if row.case == case]
    session = results.sessions[indices[-1]] if indices and results.sessions else None
    known = CASES.get(case)
    parts = [case]
    if known is not None and known.shape:
        parts.append(f"{known.shape} shape, random weights, {known.dtype}, batch 1")
    if known is not None and known.cap:
        parts.append(f"capped at {known.cap} of GPU memory")
    if any(row.simulated for row in results.rows if row.case == case):
        parts.append("random keys and values as context")
    if not results.verified:
        parts.append("EXACTNESS NOT VERIFIED")
    rows = [row for row, _, _ in _points(results, case, quantity)]
    if any(row.disturbed for row in rows):
        parts.append("DISTURBED BY OTHER PROCESSES")
    bars = "; bars: p20 to p80" if quantity.metric and any(row.n > 1 for row in rows) else ""
    return "; ".join(parts) + f"\n{session or 'machine unknown'}{bars}"
