# SPDX-License-Identifier: Apache-2.0
"""The lossless format's encoder and decoder in Triton's language; docs/lossless.md has the bytes.

Importing this file imports triton. Blocks are decoded by several programs each and encoded by one.
Overflow entries lie in page-locked host memory that the kernels reach, so nobody copies them, and
nobody waits to learn how many there are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headinfer.formats.overflow import Overflow

PAIRS = 2048
"""Pairs of values a program holds at a time."""

DAMAGED = 1
"""What a program writes where it met a block that no encoder wrote."""


def decode_blocks(
    slots: Tensor, out: Tensor, overflow: Overflow, damaged: Tensor, tag: int
) -> None:
    """out [runs, blocks, 128, dim] bfloat16 becomes what slots [runs x blocks, slot_bytes] hold, which are
    contiguous; `out` is within each run.

    Where a block is damaged, `damaged` [3] int64, which the host reads, becomes DAMAGED, `tag`, its number.
    """
    layout, count = overflow.layout, slots.shape[0]
    half, step = _tile(layout.dim)
    if count:
        with _on(slots):
            _decode[(count * (128 // step),)](
                slots,
                out.view(torch.int16),
                overflow.table,
                damaged,
                tag,
                overflow.entries,
                overflow.chunk_entries,
                out.shape[1],
                out.stride(0),
                DIM=layout.dim,
                HALF=half,
                STEP=step,
                MOST=layout.most_escapes,
                MOST_BLOCK=triton.next_power_of_2(layout.most_escapes),
                SLOT=layout.slot_bytes,
                num_warps=4,
            )


def encode_blocks(values: Tensor, slots: Tensor, overflow: Overflow) -> None:
    """slots [n, slot_bytes], contiguous, become values [heads, rows, blocks x 128, dim] bfloat16 encoded, n
    blocks in all, entries reserved for all of them. Of `values` only the last axis need be dense: a
    model's keys are encoded where they lie."""
    layout, count = overflow.layout, slots.shape[0]
    half, step = _tile(layout.dim)
    if count:
        with _on(slots):
            _encode[(count,)](
                values.view(torch.int16),
                slots,
                overflow.table,
                overflow.ring,
                overflow.counter,
                overflow.ring.numel(),
                overflow.chunk_entries,
                values.shape[2] // 128,
                values.shape[1],
                *values.stride()[:3],
                DIM=layout.dim,
                HALF=half,
                STEP=step,
                MOST=layout.most_escapes,
                SLOT=layout.slot_bytes,
                TRAILER=layout.slot_bytes - layout.header,
                num_warps=4,
            )


def _tile(dim: int) -> tuple[int, int]:
    """Pairs of channels, a power of two, and tokens of a program."""
    half = triton.next_power_of_2(dim // 2)
    return half, min(128, max(1, PAIRS // half))


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(x)


@triton.jit
def _join(mixed, exponent):
    bits = ((mixed & 0x80) << 8) | ((exponent & 0xFF) << 7) | (mixed & 0x7F)
    return bits.to(tl.int16)


@triton.jit
def _exponent(bits):
    return (bits >> 7) & 0xFF


@triton.jit
def _entry(table, index, chunk_entries, DIM: tl.constexpr):
    """Where overflow entry `index` begins, as a pointer to 16-bit words."""
    address = tl.load(table + index // chunk_entries) + index % chunk_entries * (63 * DIM)
    return address.to(tl.pointer_type(tl.int16))


@triton.jit(do_not_specialize=["tag", "entries", "chunk_entries", "run_blocks"])
def _decode(
    slots, out, table, damaged, tag, entries, chunk_entries, run_blocks, run_stride,
    DIM: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr,
    MOST_BLOCK: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = 128 // STEP
    block, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    slot = slots + block.to(tl.int64) * SLOT
    to = out + (block // run_blocks).to(tl.int64) * run_stride
    to += (block % run_blocks).to(tl.int64) * (128 * DIM)
    token = part * STEP + tl.arange(0, STEP)
    pair = tl.arange(0, HALF)
    there = (pair < DIM // 2)[None, :] & (token >= 0)[:, None]

    head = slot + 193 * DIM
    version, kind = tl.load(head).to(tl.int32), tl.load(head + 1).to(tl.int32)
    escapes = tl.load((head + 2).to(tl.pointer_type(tl.uint16))).to(tl.int32)
    index = tl.load((head + 8).to(tl.pointer_type(tl.uint32))).to(tl.int64)
    raw = kind == 1
    good = (version == 1) & (kind <= 1) & (escapes <= tl.where(raw, 0, MOST))
    good = good & ((index < entries) | (kind == 0))

    if raw & good:
        entry = _entry(table, index, chunk_entries, DIM)
        words = slot.to(tl.pointer_type(tl.int16))
        WORDS: tl.constexpr = 193 * DIM // 2
        low = token[:, None] * DIM + pair[None, :]
        high = low + DIM // 2
        for place in tl.static_range(2):
            word = low if place == 0 else high
            here = tl.load(words + word, mask=there & (word < WORDS), other=0)
            rest = tl.load(entry + (word - WORDS), mask=there & (word >= WORDS), other=0)
            tl.store(to + word, tl.where(word < WORDS, here, rest), mask=there)
    else:
        place = token[:, None] * DIM + pair[None, :]
        both = tl.load(
            slot + 128 * DIM + token[:, None] * (DIM // 2) + pair[None, :], mask=there, other=0
        ).to(tl.int32)
        inside = pair < DIM // 2
        lower = tl.load(slot + 192 * DIM + pair, mask=inside, other=0).to(tl.int32)
        upper = tl.load(slot + 192 * DIM + DIM // 2 + pair, mask=inside, other=0).to(tl.int32)
        mixed = tl.load(slot + place, mask=there, other=0).to(tl.int32)
        tl.store(to + place, _join(mixed, lower[None, :] - (both & 15)), mask=there)
        mixed = tl.load(slot + place + DIM // 2, mask=there, other=0).to(tl.int32)
        tl.store(to + place + DIM // 2, _join(mixed, upper[None, :] - (both >> 4)), mask=there)
        if good & (escapes > 0):
            tl.debug_barrier()  # escapes replace what other threads have just written
            rank = tl.arange(0, MOST_BLOCK)
            listed = rank < escapes
            position = tl.load(
                (head + 8).to(tl.pointer_type(tl.uint16)) + rank, mask=listed, other=0
            ).to(tl.int32)
            exponent = tl.load(head + 8 + 2 * MOST + rank, mask=listed, other=0).to(tl.int32)
            good = tl.max(tl.where(listed, position, 0)) < 128 * DIM
            mine = listed & (position >= part * STEP * DIM) & (position < (part + 1) * STEP * DIM)
            mine = mine & (position < 128 * DIM)
            single = tl.load(slot + position, mask=mine, other=0).to(tl.int32)
            tl.store(to + position, _join(single, exponent), mask=mine)
    if not good:
        tl.store(damaged + 1, tag)
        tl.store(damaged + 2, block)
        tl.store(damaged, 1)


@triton.jit
def _weighted(words, number):
    """The sum of (2 number + 1) words modulo 2^32."""
    return tl.sum((2 * number + 1).to(tl.uint32) * words.to(tl.uint32))


@triton.jit(do_not_specialize=["ring_length", "chunk_entries", "run_blocks", "rows"])
def _encode(
    values, slots, table, ring, counter, ring_length, chunk_entries, run_blocks, rows,
    head_stride, row_stride, token_stride,
    DIM: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr,
    SLOT: tl.constexpr, TRAILER: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    run, within = block // run_blocks, block % run_blocks
    from_ = values + run // rows * head_stride + run % rows * row_stride
    from_ += within * 128 * token_stride
    slot = slots + block * SLOT
    head = slot + 193 * DIM
    pair = tl.arange(0, HALF)
    inside = pair < DIM // 2
    step = tl.arange(0, STEP)
    there = inside[None, :] & (step >= 0)[:, None]

    lower = tl.zeros([HALF], dtype=tl.int32)
    upper = tl.zeros([HALF], dtype=tl.int32)
    for first in range(0, 128, STEP):
        source = from_ + (first + step)[:, None] * token_stride + pair[None, :]
        low = tl.load(source, mask=there, other=0).to(tl.int32)
        high = tl.load(source + DIM // 2, mask=there, other=0).to(tl.int32)
        lower = tl.maximum(lower, tl.max(_exponent(low), axis=0))
        upper = tl.maximum(upper, tl.max(_exponent(high), axis=0))
    escapes = tl.zeros([], dtype=tl.int32)
    for first in range(0, 128, STEP):
        source = from_ + (first + step)[:, None] * token_stride + pair[None, :]
        low = tl.load(source, mask=there, other=0).to(tl.int32)
        high = tl.load(source + DIM // 2, mask=there, other=0).to(tl.int32)
        far = ((lower[None, :] - _exponent(low)) > 14).to(tl.int32)
        far += ((upper[None, :] - _exponent(high)) > 14).to(tl.int32)
        escapes += tl.sum(tl.where(there, far, 0))

    trailing = tl.arange(0, 512)
    tl.store(head + trailing, tl.zeros([512], dtype=tl.uint8), mask=trailing < TRAILER)
    tl.debug_barrier()  # other threads write into the trailer after this
    total = tl.zeros([], dtype=tl.uint32)
    raw = escapes > MOST
    if raw:
        taken = tl.atomic_add(counter, 1, sem="relaxed")
        index = tl.load(ring + taken % ring_length).to(tl.int64)
        entry = _entry(table, index, chunk_entries, DIM)
        words = slot.to(tl.pointer_type(tl.int16))
        WORDS: tl.constexpr = 193 * DIM // 2
        for first in range(0, 128, STEP):
            start = (first + step)[:, None] * DIM + pair[None, :]
            source = from_ + (first + step)[:, None] * token_stride + pair[None, :]
            for side in tl.static_range(2):
                word = start + side * (DIM // 2)
                bits = tl.load(source + side * (DIM // 2), mask=there, other=0)
                tl.store(words + word, bits, mask=there & (word < WORDS))
                tl.store(entry + (word - WORDS), bits, mask=there & (word >= WORDS))
                shifted = (bits.to(tl.int32) & 0xFFFF) << (16 * (word & 1))
                total += _weighted(shifted, word // 2)
        escapes = escapes * 0
        tl.store((head + 8).to(tl.pointer_type(tl.uint32)), index.to(tl.uint32))
    else:
        before = tl.zeros([], dtype=tl.int32)
        for first in range(0, 128, STEP):
            token = first + step
            place = token[:, None] * DIM + pair[None, :]
            source = from_ + token[:, None] * token_stride + pair[None, :]
            low = tl.load(source, mask=there, other=0).to(tl.int32)
            high = tl.load(source + DIM // 2, mask=there, other=0).to(tl.int32)
            far_low = ((lower[None, :] - _exponent(low)) > 14) & there
            far_high = ((upper[None, :] - _exponent(high)) > 14) & there
            nibble = tl.where(far_low, 15, lower[None, :] - _exponent(low))
            nibble |= tl.where(far_high, 15, upper[None, :] - _exponent(high)) << 4
            mixed_low = ((low >> 8) & 0x80) | (low & 0x7F)
            mixed_high = ((high >> 8) & 0x80) | (high & 0x7F)
            nibble = tl.where(there, nibble, 0)
            mixed_low, mixed_high = tl.where(there, mixed_low, 0), tl.where(there, mixed_high, 0)
            joint = 128 * DIM + token[:, None] * (DIM // 2) + pair[None, :]
            tl.store(slot + place, mixed_low.to(tl.uint8), mask=there)
            tl.store(slot + place + DIM // 2, mixed_high.to(tl.uint8), mask=there)
            tl.store(slot + joint, nibble.to(tl.uint8), mask=there)
            total += _weighted(mixed_low << (8 * (place & 3)), place // 4)
            other = place + DIM // 2
            total += _weighted(mixed_high << (8 * (other & 3)), other // 4)
            total += _weighted(nibble << (8 * (joint & 3)), joint // 4)
            some = tl.sum(far_low.to(tl.int32)) + tl.sum(far_high.to(tl.int32))
            if some > 0:
                of_low, of_high = far_low.to(tl.int32), far_high.to(tl.int32)
                in_low, in_high = tl.sum(of_low, axis=1), tl.sum(of_high, axis=1)
                earlier = before + tl.cumsum(in_low + in_high, axis=0) - in_low - in_high
                positions = (head + 8).to(tl.pointer_type(tl.uint16))
                listed = head + 8 + 2 * MOST
                rank = earlier[:, None] + tl.cumsum(of_low, axis=1) - of_low
                tl.store(positions + rank, place.to(tl.uint16), mask=far_low)
                tl.store(listed + rank, _exponent(low).to(tl.uint8), mask=far_low)
                both = tl.where(far_low, place | (_exponent(low) << 16), 0)
                total += _weighted(both, 193 * DIM // 4 + rank)
                rank = (earlier + in_low)[:, None] + tl.cumsum(of_high, axis=1) - of_high
                tl.store(positions + rank, other.to(tl.uint16), mask=far_high)
                tl.store(listed + rank, _exponent(high).to(tl.uint8), mask=far_high)
                both = tl.where(far_high, other | (_exponent(high) << 16), 0)
                total += _weighted(both, 193 * DIM // 4 + rank)
            before += some
        channel = 192 * DIM + pair
        tl.store(slot + channel, lower.to(tl.uint8), mask=inside)
        tl.store(slot + channel + DIM // 2, upper.to(tl.uint8), mask=inside)
        total += _weighted(tl.where(inside, lower << (8 * (channel & 3)), 0), channel // 4)
        channel += DIM // 2
        total += _weighted(tl.where(inside, upper << (8 * (channel & 3)), 0), channel // 4)
    said = 1 | raw.to(tl.int32) << 8 | escapes << 16
    total += said.to(tl.uint32) * (128 * DIM + 1)
    tl.store(head.to(tl.pointer_type(tl.uint32)), said.to(tl.uint32))
    tl.store((head + 4).to(tl.pointer_type(tl.uint32)), total)
