# SPDX-License-Identifier: Apache-2.0
"""How much of what host memory cannot hold goes to disk, and what the way there takes.

Where the CPU computes, whole heads stay in host memory and the others lie on disk; beside a GPU,
segments go to disk when host memory is full. Counts bytes only.
"""

from __future__ import annotations

from typing import NamedTuple

from headinfer.budget import MIB
from headinfer.geometry import Geometry, LayerKind
from headinfer.layout import BLOCK_TOKENS, aligned

PAGE = 4096
"""What direct I/O is aligned to, and extents of a file with it."""

SLOT_BYTES = 8 * MIB
"""Of the ring where the CPU computes: several reads of the full rate's size, few enough bytes to
count against a small budget."""
NUM_SLOTS = 6
LEAST_SLOT_BYTES = MIB // 4
WRITE_BYTES = 8 * MIB
WRITE_BUFFERS = 4
"""Page-locked buffers of `WRITE_BYTES` that blocks pass on their way from a GPU to disk."""

BUFFER_SHARE = 4
"""Buffers take no more of the host budget than one part of this many, if they can be that small."""


class Ring(NamedTuple):
    """What lies between disk and compute: sizes in bytes."""

    slot_bytes: int
    num_slots: int
    write_bytes: int
    buffer_bytes: int


def ring_on_cpu(
    geometry: Geometry,
    *,
    batch: int,
    budget: int | None,
    slot_bytes: int | None,
    num_slots: int | None,
    write_bytes: int,
) -> Ring:
    """Slots that a disk is read into and the CPU attends, and buffers of blocks to be written."""
    block = max(
        (layer.kv_bytes(BLOCK_TOKENS, geometry.itemsize) for layer in geometry.full_layers),
        default=0,
    )
    tails = batch * geometry.offloadable_bytes(BLOCK_TOKENS)
    least_write = aligned(batch * block) + aligned(1)
    slot, slots = slot_bytes or SLOT_BYTES, num_slots or NUM_SLOTS
    write = max(min(write_bytes, WRITE_BYTES), least_write)
    while True:
        ring = Ring(slot, slots, write, slots * (slot + 3 * PAGE) + 2 * write + tails)
        small = budget is None or ring.buffer_bytes <= budget // BUFFER_SHARE
        fixed = slot_bytes is not None or slot <= LEAST_SLOT_BYTES
        if small or (fixed and write == least_write):
            return ring
        slot = slot if fixed else slot // 2
        write = max(write // 2, least_write)


def buffers_beside_gpu(slot_bytes: int, num_slots: int) -> int:
    """Page-locked memory between disk and a GPU."""
    return (num_slots + 1) * (slot_bytes + 3 * PAGE) + WRITE_BUFFERS * WRITE_BYTES


def heads_in_host(
    geometry: Geometry, *, tokens: int, batch: int, room: int | None, most: int | None
) -> tuple[int, ...]:
    """Per layer, the KV heads that fit `room` bytes of host memory, spread evenly over layers; at
    most `most` of each."""
    counts = [
        min(layer.num_kv_heads, layer.num_kv_heads if most is None else most)
        if layer.kind is LayerKind.FULL
        else 0
        for layer in geometry.layers
    ]
    if room is None:
        return tuple(counts)
    heads, used = [0] * len(counts), 0
    for step in range(1, max(counts, default=0) + 1):
        for place, layer in enumerate(geometry.layers):
            if step > counts[place]:
                continue
            more = batch * layer.head_bytes(tokens, geometry.itemsize) + aligned(1)
            if used + more > room:
                return tuple(heads)
            heads[place], used = step, used + more
    return tuple(heads)


def bytes_on_disk(geometry: Geometry, heads: tuple[int, ...], *, tokens: int, batch: int) -> int:
    """What the file grows to when all but `heads` of each layer lie there."""
    stored = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    total = 0
    for place, layer in enumerate(geometry.layers):
        below = (layer.num_kv_heads if layer.kind is LayerKind.FULL else 0) - heads[place]
        if below and stored:
            # Segments double, and each begins on a page.
            segments = 2 + max(stored // (8 * BLOCK_TOKENS), 1).bit_length()
            size = batch * below * layer.head_bytes(stored, geometry.itemsize)
            total += size + segments * (PAGE + aligned(1))
    return -(-total // PAGE) * PAGE
