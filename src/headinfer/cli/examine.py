# SPDX-License-Identifier: Apache-2.0
"""`headinfer doctor` and `headinfer plan`: answers about a machine or a model, without a prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        from headinfer.hf.probe import rates_for

        with working("measuring this machine"):
            report = replace(report, rates=rates_for(report.device, report.dtype, refresh=True))
    if as_json:
        print_json(report.as_dict())
    else:
        write_answer(f"{report}\n")
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
    as_json: bool,
) -> None:
    """Print what a run would take, at this length and at shorter ones; loads no weights."""
    show_warnings()
    from headinfer.hf.forecast import contexts_up_to, forecast
    from headinfer.hf.load import load_shape

    with PreparationBar() as preparation:
        config, weight_bytes = load_shape(
            model, dtype, trust_remote_code=trust_remote_code, on_step=preparation
        )
    found = forecast(
        config,
        contexts_up_to(tokens),
        new_tokens=new_tokens,
        batch=batch,
        device=device,
        weight_bytes=weight_bytes,
        gpu=elsewhere.gpu,
        ram=elsewhere.ram,
        gpu_memory=memory.gpu_memory,
        host_memory=memory.host_memory,
        chunk_tokens=memory.chunk_tokens,
        kv_format=memory.kv_format,
    )
    plan, most = found.plan, found.geometry.max_positions
    if 0 < most < tokens + new_tokens:
        print_note(f"note: the model was made for {most:,} positions")
    if as_json:
        print_json({**plan.as_dict(), **found.as_dict()})
        return
    write_answer(f"{plan}\n\n{_table(found)}\n")
    if found.rates is None:
        print_note(
            "no times: this machine was not measured yet; `headinfer doctor --probe` does it"
        )


def _table(found: Forecast) -> str:
    """Lines of a table by context length."""
    header = ("tokens", "fits", "GPU", "host", "resident", "first token", "next token", "limit")
    rows = [header, *(_row(outlook) for outlook in found.outlooks)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    source = "" if found.rates is None else f"times from rates of {found.rates.machine}"
    refusals = [outlook.refusal for outlook in found.outlooks if outlook.refusal]
    return "\n".join([*lines, *([source] if source else []), *refusals[:1]])


def _row(outlook: Outlook) -> tuple[str, ...]:
    plan, seconds = outlook.plan, outlook.prediction
    if plan is None:
        return (f"{outlook.tokens:,}", "no", *["-"] * 6)
    heads = sum(plan.resident_heads)
    return (
        f"{outlook.tokens:,}",
        "yes",
        format_bytes(plan.gpu_bytes) if plan.device == "cuda" else "-",
        format_bytes(plan.host_bytes),
        f"{heads}/{heads + plan.offloaded_heads}" if plan.device == "cuda" else "-",
        "-" if seconds is None else _seconds(seconds.prefill_s),
        "-" if seconds is None else _seconds(seconds.decode_s),
        "-" if seconds is None else f"{seconds.prefill_limit} / {seconds.decode_limit}",
    )


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
