# SPDX-License-Identifier: Apache-2.0
"""What goes where: geometry + budget + request -> heads per tier, tile and chunk size, peaks.

A function, not a plug-in: everything it decides is data in the `Plan`, with the reason beside it.
Counts bytes only. docs/placement.md says how the predicted peak compares with measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from headinfer.budget import MIB, MemoryBudget, format_bytes
from headinfer.errors import BudgetTooSmall, InputError
from headinfer.geometry import EXACT, LOSSLESS, Geometry, LayerKind
from headinfer.layout import ALIGNMENT, BLOCK_TOKENS, aligned
from headinfer.options import Options
from headinfer.packing import (
    overflow_bytes,
    ratio_of,
    ring_slot_bytes,
    stored_head_bytes,
    why_plain,
)

GPU_CHUNK_TOKENS = 8192
CPU_CHUNK_TOKENS = 1024
LEAST_CHUNK_TOKENS = BLOCK_TOKENS
SLOT_BYTES = 32 * MIB
"""One KV head of 128 dims over 64K tokens in bf16: long enough for full transfer rate, and for a
kernel launch to take less time than the copy."""
NUM_SLOTS = 5
LEAST_SLOTS = 2
LEAST_SLOT_BYTES = MIB // 4
NEAR_SHARE = 0.6
"""Of the offloaded heads, what the CPU attends at first: an AVX-512 kernel on 16 threads read
108 GB/s where PCIe 5 brought 53."""
WORKSPACE_BYTES = 192 * MIB
"""cuBLAS and cuDNN workspaces."""
SLACK_SHARE = 0.8
"""Of the activations: what torch's caching allocator holds in blocks too small for the next
request. Measured on an H200 with a Llama-3-8B shape, 0.5 GiB for 0.9 GiB of activations."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision, and what it is predicted to take.

    Attributes:
        geometry: the model's cache.
        device: "cuda" or "cpu", where the model computes.
        batch: sequences.
        expected_tokens: length planned for; None when it is not known.
        chunk_tokens: tokens prefilled per forward pass.
        slot_bytes: size of one staging slot; 0 when nothing is staged.
        num_slots: staging slots.
        write_bytes: size of each of two write-back buffers.
        resident_heads: per layer of the model, KV heads that stay on the GPU.
        resident_bytes: GPU memory they may take; beyond it layers are demoted to host memory. None
            for no limit.
        near_share: of the offloaded heads, the share the CPU attends in decode, at first.
        near_adapts: that share follows what the machine does.
        kv_format: name of the stored format.
        budget: what is allowed, resolved: None only where there is no limit.
        gpu_parts: predicted peak on the GPU, part by part, bytes.
        host_bytes: predicted keys and values in host memory, bytes; 0 if the length is unknown.
        reasons: one line per decision.
    """

    geometry: Geometry
    device: str
    batch: int
    expected_tokens: int | None
    chunk_tokens: int
    slot_bytes: int
    num_slots: int
    write_bytes: int
    resident_heads: tuple[int, ...]
    resident_bytes: int | None
    near_share: float
    near_adapts: bool
    kv_format: str
    budget: MemoryBudget
    gpu_parts: dict[str, int]
    host_bytes: int
    reasons: tuple[str, ...] = ()

    @property
    def staging(self) -> bool:
        """Tiles pass through the staging ring."""
        return self.slot_bytes > 0

    @property
    def gpu_bytes(self) -> int:
        """Predicted peak of GPU memory, weights included; 0 on a CPU."""
        return sum(self.gpu_parts.values())

    @property
    def staging_bytes(self) -> int:
        """GPU memory through which offloaded keys and values pass: independent of the context."""
        unpacked = self.slot_bytes if self.kv_format == LOSSLESS.name else 0
        return self.num_slots * self.ring_slot_bytes + 2 * self.write_bytes + unpacked

    @property
    def ring_slot_bytes(self) -> int:
        """What one staging slot takes: packed tiles are smaller than what they are unpacked to."""
        return ring_slot_bytes(self.geometry, self.slot_bytes, self.kv_format)

    @property
    def offloaded_heads(self) -> int:
        """KV heads, over all layers, whose keys and values are in host memory."""
        return sum(layer.num_kv_heads for layer in self.geometry.full_layers) - sum(
            self.resident_heads
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.geometry.name,
            "device": self.device,
            "batch": self.batch,
            "expected_tokens": self.expected_tokens,
            "chunk_tokens": self.chunk_tokens,
            "head_wise_layers": len(self.geometry.full_layers),
            "layers": len(self.geometry.layers),
            "resident_heads": list(self.resident_heads),
            "resident_bytes": self.resident_bytes,
            "offloaded_heads": self.offloaded_heads,
            "near_share": self.near_share,
            "near_adapts": self.near_adapts,
            "kv_format": self.kv_format,
            "slot_bytes": self.slot_bytes,
            "num_slots": self.num_slots,
            "write_bytes": self.write_bytes,
            "gpu_budget_bytes": self.budget.gpu_bytes,
            "host_budget_bytes": self.budget.host_bytes,
            "predicted_gpu_parts": dict(self.gpu_parts),
            "predicted_gpu_bytes": self.gpu_bytes,
            "predicted_host_bytes": self.host_bytes,
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        full, count = self.geometry.full_layers, len(self.geometry.layers)
        length = "unknown" if self.expected_tokens is None else f"{self.expected_tokens:,}"
        lines = [
            (
                f"{self.geometry.name} on {self.device}: {length} tokens, batch {self.batch}, "
                f"{len(full)} of {count} layers head by head"
            ),
            f"prefill in chunks of {self.chunk_tokens:,} tokens",
        ]
        if self.device == "cuda":
            parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in self.gpu_parts.items())
            lines.append(f"GPU peak, predicted: {format_bytes(self.gpu_bytes)} ({parts})")
        if self.expected_tokens is not None:
            lines.append(f"keys and values in host memory: {format_bytes(self.host_bytes)}")
        return "\n".join([*lines, *(f"- {reason}" for reason in self.reasons)])


def make_plan(geometry: Geometry, options: Options, *, device: str, batch: int = 1) -> Plan:
    """The plan for `batch` sequences of a model of `geometry` computing on `device`.

    `options.budget` must be resolved: None means that the tier has no limit.

    Raises:
        BudgetTooSmall: with the smallest budget that works.
        InputError: options that contradict each other or the device.
    """
    if options.kv_format is not None:
        plan = _plan(geometry, options, device, batch)
        return _with_format_reason(plan, "as asked for")
    exact = replace(options, kv_format=EXACT.name)
    packed = replace(options, kv_format=LOSSLESS.name)
    if why_plain(geometry) is not None:
        return _plan(geometry, exact, device, batch)
    try:
        plan = _plan(geometry, exact, device, batch)
    except BudgetTooSmall as too_small:
        if too_small.tier != "host":
            raise
        needed = format_bytes(too_small.needed_bytes)
        why = f"as they are they would need {needed}, which the host budget does not allow"
        return _with_format_reason(_plan(geometry, packed, device, batch), why)
    if not _streams_longest(plan, options):
        return plan
    why = "streaming them takes longest in decode (measured rates)"
    return _with_format_reason(_plan(geometry, packed, device, batch), why)


def _plan(geometry: Geometry, options: Options, device: str, batch: int) -> Plan:
    return (_cpu_plan if device == "cpu" else _gpu_plan)(geometry, options, batch)


def _streams_longest(plan: Plan, options: Options) -> bool:
    """Whether bringing the offloaded keys of a step takes longer than launching it: what makes
    fewer bytes a faster step. Without measured rates that is not known."""
    rates, tokens, geometry = options.rates, plan.expected_tokens, plan.geometry
    if rates is None or not rates.h2d_bytes_s or tokens is None or not plan.staging:
        return False
    if plan.device != "cuda" or not plan.offloaded_heads:
        return False
    offloaded = sum(
        plan.batch * (layer.num_kv_heads - resident) * layer.head_bytes(tokens, geometry.itemsize)
        for layer, resident in zip(geometry.layers, plan.resident_heads, strict=True)
        if layer.kind is LayerKind.FULL
    )
    launching = len(geometry.layers) * rates.layer_s + rates.token_s
    return offloaded / rates.h2d_bytes_s > launching


def _with_format_reason(plan: Plan, why: str) -> Plan:
    """Says what of the lossless format applies."""
    if plan.kv_format != LOSSLESS.name:
        return plan
    plain = why_plain(plan.geometry)
    if plain is not None:
        reason = f"the lossless format does not apply: {plain}; they are stored as they are"
        return replace(plan, kv_format=EXACT.name, reasons=(*plan.reasons, reason))
    reason = (
        "keys and values in host memory are stored without loss in "
        f"{ratio_of(plan.geometry, plan.kv_format):.1%} of their bytes: {why}"
    )
    return replace(plan, reasons=(*plan.reasons, reason))


def activation_bytes(geometry: Geometry, chunk_tokens: int, batch: int = 1) -> int:
    """Predicted peak of activations in a forward pass over `chunk_tokens` tokens.

    The MLP's gate, up and product, and a handful of residual-sized tensors live at once; in
    attention, queries, outputs and float32 sums of a head group, which is less for all models
    whose MLP is wider than three times their hidden size.
    """
    heads = max((layer.num_query_heads for layer in geometry.layers), default=0)
    dim = max((max(layer.key_dim, layer.value_dim) for layer in geometry.layers), default=0)
    mlp = 3 * geometry.intermediate_size + 4 * geometry.hidden_size
    attention = 4 * geometry.hidden_size + 4 * heads * dim
    logits = batch * geometry.vocab_size * (geometry.itemsize + 4)
    return batch * chunk_tokens * max(mlp, attention) * geometry.itemsize + logits


def _cpu_plan(geometry: Geometry, options: Options, batch: int) -> Plan:
    if options.budget.gpu_bytes is not None:
        raise InputError(
            f"gpu_memory={format_bytes(options.budget.gpu_bytes)} was given, but the model is on "
            "the CPU; move it to a GPU, or leave gpu_memory out"
        )
    staging = bool(options.staging)
    if options.resident_heads and not staging:
        raise InputError(
            f"resident_heads={options.resident_heads} was given, but on a CPU every head is "
            "attended where it lies; leave it out"
        )
    if options.near_data is not None and not staging and options.near_data < 1:
        raise InputError(
            f"near_data={options.near_data} was given, but on a CPU every head is attended where "
            "it lies, which is near_data=1; leave it out"
        )
    slot_bytes, num_slots = _slots(options) if staging else (0, 0)
    if staging:
        _unpacked_bytes(geometry, options, slot_bytes, batch)
    chunk = options.chunk_tokens or CPU_CHUNK_TOKENS
    where = "staged tile by tile" if staging else "attended in place, head by head"
    return _with_host(
        Plan(
            geometry=geometry,
            device="cpu",
            batch=batch,
            expected_tokens=options.expected_tokens,
            chunk_tokens=chunk,
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            write_bytes=_write_bytes(geometry, options, chunk, batch) if staging else 0,
            resident_heads=_residents(geometry, options.resident_heads or 0),
            resident_bytes=None,
            near_share=(options.near_data or 0.0) if staging else 0.0,
            near_adapts=False,
            kv_format=options.kv_format or EXACT.name,
            budget=options.budget,
            gpu_parts={},
            host_bytes=0,
            reasons=(f"the model computes on the CPU: keys and values are {where}",),
        )
    )


def _gpu_plan(geometry: Geometry, options: Options, batch: int) -> Plan:
    if options.staging is False:
        raise InputError("staging=False was given, but a GPU cannot attend host memory in place")
    budget = options.budget.gpu_bytes
    chunk = options.chunk_tokens or max(GPU_CHUNK_TOKENS, _roomy(hiding_tokens(geometry, options)))
    if options.expected_tokens is not None and options.chunk_tokens is None:
        chunk = min(chunk, max(-(-options.expected_tokens // BLOCK_TOKENS), 1) * BLOCK_TOKENS)
    plan = _streaming_plan(geometry, options, batch, chunk)
    insisted = _residents(geometry, options.resident_heads or 0)
    extra = _resident_bytes(geometry, insisted, options.expected_tokens or 0, batch)
    if budget is not None and options.chunk_tokens is None:
        while chunk > LEAST_CHUNK_TOKENS and plan.gpu_bytes + extra > budget:
            chunk = max(chunk // 2, LEAST_CHUNK_TOKENS)
            plan = _streaming_plan(geometry, options, batch, chunk)
    if budget is not None and plan.gpu_bytes > budget:
        raise _gpu_too_small(geometry, options, batch, plan, budget)
    return _with_near_reason(_with_host(_with_residents(plan, options)))


def hiding_tokens(geometry: Geometry, options: Options) -> int | None:
    """The shortest chunk whose attention takes as long as bringing the keys it attends: F / (g B)
    for F FLOP/s of attention, g query heads per KV head and B bytes/s of the link. None if the
    machine was not measured.

    Per key and value 2 (d + e) FLOPs are done for each of g query heads and chunk tokens, and
    (d + e) bytes times the size of an element are brought.
    """
    rates = options.rates
    if rates is None or not rates.h2d_bytes_s:
        return None
    found = 0.0
    for layer in geometry.full_layers:
        per_kv = max(layer.num_query_heads // max(layer.num_kv_heads, 1), 1)
        flops = rates.attention_flops_of(max(layer.key_dim, layer.value_dim))
        found = max(found, flops * geometry.itemsize / (2 * per_kv * rates.h2d_bytes_s))
    return int(found) + 1


def _roomy(hiding: int | None) -> int:
    """A quarter longer than needed, in whole KiTokens: rates vary."""
    return 0 if hiding is None else -(-hiding * 5 // 4 // 1024) * 1024


def _hiding(chunk: int, hiding: int | None) -> str:
    if hiding is None:
        return ""
    if chunk >= hiding:
        return f"; from {hiding:,} tokens on transfers hide behind attention (measured rates)"
    return (
        f"; transfers take longer than its attention, which would hide them from {hiding:,} tokens "
        "on (measured rates): more gpu_memory makes room for longer chunks"
    )


def _with_near_reason(plan: Plan) -> Plan:
    if not plan.offloaded_heads or not plan.near_share:
        return plan
    rest = "; the share follows what this machine does" if plan.near_adapts else ""
    reason = (
        f"in decode the CPU attends {plan.near_share:.0%} of the offloaded heads in host memory "
        f"while the others stream{rest}"
    )
    return replace(plan, reasons=(*plan.reasons, reason))


def _streaming_plan(geometry: Geometry, options: Options, batch: int, chunk: int) -> Plan:
    """Everything offloaded: the least memory this chunk size needs."""
    slot_bytes, num_slots = _slots(options)
    write_bytes = _write_bytes(geometry, options, chunk, batch)
    unpacked = _unpacked_bytes(geometry, options, slot_bytes, batch)
    ring = slot_bytes
    if unpacked:
        ring = ring_slot_bytes(geometry, slot_bytes, LOSSLESS.name)
    tails = sum(layer.kv_bytes(BLOCK_TOKENS, geometry.itemsize) for layer in geometry.full_layers)
    windows = geometry.kv_bytes(chunk, batch=batch) - geometry.offloadable_bytes(chunk, batch=batch)
    parts = {
        "weights": geometry.weight_bytes,
        "activations": activation_bytes(geometry, chunk, batch),
        "staging": num_slots * ring + 2 * write_bytes + unpacked,
        "tails": batch * tails,
        "windows": 2 * windows,
        "workspace": WORKSPACE_BYTES,
    }
    parts["allocator slack"] = int(parts["activations"] * SLACK_SHARE)
    reasons = [
        (
            f"a chunk of {chunk:,} tokens keeps activations at "
            f"{format_bytes(parts['activations'])}{_hiding(chunk, hiding_tokens(geometry, options))}"
        ),
        (
            f"staging: {num_slots} slots of {format_bytes(slot_bytes)} and two write-back buffers of "
            f"{format_bytes(write_bytes)}, whatever the context"
        ),
    ]
    return Plan(
        geometry=geometry,
        device="cuda",
        batch=batch,
        expected_tokens=options.expected_tokens,
        chunk_tokens=chunk,
        slot_bytes=slot_bytes,
        num_slots=num_slots,
        write_bytes=write_bytes,
        resident_heads=_residents(geometry, 0),
        resident_bytes=None,
        near_share=NEAR_SHARE if options.near_data is None else options.near_data,
        near_adapts=options.near_data is None,
        kv_format=options.kv_format or EXACT.name,
        budget=options.budget,
        gpu_parts={name: size for name, size in parts.items() if size},
        host_bytes=0,
        reasons=tuple(reasons),
    )


def _with_residents(plan: Plan, options: Options) -> Plan:
    """Keep as many heads on the GPU as the budget has room for, spread evenly over layers."""
    geometry, tokens, budget = plan.geometry, plan.expected_tokens, plan.budget.gpu_bytes
    wanted = options.resident_heads
    most = max((layer.num_kv_heads for layer in geometry.full_layers), default=0)
    if budget is None:
        residents = _residents(geometry, most if wanted is None else wanted)
        size = _resident_bytes(geometry, residents, tokens or 0, plan.batch)
        return _resident_plan(plan, residents, size)
    if tokens is None:
        return _optimistic_plan(plan, _residents(geometry, most if wanted is None else wanted))
    room = budget - plan.gpu_bytes
    residents, size = _residents(geometry, 0), 0
    for step in range(1, (most if wanted is None else min(wanted, most)) + 1):
        for index, layer in enumerate(geometry.layers):
            more = list(residents)
            more[index] = min(step, _offloadable_heads(layer))
            larger = _resident_bytes(geometry, tuple(more), tokens, plan.batch)
            if larger > room:
                if wanted is not None:
                    whole = _resident_bytes(
                        geometry, _residents(geometry, wanted), tokens, plan.batch
                    )
                    raise BudgetTooSmall(
                        f"resident_heads={wanted} needs {format_bytes(whole)} for {tokens:,} "
                        f"tokens beside {format_bytes(plan.gpu_bytes)}; the GPU budget is "
                        f"{format_bytes(budget)}. Raise gpu_memory to "
                        f"{plan.gpu_bytes + whole} bytes "
                        f"({format_bytes(plan.gpu_bytes + whole)}), or leave resident_heads out",
                        tier="gpu",
                        budget_bytes=budget,
                        needed_bytes=plan.gpu_bytes + whole,
                    )
                return _resident_plan(plan, residents, size)
            residents, size = tuple(more), larger
    return _resident_plan(plan, residents, size)


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


def _with_host(plan: Plan) -> Plan:
    """Count what goes to host memory and check it against the budget."""
    tokens, geometry = plan.expected_tokens, plan.geometry
    if tokens is None:
        return plan
    size, packed = 0, plan.kv_format == LOSSLESS.name and why_plain(geometry) is None
    for index, layer in enumerate(geometry.layers):
        heads = _offloadable_heads(layer) - plan.resident_heads[index]
        per_head = plan.batch * stored_head_bytes(
            geometry, layer, tokens, kv_format=plan.kv_format, in_place=not plan.staging
        )
        if heads and per_head:
            size += aligned(heads * per_head) + aligned(1)
    if packed and size:
        size += overflow_bytes(
            geometry,
            batch=plan.batch,
            chunk_tokens=min(plan.chunk_tokens, tokens),
            in_place=not plan.staging,
        )
    budget = plan.budget.host_bytes
    if budget is not None and size > budget:
        raise BudgetTooSmall(
            f"{geometry.name} at {tokens:,} tokens does not fit: its keys and values need "
            f"{format_bytes(size)} of host memory; the host budget is {format_bytes(budget)}. "
            f"Raise host_memory to {size} bytes ({format_bytes(size)}), or shorten the context to "
            f"{int(tokens * budget / size):,} tokens",
            tier="host",
            budget_bytes=budget,
            needed_bytes=size,
        )
    return replace(plan, host_bytes=size)


def _gpu_too_small(
    geometry: Geometry, options: Options, batch: int, plan: Plan, budget: int
) -> BudgetTooSmall:
    least = _streaming_plan(geometry, options, batch, LEAST_CHUNK_TOKENS)
    parts = " + ".join(f"{format_bytes(size)} {name}" for name, size in plan.gpu_parts.items())
    remedy = f"Raise gpu_memory to {plan.gpu_bytes} bytes ({format_bytes(plan.gpu_bytes)})"
    needed = plan.gpu_bytes
    if options.chunk_tokens is not None and least.gpu_bytes <= budget:
        chunk = options.chunk_tokens
        while _streaming_plan(geometry, options, batch, chunk).gpu_bytes > budget:
            chunk = max(chunk * 3 // 4, LEAST_CHUNK_TOKENS)
        remedy = f"Lower chunk_tokens to {chunk:,} or less, or raise gpu_memory to {needed} bytes"
    return BudgetTooSmall(
        f"{geometry.name} does not fit: {parts} = {format_bytes(plan.gpu_bytes)} with "
        f"chunk_tokens={plan.chunk_tokens:,}; the GPU budget is {format_bytes(budget)}. {remedy}.",
        tier="gpu",
        budget_bytes=budget,
        needed_bytes=needed,
    )


def _slots(options: Options) -> tuple[int, int]:
    return options.tile_bytes or SLOT_BYTES, options.num_slots or NUM_SLOTS


def _unpacked_bytes(geometry: Geometry, options: Options, slot_bytes: int, batch: int) -> int:
    """The buffer that packed tiles are unpacked into; 0 where none are.

    Raises:
        BudgetTooSmall: a staging slot cannot hold one block of one head.
    """
    if options.kv_format != LOSSLESS.name or why_plain(geometry) is not None:
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


def _write_bytes(geometry: Geometry, options: Options, chunk: int, batch: int) -> int:
    """One chunk of the widest layer, at most 32 MiB: longer chunks pass in pieces."""
    widest = max(
        (layer.kv_bytes(BLOCK_TOKENS, geometry.itemsize) for layer in geometry.full_layers),
        default=0,
    )
    blocks = -(-chunk // BLOCK_TOKENS) + 1
    # Encoded blocks stand beside the plain ones.
    least = batch * widest * (2 if options.kv_format == LOSSLESS.name else 1)
    return max(min(batch * widest * blocks, 32 * MIB), aligned(least)) + aligned(1)


def _offloadable_heads(layer: Any) -> int:
    return int(layer.num_kv_heads) if layer.kind.value == "full" else 0


def _residents(geometry: Geometry, heads: int) -> tuple[int, ...]:
    return tuple(min(heads, _offloadable_heads(layer)) for layer in geometry.layers)


def _resident_bytes(geometry: Geometry, residents: tuple[int, ...], tokens: int, batch: int) -> int:
    return sum(
        batch * heads * layer.head_bytes(tokens, geometry.itemsize)
        for heads, layer in zip(residents, geometry.layers, strict=True)
    )
