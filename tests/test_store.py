# SPDX-License-Identifier: Apache-2.0
"""The ledger against a plain list of tokens: random appends, crops and reorderings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headinfer.errors import CacheStateError
from headinfer.layout import Span
from headinfer.store import SpanStore


class Ledger(RuleBasedStateMachine):
    """`rows[r]` is the model: the tokens of batch row r, each a unique number."""

    block = 8

    def __init__(self):
        super().__init__()
        self.store = SpanStore(block_tokens=self.block, grow_tokens=2 * self.block)
        self.rows = [[]]
        self.memory = {}  # segment key -> written rows -> token per offset
        self.tail = [[]]
        self.count = 0

    @rule(tokens=st.integers(1, 30))
    def append(self, tokens):
        batch = len(self.rows)
        new = [[self.count + row * tokens + i for i in range(tokens)] for row in range(batch)]
        self.count += batch * tokens
        append = self.store.prepare_append(tokens, batch=batch)
        pending = [tail + fresh for tail, fresh in zip(self.tail, new, strict=True)]
        for segment in append.new_segments:
            assert segment.key not in self.memory, "a key was reused"
            self.memory[segment.key] = [[None] * segment.capacity for _ in range(segment.rows)]
        for write in append.writes:
            for row in range(batch):
                for i in range(write.tokens):
                    place = self.memory[write.key][row]
                    assert place[write.offset + i] is None, "two owners of a place"
                    place[write.offset + i] = pending[row][write.source + i]
        written = sum(write.tokens for write in append.writes)
        self.store.commit_append(append, batch=batch)
        self.tail = [row[written:] for row in pending]
        self.rows = [row + fresh for row, fresh in zip(self.rows, new, strict=True)]
        assert len(self.tail[0]) == append.tail_after

    @precondition(lambda self: self.rows[0])
    @rule(data=st.data())
    def crop(self, data):
        length = data.draw(st.integers(0, len(self.rows[0])))
        crop = self.store.prepare_crop(length)
        reload = [self.read(crop.reload, row) for row in range(len(self.rows))]
        kept_tail = [tail[: length - self.store.stored] for tail in self.tail]
        if length < self.store.stored:
            kept_tail = reload
        self.store.commit_crop(crop)
        for key in crop.free:
            del self.memory[key]
        for segment in self.store.segments:
            for row in self.memory[segment.key]:
                first = segment.offset + segment.filled
                last = segment.offset + segment.capacity
                row[first:last] = [None] * (last - first)
        self.tail, self.rows = kept_tail, [row[:length] for row in self.rows]

    @precondition(lambda self: self.rows[0])
    @rule(data=st.data())
    def reorder(self, data):
        rows = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.store.reorder(rows)
        self.rows = [list(self.rows[row]) for row in rows]
        self.tail = [list(self.tail[row]) for row in rows]

    @rule()
    def clear(self):
        for key in self.store.clear():
            del self.memory[key]
        self.rows, self.tail = [[]], [[]]

    @rule(tokens=st.integers(0, 200))
    def reserve(self, tokens):
        self.store.reserve(tokens)

    def read(self, span, row):
        found = []
        for run in self.store.runs(span):
            written = row if run.row_map is None else run.row_map[row]
            found += self.memory[run.key][written][run.offset : run.offset + run.span.tokens]
        return found

    @invariant()
    def holds_exactly_the_model(self):
        assert self.store.length == len(self.rows[0])
        assert self.store.stored % self.block == 0
        assert 0 <= self.store.tail < self.block or self.store.tail == len(self.tail[0])
        for row, tokens in enumerate(self.rows):
            if self.store.length:
                stored = self.read(Span(0, self.store.stored), row)
                assert stored + self.tail[row] == tokens
        assert {segment.key for segment in self.store.segments} == set(self.memory)


class DirectLedger(Ledger):
    """Without blocks: every token is stored at once and there is no tail."""

    block = 1


Ledger.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
DirectLedger.TestCase.settings = Ledger.TestCase.settings
TestLedger = Ledger.TestCase
TestDirectLedger = DirectLedger.TestCase


def filled(tokens=20, batch=2):
    store = SpanStore(block_tokens=8, grow_tokens=16)
    store.commit_append(store.prepare_append(tokens, batch=batch), batch=batch)
    return store


def test_a_reservation_of_single_tokens_opens_one_segment_of_exactly_that_size():
    store = SpanStore(block_tokens=1)
    store.reserve(100)
    append = store.prepare_append(30, batch=1)
    assert [segment.capacity for segment in append.new_segments] == [100]


@given(
    reserved=st.integers(0, 5000),
    chunks=st.lists(st.integers(1, 900), min_size=1, max_size=30),
)
def test_a_reservation_is_used_exactly_in_few_segments_each_foreseen(reserved, chunks):
    store = SpanStore(block_tokens=8, grow_tokens=64)
    store.reserve(reserved)
    foreseen = 0
    for tokens in chunks:
        append = store.prepare_append(tokens, batch=1)
        if foreseen and append.new_segments and store.length + tokens <= reserved:
            needed = append.new_segments[0]
            assert (
                needed.capacity >= foreseen
            )  # more only if one append brings more than all before
        store.commit_append(append, batch=1)
        foreseen = store.foreseen
    within = [segment for segment in store.segments if segment.stop <= store.reserved]
    if store.stored and store.stored <= store.reserved:
        capacity = sum(segment.capacity for segment in store.segments)
        assert capacity <= store.reserved
        assert capacity + (store.foreseen or 0) <= store.reserved
    assert len(within) <= 8  # 64 tokens doubled


def test_without_a_reservation_the_next_chunk_is_foreseen_like_this_one():
    store = SpanStore(block_tokens=8, grow_tokens=16)
    assert store.foreseen == 0
    store.commit_append(store.prepare_append(80, batch=1), batch=1)
    assert store.foreseen == 80
    store.reorder([0, 0])
    assert store.foreseen == 0


def test_preparing_changes_nothing():
    store = filled()
    before = (store.length, store.stored, list(store.segments), store.epoch)
    store.prepare_append(50, batch=2)
    store.prepare_crop(3)
    assert (store.length, store.stored, list(store.segments), store.epoch) == before


def test_stored_tokens_survive_appends_so_staged_tiles_stay_good():
    store = filled()
    epoch = store.epoch
    store.commit_append(store.prepare_append(64, batch=2), batch=2)
    assert store.epoch == epoch
    store.commit_crop(store.prepare_crop(4))
    assert store.epoch > epoch


def test_wrong_use_is_refused_with_numbers():
    store = filled()
    with pytest.raises(CacheStateError, match="holds 2 sequences and the update brings 3"):
        store.prepare_append(1, batch=3)
    with pytest.raises(CacheStateError, match=r"cannot crop to 21 tokens: the cache holds 20"):
        store.prepare_crop(21)
    with pytest.raises(CacheStateError, match="outside a batch of 2"):
        store.reorder([0, 2])
    with pytest.raises(CacheStateError, match="not all stored; 16 are"):
        store.runs(Span(0, 17))
