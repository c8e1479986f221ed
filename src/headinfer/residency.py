# SPDX-License-Identifier: Apache-2.0
"""Which heads stay on the GPU, and what they take there. Counts bytes only."""

from __future__ import annotations

from dataclasses import replace

from headinfer.budget import format_bytes
from headinfer.decision import Plan
from headinfer.errors import BudgetTooSmall
from headinfer.footprint import bytes_of_residents, offloadable_heads, residents_of
from headinfer.geometry import Geometry
from headinfer.layout import ALIGNMENT
from headinfer.options import Options


def with_residents(plan: Plan, options: Options) -> Plan:
    """Keep as many heads on the GPU as the budget has room for."""
    geometry, tokens, budget = plan.geometry, plan.expected_tokens, plan.budget.gpu_bytes
    wanted = options.resident_heads
    most = max((layer.num_kv_heads for layer in geometry.full_layers), default=0)
    if budget is None:
        residents = residents_of(geometry, most if wanted is None else wanted)
        size = bytes_of_residents(geometry, residents, tokens or 0, plan.batch)
        return _resident_plan(plan, residents, size)
    if tokens is None:
        return _optimistic_plan(plan, residents_of(geometry, most if wanted is None else wanted))
    room = budget - plan.gpu_bytes
    if wanted is None:
        residents = _that_fit(geometry, tokens, plan.batch, room)
    else:
        residents = residents_of(geometry, min(wanted, most))
    size = bytes_of_residents(geometry, residents, tokens, plan.batch)
    if size > room:
        raise BudgetTooSmall(
            f"resident_heads={wanted} needs {format_bytes(size)} for {tokens:,} "
            f"tokens beside {format_bytes(plan.gpu_bytes)}; the GPU budget is "
            f"{format_bytes(budget)}. Raise gpu_memory to "
            f"{plan.gpu_bytes + size} bytes "
            f"({format_bytes(plan.gpu_bytes + size)}), or leave resident_heads out",
            tier="gpu",
            budget_bytes=budget,
            needed_bytes=plan.gpu_bytes + size,
        )
    return _resident_plan(plan, residents, size)


def _that_fit(geometry: Geometry, tokens: int, batch: int, room: int) -> tuple[int, ...]:
    """Per layer, the KV heads that fit `room` bytes: whole layers, spread over the depth, and of one
    more layer what is left room for.

    A layer of which one head streams costs the host as much as one of which all do, and one head
    cannot be shared between CPU and link. Between layers that stream lie resident ones, during which
    the ring fills.
    """
    residents = list(residents_of(geometry, 0))
    places = [place for place, layer in enumerate(geometry.layers) if offloadable_heads(layer)]
    for turn in _spread_out(len(places)):
        layer = geometry.layers[places[turn]]
        head, whole = batch * layer.head_bytes(tokens, geometry.itemsize), offloadable_heads(layer)
        heads = min(whole, room // head) if head else whole
        residents[places[turn]] = heads
        room -= heads * head
        if 0 < heads < whole:
            break
    return tuple(residents)


def _spread_out(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread evenly: by their bits reversed, the
    sequence of van der Corput."""
    bits = max(count - 1, 1).bit_length()
    return sorted(range(count), key=lambda index: int(f"{index:0{bits}b}"[::-1], 2))


def _optimistic_plan(plan: Plan, residents: tuple[int, ...]) -> Plan:
    """The length is not known: start on the GPU, and leave it layer by layer when it is full."""
    room = max((plan.budget.gpu_bytes or 0) - plan.gpu_bytes, 0)
    if not room or not any(residents):
        return replace(plan, resident_bytes=0)
    reason = (
        f"the length is not known: {sum(residents)} KV heads start on the GPU, and layers move to "
        f"host memory once {format_bytes(room)} are used"
    )
    return replace(
        plan,
        resident_heads=residents,
        resident_bytes=room,
        gpu_parts={**plan.gpu_parts, "resident heads, at most": room},
        reasons=(*plan.reasons, reason),
    )


def _resident_plan(plan: Plan, residents: tuple[int, ...], size: int) -> Plan:
    total = sum(layer.num_kv_heads for layer in plan.geometry.full_layers)
    reason = f"{sum(residents)} of {total} KV heads stay on the GPU: {format_bytes(size)}"
    parts = dict(plan.gpu_parts)
    if size:
        parts["resident heads"] = size
    limit = None
    if plan.budget.gpu_bytes is not None:
        # Longer than planned, they may grow to the budget; keys and values are aligned per layer.
        padding = 2 * ALIGNMENT * len(plan.geometry.layers)
        limit = max(plan.budget.gpu_bytes - plan.gpu_bytes, size) + padding
    return replace(
        plan,
        resident_heads=residents,
        resident_bytes=limit,
        gpu_parts=parts,
        reasons=(*plan.reasons, reason),
    )
