# SPDX-License-Identifier: Apache-2.0
"""The lossless format without a model: round trips, the native kernel over packed keys, and, with a
GPU, encoding, decoding and the stream of packed tiles beside that of plain ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from headinfer.attention import native, packed
from headinfer.attention.packed import PackedRun
from headinfer.bench.cases import Case
from headinfer.bench.clock import Deadline, times
from headinfer.bench.machine import settle
from headinfer.bench.rates import filled
from headinfer.bench.results import NOT_AVAILABLE, Row
from headinfer.heads import Codec
from headinfer.layout import BLOCK_TOKENS
from headinfer.link import default_engine
from headinfer.tiers import HostTier

HEADS, PER_KV, DIM = 8, 4, 128
TILE_BLOCKS = 512
"""One KV head over 64K tokens: half of the keys or values of a tile as the plan cuts them."""

STREAM_ROUNDS = 8
"""A GiB of keys: the last tile is unpacked when nothing is on its way any more, which is no part of
a rate."""


def packed_rows(
    case: Case, context: int, *, cuda: bool, quick: bool, deadline: Deadline
) -> Iterator[Row]:
    """Every row of the case; those of the GPU only with one."""
    device = torch.device("cuda" if cuda else "cpu")
    yield _round_trip(case, context, device, blocks=64 if quick else 1024)
    if native.why_absent() is None:
        yield from _native(case, context, deadline)
    else:
        note = str(native.why_absent())
        yield Row(case.name, "native, packed", context, status=NOT_AVAILABLE, note=note)
    if cuda:
        yield from _codec_rates(case, context, deadline)
        yield from _streams(case, context, deadline)


def _round_trip(case: Case, context: int, device: torch.device, blocks: int) -> Row:
    """Values that do not come back as they were: of every bit pattern, of random bits and of random
    normal numbers."""
    generator = torch.Generator().manual_seed(0)
    shape = (blocks, BLOCK_TOKENS, DIM)
    every = torch.arange(blocks * BLOCK_TOKENS * DIM).to(torch.int16)
    noise = torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16)
    normal = torch.randn(shape, generator=generator).bfloat16().view(torch.int16)
    wrong = 0
    for bits in (every.view(shape), noise, normal):
        values = bits.contiguous().view(torch.bfloat16).view(1, 1, -1, DIM).to(device)
        codec, slots = _encoded(values)
        out = torch.empty_like(values)
        codec.decode(slots, out, 0)
        settle(device)
        codec.check()
        wrong += int((out.view(torch.int16) != values.view(torch.int16)).sum())
    settings = {"values": 3 * blocks * BLOCK_TOKENS * DIM, "device": device.type}
    row = Row(case.name, "codec", context, "wrong values", "values", settings=settings)
    return filled(row, [float(wrong)])


def _native(case: Case, context: int, deadline: Deadline) -> Iterator[Row]:
    """One decode call of both kernels, in random turns: the same bits in the same run."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS * PER_KV, 1, DIM, generator=generator).bfloat16()
    k, v = (torch.randn(1, HEADS, context, DIM, generator=generator).bfloat16() for _ in "kv")
    packed_k, packed_v = (_packed_on_host(x.transpose(0, 1)) for x in (k, v))
    runs = packed_k, packed_v
    scale = DIM**-0.5
    work: dict[str, Callable[[], object]] = {
        "native": lambda: native.attend(q, k, v, scale=scale),
        "native, packed": lambda: packed.attend(
            q, packed_k, packed_v, None, None, keys=context, scale=scale
        ),
    }
    plain, found = (call() for call in work.values())
    if not torch.equal(plain.out, found.out):  # type: ignore[attr-defined]
        raise RuntimeError("packed attention does not have the bits of plain attention")
    seconds = _in_turns(work, torch.device("cpu"), 2 * case.repeats, deadline)
    for name, values in seconds.items():
        row = Row(case.name, name, context, "attention", "s")
        nbytes = 2 * k.nbytes if name == "native" else sum(run.slots.nbytes for run in runs)
        yield filled(replace(row, moved_bytes={"host": nbytes}), values)


def _codec_rates(case: Case, context: int, deadline: Deadline) -> Iterator[Row]:
    device = torch.device("cuda")
    values = torch.randn(8, 1, TILE_BLOCKS * BLOCK_TOKENS, DIM, device=device).bfloat16()
    codec, slots = _encoded(values)
    out = torch.empty_like(values)
    for name, work in (
        ("GPU encode", lambda: codec.encode(values, slots)),
        ("GPU decode", lambda: codec.decode(slots, out, 0)),
    ):
        found = times(work, device, case.repeats, deadline=deadline)
        row = Row(case.name, name, context, "rate", "GB/s")
        yield filled(row, [values.nbytes / each / 1e9 for each in found])


def _streams(case: Case, context: int, deadline: Deadline) -> Iterator[Row]:
    """Keys from page-locked memory to where attention would read them, tile by tile, two slots: plain
    ones copied, packed ones copied and decoded on the other stream."""
    device = torch.device("cuda")
    values = torch.randn(8, 1, TILE_BLOCKS * BLOCK_TOKENS, DIM, device=device).bfloat16()
    codec, slots = _encoded(values)
    plain, stored = (_pinned(x) for x in (values, slots))
    landing = [(torch.empty_like(values[:1]), torch.empty_like(slots[:1])) for _ in range(2)]
    out = torch.empty_like(values[:1])
    lane, compute = torch.cuda.Stream(), torch.cuda.current_stream()
    free = [torch.cuda.Event() for _ in range(2)]

    def stream(packed_ones: bool) -> None:
        for turn in range(STREAM_ROUNDS * values.shape[0]):
            head, slot = turn % values.shape[0], turn % 2
            to = landing[slot][1 if packed_ones else 0]
            with torch.cuda.stream(lane):
                lane.wait_event(free[slot])
                to.copy_((stored if packed_ones else plain)[head : head + 1], non_blocking=True)
                landed = torch.cuda.Event()
                landed.record(lane)
            compute.wait_event(landed)
            if packed_ones:
                codec.decode(to, out, 0)
            free[slot].record(compute)

    work: dict[str, Callable[[], object]] = {
        "plain stream": lambda: stream(False),
        "packed stream": lambda: stream(True),
    }
    for name, found in _in_turns(work, device, case.repeats, deadline).items():
        row = Row(
            case.name,
            name,
            context,
            "stream",
            "s",
            moved_bytes={"bf16": STREAM_ROUNDS * values.nbytes},
        )
        yield filled(row, found)


def _in_turns(
    work: dict[str, Callable[[], object]], device: torch.device, repeats: int, deadline: Deadline
) -> dict[str, list[float]]:
    """Seconds of each, all of them in random order again and again; the first turn does not count."""
    order, found = random.Random(0), {name: list[float]() for name in work}
    for turn in range(repeats + 1):
        for name in order.sample(list(work), len(work)):
            deadline.check()
            settle(device)
            start = time.perf_counter()
            work[name]()
            settle(device)
            if turn:
                found[name].append(time.perf_counter() - start)
    return found


def _encoded(values: Tensor) -> tuple[Codec, Tensor]:
    """values [h, b, t, d], packed where they are."""
    tier = HostTier(pin=values.is_cuda)
    codec = Codec(default_engine(values.device), values.device, lambda: tier)
    heads, rows, tokens, dim = values.shape
    blocks = tokens // BLOCK_TOKENS
    codec.reserve({dim: heads * rows * blocks})
    size = codec.overflow(dim).layout.slot_bytes
    slots = torch.empty((heads, rows, blocks, size), dtype=torch.uint8, device=values.device)
    codec.encode(values, slots)
    for copied in codec.counted(dim):
        copied.dst.copy_(copied.src)
    return codec, slots


def _packed_on_host(values: Tensor) -> PackedRun:
    codec, slots = _encoded(values.contiguous())
    return PackedRun(slots, codec.overflow(values.shape[-1]))


def _pinned(x: Tensor) -> Tensor:
    made = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    made.copy_(x)
    return made
