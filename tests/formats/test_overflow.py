# SPDX-License-Identifier: Apache-2.0
"""Overflow entries: set aside before they are needed, waited for only when they must be, given back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headinfer.errors import LosslessCorrupt, TierFull
from headinfer.formats.overflow import Overflow

DIM = 16
ENTRY = 63 * DIM


class Tickets:
    """Encodings under way; `waited` counts those that the host blocked on."""

    def __init__(self):
        self.over, self.waited, self.landing = set(), 0, {}

    def __call__(self, ticket, block):
        if block and ticket not in self.over:
            self.waited += 1
            self.finish(ticket)
        return ticket in self.over

    def finish(self, ticket):
        for one in range(ticket + 1):
            if one in self.landing:
                self.landing.pop(one)()
            self.over.add(one)


def made(tickets, *, chunks=10**6, per_chunk=4, ahead=2):
    left = [chunks]

    def allocate(nbytes):
        if not left[0]:
            raise TierFull("host is full", tier="host", budget_bytes=1, used_bytes=1, asked_bytes=1)
        left[0] -= 1
        return torch.zeros(nbytes, dtype=torch.uint8)

    return Overflow(
        DIM,
        allocate,
        torch.device("cpu"),
        wait=tickets,
        ahead=ahead,
        chunk_bytes=per_chunk * ENTRY,
    )


def encode(overflow, tickets, ticket, blocks, raw):
    """A write of `blocks` blocks of which `raw` are raw; its count lands with its ticket."""
    overflow.reserve(blocks)
    numbers = overflow.store(torch.full((raw, ENTRY), ticket % 256, dtype=torch.uint8))
    count = overflow.counter.clone()
    tickets.landing[ticket] = lambda: overflow.landed.copy_(count)
    overflow.encoded(ticket, blocks)
    return numbers


def test_entries_are_set_aside_for_several_writes_and_then_waited_for():
    tickets = Tickets()
    overflow = made(tickets)
    for ticket in range(2):
        encode(overflow, tickets, ticket, 8, 0)
    assert (tickets.waited, overflow.entries) == (0, 16)
    encode(overflow, tickets, 2, 8, 0)  # none of them was raw, which the host had to wait to learn
    assert (tickets.waited, overflow.entries) == (1, 16)
    tickets.finish(2)
    encode(overflow, tickets, 3, 8, 0)
    assert tickets.waited == 1


def test_a_full_tier_is_an_error_only_when_nothing_is_under_way():
    tickets = Tickets()
    overflow = made(tickets, chunks=2)
    encode(overflow, tickets, 0, 8, 3)
    encode(overflow, tickets, 1, 5, 2)  # waits: three of eight were raw
    assert tickets.waited == 1
    with pytest.raises(TierFull, match=r"5 blocks that had to be stored raw .* 4 more blocks"):
        overflow.reserve(4)
    overflow.reserve(3)


@given(
    writes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.booleans()), max_size=30)
)
def test_numbers_are_owned_once_and_entries_keep_their_bytes(writes):
    tickets = Tickets()
    overflow = made(tickets, ahead=3)
    held = {}
    for ticket, (blocks, raw, give) in enumerate(writes):
        numbers = encode(overflow, tickets, ticket, blocks, min(raw, blocks)).tolist()
        assert not set(numbers) & set(held)
        held |= dict.fromkeys(numbers, ticket % 256)
        if give and held:
            tickets.finish(ticket)
            gone = sorted(held)[::2]
            overflow.give(torch.tensor(gone))
            held = {number: ticket for number, ticket in held.items() if number not in gone}
        for number, value in held.items():
            assert bool((overflow.fetch(torch.tensor([number])) == value).all())
    tickets.finish(len(writes))
    assert overflow.used == len(held)


def test_an_entry_that_is_not_there_is_damage():
    overflow = made(Tickets())
    overflow.reserve(1)
    for index in (-1, overflow.entries):
        with pytest.raises(LosslessCorrupt, match="names overflow entry"):
            overflow.fetch(torch.tensor([index]))


def test_a_number_that_a_damaged_block_named_is_never_handed_out():
    tickets = Tickets()
    overflow = made(tickets)
    mine = encode(overflow, tickets, 0, 4, 4)
    tickets.finish(0)
    overflow.reserve(0)
    free = overflow.entries - overflow.used
    named = torch.tensor([int(mine[0]), 10**6, overflow.entries, 2**31 + 1, 2**32 - 1])
    overflow.give(named)  # the four entries of the damaged blocks stay in use
    assert overflow.entries - overflow.used == free + 1
    handed = overflow.free_numbers(free + 1).tolist()
    assert len(set(handed)) == len(handed)
    assert all(0 <= number < overflow.entries for number in handed)
