# SPDX-License-Identifier: Apache-2.0
"""Heads whose blocks are packed by the lossless format, in host memory or on disk, and stream: they
are encoded on the compute device on their way down, travel packed, and are unpacked where tiles are
attended. Those that a CPU attends where they lie are in `packed_in_place`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headinfer.attention.packed import PackedRun
from headinfer.budget import format_bytes
from headinfer.errors import CacheStateError, InputError
from headinfer.formats.exact import ExactFormat
from headinfer.heads.codec import Codec
from headinfer.heads.memory import KVShape, Piece, SavedLayer
from headinfer.heads.offloaded import CACHED_VIEWS, OffloadedHeads, WriteBuffers
from headinfer.heads.packed_in_place import PackedInPlace
from headinfer.heads.packed_memory import Entries, Held, PackedMemory, dropped, held, in_blocks
from headinfer.heads.packed_pieces import PackedPiece
from headinfer.layout import BLOCK_TOKENS, HeadGroup, Span, Tile, aligned
from headinfer.spill import DiskEngine
from headinfer.store import Append, Crop, Write
from headinfer.tiers import Tier
from headinfer.tiers.arena import bytes_as
from headinfer.transfer import Copy, Lane, Moves, TransferEngine


class _Unpacking(NamedTuple):
    """What is decoded into what, and keys and values [b, h, t, d] as they then lie there."""

    runs: list[tuple[Tensor, Tensor]]
    k: Tensor
    v: Tensor


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
        layer: int = -1,
    ) -> None:
        super().__init__(
            tier,
            shape,
            heads,
            engine=engine,
            device=device,
            fmt=ExactFormat(),
            expected_tokens=expected_tokens,
            layer=layer,
        )
        self.codec = codec
        self._memory = PackedMemory(tier, shape, heads, codec, layer)
        self._unpackings: dict[tuple[int, ...], _Unpacking] = {}
        # Compute is at once and reads host memory: a slot is attended as it is.
        self._packed_slots = isinstance(engine, DiskEngine) and engine.straight

    def _take(self, append: Append, k: Tensor, v: Tensor, buffers: WriteBuffers) -> None:
        """As there; overflow entries for every block to be written are set aside before anything."""
        blocks = sum(write.tokens for write in append.writes) // BLOCK_TOKENS
        if not blocks:
            super()._take(append, k, v, buffers)
            return
        count = self.heads.heads * k.shape[0] * blocks
        self.codec.reserve(self._memory.blocks_of(count))
        taken = self.codec.taken(self.shape.key_dim, self.shape.value_dim)
        try:
            super()._take(append, k, v, buffers)
        except BaseException:  # no block refers to them
            self._engine.drain()
            for overflow, since in taken:
                overflow.give_back(since)
            raise

    def recent_pieces(self, length: int) -> list[Piece]:
        # Attention over less than is stored may end within a block, which does not stream.
        found, first = super().recent_pieces(length), self.prefix(length)
        edge = super().prefix(length)
        return found if first == edge else [self._brought(Span(first, edge)), *found]

    def prefix(self, length: int) -> int:
        return super().prefix(length) // BLOCK_TOKENS * BLOCK_TOKENS

    def in_place(self, group: HeadGroup, length: int) -> Iterator[Any]:
        """Packed pieces of [0, length) of `group` as they lie in the tier; what is on disk, as it
        arrives."""
        first = group.start - self.heads.start
        for run in self.store.runs(Span(0, length)):
            yield from self._memory.pieces(run, slice(first, first + group.heads))

    def load(self, tile: Tile, slot: Tensor) -> list[Copy]:
        k, v = self._packed_views(slot, tile.group.heads, self.store.batch, tile.span.tokens)
        copies: list[Copy] = []
        first = tile.span.start // BLOCK_TOKENS
        for run in self.store.runs(_whole(tile.span)):
            _, stored_k, stored_v = self._memory.segments[run.key]
            blocks = in_blocks(run)
            at = blocks.span.start - first
            copies += self._run_copies(tile.group, blocks, at, stored_k, k)
            copies += self._run_copies(tile.group, blocks, at, stored_v, v)
        return copies

    def unpack(self, tile: Tile, slot: Tensor) -> Any:
        """The tile for compute to read: decoded, or packed where that attends it as it is."""
        heads, batch, tokens = tile.group.heads, self.store.batch, tile.span.tokens
        if self._packed_slots and tile.layer >= 0:
            packed = self._packed_views(slot, heads, batch, tokens)
            k, v = (
                PackedRun(slots, self.codec.overflow(layout.dim))
                for slots, layout in zip(packed, self._memory.layouts, strict=True)
            )
            return PackedPiece(tile.span.start, tokens, k, v, scratch=self.codec.scratch)
        whole = _whole(tile.span).tokens
        nbytes = heads * self.shape.token_bytes(batch) * whole + aligned(1)
        buffer = self._buffer_for(tile, nbytes)
        place = slot.data_ptr(), buffer.data_ptr(), heads, batch, tokens
        found = self._unpackings.get(place)
        if found is None:
            found = self._unpacking(slot, buffer, heads, batch, tokens)
            # Of buffers that do not stay, a view kept would keep the memory.
            if tile.layer >= 0 and self.codec.holds(buffer):
                if len(self._unpackings) >= CACHED_VIEWS:
                    self._unpackings.clear()
                self._unpackings[place] = found
        for slots, out in found.runs:
            self.codec.decode(slots, out, tile.layer)
        return Piece(tile.span.start, found.k, found.v)

    def _buffer_for(self, tile: Tile, nbytes: int) -> Tensor:
        if tile.layer >= 0:
            return self.codec.scratch(max(nbytes, self.codec.unpacked.numel()))
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _unpacking(
        self, slot: Tensor, buffer: Tensor, heads: int, batch: int, tokens: int
    ) -> _Unpacking:
        """How `tokens` tokens in `slot` get into `buffer`: keys and values at once where they lie
        one behind the other in both, as they do when their dims are the same."""
        whole = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        packed = self._packed_views(slot, heads, batch, tokens)
        room = self._room(buffer, heads, batch, whole)
        plain = self._new_views(buffer, heads, batch, room)
        k, v = (x[:, :, :tokens].transpose(0, 1) for x in plain)
        first, second = packed[0], plain[0]
        behind = all(
            one.shape[2:] == two.shape[2:] and one.data_ptr() + one.nbytes == two.data_ptr()
            for one, two in (packed, plain)
        )
        if not behind:
            outs = [x[:, :, :whole] for x in plain]
            return _Unpacking(list(zip(packed, outs, strict=True)), k, v)
        runs = 2 * heads * batch
        slots = bytes_as(slot, 0, (1, runs, *first.shape[2:]), torch.uint8)
        out = bytes_as(buffer, 0, (1, runs, *second.shape[2:]), second.dtype)
        return _Unpacking([(slots, out[:, :, :whole])], k, v)

    def stored_pieces(self, span: Span) -> list[Any]:
        return self._memory.stored_pieces(self.store, span)

    def restore(self, saved: SavedLayer) -> Any:
        return self._memory.filling(self.store, saved)

    def put(self, stored: Any, found: Tensor) -> None:
        """What `restore` returned, or a part [b, t, d] of it, is `found`; from any thread."""
        stored.copy_(found)

    def pieces(self, length: int) -> Iterator[Piece]:
        prefix = self.prefix(length)
        if prefix:
            yield self._brought(Span(0, prefix))
        yield from self.recent_pieces(length)

    def clear(self) -> None:
        entries = self._entries(held(self.store))
        self._unpackings.clear()
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
            layer=self._memory.layer,
        )
        twin.store = copy.deepcopy(self.store)
        if self._tail is not None:
            twin._tail = self._tail[0].clone(), self._tail[1].clone()
        self._memory.copy_into(twin._memory, self.store)
        return twin

    def take_over(self, others: PackedInPlace) -> None:
        """These heads, which hold nothing, hold what `others` of the same codec did, which are empty
        now; the blocks go down as they are.

        Raises:
            TierFull: there is no room; nothing has changed.
        """
        try:
            others.copy_into(self._memory)
        except BaseException:
            self._memory.free(list(self._memory.segments))
            raise
        self.store = replace(others.store, whole=False, segments=list(others.store.segments))
        tail = others.give_up()
        if tail is not None:
            self._tail = tail[0].transpose(0, 1).contiguous(), tail[1].transpose(0, 1).contiguous()

    def ratio(self) -> tuple[int, int]:
        """Bytes the stored blocks take and stand for; waits for copies under way."""
        self._engine.done(self.last_write, block=True)
        return self._memory.ratio(self.store)

    def _crop(self, crop: Crop) -> None:
        entries = self._entries(dropped(self.store, crop))
        super()._crop(crop)
        entries.give()

    def _entries(self, blocks: Held) -> Entries:
        if self._memory.overflows:
            self._engine.drain()  # blocks on their way down are about to be looked at
        return self._memory.entries(blocks)

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
        """The fresh keys are encoded from where they lie into a write buffer and copied down. Where
        the old tail is the beginning of a block, blocks are put together in the buffer first."""
        batch = new.k.shape[0]
        joined = bool(old.k.shape[2]) or any(
            x.stride(3) != 1 or x.dtype != self.shape.dtype for x in (new.k, new.v)
        )
        for heads in self._portions(buffers, batch, plain=joined):
            count = heads.stop - heads.start
            some = slice(heads.start, heads.stop)
            parts = [Piece(p.start, p.k[:, some], p.v[:, some]) for p in (old, new)]
            step = self._fitting(buffers, count * batch, plain=joined)
            for write in writes:
                for done in range(0, write.tokens, step * BLOCK_TOKENS):
                    tokens = min(step * BLOCK_TOKENS, write.tokens - done)
                    index, buffer = buffers.acquire()
                    packed = self._packed_views(buffer, count, batch, tokens)
                    start = old.start + write.source + done
                    if joined:
                        rest = buffer[self._packed_bytes(count * batch, tokens) :]
                        plain = self._new_views(rest, count, batch, tokens)
                        for part in parts:
                            self._encode(part, start, *plain)
                    else:
                        here = slice(start - new.start, start - new.start + tokens)
                        k, v = new.k[:, some, here], new.v[:, some, here]
                        plain = k.transpose(0, 1), v.transpose(0, 1)
                    for values, slots in zip(plain, packed, strict=True):
                        self.codec.encode(values, slots)
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
        counted = self.codec.counted(self.shape.key_dim, self.shape.value_dim)
        if self._memory.on_disk(key):
            copies += [*self._label_copies(key, heads.start, there, (k, v)), *counted]
        else:
            copies = Moves([*copies, *counted])
        self.last_write = self._engine.submit(copies, lane=Lane.OUT, after=[self._engine.fence()])
        blocks = k.shape[0] * k.shape[1] * k.shape[2]
        self.codec.encoded(self.last_write, self._memory.blocks_of(blocks))

    def _label_copies(
        self, key: int, first: int, there: slice, packed: tuple[Tensor, Tensor]
    ) -> Iterator[Copy]:
        """The labels of blocks go to where those of blocks on disk are kept."""
        for labels, up, layout in zip(
            self._memory.labels(key), packed, self._memory.layouts, strict=True
        ):
            for head in range(up.shape[0]):
                for row in range(up.shape[1]):
                    yield Copy(labels[first + head, row, there], up[head, row, :, layout.label])

    def _brought(self, span: Span) -> Piece:
        """A copy of stored tokens on the compute device."""
        rows = self.heads.heads * self.store.batch
        nbytes = self._packed_bytes(rows, _whole(span).tokens) + aligned(1)
        slot = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        tile = Tile(-1, self.heads, span, self.store.epoch)
        after = [self._engine.fence(), self.last_write]
        self._engine.wait(self._engine.submit(self.load(tile, slot), lane=Lane.IN, after=after))
        found: Piece = self.unpack(tile, slot)
        return found

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


def _whole(span: Span) -> Span:
    """The blocks that `span`, which begins with one, touches."""
    return Span(span.start, -(-span.stop // BLOCK_TOKENS) * BLOCK_TOKENS)
