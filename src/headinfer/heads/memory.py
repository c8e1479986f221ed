# SPDX-License-Identifier: Apache-2.0
"""What ranges of heads have in common: a layer's shape, pieces of the context, extents by segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.errors import TierFull
from headinfer.heads.on_disk import copy_segment, disk_of
from headinfer.heads.pieces import KVShape as KVShape
from headinfer.heads.pieces import Piece as Piece
from headinfer.heads.pieces import clip as clip
from headinfer.heads.pieces import of_group as of_group
from headinfer.layout import Extent, HeadGroup, Span, aligned
from headinfer.spill import SpillTier
from headinfer.store import Run, Segment
from headinfer.tiers import HostTier, Tier
from headinfer.tiers.disk import ARENA as ON_DISK
from headinfer.tiers.disk import DiskTier, Place, whole_blocks

GATHER_BYTES = 32 * 2**20
"""Keys and values whose rows are mapped are put in order for a kernel this much at a time."""


EVERYTHING = Span(0, 2**62)


def pieces_of(run: Run, k: Tensor, v: Tensor, shape: KVShape) -> Iterator[Piece]:
    """A run of a segment's k, v [h, rows, capacity, d], in place; only reordered rows are
    gathered."""
    there = slice(run.offset, run.offset + run.span.tokens)
    rows_k, rows_v = k[:, :, there], v[:, :, there]
    if run.row_map is None:
        yield Piece(run.span.start, rows_k.transpose(0, 1), rows_v.transpose(0, 1))
        return
    rows = torch.tensor(run.row_map, device=k.device)
    per_token = k.shape[0] * shape.token_bytes(len(run.row_map))
    step = max(1, GATHER_BYTES // per_token)
    for start in range(0, run.span.tokens, step):
        part = slice(start, start + step)
        yield Piece(
            run.span.start + start,
            rows_k[:, :, part].index_select(1, rows).transpose(0, 1),
            rows_v[:, :, part].index_select(1, rows).transpose(0, 1),
        )


class Mapped(NamedTuple):
    """Saved keys and values [heads, rows, capacity, dim] in memory that the system fills from
    files; `own_bytes` of it are host memory like any other."""

    memory: Tensor
    k: Tensor
    v: Tensor
    own_bytes: int


Adopt = Callable[[HeadGroup, int], Mapped | None]
"""For heads and the tokens there has to be room for: their memory, None if it cannot be mapped."""

Guard = Callable[[HeadGroup, Span], bool]
"""Raises if saved tokens of these heads are not what was written; True when nothing is left to
check."""


class SavedLayer(NamedTuple):
    """The whole blocks of a layer that comes back from disk.

    Attributes:
        tokens: a multiple of the block.
        cuts, room: see `SpanStore.restore`.
        adopt: maps the files, where heads lie in host memory that is not page-locked.
        guard: looks at what was mapped before the first read.
    """

    shape: KVShape
    device: torch.device
    batch: int
    tokens: int
    cuts: Sequence[int]
    room: int
    adopt: Adopt
    guard: Guard


class Unit(NamedTuple):
    """What the keys, or the values, of one head and row are a run of.

    Attributes:
        tokens: that one unit holds; segments hold whole units.
        width: values of `dtype` in one.
    """

    tokens: int
    width: int
    dtype: torch.dtype

    def run_bytes(self, capacity: int) -> int:
        """Bytes of the units that hold `capacity` tokens."""
        return capacity // self.tokens * self.width * self.dtype.itemsize

    def run_room(self, capacity: int, *, paged: bool) -> int:
        """Bytes from one head and row to the next. On disk each begins with a block of the file, so
        that a write which fails takes with it what is next to it of the same head alone."""
        nbytes = self.run_bytes(capacity)
        return whole_blocks(nbytes) if paged else nbytes


class SegmentMemory:
    """Extents of segments: keys [heads, rows, capacity, key_dim], then values.

    Attributes:
        guard: looks at saved tokens before they are read for the first time.
        layer: its number, for messages.
        units: of keys and of values.
        starts: by segment, the first token there is room for; for messages.
        disk: where some segments may lie, their k and v then on the "meta" device.
    """

    units: tuple[Unit, Unit]

    def __init__(self, tier: Tier, shape: KVShape, heads: HeadGroup, layer: int = -1) -> None:
        self.tier = tier
        self.layer = layer
        self.shape = shape
        self.heads = heads
        self.units = Unit(1, shape.key_dim, shape.dtype), Unit(1, shape.value_dim, shape.dtype)
        self.segments: dict[int, tuple[Extent, Tensor, Tensor]] = {}
        self.starts: dict[int, int] = {}
        self.guard: Guard | None = None

    @property
    def disk(self) -> DiskTier:
        """The disk that a segment whose views are on the "meta" device lies on."""
        found = disk_of(self.tier)
        if found is None:
            raise TypeError(f"the {self.tier.name} tier has no disk")
        return found

    def allocate(self, key: int, rows: int, capacity: int, *, start: int = 0) -> None:
        """Room for tokens from `start` on.

        Raises:
            TierFull: the tier's budget does not allow it.
        """
        extent = self._extent(rows, capacity)
        paged = extent.arena == ON_DISK
        k_bytes, _ = self._sizes(rows, capacity, paged=paged)
        k, v = (
            self._view(extent, offset, unit, rows, capacity)
            for offset, unit in zip((0, k_bytes), self.units, strict=True)
        )
        self.segments[key], self.starts[key] = (extent, k, v), start
        if paged:
            self.disk.name_extent(extent, self._teller(rows, capacity, k_bytes, start))

    def _extent(self, rows: int, capacity: int) -> Extent:
        plain, paged = (sum(self._sizes(rows, capacity, paged=paged)) for paged in (False, True))
        if isinstance(self.tier, SpillTier):
            return self.tier.allocate(plain, below=paged)
        return self.tier.allocate(paged if isinstance(self.tier, DiskTier) else plain)

    def _view(self, extent: Extent, offset: int, unit: Unit, rows: int, capacity: int) -> Tensor:
        """[heads, rows, units, width]."""
        count, paged = capacity // unit.tokens, extent.arena == ON_DISK
        room = unit.run_room(capacity, paged=paged) // unit.dtype.itemsize
        leading = self.heads.heads, rows
        if room == count * unit.width:
            return self.tier.view(extent, offset, (*leading, count, unit.width), unit.dtype)
        padded = self.tier.view(extent, offset, (*leading, room), unit.dtype)
        return padded[:, :, : count * unit.width].view(*leading, count, unit.width)

    def _teller(
        self, rows: int, capacity: int, k_bytes: int, start: int
    ) -> Callable[[int, int], Place | None]:
        layer, first, units = self.layer, self.heads.start, self.units
        rooms = [unit.run_room(capacity, paged=True) for unit in units]

        def tell(offset: int, nbytes: int) -> Place | None:
            values = offset >= k_bytes
            unit, room = units[values], rooms[values]
            run, at = divmod(offset - values * k_bytes, max(room, 1))
            if at >= unit.run_bytes(capacity):
                return None  # between two runs
            size = max(unit.run_bytes(unit.tokens), 1)
            token = start + at // size * unit.tokens
            last = min(start + -(-(at + nbytes) // size) * unit.tokens, start + capacity)
            kind = "values" if values else "keys"
            text = (
                f"layer {layer}, head {first + run // rows}: {kind} of tokens {token:,} to {last:,}"
            )
            return Place(layer, text, token)

        return tell

    def restore(self, segment: Segment, adopt: Adopt) -> bool:
        """Memory for a segment of saved tokens; False if they have yet to be read into it."""
        tier = self.tier
        if isinstance(tier, HostTier) and not tier.pin:
            found = adopt(self.heads, segment.capacity)
            if found is not None:
                extent = tier.adopt(found.memory, found.own_bytes)
                self.segments[segment.key] = extent, found.k, found.v
                return True
        self.allocate(segment.key, segment.rows, segment.capacity, start=segment.start)
        return False

    def check(self, heads: HeadGroup, span: Span) -> None:
        """Saved tokens of `span` may be read.

        Raises:
            SnapshotCorrupt: they are not what was written.
        """
        if self.guard is not None and self.guard(heads, span):
            self.guard = None

    def prepare(self, rows: int, capacity: int) -> None:
        """A segment of that size will be allocated."""
        if capacity:
            self.tier.prepare(self.extent_bytes(rows, capacity))

    def extent_bytes(self, rows: int, capacity: int) -> int:
        """What a segment of that size takes in memory."""
        return sum(self._sizes(rows, capacity, paged=False))

    def _sizes(self, rows: int, capacity: int, *, paged: bool) -> tuple[int, int]:
        runs = self.heads.heads * rows
        k, v = (runs * unit.run_room(capacity, paged=paged) for unit in self.units)
        return aligned(k), v

    def allocate_all(self, segments: Sequence[Segment]) -> None:
        """All or none."""
        done: list[int] = []
        try:
            for segment in segments:
                self.allocate(segment.key, segment.rows, segment.capacity, start=segment.start)
                done.append(segment.key)
        except TierFull:
            self.free(done)
            raise

    def free(self, keys: Sequence[int]) -> None:
        for key in keys:
            self.tier.free(self.segments.pop(key)[0])

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent, _, _ in self.segments.values())

    def clone_into(self, other: SegmentMemory) -> None:
        """`other`, which is empty, holds the same."""
        self.check(self.heads, EVERYTHING)
        for key, (_, k, v) in self.segments.items():
            capacity = k.shape[2] * self.units[0].tokens
            other.allocate(key, k.shape[1], capacity, start=self.starts.get(key, 0))
            _, *twins = other.segments[key]
            for dst, src in zip(twins, (k, v), strict=True):
                self._copy(other, dst, src)

    def _copy(self, other: SegmentMemory, dst: Tensor, src: Tensor) -> None:
        """`dst` of `other` becomes a copy of `src`, run by run where one of them is on disk."""
        to = other.disk if dst.is_meta else None
        come = self.disk if src.is_meta else None
        if to is None and come is None:
            dst.copy_(src)
            return
        for head in range(src.shape[0] if src.numel() else 0):
            for row in range(src.shape[1]):
                copy_segment(dst[head, row], src[head, row], to_disk=to, from_disk=come)
