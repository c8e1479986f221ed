# SPDX-License-Identifier: Apache-2.0
"""Heads whose stored blocks are packed by the lossless format.

`PackedHeads` stream: blocks are encoded on the compute device on their way down, cross the link packed
and are unpacked where tiles are attended. `PackedInPlace` are attended where they lie, by a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headinfer.budget import format_bytes
from headinfer.errors import CacheStateError, InputError
from headinfer.formats.exact import ExactFormat
from headinfer.heads.codec import Codec
from headinfer.heads.memory import KVShape, Piece, SavedLayer
from headinfer.heads.offloaded import OffloadedHeads, WriteBuffers
from headinfer.heads.packed_memory import (
    Dropped,
    Entries,
    Filling,
    PackedMemory,
    PackedPiece,
    Stored,
)
from headinfer.layout import BLOCK_TOKENS, HeadGroup, Span, Tile, aligned
from headinfer.store import Crop, Run, SpanStore, Write
from headinfer.tiers import Tier
from headinfer.tiers.arena import bytes_as
from headinfer.transfer import Copy, Lane, TransferEngine

ENCODED_BLOCKS = 64
"""Blocks of a head that are put together at a time where compute and storage are the same memory."""


class PackedHeads(OffloadedHeads):
    """Heads in a tier compute cannot read, packed; see `OffloadedHeads`."""

    _memory: PackedMemory

    def __init__(
        self,
        tier: Tier,
        shape: KVShape,
        heads: HeadGroup,
        *,
        engine: TransferEngine,
        device: torch.device,
        codec: Codec,
        expected_tokens: int | None,
    ) -> None:
        super().__init__(
            tier,
            shape,
            heads,
            engine=engine,
            device=device,
            fmt=ExactFormat(),
            expected_tokens=expected_tokens,
        )
        self.codec = codec
        self._memory = PackedMemory(tier, shape, heads, codec)

    def append(self, k: Tensor, v: Tensor, buffers: WriteBuffers) -> None:
        """As there; overflow entries for every block to be written are set aside before anything."""
        writes = self.store.prepare_append(k.shape[2], batch=k.shape[0]).writes
        blocks = sum(write.tokens for write in writes) // BLOCK_TOKENS
        if blocks:
            count = self.heads.heads * k.shape[0] * blocks
            self.codec.reserve(self._memory.blocks_of(count))
        super().append(k, v, buffers)

    def recent_pieces(self, length: int) -> list[Piece]:
        # Attention over less than is stored may end within a block, which does not stream.
        found, first = super().recent_pieces(length), self.prefix(length)
        edge = super().prefix(length)
        return found if first == edge else [self._brought(Span(first, edge)), *found]

    def prefix(self, length: int) -> int:
        return super().prefix(length) // BLOCK_TOKENS * BLOCK_TOKENS

    def in_place(self, group: HeadGroup, length: int) -> Iterator[Any]:
        """Packed pieces of [0, length) of `group` as they lie in the tier."""
        first = group.start - self.heads.start
        for run in self.store.runs(Span(0, length)):
            runs = self._memory.runs(run, slice(first, first + group.heads))
            yield PackedPiece(run.span.start, run.span.tokens, *runs)

    def load(self, tile: Tile, slot: Tensor) -> list[Copy]:
        k, v = self._packed_views(slot, tile.group.heads, self.store.batch, tile.span.tokens)
        copies: list[Copy] = []
        first = tile.span.start // BLOCK_TOKENS
        for run in self.store.runs(_whole(tile.span)):
            _, stored_k, stored_v = self._memory.segments[run.key]
            blocks = _in_blocks(run)
            at = blocks.span.start - first
            copies += self._run_copies(tile.group, blocks, at, stored_k, k)
            copies += self._run_copies(tile.group, blocks, at, stored_v, v)
        return copies

    def unpack(self, tile: Tile, slot: Tensor) -> Piece:
        heads, batch, tokens = tile.group.heads, self.store.batch, tile.span.tokens
        packed = self._packed_views(slot, heads, batch, tokens)
        whole = _whole(tile.span).tokens
        nbytes = heads * self.shape.token_bytes(batch) * whole + aligned(1)
        if tile.layer >= 0:
            k, v = self._views(self.codec.scratch(nbytes), heads, batch, whole)
        else:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            k, v = self._new_views(buffer, heads, batch, whole)
        for slots, out in zip(packed, (k, v), strict=True):
            self.codec.decode(slots, out, tile.layer)
        return Piece(
            tile.span.start, k[:, :, :tokens].transpose(0, 1), v[:, :, :tokens].transpose(0, 1)
        )

    def stored_pieces(self, span: Span) -> list[Any]:
        return _stored_pieces(self.store, self._memory, span)

    def restore(self, saved: SavedLayer) -> Any:
        segment = self.store.restore(saved.tokens, batch=saved.batch)
        return _filling(self.store, self._memory, segment.key, saved)

    def put(self, stored: Any, found: Tensor) -> None:
        """What `restore` returned, or a part [b, t, d] of it, is `found`; from any thread."""
        stored.copy_(found)

    def pieces(self, length: int) -> Iterator[Piece]:
        prefix = self.prefix(length)
        if prefix:
            yield self._brought(Span(0, prefix))
        yield from self.recent_pieces(length)

    def clear(self) -> None:
        entries = self._entries(_everything(self.store))
        super().clear()
        entries.give()

    def clone(self, tier: Tier, engine: TransferEngine, codec: Codec | None = None) -> PackedHeads:
        """An independent copy in `tier`, its overflow in `codec`, the copy's own."""
        if codec is None:
            raise CacheStateError("packed heads are cloned with a codec of the copy's own")
        self._engine.drain()
        twin = PackedHeads(
            tier,
            self.shape,
            self.heads,
            engine=engine,
            device=self._device,
            codec=codec,
            expected_tokens=None,
        )
        twin.store = copy.deepcopy(self.store)
        if self._tail is not None:
            twin._tail = self._tail[0].clone(), self._tail[1].clone()
        self._memory.clone_into(twin._memory)
        return twin

    def ratio(self) -> tuple[int, int]:
        """Bytes the stored blocks take and stand for; waits for copies under way."""
        self._engine.done(self.last_write, block=True)
        return self._memory.ratio(self.store.segments)

    def _crop(self, crop: Crop) -> None:
        entries = self._entries(_dropped(self.store, crop))
        super()._crop(crop)
        entries.give()

    def _entries(self, dropped: Dropped) -> Entries:
        if self._memory.overflows:
            self._engine.drain()  # blocks on their way down are about to be looked at
        return self._memory.entries(dropped)

    def _write_tail(
        self, writes: Sequence[Write], tail_k: Tensor, tail_v: Tensor, buffers: WriteBuffers
    ) -> None:
        """The tail is exactly one full block: what is encoded of it goes through a buffer, and it is
        free at once."""
        batch = tail_k.shape[1]
        for write in writes:
            for heads in self._portions(buffers, batch, plain=False):
                index, buffer = buffers.acquire()
                views = self._packed_views(buffer, heads.stop - heads.start, batch, BLOCK_TOKENS)
                for tail, slots in zip((tail_k, tail_v), views, strict=True):
                    self.codec.encode(tail[heads], slots)
                self._submit_packed(write.key, write.offset, heads, *views)
                buffers.release(index, self.last_write)

    def _write_blocks(
        self, writes: Sequence[Write], old: Piece, new: Piece, buffers: WriteBuffers
    ) -> None:
        """Blocks of the old tail and the fresh keys are put together in a write buffer, encoded
        within it and copied down."""
        batch = new.k.shape[0]
        for heads in self._portions(buffers, batch, plain=True):
            count = heads.stop - heads.start
            some = slice(heads.start, heads.stop)
            parts = [Piece(p.start, p.k[:, some], p.v[:, some]) for p in (old, new)]
            step = self._fitting(buffers, count * batch, plain=True)
            for write in writes:
                for done in range(0, write.tokens, step * BLOCK_TOKENS):
                    tokens = min(step * BLOCK_TOKENS, write.tokens - done)
                    index, buffer = buffers.acquire()
                    packed = self._packed_views(buffer, count, batch, tokens)
                    rest = buffer[self._packed_bytes(count * batch, tokens) :]
                    k, v = self._new_views(rest, count, batch, tokens)
                    for part in parts:
                        self._encode(part, old.start + write.source + done, k, v)
                    for plain, slots in zip((k, v), packed, strict=True):
                        self.codec.encode(plain, slots)
                    self._submit_packed(write.key, write.offset + done, heads, *packed)
                    buffers.release(index, self.last_write)

    def _portions(self, buffers: WriteBuffers, batch: int, *, plain: bool) -> list[slice]:
        """Heads whose blocks pass a write buffer together: all of them, unless it is small."""
        most = next(
            (h for h in range(self.heads.heads, 0, -1) if self._fitting(buffers, h * batch, plain)),
            None,
        )
        if most is None:
            raise InputError(
                f"a write-back buffer of {format_bytes(buffers.nbytes)} cannot hold one block of one "
                f"head for {batch} sequences beside its packed form; use fewer sequences, or "
                "kv_format='exact'"
            )
        return [
            slice(first, min(first + most, self.heads.heads))
            for first in range(0, self.heads.heads, most)
        ]

    def _fitting(self, buffers: WriteBuffers, runs: int, plain: bool) -> int:
        """Blocks of `runs` heads x rows that fit a write buffer, packed and, if `plain`, plain too."""
        one = runs * sum(layout.slot_bytes for layout in self._memory.layouts)
        if plain:
            one += runs * BLOCK_TOKENS * self.shape.token_bytes(1)
        return max(0, (buffers.nbytes - 3 * aligned(1)) // one)

    def _submit_packed(self, key: int, offset: int, heads: slice, k: Tensor, v: Tensor) -> None:
        """Copy slots k, v [h, b, blocks, slot_bytes] of `heads` into a segment."""
        _, *stored = self._memory.segments[key]
        first = offset // BLOCK_TOKENS
        there = slice(first, first + k.shape[2])
        copies = [
            Copy(down[heads.start + head, row, there], up[head, row])
            for down, up in zip(stored, (k, v), strict=True)
            for head in range(up.shape[0])
            for row in range(up.shape[1])
        ]
        self.written_bytes += sum(item.nbytes for item in copies)
        copies += self.codec.counted(self.shape.key_dim, self.shape.value_dim)
        self.last_write = self._engine.submit(copies, lane=Lane.OUT, after=[self._engine.fence()])
        blocks = k.shape[0] * k.shape[1] * k.shape[2]
        self.codec.encoded(self.last_write, self._memory.blocks_of(blocks))

    def _brought(self, span: Span) -> Piece:
        """A copy of stored tokens on the compute device."""
        rows = self.heads.heads * self.store.batch
        nbytes = self._packed_bytes(rows, _whole(span).tokens) + aligned(1)
        slot = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        tile = Tile(-1, self.heads, span, self.store.epoch)
        after = [self._engine.fence(), self.last_write]
        self._engine.wait(self._engine.submit(self.load(tile, slot), lane=Lane.IN, after=after))
        return self.unpack(tile, slot)

    def _reload_tail(self, span: Span) -> None:
        piece = self._brought(span)
        self._engine.wait(self._tail_free_after)
        for tail, found in zip(
            self._tail_buffers(self.store.batch), (piece.k, piece.v), strict=True
        ):
            tail[:, :, : span.tokens].copy_(found.transpose(0, 1))

    def _packed_bytes(self, runs: int, tokens: int) -> int:
        """Bytes that the slots of `tokens` tokens of `runs` heads x rows take in a buffer."""
        blocks = runs * -(-tokens // BLOCK_TOKENS)
        k, v = self._memory.layouts
        return aligned(blocks * k.slot_bytes) + aligned(blocks * v.slot_bytes)

    def _packed_views(
        self, buffer: Tensor, heads: int, batch: int, tokens: int
    ) -> tuple[Tensor, Tensor]:
        blocks = -(-tokens // BLOCK_TOKENS)
        k, v = self._memory.layouts
        first = aligned(heads * batch * blocks * k.slot_bytes)
        return (
            bytes_as(buffer, 0, (heads, batch, blocks, k.slot_bytes), torch.uint8),
            bytes_as(buffer, first, (heads, batch, blocks, v.slot_bytes), torch.uint8),
        )


class PackedInPlace:
    """Heads attended where they lie, packed but for the youngest tokens; for a CPU."""

    def __init__(
        self,
        tier: Tier,
        shape: KVShape,
        heads: HeadGroup,
        *,
        codec: Codec,
        expected_tokens: int | None,
    ) -> None:
        self.heads = heads
        self.shape = shape
        self.codec = codec
        # Segments as where every token is stored at once: attended segment by segment.
        self.store = SpanStore(whole=True)
        if expected_tokens is not None:
            self.store.reserve(expected_tokens)
        self._memory = PackedMemory(tier, shape, heads, codec)
        self._tail: tuple[Tensor, Tensor] | None = None  # [b, h, 128, d]

    @property
    def stored_bytes(self) -> int:
        return self._memory.nbytes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store k, v [b, h of the range, t, d]."""
        batch, tokens = k.shape[0], k.shape[2]
        append = self.store.prepare_append(tokens, batch=batch)
        blocks = sum(write.tokens for write in append.writes) // BLOCK_TOKENS
        if blocks:
            count = self.heads.heads * batch * blocks
            self.codec.reserve(self._memory.blocks_of(count))
        self._memory.allocate_all(append.new_segments)
        tails = self._tail_buffers(batch)
        before, after = append.tail_before, append.tail_after
        for write in append.writes:
            for done in range(0, write.tokens, ENCODED_BLOCKS * BLOCK_TOKENS):
                some = min(ENCODED_BLOCKS * BLOCK_TOKENS, write.tokens - done)
                self._encode(write, done, some, tails, (k, v), before)
        kept = 0 if append.writes else before
        for tail, fresh in zip(tails, (k, v), strict=True):
            tail[:, :, kept:after].copy_(fresh[:, :, tokens - (after - kept) :])
        self.store.commit_append(append, batch=batch)

    def pieces(self, length: int) -> Iterator[Any]:
        """Everything in [0, length); the youngest run and the tail are one piece, so that they are
        attended like one run of plain tokens."""
        stored = min(self.store.stored, length)
        tail = self._tail_of(length)
        runs = self.store.runs(Span(0, stored))
        for run in runs:
            joined = tail if run is runs[-1] else None
            yield PackedPiece(run.span.start, run.span.tokens, *self._memory.runs(run), tail=joined)
        if tail is not None and not runs:
            yield Piece(stored, *tail)

    def crop(self, length: int) -> None:
        crop = self.store.prepare_crop(length)
        if crop.reload.tokens:
            pieces = list(self.pieces(crop.length))
            start = crop.reload.start
            found = next(piece for piece in pieces if piece.stop >= crop.length)
            part = found.plain(start - found.start, crop.length - found.start)
            for tail, mine in zip(
                self._tail_buffers(self.store.batch), (part.k, part.v), strict=True
            ):
                tail[:, :, : crop.reload.tokens].copy_(mine)
        entries = self._memory.entries(_dropped(self.store, crop))
        self.store.commit_crop(crop)
        self._memory.free(crop.free)
        entries.give()

    def stored_pieces(self, span: Span) -> list[Any]:
        return _stored_pieces(self.store, self._memory, span)

    def unfinished(self, span: Span) -> Piece:
        """A copy of the tokens of `span`, which is what the tail holds."""
        tail = self._tail_of(span.stop)
        if tail is None or span != Span(self.store.stored, self.store.length):
            raise CacheStateError(f"tokens {span} are not what the tail holds")
        return Piece(span.start, tail[0].clone(), tail[1].clone())

    def restore(self, saved: SavedLayer) -> Any:
        segment = self.store.restore(saved.tokens, batch=saved.batch)
        return _filling(self.store, self._memory, segment.key, saved)

    def put(self, stored: Any, found: Tensor) -> None:
        """What `restore` returned, or a part [b, t, d] of it, is `found`; from any thread."""
        stored.copy_(found)

    def reorder(self, index: Sequence[int]) -> None:
        self.store.reorder(index)
        if self._tail is not None:
            rows = torch.tensor(list(index))
            self._tail = self._tail[0].index_select(0, rows), self._tail[1].index_select(0, rows)

    def clear(self) -> None:
        entries = self._memory.entries(_everything(self.store))
        self._tail = None
        self._memory.free(self.store.clear())
        entries.give()

    def clone(
        self, tier: Tier, engine: TransferEngine, codec: Codec | None = None
    ) -> PackedInPlace:
        """An independent copy in `tier`, its overflow in `codec`; nothing is under way."""
        if codec is None:
            raise CacheStateError("packed heads are cloned with a codec of the copy's own")
        twin = PackedInPlace(tier, self.shape, self.heads, codec=codec, expected_tokens=None)
        twin.store = copy.deepcopy(self.store)
        if self._tail is not None:
            twin._tail = self._tail[0].clone(), self._tail[1].clone()
        self._memory.clone_into(twin._memory)
        return twin

    def ratio(self) -> tuple[int, int]:
        """Bytes the stored blocks take and stand for."""
        return self._memory.ratio(self.store.segments)

    def _encode(
        self,
        write: Write,
        done: int,
        tokens: int,
        tails: tuple[Tensor, Tensor],
        fresh: tuple[Tensor, Tensor],
        before: int,
    ) -> None:
        """`tokens` tokens of a write, from `done` on, of the `before` old ones and then fresh ones."""
        source = write.source + done
        place = (write.offset + done) // BLOCK_TOKENS
        _, *stored = self._memory.segments[write.key]
        for tail, new, slots in zip(tails, fresh, stored, strict=True):
            parts = [
                tail[:, :, source : min(before, source + tokens)] if source < before else None,
                new[:, :, max(source - before, 0) : source + tokens - before],
            ]
            whole = torch.cat([part for part in parts if part is not None], dim=2)
            there = slots[:, :, place : place + tokens // BLOCK_TOKENS]
            self.codec.encode(whole.transpose(0, 1), there)
        for copied in self.codec.counted(self.shape.key_dim, self.shape.value_dim):
            copied.dst.copy_(copied.src)

    def _tail_of(self, length: int) -> tuple[Tensor, Tensor] | None:
        tokens = length - self.store.stored
        if tokens <= 0 or self._tail is None:
            return None
        return self._tail[0][:, :, :tokens], self._tail[1][:, :, :tokens]

    def _tail_buffers(self, batch: int) -> tuple[Tensor, Tensor]:
        if self._tail is None or self._tail[0].shape[0] != batch:
            leading, shape = (batch, self.heads.heads, BLOCK_TOKENS), self.shape
            self._tail = (
                torch.zeros((*leading, shape.key_dim), dtype=shape.dtype),
                torch.zeros((*leading, shape.value_dim), dtype=shape.dtype),
            )
        return self._tail


def _dropped(store: SpanStore, crop: Crop) -> Dropped:
    """The blocks that a crop forgets."""
    stored = crop.reload.start if crop.length < store.stored else store.stored
    found: Dropped = []
    for segment in store.segments:
        kept = min(max(stored - segment.start, 0), segment.filled)
        first, stop = segment.offset + kept, segment.offset + segment.filled
        found.append((segment.key, first // BLOCK_TOKENS, stop // BLOCK_TOKENS))
    return found


def _everything(store: SpanStore) -> Dropped:
    return [
        (part.key, part.offset // BLOCK_TOKENS, (part.offset + part.filled) // BLOCK_TOKENS)
        for part in store.segments
    ]


def _stored_pieces(store: SpanStore, memory: PackedMemory, span: Span) -> list[Any]:
    found = []
    for run in store.runs(span):
        k, v = memory.runs(run)
        found.append(
            Piece(run.span.start, Stored(k, run.span.tokens), Stored(v, run.span.tokens))  # type: ignore[arg-type]
        )
    return found


def _filling(store: SpanStore, memory: PackedMemory, key: int, saved: SavedLayer) -> Any:
    """Memory for saved tokens, and what writes them there."""
    try:
        memory.restore(store.segments[0], saved.adopt)
    except BaseException:
        store.clear()
        raise
    run = Run(key, 0, Span(0, saved.tokens), None)
    return tuple(Filling(part, memory.codec) for part in memory.runs(run))


def _whole(span: Span) -> Span:
    """The blocks that `span`, which begins with one, touches."""
    return Span(span.start, -(-span.stop // BLOCK_TOKENS) * BLOCK_TOKENS)


def _in_blocks(run: Run) -> Run:
    """A run of whole blocks, counted in blocks."""
    span = Span(run.span.start // BLOCK_TOKENS, run.span.stop // BLOCK_TOKENS)
    return run._replace(offset=run.offset // BLOCK_TOKENS, span=span)
