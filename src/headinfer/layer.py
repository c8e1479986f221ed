# SPDX-License-Identifier: Apache-2.0
"""The records of a run: what the plan decided, one layer's head ranges, what was held and moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headinfer.attention.api import AUTO
from headinfer.errors import CacheStateError
from headinfer.heads import DirectHeads, KVShape, OffloadedHeads, PackedInPlace
from headinfer.layout import HeadGroup


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """The disk below host memory.

    Attributes:
        folder: where its file is.
        budget_bytes: how large the file may become; None for what is free.
        planned_bytes: how large it will become, set aside at once; 0 if that is not known.
    """

    folder: str
    budget_bytes: int | None = None
    planned_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """What the plan decided.

    Attributes:
        staging: stage tiles through the ring; False attends host memory in place (CPU only).
        slot_bytes: size of one staging slot.
        num_slots: slots in the ring.
        ring_slot_bytes: what a slot takes where tiles are packed, as much as `slot_bytes` of plain
            ones; 0 for `slot_bytes`.
        write_bytes: size of each of the two write-back buffers.
        resident_heads: per layer, the KV heads that stay on the compute device.
        resident_bytes: what they may take there; a layer that no longer fits is demoted. None for
            no limit.
        expected_tokens: length the sequence will reach, if known: memory is then exact.
        host_bytes: host budget, None for no limit of our own.
        wanted_bytes: host memory the whole request would take, for the message when less is there.
        kept_bytes: of the host budget, kept for what packed blocks have beside their slots.
        beside_bytes: host memory taken by buffers, beside the host budget.
        kv_format: how offloaded keys and values are stored.
        attention: implementation to insist on, or "auto".
        near_share: of the offloaded heads, the share the CPU attends in passes of few tokens.
        near_adapts: that share follows what ends last, the CPU or the stream.
        threads: of the native kernel; None for as many as torch has.
        disk: takes what the host budget does not; None for no disk.
        at_once: all layers are on one compute device, which may give memory to their resident heads
            before the first of them is computed.
        host_computes: with a disk, heads attended in host memory are resident ones, and offloaded
            heads lie on disk: the compute device is the CPU.
        poison: NaN-fill staging slots on release (for tests).
    """

    staging: bool
    slot_bytes: int
    num_slots: int
    write_bytes: int
    resident_heads: tuple[int, ...] = ()
    resident_bytes: int | None = None
    expected_tokens: int | None = None
    host_bytes: int | None = None
    wanted_bytes: int = 0
    kept_bytes: int = 0
    beside_bytes: int = 0
    kv_format: str = "exact"
    attention: str = AUTO
    near_share: float = 0.0
    near_adapts: bool = False
    threads: int | None = None
    disk: DiskSettings | None = None
    host_computes: bool = False
    at_once: bool = False
    ring_slot_bytes: int = 0
    poison: bool = False


@dataclass(slots=True)
class Layer:
    """One layer's head ranges; together they cover its KV heads in order."""

    index: int
    shape: KVShape
    device: torch.device
    ranges: list[DirectHeads | OffloadedHeads | PackedInPlace]

    @property
    def length(self) -> int:
        return self.ranges[0].store.length

    @property
    def stored(self) -> int:
        """Tokens that some of the offloaded heads have written back."""
        return max((heads.store.stored for heads in self.offloaded), default=0)

    @property
    def batch(self) -> int:
        return self.ranges[0].store.batch

    @property
    def offloaded(self) -> list[OffloadedHeads]:
        return [heads for heads in self.ranges if isinstance(heads, OffloadedHeads)]

    def offloaded_with(self, group: HeadGroup) -> OffloadedHeads:
        """The offloaded range that `group` is part of."""
        for heads in self.offloaded:
            if heads.heads.start <= group.start and group.stop <= heads.heads.stop:
                return heads
        raise CacheStateError(f"layer {self.index} has no offloaded heads {group}")


@dataclass(slots=True)
class Stats:
    """What a runner did and holds: bytes unless the name says tiles or heads.

    `near_heads` are those the CPU attends now, `near_bytes` what it has read of them. `disk_bytes`
    are held on disk; `host_bytes` are keys and values, without the buffers between host and disk.
    """

    host_bytes: int = 0
    resident_bytes: int = 0
    staging_bytes: int = 0
    tail_bytes: int = 0
    loaded_bytes: int = 0
    loaded_tiles: int = 0
    dropped_tiles: int = 0
    written_bytes: int = 0
    demoted_heads: int = 0
    near_heads: int = 0
    near_bytes: int = 0
    disk_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


def check_fits(layer: Layer, k: Tensor, v: Tensor) -> None:
    found = KVShape(k.shape[1], k.shape[-1], v.shape[-1], k.dtype)
    if found != layer.shape:
        raise CacheStateError(
            f"layer {layer.index} holds {layer.shape} and is given {found}; use a new cache"
        )
    if k.device != layer.device:
        raise CacheStateError(
            f"layer {layer.index} attends on {layer.device} and is given keys on {k.device}; "
            "use a new cache"
        )
