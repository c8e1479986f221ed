# SPDX-License-Identifier: Apache-2.0
"""How much of what host memory cannot hold goes to disk, and what the way there takes.

Where the CPU computes, whole heads stay in host memory and the others lie on disk; beside a GPU,
segments go to disk when host memory is full. Counts bytes only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from headinfer.budget import MIB, format_bytes
from headinfer.decision import Plan
from headinfer.errors import BudgetTooSmall, InputError
from headinfer.footprint import write_buffer_bytes
from headinfer.geometry import EXACT, Geometry, LayerKind
from headinfer.layout import BLOCK_TOKENS, aligned
from headinfer.options import Options

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


def plan_on_cpu(geometry: Geometry, options: Options, batch: int, *, chunk: int) -> Plan:
    """Whole heads in host memory, attended in place; the others on disk, attended as they come."""
    if options.near_data not in (None, 1):
        raise InputError(
            f"near_data={options.near_data} was given, but on a CPU every head is attended there, "
            "which is near_data=1; leave it out"
        )
    tokens, budget = options.expected_tokens, options.budget
    ring = ring_on_cpu(
        geometry,
        batch=batch,
        budget=budget.host_bytes,
        slot_bytes=options.tile_bytes,
        num_slots=options.num_slots,
        write_bytes=write_buffer_bytes(geometry, options, chunk, batch),
    )
    _check_buffers(
        budget.host_bytes,
        ring.buffer_bytes,
        f"{ring.num_slots} slots of {format_bytes(ring.slot_bytes)}, the newest tokens of every layer, "
        "two buffers",
    )
    room = None if budget.host_bytes is None else budget.host_bytes - ring.buffer_bytes
    known = 0 if tokens is None else tokens  # unknown: all start in host memory
    heads = heads_in_host(
        geometry,
        tokens=known,
        batch=batch,
        room=room if known else None,
        most=options.resident_heads,
    )
    host = sum(
        aligned(batch * count * layer.head_bytes(known, geometry.itemsize)) + aligned(1)
        for count, layer in zip(heads, geometry.layers, strict=True)
        if count and known
    )
    plan = Plan(
        geometry=geometry,
        device="cpu",
        batch=batch,
        expected_tokens=tokens,
        chunk_tokens=chunk,
        slot_bytes=ring.slot_bytes,
        num_slots=ring.num_slots,
        write_bytes=ring.write_bytes,
        resident_heads=heads,
        resident_bytes=None,
        near_share=0.0,
        near_adapts=False,
        kv_format=options.kv_format or EXACT.name,
        budget=budget,
        gpu_parts={},
        host_bytes=host,
        reasons=(
            f"the model computes on the CPU: {_where_on_cpu(options, geometry, heads)}",
            (
                f"{format_bytes(ring.buffer_bytes)} of host memory are between disk and compute, "
                "whatever the context"
            ),
        ),
        disk=options.disk,
        disk_bytes=bytes_on_disk(geometry, heads, tokens=known, batch=batch),
        disk_buffer_bytes=ring.buffer_bytes,
        host_computes=True,
    )
    return _within_disk(plan, plan.disk_bytes)


def _where_on_cpu(options: Options, geometry: Geometry, heads: tuple[int, ...]) -> str:
    total = sum(layer.num_kv_heads for layer in geometry.full_layers)
    if options.expected_tokens is None:
        return f"layers move to {options.disk} once host memory is full"
    if sum(heads) == total:
        return "all are in host memory, attended in place; the disk is not needed"
    return (
        f"{sum(heads)} of {total} KV heads are in host memory, attended in place; the others are "
        f"attended as they come from {options.disk}"
    )


def with_spill(plan: Plan, size: int) -> Plan:
    """`size` bytes leave the GPU: host memory is filled first, then the disk."""
    room = plan.host_room
    if room is None or size <= room:
        return replace(plan, host_bytes=size)
    check_page_locked(plan)
    tokens, geometry = plan.expected_tokens or 0, plan.geometry
    # A segment lies in one of the two: of host memory, up to the largest one may stay unused.
    most = min(tokens, max(tokens // 2, 8 * BLOCK_TOKENS, plan.chunk_tokens))
    largest = max(
        plan.batch * layer.kv_bytes(most, geometry.itemsize) for layer in geometry.full_layers
    )
    segments = len(geometry.layers) * (2 + max(tokens // (8 * BLOCK_TOKENS), 1).bit_length())
    below = min(size, size - room + largest) + segments * PAGE
    reason = (
        f"{format_bytes(size - room)} go to {plan.disk} once {format_bytes(room)} of host memory are "
        f"full; {format_bytes(plan.disk_buffer_bytes)} of it are between disk and GPU"
    )
    found = replace(plan, host_bytes=room, disk_bytes=below, reasons=(*plan.reasons, reason))
    return _within_disk(found, below)


def check_page_locked(plan: Plan) -> None:
    _check_buffers(
        plan.budget.host_bytes,
        plan.disk_buffer_bytes,
        f"page-locked: one beside each of {plan.num_slots} staging slots of "
        f"{format_bytes(plan.slot_bytes)} (tile_bytes), and those of writes",
    )


def _within_disk(plan: Plan, needed: int) -> Plan:
    """`plan`, of which up to `needed` bytes go to disk, if they may."""
    budget, tokens = plan.budget.disk_bytes, plan.expected_tokens or 0
    if budget is None or needed <= budget:
        return plan
    everything = max(plan.host_bytes + needed, 1)
    shorter = int(tokens * (plan.host_bytes + budget) / everything)
    raise BudgetTooSmall(
        f"{plan.geometry.name} at {tokens:,} tokens does not fit: beside "
        f"{format_bytes(plan.host_bytes)} in host memory its keys and values need "
        f"{format_bytes(needed)} in {plan.disk}; {format_bytes(budget)} are allowed or free there. "
        f"Make room for {needed} bytes ({format_bytes(needed)}) on disk and in disk_memory, name a "
        f"folder on a larger disk, or shorten the context to {shorter:,} tokens",
        tier="disk",
        budget_bytes=budget,
        needed_bytes=needed,
    )


def _check_buffers(budget: int | None, needed: int, what: str) -> None:
    """Raises BudgetTooSmall if `budget` bytes of host memory do not even hold the buffers."""
    if budget is None or needed <= budget:
        return
    raise BudgetTooSmall(
        f"the way to and from the disk needs {format_bytes(needed)} of host memory ({what}); the host "
        f"budget is {format_bytes(budget)}. Raise host_memory to {needed} bytes or more",
        tier="host",
        budget_bytes=budget,
        needed_bytes=needed,
    )
