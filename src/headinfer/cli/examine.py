# SPDX-License-Identifier: Apache-2.0
"""`headinfer doctor` and `headinfer plan`: answers about a machine or a model, without a prompt."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from headinfer.budget import format_bytes
from headinfer.cli.console import PreparationBar, print_note, show_warnings, working, write_answer
from headinfer.cli.job import Memory, print_json

if TYPE_CHECKING:
    from headinfer.hf.forecast import Forecast, Outlook


def examine(
    model: str | None,
    *,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    probe: bool,
    disk: str | None,
    as_json: bool,
) -> bool:
    """Print what runs here and, with a model, whether it gives stock answers; False if not."""
    import headinfer

    loaded = None
    if model is not None:
        from headinfer.hf.load import load_model

        with PreparationBar() as preparation:
            loaded, _ = load_model(
                model, dtype, device, trust_remote_code=trust_remote_code, on_step=preparation
            )
    with working("comparing with the stock cache" if model else "looking around"):
        report = headinfer.doctor(loaded)
    if probe:
        from headinfer.hf.load import element_type
        from headinfer.hf.probe import rates_for

        told = None if model is not None or dtype in (None, "auto") else dtype
        with working("measuring this machine"):
            kind = report.dtype if told is None else element_type(told)
            report = replace(report, rates=rates_for(report.device, kind, refresh=True))
    measured = None
    if disk is not None:
        from headinfer.hf.disk_probe import measure_disk

        with working(f"measuring the disk at {disk}"):
            measured = measure_disk(disk)
    if as_json:
        print_json({**report.as_dict(), "disk": None if measured is None else asdict(measured)})
    else:
        write_answer(f"{report}\n")
        if measured is not None:
            write_answer(f"{measured}\n")
        if model is None:
            write_answer("\n".join(_why_not(report.why_not)) + "\n")
    return report.ok


def _why_not(reasons: dict[str, dict[str, list[str]]]) -> list[str]:
    """One line per implementation: what it cannot run here, and why."""
    names = sorted({name for found in reasons.values() for name in found})
    return [f"{name}: {_limits(name, reasons)}" for name in names]


def _limits(name: str, reasons: dict[str, dict[str, list[str]]]) -> str:
    blocked = {call: found[name] for call, found in reasons.items() if found.get(name)}
    if not blocked:
        return "runs every call above"
    if len(blocked) == len(reasons):
        first, *others = blocked.values()
        common = [why for why in first if all(why in found for found in others)]
        return "cannot run here: " + "; ".join(common or first)
    calls: dict[str, list[str]] = {}
    for call, found in blocked.items():
        calls.setdefault("; ".join(found), []).append(call)
    return "runs, but " + "; ".join(f"not {' / '.join(c)} ({why})" for why, c in calls.items())


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A machine one does not have: a GPU of the table, host memory."""

    gpu: str | None = None
    ram: str | None = None


def show_plan(
    model: str,
    memory: Memory,
    elsewhere: Elsewhere,
    *,
    tokens: int,
    new_tokens: int,
    batch: int,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    beyond: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print what a run would take, at this length and at shorter ones; loads no weights."""
    show_warnings()
    from headinfer.hf.ahead import planned_device
    from headinfer.hf.forecast import contexts_up_to, forecast
    from headinfer.hf.load import load_shape

    on_gpu = elsewhere.gpu is not None or memory.gpu_memory is not None
    with PreparationBar() as preparation:
        config, weight_bytes, weights = load_shape(
            model,
            dtype,
            device=planned_device(device, on_gpu=on_gpu),
            trust_remote_code=trust_remote_code,
            on_step=preparation,
        )
    found = forecast(
        config,
        contexts_up_to(tokens),
        new_tokens=new_tokens,
        batch=batch,
        device=device,
        weight_bytes=weight_bytes,
        weights=weights,
        gpu=elsewhere.gpu,
        ram=elsewhere.ram,
        gpu_memory=memory.gpu_memory,
        host_memory=memory.host_memory,
        disk=memory.disk,
        disk_memory=memory.disk_memory,
        chunk_tokens=memory.chunk_tokens,
        kv_format=memory.kv_format,
    )
    plan, most = found.plan, found.geometry.max_positions
    if 0 < most < tokens + new_tokens and not beyond:
        print_note(
            f"note: the model was made for {most:,} positions; a run beyond them needs "
            "--allow-beyond-positions, at the risk of a wrong answer"
        )
    if plot is not None:
        from headinfer.cli.plan_plot import draw

        draw(found, plot)
        print_note(f"time and memory over the context are in {plot}")
    if as_json:
        print_json({**plan.as_dict(), **found.as_dict()})
    else:
        if found.refusal is not None:
            write_answer(
                f"{tokens:,} tokens do not fit, as the error below says; this is the plan of the "
                "longest length listed that does\n"
            )
        write_answer(f"{plan}\n\n{_table(found, new_tokens)}\n")
    if found.rates is None and not as_json:
        print_note(
            f"no times: this machine was not measured yet in {found.geometry.dtype}; `headinfer "
            f"doctor --probe --dtype {found.geometry.dtype}` does it"
        )
    elif plan.disk_bytes and found.rates is not None and not found.rates.disk_read_bytes_s:
        print_note(
            f"the times leave out reading {plan.disk}, whose rate was not measured yet; `headinfer "
            f"doctor --disk {plan.disk}` does it"
        )
    if found.refusal is not None:
        raise found.refusal


def _table(found: Forecast, new_tokens: int) -> str:
    """Lines of a table by context length."""
    header = (
        "tokens",
        "fits",
        "GPU",
        "host",
        "disk",
        "resident",
        "first token",
        "next token",
        "limit",
    )
    rows = [header, *(_row(outlook) for outlook in found.outlooks)]
    if found.plan.disk is None:
        without = header.index("disk")
        rows = [(*row[:without], *row[without + 1 :]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    source = "" if found.rates is None else f"times from rates of {found.rates.machine}"
    longest = found.longest_tokens
    reach = ""
    if longest is not None:
        beside = f" and {new_tokens:,} new ones" if new_tokens else ""
        reach = f"the longest context that fits: {max(longest - new_tokens, 0):,} tokens{beside}"
    return "\n".join([*lines, *filter(None, (source, reach))])


def _row(outlook: Outlook) -> tuple[str, ...]:
    plan, seconds = outlook.plan, outlook.prediction
    if plan is None:
        return (f"{outlook.tokens:,}", "no", *["-"] * 7)
    heads = sum(plan.resident_heads)
    return (
        f"{outlook.tokens:,}",
        "yes",
        format_bytes(plan.gpu_bytes) if plan.device == "cuda" else "-",
        format_bytes(plan.host_bytes),
        format_bytes(plan.disk_bytes) if plan.disk is not None else "-",
        f"{heads}/{heads + plan.offloaded_heads}" if plan.device == "cuda" else "-",
        "-" if seconds is None else _seconds(seconds.prefill_s),
        "-" if seconds is None else _seconds(seconds.decode_s),
        "-" if seconds is None else f"{seconds.prefill_limit} / {seconds.decode_limit}",
    )


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
