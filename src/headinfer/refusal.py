# SPDX-License-Identifier: Apache-2.0
"""What a plan that does not fit says: what is short, by how much, and what helps.

Every remedy named works: tests/test_plan.py follows them.
"""

from __future__ import annotations

from collections.abc import Callable

from headinfer.budget import format_apart, format_bytes
from headinfer.decision import Plan
from headinfer.errors import BudgetTooSmall
from headinfer.footprint import bytes_of_residents, residents_of
from headinfer.layout import BLOCK_TOKENS
from headinfer.options import Options
from headinfer.spread import host_bytes

LEAST_CHUNK_TOKENS = BLOCK_TOKENS


def host_too_small(
    plan: Plan, tokens: int, size: int, budget: int, *, disk_helps: bool
) -> BudgetTooSmall:
    """Host memory of `budget` bytes does not hold `size` bytes of keys and values."""
    shorter = int(tokens * budget / size)
    # Rounding to blocks and alignment may be in the way of the last few tokens.
    while shorter > 0 and host_bytes(plan, shorter) > budget:
        shorter -= max(shorter // 100, 1)
    needed, allowed = format_apart(size, budget)
    remedies = [f"Raise host_memory to {size} bytes ({format_bytes(size)})"]
    if shorter >= BLOCK_TOKENS:
        remedies.append(plan.shorten_to(shorter))
    if disk_helps:
        remedies.append("let what does not fit lie on a fast disk with disk=FOLDER")
    *first, last = remedies
    return BudgetTooSmall(
        f"{plan.geometry.name} at {tokens:,} tokens does not fit: its keys and values need "
        f"{needed} of host memory; the host budget is {allowed}. "
        + (f"{', '.join(first)}, or {last}" if first else last),
        tier="host",
        budget_bytes=budget,
        needed_bytes=size,
    )


def gpu_too_small(
    plan: Plan, options: Options, budget: int, with_chunk: Callable[[int], Plan]
) -> BudgetTooSmall:
    """Not even a plan without resident heads fits `budget` bytes; `with_chunk` makes it with another
    chunk."""
    geometry, least = plan.geometry, with_chunk(LEAST_CHUNK_TOKENS)
    parts = " + ".join(f"{format_bytes(size)} {name}" for name, size in plan.gpu_parts.items())
    needed = plan.gpu_bytes
    if options.resident_heads and options.expected_tokens is not None:
        residents = residents_of(geometry, options.resident_heads)
        needed += bytes_of_residents(geometry, residents, options.expected_tokens, plan.batch)
    remedy = f"Raise gpu_memory to {needed} bytes ({format_bytes(needed)})"
    if options.chunk_tokens is not None and least.gpu_bytes <= budget:
        chunk = options.chunk_tokens
        while with_chunk(chunk).gpu_bytes > budget:
            chunk = max(chunk * 3 // 4, LEAST_CHUNK_TOKENS)
        remedy = f"Lower chunk_tokens to {chunk:,} or less, or raise gpu_memory to {needed} bytes"
    elif 0 < geometry.weight_bytes - (least.gpu_bytes - budget) < geometry.weight_bytes:
        room = geometry.weight_bytes - (least.gpu_bytes - budget)
        remedy += (
            f", or load weights that take at most {room} bytes on the GPU ({format_bytes(room)}): "
            "quantised, or some of them in host memory (device_map='auto')"
        )
    asked, allowed = format_apart(plan.gpu_bytes, budget)
    return BudgetTooSmall(
        f"{geometry.name} does not fit: {parts} = {asked} with "
        f"chunk_tokens={plan.chunk_tokens:,}; the GPU budget is {allowed}. {remedy}.",
        tier="gpu",
        budget_bytes=budget,
        needed_bytes=needed,
    )
