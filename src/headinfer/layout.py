# SPDX-License-Identifier: Apache-2.0
"""Which tokens of which heads travel together, and where a region lies inside an arena.

Storage is head-major: per layer and KV head, keys and values are contiguous `[token, dim]` runs,
so a tile (head group x token span) is a handful of large copies. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from headinfer.errors import BudgetTooSmall

BLOCK_TOKENS = 128
"""Tokens written back together; younger ones wait in the layer's tail on the compute device."""

ALIGNMENT = 256
"""Byte alignment of extents: what vector loads and copy engines like best."""


class Span(NamedTuple):
    """Consecutive tokens `[start, stop)` of a sequence."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    def clip(self, other: Span) -> Span:
        """The common part; empty (start == stop) when there is none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))


class HeadGroup(NamedTuple):
    """Consecutive KV heads `[start, stop)` of one layer, handled as one unit."""

    start: int
    stop: int

    @property
    def heads(self) -> int:
        return self.stop - self.start


class Tile(NamedTuple):
    """The unit that streams: a head group over a span of one layer.

    `epoch` is the store's count of changes to what is stored there, so that a tile staged before
    such a change never passes for the one staged after.
    """

    layer: int
    group: HeadGroup
    span: Span
    epoch: int


class Extent(NamedTuple):
    """A region of one tier: `nbytes` at `offset` of arena number `arena`."""

    arena: int
    offset: int
    nbytes: int


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the extent alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def span_tokens(slot_bytes: int, token_bytes: int, *, block_tokens: int = BLOCK_TOKENS) -> int:
    """Tokens of one head that fit a staging slot, in whole blocks where one fits.

    Args:
        slot_bytes: size of a slot.
        token_bytes: bytes of one token of one head, keys and values, all batch rows.
        block_tokens: write-back block.

    Raises:
        BudgetTooSmall: not even one token fits; names the smallest slot that works.
    """
    tokens = slot_bytes // token_bytes
    if tokens < 1:
        raise BudgetTooSmall(
            f"a staging slot of {slot_bytes} B cannot hold one token of {token_bytes} B (keys and "
            f"values of one head, all batch rows); set tile_bytes to {token_bytes} or more",
            tier="gpu",
            budget_bytes=slot_bytes,
            needed_bytes=token_bytes,
        )
    return tokens if tokens < block_tokens else tokens // block_tokens * block_tokens


def tiles(
    layer: int,
    heads: HeadGroup,
    length: int,
    *,
    slot_bytes: int,
    token_bytes: int,
    epoch: int = 0,
    block_tokens: int = BLOCK_TOKENS,
) -> Iterator[Tile]:
    """Cut `heads` over the tokens `[0, length)` into tiles that fit a staging slot.

    While one head's whole length fits, as many heads as fit share a tile (few, large transfers on
    short contexts); beyond, a tile is one head over a span, spans of one head in order. That is
    adaptive head grouping, and why staging memory does not depend on the context.
    """
    if length <= 0 or heads.heads == 0:
        return
    per_head = span_tokens(slot_bytes, token_bytes, block_tokens=block_tokens)
    if length <= per_head:
        together = min(slot_bytes // (token_bytes * length), heads.heads)
        # Groups of equal size keep the kernels' shapes equal too.
        count = -(-heads.heads // together)
        together = -(-heads.heads // count)
        for start in range(heads.start, heads.stop, together):
            group = HeadGroup(start, min(start + together, heads.stop))
            yield Tile(layer, group, Span(0, length), epoch)
        return
    for head in range(heads.start, heads.stop):
        for start in range(0, length, per_head):
            span = Span(start, min(start + per_head, length))
            yield Tile(layer, HeadGroup(head, head + 1), span, epoch)
