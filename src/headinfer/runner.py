# SPDX-License-Identifier: Apache-2.0
"""One layer step: new keys go in, queries attend everything, the next tiles are on their way.

Holds the only loop over tiles: load next, attend this, store previous. Knows layers by number
and masks by recipe; no model classes, no sampling, no file formats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headinfer.attention.api import AUTO, attend
from headinfer.attention.masks import MaskRecipe
from headinfer.attention.merge import add_sink, identity, merge_all, merge_into
from headinfer.attention.types import Partial
from headinfer.errors import CacheStateError, HeadInferError
from headinfer.formats import format_named
from headinfer.heads import DirectHeads, KVShape, OffloadedHeads, Piece, WriteBuffers
from headinfer.layout import HeadGroup, Tile, aligned, tiles
from headinfer.tiers import DeviceTier, HostTier
from headinfer.transfer import (
    Copy,
    CudaEngine,
    InlineEngine,
    StagingRing,
    Ticket,
    TransferEngine,
)

TOGETHER_BYTES = 8 * 2**20
"""Outputs up to this size attend the newest tokens of all head groups in one call."""

EXPAND_BYTES = 64 * 2**20
"""Latent keys and values are expanded this much at a time."""

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """What the plan decided.

    Attributes:
        staging: stage tiles through the ring; False attends host memory in place (CPU only).
        slot_bytes: size of one staging slot.
        num_slots: slots in the ring.
        write_bytes: size of each of the two write-back buffers.
        resident_heads: per layer, the KV heads that never leave the compute device.
        expected_tokens: length the sequence will reach, if known: memory is then exact.
        host_bytes: host budget, None for no limit of our own.
        kv_format: how offloaded keys and values are stored.
        attention: implementation to insist on, or "auto".
        poison: NaN-fill staging slots on release (for tests).
    """

    staging: bool
    slot_bytes: int
    num_slots: int
    write_bytes: int
    resident_heads: tuple[int, ...] = ()
    expected_tokens: int | None = None
    host_bytes: int | None = None
    kv_format: str = "exact"
    attention: str = AUTO
    poison: bool = False


@dataclass(slots=True)
class Layer:
    """One layer's head ranges; together they cover its KV heads in order."""

    index: int
    shape: KVShape
    device: torch.device
    ranges: list[DirectHeads | OffloadedHeads]

    @property
    def length(self) -> int:
        return self.ranges[0].store.length

    @property
    def batch(self) -> int:
        return self.ranges[0].store.batch

    @property
    def offloaded(self) -> OffloadedHeads | None:
        last = self.ranges[-1]
        return last if isinstance(last, OffloadedHeads) else None


@dataclass(frozen=True, slots=True)
class Query:
    """One attention call against a layer.

    Attributes:
        q: [b, h * q_per_kv, t, d].
        scale: factor on q k^T.
        recipe: which keys each row sees.
        softcap: see `AttentionImpl`.
        sink: [h * q_per_kv] logits with zero value, or None.
        expand: turns stored latents [b, 1, t, r] into keys and values of every query head.
        value_dim: width of the output.
    """

    q: Tensor
    scale: float
    recipe: MaskRecipe
    value_dim: int
    softcap: float | None = None
    sink: Tensor | None = None
    expand: Expand | None = None


@dataclass(slots=True)
class Stats:
    """What a runner did and holds, in bytes."""

    host_bytes: int = 0
    resident_bytes: int = 0
    staging_bytes: int = 0
    tail_bytes: int = 0
    loaded_bytes: int = 0
    loaded_tiles: int = 0
    dropped_tiles: int = 0
    written_bytes: int = 0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


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
    ) -> None:
        self.settings = settings
        self.layers: dict[int, Layer] = {}
        self._engine_for = engine or _default_engine
        self._engines: dict[torch.device, TransferEngine] = {}
        self._host: HostTier | None = None
        self._device_tiers: dict[torch.device, DeviceTier] = {}
        self._rings: dict[torch.device, StagingRing] = {}
        self._buffers: dict[torch.device, WriteBuffers] = {}
        self._schedule = _Schedule(self._tiles_of_layer)
        self._current: Layer | None = None

    def append(self, index: int, k: Tensor, v: Tensor) -> int:
        """Store k [b, h, t, d], v [b, h, t, e] of layer `index`; returns its new length.

        Raises:
            CacheStateError: shapes, type or batch differ from what the layer holds.
            TierFull: a budget is used up; the layer is unchanged.
        """
        k, v = k.detach(), v.detach()
        layer = self.layers.get(index)
        if layer is None:
            layer = self.layers[index] = self._new_layer(index, k, v)
        _check(layer, k, v)
        if self._current is not None and self._current.offloaded is not None:
            self._current.offloaded.forget_recent()
        self._current = layer
        before = layer.length
        try:
            for heads in layer.ranges:
                mine = slice(heads.heads.start, heads.heads.stop)
                if isinstance(heads, DirectHeads):
                    heads.append(k[:, mine], v[:, mine])
                else:
                    heads.append(k[:, mine], v[:, mine], self._buffers[layer.device])
        except BaseException:
            for heads in layer.ranges:  # all ranges hold the same tokens, or none is right
                if heads.store.length > before:
                    heads.crop(before)
            raise
        return layer.length

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
        for heads in layer.ranges:
            if isinstance(heads, DirectHeads):
                mine = _query_heads(layer, query, heads.heads)
                total = _Total(query, q, mine, self._impl, collect=False)
                for piece in heads.pieces(length):
                    total.add(piece)
                total.finish(out)
            else:
                self._attend_offloaded(layer, heads, length, query, q, out)
        return out

    def _attend_offloaded(
        self,
        layer: Layer,
        heads: OffloadedHeads,
        length: int,
        query: Query,
        q: Tensor,
        out: Tensor,
    ) -> None:
        ring = self._rings[layer.device]
        recent = heads.recent_pieces(length)
        wanted = deque(self._tiles(layer, heads, heads.prefix(length)))
        self._schedule.reached(layer.index)
        # Small outputs are merged once per layer rather than once per tile: decode would
        # otherwise spend its time launching kernels.
        collect = out[:, :, : heads.heads.heads].numel() * 4 <= TOGETHER_BYTES or not wanted
        newest = _Total(query, q, _query_heads(layer, query, heads.heads), self._impl, collect)
        if collect:
            for piece in recent:
                newest.add(piece)
        totals: list[_Total] = []
        while wanted:
            group = wanted[0].group
            total = _Total(query, q, _query_heads(layer, query, group), self._impl, collect)
            if not collect:
                for piece in recent:
                    total.add(_of_group(piece, heads.heads, group))
            while wanted and wanted[0].group == group:
                tile = wanted.popleft()
                if ring.upcoming != tile:
                    ring.flush()
                    self._schedule.restart(wanted)
                slot = ring.take(tile)
                ring.prefetch(self._schedule.next_tile)  # load next
                total.add(heads.unpack(tile, slot))  # attend this
                ring.give_back()
            if collect:
                totals.append(total)
            else:
                total.finish(out)
        if collect:
            newest.join(totals)
            newest.finish(out)

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

    def clone(self) -> Runner:
        """An independent copy of everything stored."""
        twin = Runner(self.settings, engine=self._engine_for)
        for index, layer in self.layers.items():
            twin._prepare_device(layer.device)
            ranges = [heads.clone(twin._tier(heads, layer.device)) for heads in layer.ranges]
            twin.layers[index] = Layer(index, layer.shape, layer.device, ranges)
        return twin

    def close(self) -> None:
        """Free every layer, buffer and mapping."""
        for index in list(self.layers):
            self.drop(index)
        for engine in self._engines.values():
            engine.drain()
        self._rings.clear()
        self._buffers.clear()
        if self._host is not None:
            self._host.close()
        for tier in self._device_tiers.values():
            tier.close()
        self._host = None
        self._device_tiers.clear()

    def stats(self) -> Stats:
        """Bytes held now and moved so far."""
        found = Stats()
        for ring in self._rings.values():
            found.staging_bytes += self.settings.num_slots * self.settings.slot_bytes
            found.loaded_bytes += ring.loaded_bytes
            found.loaded_tiles += ring.loaded_tiles
            found.dropped_tiles += ring.dropped_tiles
        found.staging_bytes += sum(2 * buffers.nbytes for buffers in self._buffers.values())
        for layer in self.layers.values():
            for heads in layer.ranges:
                if isinstance(heads, OffloadedHeads):
                    found.tail_bytes += heads.tail_bytes
                    found.written_bytes += heads.written_bytes
        if self._host is not None:
            found.host_bytes = self._host.used_bytes
        found.resident_bytes = sum(tier.used_bytes for tier in self._device_tiers.values())
        return found

    @property
    def pin_failure(self) -> str | None:
        """Why host memory could not be page-locked; None when it is, or need not be."""
        return None if self._host is None else self._host.pin_failure

    @property
    def _impl(self) -> str:
        return self.settings.attention

    def _settle(self) -> None:
        """What is stored is about to change other than by appending."""
        if self._current is not None and self._current.offloaded is not None:
            self._current.offloaded.forget_recent()
        self._current = None
        for ring in self._rings.values():
            ring.flush()
        self._schedule.stop()

    def _layer_holding(self, index: int, length: int) -> Layer:
        layer = self.layers.get(index)
        if layer is None or length > layer.length:
            held = 0 if layer is None else layer.length
            raise CacheStateError(
                f"layer {index} holds {held} tokens, attention wants {length}: the cache was "
                "cropped or reset since these keys were handed out; run the forward pass again"
            )
        return layer

    def _new_layer(self, index: int, k: Tensor, v: Tensor) -> Layer:
        shape = KVShape(k.shape[1], k.shape[-1], v.shape[-1], k.dtype)
        self._prepare_device(k.device)
        settings, count = self.settings, shape.num_kv_heads
        resident = count
        if settings.staging:
            planned = settings.resident_heads
            resident = min(planned[index] if index < len(planned) else 0, count)
        ranges: list[DirectHeads | OffloadedHeads] = []
        if resident:
            # Without staging the tier compute reads in place is host memory itself.
            tier = self._device_tier(k.device) if settings.staging else self._host_tier()
            ranges.append(
                DirectHeads(
                    tier,
                    shape,
                    HeadGroup(0, resident),
                    expected_tokens=settings.expected_tokens,
                )
            )
        if resident < count:
            ranges.append(
                OffloadedHeads(
                    self._host_tier(),
                    shape,
                    HeadGroup(resident, count),
                    engine=self._engines[k.device],
                    device=k.device,
                    fmt=format_named(settings.kv_format),
                    expected_tokens=settings.expected_tokens,
                )
            )
        return Layer(index, shape, k.device, ranges)

    def _prepare_device(self, device: torch.device) -> None:
        """Streams and buffers, once per compute device and never again."""
        if device in self._engines:
            return
        settings = self.settings
        if not settings.staging and device.type != "cpu":
            raise HeadInferError(
                f"staging=False attends host memory in place, which {device} cannot; leave "
                "staging out, or set it to True"
            )
        engine = self._engines[device] = self._engine_for(device)
        if not settings.staging:
            return
        size = settings.slot_bytes + aligned(1)
        slots = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in range(settings.num_slots)
        ]
        self._rings[device] = StagingRing(engine, slots, self._load, poison=settings.poison)
        self._buffers[device] = WriteBuffers(engine, device, settings.write_bytes)

    def _load(self, tile: Tile, slot: Tensor) -> tuple[list[Copy], list[Ticket]]:
        heads = self.layers[tile.layer].offloaded
        if heads is None:
            raise CacheStateError(f"layer {tile.layer} has no offloaded heads to stage")
        return heads.load(tile, slot), [heads.last_write]

    def _tiles_of_layer(self, index: int) -> Iterator[Tile]:
        layer = self.layers.get(index)
        if layer is None or layer.offloaded is None:
            return iter(())
        return self._tiles(layer, layer.offloaded, layer.offloaded.store.stored)

    def _tiles(self, layer: Layer, heads: OffloadedHeads, length: int) -> Iterator[Tile]:
        return tiles(
            layer.index,
            heads.heads,
            length,
            slot_bytes=self.settings.slot_bytes,
            token_bytes=layer.shape.token_bytes(max(heads.store.batch, 1)),
            epoch=heads.store.epoch,
        )

    def _tier(
        self, heads: DirectHeads | OffloadedHeads, device: torch.device
    ) -> HostTier | DeviceTier:
        if isinstance(heads, DirectHeads) and self.settings.staging:
            return self._device_tier(device)
        return self._host_tier()

    def _host_tier(self) -> HostTier:
        if self._host is None:
            pin = any(device.type == "cuda" for device in self._engines)
            self._host = HostTier(budget_bytes=self.settings.host_bytes, pin=pin)
        return self._host

    def _device_tier(self, device: torch.device) -> DeviceTier:
        if device not in self._device_tiers:
            self._device_tiers[device] = DeviceTier(device)
        return self._device_tiers[device]


def attend_in_memory(query: Query, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `query` over plain k, v [b, h, s, d], [b, t, h, d]: the same arithmetic as over
    a cache, for what the fused kernels of transformers do not take."""
    batch, heads, rows, _ = query.q.shape
    total = _Total(query, query.q, (0, heads), AUTO, collect=False)
    total.add(Piece(0, k, v))
    out = query.q.new_empty(batch, rows, heads, query.value_dim)
    total.finish(out)
    return out


class _Total:
    """Partials of some query heads, merged as they come or, when small, all at the end."""

    def __init__(
        self, query: Query, q: Tensor, heads: tuple[int, int], impl: str, collect: bool
    ) -> None:
        self._query = query
        self._q = q[:, heads[0] : heads[1]]
        self._heads = heads
        self._impl = impl
        self._collect = collect
        self._parts: list[Partial] = []  # each over all rows
        self._owned = False  # whether the only part may be merged into

    @property
    def partial(self) -> Partial:
        """Everything added so far; an identity if nothing was."""
        if not self._parts:
            batch, heads, rows, _ = self._q.shape
            shape = (batch, heads, rows, self._query.value_dim)
            self._parts, self._owned = [identity(shape, device=self._q.device)], True
        elif len(self._parts) > 1:
            self._parts, self._owned = [merge_all(self._parts)], True
        return self._parts[0]

    def add(self, piece: Piece) -> None:
        """Attend a piece of the context and merge what every row sees of it."""
        rows, keys = (0, self._q.shape[2]), (piece.start, piece.start + piece.k.shape[2])
        for block in self._query.recipe.blocks(rows, keys):
            start, stop = block.keys[0] - piece.start, block.keys[1] - piece.start
            step = stop - start
            if self._query.expand is not None and not block.causal:
                step = min(step, self._expand_tokens(piece))
            for first in range(start, stop, step):
                last = min(first + step, stop)
                bias = block.bias
                if bias is not None and step < stop - start:
                    bias = bias[..., first - start : last - start]
                k, v = piece.k[:, :, first:last], piece.v[:, :, first:last]
                self._add(block.rows, k, v, block.causal, bias)

    def join(self, groups: Sequence[_Total]) -> None:
        """Add what `groups` found, each for its share of these heads, in order."""
        if not groups:
            return
        counts = {len(group._parts) for group in groups}
        found = [group._parts if len(counts) == 1 else [group.partial] for group in groups]
        for over_heads in zip(*found, strict=True):
            if len(over_heads) == 1:
                self._parts.append(over_heads[0])
                continue
            outs, lses = zip(*over_heads, strict=True)
            self._parts.append(Partial(torch.cat(outs, dim=1), torch.cat(lses, dim=1)))
        self._owned = False

    def finish(self, out: Tensor) -> None:
        """Write the result into out [b, t, h, d]."""
        total = self.partial
        if self._query.sink is not None:
            total = add_sink(total, self._query.sink[self._heads[0] : self._heads[1]])
        out[:, :, self._heads[0] : self._heads[1]].copy_(total.out.transpose(1, 2))

    def _add(
        self, rows: tuple[int, int], k: Tensor, v: Tensor, causal: bool, bias: Tensor | None
    ) -> None:
        query = self._query
        if query.expand is not None:
            k, v = query.expand(k, v)
        if bias is not None and bias.shape[1] != 1:
            bias = bias[:, self._heads[0] : self._heads[1]]
        part = attend(
            self._q[:, :, rows[0] : rows[1]],
            k,
            v,
            scale=query.scale,
            causal=causal,
            bias=bias,
            softcap=query.softcap,
            impl=self._impl,
        )
        self._merge(rows, part)

    def _merge(self, rows: tuple[int, int], part: Partial) -> None:
        whole = rows == (0, self._q.shape[2])
        if whole and (self._collect or not self._parts):
            self._parts.append(part)
            self._owned = False
            return
        total = self.partial
        if not self._owned:
            total = Partial(total.out.to(torch.float32, copy=True), total.lse.clone())
            self._parts, self._owned = [total], True
        here = slice(rows[0], rows[1])
        merge_into(Partial(total.out[:, :, here], total.lse[:, :, here]), part)

    def _expand_tokens(self, piece: Piece) -> int:
        batch, heads, _, dim = self._q.shape
        width = heads * (dim + self._query.value_dim) * piece.k.element_size()
        return max(1, EXPAND_BYTES // (batch * width))


@dataclass(slots=True)
class _Schedule:
    """Which tiles will be wanted after those being attended.

    Layers are attended in the same order in every forward pass, so the order of the last one
    foretells this one; keys of later layers do not depend on this layer's result, and after the
    last layer the first one's are already complete for the next pass.
    """

    tiles_of: Callable[[int], Iterator[Tile]]
    _order: list[int] = field(default_factory=list)
    _lap_known: bool = False
    _at: int = -1
    _ahead: int = -1
    _wrapped: bool = False
    _pending: deque[Tile] = field(default_factory=deque)

    def reached(self, layer: int) -> None:
        """Attention of `layer` begins."""
        if self._at + 1 < len(self._order) and self._order[self._at + 1] == layer:
            self._at += 1
        elif self._order and self._order[0] == layer:
            # A new pass. One that ended early, or the first, shows where the order ends.
            self._order = self._order[: self._at + 1]
            self._lap_known = True
            self._at, self._wrapped = 0, False
            self._ahead = min(self._ahead, len(self._order) - 1)
        else:
            self._order = [*self._order[: self._at + 1], layer]
            self._at += 1
            self._lap_known = False

    def restart(self, pending: deque[Tile]) -> None:
        """The ring was flushed; what comes next is `pending`, then the layers after this one."""
        self._pending = deque(pending)
        self._ahead, self._wrapped = self._at, False

    def stop(self) -> None:
        """Stored tokens changed: nothing is foretold until the next attention call."""
        self._pending.clear()
        self._ahead, self._wrapped = self._at, False

    def next_tile(self) -> Tile | None:
        """The next tile to stage, None if that cannot be said yet."""
        while not self._pending:
            following = self._ahead + 1
            wrapped = self._wrapped
            if following >= len(self._order):
                following, wrapped = 0, True
                if self._wrapped or not self._lap_known:
                    return None
            # A layer's tiles for the next pass are complete once this pass has extended it.
            if wrapped and following > self._at:
                return None
            self._ahead, self._wrapped = following, wrapped
            self._pending.extend(self.tiles_of(self._order[following]))
        return self._pending.popleft()


def _default_engine(device: torch.device) -> TransferEngine:
    return CudaEngine(device) if device.type == "cuda" else InlineEngine()


def _query_heads(layer: Layer, query: Query, group: HeadGroup) -> tuple[int, int]:
    per_kv = query.q.shape[1] // layer.shape.num_kv_heads
    return group.start * per_kv, group.stop * per_kv


def _of_group(piece: Piece, heads: HeadGroup, group: HeadGroup) -> Piece:
    mine = slice(group.start - heads.start, group.stop - heads.start)
    return Piece(piece.start, piece.k[:, mine], piece.v[:, mine])


def _check(layer: Layer, k: Tensor, v: Tensor) -> None:
    found = KVShape(k.shape[1], k.shape[-1], v.shape[-1], k.dtype)
    if found != layer.shape:
        raise CacheStateError(
            f"layer {layer.index} holds {layer.shape} and is given {found}; use a new cache"
        )
    if k.device != layer.device:
        raise CacheStateError(
            f"layer {layer.index} attends on {layer.device} and is given keys on {k.device}; "
            "use a new cache"
        )
