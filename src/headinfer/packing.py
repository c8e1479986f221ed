# SPDX-License-Identifier: Apache-2.0
"""What a format makes of a model's keys and values, in bytes, before any of them exist."""

from __future__ import annotations

from headinfer.blocks import CHUNK_BYTES, WRITES_AHEAD, BlockLayout, why_not_packed
from headinfer.geometry import LOSSLESS, Geometry, LayerGeometry
from headinfer.layout import ALIGNMENT, BLOCK_TOKENS, aligned

MARGIN = 0.01
"""Of the slots: room for blocks that have to be stored raw, 4 % of them. Of SmolLM2's keys 0.02 %
were, of its values none (docs/lossless.md)."""


def why_plain(geometry: Geometry) -> str | None:
    """Why no layer's keys and values can be packed; None if some can."""
    reasons = [_why_plain(geometry, layer) for layer in geometry.full_layers]
    return reasons[0] if reasons and None not in reasons else None


def stored_head_bytes(
    geometry: Geometry, layer: LayerGeometry, tokens: int, *, kv_format: str, in_place: bool
) -> int:
    """Bytes of one KV head over `tokens` tokens of one sequence in host memory."""
    if kv_format != LOSSLESS.name or _why_plain(geometry, layer) is not None:
        whole = tokens if in_place else tokens // BLOCK_TOKENS * BLOCK_TOKENS
        return layer.head_bytes(whole, geometry.itemsize)
    blocks = tokens // BLOCK_TOKENS
    slots = blocks * sum(BlockLayout(dim).slot_bytes for dim in (layer.key_dim, layer.value_dim))
    # Where a CPU attends in place the unfinished block is there too.
    rest = layer.head_bytes(BLOCK_TOKENS, geometry.itemsize) if in_place else 0
    return int(slots * (1 + MARGIN)) + rest + 2 * ALIGNMENT


def overflow_bytes(geometry: Geometry, *, batch: int, chunk_tokens: int, in_place: bool) -> int:
    """Host memory set aside for raw blocks among those being encoded: of a chunk of the layer that
    has most, for several writes at once unless each is over before the next."""
    writes = 1 if in_place else WRITES_AHEAD
    blocks = batch * writes * (-(-chunk_tokens // BLOCK_TOKENS) + 1)
    most: dict[int, int] = {}
    for layer in geometry.full_layers:
        if _why_plain(geometry, layer) is None:
            for dim in {layer.key_dim, layer.value_dim}:
                sides = (layer.key_dim == dim) + (layer.value_dim == dim)
                most[dim] = max(most.get(dim, 0), sides * layer.num_kv_heads * blocks)
    total = 0
    for dim, needed in most.items():
        size = BlockLayout(dim).entry_bytes
        chunk = max(1, CHUNK_BYTES // size)
        total += -(-needed // chunk) * aligned(chunk * size)
    return total


def ratio_of(geometry: Geometry, kv_format: str) -> float:
    """Bytes that stored blocks take by those they stand for, raw ones aside."""
    if kv_format != LOSSLESS.name:
        return 1.0
    stored = plain = 0
    for layer in geometry.full_layers:
        whole = layer.num_kv_heads * layer.head_bytes(BLOCK_TOKENS, geometry.itemsize)
        plain += whole
        if _why_plain(geometry, layer) is None:
            dims = layer.key_dim, layer.value_dim
            whole = layer.num_kv_heads * sum(BlockLayout(dim).slot_bytes for dim in dims)
        stored += whole
    return stored / plain if plain else 1.0


def ring_slot_bytes(geometry: Geometry, slot_bytes: int, kv_format: str) -> int:
    """What a staging slot takes for a tile of `slot_bytes` bytes of plain keys and values."""
    if kv_format != LOSSLESS.name:
        return slot_bytes
    most = 0.0
    for layer in geometry.full_layers:
        share = 1.0
        if _why_plain(geometry, layer) is None:
            dims = layer.key_dim, layer.value_dim
            blocks = sum(BlockLayout(dim).slot_bytes for dim in dims)
            share = blocks / layer.head_bytes(BLOCK_TOKENS, geometry.itemsize)
        most = max(most, share)
    return min(slot_bytes, aligned(int(slot_bytes * most)) + ALIGNMENT)


def _why_plain(geometry: Geometry, layer: LayerGeometry) -> str | None:
    return why_not_packed(geometry.dtype or "of an unknown type", layer.key_dim, layer.value_dim)
