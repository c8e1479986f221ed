# SPDX-License-Identifier: Apache-2.0
"""What the layers of one cache share: the user's options, then the plan made of them and its runner."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from headinfer.budget import MemoryBudget, parse_bytes
from headinfer.errors import BudgetTooSmall, InputError
from headinfer.geometry import Geometry
from headinfer.hf.geometry import layers_seen, resolve_budget
from headinfer.layer import DiskSettings, RunnerSettings
from headinfer.options import Options
from headinfer.plan import Plan, make_plan
from headinfer.runner import Runner
from headinfer.transfer import TransferEngine

EngineFactory = Callable[[torch.device], TransferEngine]


class PlanOptions(TypedDict, total=False):
    """Keyword arguments of plans; all optional, the plan chooses the rest.

    Sizes are written "24GiB" or in bytes. See `headinfer.options.Options` for the meaning of each.
    """

    gpu_memory: str | int | None
    host_memory: str | int | None
    disk: str | os.PathLike[str] | None
    disk_memory: str | int | None
    chunk_tokens: int | None
    kv_format: str | None
    expected_tokens: int | None
    on_unsupported: str
    tile_bytes: str | int | None
    num_slots: int | None
    staging: bool | None
    resident_heads: int | None
    near_data: float | None
    attention: str
    poison: bool


class CacheOptions(PlanOptions, total=False):
    """Keyword arguments of `HeadCache` and `attach`, as those of plans."""

    new_tokens: int | None


def options_from(given: CacheOptions) -> Options:
    """The record behind the keyword arguments.

    Raises:
        InputError: an unknown name or an unusable value.
    """
    known = CacheOptions.__annotations__
    for name in given:
        if name not in known:
            raise InputError(f"{name!r} is not an option; options: {', '.join(known)}")
    rest: dict[str, Any] = dict(given)
    budget = MemoryBudget.parse(
        rest.pop("gpu_memory", None), rest.pop("host_memory", None), rest.pop("disk_memory", None)
    )
    if rest.get("disk") is not None:
        rest["disk"] = os.fspath(rest["disk"])
    if rest.get("tile_bytes") is not None:
        rest["tile_bytes"] = parse_bytes(rest["tile_bytes"], name="tile_bytes")
    return Options(budget=budget, **rest)


class Backing:
    """What the layers of one cache share: options until the first update, then plan and runner.

    Attributes:
        length: tokens of the prompt and the most there may be, where `generate()` told.
        chunk: tokens that prompts are read in, where that was decided before the plan and not by
            the user; what is resident has to fit beside them.
        simulated: keys are put in place without the forward passes that would have made them.
        one_device: every layer computes on the same device.
        wanted_bytes: host memory the longest answer would take, where only less is planned.
        plan: what was decided.
        runner: where the bytes are.
    """

    def __init__(
        self,
        options: Options,
        geometry: Geometry | None,
        *,
        latent: bool = False,
        engine: EngineFactory | None = None,
    ) -> None:
        self.options = options
        self.geometry = geometry
        self.latent = latent
        self.engine = engine
        self.length: tuple[int, int] | None = None
        self.chunk: int | None = None
        self.simulated = False
        self.one_device = False
        self.wanted_bytes = 0
        self.plan: Plan | None = None
        self.runner: Runner | None = None

    def runner_for(self, key: Tensor, value: Tensor, layers: int) -> Runner:
        """The runner; made by the first update of any layer."""
        if self.runner is None:
            geometry = self.geometry or layers_seen(layers, key, value)
            return self.begin(geometry, key.device, key.dtype, batch=key.shape[0])
        return self.runner

    def begin(
        self, geometry: Geometry, device: torch.device, dtype: torch.dtype, *, batch: int
    ) -> Runner:
        """Plan and runner exist from now on."""
        kind = str(dtype).removeprefix("torch.")
        geometry = replace(geometry, itemsize=dtype.itemsize, dtype=kind)
        options = resolve_budget(self.options, device)
        if options.chunk_tokens is None:
            options = replace(options, chunk_tokens=self.chunk)
        self.plan = self._make_plan(geometry, options, device.type, batch)
        settings = settings_of(self.plan, self.options, self.wanted_bytes, at_once=self.one_device)
        self.runner = Runner(settings, engine=self.engine)
        return self.runner

    def _make_plan(self, geometry: Geometry, options: Options, device: str, batch: int) -> Plan:
        if options.expected_tokens is not None or self.length is None:
            return make_plan(geometry, options, device=device, batch=batch)
        prompt, most = self.length
        try:
            new = options.new_of(prompt, most)
            likely = replace(options, expected_tokens=most, new_tokens=new)
            return make_plan(geometry, likely, device=device, batch=batch)
        except BudgetTooSmall as whole:  # the prompt may fit even if the longest answer would not
            least = replace(options, expected_tokens=prompt, new_tokens=None)
            try:
                plan = make_plan(geometry, least, device=device, batch=batch)
            except BudgetTooSmall:
                raise whole from None
            self.wanted_bytes = whole.needed_bytes if whole.tier == "host" else 0
            return plan

    def clone(self) -> Backing:
        twin = Backing(self.options, self.geometry, latent=self.latent, engine=self.engine)
        twin.chunk = self.chunk
        twin.one_device = self.one_device
        twin.plan = self.plan
        twin.runner = None if self.runner is None else self.runner.clone()
        return twin


def settings_of(
    plan: Plan, options: Options, wanted_bytes: int, *, at_once: bool = False
) -> RunnerSettings:
    """What the runner needs of a plan."""
    disk = None
    if plan.disk is not None:
        disk = DiskSettings(plan.disk, plan.budget.disk_bytes, plan.disk_bytes)
    return RunnerSettings(
        staging=plan.staging,
        slot_bytes=plan.slot_bytes,
        num_slots=plan.num_slots,
        ring_slot_bytes=plan.ring_slot_bytes,
        write_bytes=plan.write_bytes,
        resident_heads=plan.resident_heads,
        resident_bytes=plan.resident_bytes,
        expected_tokens=plan.expected_tokens,
        host_bytes=plan.host_room,
        wanted_bytes=wanted_bytes,
        kept_bytes=plan.kept_bytes,
        beside_bytes=plan.disk_buffer_bytes,
        near_share=plan.near_share,
        near_adapts=plan.near_adapts,
        threads=plan.threads,
        kv_format=plan.kv_format,
        attention=options.attention,
        disk=disk,
        host_computes=plan.host_computes,
        at_once=at_once,
        poison=options.poison,
    )
