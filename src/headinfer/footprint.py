# SPDX-License-Identifier: Apache-2.0
"""Bytes that the parts of a run take: activations, staging, write-back buffers, resident heads.

Counting only; what is kept where is decided in `headinfer.plan`.
"""

from __future__ import annotations

from headinfer.budget import MIB
from headinfer.errors import BudgetTooSmall
from headinfer.geometry import EXACT, LOSSLESS, Geometry, LayerGeometry, LayerKind
from headinfer.layout import BLOCK_TOKENS, aligned
from headinfer.options import Options
from headinfer.packing import packs

SLOT_BYTES = 64 * MIB
"""One KV head of 128 dims over 128K tokens in bf16: long enough for the launches of a tile to take
less time than its copy on slow hosts too."""
NUM_SLOTS = 3
"""One that is attended, one that is there, one on its way."""
WRITE_BYTES = 16 * MIB
LEAST_SLOTS = 2
LEAST_SLOT_BYTES = MIB // 4
WORKSPACE_BYTES = 192 * MIB
"""cuBLAS and cuDNN workspaces."""
SLACK_SHARE = 0.8
"""Of the activations: what torch's caching allocator holds in blocks too small for the next
request. Measured on an H200 with a Llama-3-8B shape, 0.5 GiB for 0.9 GiB of activations."""


def activation_bytes(geometry: Geometry, chunk_tokens: int, batch: int = 1) -> int:
    """Predicted peak of activations in a forward pass over `chunk_tokens` tokens.

    The MLP's gate, up and product, and a handful of residual-sized tensors live at once; in
    attention, queries, outputs and float32 sums of a head group, which is less for all models
    whose MLP is wider than three times their hidden size.
    """
    heads = max((layer.num_query_heads for layer in geometry.layers), default=0)
    dim = max((max(layer.attended_dims) for layer in geometry.layers), default=0)
    mlp = 3 * geometry.intermediate_size + 4 * geometry.hidden_size
    attention = 4 * geometry.hidden_size + 4 * heads * dim
    logits = batch * geometry.vocab_size * (geometry.itemsize + 4)
    return batch * chunk_tokens * max(mlp, attention) * geometry.itemsize + logits


def slots_of(options: Options) -> tuple[int, int]:
    """Bytes of a staging slot, and slots."""
    return options.tile_bytes or SLOT_BYTES, options.num_slots or NUM_SLOTS


def write_buffer_bytes(geometry: Geometry, options: Options, chunk: int, batch: int) -> int:
    """One chunk of the widest layer, at most `WRITE_BYTES`: longer chunks pass in pieces."""
    widest = max(
        (layer.kv_bytes(BLOCK_TOKENS, geometry.itemsize) for layer in geometry.full_layers),
        default=0,
    )
    blocks = -(-chunk // BLOCK_TOKENS) + 1
    # Encoded blocks stand beside the plain ones.
    least = batch * widest * (2 if options.kv_format == LOSSLESS.name else 1)
    return max(min(batch * widest * blocks, WRITE_BYTES), aligned(least)) + aligned(1)


def unpacked_bytes(geometry: Geometry, options: Options, slot_bytes: int, batch: int) -> int:
    """The buffer that packed tiles are unpacked into; 0 where none are.

    Raises:
        BudgetTooSmall: a staging slot cannot hold one block of one head.
    """
    if not packs(geometry, options.kv_format or EXACT.name):
        return 0
    block = max(
        batch * layer.head_bytes(BLOCK_TOKENS, geometry.itemsize) for layer in geometry.full_layers
    )
    if slot_bytes < block:
        raise BudgetTooSmall(
            f"a staging slot of {slot_bytes} B cannot hold one block of one head, {block} B, which "
            f"is what the lossless format moves; set tile_bytes to {block} or more, or "
            "kv_format='exact'",
            tier="gpu",
            budget_bytes=slot_bytes,
            needed_bytes=block,
        )
    return slot_bytes


def offloadable_heads(layer: LayerGeometry) -> int:
    """KV heads of a layer that may lie elsewhere."""
    return layer.num_kv_heads if layer.kind is LayerKind.FULL else 0


def residents_of(geometry: Geometry, heads: int) -> tuple[int, ...]:
    """`heads` resident KV heads in every layer that has as many."""
    return tuple(min(heads, offloadable_heads(layer)) for layer in geometry.layers)


def bytes_of_residents(
    geometry: Geometry, residents: tuple[int, ...], tokens: int, batch: int
) -> int:
    """GPU memory of resident heads over `tokens` tokens."""
    return sum(
        batch * heads * layer.head_bytes(tokens, geometry.itemsize)
        for heads, layer in zip(residents, geometry.layers, strict=True)
    )
