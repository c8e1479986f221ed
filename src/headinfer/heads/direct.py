# SPDX-License-Identifier: Apache-2.0
"""Heads attended where they lie."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headinfer.errors import TierFull
from headinfer.heads.memory import KVShape, Piece, SegmentMemory
from headinfer.layout import BLOCK_TOKENS, HeadGroup, Span
from headinfer.store import SpanStore
from headinfer.tiers import Tier

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

    def pieces(self, length: int) -> Iterator[Piece]:
        """Everything in [0, length), in place; only reordered rows are gathered."""
        for run in self.store.runs(Span(0, length)):
            _, k, v = self._memory.segments[run.key]
            there = slice(run.offset, run.offset + run.span.tokens)
            rows_k, rows_v = k[:, :, there], v[:, :, there]
            if run.row_map is not None:
                rows = torch.tensor(run.row_map, device=k.device)
                rows_k, rows_v = rows_k.index_select(1, rows), rows_v.index_select(1, rows)
            yield Piece(run.span.start, rows_k.transpose(0, 1), rows_v.transpose(0, 1))

    def crop(self, length: int) -> None:
        crop = self.store.prepare_crop(length)
        self.store.commit_crop(crop)
        self._memory.free(crop.free)

    def reorder(self, index: Sequence[int]) -> None:
        self.store.reorder(index)
        for segment in self.store.segments:
            if segment.row_map is None or segment.filled > PERMUTE_TOKENS:
                continue
            held = extent, k, v = self._memory.segments.pop(segment.key)
            rows = torch.tensor(segment.row_map, device=k.device)
            try:
                self._memory.allocate(segment.key, len(segment.row_map), segment.capacity)
            except TierFull:  # no room to rewrite it: its rows stay mapped
                self._memory.segments[segment.key] = held
                continue
            _, new_k, new_v = self._memory.segments[segment.key]
            new_k[:, :, : segment.filled] = k[:, :, : segment.filled].index_select(1, rows)
            new_v[:, :, : segment.filled] = v[:, :, : segment.filled].index_select(1, rows)
            self._memory.tier.free(extent)
            self.store.replaced(segment.key, rows=len(segment.row_map))

    def clear(self) -> None:
        self._memory.free(self.store.clear())

    def clone(self, tier: Tier) -> DirectHeads:
        twin = DirectHeads(tier, self.shape, self.heads, expected_tokens=None)
        twin.store = copy.deepcopy(self.store)
        self._memory.clone_into(twin._memory)
        return twin
