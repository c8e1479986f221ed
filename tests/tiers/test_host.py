# SPDX-License-Identifier: Apache-2.0
"""Host memory: exact sizes, budgets, what is prepared ahead, what page-locking refuses."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from headinfer.errors import TierClosed, TierFull
from headinfer.surroundings import huge_page_bytes
from headinfer.tiers import HostTier
from headinfer.tiers.host import _Mapping

MIB = 2**20


@pytest.fixture
def locking(monkeypatch):
    """Page-locking that always works, and the threads it ran on."""
    threads = []

    def register(self, touch):
        threads.append(threading.current_thread().name)
        self.bytes.zero_()

    monkeypatch.setattr(_Mapping, "_register", register)
    return threads


def test_memory_in_use_is_what_was_asked_for():
    tier = HostTier()
    extents = [tier.allocate(size) for size in (1000, 4096, 5 * MIB + 1)]
    assert tier.used_bytes == sum(extent.nbytes for extent in extents)
    assert [extent.nbytes for extent in extents] == [1024, 4096, 5 * MIB + 256]
    for extent in extents:
        view = tier.view(extent, 0, (extent.nbytes,), torch.uint8)
        view.fill_(7)
        assert int(view.sum()) == 7 * extent.nbytes
    for extent in extents:
        tier.free(extent)
    assert tier.used_bytes == 0


def test_host_memory_is_of_the_kind_that_huge_pages_are_granted_to():
    """Memory that could be shared with children gets none, whatever it is advised."""
    tier = HostTier()
    view = tier.view(tier.allocate(64 * MIB), 0, (64 * MIB,), torch.uint8)
    permissions, flags, inside = "", "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= view.data_ptr() < high
            permissions = rest[0] if inside else permissions
        elif inside and first == "VmFlags:":
            flags = rest
    assert permissions.endswith("p"), permissions
    assert "hg" in flags, flags
    view.fill_(1)
    assert huge_page_bytes(view.data_ptr()) is not None


def test_what_was_prepared_is_handed_out_and_made_on_another_thread(locking):
    tier = HostTier(pin=True)
    tier.prepare(MIB)
    tier.prepare(MIB)
    assert tier.ready_bytes == 2 * MIB
    assert tier.used_bytes == 0
    first, second, third = (tier.allocate(MIB) for _ in range(3))
    assert len({first.arena, second.arena, third.arena}) == 3
    assert tier.ready_bytes == 0
    assert tier.used_bytes == 3 * MIB
    assert [name.startswith("headinfer-arena") for name in locking] == [True, True, False]
    tier.close()


def test_nothing_is_prepared_where_nothing_is_locked(locking):
    tier = HostTier(pin=False)
    tier.prepare(MIB)
    assert tier.ready_bytes == 0
    assert not locking


def test_the_budget_counts_what_is_prepared_and_prefers_what_is_asked_for(locking):
    tier = HostTier(pin=True, budget_bytes=3 * MIB)
    tier.prepare(2 * MIB)
    tier.prepare(2 * MIB)  # would not fit beside the first
    assert tier.ready_bytes == 2 * MIB
    tier.allocate(MIB)
    tier.allocate(MIB)  # takes the place of what was only prepared
    assert (tier.used_bytes, tier.ready_bytes) == (2 * MIB, 0)
    with pytest.raises(TierFull, match=r"2\.00 MiB more host memory: 2\.00 MiB are used of 3\.00"):
        tier.allocate(2 * MIB)


def test_closing_gives_back_what_was_prepared(locking, monkeypatch):
    released = []
    release = _Mapping.release
    monkeypatch.setattr(
        _Mapping, "release", lambda self: (released.append(self.bytes.numel()), release(self))
    )
    tier = HostTier(pin=True)
    tier.allocate(MIB)
    tier.prepare(2 * MIB)
    tier.prepare(3 * MIB)
    tier.close()
    tier.close()
    assert len(released) == len(locking)  # all that were made; the others never were
    assert MIB in released
    assert tier.ready_bytes == 0
    with pytest.raises(TierClosed):
        tier.allocate(1)
    tier.prepare(1)
    assert tier.ready_bytes == 0


def test_refused_locking_is_named_once_and_memory_still_comes(monkeypatch, caplog):
    monkeypatch.setattr(
        _Mapping, "_register", lambda self, touch: "the locked-memory limit is 64 KiB"
    )
    tier = HostTier(pin=True)
    tier.prepare(MIB)
    first = tier.allocate(MIB)
    tier.allocate(MIB)
    assert tier.pin_failure == "the locked-memory limit is 64 KiB"
    assert tier.pin is False
    assert caplog.text.count("the locked-memory limit is 64 KiB") == 1
    tier.view(first, 0, (MIB,), torch.uint8).fill_(1)


def test_a_system_that_has_no_more_is_a_full_tier(locking, monkeypatch):
    def no_memory(*_, **how):
        raise OSError("Cannot allocate memory")

    tier = HostTier(pin=True)
    monkeypatch.setattr("headinfer.tiers.host.mmap.mmap", no_memory)
    tier.prepare(MIB)
    with pytest.raises(TierFull, match="the system refused more"):
        tier.allocate(MIB)
    with pytest.raises(TierFull, match="the system refused more"):
        tier.allocate(MIB)


def test_pages_are_given_by_whoever_was_asked_to(monkeypatch):
    class Cudart:
        def cudaHostRegister(self, pointer, nbytes, flags):
            return 0

        def cudaHostUnregister(self, pointer):
            return 0

    touched = []
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    tier = HostTier(pin=True, touch=lambda address, nbytes: touched.append((address, nbytes)))
    extent = tier.allocate(MIB)
    assert touched == [(tier.view(extent, 0, (1,), torch.uint8).data_ptr(), MIB)]
    assert tier.pin_failure is None
    tier.close()
