# SPDX-License-Identifier: Apache-2.0
"""The lossless format: every bit pattern comes back, and damage never passes for a crash."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from headinfer.errors import LosslessCorrupt
from headinfer.formats.lossless import (
    BlockLayout,
    decode,
    encode,
    layout_of,
    point_to,
    raw_indices,
    why_not,
)
from headinfer.testing.blocks import KINDS, bits_of, fetch_from
from headinfer.testing.numpy_blocks import read_block


def blocks(dims=(16, 48, 64, 128)):
    return st.builds(
        bits_of,
        st.sampled_from(KINDS),
        st.integers(1, 3),
        st.sampled_from(dims),
        st.integers(0, 2**31),
    )


def encoded(values):
    """Slots whose raw blocks use a list of entries from the back, and that list."""
    packed = encode(values)
    count = packed.entries.shape[0]
    point_to(packed, torch.arange(count).flip(0))
    return packed.slots, packed.entries.flip(0), packed.raw


def same_bits(a, b):
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@given(values=blocks((16, 48, 64, 128, 512)))
def test_every_bit_pattern_comes_back(values):
    slots, entries, _ = encoded(values)
    found = decode(slots, values.shape[2], fetch_from(entries), verify=True)
    assert same_bits(found, values)


@settings(max_examples=50)
@given(
    values=arrays.arrays(
        np.uint16, (2, 128, 16), elements=st.integers(0, 2**16 - 1), fill=st.integers(0, 2**16 - 1)
    )
)
def test_arbitrary_bits_come_back(values):
    values = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    slots, entries, _ = encoded(values)
    assert same_bits(decode(slots, 16, fetch_from(entries), verify=True), values)


@given(values=blocks())
def test_an_independent_reader_reads_the_blocks(values):
    slots, entries, _ = encoded(values)
    expected = values.view(torch.int16).numpy().view(np.uint16)
    rests = [bytes(entry.numpy()) for entry in entries]
    for slot, wanted in zip(slots, expected, strict=True):
        assert np.array_equal(read_block(bytes(slot.numpy()), values.shape[2], rests), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_which_blocks_are_raw(kind):
    _, _, raw = encoded(bits_of(kind, 6, 128, 1))
    if kind == "edge":
        assert raw.tolist() == [False, False, True] * 2
    elif kind != "few far":
        assert raw.tolist() == [kind in ("any bits", "tall", "special")] * 6


def test_a_head_of_128_dims_takes_three_quarters():
    assert BlockLayout(128).slot_bytes == 24800
    assert BlockLayout(128).slot_bytes / (2 * 128 * 128) <= 0.757
    assert BlockLayout(64).slot_bytes / (2 * 128 * 64) <= 0.757
    for dim in range(16, 513, 16):
        layout = BlockLayout(dim)
        parts = (layout.nibbles, layout.bases, layout.header, layout.slot_bytes)
        assert all(part % 16 == 0 for part in parts)
        assert layout.exponents + layout.most_escapes <= layout.slot_bytes
        assert layout.header + layout.entry_bytes == 2 * 128 * dim
        assert layout_of(torch.empty(1, layout.slot_bytes)) == layout


def test_what_cannot_be_packed_says_why():
    assert why_not(torch.bfloat16, 128, 64) is None
    assert "float16" in why_not(torch.float16, 128)
    assert "float32" in why_not(torch.float32, 128)
    for dim in (8, 33, 100, 528):
        assert str(dim) in why_not(torch.bfloat16, 128, dim)


@given(values=blocks((16, 128)), data=st.data())
def test_one_flipped_bit_is_found(values, data):
    slots, entries, _ = encoded(values)
    dim, layout = values.shape[2], BlockLayout(values.shape[2])
    block = data.draw(st.integers(0, slots.shape[0] - 1))
    raw = slots[block, layout.header + 1] == 1
    escapes = int(slots[block, layout.header + 2])
    used = [*range(layout.positions)]
    if not raw:  # another index of a raw block is another block's entry, or none
        used += [*range(layout.positions, layout.positions + 2 * escapes)]
        used += [*range(layout.exponents, layout.exponents + escapes)]
    place = data.draw(st.sampled_from(used))
    slots[block, place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(LosslessCorrupt, match=rf"block {block} is damaged|no such overflow"):
        decode(slots, dim, fetch_from(entries), verify=True)


@given(values=blocks((16, 64)), flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7))))
def test_damage_is_an_error_or_other_values_but_never_a_crash(values, flips):
    slots, entries, _ = encoded(values)
    for place, bit in flips:
        slots.view(-1)[place % slots.numel()] ^= 1 << bit
    with contextlib.suppress(LosslessCorrupt):
        found = decode(slots, values.shape[2], fetch_from(entries))
        assert found.shape == values.shape


def test_messages_name_the_block_and_what_is_wrong():
    slots, entries, _ = encoded(bits_of("normal", 3, 64, 0))
    at = BlockLayout(64).header
    for place, value, what in (
        (at, 9, "version"),
        (at + 1, 2, "kind"),
        (at + 2, 200, "more escapes"),
        (8, 77, "checksum"),
    ):
        damaged = slots.clone()
        damaged[1, place] = value
        with pytest.raises(LosslessCorrupt, match=f"packed block 1 is damaged: .*{what}") as caught:
            decode(damaged, 64, fetch_from(entries), verify=True)
        assert caught.value.block == 1


def test_raw_blocks_name_their_entries():
    values = torch.cat([bits_of(kind, 2, 32, 5) for kind in ("any bits", "normal", "any bits")])
    slots, _, raw = encoded(values)
    assert raw.tolist() == [True, True, False, False, True, True]
    assert raw_indices(slots.view(2, 3, -1), 32).tolist() == [3, 2, 1, 0]


def test_no_blocks_at_all():
    packed = encode(torch.empty((0, 128, 64), dtype=torch.bfloat16))
    assert packed.slots.shape == (0, BlockLayout(64).slot_bytes)
    assert decode(packed.slots, 64, fetch_from(packed.entries)).shape == (0, 128, 64)
