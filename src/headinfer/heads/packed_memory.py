# SPDX-License-Identifier: Apache-2.0
"""Packed blocks of a range of heads: their extents, and the overflow entries that they name.

What a block says of itself, its label, is needed when it is forgotten, counted or copied. Of blocks
on disk it is kept in host memory beside, so that nobody reads the disk to forget what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headinfer.attention.packed import PackedRun
from headinfer.blocks import LABEL_BYTES, BlockLayout
from headinfer.formats.lossless import RAW, VERSION, labelled_indices
from headinfer.formats.overflow import Overflow
from headinfer.heads.codec import Codec
from headinfer.heads.memory import Adopt, KVShape, Piece, SavedLayer, SegmentMemory, Unit
from headinfer.heads.on_disk import brought, read_ahead, read_blocks, rows_of
from headinfer.heads.packed_pieces import Blocks, Filling, PackedPiece, Stored
from headinfer.layout import BLOCK_TOKENS, Extent, HeadGroup, Span
from headinfer.store import Crop, Run, Segment, SpanStore
from headinfer.tiers import Tier

Held = list[tuple[int, int, int]]
"""Segment, first block, block after the last."""


class Entries(NamedTuple):
    """Overflow entries of blocks that are about to be forgotten."""

    indices: list[tuple[Overflow, Tensor]]

    def give(self) -> None:
        """They are free; the blocks are forgotten."""
        for overflow, indices in self.indices:
            overflow.give(indices)


class PackedMemory(SegmentMemory):
    """Extents of segments: slots of keys [heads, rows, blocks, slot_bytes], then of values.

    Attributes:
        layouts: of the blocks of keys and of values.
    """

    def __init__(
        self, tier: Tier, shape: KVShape, heads: HeadGroup, codec: Codec, layer: int = -1
    ) -> None:
        super().__init__(tier, shape, heads, layer)
        self.codec = codec
        self.layouts = BlockLayout(shape.key_dim), BlockLayout(shape.value_dim)
        k, v = (Unit(BLOCK_TOKENS, layout.slot_bytes, torch.uint8) for layout in self.layouts)
        self.units = k, v
        self._labels: dict[int, tuple[Extent, Tensor]] = {}

    def allocate(self, key: int, rows: int, capacity: int, *, start: int = 0) -> None:
        super().allocate(key, rows, capacity, start=start)
        _, k, _ = self.segments[key]
        if not k.is_meta:
            return
        shape = (2, *k.shape[:3], LABEL_BYTES)
        try:
            memory, extent = self.codec.hold(torch.Size(shape).numel())
        except BaseException:
            self.free([key])
            raise
        self._labels[key] = extent, memory.view(shape)

    def free(self, keys: Sequence[int]) -> None:
        super().free(keys)
        for key in keys:
            kept = self._labels.pop(key, None)
            if kept is not None:
                self.codec.release(kept[0])

    def labels(self, key: int) -> tuple[Tensor, Tensor]:
        """Of a segment's keys and values [heads, rows, blocks, LABEL_BYTES]; what is written goes on
        holding, and of blocks on disk whoever writes them keeps the labels too."""
        kept = self._labels.get(key)
        if kept is not None:
            return kept[1][0], kept[1][1]
        _, k, v = self.segments[key]
        return k[..., self.layouts[0].label], v[..., self.layouts[1].label]

    def on_disk(self, key: int) -> bool:
        """Whether a segment's slots lie on disk, their labels beside."""
        return key in self._labels

    def restore(self, segment: Segment, adopt: Adopt) -> bool:
        """Files hold plain bytes, so they are not mapped."""
        self.allocate(segment.key, segment.rows, segment.capacity, start=segment.start)
        return False

    def runs(self, run: Run, heads: slice = slice(None)) -> tuple[PackedRun, PackedRun]:
        """Keys and values of the whole blocks that `run` touches, as they lie."""
        _, k, v = self.segments[run.key]
        blocks = in_blocks(run)
        there = slice(blocks.offset, blocks.offset + blocks.span.tokens)
        found = [
            PackedRun(slots[heads, :, there], self.codec.overflow(layout.dim), run.row_map)
            for slots, layout in zip((k, v), self.layouts, strict=True)
        ]
        return found[0], found[1]

    def pieces(self, run: Run, heads: slice) -> Iterator[PackedPiece]:
        """A run for a processor that reads it where it lies; what is on disk, as it arrives."""
        if not self.on_disk(run.key):
            yield PackedPiece(run.span.start, run.span.tokens, *self.runs(run, heads))
            return
        _, k, v = self.segments[run.key]
        k, v = k[heads], v[heads]
        # As many tokens at once as of plain ones: another order of sums would give other bits.
        step = read_blocks(k.shape[0] * self.shape.token_bytes(len(rows_of(run, k))))
        for span, *slots in read_ahead(self.disk, in_blocks(run), k, v, step):
            start, stop = span.start * BLOCK_TOKENS, span.stop * BLOCK_TOKENS
            packed = [
                PackedRun(some, self.codec.overflow(layout.dim))
                for some, layout in zip(slots, self.layouts, strict=True)
            ]
            tokens = min(stop, run.span.tokens) - start
            yield PackedPiece(run.span.start + start, tokens, packed[0], packed[1])

    def stored_pieces(self, store: SpanStore, span: Span) -> list[Any]:
        """The tokens of `span`, which is whole blocks, for a saved context."""
        found = []
        for run in store.runs(span):
            disk = self.disk if self.on_disk(run.key) else None
            k, v = (Stored(part, run.span.tokens, disk) for part in self.runs(run))
            found.append(Piece(run.span.start, k, v))  # type: ignore[arg-type]
        return found

    def filling(self, store: SpanStore, saved: SavedLayer) -> Any:
        """Memory for saved tokens, and what writes them there."""
        segment = store.restore(saved.tokens, batch=saved.batch)
        try:
            self.restore(segment, saved.adopt)
        except BaseException:
            store.clear()
            raise
        here = slice(0, saved.tokens // BLOCK_TOKENS)
        disk = self.disk if self.on_disk(segment.key) else None
        runs = self.runs(Run(segment.key, 0, Span(0, saved.tokens), None))
        kept = [None if disk is None else label[:, :, here] for label in self.labels(segment.key)]
        return tuple(
            Filling(Blocks(run, label, disk), self.codec)
            for run, label in zip(runs, kept, strict=True)
        )

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

    def entries(self, dropped: Held) -> Entries:
        """The overflow entries of blocks that nothing will write or read any more."""
        found: list[tuple[Overflow, Tensor]] = []
        for key, first, stop in dropped:
            for labels, layout in zip(self.labels(key), self.layouts, strict=True):
                overflow = self.codec.overflow(layout.dim)
                if overflow.touched and stop > first:
                    found.append((overflow, labelled_indices(labels[:, :, first:stop])))
        return Entries(found)

    def ratio(self, store: SpanStore) -> tuple[int, int]:
        """Bytes that the blocks held take, overflow included, and that they stand for."""
        stored = plain = 0
        for key, first, stop in held(store):
            for labels, layout in zip(self.labels(key), self.layouts, strict=True):
                part = labels[:, :, first:stop]
                blocks = part.shape[:3].numel()
                raw = 0
                if self.codec.overflow(layout.dim).touched:
                    raw = labelled_indices(part).numel()
                stored += blocks * layout.slot_bytes + raw * layout.entry_bytes
                plain += blocks * 2 * BLOCK_TOKENS * layout.dim
        return stored, plain

    def copy_into(self, other: PackedMemory, store: SpanStore) -> None:
        """`other`, which is empty, holds the same blocks of `store`. Raw ones get entries of their own
        unless both have one overflow, which is then the other's."""
        for key, (_, k, _) in self.segments.items():
            capacity = k.shape[2] * BLOCK_TOKENS
            other.allocate(key, k.shape[1], capacity, start=self.starts[key])
        for key, first, stop in held(store):
            _, *mine = self.segments[key]
            _, *theirs = other.segments[key]
            here = slice(first, stop)
            for dst, src in zip(theirs, mine, strict=True):
                self._copy(other, dst[:, :, here], src[:, :, here])
            if other.on_disk(key):
                for dst, src in zip(other.labels(key), self.labels(key), strict=True):
                    dst[:, :, here].copy_(src[:, :, here])
            if other.codec is not self.codec:
                self._copy_entries(other, key, here)

    def _copy_entries(self, other: PackedMemory, key: int, here: slice) -> None:
        _, *slots = other.segments[key]
        for part, labels, layout in zip(slots, other.labels(key), self.layouts, strict=True):
            mine, theirs = self.codec.overflow(layout.dim), other.codec.overflow(layout.dim)
            some = labels[:, :, here]
            raw = (some[..., 0] == VERSION) & (some[..., 1] == RAW)
            for place in raw.nonzero().tolist() if mine.touched else ():
                label = some[tuple(place)]
                theirs.reserve(1)
                number = theirs.store(mine.fetch(labelled_indices(label)))
                theirs.landed.copy_(theirs.counter)
                label[-4:].copy_(number.to(torch.int32).view(torch.uint8))
                if other.on_disk(key):
                    slot = part[:, :, here][tuple(place)]
                    memory = brought(other.disk, slot[None, None, None], (0,)).flatten()
                    memory[layout.label] = label
                    other.disk.store(slot, memory)


def held(store: SpanStore) -> Held:
    """Every block."""
    return [
        (part.key, part.offset // BLOCK_TOKENS, (part.offset + part.filled) // BLOCK_TOKENS)
        for part in store.segments
    ]


def dropped(store: SpanStore, crop: Crop) -> Held:
    """The blocks that a crop forgets."""
    stored = crop.reload.start if crop.length < store.stored else store.stored
    found: Held = []
    for segment in store.segments:
        kept = min(max(stored - segment.start, 0), segment.filled)
        first, stop = segment.offset + kept, segment.offset + segment.filled
        found.append((segment.key, first // BLOCK_TOKENS, stop // BLOCK_TOKENS))
    return found


def in_blocks(run: Run) -> Run:
    """The whole blocks that a run touches, which begins with one; counted in blocks."""
    span = Span(run.span.start // BLOCK_TOKENS, -(-run.span.stop // BLOCK_TOKENS))
    return run._replace(offset=run.offset // BLOCK_TOKENS, span=span)
