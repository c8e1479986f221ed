# SPDX-License-Identifier: Apache-2.0
"""bfloat16 keys and values in three quarters of their bytes, every bit pattern exact.

Sign and mantissa are kept as they are; the exponents of a channel lie close together within a
block, so each is stored as 4 bits below the channel's highest. docs/lossless.md has the bytes;
this is the plain reference of them, which every faster encoder and decoder equals bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.blocks import (
    HEADER_BYTES,
    LABEL_BYTES,
    MAX_DIM,
    STEP_DIM,
    BlockLayout,
    why_not_packed,
)
from headinfer.errors import LosslessCorrupt
from headinfer.layout import BLOCK_TOKENS

__all__ = [
    "BlockLayout",
    "decode",
    "encode",
    "labelled_indices",
    "layout_of",
    "point_to",
    "raw_indices",
    "why_not",
]

VERSION = 1
PACKED, RAW = 0, 1
"""Kinds of blocks."""

ESCAPE = 15
"""The nibble of a value whose exponent is listed: not within 14 of its channel's highest."""

AT_ONCE = 64
"""Blocks the reference looks at together: its integers take eight times the room."""

Fetch = Callable[[Tensor], Tensor]
"""Overflow entries [m, entry_bytes] for indices [m] int64, all of them stored ones.

Raises LosslessCorrupt for an index that is not."""


class Packed(NamedTuple):
    """Encoded blocks.

    Attributes:
        slots: [n, slot_bytes] bytes; overflow indices of raw blocks still 0.
        raw: [n] which blocks are raw.
        entries: [number of raw blocks, entry_bytes], in the order of the blocks.
    """

    slots: Tensor
    raw: Tensor
    entries: Tensor


def why_not(dtype: torch.dtype, *dims: int) -> str | None:
    """Why keys and values of `dims` channels cannot be packed; None if they can."""
    return why_not_packed(str(dtype).removeprefix("torch."), *dims)


def encode(values: Tensor) -> Packed:
    """Blocks values [n, 128, d] of bfloat16, encoded."""
    parts = [_encode(part) for part in values.split(AT_ONCE)]
    if not parts:
        layout = BlockLayout(values.shape[-1])
        none = torch.empty(0, dtype=torch.uint8, device=values.device)
        return Packed(
            none.view(0, layout.slot_bytes), none.bool(), none.view(0, layout.entry_bytes)
        )
    return Packed(*(torch.cat(of) for of in zip(*parts, strict=True)))


def point_to(packed: Packed, indices: Tensor) -> None:
    """Raw blocks name the overflow entries at `indices` [number of raw blocks]."""
    if indices.numel():
        layout = layout_of(packed.slots)
        there = slice(layout.positions, layout.positions + 4)
        packed.slots[packed.raw, there] = _bytes_of(indices, 4)


def decode(slots: Tensor, dim: int, fetch: Fetch, *, verify: bool = False) -> Tensor:
    """The values [n, 128, dim] of slots [n, slot_bytes].

    Raises:
        LosslessCorrupt: a block that no encoder wrote; with `verify`, one whose checksum or whose
            number of escapes is not that of its bytes.
    """
    out = torch.empty(
        (slots.shape[0], BLOCK_TOKENS, dim), dtype=torch.bfloat16, device=slots.device
    )
    for first in range(0, slots.shape[0], AT_ONCE):
        part = slots[first : first + AT_ONCE]
        out[first : first + AT_ONCE] = _decode(part, BlockLayout(dim), fetch, verify, first)
    return out


def layout_of(slots: Tensor) -> BlockLayout:
    """The layout of slots [..., slot_bytes]."""
    for dim in range(STEP_DIM, MAX_DIM + 1, STEP_DIM):
        if BlockLayout(dim).slot_bytes == slots.shape[-1]:
            return BlockLayout(dim)
    raise LosslessCorrupt(f"no packed block takes {slots.shape[-1]} bytes")


def raw_indices(slots: Tensor, dim: int) -> Tensor:
    """The overflow indices that the raw ones of slots [..., slot_bytes] name, int64."""
    return labelled_indices(slots[..., BlockLayout(dim).label])


def labelled_indices(labels: Tensor) -> Tensor:
    """As `raw_indices`, of the labels [..., LABEL_BYTES] of blocks alone."""
    flat = labels.reshape(-1, LABEL_BYTES)
    return _number(flat[flat[:, 1] == RAW][:, HEADER_BYTES:])


def _encode(values: Tensor) -> Packed:
    count, _, dim = values.shape
    layout, device = BlockLayout(dim), values.device
    whole = values.contiguous()
    bits = whole.view(torch.int16).to(torch.int32) & 0xFFFF
    exponent = (bits >> 7) & 0xFF
    base = exponent.amax(dim=1)
    below = base[:, None] - exponent
    escaped = (below > ESCAPE - 1).flatten(1)
    escapes = escaped.sum(dim=1)
    raw = escapes > layout.most_escapes

    slots = torch.zeros((count, layout.slot_bytes), dtype=torch.uint8, device=device)
    slots[:, : layout.nibbles] = ((bits >> 8 & 0x80) | (bits & 0x7F)).flatten(1).to(torch.uint8)
    nibble = below.clamp(max=ESCAPE)
    both = nibble[..., : dim // 2] | nibble[..., dim // 2 :] << 4
    slots[:, layout.nibbles : layout.bases] = both.flatten(1).to(torch.uint8)
    slots[:, layout.bases : layout.header] = base.to(torch.uint8)
    as_made = whole.view(torch.uint8).flatten(1)
    slots[raw, : layout.header] = as_made[raw, : layout.header]
    entries = as_made[raw, layout.header :]

    escapes = torch.where(raw, 0, escapes)
    block, position = (escaped & ~raw[:, None]).nonzero(as_tuple=True)
    listed = exponent.flatten(1)[block, position]
    starts = escapes.cumsum(0) - escapes
    rank = torch.arange(block.numel(), device=device) - starts[block]
    slots[block, layout.positions + 2 * rank] = (position & 0xFF).to(torch.uint8)
    slots[block, layout.positions + 2 * rank + 1] = (position >> 8).to(torch.uint8)
    slots[block, layout.exponents + rank] = listed.to(torch.uint8)

    head = slots[:, layout.header :]
    head[:, 0] = VERSION
    head[:, 1] = raw.to(torch.uint8)
    head[:, 2:4] = _bytes_of(escapes, 2)
    head[:, 4:8] = _bytes_of(_sums(slots, layout, entries), 4)
    return Packed(slots, raw, entries)


def _decode(slots: Tensor, layout: BlockLayout, fetch: Fetch, verify: bool, first: int) -> Tensor:
    raw, escapes = _checked(slots, layout, first)
    entries = slots.new_empty((0, layout.entry_bytes))
    if bool(raw.any()):
        entries = fetch(raw_indices(slots, layout.dim)).to(slots.device)
    if verify:
        _verify(slots, layout, entries, first)
    count, dim = slots.shape[0], layout.dim
    mixed = slots[:, : layout.nibbles].to(torch.int32).view(count, BLOCK_TOKENS, dim)
    pairs = slots[:, layout.nibbles : layout.bases].view(count, BLOCK_TOKENS, dim // 2)
    nibble = torch.cat([pairs & 0xF, pairs >> 4], dim=2).to(torch.int32)
    base = slots[:, layout.bases : layout.header].to(torch.int32)
    exponent = ((base[:, None] - nibble) & 0xFF).flatten(1)

    block, rank = _listed(escapes, layout)
    position = _positions(slots, layout)[block, rank]
    wrong = position >= BLOCK_TOKENS * dim
    if bool(wrong.any()):
        raise _corrupt(first + int(block[wrong][0]), "an escape lies beyond the block")
    listed = slots[:, layout.exponents : layout.exponents + layout.most_escapes].to(torch.int32)
    exponent[block, position] = listed[block, rank]

    bits = (mixed & 0x80) << 8 | exponent.view_as(mixed) << 7 | (mixed & 0x7F)
    found = bits.to(torch.int16).view(torch.bfloat16)
    if bool(raw.any()):
        as_made = torch.cat([slots[raw, : layout.header], entries], dim=1)
        found[raw] = as_made.view(torch.bfloat16).view(-1, BLOCK_TOKENS, dim)
    return found


def _checked(slots: Tensor, layout: BlockLayout, first: int) -> tuple[Tensor, Tensor]:
    """Which blocks are raw, and how many escapes each lists."""
    head = slots[:, layout.header : layout.positions]
    escapes = _number(head[:, 2:4])
    most = torch.where(head[:, 1] == RAW, 0, layout.most_escapes)
    for wrong, what in (
        (head[:, 0] != VERSION, f"its version is not {VERSION}"),
        (head[:, 1] > RAW, "its kind is unknown"),
        (escapes > most, "it lists more escapes than fit"),
    ):
        if bool(wrong.any()):
            raise _corrupt(first + int(wrong.nonzero()[0]), what)
    return head[:, 1] == RAW, escapes


def _verify(slots: Tensor, layout: BlockLayout, entries: Tensor, first: int) -> None:
    stored = slots[:, layout.header + 4 : layout.positions]
    wrong = _sums(slots, layout, entries) != _number(stored)
    if bool(wrong.any()):
        raise _corrupt(first + int(wrong.nonzero()[0]), "its checksum is not that of its bytes")


def _sums(slots: Tensor, layout: BlockLayout, entries: Tensor) -> Tensor:
    """The sum of (2 i + 1) w modulo 2^32 over a block's words w: those before the header, then one
    per escape or those of the overflow entry, then what the header says. Odd factors: one word
    that differs always shows."""
    raw = slots[:, layout.header + 1] == RAW
    count = slots.shape[0]
    body = _number(slots[:, : layout.header].reshape(count, layout.header // 4, 4))
    escapes = _number(slots[:, layout.header + 2 : layout.header + 4])
    tail = layout.entry_bytes // 4
    rest = body.new_zeros((slots.shape[0], tail))
    rest[raw] = _number(entries.reshape(-1, tail, 4))
    listed = slots[:, layout.exponents : layout.exponents + layout.most_escapes].to(torch.int64)
    words = _positions(slots, layout) | listed << 16
    place = torch.arange(layout.most_escapes, device=slots.device)
    words = torch.where((place < escapes[:, None]) & ~raw[:, None], words, 0)
    rest[:, : layout.most_escapes] += words
    head = VERSION | raw.to(torch.int64) << 8 | escapes << 16
    words = torch.cat([body, rest, head[:, None]], dim=1)
    factor = 2 * torch.arange(words.shape[1], device=slots.device) + 1
    return (words * factor).sum(dim=1) & (2**32 - 1)  # modulo 2^64 before that


def _positions(slots: Tensor, layout: BlockLayout) -> Tensor:
    there = slots[:, layout.positions : layout.exponents]
    return _number(there.reshape(slots.shape[0], layout.most_escapes, 2))


def _listed(escapes: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Block and rank of every escape."""
    place = torch.arange(layout.most_escapes, device=escapes.device)
    block, rank = (place < escapes[:, None]).nonzero(as_tuple=True)
    return block, rank


def _number(parts: Tensor) -> Tensor:
    """[...] int64 of bytes [..., k], the least first."""
    weight = 256 ** torch.arange(parts.shape[-1], device=parts.device)
    return (parts.to(torch.int64) * weight).sum(-1)


def _bytes_of(numbers: Tensor, count: int) -> Tensor:
    shift = 8 * torch.arange(count, device=numbers.device)
    return ((numbers.to(torch.int64)[:, None] >> shift) & 0xFF).to(torch.uint8)


def _corrupt(block: int, what: str) -> LosslessCorrupt:
    return LosslessCorrupt(f"packed block {block} is damaged: {what}", block=block)
