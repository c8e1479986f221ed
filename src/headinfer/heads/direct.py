# SPDX-License-Identifier: Apache-2.0
"""Heads attended where they lie."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headinfer.attention.placed import Place, place_of
from headinfer.errors import TierFull
from headinfer.heads.codec import Codec
from headinfer.heads.memory import (
    EVERYTHING,
    KVShape,
    Piece,
    SavedLayer,
    SegmentMemory,
    pieces_of,
)
from headinfer.layout import BLOCK_TOKENS, HeadGroup, Span
from headinfer.store import SpanStore
from headinfer.tiers import Tier
from headinfer.transfer import TransferEngine

PERMUTE_TOKENS = 8 * BLOCK_TOKENS
"""A reordering rewrites segments up to this size instead of mapping their rows."""


class DirectHeads:
    """Heads attended where they lie; every token is stored at once."""

    def __init__(
        self, tier: Tier, shape: KVShape, heads: HeadGroup, *, expected_tokens: int | None
    ) -> None:
        self.heads = heads
        self.shape = shape
        self.store = SpanStore(block_tokens=1)
        if expected_tokens is not None:
            self.store.reserve(expected_tokens)
        self._memory = SegmentMemory(tier, shape, heads)
        self._placed: tuple[int, Place] | None = None  # of which segment; keys come but once

    @property
    def stored_bytes(self) -> int:
        return self._memory.nbytes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store k, v [b, h of the range, t, d]."""
        batch = k.shape[0]
        append = self.store.prepare_append(k.shape[2], batch=batch)
        try:
            self._memory.allocate_all(append.new_segments)
        except TierFull:
            append = self.store.prepare_append(k.shape[2], batch=batch, spare=False)
            self._memory.allocate_all(append.new_segments)
        for write in append.writes:
            _, stored_k, stored_v = self._memory.segments[write.key]
            there = slice(write.offset, write.offset + write.tokens)
            here = slice(write.source, write.source + write.tokens)
            stored_k[:, :, there].copy_(k[:, :, here].transpose(0, 1))
            stored_v[:, :, there].copy_(v[:, :, here].transpose(0, 1))
        self.store.commit_append(append, batch=batch)

    def place(self, tokens: int, *, batch: int) -> Place | None:
        """Where everything lies, if it lies in a row with room for `tokens` more of `batch` sequences."""
        if not self.store.has_room(tokens, batch=batch) or self._memory.guard is not None:
            return None
        key = self.store.segments[0].key
        if self._placed is None or self._placed[0] != key:
            _, k, v = self._memory.segments[key]
            self._placed = key, place_of(k, v)
        return self._placed[1]

    def extend(self, tokens: int) -> None:
        """`tokens` more are, or will be, where `place` said."""
        self.store.extend(tokens)

    def pieces(self, length: int) -> Iterator[Piece]:
        """Everything in [0, length), in place; only reordered rows are gathered."""
        self._memory.check(self.heads, Span(0, length))
        for run in self.store.runs(Span(0, length)):
            _, k, v = self._memory.segments[run.key]
            yield from pieces_of(run, k, v, self.shape)

    def crop(self, length: int) -> None:
        crop = self.store.prepare_crop(length)
        self.store.commit_crop(crop)
        self._memory.free(crop.free)

    def stored_pieces(self, span: Span) -> list[Piece]:
        """The tokens of `span`, which stay unchanged until something other than `append`."""
        self._memory.check(self.heads, span)
        found: list[Piece] = []
        for run in self.store.runs(span):
            _, k, v = self._memory.segments[run.key]
            found += pieces_of(run, k, v, self.shape)
        return found

    def unfinished(self, span: Span) -> Piece:
        """A copy of the tokens of `span`, the youngest."""
        pieces = self.stored_pieces(span)
        k = torch.cat([piece.k for piece in pieces], dim=2)
        v = torch.cat([piece.v for piece in pieces], dim=2)
        return Piece(span.start, k, v)

    def restore(self, saved: SavedLayer) -> tuple[Tensor, Tensor] | None:
        """Saved tokens are stored again; what k, v [h, b, t, d] are left to be filled, if any."""
        segment = self.store.restore(
            saved.tokens, batch=saved.batch, cuts=saved.cuts, room=saved.room
        )
        try:
            mapped = self._memory.restore(segment, saved.adopt)
        except BaseException:
            self.store.clear()
            raise
        if mapped:
            self._memory.guard = saved.guard
            return None
        _, k, v = self._memory.segments[segment.key]
        return k[:, :, : saved.tokens], v[:, :, : saved.tokens]

    def put(self, stored: Tensor, found: Tensor) -> None:
        """What `restore` returned, or a part of it, is `found`; from any thread."""
        stored.copy_(found)

    def reorder(self, index: Sequence[int]) -> None:
        self._memory.check(self.heads, EVERYTHING)
        self.store.reorder(index)
        for segment in list(self.store.segments):
            same_batch = segment.row_map is not None and segment.rows == len(segment.row_map)
            if not same_batch or segment.filled > PERMUTE_TOKENS:
                continue
            _, k, v = self._memory.segments[segment.key]
            rows = torch.tensor(segment.row_map, device=k.device)
            there = slice(segment.offset, segment.offset + segment.filled)
            for stored in (k, v):
                stored[:, :, there] = stored[:, :, there].index_select(1, rows)
            self.store.rewritten(segment)

    def clear(self) -> None:
        self._memory.free(self.store.clear())

    def clone(self, tier: Tier, engine: TransferEngine, codec: Codec | None = None) -> DirectHeads:
        """An independent copy in `tier`; nothing is under way or packed, so no more is needed."""
        twin = DirectHeads(tier, self.shape, self.heads, expected_tokens=None)
        twin.store = copy.deepcopy(self.store)
        self._memory.clone_into(twin._memory)
        return twin
