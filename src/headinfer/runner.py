# SPDX-License-Identifier: Apache-2.0
"""One layer step: new keys go in, queries attend everything, the next tiles are on their way.

Knows layers by number and masks by recipe; no model classes, no sampling, no file formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.attention import native
from headinfer.attention.placed import Place
from headinfer.errors import CacheStateError, TierFull
from headinfer.heads import (
    DirectHeads,
    KVShape,
    OffloadedHeads,
    PackedHeads,
    PackedInPlace,
    SavedLayer,
)
from headinfer.layer import Layer, RunnerSettings, Stats, check_fits
from headinfer.layout import HeadGroup
from headinfer.link import Link, default_engine
from headinfer.provision import HostMemory, Provision
from headinfer.spill import DiskEngine, queue_for
from headinfer.tiers.disk import QueueFactory
from headinfer.tile_loop import TileLoop
from headinfer.totals import Query
from headinfer.transfer import TransferEngine

DEMOTED_TOKENS = 8192
"""Resident tokens that are packed together: overflow is set aside for all of them."""


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
        self._loop = TileLoop(settings, self.layers)
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
            layer = self._new_layer(index, shape, k.device)
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
        self._loop.forget_places()
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
        self._loop.forget_places()
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
        return self._loop.attend(layer, self._links[layer.device], length, query)

    def places(self, tokens: int, *, batch: int) -> dict[int, Place]:
        """By layer, where the keys and values lie of those that `tokens` new tokens of `batch` sequences
        can attend by their place, with room for these."""
        return self._loop.resident.places(tokens, batch=batch)

    def extend(self, index: int, tokens: int) -> int:
        """Layer `index` holds `tokens` more, which somebody has put, or will, where `places` said;
        returns its new length."""
        layer = self.layers[index]
        for heads in layer.ranges:
            if not isinstance(heads, DirectHeads):
                raise CacheStateError(f"layer {index} has heads that have no place on the device")
            heads.extend(tokens)
        return layer.length

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
        self._loop.forget_places()
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
        layer = self.layers[index] = self._provision.layer(index, shape, self._links[device])
        self._loop.forget_places()
        self._loop.share_out(layer)
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
                self._loop.load,
                self._loop.tiles_of,
                self._provision.host,
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
