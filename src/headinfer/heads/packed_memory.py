# SPDX-License-Identifier: Apache-2.0
"""Packed blocks of a range of heads: their extents, pieces of the context made of them, and what
reads or fills them for a saved context, which holds plain bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.attention.packed import PackedRun
from headinfer.errors import CacheStateError
from headinfer.formats.lossless import BlockLayout, raw_indices
from headinfer.formats.overflow import Overflow
from headinfer.heads.codec import Codec, decode_on_host
from headinfer.heads.memory import Adopt, KVShape, Piece, SegmentMemory
from headinfer.layout import BLOCK_TOKENS, HeadGroup, aligned
from headinfer.store import Run, Segment
from headinfer.tiers import Tier

Dropped = list[tuple[int, int, int]]
"""Segment, first block, block after the last."""


class Entries(NamedTuple):
    """Overflow entries of blocks that are about to be forgotten."""

    indices: list[tuple[Overflow, Tensor]]

    def give(self) -> None:
        """They are free; the blocks are forgotten."""
        for overflow, indices in self.indices:
            overflow.give(indices)


class PackedMemory(SegmentMemory):
    """Extents of segments: slots of keys [heads, rows, blocks, slot_bytes], then of values."""

    def __init__(self, tier: Tier, shape: KVShape, heads: HeadGroup, codec: Codec) -> None:
        super().__init__(tier, shape, heads)
        self.codec = codec
        self.layouts = BlockLayout(shape.key_dim), BlockLayout(shape.value_dim)

    def allocate(self, key: int, rows: int, capacity: int, *, start: int = 0) -> None:
        k_bytes, v_bytes = self._sizes(rows, capacity)
        extent = self.tier.allocate(k_bytes + v_bytes)
        leading = (self.heads.heads, rows, capacity // BLOCK_TOKENS)
        k, v = (
            self.tier.view(extent, offset, (*leading, layout.slot_bytes), torch.uint8)
            for offset, layout in zip((0, k_bytes), self.layouts, strict=True)
        )
        self.segments[key] = extent, k, v

    def restore(self, segment: Segment, adopt: Adopt) -> bool:
        """Files hold plain bytes, so they are not mapped."""
        self.allocate(segment.key, segment.rows, segment.capacity)
        return False

    def runs(self, run: Run, heads: slice = slice(None)) -> tuple[PackedRun, PackedRun]:
        """Keys and values of the whole blocks that `run` touches."""
        _, k, v = self.segments[run.key]
        first = run.offset // BLOCK_TOKENS
        there = slice(first, first + -(-run.span.tokens // BLOCK_TOKENS))
        found = [
            PackedRun(slots[heads, :, there], self.codec.overflow(layout.dim), run.row_map)
            for slots, layout in zip((k, v), self.layouts, strict=True)
        ]
        return found[0], found[1]

    def blocks_of(self, count: int) -> dict[int, int]:
        """Blocks that `count` blocks of keys and as many of values are, by their dim."""
        found: dict[int, int] = {}
        for layout in self.layouts:
            found[layout.dim] = found.get(layout.dim, 0) + count
        return found

    @property
    def overflows(self) -> list[Overflow]:
        """Those in which blocks of these heads may have entries."""
        found = {layout.dim: self.codec.overflow(layout.dim) for layout in self.layouts}
        return [one for one in found.values() if one.touched]

    def entries(self, dropped: Dropped) -> Entries:
        """The overflow entries of blocks that nothing will write or read any more."""
        found: list[tuple[Overflow, Tensor]] = []
        for key, first, stop in dropped:
            _, k, v = self.segments[key]
            for slots, layout in zip((k, v), self.layouts, strict=True):
                overflow = self.codec.overflow(layout.dim)
                if overflow.touched and stop > first:
                    found.append((overflow, raw_indices(slots[:, :, first:stop], layout.dim)))
        return Entries(found)

    def ratio(self, segments: list[Segment]) -> tuple[int, int]:
        """Bytes that the blocks of `segments` take, overflow included, and that they stand for."""
        stored = plain = 0
        for segment in segments:
            first = segment.offset // BLOCK_TOKENS
            here = slice(first, first + segment.filled // BLOCK_TOKENS)
            _, k, v = self.segments[segment.key]
            for slots, layout in zip((k, v), self.layouts, strict=True):
                part = slots[:, :, here]
                blocks = part.shape[:3].numel()
                raw = 0
                if self.codec.overflow(layout.dim).touched:
                    raw = raw_indices(part, layout.dim).numel()
                stored += blocks * layout.slot_bytes + raw * layout.entry_bytes
                plain += blocks * 2 * BLOCK_TOKENS * layout.dim
        return stored, plain

    def clone_into(self, other: SegmentMemory) -> None:
        """Raw blocks get entries of their own. `other` is packed too."""
        if not isinstance(other, PackedMemory):
            raise CacheStateError("packed blocks are cloned into packed memory")
        for key, (_, k, v) in self.segments.items():
            other.allocate(key, k.shape[1], k.shape[2] * BLOCK_TOKENS)
            _, *twins = other.segments[key]
            for slots, twin, layout in zip((k, v), twins, self.layouts, strict=True):
                twin.copy_(slots)
                mine = self.codec.overflow(layout.dim)
                if mine.touched:
                    self._clone_entries(twin, layout, other.codec)

    def _clone_entries(self, slots: Tensor, layout: BlockLayout, codec: Codec) -> None:
        mine, theirs = self.codec.overflow(layout.dim), codec.overflow(layout.dim)
        head = slots[..., layout.header : layout.header + 2]
        # What was never written says neither.
        raw = (head[..., 0] == 1) & (head[..., 1] == 1)
        for place in raw.nonzero().tolist():
            slot = slots[tuple(place)]
            index = raw_indices(slot, layout.dim)
            if int(index) >= mine.entries:
                continue
            theirs.reserve(1)
            field = slot[layout.positions : layout.positions + 4]
            field.copy_(theirs.store(mine.fetch(index)).to(torch.int32).view(torch.uint8))
            theirs.landed.copy_(theirs.counter)

    def _sizes(self, rows: int, capacity: int) -> tuple[int, int]:
        blocks = self.heads.heads * rows * (capacity // BLOCK_TOKENS)
        k, v = self.layouts
        return aligned(blocks * k.slot_bytes), blocks * v.slot_bytes


@dataclass(frozen=True, slots=True)
class PackedPiece:
    """Keys and values of the tokens from `start` on in host memory, packed, and plain ones after
    them: what `Piece` is for plain ones.

    Attributes:
        tokens: packed ones, of which the last block may have more.
        packed_k, packed_v: their blocks.
        tail: k, v [b, h, t, d] of what follows, or None.
    """

    start: int
    tokens: int
    packed_k: PackedRun
    packed_v: PackedRun
    tail: tuple[Tensor, Tensor] | None = None

    @property
    def stop(self) -> int:
        return self.start + self.tokens + (0 if self.tail is None else self.tail[0].shape[2])

    @property
    def heads(self) -> int:
        return self.packed_k.slots.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that attending it reads, overflow aside."""
        rows = len(self.packed_k.rows)
        packed = sum(run.slots[:, 0].numel() * rows for run in (self.packed_k, self.packed_v))
        return packed + (0 if self.tail is None else sum(x.nbytes for x in self.tail))

    @property
    def k(self) -> Tensor:
        """Keys [b, h, t, d], decoded."""
        return self._plain(0, 0, self.stop - self.start, slice(None))

    @property
    def v(self) -> Tensor:
        """Values [b, h, t, d], decoded."""
        return self._plain(1, 0, self.stop - self.start, slice(None))

    def plain(self, first: int, last: int, heads: slice = slice(None)) -> Piece:
        """The tokens [first, last) of the piece, decoded."""
        k, v = (self._plain(which, first, last, heads) for which in (0, 1))
        return Piece(self.start + first, k, v)

    def _plain(self, which: int, first: int, last: int, heads: slice) -> Tensor:
        run = (self.packed_k, self.packed_v)[which]
        parts: list[Tensor] = []
        if first < self.tokens:
            block, stop = first // BLOCK_TOKENS, -(-min(last, self.tokens) // BLOCK_TOKENS)
            part = run._replace(slots=run.slots[heads, :, block:stop])
            count, rows = part.slots.shape[0], len(run.rows)
            out = torch.empty(
                (count, rows, (stop - block) * BLOCK_TOKENS, run.dim), dtype=torch.bfloat16
            )
            decode_on_host(part, out)
            here = slice(
                first - block * BLOCK_TOKENS, min(last, self.tokens) - block * BLOCK_TOKENS
            )
            parts.append(out[:, :, here].transpose(0, 1))
        if self.tail is not None and last > self.tokens:
            rest = slice(max(first - self.tokens, 0), last - self.tokens)
            parts.append(self.tail[which][:, heads, rest])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class Stored:
    """Keys or values [b, h, t, d] of whole packed blocks, decoded when they are asked for: what a
    saved context reads in the place of a tensor. Checksums are compared."""

    device = torch.device("meta")  # not to be read as they lie

    def __init__(self, run: PackedRun, tokens: int) -> None:
        self._run = run
        self.shape = (len(run.rows), run.slots.shape[0], tokens, run.dim)

    def __getitem__(self, place: tuple[slice, slice, slice]) -> Stored:
        start, stop, _ = place[2].indices(self.shape[2])
        blocks = slice(start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS))
        part = self._run._replace(slots=self._run.slots[:, :, blocks])
        return Stored(part, stop - start)

    def numel(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3]

    def element_size(self) -> int:
        return torch.bfloat16.itemsize

    def detach(self) -> Tensor:
        """The tensor."""
        rows, heads, tokens, dim = self.shape
        blocks = self._run.slots.shape[2]
        out = torch.empty((heads, rows, blocks * BLOCK_TOKENS, dim), dtype=torch.bfloat16)
        decode_on_host(self._run, out, verify=True)
        return out[:, :, :tokens].transpose(0, 1)


class Filling:
    """Keys or values [h, b, t, d], [b, t, d] of one head, or tokens of these, to be written into
    packed blocks by whoever reads a saved context."""

    device = torch.device("meta")
    dtype = torch.bfloat16

    def __init__(self, run: PackedRun, codec: Codec, heads: bool = True) -> None:
        self._run, self._codec, self._heads = run, codec, heads
        heads_rows = run.slots.shape[:2] if heads else run.slots.shape[1:2]
        self.shape = (*heads_rows, run.slots.shape[2] * BLOCK_TOKENS, run.dim)

    def __getitem__(self, place: int | tuple[slice, slice]) -> Filling:
        if isinstance(place, int):
            part = self._run.slots[place : place + 1]
            return Filling(self._run._replace(slots=part), self._codec, heads=False)
        start, stop, _ = place[1].indices(self.shape[1])
        blocks = slice(start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS))
        part = self._run.slots[:, :, blocks]
        return Filling(self._run._replace(slots=part), self._codec, heads=False)

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def element_size(self) -> int:
        return torch.bfloat16.itemsize

    def copy_(self, values: Tensor) -> None:
        """values [b, t, d] of one head are stored."""
        self._codec.pack_on_host(values[None], self._run)
