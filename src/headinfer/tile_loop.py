# SPDX-License-Identifier: Apache-2.0
"""The only loop over tiles: load next, attend this. And what it merges with: the newest tokens, heads
attended where they lie, and what the CPU finds in host memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from headinfer.attention.api import SHORT_QUERY_TOKENS
from headinfer.attention.merge_ahead import compile_ahead
from headinfer.balance import Balance
from headinfer.heads import OffloadedHeads, Piece, of_group
from headinfer.layer import Layer, RunnerSettings
from headinfer.layout import HeadGroup, Tile, tiles
from headinfer.link import Link
from headinfer.near import host_query
from headinfer.resident_decode import ResidentDecode
from headinfer.totals import Query, Total, heads_apart
from headinfer.transfer import Copy, Ticket

NEAR_BYTES = 8 * 2**20
"""Offloaded keys and values of a layer below which the CPU is not asked while its share adapts:
waiting for the queries would cost more than bringing the keys."""

TOGETHER_BYTES = 8 * 2**20
"""Outputs up to this size attend the newest tokens of all head groups in one call."""


class TileLoop:
    """Attention over the layers of one runner, and which of their heads the CPU attends.

    Args:
        settings: as decided.
        layers: the runner's, by index; later ones are seen.

    Attributes:
        resident: of these, what layers with nothing to stream are in decode.
    """

    def __init__(self, settings: RunnerSettings, layers: Mapping[int, Layer]) -> None:
        self._settings = settings
        self._layers = layers
        self._balance = Balance(settings.near_share, settings.near_adapts)
        self._shares = settings.staging and bool(settings.near_share or settings.near_adapts)
        self._near_now = False
        self.resident = ResidentDecode(settings, layers)
        self._before: dict[int, int] = {}  # per layer, offloaded heads of the layers below it

    def attend(self, layer: Layer, link: Link, length: int, query: Query) -> Tensor:
        """Attention of `query` over the first `length` tokens of `layer`, whose device `link` leads
        to, [b, t, h, d].

        Raises:
            UnsupportedAttention: no implementation runs the call.
        """
        if not layer.offloaded:
            if query.q.shape[2] >= SHORT_QUERY_TOKENS:
                self.resident.expect(layer, query)
            else:
                found = self.resident.attend(layer, length, query)
                if found is not None:
                    return found
        q = query.q.contiguous()
        batch, num_heads, rows, _ = q.shape
        out = q.new_empty(batch, rows, num_heads, query.value_dim)
        # Resident layers are alike, and where nothing came before there is but one shape: all heads
        # over a square.
        apart = bool(layer.offloaded) and length > rows
        apart = apart and heads_apart(query, layer.shape.num_kv_heads, self._settings.attention)
        call = _Call(layer, link, length, query, q, out, apart)
        if layer.offloaded:
            self._foresee(call)
            # A prompt of several chunks.
            if (
                rows >= SHORT_QUERY_TOKENS
                and max((self._settings.expected_tokens or 0) // 2, length) > rows
            ):
                compile_ahead(q.device, q.dtype, query.value_dim, sink=query.sink is not None)
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
        layer, link = call.layer, call.link
        if link.ring.upcoming is None:
            # Nothing is listed ahead, which is when shares are dealt out as a rule; and nothing is
            # under way that would have to stay as it is. So it is while the CPU has all heads.
            self.share_out(layer)
        call.near = self._near_query(call)
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
        group, link = call.below[heads.heads], call.link
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
        link, wanted = call.link, call.wanted
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
        return Total(call.query, call.q, heads, self._settings.attention, collect)

    def _near_query(self, call: _Call) -> Query | None:
        """The call as the CPU answers it for its share of the heads; None if all stream."""
        if call.link.near is None:
            return None
        held = sum(heads.stored_bytes for heads in call.layer.offloaded)
        if self._balance.adapts and held < NEAR_BYTES:
            return None
        return host_query(call.query)

    def load(self, tile: Tile, slot: Tensor) -> tuple[list[Copy], list[Ticket]]:
        """The copies that bring `tile` into a slot of the ring, and what they come after."""
        heads = self._layers[tile.layer].offloaded_with(tile.group)
        return heads.load_again(tile, slot), [heads.last_write]

    def tiles_of(self, index: int) -> Iterator[Tile]:
        """The tiles that layer `index` will ask for, as far as that can be said."""
        layer = self._layers.get(index)
        if layer is None:
            return
        self.share_out(layer)
        for heads in layer.offloaded:
            yield from self._tiles(layer, heads, heads.store.stored)

    def share_out(self, layer: Layer) -> None:
        """Between two visits of a layer its heads may change sides."""
        if not self._shares:
            return
        if layer.index not in self._before:
            self._count()
        before = self._before[layer.index]
        for heads in layer.offloaded:
            heads.near_heads = self._balance.heads(before, heads.heads.heads)
            before += heads.heads.heads

    def forget_places(self) -> None:
        """Layers came, went, or have other heads offloaded than before."""
        self._before.clear()

    def _count(self) -> None:
        found = 0
        for index in sorted(self._layers):
            self._before[index] = found
            found += sum(heads.heads.heads for heads in self._layers[index].offloaded)

    def _tiles(self, layer: Layer, heads: OffloadedHeads, length: int) -> Iterator[Tile]:
        near = heads.near_heads if self._near_now else 0
        return tiles(
            layer.index,
            HeadGroup(heads.heads.start + near, heads.heads.stop),
            length,
            slot_bytes=self._settings.slot_bytes,
            token_bytes=layer.shape.token_bytes(max(heads.store.batch, 1)),
            epoch=heads.store.epoch,
        )


@dataclass(slots=True)
class _Call:
    """One attention call on its way.

    Attributes:
        layer, link, length, query: as asked.
        q: contiguous queries.
        out: [b, t, h, d], filled head range by head range.
        near: the call as the CPU answers it for its heads; None if every head streams.
        below: per offloaded range, the heads the CPU attends.
        wanted: tiles of the heads that stream, in order.
    """

    layer: Layer
    link: Link
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
