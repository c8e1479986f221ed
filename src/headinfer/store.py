# SPDX-License-Identifier: Apache-2.0
"""Who holds which tokens of one head range of one layer: segments, the tail, row maps.

Bookkeeping only: it hands out what to copy where and is told when that is done (prepare, then
commit), and holds no bytes. Tokens `[0, stored)` lie in segments, `[stored, length)` in the tail;
`stored` grows in whole blocks. A batch reordering (beam search) does not copy a segment: it
changes the segment's map from batch rows to the rows as written, and closes it for appending;
what room it has left becomes a segment of its own in the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from headinfer.errors import CacheStateError
from headinfer.layout import BLOCK_TOKENS, Span


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens in one extent per head range.

    Attributes:
        key: names the memory, shared with segments split off it; never reused within a store.
        offset: first token's place in that memory.
        start: first token.
        capacity: tokens there is room for.
        filled: tokens written (or being written).
        rows: batch rows as written.
        row_map: for each batch row of today, the row as written; None is the identity.
    """

    key: int
    start: int
    capacity: int
    filled: int
    rows: int
    row_map: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.filled


class Write(NamedTuple):
    """Copy `tokens` tokens, beginning `source` tokens after the first not stored one, into
    segment `key` at token offset `offset`."""

    key: int
    offset: int
    source: int
    tokens: int


class Run(NamedTuple):
    """Tokens `span` of the sequence lie in segment `key` from token offset `offset` on."""

    key: int
    offset: int
    span: Span
    row_map: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Append:
    """What appending needs: segments to allocate, tokens to write, the tail it leaves."""

    new_segments: tuple[Segment, ...]
    writes: tuple[Write, ...]
    tokens: int
    tail_before: int
    tail_after: int
    _segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class Crop:
    """What shortening needs: stored tokens that go back to the tail, segments to free."""

    length: int
    reload: Span
    free: tuple[int, ...]
    _segments: tuple[Segment, ...] = ()


@dataclass(slots=True)
class SpanStore:
    """The ledger of one head range of one layer.

    A reservation is opened in segments that double, so that memory for later tokens can be made
    ready while earlier ones are computed; stored token by token it is one segment, because such
    heads are attended segment by segment.

    Attributes:
        block_tokens: tokens stored together; 1 stores every token at once and keeps no tail.
        whole: segments are attended one by one, so there are few, as with `block_tokens` 1.
        grow_tokens: least capacity of a segment, unless a reservation or the memory ends before.
    """

    block_tokens: int = BLOCK_TOKENS
    whole: bool = False
    grow_tokens: int = 8 * BLOCK_TOKENS
    length: int = 0
    stored: int = 0
    batch: int = 0
    epoch: int = 0
    reserved: int = 0
    segments: list[Segment] = field(default_factory=list)
    _next_key: int = 0
    _reordered: bool = False

    @property
    def tail(self) -> int:
        """Tokens in the tail."""
        return self.length - self.stored

    def reserve(self, total_tokens: int) -> None:
        """The sequence is expected to reach `total_tokens`: open segments at exactly that size."""
        self.reserved = max(self.reserved, total_tokens // self.block_tokens * self.block_tokens)

    def prepare_append(self, tokens: int, *, batch: int, spare: bool = True) -> Append:
        """What to allocate and copy for `tokens` more tokens; changes nothing.

        Args:
            tokens: how many.
            batch: sequences.
            spare: open segments with room for later tokens; False asks for what is needed alone.

        Raises:
            CacheStateError: the batch size differs from what is held.
        """
        if self.length and batch != self.batch:
            raise CacheStateError(
                f"the cache holds {self.batch} sequences and the update brings {batch}; use a new "
                "cache, or reorder, repeat or select its rows first"
            )
        length = self.length + tokens
        target = length // self.block_tokens * self.block_tokens
        segments = list(self.segments)
        new: list[Segment] = []
        writes: list[Write] = []
        position = self.stored
        while position < target:
            last = segments[-1] if segments else None
            if last is None or not self._open(last, batch):
                last = Segment(
                    key=self._next_key + len(new),
                    start=position,
                    capacity=self._capacity(position, target - position, spare=spare),
                    filled=0,
                    rows=batch,
                )
                segments.append(last)
                new.append(last)
            count = min(target - position, last.capacity - last.filled)
            place = last.offset + last.filled
            writes.append(Write(last.key, place, position - self.stored, count))
            segments[-1] = replace(last, filled=last.filled + count)
            position += count
        return Append(
            new_segments=tuple(new),
            writes=tuple(writes),
            tokens=tokens,
            tail_before=self.tail,
            tail_after=length - target,
            _segments=tuple(segments),
        )

    def commit_append(self, append: Append, *, batch: int) -> None:
        """The memory exists and the copies are under way."""
        self.segments = list(append._segments)
        self._next_key += len(append.new_segments)
        self.length += append.tokens
        self.batch = batch
        # Stored tokens never change in place, so tiles staged before stay good: no new epoch.
        self.stored = self.length - append.tail_after

    def has_room(self, tokens: int, *, batch: int) -> bool:
        """Whether `extend` takes as many, and all tokens then lie in a row from the first place of one
        memory on."""
        if len(self.segments) != 1 or self.tail:
            return False
        only = self.segments[0]
        fits = only.filled + tokens <= only.capacity and self._open(only, batch)
        return fits and not only.offset

    def extend(self, tokens: int) -> None:
        """Append `tokens` tokens there is room for, which somebody else has written or will."""
        last = self.segments[-1]
        # By hand, as every layer of every recorded step comes here: `replace` takes four times as long.
        self.segments[-1] = Segment(
            last.key,
            last.start,
            last.capacity,
            last.filled + tokens,
            last.rows,
            last.row_map,
            last.offset,
        )
        self.length += tokens
        self.stored = self.length

    def restore(
        self, tokens: int, *, batch: int, cuts: Sequence[int] = (0,), room: int = 0
    ) -> Segment:
        """`tokens` tokens, whole blocks, come back into an empty ledger, in one memory that the
        segment returned names; attended in runs that begin at `cuts`, the last with room up to
        token `room`, as they were before."""
        append = self.prepare_append(tokens, batch=batch)
        self.commit_append(append, batch=batch)
        whole = self.segments[0]
        if not self.reserved:
            whole = self.segments[0] = replace(whole, capacity=max(whole.capacity, room))
        starts = [0, *(cut for cut in sorted(set(cuts)) if 0 < cut < tokens)]
        stops = [*starts[1:], whole.start + whole.capacity]
        if self.block_tokens == 1:
            self.segments = [
                replace(
                    whole,
                    start=start,
                    offset=start,
                    capacity=stop - start,
                    filled=min(stop, tokens) - start,
                )
                for start, stop in zip(starts, stops, strict=True)
            ]
        return whole

    def prepare_crop(self, length: int) -> Crop:
        """What to do to keep only `[0, length)`; changes nothing.

        Raises:
            CacheStateError: `length` is negative or more than is held.
        """
        if not 0 <= length <= self.length:
            raise CacheStateError(
                f"cannot crop to {length} tokens: the cache holds {self.length}; "
                f"give 0..{self.length}"
            )
        if length >= self.stored:
            return Crop(length, Span(length, length), (), tuple(self.segments))
        stored = length // self.block_tokens * self.block_tokens
        kept: list[Segment] = []
        for segment in self.segments:
            if segment.start < stored:
                kept.append(replace(segment, filled=min(segment.filled, stored - segment.start)))
        held = {segment.key for segment in kept}
        free = dict.fromkeys(s.key for s in self.segments if s.key not in held)
        return Crop(length, Span(stored, length), tuple(free), tuple(kept))

    def commit_crop(self, crop: Crop) -> None:
        """The reload has been copied out; forget the rest."""
        self.length = crop.length
        self.segments = list(crop._segments)
        stored = min(self.stored, crop.reload.start)
        if stored != self.stored:
            self.stored = stored
            self.epoch += 1

    def reorder(self, index: Sequence[int]) -> None:
        """Batch row i is from now on what row `index[i]` was; also repeats and selects.

        Raises:
            CacheStateError: an index outside the batch.
        """
        if self.length and any(not 0 <= row < self.batch for row in index):
            raise CacheStateError(f"row index {list(index)} outside a batch of {self.batch}")
        if tuple(index) == tuple(range(self.batch)):
            return
        self.segments = [part for segment in self.segments for part in _mapped(segment, index)]
        self.batch = len(index)
        self.epoch += 1
        self._reordered = True

    def rewritten(self, segment: Segment) -> None:
        """`segment`'s rows were rewritten in today's order: it is open again, with the room that
        was split off it."""
        place = self.segments.index(segment)
        rest = self.segments[place + 1 : place + 2]
        room = segment.filled
        if rest and rest[0].key == segment.key and not rest[0].filled:
            room += self.segments.pop(place + 1).capacity
        self.segments[place] = replace(segment, row_map=None, capacity=room)
        self.epoch += 1

    def clear(self) -> tuple[int, ...]:
        """Forget everything; returns the keys of the segments to free."""
        keys = tuple(dict.fromkeys(segment.key for segment in self.segments))
        self.segments, self.length, self.stored, self.batch = [], 0, 0, 0
        self.epoch += 1
        self._reordered = False
        return keys

    def runs(self, span: Span) -> list[Run]:
        """Where the stored tokens of `span` lie, in order.

        Raises:
            CacheStateError: part of `span` is not stored.
        """
        found: list[Run] = []
        missing = span.stop - span.start
        for segment in self.segments:
            start, stop = max(segment.start, span.start), min(segment.stop, span.stop)
            if start < stop:
                offset = segment.offset + start - segment.start
                found.append(Run(segment.key, offset, Span(start, stop), segment.row_map))
                missing -= stop - start
        if missing:
            raise CacheStateError(f"tokens {span} are not all stored; {self.stored} are")
        return found

    @property
    def foreseen(self) -> int:
        """Capacity of the segment that will be opened when the last one is full; 0 if that cannot
        be said."""
        if self.block_tokens == 1 or self._reordered or not self.segments:
            return 0
        last = self.segments[-1]
        stop = last.start + last.capacity
        if self.reserved > stop:
            return self._foreseen(stop, 0)
        # Without a reservation the next prefill chunk brings as much as this one did.
        return last.capacity if not self.reserved else 0

    def _foreseen(self, start: int, needed: int) -> int:
        return min(self.reserved - start, max(start, needed, self.grow_tokens))

    def _open(self, segment: Segment, batch: int) -> bool:
        return (
            segment.filled < segment.capacity and segment.row_map is None and segment.rows == batch
        )

    def _capacity(self, start: int, needed: int, *, spare: bool) -> int:
        if not spare:
            return needed
        if self.reserved - start >= needed and not self._reordered:
            whole = self.whole or self.block_tokens == 1
            return self.reserved - start if whole else self._foreseen(start, needed)
        if self.block_tokens == 1 and not self._reordered:
            # Attended segment by segment: few of them, each half of what there was before.
            return max(needed, self.grow_tokens, start // 2)
        if self.whole and not self._reordered:
            grown = start // 2 // self.block_tokens * self.block_tokens
            return max(needed, self.grow_tokens, grown)
        if self.block_tokens > 1 and self._reordered:
            return needed
        # A large append is a prefill chunk, and the next one opens its own segment.
        return max(needed, self.grow_tokens)


def _mapped(segment: Segment, index: Sequence[int]) -> tuple[Segment, ...]:
    """`segment` seen through `index`, and the room it had left."""
    if not segment.filled:
        return (segment,)
    closed = replace(segment, row_map=_compose(segment.row_map, index), capacity=segment.filled)
    room = segment.capacity - segment.filled
    if not room or segment.row_map is not None or segment.rows != len(index):
        return (closed,)
    rest = Segment(
        key=segment.key,
        start=segment.stop,
        capacity=room,
        filled=0,
        rows=segment.rows,
        offset=segment.offset + segment.filled,
    )
    return closed, rest


def _compose(row_map: tuple[int, ...] | None, index: Sequence[int]) -> tuple[int, ...]:
    return tuple(index) if row_map is None else tuple(row_map[row] for row in index)
