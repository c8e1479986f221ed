# SPDX-License-Identifier: Apache-2.0
"""`headinfer doctor` and `headinfer plan`: answers about a machine or a model, without a prompt."""

from __future__ import annotations

from typing import Any

from headinfer.cli.console import PreparationBar, print_note, show_warnings, working, write_answer
from headinfer.cli.job import Memory, print_json


def examine(
    model: str | None,
    *,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
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


def show_plan(
    model: str,
    memory: Memory,
    *,
    tokens: int,
    new_tokens: int,
    batch: int,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Print what a run would take; loads no weights."""
    show_warnings()
    import headinfer
    from headinfer.hf.load import load_shape

    with PreparationBar() as preparation:
        config, weight_bytes = load_shape(
            model, dtype, trust_remote_code=trust_remote_code, on_step=preparation
        )
    plan: Any = headinfer.plan_for(
        config,
        prompt_tokens=tokens,
        new_tokens=new_tokens,
        batch=batch,
        device=device,
        weight_bytes=weight_bytes,
        gpu_memory=memory.gpu_memory,
        host_memory=memory.host_memory,
        chunk_tokens=memory.chunk_tokens,
    )
    most = plan.geometry.max_positions
    if 0 < most < tokens + new_tokens:
        print_note(f"note: the model was made for {most:,} positions")
    if as_json:
        print_json(plan.as_dict())
    else:
        write_answer(f"{plan}\n")
