# SPDX-License-Identifier: Apache-2.0
"""Heads attended where they lie by a CPU, whose blocks are packed by the lossless format."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headinfer.errors import CacheStateError
from headinfer.heads.codec import Codec
from headinfer.heads.memory import KVShape, Piece, SavedLayer
from headinfer.heads.packed_memory import PackedMemory, dropped, held
from headinfer.heads.packed_pieces import PackedPiece
from headinfer.layout import BLOCK_TOKENS, HeadGroup, Span
from headinfer.store import SpanStore, Write
from headinfer.tiers import Tier
from headinfer.transfer import TransferEngine

ENCODED_BLOCKS = 64
"""Blocks of a head that are put together at a time where compute and storage are the same memory."""


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

    @property
    def tail_bytes(self) -> int:
        return 0 if self._tail is None else sum(tail.nbytes for tail in self._tail)

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
        entries = self._memory.entries(dropped(self.store, crop))
        self.store.commit_crop(crop)
        self._memory.free(crop.free)
        entries.give()

    def stored_pieces(self, span: Span) -> list[Any]:
        return self._memory.stored_pieces(self.store, span)

    def unfinished(self, span: Span) -> Piece:
        """A copy of the tokens of `span`, which is what the tail holds."""
        tail = self._tail_of(span.stop)
        if tail is None or span != Span(self.store.stored, self.store.length):
            raise CacheStateError(f"tokens {span} are not what the tail holds")
        return Piece(span.start, tail[0].clone(), tail[1].clone())

    def restore(self, saved: SavedLayer) -> Any:
        return self._memory.filling(self.store, saved)

    def put(self, stored: Any, found: Tensor) -> None:
        """What `restore` returned, or a part [b, t, d] of it, is `found`; from any thread."""
        stored.copy_(found)

    def reorder(self, index: Sequence[int]) -> None:
        self.store.reorder(index)
        if self._tail is not None:
            rows = torch.tensor(list(index), device="cpu")
            self._tail = self._tail[0].index_select(0, rows), self._tail[1].index_select(0, rows)

    def clear(self) -> None:
        entries = self._memory.entries(held(self.store))
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
        self._memory.copy_into(twin._memory, self.store)
        return twin

    def copy_into(self, memory: PackedMemory) -> None:
        """The blocks are in `memory` of the same codec, too; the labels and entries are the same."""
        self._memory.copy_into(memory, self.store)

    def give_up(self) -> tuple[Tensor, Tensor] | None:
        """Nothing is held here any more; the blocks, and their entries, are somebody else's, and so is
        the tail [b, h, 128, d] returned."""
        tail, self._tail = self._tail, None
        self._memory.free(self.store.clear())
        return tail

    def ratio(self) -> tuple[int, int]:
        """Bytes the stored blocks take and stand for."""
        return self._memory.ratio(self.store)

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
                torch.zeros((*leading, shape.key_dim), dtype=shape.dtype, device="cpu"),
                torch.zeros((*leading, shape.value_dim), dtype=shape.dtype, device="cpu"),
            )
        return self._tail
