# SPDX-License-Identifier: Apache-2.0
"""What ranges of heads have in common: a layer's shape, pieces of the context, extents by segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.errors import TierFull
from headinfer.layout import Extent, HeadGroup, Span, aligned
from headinfer.store import Run, Segment
from headinfer.tiers import HostTier, Tier

GATHER_BYTES = 32 * 2**20
"""Keys and values whose rows are mapped are put in order for a kernel this much at a time."""


EVERYTHING = Span(0, 2**62)


class KVShape(NamedTuple):
    """What is the same for every token of a layer."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def token_bytes(self, batch: int) -> int:
        """Bytes of one token of one head, keys and values, all batch rows."""
        return batch * (self.key_dim + self.value_dim) * self.dtype.itemsize


class Piece(NamedTuple):
    """Keys and values [b, h, t, d] of the tokens from `start` on, readable by compute."""

    start: int
    k: Tensor
    v: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that attending it reads."""
        return self.k.nbytes + self.v.nbytes


def clip(piece: Piece, length: int) -> Piece:
    keep = length - piece.start
    if keep >= piece.k.shape[2]:
        return piece
    return Piece(piece.start, piece.k[:, :, :keep], piece.v[:, :, :keep])


def of_group(piece: Piece, heads: HeadGroup, group: HeadGroup) -> Piece:
    mine = slice(group.start - heads.start, group.stop - heads.start)
    return Piece(piece.start, piece.k[:, mine], piece.v[:, mine])


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


class SegmentMemory:
    """Extents of segments: keys [heads, rows, capacity, key_dim], then values.

    Attributes:
        guard: looks at saved tokens before they are read for the first time.
    """

    def __init__(self, tier: Tier, shape: KVShape, heads: HeadGroup) -> None:
        self.tier = tier
        self.shape = shape
        self.heads = heads
        self.segments: dict[int, tuple[Extent, Tensor, Tensor]] = {}
        self.guard: Guard | None = None

    def allocate(self, key: int, rows: int, capacity: int) -> None:
        """Raises TierFull when the tier's budget does not allow it."""
        shape = self.shape
        k_bytes, v_bytes = self._sizes(rows, capacity)
        extent = self.tier.allocate(k_bytes + v_bytes)
        leading = (self.heads.heads, rows, capacity)
        k = self.tier.view(extent, 0, (*leading, shape.key_dim), shape.dtype)
        v = self.tier.view(extent, k_bytes, (*leading, shape.value_dim), shape.dtype)
        self.segments[key] = extent, k, v

    def restore(self, segment: Segment, adopt: Adopt) -> bool:
        """Memory for a segment of saved tokens; False if they have yet to be read into it."""
        tier = self.tier
        if isinstance(tier, HostTier) and not tier.pin:
            found = adopt(self.heads, segment.capacity)
            if found is not None:
                extent = tier.adopt(found.memory, found.own_bytes)
                self.segments[segment.key] = extent, found.k, found.v
                return True
        self.allocate(segment.key, segment.rows, segment.capacity)
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
            self.tier.prepare(sum(self._sizes(rows, capacity)))

    def _sizes(self, rows: int, capacity: int) -> tuple[int, int]:
        shape, count = self.shape, self.heads.heads * rows * capacity
        k_bytes = aligned(count * shape.key_dim * shape.dtype.itemsize)
        return k_bytes, count * shape.value_dim * shape.dtype.itemsize

    def allocate_all(self, segments: Sequence[Segment]) -> None:
        """All or none."""
        done: list[int] = []
        try:
            for segment in segments:
                self.allocate(segment.key, segment.rows, segment.capacity)
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
        self.check(self.heads, EVERYTHING)
        for key, (_, k, v) in self.segments.items():
            other.allocate(key, k.shape[1], k.shape[2])
            _, other_k, other_v = other.segments[key]
            other_k.copy_(k)
            other_v.copy_(v)
