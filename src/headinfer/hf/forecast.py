# SPDX-License-Identifier: Apache-2.0
"""A model on a machine, context by context: does it fit, in which memory, how long will it take.

Nothing runs and no weight is read. Refusals are part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from headinfer.budget import MIB, format_bytes, parse_bytes
from headinfer.cost import Prediction, chunk_cost, predict
from headinfer.errors import BudgetTooSmall
from headinfer.geometry import Geometry, Weights
from headinfer.hf.ahead import resolved_for
from headinfer.hf.backing import CacheOptions, PlanOptions, options_from
from headinfer.hf.geometry import geometry_of
from headinfer.hf.remembered import known_rates, with_disk
from headinfer.machines import machine_named
from headinfer.options import Options
from headinfer.plan import Plan, make_plan
from headinfer.progress import ChunkCost
from headinfer.rates import Rates
from headinfer.reach import longest_context
from headinfer.surroundings import SHARE

SHORTEST = 8192


@dataclass(frozen=True, slots=True)
class Outlook:
    """One context length.

    Attributes:
        tokens: prompt and answer together.
        plan: what would be decided; None if it does not fit.
        prediction: seconds; None without rates, or if it does not fit.
        refusal: what is short, by how much and what helps; None if it fits.
    """

    tokens: int
    plan: Plan | None
    prediction: Prediction | None
    refusal: BudgetTooSmall | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found: dict[str, Any] = {"tokens": self.tokens, "fits": self.plan is not None}
        if self.plan is not None:
            found |= {
                "predicted_gpu_bytes": self.plan.gpu_bytes,
                "predicted_host_bytes": self.plan.host_bytes,
                "predicted_disk_bytes": self.plan.disk_bytes,
                "resident_heads": sum(self.plan.resident_heads),
                "offloaded_heads": self.plan.offloaded_heads,
                "chunk_tokens": self.plan.chunk_tokens,
            }
        if self.prediction is not None:
            found |= {
                "predicted_ttft_s": self.prediction.prefill_s,
                "predicted_itl_s": self.prediction.decode_s,
                "prefill_limit": self.prediction.prefill_limit,
                "decode_limit": self.prediction.decode_limit,
            }
        return found | ({"refusal": str(self.refusal)} if self.refusal else {})


def contexts_up_to(tokens: int) -> list[int]:
    """Doubling lengths below `tokens`, then `tokens` itself."""
    found, length = [], SHORTEST
    while length < tokens:
        found.append(length)
        length *= 2
    return [*found, tokens]


@dataclass(frozen=True, slots=True)
class Forecast:
    """A model on a machine.

    Attributes:
        geometry: the model's.
        plan: at the longest of these contexts that fits.
        outlooks: by context length.
        rates: what the times come from; None if the machine was not measured.
        longest_tokens: prompt and answer that still fit; None for no limit.
        refusal: of the longest context; None if it fits.
    """

    geometry: Geometry
    plan: Plan
    outlooks: list[Outlook]
    rates: Rates | None
    longest_tokens: int | None
    refusal: BudgetTooSmall | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "contexts": [outlook.as_dict() for outlook in self.outlooks],
            "longest_tokens": self.longest_tokens,
            "rates": None if self.rates is None else self.rates.as_dict(),
        }


def forecast(
    config: PreTrainedConfig,
    tokens: Sequence[int],
    *,
    new_tokens: int = 0,
    batch: int = 1,
    device: str | None = None,
    weight_bytes: int = 0,
    weights: Weights | None = None,
    gpu: str | None = None,
    ram: str | int | None = None,
    **options: Unpack[PlanOptions],
) -> Forecast:
    """What each length would take.

    Args:
        config: a transformers config.
        tokens: prompt lengths, the longest last.
        new_tokens: tokens to be generated.
        batch: sequences.
        device: "cuda" or "cpu"; default: "cuda" when a GPU is named, budgeted or there.
        weight_bytes: bytes of the weights on the device.
        weights: more about them.
        gpu: a GPU of `headinfer.machines` to plan for.
        ram: host memory of the machine to plan for.
        options: see `PlanOptions`.

    Raises:
        BudgetTooSmall: none of these contexts fits.
        InputError: an unknown GPU, or an unusable option.
    """
    machine = None if gpu is None else machine_named(gpu)
    if machine is not None:
        device = "cuda"
        if options.get("gpu_memory") is None:
            options["gpu_memory"] = machine.gpu_bytes
    notes: tuple[str, ...] = ()
    if ram is not None and options.get("host_memory") is None:
        options["host_memory"], notes = _of_ram(ram, device, weight_bytes)
    given: CacheOptions = {
        **options,
        "expected_tokens": tokens[-1] + new_tokens,
        "new_tokens": new_tokens,
    }
    device, asked = resolved_for(options_from(given), device, weight_bytes=weight_bytes)
    asked = replace(asked, budget_reasons=(*asked.budget_reasons, *notes))
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    rates = machine.rates() if machine is not None else _known(device, dtype, asked.disk)
    if machine is not None and rates is not None and asked.disk is not None:
        rates = with_disk(rates, asked.disk)
    if machine is not None:  # whatever this machine lacks or was measured at says nothing of it
        asked = replace(asked, rates=rates, near_data=options.get("near_data"))
    geometry = geometry_of(config, weight_bytes=weight_bytes, weights=weights)
    request = _Request(geometry, asked, device, batch, new_tokens, rates)
    outlooks = [_outlook(request, length) for length in tokens]
    fitting = [outlook.plan for outlook in outlooks if outlook.plan is not None]
    refusal = outlooks[-1].refusal
    if not fitting and refusal is not None:
        raise refusal
    longest = longest_context(geometry, asked, device=device, batch=batch)
    return Forecast(geometry, fitting[-1], outlooks, rates, longest, refusal)


@dataclass(frozen=True, slots=True)
class _Request:
    """What is the same for every length."""

    geometry: Geometry
    options: Options
    device: str
    batch: int
    new_tokens: int
    rates: Rates | None


def _of_ram(ram: str | int, device: str | None, weight_bytes: int) -> tuple[int, tuple[str, ...]]:
    """Of a machine's memory, what a run may use, and why."""
    whole = parse_bytes(ram, name="ram")
    weights = weight_bytes if device == "cpu" else 0
    found = int(whole * SHARE) - weights
    beside = f" beside {format_bytes(weights)} of weights" if weights else ""
    if found <= 0:
        raise BudgetTooSmall(
            f"ram={format_bytes(whole)} has no room{beside}; give at least "
            f"{int(1.1 * weights / SHARE) + MIB} bytes",
            tier="host",
            budget_bytes=whole,
            needed_bytes=int(1.1 * weights / SHARE) + MIB,
        )
    reason = f"host memory: {format_bytes(found)}, {SHARE:.0%} of {format_bytes(whole)}{beside}"
    return found, (reason,)


def predicted_for(plan: Plan, model: PreTrainedModel, *, prompt_tokens: int) -> Prediction | None:
    """Times of a run of `model` about to start; None if its machine was not measured."""
    rates = known_rates(model.device, model.dtype, plan.disk)
    return None if rates is None else predict(plan, rates, prompt_tokens=prompt_tokens)


def cost_for(plan: Plan, model: PreTrainedModel) -> tuple[ChunkCost, bool]:
    """What the progress bar of a run of `model` expects of a chunk, and whether it is in seconds."""
    rates = known_rates(model.device, model.dtype, plan.disk)
    return chunk_cost(plan, rates), rates is not None


def _known(device: str, dtype: torch.dtype, disk: str | None) -> Rates | None:
    if device == "cuda" and not torch.cuda.is_available():
        return None
    return known_rates(device, dtype, disk)


def _outlook(request: _Request, tokens: int) -> Outlook:
    asked = replace(request.options, expected_tokens=tokens + request.new_tokens)
    try:
        plan = make_plan(request.geometry, asked, device=request.device, batch=request.batch)
    except BudgetTooSmall as error:
        return Outlook(tokens, None, None, error)
    rates = request.rates
    seconds = None if rates is None else predict(plan, rates, prompt_tokens=tokens)
    return Outlook(tokens, plan, seconds)
