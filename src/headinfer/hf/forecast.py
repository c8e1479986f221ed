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

from headinfer.budget import parse_bytes
from headinfer.cost import Prediction, predict
from headinfer.errors import BudgetTooSmall
from headinfer.geometry import Geometry
from headinfer.hf.attach import plan_for
from headinfer.hf.backing import CacheOptions, options_from
from headinfer.hf.geometry import HOST_SHARE
from headinfer.hf.remembered import known_rates
from headinfer.machines import machine_named
from headinfer.options import Options
from headinfer.plan import Plan, make_plan
from headinfer.rates import Rates

SHORTEST = 8192


@dataclass(frozen=True, slots=True)
class Outlook:
    """One context length.

    Attributes:
        tokens: prompt and answer together.
        plan: what would be decided; None if it does not fit.
        prediction: seconds; None without rates, or if it does not fit.
        refusal: what is short, by how much and what helps; empty if it fits.
    """

    tokens: int
    plan: Plan | None
    prediction: Prediction | None
    refusal: str = ""

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
        return found | ({"refusal": self.refusal} if self.refusal else {})


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
        plan: at the longest context.
        outlooks: by context length.
        rates: what the times come from; None if the machine was not measured.
    """

    geometry: Geometry
    plan: Plan
    outlooks: list[Outlook]
    rates: Rates | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "contexts": [outlook.as_dict() for outlook in self.outlooks],
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
    gpu: str | None = None,
    ram: str | int | None = None,
    **options: Unpack[CacheOptions],
) -> Forecast:
    """What each length would take.

    Args:
        config: a transformers config.
        tokens: prompt lengths, the longest last.
        new_tokens: tokens to be generated.
        batch: sequences.
        device: "cuda" or "cpu"; default: "cuda" when a GPU is named, budgeted or there.
        weight_bytes: bytes of the weights on the device.
        gpu: a GPU of `headinfer.machines` to plan for.
        ram: host memory of the machine to plan for.
        options: see `CacheOptions`.

    Raises:
        BudgetTooSmall: the longest context does not fit.
        InputError: an unknown GPU, or an unusable option.
    """
    machine = None if gpu is None else machine_named(gpu)
    if machine is not None:
        device = "cuda"
        if options.get("gpu_memory") is None:
            options["gpu_memory"] = machine.gpu_bytes
    if ram is not None and options.get("host_memory") is None:
        options["host_memory"] = int(parse_bytes(ram, name="ram") * HOST_SHARE)
    plan = plan_for(
        config,
        prompt_tokens=tokens[-1],
        new_tokens=new_tokens,
        batch=batch,
        device=device,
        weight_bytes=weight_bytes,
        **options,
    )
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    rates = machine.rates() if machine is not None else _known(plan.device, dtype, plan.disk)
    asked = replace(options_from(options), budget=plan.budget)
    outlooks = [
        _outlook(plan, asked, rates, tokens=length, new_tokens=new_tokens) for length in tokens
    ]
    return Forecast(plan.geometry, plan, outlooks, rates)


def predicted_for(plan: Plan, model: PreTrainedModel, *, prompt_tokens: int) -> Prediction | None:
    """Times of a run of `model` about to start; None if its machine was not measured."""
    rates = known_rates(model.device, model.dtype, plan.disk)
    return None if rates is None else predict(plan, rates, prompt_tokens=prompt_tokens)


def _known(device: str, dtype: torch.dtype, disk: str | None) -> Rates | None:
    if device == "cuda" and not torch.cuda.is_available():
        return None
    return known_rates(device, dtype, disk)


def _outlook(
    longest: Plan, options: Options, rates: Rates | None, *, tokens: int, new_tokens: int
) -> Outlook:
    asked = replace(options, expected_tokens=tokens + new_tokens)
    try:
        plan = make_plan(longest.geometry, asked, device=longest.device, batch=longest.batch)
    except BudgetTooSmall as error:  # longer contexts may take smaller chunks
        return Outlook(tokens, None, None, str(error))
    seconds = None if rates is None else predict(plan, rates, prompt_tokens=tokens)
    return Outlook(tokens, plan, seconds)
