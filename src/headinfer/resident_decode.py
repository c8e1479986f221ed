# SPDX-License-Identifier: Apache-2.0
"""Decode over layers whose heads are all resident: kernels that find keys by a table, which recorded
steps can contain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.attention import placed
from headinfer.attention.api import AUTO
from headinfer.attention.masks import Causal
from headinfer.attention.placed import Kind, Place, PlaceTable
from headinfer.heads import DirectHeads, KVShape
from headinfer.layer import Layer, RunnerSettings
from headinfer.totals import Query


class ResidentDecode:
    """The layers of one runner that decode can attend by their place.

    Args:
        settings: as decided.
        layers: the runner's, by index; later ones are seen.
    """

    def __init__(self, settings: RunnerSettings, layers: Mapping[int, Layer]) -> None:
        self._settings = settings
        self._layers = layers
        self._tables: dict[torch.device, PlaceTable] = {}
        self._asked: dict[int, _Manner] = {}
        self._compiled: set[tuple[KVShape, _Manner, int, torch.device]] = set()

    def expect(self, layer: Layer, query: Query) -> None:
        """`layer` was asked `query`; tokens are likely to come, asked in the same way."""
        asked = self._asked[layer.index] = _manner(query)
        self._ready(layer.shape, asked, 1, layer.device)

    def places(self, tokens: int, *, batch: int) -> dict[int, Place]:
        """By layer, where keys and values lie of those that `tokens` new tokens of `batch` sequences can
        attend by it."""
        found = {}
        for index, layer in self._layers.items():
            asked = self._asked.get(index)
            if asked is None or not self._ready(layer.shape, asked, tokens, layer.device):
                continue
            place = self._place(layer, tokens, batch)
            if place is not None:
                found[index] = place
        return found

    def attend(self, layer: Layer, length: int, query: Query) -> Tensor | None:
        """Attention of `query` over all tokens of `layer`, the newest of which are its own, [b, t, h, d];
        None where the kernels do not take that, or are not compiled yet."""
        rows = query.q.shape[2]
        recipe = query.recipe
        if type(recipe) is not Causal or recipe.offset + rows != length or layer.length != length:
            return None
        place = self._place(layer, 0, query.q.shape[0])
        asked = self._asked[layer.index] = _manner(query)
        if place is None or not self._ready(layer.shape, asked, rows, layer.device):
            return None
        table = self._tables.get(layer.device)
        if table is None:
            table = self._tables[layer.device] = PlaceTable(layer.device)
        table.length.fill_(length - rows)
        return attend_at(table.row(layer.index, place), table.length, query, layer.shape)

    def _place(self, layer: Layer, tokens: int, batch: int) -> Place | None:
        heads = layer.ranges[0]
        if len(layer.ranges) > 1 or not isinstance(heads, DirectHeads):
            return None
        return heads.place(tokens, batch=batch)

    def _ready(self, shape: KVShape, asked: _Manner, rows: int, device: torch.device) -> bool:
        if self._settings.attention != AUTO or not asked.plain:
            return False
        key = shape, asked, rows, device
        if key in self._compiled:
            return True
        kind = Kind(
            dtype=shape.dtype,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            q_per_kv=asked.heads // shape.num_kv_heads,
            rows=rows,
            softcap=asked.softcap,
        )
        if placed.ready(kind, device):
            self._compiled.add(key)
            return True
        return False


class _Manner(NamedTuple):
    """How a layer is asked: what of a query outlasts it."""

    heads: int
    softcap: bool
    plain: bool


def _manner(query: Query) -> _Manner:
    return _Manner(query.q.shape[1], query.softcap is not None, attends_at_places(query))


def attends_at_places(query: Query) -> bool:
    """Whether `query` has nothing that the kernels leave out."""
    gradient = torch.is_grad_enabled() and query.q.requires_grad
    return query.sink is None and query.expand is None and not gradient


def attend_at(place: Tensor, length: Tensor, query: Query, shape: KVShape) -> Tensor:
    """Attention of `query` over the `length` tokens at `place` and its own, which follow, [b, t, h, d]."""
    batch, heads, rows, _ = query.q.shape
    out = query.q.new_empty(batch, rows, heads, query.value_dim)
    placed.attend(
        query.q,
        place,
        length,
        out,
        kv_heads=shape.num_kv_heads,
        scale=query.scale,
        softcap=query.softcap,
    )
    return out
