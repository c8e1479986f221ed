# SPDX-License-Identifier: Apache-2.0
"""What a format makes of a model's keys and values, in bytes, before any of them exist."""

from __future__ import annotations

from collections.abc import Sequence

from headinfer.blocks import CHUNK_BYTES, LABEL_BYTES, WRITES_AHEAD, BlockLayout, why_not_packed
from headinfer.geometry import LOSSLESS, Geometry, LayerGeometry
from headinfer.layout import ALIGNMENT, BLOCK_TOKENS, aligned

MARGIN = 0.01
"""Of the slots: room for blocks that have to be stored raw, 4 % of them. Of SmolLM2's keys 0.02 %
were, of its values none (docs/lossless.md)."""

DISK_MARGIN = 0.0025
"""Of the slots where some of them lie on disk: room in host memory for the overflow of blocks that are
raw, 0.7 % of them."""


def why_plain(geometry: Geometry) -> str | None:
    """Why no layer's keys and values can be packed; None if some can."""
    reasons = [_why_plain(geometry, layer) for layer in geometry.full_layers]
    return reasons[0] if reasons and None not in reasons else None


def packs(geometry: Geometry, kv_format: str) -> bool:
    """Whether `kv_format` packs the keys and values of some layer."""
    return kv_format == LOSSLESS.name and bool(geometry.full_layers) and why_plain(geometry) is None


def stored_head_bytes(
    geometry: Geometry, layer: LayerGeometry, tokens: int, *, kv_format: str, in_place: bool
) -> int:
    """Bytes of one KV head over `tokens` tokens of one sequence in host memory."""
    if kv_format != LOSSLESS.name or _why_plain(geometry, layer) is not None:
        whole = tokens if in_place else tokens // BLOCK_TOKENS * BLOCK_TOKENS
        return layer.head_bytes(whole, geometry.itemsize)
    # Where a CPU attends in place the unfinished block is there too.
    rest = layer.head_bytes(BLOCK_TOKENS, geometry.itemsize) if in_place else 0
    return int(_slots_bytes(layer, tokens) * (1 + MARGIN)) + rest + 2 * ALIGNMENT


def slotted_head_bytes(
    geometry: Geometry, layer: LayerGeometry, tokens: int, *, kv_format: str
) -> int:
    """As `stored_head_bytes`, of whole blocks alone, and without what raw ones have beside."""
    if kv_format != LOSSLESS.name or _why_plain(geometry, layer) is not None:
        return layer.head_bytes(tokens // BLOCK_TOKENS * BLOCK_TOKENS, geometry.itemsize)
    return _slots_bytes(layer, tokens)


def resident_head_bytes(
    geometry: Geometry, layer: LayerGeometry, tokens: int, *, kv_format: str
) -> int:
    """Of one KV head that a CPU attends in host memory while others lie on disk; tails aside."""
    if kv_format != LOSSLESS.name or _why_plain(geometry, layer) is not None:
        return layer.head_bytes(tokens, geometry.itemsize)
    return _slots_bytes(layer, tokens) + 2 * ALIGNMENT


def run_padding(geometry: Geometry, layer: LayerGeometry, *, kv_format: str, page: int) -> int:
    """What each head and row of a segment takes at most beside its keys and values for both to begin
    on a page."""
    sizes = [dim * geometry.itemsize * BLOCK_TOKENS for dim in (layer.key_dim, layer.value_dim)]
    if kv_format == LOSSLESS.name and _why_plain(geometry, layer) is None:
        sizes = [BlockLayout(dim).slot_bytes for dim in (layer.key_dim, layer.value_dim)]
    return sum(page for size in sizes if size % page)


def kept_bytes(
    geometry: Geometry,
    heads: Sequence[int],
    *,
    tokens: int,
    batch: int,
    chunk_tokens: int,
    in_place: bool,
) -> int:
    """Host memory for what packed blocks of `heads` per layer have beside their slots, which may lie
    on disk: a label of each, the overflow of raw ones, and that set aside for those being encoded."""
    total, dims = 0, set()
    for layer, count in zip(geometry.layers, heads, strict=True):
        if count and _why_plain(geometry, layer) is None:
            blocks = batch * count * (tokens // BLOCK_TOKENS)
            total += int(batch * count * _slots_bytes(layer, tokens) * DISK_MARGIN)
            # A segment's labels are an extent, and segments double.
            segments = 2 + max(tokens // (8 * BLOCK_TOKENS), 1).bit_length()
            total += 2 * blocks * LABEL_BYTES + segments * ALIGNMENT
            dims |= {layer.key_dim, layer.value_dim}
    if not dims:
        return 0
    chunk = min(chunk_tokens, tokens) if tokens else chunk_tokens
    total += len(dims) * CHUNK_BYTES  # what was taken of the last one
    return total + overflow_bytes(geometry, batch=batch, chunk_tokens=chunk, in_place=in_place)


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


def _slots_bytes(layer: LayerGeometry, tokens: int) -> int:
    dims = layer.key_dim, layer.value_dim
    return tokens // BLOCK_TOKENS * sum(BlockLayout(dim).slot_bytes for dim in dims)
