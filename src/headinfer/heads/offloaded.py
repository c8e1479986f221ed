# SPDX-License-Identifier: Apache-2.0
"""Heads in a tier compute cannot read, and the buffers their new tokens pass through."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from headinfer.errors import CacheStateError
from headinfer.formats import KVFormat
from headinfer.heads.codec import Codec
from headinfer.heads.memory import KVShape, Piece, SavedLayer, SegmentMemory, clip, pieces_of
from headinfer.heads.on_disk import later, read_pieces
from headinfer.layout import BLOCK_TOKENS, HeadGroup, Span, Tile, aligned
from headinfer.store import Append, Crop, Run, SpanStore, Write
from headinfer.tiers import Tier
from headinfer.tiers.arena import bytes_as
from headinfer.transfer import Copy, Lane, Moves, Ticket, TransferEngine

CACHED_VIEWS = 64
"""Slots are few and tiles of a pass have few shapes: their views are made once."""

CACHED_LOADS = 256
"""Lists of copies that a range keeps: what a layer of 8 heads streams of a million tokens, in each
slot of the ring. Too few would be worse than none, as tiles come round in order."""


class WriteBuffers:
    """Two contiguous buffers on the compute device that new blocks pass through on their way
    down: a copy engine moves contiguous runs, and the model's own keys are strided."""

    def __init__(
        self,
        engine: TransferEngine,
        device: torch.device,
        nbytes: int,
        empty: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.nbytes = nbytes
        self._engine = engine
        if empty is None:
            self._buffers = [
                torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)
            ]
        else:  # memory of a kind that the way down likes
            self._buffers = [empty(nbytes), empty(nbytes)]
        self._free_after = [engine.fence(), engine.fence()]
        self._next = 0

    def acquire(self) -> tuple[int, Tensor]:
        """A buffer whose last copy has left, as far as compute enqueued from now on can tell."""
        index = self._next
        self._next = 1 - index
        self._engine.wait(self._free_after[index])
        return index, self._buffers[index]

    def release(self, index: int, after: Ticket) -> None:
        """The buffer is free once `after` is done."""
        self._free_after[index] = after


class OffloadedHeads:
    """Heads in a tier compute cannot read; new tokens wait in the tail until a block is full.

    Attributes:
        near_heads: of these heads, the first that are attended in the tier and not brought to the
            compute device, in passes of few tokens.
        recent: what the running layer's attention reads besides stored tokens, set by `append`
            until `forget_recent`: the tail and the fresh keys are then about to be overwritten
            or released.
        last_write: ticket of the youngest copy down; loads of this range come after it.
    """

    def __init__(
        self,
        tier: Tier,
        shape: KVShape,
        heads: HeadGroup,
        *,
        engine: TransferEngine,
        device: torch.device,
        fmt: KVFormat,
        expected_tokens: int | None,
        layer: int = -1,
    ) -> None:
        self.heads = heads
        self.shape = shape
        self.store = SpanStore()
        if expected_tokens is not None:
            self.store.reserve(expected_tokens)
        self.near_heads = 0
        self.recent: list[Piece] | None = None
        self.written_bytes = 0
        self._memory = SegmentMemory(tier, shape, heads, layer)
        self._engine = engine
        self._device = device
        self._format = fmt
        self._tail: tuple[Tensor, Tensor] | None = None
        self._view_cache: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._load_cache: dict[tuple[Tile, int], Moves] = {}
        self.last_write: Ticket = engine.fence()
        self._tail_free_after: Ticket = self.last_write

    @property
    def engine(self) -> TransferEngine:
        """Moves the bytes of this range; its tickets are `last_write`."""
        return self._engine

    @property
    def stored_bytes(self) -> int:
        return self._memory.nbytes

    @property
    def tail_bytes(self) -> int:
        return 0 if self._tail is None else sum(t.numel() * t.element_size() for t in self._tail)

    def append(self, k: Tensor, v: Tensor, buffers: WriteBuffers) -> None:
        """Take k, v [b, h of the range, t, d]; start writing whole blocks back.

        k and v must stay unchanged until `forget_recent`.
        """
        batch, tokens = k.shape[0], k.shape[2]
        append = self.store.prepare_append(tokens, batch=batch)
        self._memory.allocate_all(append.new_segments)
        try:
            self._take(append, k, v, buffers)
        except BaseException:  # what was begun goes to room that nothing refers to any more
            self.recent = None
            self._engine.drain()
            self._memory.free([segment.key for segment in append.new_segments])
            raise
        self.store.commit_append(append, batch=batch)
        if append.new_segments and tokens > 1:
            self._memory.prepare(batch, self.store.foreseen)

    def _take(self, append: Append, k: Tensor, v: Tensor, buffers: WriteBuffers) -> None:
        """Tail and tier get the new tokens; the ledger does not know of them yet."""
        batch, tokens = k.shape[0], k.shape[2]
        start, stored = self.store.length, self.store.stored
        tail_k, tail_v = self._tail_buffers(batch)
        before, after = append.tail_before, append.tail_after
        self._engine.wait(self._tail_free_after)
        if before + tokens <= BLOCK_TOKENS:
            tail_k[:, :, before : before + tokens].copy_(k.transpose(0, 1))
            tail_v[:, :, before : before + tokens].copy_(v.transpose(0, 1))
            self.recent = [_tail_piece(stored, tail_k, tail_v, before + tokens)]
            if append.writes:
                self._write_tail(append.writes, tail_k, tail_v, buffers)
        else:
            self.recent = [Piece(start, k, v)]
            old = _tail_piece(stored, tail_k, tail_v, before)
            if before:  # the leftover of k, v overwrites the tail before attention reads it
                old = Piece(stored, old.k.clone(), old.v.clone())
                self.recent.insert(0, old)
            self._write_blocks(append.writes, old, Piece(start, k, v), buffers)
            if after:
                tail_k[:, :, :after].copy_(k[:, :, tokens - after :].transpose(0, 1))
                tail_v[:, :, :after].copy_(v[:, :, tokens - after :].transpose(0, 1))

    def forget_recent(self) -> None:
        """The layer's attention has been enqueued; later readers use stored tokens and tail."""
        self.recent = None

    def recent_pieces(self, length: int) -> list[Piece]:
        """What [0, length) has beyond the stored prefix, in order."""
        pieces = self.recent
        if pieces is None:
            if self._tail is None or not self.store.tail:
                return []
            pieces = [_tail_piece(self.store.stored, *self._tail, self.store.tail)]
        return [clip(piece, length) for piece in pieces if piece.start < length]

    def prefix(self, length: int) -> int:
        """Stored tokens that attention over [0, length) reads from the tier."""
        start = self.recent[0].start if self.recent else self.store.stored
        return min(start, length)

    def lies_in_order(self, length: int) -> bool:
        """Whether the stored part of [0, length) has its batch rows in today's order."""
        return all(run.row_map is None for run in self.store.runs(Span(0, length)))

    def lies_in_memory(self, length: int) -> bool:
        """Whether the stored part of [0, length) is in memory that may be read at any time until
        something other than `append`: nothing of it is on disk, from where it would come piece by
        piece through memory that is given up again."""
        segments = self._memory.segments
        return not any(segments[run.key][1].is_meta for run in self.store.runs(Span(0, length)))

    def in_place(self, group: HeadGroup, length: int) -> Iterator[Piece]:
        """The stored part of [0, length) of `group` as it lies in the tier, for a processor that
        reads it there; what is on disk, as it arrives. `last_write` has to be done."""
        self._memory.check(group, Span(0, length))
        first = group.start - self.heads.start
        for run in self.store.runs(Span(0, length)):
            _, k, v = self._memory.segments[run.key]
            k, v = k[first : first + group.heads], v[first : first + group.heads]
            if k.is_meta:
                yield from read_pieces(self._memory.disk, run, k, v, self.shape)
            else:
                yield from pieces_of(run, k, v, self.shape)

    def load_again(self, tile: Tile, slot: Tensor) -> Moves:
        """As `load`, for a slot of the ring: every token of a decode asks for the same tiles, and
        slicing memory takes longer than enqueueing a copy. The list is not to be changed."""
        place = tile, slot.data_ptr()
        found = self._load_cache.get(place)
        if found is None:
            if len(self._load_cache) >= CACHED_LOADS:
                self._load_cache.clear()
            found = self._load_cache[place] = Moves(self.load(tile, slot))
        return found

    def load(self, tile: Tile, slot: Tensor) -> list[Copy]:
        """The copies that bring `tile` into a slot's bytes, laid out as `unpack` expects."""
        self._memory.check(tile.group, tile.span)
        k, v = self._slot_views(tile, slot)
        copies: list[Copy] = []
        for run in self.store.runs(tile.span):
            _, stored_k, stored_v = self._memory.segments[run.key]
            at = run.span.start - tile.span.start
            copies += self._run_copies(tile.group, run, at, stored_k, k)
            copies += self._run_copies(tile.group, run, at, stored_v, v)
        return copies

    def unpack(self, tile: Tile, slot: Tensor) -> Piece:
        """The tile's keys and values as compute reads them from a slot."""
        k, v = self._slot_views(tile, slot)
        decode = self._format.decode
        return Piece(tile.span.start, decode(k).transpose(0, 1), decode(v).transpose(0, 1))

    def stored_pieces(self, span: Span) -> list[Piece]:
        """The tokens of `span`, all stored, as they lie in the tier and stay until something other
        than `append`. `last_write` has to be done."""
        self._memory.check(self.heads, span)
        found: list[Piece] = []
        for run in self.store.runs(span):
            _, k, v = self._memory.segments[run.key]
            if k.is_meta:
                found.append(later(self._memory.disk, run, k, v))
            else:
                found += pieces_of(run, k, v, self.shape)
        return found

    def unfinished(self, span: Span) -> Piece:
        """A copy of the tokens of `span`, which is what the tail holds."""
        if self._tail is None or span != Span(self.store.stored, self.store.length):
            raise CacheStateError(f"tokens {span} are not what the tail holds")
        piece = _tail_piece(span.start, *self._tail, span.tokens)
        return Piece(span.start, piece.k.clone(), piece.v.clone())

    def restore(self, saved: SavedLayer) -> tuple[Tensor, Tensor] | None:
        """Saved tokens are stored again; what k, v [h, b, t, d] are left to be filled, if any."""
        segment = self.store.restore(saved.tokens, batch=saved.batch)
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
        """What `restore` returned, or a part [b, t, d] of it, is `found`; from any thread."""
        if not stored.is_meta:
            stored.copy_(found)
            return
        for row in range(stored.shape[0] if stored.numel() else 0):
            self._memory.disk.store(stored[row], found[row].contiguous())

    def pieces(self, length: int) -> Iterator[Piece]:
        """Everything in [0, length) copied to the compute device, for readers without a ring."""
        prefix = self.prefix(length)
        if prefix:
            nbytes = self.heads.heads * self.shape.token_bytes(self.store.batch) * prefix
            slot = torch.empty(nbytes + aligned(1), dtype=torch.uint8, device=self._device)
            tile = Tile(-1, self.heads, Span(0, prefix), self.store.epoch)
            copies = self.load(tile, slot)
            after = [self._engine.fence(), self.last_write]
            self._engine.wait(self._engine.submit(copies, lane=Lane.IN, after=after))
            yield self.unpack(tile, slot)
        yield from self.recent_pieces(length)

    def crop(self, length: int) -> None:
        self._crop(self.store.prepare_crop(length))

    def _crop(self, crop: Crop) -> None:
        self.recent = None
        self._load_cache.clear()
        if crop.reload.tokens:
            self._reload_tail(crop.reload)
        if crop.free or crop.reload.start < self.store.stored:
            # A load or write of what goes may still be under way, and its place is written again.
            self._engine.drain()
        self.store.commit_crop(crop)
        self._memory.free(crop.free)

    def reorder(self, index: Sequence[int]) -> None:
        self.store.reorder(index)
        self.recent = None
        self._load_cache.clear()
        if self._tail is not None:
            self._engine.wait(self._tail_free_after)
            rows = torch.tensor(list(index), device=self._device)
            tail_k, tail_v = self._tail
            self._tail = tail_k.index_select(1, rows), tail_v.index_select(1, rows)

    def clear(self) -> None:
        self._engine.drain()
        self.recent = self._tail = None
        self._view_cache.clear()
        self._load_cache.clear()
        self._memory.free(self.store.clear())

    def clone(
        self, tier: Tier, engine: TransferEngine, codec: Codec | None = None
    ) -> OffloadedHeads:
        """An independent copy in `tier`, moved from now on by `engine`, the copy's own."""
        self._engine.drain()
        twin = OffloadedHeads(
            tier,
            self.shape,
            self.heads,
            engine=engine,
            device=self._device,
            fmt=self._format,
            expected_tokens=None,
            layer=self._memory.layer,
        )
        twin.store = copy.deepcopy(self.store)
        if self._tail is not None:
            twin._tail = self._tail[0].clone(), self._tail[1].clone()
        self._memory.clone_into(twin._memory)
        return twin

    def _tail_buffers(self, batch: int) -> tuple[Tensor, Tensor]:
        if self._tail is None or self._tail[0].shape[1] != batch:
            leading, shape = (self.heads.heads, batch, BLOCK_TOKENS), self.shape
            self._tail = (
                torch.zeros((*leading, shape.key_dim), dtype=shape.dtype, device=self._device),
                torch.zeros((*leading, shape.value_dim), dtype=shape.dtype, device=self._device),
            )
        return self._tail

    def _write_tail(
        self, writes: Sequence[Write], tail_k: Tensor, tail_v: Tensor, buffers: WriteBuffers
    ) -> None:
        """The tail is exactly one full block: copy it down from where it is."""
        for write in writes:
            self._submit(write.key, write.offset, tail_k, tail_v, write.source, write.tokens)
        self._tail_free_after = self.last_write

    def _write_blocks(
        self, writes: Sequence[Write], old: Piece, new: Piece, buffers: WriteBuffers
    ) -> None:
        """Blocks made of the old tail and the fresh keys go through the write buffers."""
        per_token = self.heads.heads * self.shape.token_bytes(new.k.shape[0])
        step = max(1, (buffers.nbytes - aligned(1)) // per_token)
        if step > BLOCK_TOKENS:  # a disk writes whole blocks of its own at once
            step = step // BLOCK_TOKENS * BLOCK_TOKENS
        for write in writes:
            for done in range(0, write.tokens, step):
                tokens = min(step, write.tokens - done)
                index, buffer = buffers.acquire()
                k, v = self._views(buffer, self.heads.heads, new.k.shape[0], tokens)
                source = old.start + write.source + done
                for piece in (old, new):
                    self._encode(piece, source, k, v)
                self._submit(write.key, write.offset + done, k, v, 0, tokens)
                buffers.release(index, self.last_write)

    def _encode(self, piece: Piece, start: int, k: Tensor, v: Tensor) -> None:
        """Put what `piece` has of the tokens from `start` on into k, v [h, b, t, d]."""
        wanted = Span(start, start + k.shape[2])
        common = Span(piece.start, piece.start + piece.k.shape[2]).clip(wanted)
        if common.tokens:
            there = slice(common.start - start, common.stop - start)
            here = slice(common.start - piece.start, common.stop - piece.start)
            self._format.encode(piece.k[:, :, here].transpose(0, 1), k[:, :, there])
            self._format.encode(piece.v[:, :, here].transpose(0, 1), v[:, :, there])

    def _submit(
        self, key: int, offset: int, k: Tensor, v: Tensor, source: int, tokens: int
    ) -> None:
        _, stored_k, stored_v = self._memory.segments[key]
        there, here = slice(offset, offset + tokens), slice(source, source + tokens)
        copies = Moves(
            Copy(down[head, row, there], up[head, row, here])
            for down, up in ((stored_k, k), (stored_v, v))
            for head in range(up.shape[0])
            for row in range(up.shape[1])
        )
        self.last_write = self._engine.submit(copies, lane=Lane.OUT, after=[self._engine.fence()])
        self.written_bytes += sum(item.nbytes for item in copies)

    def _run_copies(
        self, group: HeadGroup, run: Run, at: int, stored: Tensor, slot: Tensor
    ) -> list[Copy]:
        first = group.start - self.heads.start
        there = slice(run.offset, run.offset + run.span.tokens)
        here = slice(at, at + run.span.tokens)
        whole, landing = stored[first : first + group.heads, :, there], slot[:, :, here]
        if run.row_map is None and whole.is_contiguous() and landing.is_contiguous():
            return [Copy(landing, whole)]
        rows = range(slot.shape[1]) if run.row_map is None else run.row_map
        return [
            Copy(landing[head, row], whole[head, written])
            for head in range(group.heads)
            for row, written in enumerate(rows)
        ]

    def _slot_views(self, tile: Tile, slot: Tensor) -> tuple[Tensor, Tensor]:
        heads, batch, tokens = tile.group.heads, self.store.batch, tile.span.tokens
        if tile.layer < 0:  # no slot: a view kept of another buffer would keep its memory
            return self._new_views(slot, heads, batch, tokens)
        room = self._room(slot, heads, batch, tokens)
        k, v = self._views(slot, heads, batch, room)
        return (k, v) if room == tokens else (k[:, :, :tokens], v[:, :, :tokens])

    def _room(self, buffer: Tensor, heads: int, batch: int, tokens: int) -> int:
        """Tokens from one head, or row, to the next in a buffer of tiles: as many as there is room for
        and not as these are. Kernels built anew for every stride then meet one per number of heads."""
        if heads * batch == 1:
            return tokens
        room = (buffer.numel() - aligned(1)) // (heads * self.shape.token_bytes(batch))
        return max(room // BLOCK_TOKENS * BLOCK_TOKENS, tokens)

    def _views(self, buffer: Tensor, heads: int, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        place = (buffer.data_ptr(), heads, batch, tokens)
        found = self._view_cache.get(place)
        if found is None:
            if len(self._view_cache) >= CACHED_VIEWS:
                self._view_cache.clear()
            found = self._view_cache[place] = self._new_views(buffer, heads, batch, tokens)
        return found

    def _new_views(
        self, buffer: Tensor, heads: int, batch: int, tokens: int
    ) -> tuple[Tensor, Tensor]:
        shape, leading = self.shape, (heads, batch, tokens)
        k_bytes = aligned(heads * batch * tokens * shape.key_dim * shape.dtype.itemsize)
        k = bytes_as(buffer, 0, (*leading, shape.key_dim), shape.dtype)
        return k, bytes_as(buffer, k_bytes, (*leading, shape.value_dim), shape.dtype)

    def _reload_tail(self, span: Span) -> None:
        tile = Tile(-1, self.heads, span, self.store.epoch)
        batch = self.store.batch
        nbytes = self.heads.heads * self.shape.token_bytes(batch) * span.tokens + aligned(1)
        slot = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        after = [self._engine.fence(), self.last_write]
        self._engine.wait(self._engine.submit(self.load(tile, slot), lane=Lane.IN, after=after))
        self._engine.wait(self._tail_free_after)
        piece = self.unpack(tile, slot)
        for tail, found in zip(self._tail_buffers(batch), (piece.k, piece.v), strict=True):
            tail[:, :, : span.tokens].copy_(found.transpose(0, 1))


def _tail_piece(start: int, tail_k: Tensor, tail_v: Tensor, tokens: int) -> Piece:
    return Piece(
        start, tail_k[:, :, :tokens].transpose(0, 1), tail_v[:, :, :tokens].transpose(0, 1)
    )
