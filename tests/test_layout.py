# SPDX-License-Identifier: Apache-2.0
"""Tiles cover every token of every head once and fit their slot, at any size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.errors import BudgetTooSmall
from headinfer.layout import BLOCK_TOKENS, HeadGroup, Span, aligned, span_tokens, tiles


@given(
    heads=st.integers(0, 12),
    first=st.integers(0, 3),
    length=st.integers(0, 3000),
    token_bytes=st.integers(1, 600),
    slot_bytes=st.integers(600, 300_000),
)
def test_tiles_partition_heads_and_tokens_and_fit(heads, first, length, token_bytes, slot_bytes):
    cut = list(
        tiles(
            7,
            HeadGroup(first, first + heads),
            length,
            slot_bytes=slot_bytes,
            token_bytes=token_bytes,
            epoch=3,
        )
    )
    seen = set()
    for tile in cut:
        assert tile.layer == 7
        assert tile.epoch == 3
        assert tile.group.heads * tile.span.tokens * token_bytes <= slot_bytes
        for head in range(*tile.group):
            for block in range(tile.span.start, tile.span.stop):
                assert (head, block) not in seen
                seen.add((head, block))
    assert len(seen) == heads * length
    order = [(tile.group.start, tile.span.start) for tile in cut]
    assert order == sorted(order)


@given(length=st.integers(1, 100_000), token_bytes=st.integers(1, 2048))
def test_short_contexts_share_tiles_and_long_ones_are_cut_by_head(length, token_bytes):
    slot = 2**20
    cut = list(tiles(0, HeadGroup(0, 8), length, slot_bytes=slot, token_bytes=token_bytes))
    if 8 * length * token_bytes <= slot:
        assert len(cut) == 1
    if length > slot // token_bytes:
        assert all(tile.group.heads == 1 for tile in cut)
        inner = [tile for tile in cut if tile.span.stop < length]
        assert all(tile.span.tokens % BLOCK_TOKENS == 0 for tile in inner)


def test_a_slot_that_holds_no_token_is_refused():
    with pytest.raises(BudgetTooSmall, match=r"cannot hold one token of 513 B.*tile_bytes to 513"):
        span_tokens(512, 513)


@given(a=st.integers(0, 50), b=st.integers(0, 50), c=st.integers(0, 50), d=st.integers(0, 50))
def test_clip_is_the_common_part(a, b, c, d):
    one, other = Span(a, a + b), Span(c, c + d)
    common = set(range(*one)) & set(range(*other))
    assert set(range(*one.clip(other))) == common


@given(st.integers(0, 10**12))
def test_alignment_rounds_up_by_less_than_one_unit(nbytes):
    assert aligned(nbytes) % 256 == 0
    assert 0 <= aligned(nbytes) - nbytes < 256
