# SPDX-License-Identifier: Apache-2.0
"""What a user may fix, checked; whatever is left open the plan chooses."""

from __future__ import annotations

from dataclasses import dataclass, field

from headinfer.budget import MemoryBudget
from headinfer.errors import InputError
from headinfer.geometry import FORMATS
from headinfer.rates import Rates

ON_UNSUPPORTED = ("error", "materialize")


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may fix; None lets the plan choose.

    Attributes:
        budget: memory allowed per tier.
        chunk_tokens: tokens prefilled per forward pass.
        kv_format: how keys and values in host memory and on disk are stored: "exact", or "lossless",
            the same bits in three quarters of the bytes. None: chosen.
        expected_tokens: prompt plus new tokens, if known: memory is then exact and heads can be
            kept resident.
        new_tokens: of these, those that come after the prompt, one by one; where the plan weighs their time
            against the prompt's, as many as are likely count. None: not known.
        on_unsupported: "error", or "materialize" to hand whole layers to model code that does
            arithmetic on keys and values itself.
        tile_bytes: size of a staging slot.
        num_slots: staging slots.
        staging: stage tiles through the ring even where host memory can be read in place.
        resident_heads: KV heads per layer that never leave the GPU; on a CPU with a disk, those that
            never leave host memory.
        near_data: share of the offloaded heads that the CPU attends in decode, 0 (all stream) to 1;
            fixed, so that runs repeat bit by bit. None: chosen, and adapted while running.
        attention: attention implementation to insist on, or "auto".
        disk: folder for keys and values that host memory has no room for; None uses no disk.
        poison: NaN-fill staging slots on release (for tests).
        rates: of the machine, where they were measured; not for users to give.
        budget_reasons: one line for every budget that the machine decided; not for users to give.
    """

    budget: MemoryBudget = field(default_factory=MemoryBudget)
    chunk_tokens: int | None = None
    kv_format: str | None = None
    expected_tokens: int | None = None
    new_tokens: int | None = None
    on_unsupported: str = "error"
    tile_bytes: int | None = None
    num_slots: int | None = None
    staging: bool | None = None
    resident_heads: int | None = None
    near_data: float | None = None
    attention: str = "auto"
    disk: str | None = None
    poison: bool = False
    rates: Rates | None = None
    budget_reasons: tuple[str, ...] = ()

    def new_of(self, prompt: int, most: int) -> int:
        """Of at most `most` tokens with a prompt of `prompt`, those that are generated: as told, or as many
        as may be."""
        limit = max(most - prompt, 0)
        return limit if self.new_tokens is None else min(self.new_tokens, limit)

    def __post_init__(self) -> None:
        """Raises InputError for a value no plan could use."""
        for name, least in (
            ("chunk_tokens", 1),
            ("expected_tokens", 1),
            ("new_tokens", 0),
            ("tile_bytes", 1),
            ("num_slots", 1),
            ("resident_heads", 0),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r} is not usable; give a whole number >= {least}")
        if (self.new_tokens or 0) >= (self.expected_tokens or float("inf")):
            raise InputError(
                f"new_tokens={self.new_tokens} leave no prompt of expected_tokens={self.expected_tokens}, "
                "which counts both; give more of these, or fewer of those"
            )
        if self.disk is None and self.budget.disk_bytes is not None:
            raise InputError(
                f"disk_memory={self.budget.disk_bytes} was given, but no folder for it; name one with "
                "disk='/path/to/folder'"
            )
        near = self.near_data
        if near is not None:
            if isinstance(near, bool) or not isinstance(near, (int, float)) or not 0 <= near <= 1:
                raise InputError(f"near_data={near!r} is not usable; give a share from 0 to 1")
        if self.on_unsupported not in ON_UNSUPPORTED:
            raise InputError(
                f"on_unsupported={self.on_unsupported!r} is not known; "
                f"use {' or '.join(map(repr, ON_UNSUPPORTED))}"
            )
        if self.kv_format is not None and self.kv_format not in FORMATS:
            raise InputError(
                f"kv_format={self.kv_format!r} is not known; known: {', '.join(sorted(FORMATS))}"
            )
