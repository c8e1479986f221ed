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
from headinfer.footprint import offloadable_heads, unpacked_bytes, write_buffer_bytes
from headinfer.geometry import EXACT, Geometry, LayerKind
from headinfer.layout import BLOCK_TOKENS, aligned
from headinfer.options import Options
from headinfer.packing import (
    kept_bytes,
    overflow_bytes,
    packs,
    resident_head_bytes,
    ring_slot_bytes,
    run_padding,
    slotted_head_bytes,
    stored_head_bytes,
)

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

UNKNOWN_SHARE = 16
"""Where the length is not known, one part of this many of host memory is kept for what packed blocks
have beside their slots: the labels and overflow of a disk a dozen times as large."""

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
    kv_format: str = EXACT.name,
) -> Ring:
    """Slots that a disk is read into and the CPU attends, and buffers of blocks to be written."""
    packed = packs(geometry, kv_format)
    block = max(
        (layer.kv_bytes(BLOCK_TOKENS, geometry.itemsize) for layer in geometry.full_layers),
        default=0,
    )
    head = max(
        (layer.head_bytes(BLOCK_TOKENS, geometry.itemsize) for layer in geometry.full_layers),
        default=0,
    )
    tails = batch * geometry.offloadable_bytes(BLOCK_TOKENS)
    # Encoded blocks stand beside the plain ones, and packed tiles are whole blocks.
    least_write = aligned((1 + packed) * batch * block) + aligned(1)
    least_slot = max(LEAST_SLOT_BYTES, aligned(packed * batch * head))
    slot, slots = slot_bytes or max(SLOT_BYTES, least_slot), num_slots or NUM_SLOTS
    write = max(min(write_bytes, WRITE_BYTES), least_write)
    while True:
        held = ring_slot_bytes(geometry, slot, kv_format) if packed else slot
        unpacked = slot + aligned(1) if packed else 0
        buffers = slots * (held + 3 * PAGE) + 2 * write + tails + unpacked
        ring = Ring(slot, slots, write, buffers)
        small = budget is None or ring.buffer_bytes <= budget // BUFFER_SHARE
        fixed = slot_bytes is not None or slot <= least_slot
        if small or (fixed and write == least_write):
            return ring
        slot = slot if fixed else max(slot // 2, least_slot)
        write = max(write // 2, least_write)


def buffers_beside_gpu(slot_bytes: int, num_slots: int) -> int:
    """Page-locked memory between disk and a GPU; `slot_bytes` as slots hold tiles, packed or not."""
    return (num_slots + 1) * (slot_bytes + 3 * PAGE) + WRITE_BUFFERS * WRITE_BYTES


def heads_in_host(
    geometry: Geometry,
    *,
    tokens: int,
    batch: int,
    room: int | None,
    most: int | None,
    kv_format: str = EXACT.name,
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
            size = resident_head_bytes(geometry, layer, tokens, kv_format=kv_format)
            more = batch * size + aligned(1)
            if used + more > room:
                return tuple(heads)
            heads[place], used = step, used + more
    return tuple(heads)


def bytes_on_disk(
    geometry: Geometry,
    heads: tuple[int, ...],
    *,
    tokens: int,
    batch: int,
    kv_format: str = EXACT.name,
) -> int:
    """What the file grows to when all but `heads` of each layer lie there."""
    stored = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    total = 0
    for place, layer in enumerate(geometry.layers):
        below = batch * (offloadable_heads(layer) - heads[place])
        if below and stored:
            size = below * slotted_head_bytes(geometry, layer, stored, kv_format=kv_format)
            padding = below * run_padding(geometry, layer, kv_format=kv_format, page=PAGE)
            total += size + segments_of(stored) * (PAGE + aligned(1) + padding)
    return -(-total // PAGE) * PAGE


def segments_of(tokens: int) -> int:
    """Segments that `tokens` tokens of a known length lie in at most: they double."""
    return 2 + max(tokens // (8 * BLOCK_TOKENS), 1).bit_length()


def plan_on_cpu(geometry: Geometry, options: Options, batch: int, *, chunk: int) -> Plan:
    """Whole heads in host memory, attended in place; the others on disk, attended as they come."""
    if options.near_data not in (None, 1):
        raise InputError(
            f"near_data={options.near_data} was given, but on a CPU every head is attended there, "
            "which is near_data=1; leave it out"
        )
    tokens, budget = options.expected_tokens, options.budget
    kv_format = options.kv_format or EXACT.name
    if options.tile_bytes is not None:
        unpacked_bytes(geometry, options, options.tile_bytes, batch)
    ring = ring_on_cpu(
        geometry,
        batch=batch,
        budget=budget.host_bytes,
        slot_bytes=options.tile_bytes,
        num_slots=options.num_slots,
        write_bytes=write_buffer_bytes(geometry, options, chunk, batch),
        kv_format=kv_format,
    )
    known = 0 if tokens is None else tokens  # unknown: all start in host memory
    kept = 0
    if packs(geometry, kv_format):
        everything = [offloadable_heads(layer) for layer in geometry.layers]
        kept = kept_bytes(
            geometry, everything, tokens=known, batch=batch, chunk_tokens=chunk, in_place=True
        )
    _check_buffers(
        budget.host_bytes,
        ring.buffer_bytes + kept,
        f"{ring.num_slots} slots of {format_bytes(ring.slot_bytes)}, the newest tokens of every layer, "
        f"two buffers{_kept_text(kept)}",
    )
    room = None if budget.host_bytes is None else budget.host_bytes - ring.buffer_bytes - kept
    heads = heads_in_host(
        geometry,
        tokens=known,
        batch=batch,
        room=room if known else None,
        most=options.resident_heads,
        kv_format=kv_format,
    )
    host = kept if known else 0
    for count, layer in zip(heads, geometry.layers, strict=True):
        if count and known:
            size = resident_head_bytes(geometry, layer, known, kv_format=kv_format)
            host += aligned(batch * count * size) + aligned(1)
    plan = Plan(
        geometry=geometry,
        device="cpu",
        batch=batch,
        expected_tokens=tokens,
        new_tokens=options.new_tokens,
        chunk_tokens=chunk,
        slot_bytes=ring.slot_bytes,
        num_slots=ring.num_slots,
        write_bytes=ring.write_bytes,
        resident_heads=heads,
        resident_bytes=None,
        near_share=0.0,
        near_adapts=False,
        kv_format=kv_format,
        budget=budget,
        gpu_parts={},
        host_bytes=host,
        reasons=(
            f"the model computes on the CPU: {_where_on_cpu(options, geometry, heads)}",
            (
                f"{format_bytes(ring.buffer_bytes)} of host memory are between disk and compute, "
                "whatever the context"
            ),
            *_kept_reasons(kept),
        ),
        disk=options.disk,
        disk_bytes=bytes_on_disk(geometry, heads, tokens=known, batch=batch, kv_format=kv_format),
        disk_buffer_bytes=ring.buffer_bytes,
        kept_bytes=kept,
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


def _kept_text(kept: int) -> str:
    return f", {format_bytes(kept)} for blocks that do not compress" if kept else ""


def _kept_reasons(kept: int) -> tuple[str, ...]:
    if not kept:
        return ()
    return (
        (
            f"{format_bytes(kept)} of host memory are kept for packed blocks: a label of each on disk, "
            "and the rest of those that do not compress"
        ),
    )


def stored_bytes(plan: Plan, tokens: int, *, slots_alone: bool = False) -> int:
    """Bytes below compute of the heads that are not resident, over `tokens` tokens; with `slots_alone`
    without what packed blocks may have beside their slots."""
    geometry, size = plan.geometry, 0
    for index, layer in enumerate(geometry.layers):
        heads = offloadable_heads(layer) - plan.resident_heads[index]
        if slots_alone:
            head = slotted_head_bytes(geometry, layer, tokens, kv_format=plan.kv_format)
        else:
            head = stored_head_bytes(
                geometry, layer, tokens, kv_format=plan.kv_format, in_place=not plan.staging
            )
        if heads and head:
            size += aligned(heads * plan.batch * head) + aligned(1)
    return size


def host_bytes(plan: Plan, tokens: int) -> int:
    """Host memory of the heads that are not resident, over `tokens` tokens."""
    geometry, in_place = plan.geometry, not plan.staging
    size = stored_bytes(plan, tokens)
    if size and packs(geometry, plan.kv_format):
        chunk = min(plan.chunk_tokens, tokens)
        size += overflow_bytes(geometry, batch=plan.batch, chunk_tokens=chunk, in_place=in_place)
    return size


def with_spill(plan: Plan, size: int) -> Plan:
    """`size` bytes leave the GPU: host memory is filled first, then the disk."""
    room = plan.host_room
    if room is None or size <= room:
        return replace(plan, host_bytes=size)
    kept = kept_beside_gpu(plan)
    check_page_locked(plan, kept)
    tokens, geometry = plan.expected_tokens or 0, plan.geometry
    slots = stored_bytes(plan, tokens, slots_alone=True)
    # A segment lies in one of the two: of host memory, up to the largest one may stay unused.
    most = min(tokens, max(tokens // 2, 8 * BLOCK_TOKENS, plan.chunk_tokens))
    largest = max(
        plan.batch * layer.kv_bytes(most, geometry.itemsize) for layer in geometry.full_layers
    )
    segments = segments_of(tokens)
    padding = sum(
        PAGE
        + plan.batch
        * layer.num_kv_heads
        * run_padding(geometry, layer, kv_format=plan.kv_format, page=PAGE)
        for layer in geometry.layers
    )
    below = min(slots, slots - (room - kept) + largest) + segments * padding
    below = max(below, 0)
    reason = (
        f"{format_bytes(max(slots - room + kept, 0))} go to {plan.disk} once "
        f"{format_bytes(room - kept)} of host memory are full; "
        f"{format_bytes(plan.disk_buffer_bytes)} of it are between disk and GPU"
    )
    found = replace(
        plan,
        host_bytes=room,
        disk_bytes=below,
        kept_bytes=kept,
        reasons=(*plan.reasons, reason, *_kept_reasons(kept)),
    )
    return _within_disk(found, below)


def kept_beside_gpu(plan: Plan) -> int:
    """Host memory kept for what packed blocks have beside their slots, some of them on disk."""
    if plan.disk is None or not packs(plan.geometry, plan.kv_format):
        return 0
    heads = [
        offloadable_heads(layer) - resident
        for layer, resident in zip(plan.geometry.layers, plan.resident_heads, strict=True)
    ]
    if plan.expected_tokens is None:  # layers that start on the GPU may leave it
        heads = [offloadable_heads(layer) for layer in plan.geometry.layers]
    kept = kept_bytes(
        plan.geometry,
        heads,
        tokens=plan.expected_tokens or 0,
        batch=plan.batch,
        chunk_tokens=plan.chunk_tokens,
        in_place=False,
    )
    if plan.expected_tokens is None and plan.host_room is not None:
        kept += max(plan.host_room - kept, 0) // UNKNOWN_SHARE
    return kept


def check_page_locked(plan: Plan, kept: int = 0) -> None:
    """Raises BudgetTooSmall if host memory does not even hold what lies between disk and GPU."""
    _check_buffers(
        plan.budget.host_bytes,
        plan.disk_buffer_bytes + kept,
        f"page-locked: one beside each of {plan.num_slots} staging slots of "
        f"{format_bytes(plan.slot_bytes)} (tile_bytes), and those of writes{_kept_text(kept)}",
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
        f"folder on a larger disk, or {plan.shorten_to(shorter)}",
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
