# SPDX-License-Identifier: Apache-2.0
"""What goes where: geometry + budget + request -> heads per tier, tile and chunk size, peaks.

A function, not a plug-in: everything it decides is data in the `Plan`, with the reason beside it.
Counts bytes only. docs/placement.md says how the predicted peak compares with measured ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from headinfer.balance import LEAST_SHARE
from headinfer.budget import format_bytes
from headinfer.chunks import hiding_reason, hiding_tokens, roomy
from headinfer.cost import ANSWER_TOKENS, balanced_share, request_s
from headinfer.decision import Plan
from headinfer.errors import BudgetTooSmall, InputError
from headinfer.footprint import (
    SLACK_SHARE,
    WORKSPACE_BYTES,
    activation_bytes,
    residents_of,
    slots_of,
    unpacked_bytes,
    write_buffer_bytes,
)
from headinfer.geometry import EXACT, LOSSLESS, Geometry
from headinfer.layout import BLOCK_TOKENS
from headinfer.options import Options
from headinfer.packing import (
    packs,
    ratio_of,
    ring_slot_bytes,
    why_plain,
)
from headinfer.refusal import LEAST_CHUNK_TOKENS, gpu_too_small, host_too_small
from headinfer.residency import with_residents
from headinfer.spread import (
    buffers_beside_gpu,
    check_page_locked,
    host_bytes,
    kept_beside_gpu,
    plan_on_cpu,
    with_spill,
)

GPU_CHUNK_TOKENS = 8192
CPU_CHUNK_TOKENS = 1024
LIKELY_TOKENS = 256
"""Of a longer answer, what counts: its length is a limit as a rule, and models end most of them before."""
NEAR_SHARE = 0.6
"""Of the offloaded heads, what the CPU attends at first where no rates were measured: an AVX-512 kernel on 16 threads read
108 GB/s where PCIe 5 brought 53."""

__all__ = ["Plan", "activation_bytes", "hiding_tokens", "make_plan"]


def make_plan(geometry: Geometry, options: Options, *, device: str, batch: int = 1) -> Plan:
    """The plan for `batch` sequences of a model of `geometry` computing on `device`.

    `options.budget` must be resolved: None means that the tier has no limit.

    Raises:
        BudgetTooSmall: with the smallest budget that works.
        InputError: options that contradict each other or the device.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch={batch!r} is not usable; give a whole number >= 1")
    plan = _with_threads(_in_a_format(geometry, options, device, batch), options)
    return replace(plan, reasons=(*plan.reasons, *options.budget_reasons))


def _in_a_format(geometry: Geometry, options: Options, device: str, batch: int) -> Plan:
    """The plan in the format asked for; else as plain bytes, unless packed ones fit where these do
    not, or are predicted to be quicker."""
    exact = replace(options, kv_format=EXACT.name)
    packed = replace(options, kv_format=LOSSLESS.name)
    if options.kv_format is not None:
        plan = _plan(geometry, options, device, batch)
        return _with_format_reason(plan, "as asked for")
    if not packs(geometry, LOSSLESS.name):
        return _plan(geometry, exact, device, batch)
    try:
        return _quicker(_plan(geometry, exact, device, batch), packed, device)
    except BudgetTooSmall as too_small:
        if too_small.tier == "gpu":
            raise
        needed, where = format_bytes(too_small.needed_bytes), too_small.tier
        why = f"as they are they would need {needed}, which the {where} budget does not allow"
        try:
            return _with_format_reason(_plan(geometry, packed, device, batch), why)
        except BudgetTooSmall as packed_too:
            raise (packed_too if packed_too.tier == where == "host" else too_small) from None


def _quicker(exact: Plan, packed: Options, device: str) -> Plan:
    """`exact`, or the plan in the lossless format where that was measured to be attended by the CPU, and
    the request is predicted to end sooner. Both have the same bits."""
    rates = packed.rates
    if device == "cpu" or rates is None or rates.near_packed_bytes_s is None:
        return exact
    if packed.expected_tokens is None:
        return exact
    try:
        found = _plan(exact.geometry, packed, device, exact.batch)
    except BudgetTooSmall:
        return exact
    prompt, new = _request(packed)
    before, after = (
        request_s(plan, rates, prompt_tokens=prompt, new_tokens=new) for plan in (exact, found)
    )
    if after >= before:
        return exact
    why = (
        f"a prompt of {prompt:,} tokens and {new:,} after it take {after:.1f} s by prediction, "
        f"{before:.1f} s as they are"
    )
    return _with_format_reason(found, why)


def _with_threads(plan: Plan, options: Options) -> Plan:
    """As many threads attend on the CPU as make a difference."""
    rates = options.rates
    enough = None if rates is None else rates.threads_enough
    attends = plan.device == "cpu" or (plan.offloaded_heads and plan.near_share)
    if rates is None or enough is None or not attends or enough == max(rates.near_by_threads):
        return plan
    if packs(
        plan.geometry, plan.kv_format
    ):  # unpacking is arithmetic, which more threads do faster
        return plan
    most = max(rates.near_by_threads)
    reason = (
        f"{enough} threads attend on the CPU, at {rates.near_by_threads[enough] / 1e9:.0f} GB/s; all "
        f"{most} would at {rates.near_by_threads[most] / 1e9:.0f} GB/s"
    )
    return replace(plan, threads=enough, reasons=(*plan.reasons, reason))


def _first_share(options: Options) -> float:
    """Of the offloaded heads, what the CPU attends at first."""
    if options.near_data is not None:
        return options.near_data
    rates = options.rates
    link = None if rates is None else rates.shared_h2d_bytes_s
    if rates is None or not rates.near_bytes_s or not link:
        return NEAR_SHARE
    return round(rates.near_bytes_s / (rates.near_bytes_s + link), 2)


def _plan(geometry: Geometry, options: Options, device: str, batch: int) -> Plan:
    return (_cpu_plan if device == "cpu" else _gpu_plan)(geometry, options, batch)


def _with_format_reason(plan: Plan, why: str) -> Plan:
    """Says what of the lossless format applies."""
    if plan.kv_format != LOSSLESS.name:
        return plan
    plain = why_plain(plan.geometry)
    if plain is not None:
        reason = f"the lossless format does not apply: {plain}; they are stored as they are"
        return replace(plan, kv_format=EXACT.name, reasons=(*plan.reasons, reason))
    reason = (
        f"keys and values in host memory{' and on disk' if plan.disk else ''} are stored without loss in "
        f"{ratio_of(plan.geometry, plan.kv_format):.1%} of their bytes: {why}"
    )
    return replace(plan, reasons=(*plan.reasons, reason))


def _cpu_plan(geometry: Geometry, options: Options, batch: int) -> Plan:
    if options.budget.gpu_bytes is not None:
        raise InputError(
            f"gpu_memory={format_bytes(options.budget.gpu_bytes)} was given, but the model is on "
            "the CPU; move it to a GPU, or leave gpu_memory out"
        )
    staging = bool(options.staging)
    if options.disk is not None and not staging:
        return plan_on_cpu(geometry, options, batch, chunk=options.chunk_tokens or CPU_CHUNK_TOKENS)
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
    slot_bytes, num_slots = slots_of(options) if staging else (0, 0)
    if staging:
        unpacked_bytes(geometry, options, slot_bytes, batch)
    chunk = options.chunk_tokens or CPU_CHUNK_TOKENS
    where = "staged tile by tile" if staging else "attended in place, head by head"
    return _with_host(
        Plan(
            geometry=geometry,
            device="cpu",
            batch=batch,
            expected_tokens=options.expected_tokens,
            new_tokens=options.new_tokens,
            chunk_tokens=chunk,
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            write_bytes=write_buffer_bytes(geometry, options, chunk, batch) if staging else 0,
            resident_heads=residents_of(geometry, options.resident_heads or 0),
            resident_bytes=None,
            near_share=(options.near_data or 0.0) if staging else 0.0,
            near_adapts=False,
            kv_format=options.kv_format or EXACT.name,
            budget=options.budget,
            gpu_parts={},
            host_bytes=0,
            reasons=(f"the model computes on the CPU: keys and values are {where}",),
            disk=options.disk,
            disk_buffer_bytes=_buffers(geometry, options, slot_bytes, num_slots),
        ),
        options,
    )


def _buffers(geometry: Geometry, options: Options, slot_bytes: int, num_slots: int) -> int:
    """Host memory between a disk, if there is one, and a GPU."""
    if options.disk is None:
        return 0
    packed = packs(geometry, options.kv_format or EXACT.name)
    held = ring_slot_bytes(geometry, slot_bytes, LOSSLESS.name) if packed else slot_bytes
    return buffers_beside_gpu(held, num_slots)


def _gpu_plan(geometry: Geometry, options: Options, batch: int) -> Plan:
    if options.staging is False:
        raise InputError("staging=False was given, but a GPU cannot attend host memory in place")
    budget = options.budget.gpu_bytes
    chunk = options.chunk_tokens or max(GPU_CHUNK_TOKENS, roomy(hiding_tokens(geometry, options)))
    if options.expected_tokens is not None and options.chunk_tokens is None:
        chunk = min(chunk, max(-(-options.expected_tokens // BLOCK_TOKENS), 1) * BLOCK_TOKENS)

    def with_chunk(tokens: int) -> Plan:
        return _streaming_plan(geometry, options, batch, tokens)

    fitting: list[Plan] = []
    refused: BudgetTooSmall | None = None
    for length in _chunks_to_try(chunk, options, batch):
        plan = with_chunk(length)
        try:
            if budget is not None and plan.gpu_bytes > budget:
                raise gpu_too_small(plan, options, budget, with_chunk)
            fitting.append(_with_host(with_residents(plan, options), options))
        except BudgetTooSmall as error:
            # Of the GPU's the last names the least that works, and says nothing once it has room.
            refused = error if refused is None or refused.tier == "gpu" else refused
            continue
        if options.rates is None or options.expected_tokens is None:
            break
        if not fitting[-1].offloaded_heads:  # a shorter chunk has nothing to make room for
            break
    if refused is not None and not fitting:
        raise refused
    best = _quickest([*fitting, *_longer(fitting[0], options)], options)
    return _with_near_reason(best, options)


def _longer(plan: Plan, options: Options) -> Iterator[Plan]:
    """`plan` with chunks twice as long and again, as far as the GPU has room for them: every chunk
    reads the disk once. Up to the length whose attention hides that."""
    rates, budget = options.rates, plan.budget.gpu_bytes
    hiding = hiding_tokens(plan.geometry, options)
    if options.chunk_tokens is not None or not plan.disk_bytes:
        return
    if rates is None or hiding is None or not rates.disk_read_bytes_s or not rates.h2d_bytes_s:
        return
    wanted, chunk = hiding * rates.h2d_bytes_s / rates.disk_read_bytes_s, plan.chunk_tokens
    while chunk < wanted and 2 * chunk <= (plan.expected_tokens or 0):
        chunk *= 2
        longer = _streaming_plan(plan.geometry, options, plan.batch, chunk)
        if budget is not None and longer.gpu_bytes > budget:
            return
        try:
            yield _with_host(with_residents(longer, options), options)
        except BudgetTooSmall:  # no room for resident_heads, or fewer heads leave too much to disk
            return


def _chunks_to_try(chunk: int, options: Options, batch: int) -> Iterator[int]:
    """`chunk`, and where the user left it open and memory is limited, halves of it."""
    yield chunk
    if options.chunk_tokens is None and options.budget.gpu_bytes is not None:
        while chunk > LEAST_CHUNK_TOKENS:
            chunk = max(chunk // 2, LEAST_CHUNK_TOKENS)
            yield chunk


def _quickest(fitting: Sequence[Plan], options: Options) -> Plan:
    """Of plans with shorter chunks, which leave room for more resident heads, and with longer ones,
    which read a disk less often, the one whose request is predicted to take least; the first where
    nothing predicts.

    Every plan gets quicker with more memory, and more of them fit: so does the best.
    """
    rates = options.rates
    if len(fitting) == 1 or rates is None or options.expected_tokens is None:
        return fitting[0]
    prompt, new = _request(options)
    seconds = [request_s(plan, rates, prompt_tokens=prompt, new_tokens=new) for plan in fitting]
    best = min(range(len(fitting)), key=lambda place: seconds[place])
    if best == 0:
        return fitting[0]
    shorter = fitting[best].chunk_tokens < fitting[0].chunk_tokens
    reason = (
        f"a chunk of {fitting[0].chunk_tokens:,} tokens would fit, too, but "
        f"{'leave room for fewer heads' if shorter else 'read the disk more often'}: "
        f"{seconds[0]:.1f} s instead of {seconds[best]:.1f} s for the prompt and "
        f"{new:,} tokens"
    )
    return replace(fitting[best], reasons=(*fitting[best].reasons, reason))


def _request(options: Options) -> tuple[int, int]:
    """Tokens of the prompt, and of what is likely to come after it."""
    tokens, new = options.expected_tokens or 1, options.new_tokens
    return (tokens, ANSWER_TOKENS) if new is None else (tokens - new, min(new, LIKELY_TOKENS))


def _with_near_reason(plan: Plan, options: Options) -> Plan:
    if not plan.offloaded_heads or not plan.near_share:
        return plan
    rates, tokens = options.rates, options.expected_tokens
    if plan.near_adapts and tokens and rates is not None and rates.near_bytes_s:
        share = balanced_share(plan, rates, length=tokens)
        plan = replace(plan, near_share=round(max(share, LEAST_SHARE), 2))
    rest = "; the share follows what this machine does" if plan.near_adapts else ""
    reason = (
        f"in decode the CPU attends {plan.near_share:.0%} of the offloaded heads in host memory "
        f"while the others stream{rest}"
    )
    return replace(plan, reasons=(*plan.reasons, reason))


def _streaming_plan(geometry: Geometry, options: Options, batch: int, chunk: int) -> Plan:
    """Everything offloaded: the least memory this chunk size needs."""
    slot_bytes, num_slots = slots_of(options)
    write_bytes = write_buffer_bytes(geometry, options, chunk, batch)
    unpacked = unpacked_bytes(geometry, options, slot_bytes, batch)
    ring = slot_bytes
    if unpacked:
        ring = ring_slot_bytes(geometry, slot_bytes, LOSSLESS.name)
    tails = sum(layer.kv_bytes(BLOCK_TOKENS, geometry.itemsize) for layer in geometry.full_layers)
    windows = geometry.kv_bytes(chunk, batch=batch) - geometry.offloadable_bytes(chunk, batch=batch)
    parts = {
        "weights": geometry.weight_bytes,
        "weights on their way": geometry.weights.largest_moved_bytes,
        "activations": activation_bytes(geometry, chunk, batch),
        "staging": num_slots * ring + 2 * write_bytes + unpacked,
        "tails": batch * tails,
        "windows": 2 * windows,
        "states": 2 * batch * sum(layer.state_bytes for layer in geometry.layers),
        "workspace": WORKSPACE_BYTES,
    }
    parts["allocator slack"] = int(parts["activations"] * SLACK_SHARE)
    reasons = [
        (
            f"a chunk of {chunk:,} tokens keeps activations at "
            f"{format_bytes(parts['activations'])}{hiding_reason(chunk, hiding_tokens(geometry, options))}"
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
        new_tokens=options.new_tokens,
        chunk_tokens=chunk,
        slot_bytes=slot_bytes,
        num_slots=num_slots,
        write_bytes=write_bytes,
        resident_heads=residents_of(geometry, 0),
        resident_bytes=None,
        near_share=_first_share(options),
        near_adapts=options.near_data is None,
        kv_format=options.kv_format or EXACT.name,
        budget=options.budget,
        gpu_parts={name: size for name, size in parts.items() if size},
        host_bytes=0,
        reasons=tuple(reasons),
        disk=options.disk,
        disk_buffer_bytes=_buffers(geometry, options, slot_bytes, num_slots),
    )


def _with_host(plan: Plan, options: Options) -> Plan:
    """Count what goes to host memory and check it against the budget."""
    tokens = plan.expected_tokens
    if tokens is None:
        kept = kept_beside_gpu(plan)
        check_page_locked(plan, kept)
        return replace(plan, kept_bytes=kept)
    size = host_bytes(plan, tokens)
    if plan.disk is not None:
        return with_spill(plan, size)
    budget = plan.budget.host_bytes
    if budget is not None and size > budget:
        raise host_too_small(
            plan, tokens, size, budget, disk_helps=_disk_helps(plan, options, size)
        )
    return replace(plan, host_bytes=size)


def _disk_helps(plan: Plan, options: Options, size: int) -> bool:
    """Whether `plan`, of which `size` bytes do not stay on the GPU, fits with a disk that has room."""
    budget = replace(plan.budget, disk_bytes=None)
    asked = replace(options, disk="FOLDER", budget=budget)
    try:
        if plan.device == "cpu" and not plan.staging:
            plan_on_cpu(plan.geometry, asked, plan.batch, chunk=plan.chunk_tokens)
        else:
            buffers = _buffers(plan.geometry, asked, plan.slot_bytes, plan.num_slots)
            on_disk = replace(plan, budget=budget, disk="FOLDER", disk_buffer_bytes=buffers)
            with_spill(on_disk, size)
    except (BudgetTooSmall, InputError):
        return False
    return True
