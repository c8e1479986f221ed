# SPDX-License-Identifier: Apache-2.0
"""The plan of a run that has not started, from a config alone: budgets filled in from this machine,
weights that are not loaded counted beside keys and values.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig
from typing_extensions import Unpack

from headinfer.budget import format_bytes
from headinfer.errors import BudgetTooSmall
from headinfer.geometry import Weights
from headinfer.hf.backing import CacheOptions, PlanOptions, options_from
from headinfer.hf.geometry import geometry_of, resolve_budget
from headinfer.options import Options
from headinfer.plan import Plan, make_plan


def plan_for(
    config: PreTrainedConfig,
    *,
    prompt_tokens: int,
    new_tokens: int | None = None,
    batch: int = 1,
    device: str | None = None,
    weight_bytes: int = 0,
    weights: Weights | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """The plan of a run that has not started; loads no weights.

    Args:
        config: a transformers config.
        prompt_tokens: prompt length.
        new_tokens: tokens to be generated; None: none, and for weighing times 64.
        batch: sequences.
        device: "cuda" or "cpu"; default: "cuda" when gpu_memory is given or a GPU is there.
        weight_bytes: bytes of the weights on the device; 0 counts the cache alone.
        weights: more about them.
        options: see `PlanOptions`.

    Raises:
        BudgetTooSmall: with the smallest budget that works.
        InputError: an unusable option.
    """
    rest: CacheOptions = {
        **options,
        "expected_tokens": prompt_tokens + (new_tokens or 0),
        "new_tokens": new_tokens,
    }
    device, record = resolved_for(options_from(rest), device, weight_bytes=weight_bytes)
    geometry = geometry_of(config, weight_bytes=weight_bytes, weights=weights)
    return make_plan(geometry, record, device=device, batch=batch)


def planned_device(device: str | None, *, on_gpu: bool) -> str:
    """Where a run that has not started will compute: as told, else on the GPU if one is spoken of or
    there."""
    if device is not None:
        return device
    return "cuda" if on_gpu or torch.cuda.is_available() else "cpu"


def resolved_for(record: Options, device: str | None, *, weight_bytes: int) -> tuple[str, Options]:
    """Where a run that has not started will compute, and its options with budgets filled in.

    Raises:
        BudgetTooSmall: host memory has no room for the weights of a model that computes there.
    """
    device = planned_device(device, on_gpu=record.budget.gpu_bytes is not None)
    told = record.budget.host_bytes
    if device == "cpu" or torch.cuda.is_available() or record.budget.gpu_bytes is None:
        there = device if device == "cpu" or torch.cuda.is_available() else "cpu"
        record = resolve_budget(record, torch.device(there))
    free = record.budget.host_bytes
    if device == "cpu" and told is None and free is not None:
        record = _beside_weights(record, free, weight_bytes)
    return device, record


def _beside_weights(record: Options, free: int, weight_bytes: int) -> Options:
    """On a CPU the weights, not loaded yet, will take of the same memory."""
    if weight_bytes >= free:
        raise BudgetTooSmall(
            f"the weights do not fit: they take {format_bytes(weight_bytes)} of host memory, and "
            f"{format_bytes(free)} can be used now. Free memory that other processes hold, use "
            "--dtype bfloat16 or a smaller model, or plan for another machine with --ram "
            f"{2 * weight_bytes}",
            tier="host",
            budget_bytes=free,
            needed_bytes=weight_bytes,
        )
    note = f"of these, the weights will take {format_bytes(weight_bytes)}"
    budget = replace(record.budget, host_bytes=free - weight_bytes)
    return replace(record, budget=budget, budget_reasons=(*record.budget_reasons, note))
