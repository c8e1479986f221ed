# SPDX-License-Identifier: Apache-2.0
"""How long the host takes to enqueue a step: Python and launches, layer by layer, tile by tile.

A GPU that is quick, chunks that are short and a host that is slow make that the path that decides.
"""

from __future__ import annotations

from headinfer.decision import Plan
from headinfer.geometry import LayerGeometry, LayerKind
from headinfer.layout import span_tokens
from headinfer.packing import packs
from headinfer.rates import Rates

CUT_S = 1.2e-3
"""What a token takes longer where its step is not recorded as a whole: layers with heads elsewhere are enqueued
between two recordings, and what comes after the last of them when the GPU has nothing else to do. As on H200s,
with one such layer or half of all; an assumption elsewhere."""
STREAMED_LAYER_S, TILE_S, PACKED_TILE_S = 0.75e-3, 0.4e-3, 0.7e-3
"""What enqueueing a token takes the host for a layer with offloaded heads, and for each of its tiles, plain or
packed: as the hosts of H200s did while their CPUs attended. Without that it is less, and the link decides. An
assumption elsewhere."""
CALL, TILE_CALLS = 1 / 10, 1.5
"""What a call of an attention kernel in a chunk takes, slices and merges with it, of a layer, on average over
those whose heads are resident and those whose heads stream; and what a tile takes beside the calls that attend
it, in calls. As H200s' hosts did, 0.2 to 0.3 ms a call; their speed changes by half from one second to the
next, and a call timed by itself came out at anything up to that. Assumptions elsewhere."""
PROBED_CALLS, PROBED_TILES = 3, 1
"""In the streamed layers whose time is in `Rates`."""
BLOCK_ROWS, MULTIPROCESSORS, LEAST_BUSY = 128, 132, 0.9
"""A chunk is attended head by head where the query rows of one keep a GPU busy: as
`headinfer.attention.few_shapes` has it, with an H100's multiprocessors; other devices have about as many
where this path matters."""


def token_s(plan: Plan, rates: Rates) -> float:
    """Seconds of a token beside reading weights and keys, and waiting for what lies elsewhere."""
    cut = plan.staging and not plan.host_computes and streamed_layers(plan)
    return _steps_s(plan, rates) + (CUT_S if cut else 0.0)


def tiles_s(plan: Plan, nbytes: float) -> float:
    """Seconds that the layers of a token take that have heads elsewhere, of which `nbytes` stream."""
    layers = streamed_layers(plan)
    # The last tile of a layer is half full, as tiles go.
    tiles = nbytes / plan.slot_bytes + layers / 2
    each = PACKED_TILE_S if packs(plan.geometry, plan.kv_format) else TILE_S
    return layers * STREAMED_LAYER_S + tiles * each


def chunk_s(plan: Plan, rates: Rates, *, past: int, new: int) -> float:
    """Seconds of a chunk of `new` tokens after `past`."""
    if rates.chunk_layer_s is None or rates.streamed_layer_s is None:
        return _steps_s(plan, rates)
    # Streaming adds to a layer; where it was measured to take less, the host was just quicker then.
    streamed_s = max(rates.streamed_layer_s, rates.chunk_layer_s)
    call_s = CALL * (rates.chunk_layer_s + streamed_s) / 2
    seconds = rates.token_s
    for layer, resident in zip(plan.geometry.layers, plan.resident_heads, strict=True):
        heads = layer.num_kv_heads - resident
        if not plan.staging or layer.kind is not LayerKind.FULL or heads <= 0:
            seconds += rates.chunk_layer_s
            continue
        tiles, calls = _tiles_and_calls(plan, layer, heads, past, new)
        more = calls - PROBED_CALLS + TILE_CALLS * (tiles - PROBED_TILES)
        seconds += streamed_s + max(more, 0.0) * call_s
    return seconds


def streamed_layers(plan: Plan) -> int:
    """Layers of which heads are offloaded."""
    layers = zip(plan.geometry.layers, plan.resident_heads, strict=True)
    return sum(x.kind is LayerKind.FULL and x.num_kv_heads > resident for x, resident in layers)


def _steps_s(plan: Plan, rates: Rates) -> float:
    return len(plan.geometry.layers) * rates.layer_s + rates.token_s


def _tiles_and_calls(
    plan: Plan, layer: LayerGeometry, heads: int, past: int, new: int
) -> tuple[int, float]:
    """Tiles in which `heads` of a layer stream, as `headinfer.layout.tiles` cuts them, and calls that
    attend them: a square of the chunk with itself, a full tile at once, and of what is left spans of a power of
    two chunks."""
    token_bytes = plan.batch * layer.head_bytes(1, plan.geometry.itemsize)
    longest = span_tokens(plan.slot_bytes, token_bytes)
    if past <= longest:
        together = min(plan.slot_bytes // (token_bytes * max(past, 1)), heads)
        groups = -(-heads // max(together, 1))
        tiles = groups if past else 0
    else:
        tiles, groups = heads * -(-past // longest), heads
    if _head_by_head(plan, layer, new):
        groups = heads
    full, rest = divmod(past, longest)
    if not rest:
        return tiles, groups * (1 + full)
    return tiles, groups * (1 + full + _spans(layer, plan.geometry.itemsize, rest, new))


def _head_by_head(plan: Plan, layer: LayerGeometry, new: int) -> bool:
    if (
        plan.batch > 1
        or layer.expansion_flops
        or not _built_per_shape(layer, plan.geometry.itemsize)
    ):
        return False
    blocks = -(-(layer.num_query_heads // layer.num_kv_heads * new) // BLOCK_ROWS)
    waves = -(-blocks // MULTIPROCESSORS)
    return blocks >= LEAST_BUSY * waves * MULTIPROCESSORS


def _spans(layer: LayerGeometry, itemsize: int, keys: int, rows: int) -> float:
    """Calls over `keys` keys of a tile that is not full, on average over numbers like this one: of the binary
    digits after the first every other one is 1."""
    if not _built_per_shape(layer, itemsize):
        return 1.0
    return 1 + (max(keys // rows, 1).bit_length() - 1) / 2


def _built_per_shape(layer: LayerGeometry, itemsize: int) -> bool:
    """Whether cuDNN attends it, as it does 16-bit types of most head dims."""
    return itemsize == 2 and layer.key_dim == layer.value_dim <= 128
