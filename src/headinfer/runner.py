# SPDX-License-Identifier: Apache-2.0
"""One layer step: new keys go in, queries attend everything, the next tiles are on their way.

Holds the only loop over tiles: load next, attend this, store previous. Knows layers by number
and masks by recipe; no model classes, no sampling, no file formats.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headinfer.attention import native
from headinfer.balance import Balance
from headinfer.errors import CacheStateError, TierFull
from headinfer.heads import (
    DirectHeads,
    KVShape,
    OffloadedHeads,
    PackedHeads,
    PackedInPlace,
    Piece,
    SavedLayer,
    of_group,
)
from headinfer.layer import Layer, RunnerSettings, Stats, check_fits
from headinfer.layout import HeadGroup, Tile, tiles
from headinfer.link import Link, default_engine
from headinfer.near import host_query
from headinfer.provision import HostMemory, Provision
from headinfer.spill import DiskEngine, queue_for
from headinfer.tiers.disk import QueueFactory
from headinfer.totals import Query, Total, heads_apart
from headinfer.transfer import Copy, Ticket, TransferEngine

NEAR_BYTES = 8 * 2**20
"""Offloaded keys and values of a layer below which the CPU is not asked while its share adapts:
waiting for the queries would cost more than bringing the keys."""

DEMOTED_TOKENS = 8192
"""Resident tokens that are packed together: overflow is set aside for all of them."""

TOGETHER_BYTES = 8 * 2**20
"""Outputs up to this size attend the newest tokens of all head groups in one call."""


class Runner:
    """Keys and values of all head-wise layers, and attention over them.

    One sequence batch at a time, one thread at a time. Layers come to exist at their first
    `append`. Layers of one runner may sit on different compute devices.
    """

    def __init__(
        self,
        settings: RunnerSettings,
        *,
        engine: Callable[[torch.device], TransferEngine] | None = None,
        disk_queue: QueueFactory = queue_for,
    ) -> None:
        self.settings = settings
        self.layers: dict[int, Layer] = {}
        self._engine_for = engine or default_engine
        native.suggest_threads(settings.threads)
        self._links: dict[torch.device, Link] = {}
        self._provision = Provision(settings, disk_queue)
        self._balance = Balance(settings.near_share, settings.near_adapts)
        self._near_now = False
        self._current: Layer | None = None
        self.demoted_heads = 0
        self.before_change: Callable[[], None] = _nothing
        """Called before stored tokens change or go, for others who read them."""

    def append(self, index: int, k: Tensor, v: Tensor) -> int:
        """Store k [b, h, t, d], v [b, h, t, e] of layer `index`; returns its new length.

        Resident heads that no longer fit on the compute device are demoted first.

        Raises:
            CacheStateError: shapes, type or batch differ from what the layer holds.
            TierFull: a budget is used up; the layer holds what it held.
        """
        k, v = k.detach(), v.detach()
        layer = self.layers.get(index)
        if layer is None:
            shape = KVShape(k.shape[1], k.shape[-1], v.shape[-1], k.dtype)
            if not self.layers:
                self._provision.take_at_once(shape, k.shape[0], k.device)
            layer = self.layers[index] = self._new_layer(index, shape, k.device)
        check_fits(layer, k, v)
        self._forget_recent()
        self._current = layer
        before = layer.length
        if k.shape[2] == 1 and self.settings.expected_tokens is None:
            self._provision.prompt_is_over()
        try:
            for place in range(len(layer.ranges)):
                self._append_to(layer, place, k, v)
        except BaseException:
            for heads in layer.ranges:  # all ranges hold the same tokens, or none is right
                if heads.store.length > before:
                    heads.crop(before)
            raise
        return layer.length

    def restore(self, index: int, saved: SavedLayer) -> list[Unfilled]:
        """A layer that is not there yet holds saved tokens, in memory that the caller fills where
        it is not mapped.

        Raises:
            TierFull: a budget does not allow it; the layer is not there.
        """
        layer = self._new_layer(index, saved.shape, saved.device)
        self.layers[index] = layer
        if (
            self.settings.disk is not None
        ):  # pages of a mapped file would be memory beyond the budget
            saved = saved._replace(adopt=lambda heads, capacity: None)
        found: list[Unfilled] = []
        try:
            for place in range(len(layer.ranges)):
                views = self._restore_range(layer, place, saved)
                if views is not None:
                    heads = layer.ranges[place]
                    found.append(Unfilled(heads.heads, *views, heads.put))
        except BaseException:
            self.drop(index)
            raise
        return found

    def _restore_range(
        self, layer: Layer, place: int, saved: SavedLayer
    ) -> tuple[Tensor, Tensor] | None:
        heads = layer.ranges[place]
        try:
            found: tuple[Tensor, Tensor] | None = heads.restore(saved)
            return found
        except TierFull as full:
            if isinstance(heads, OffloadedHeads) or full.tier != self._provision.resident_tier:
                raise
        below = layer.ranges[place] = self._provision.offloaded(
            layer, heads.heads, self._links[layer.device]
        )
        self.demoted_heads += heads.heads.heads
        return below.restore(saved)

    def _append_to(self, layer: Layer, place: int, k: Tensor, v: Tensor) -> None:
        heads = layer.ranges[place]
        mine = slice(heads.heads.start, heads.heads.stop)
        while True:
            try:
                if isinstance(heads, OffloadedHeads):
                    heads.append(k[:, mine], v[:, mine], self._links[layer.device].buffers)
                else:
                    heads.append(k[:, mine], v[:, mine])
                return
            except TierFull as full:
                if full.tier != self._provision.resident_tier:
                    raise
                if not isinstance(heads, OffloadedHeads):
                    self._demote(layer, place)
                elif not self._demote_some_layer():
                    raise
                heads = layer.ranges[place]

    def _demote_some_layer(self) -> bool:
        """The resident heads of the layer that has most go a tier down, for the sake of what has to
        stay up here; False if there are none."""
        found = [
            (heads.stored_bytes, layer, place)
            for layer in self.layers.values()
            for place, heads in enumerate(layer.ranges)
            if not isinstance(heads, OffloadedHeads) and heads.stored_bytes
        ]
        if not found:
            return False
        _, layer, place = max(found, key=lambda one: one[0])
        self._demote(layer, place)
        return True

    def _demote(self, layer: Layer, place: int) -> None:
        """Resident heads go a tier down, and stay there; takes as long as copying them."""
        self.before_change()
        link = self._links[layer.device]
        heads = layer.ranges[place]
        below = self._provision.offloaded(layer, heads.heads, link)
        if isinstance(heads, PackedInPlace) and isinstance(below, PackedHeads):
            below.take_over(heads)
        elif isinstance(heads, DirectHeads):
            _append_all(below, heads, link)
        layer.ranges[place] = below
        self.demoted_heads += heads.heads.heads
        # Tiles staged ahead were listed without these heads.
        self._settle_ring()

    def attend(self, index: int, length: int, query: Query) -> Tensor:
        """Attention of `query` over the first `length` tokens of layer `index`, [b, t, h, d].

        Raises:
            CacheStateError: the layer no longer holds that many tokens.
            UnsupportedAttention: no implementation runs the call.
        """
        layer = self._layer_holding(index, length)
        q = query.q.contiguous()
        batch, num_heads, rows, _ = q.shape
        out = q.new_empty(batch, rows, num_heads, query.value_dim)
        # Where nothing came before there is but one shape: all heads over a square.
        apart = length > rows and heads_apart(
            query, layer.shape.num_kv_heads, self.settings.attention
        )
        call = _Call(layer, length, query, q, out, apart)
        if layer.offloaded:
            self._foresee(call)
        for heads in layer.ranges:
            if not isinstance(heads, OffloadedHeads):
                for group in call.groups(heads.heads):
                    total = self._total(call, group, collect=False)
                    for piece in heads.pieces(length):
                        total.add(of_group(piece, heads.heads, group))
                    total.finish(out)
            else:
                self._attend_offloaded(call, heads)
        return out

    def _foresee(self, call: _Call) -> None:
        """Which heads the CPU attends in this call, and which tiles are wanted for the rest."""
        layer, link = call.layer, self._links[call.layer.device]
        call.near = self._near_query(layer, call.query)
        self._near_now = call.near is not None
        found = link.begin(layer.index, near=self._near_now)
        if found is not None:
            self._balance.observe(found)
        for heads in layer.offloaded:
            start, count = heads.heads.start, heads.near_heads if self._near_now else 0
            call.below[heads.heads] = HeadGroup(start, start + count)
            call.wanted.extend(self._tiles(layer, heads, heads.prefix(call.length)))
        link.schedule.reached(layer.index)

    def _attend_offloaded(self, call: _Call, heads: OffloadedHeads) -> None:
        """Merge what the tail, the stream and the CPU find for `heads`."""
        recent, prefix = heads.recent_pieces(call.length), heads.prefix(call.length)
        size = call.out[:, :, slice(*call.query_heads(heads.heads))].numel() * 4
        if size > TOGETHER_BYTES and prefix and call.near is None:
            for total in self._stream(call, heads, recent):
                total.finish(call.out)
            return
        # Small outputs are merged once per layer rather than once per tile: decode would
        # otherwise spend its time launching kernels.
        group, link = call.below[heads.heads], self._links[call.layer.device]
        newest = self._total(call, heads.heads, collect=True)
        totals: list[Total] = []
        if link.near is None or call.near is None or not group.heads or not prefix:
            for piece in recent:
                newest.add(piece)
            totals.extend(self._stream(call, heads))
        else:
            with link.near.start(heads, group, prefix, call.q, call.near) as job:
                for piece in recent:
                    newest.add(piece)
                totals.extend(self._stream(call, heads))
                below = self._total(call, group, collect=True)
                below.accept(job.partial())
            totals.insert(0, below)
        newest.join(totals)
        newest.finish(call.out)

    def _stream(
        self, call: _Call, heads: OffloadedHeads, recent: Sequence[Piece] | None = None
    ) -> Iterator[Total]:
        """The loop over tiles, a total per head group: with `recent` the tiles merge into it as
        they come, without they are kept for merging together."""
        link, wanted = self._links[call.layer.device], call.wanted
        while wanted and wanted[0].group.stop <= heads.heads.stop:
            group = wanted[0].group
            groups = [group] if recent is None else call.groups(group)
            totals = [self._total(call, part, collect=recent is None) for part in groups]
            for part, total in zip(groups, totals, strict=True):
                for piece in recent or ():
                    total.add(of_group(piece, heads.heads, part))
            while wanted and wanted[0].group == group:
                tile = wanted.popleft()
                if link.ring.upcoming != tile:
                    link.ring.flush()
                    link.schedule.restart(wanted)
                slot = link.ring.take(tile)
                link.ring.prefetch(link.schedule.next_tile)  # load next
                unpacked = heads.unpack(tile, slot)
                for part, total in zip(groups, totals, strict=True):
                    total.add(of_group(unpacked, group, part))  # attend this
                link.ring.give_back()
            yield from totals

    def _total(self, call: _Call, group: HeadGroup, *, collect: bool) -> Total:
        heads = call.query_heads(group)
        return Total(call.query, call.q, heads, self.settings.attention, collect)

    def _near_query(self, layer: Layer, query: Query) -> Query | None:
        """The call as the CPU answers it for its share of the heads; None if all stream."""
        if self._links[layer.device].near is None:
            return None
        held = sum(heads.stored_bytes for heads in layer.offloaded)
        if self._balance.adapts and held < NEAR_BYTES:
            return None
        return host_query(query)

    def gather(self, index: int, length: int, *, values: bool) -> Tensor:
        """Keys or values [b, h, t, d] of the first `length` tokens, copied to the device."""
        layer = self._layer_holding(index, length)
        width = layer.shape.value_dim if values else layer.shape.key_dim
        shape = (layer.batch, layer.shape.num_kv_heads, length, width)
        out = torch.empty(shape, dtype=layer.shape.dtype, device=layer.device)
        for heads in layer.ranges:
            for piece in heads.pieces(length):
                part = piece.v if values else piece.k
                stop = piece.start + part.shape[2]
                out[:, heads.heads.start : heads.heads.stop, piece.start : stop].copy_(part)
        return out

    def crop(self, index: int, length: int) -> None:
        """Keep the first `length` tokens of a layer."""
        layer = self.layers[index]
        if length != layer.length:
            self._settle()
            for heads in layer.ranges:
                heads.crop(length)
            self._forget_lost(index, length)

    def complete_tokens(self) -> int | None:
        """The tokens before the first that could not be written to disk; None if all could."""
        for engine in self._disk_engines():
            engine.drain()
        disk = self._provision.disk
        starts = [
            place.start
            for place in ([] if disk is None else disk.lost())
            if place.layer in self.layers and self.layers[place.layer].stored > place.start
        ]
        return min(starts, default=None)

    def _disk_engines(self) -> list[DiskEngine]:
        engines = [link.engine for link in self._links.values()]
        return [engine for engine in engines if isinstance(engine, DiskEngine)]

    def _forget_lost(self, index: int, length: int) -> None:
        """Tokens of a layer from `length` on are not held any more, lost or not."""
        for engine in self._disk_engines():
            engine.lost = [
                error for error in engine.lost if error.layer != index or error.start < length
            ]

    def reorder(self, index: int, rows: Sequence[int]) -> None:
        """Batch row i of a layer becomes what row `rows[i]` was; also repeats and selects."""
        self._settle()
        for heads in self.layers[index].ranges:
            heads.reorder(rows)

    def drop(self, index: int) -> None:
        """Forget a layer and free its memory."""
        layer = self.layers.pop(index, None)
        if layer is not None:
            self._settle()
            for heads in layer.ranges:
                heads.clear()
            self._forget_lost(index, 0)

    def clone(self) -> Runner:
        """An independent copy of everything stored."""
        twin = Runner(self.settings, engine=self._engine_for, disk_queue=self._provision.disk_queue)
        for index, layer in self.layers.items():
            twin._prepare_device(layer.device)
            link = twin._links[layer.device]
            ranges = [
                heads.clone(twin._provision.tier_of(heads, layer.device), link.engine, link.codec)
                for heads in layer.ranges
            ]
            twin.layers[index] = Layer(index, layer.shape, layer.device, ranges)
        return twin

    def close(self) -> None:
        """Free every layer, buffer and mapping."""
        for index in list(self.layers):
            self.drop(index)
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._provision.close()

    def __del__(self) -> None:
        # Tiles staged for a pass that never came may be on their way into slots whose memory is
        # about to be reused, from mappings about to go.
        for link in self._links.values():
            link.drain()

    def stats(self) -> Stats:
        """Bytes held now and moved so far."""
        found = Stats()
        for link in self._links.values():
            found.staging_bytes += link.staging_bytes
            if link.staging_bytes:
                found.loaded_bytes += link.ring.loaded_bytes
                found.loaded_tiles += link.ring.loaded_tiles
                found.dropped_tiles += link.ring.dropped_tiles
            if link.near is not None:
                found.near_bytes += link.near.attended_bytes
        for layer in self.layers.values():
            for heads in layer.ranges:
                if not isinstance(heads, DirectHeads):
                    found.tail_bytes += heads.tail_bytes
                if isinstance(heads, OffloadedHeads):
                    found.written_bytes += heads.written_bytes
                    found.near_heads += heads.near_heads
        found.demoted_heads = self.demoted_heads
        self._provision.count(found)
        return found

    def ratios(self) -> dict[int, float]:
        """Per layer that has packed blocks, the bytes they take by those they stand for, overflow
        included. Looks at every block: not for inside a loop."""
        found: dict[int, float] = {}
        for index, layer in self.layers.items():
            sizes = [
                heads.ratio()
                for heads in layer.ranges
                if isinstance(heads, (PackedHeads, PackedInPlace))
            ]
            stored, plain = (sum(part) for part in zip(*sizes, strict=True)) if sizes else (0, 0)
            if plain:
                found[index] = stored / plain
        return found

    @property
    def links(self) -> list[Link]:
        """One per compute device."""
        return list(self._links.values())

    @property
    def host_memory(self) -> HostMemory:
        """What making host memory took so far."""
        return self._provision.host_memory

    @property
    def pin_failure(self) -> str | None:
        """Why host memory could not be page-locked; None when it is, or need not be."""
        return self._provision.pin_failure

    def _settle(self) -> None:
        """What is stored is about to change other than by appending."""
        self.before_change()
        self._forget_recent()
        self._current = None
        self._settle_ring()

    def _settle_ring(self) -> None:
        for link in self._links.values():
            link.settle()

    def _forget_recent(self) -> None:
        if self._current is not None:
            for heads in self._current.offloaded:
                heads.forget_recent()

    def _layer_holding(self, index: int, length: int) -> Layer:
        layer = self.layers.get(index)
        if layer is None or length > layer.length:
            held = 0 if layer is None else layer.length
            raise CacheStateError(
                f"layer {index} holds {held} tokens, attention wants {length}: the cache was "
                "cropped or reset since these keys were handed out; run the forward pass again"
            )
        return layer

    def _new_layer(self, index: int, shape: KVShape, device: torch.device) -> Layer:
        self._prepare_device(device)
        layer = self._provision.layer(index, shape, self._links[device])
        self._share_out(layer)
        return layer

    def _prepare_device(self, device: torch.device) -> None:
        """Streams and buffers, once per compute device and never again."""
        if device not in self._links:
            self._provision.pin |= device.type == "cuda"
            engine = self._engine_for(device)
            if self.settings.disk is not None:
                engine = DiskEngine(
                    engine,
                    self._provision.disk_for(self.settings.disk),
                    pin=device.type == "cuda",
                    slot_bytes=self.settings.ring_slot_bytes or self.settings.slot_bytes,
                    num_slots=self.settings.num_slots,
                )
            self._links[device] = Link(
                device,
                self.settings,
                engine,
                _weakly(self._load),
                _weakly(self._tiles_of_layer),
                self._provision.host,
            )

    def _load(self, tile: Tile, slot: Tensor) -> tuple[list[Copy], list[Ticket]]:
        heads = self.layers[tile.layer].offloaded_with(tile.group)
        return heads.load_again(tile, slot), [heads.last_write]

    def _tiles_of_layer(self, index: int) -> Iterator[Tile]:
        layer = self.layers.get(index)
        if layer is None:
            return
        self._share_out(layer)
        for heads in layer.offloaded:
            yield from self._tiles(layer, heads, heads.store.stored)

    def _share_out(self, layer: Layer) -> None:
        """Between two visits of a layer its heads may change sides."""
        if self._links[layer.device].near is not None:
            for heads in layer.offloaded:
                heads.near_heads = self._balance.heads(layer.index, heads.heads.heads)

    def _tiles(self, layer: Layer, heads: OffloadedHeads, length: int) -> Iterator[Tile]:
        near = heads.near_heads if self._near_now else 0
        return tiles(
            layer.index,
            HeadGroup(heads.heads.start + near, heads.heads.stop),
            length,
            slot_bytes=self.settings.slot_bytes,
            token_bytes=layer.shape.token_bytes(max(heads.store.batch, 1)),
            epoch=heads.store.epoch,
        )


def _append_all(below: OffloadedHeads, heads: DirectHeads, link: Link) -> None:
    """`below` holds what `heads` did, which are empty now."""
    step = DEMOTED_TOKENS if isinstance(below, PackedHeads) else 2**62
    try:
        for piece in heads.pieces(heads.store.length):
            for first in range(0, piece.k.shape[2], step):
                some = slice(first, first + step)
                below.append(piece.k[:, :, some], piece.v[:, :, some], link.buffers)
                below.forget_recent()
    except BaseException:
        below.clear()
        raise
    heads.clear()


class Unfilled(NamedTuple):
    """Heads whose saved keys and values k, v [h, b, t, d] have yet to be read; `put` stores what was
    read of a head where these are, or a part of them, if they are on a device or a disk."""

    heads: HeadGroup
    k: Tensor
    v: Tensor
    put: Callable[[Tensor, Tensor], None]


def _nothing() -> None:
    pass


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` without keeping its object alive: a runner dropped is memory freed at once, not
    when the garbage collector next looks for cycles."""
    target = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        found = target()
        if found is None:
            raise CacheStateError("the runner of these tiles is gone")
        return found(*args)

    return call


@dataclass(slots=True)
class _Call:
    """One attention call on its way.

    Attributes:
        layer, length, query: as asked.
        q: contiguous queries.
        out: [b, t, h, d], filled head range by head range.
        near: the call as the CPU answers it for its heads; None if every head streams.
        below: per offloaded range, the heads the CPU attends.
        wanted: tiles of the heads that stream, in order.
    """

    layer: Layer
    length: int
    query: Query
    q: Tensor
    out: Tensor
    apart: bool = False
    near: Query | None = None
    below: dict[HeadGroup, HeadGroup] = field(default_factory=dict)
    wanted: deque[Tile] = field(default_factory=deque)

    def groups(self, heads: HeadGroup) -> list[HeadGroup]:
        """The parts of `heads` that are attended together."""
        if not self.apart:
            return [heads]
        return [HeadGroup(head, head + 1) for head in range(heads.start, heads.stop)]

    def query_heads(self, group: HeadGroup) -> tuple[int, int]:
        per_kv = self.q.shape[1] // self.layer.shape.num_kv_heads
        return group.start * per_kv, group.stop * per_kv
