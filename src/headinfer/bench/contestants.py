# SPDX-License-Identifier: Apache-2.0
"""Puts one contestant's cache under a model, and takes it away again without a trace.

What all have in common: a cache to be passed to the model, a chunk length, a way to hold a
simulated context, and what they count. Measuring code sees no difference between them.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.bench import baseline
from headinfer.bench.cases import PACKING
from headinfer.bench.grid import GRID, options_of
from headinfer.bench.shapes import Shape
from headinfer.hf.memory_probe import empty_host_cache
from headinfer.hf.simulate import FILL_TOKENS, simulate_context
from headinfer.plan import Plan
from headinfer.rates import Rates


class NotAvailable(Exception):
    """This contestant cannot take part here, whatever the length."""


@dataclass(frozen=True, slots=True)
class Ground:
    """Where a contestant works.

    Attributes:
        model: attended by sdpa when nobody works with it.
        shape: of the model.
        dtype: of keys and values.
        tokens: length the sequence will reach.
        chunk_tokens: for those who do not plan.
        cap: GPU memory allowed, as text.
        extra: options for headinfer on top, for checks that want small tiles.
        rates: what predictions are made from; None for none.
    """

    model: PreTrainedModel
    shape: Shape
    dtype: str
    tokens: int
    chunk_tokens: int
    cap: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    rates: Rates | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)


class Entry:
    """A contestant at work: transformers' own caches, and what the others refine.

    Attributes:
        cache: to be passed to the model.
        chunk_tokens: tokens per forward pass of a prefill.
        settings: what it was asked to do.
        counts: the bytes that it moves are known.
    """

    def __init__(self, ground: Ground, make: Callable[[], Any], *, counts: bool = True) -> None:
        self.ground = ground
        self._make = make
        self.cache: Any = make()
        self.chunk_tokens = ground.chunk_tokens
        self.settings: dict[str, Any] = {}
        self.counts = counts

    @property
    def plan(self) -> dict[str, Any]:
        """What was decided, as plain values; empty where nobody plans."""
        return {}

    @property
    def decided(self) -> Plan | None:
        """The plan itself; None where nobody plans."""
        return None

    def renew(self) -> None:
        """An empty cache takes the place of the old one, whose memory is free."""
        self.cache = None
        clean(self.ground.device)
        self.cache = self._make()

    def fill(self, tokens: int) -> None:
        """The cache holds `tokens` tokens of random keys and values."""
        k, v = random_keys(self.ground, tokens)
        for index in range(self.ground.shape.layers):
            self.cache.update(k, v, index)

    def counted(self) -> dict[str, float]:
        """Bytes moved so far, per path; only what is really counted."""
        return {}

    def held(self) -> dict[str, int]:
        """Bytes held, by place."""
        return {}

    def host_memory(self) -> dict[str, float]:
        """What making host memory took: bytes, seconds, and seconds that were waited for."""
        return {}


class ScheduleEntry(Entry):
    """The authors' schedule."""

    def fill(self, tokens: int) -> None:
        self.cache.fill(*random_keys(self.ground, tokens))

    def counted(self) -> dict[str, float]:
        moved = self.cache.schedule
        return {"h2d": moved.loaded_bytes, "d2h": moved.written_bytes}

    def held(self) -> dict[str, int]:
        return {"host_bytes": self.cache.schedule.host_bytes}


class OwnEntry(Entry):
    """headinfer, attached."""

    def __init__(self, ground: Ground, run: headinfer.Session, options: dict[str, Any]) -> None:
        super().__init__(ground, run.new_cache)
        self.settings = options
        self._run = run
        if run.plan is not None:
            self.chunk_tokens = run.plan.chunk_tokens

    @property
    def decided(self) -> Plan | None:
        return self._run.plan

    @property
    def plan(self) -> dict[str, Any]:
        return {} if self._run.plan is None else self._run.plan.as_dict()

    def renew(self) -> None:
        self.cache.close()
        super().renew()

    def fill(self, tokens: int) -> None:
        # It fills by large pieces, of which the cache would warn as of a prompt that is not cut.
        logger = logging.getLogger("headinfer.hf.cache")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            simulate_context(self.ground.model, self.cache, tokens)
        finally:
            logger.setLevel(level)

    def counted(self) -> dict[str, float]:
        stats = self.cache.stats()
        return {"h2d": stats.loaded_bytes, "d2h": stats.written_bytes, "host": stats.near_bytes}

    def held(self) -> dict[str, int]:
        stats = self.cache.stats().as_dict()
        return {name: value for name, value in stats.items() if isinstance(value, int)}

    def host_memory(self) -> dict[str, float]:
        made: dict[str, float] = self.cache.backing.runner.host_memory._asdict()
        return made if made["made_bytes"] else {}


@contextmanager
def enter(name: str, ground: Ground) -> Iterator[Entry]:
    """The contestant `name` at work; afterwards the model is stock again and memory is free.

    Raises:
        NotAvailable: not on this device, or not in this version.
        HeadInferError: headinfer refuses, as it would refuse a user.
    """
    model = ground.model
    try:
        if name in ("resident", "offloaded"):
            yield _stock(ground, offloading=name == "offloaded")
        elif name == "schedule":
            entry = ScheduleEntry(
                ground, lambda: baseline.ScheduleCache(model.config, ground.device)
            )
            model.set_attn_implementation(baseline.NAME)
            yield entry
        else:
            options = own_options(name, ground)
            with headinfer.attach(model, **options) as run:
                own = OwnEntry(ground, run, options)
                try:
                    yield own
                finally:
                    if own.cache is not None:  # its successor may not have come to be
                        own.cache.close()
    finally:
        model.set_attn_implementation("sdpa")


def own_options(name: str, ground: Ground) -> dict[str, Any]:
    """What `headinfer.attach` is given for one of our ways to work.

    Raises:
        NotAvailable: not on this device.
    """
    options: dict[str, Any] = {"expected_tokens": ground.tokens, **ground.extra}
    if name.endswith(PACKING):
        options["kv_format"] = "lossless"
        name = name.removesuffix(PACKING)
    if ground.cap is not None and ground.device.type == "cuda":
        options["gpu_memory"] = ground.cap
    if name == "planned":
        return options
    if name in GRID:
        if GRID[name].device != ground.device.type:
            raise NotAvailable(f"these settings are for {GRID[name].device}")
        return options_of(GRID[name], ground.model, options)
    if name == "unrecorded":
        if ground.device.type == "cpu":
            raise NotAvailable("on a CPU no step is recorded")
        return {**options, "step_graphs": False}
    if ground.device.type == "cpu":
        options["staging"] = True  # otherwise a CPU attends everything in place
    if name == "all-resident":
        return {**options, "resident_heads": ground.shape.kv_heads}
    options.setdefault("kv_format", "exact")  # what is compared is not left to the plan
    # On a CPU nothing adapts: half of the heads are attended in place there.
    mixed = None if ground.device.type == "cuda" else 0.5
    share = {"streaming": 0.0, "near-data": 1.0, "mixed": mixed}[name]
    return {**options, "resident_heads": 0, "near_data": share}


def random_keys(ground: Ground, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1, h, tokens, d], one block over and over, as `simulate_context` fills."""
    shape = (1, ground.shape.kv_heads, min(tokens, FILL_TOKENS), ground.shape.head_dim)
    generator = torch.Generator().manual_seed(0)
    repeats = math.ceil(tokens / shape[2])
    k, v = (
        torch.randn(shape, generator=generator)
        .to(device=ground.device, dtype=getattr(torch, ground.dtype))
        .repeat(1, 1, repeats, 1)[:, :, :tokens]
        for _ in range(2)
    )
    return k, v


def clean(device: torch.device) -> None:
    """What a contestant left behind is given back: to Python, the GPU and the host."""
    gc.collect()
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    empty_host_cache()
    torch.cuda.reset_peak_memory_stats(device)


def pinned_bytes() -> int | None:
    """Host memory that torch's own allocator has page-locked; None where it does not say."""
    if not torch.cuda.is_available() or not hasattr(torch.cuda, "host_memory_stats"):
        return None
    stats = torch.cuda.host_memory_stats()
    found = stats.get("allocated_bytes.current")
    return None if found is None else int(found)


def _stock(ground: Ground, *, offloading: bool) -> Entry:
    if offloading and ground.device.type != "cuda":
        raise NotAvailable("transformers' offloaded cache uses CUDA streams")
    ground.model.set_attn_implementation("sdpa")
    config = ground.model.config

    def make() -> DynamicCache:
        return DynamicCache(config=config, offloading=offloading)

    return Entry(ground, make, counts=not offloading)
