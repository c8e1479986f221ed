# SPDX-License-Identifier: Apache-2.0
"""Host memory as systems and containers report it, from copies of their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from headinfer.budget import GIB
from headinfer.surroundings import SHARE, WSL_PINNED_SHARE, host_memory, huge_page_bytes


class Machine:
    """A root folder with the files of a machine of 64 GiB, 40 of them free."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", _meminfo(64, 40))
        self.write("proc/sys/kernel/osrelease", "6.8.0-generic\n")

    def write(self, name: str, text: object) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def _meminfo(total: int, free: int) -> str:
    kib = 2**20
    return (
        f"MemTotal:       {total * kib} kB\nMemFree:        1024 kB\n"
        f"MemAvailable:   {free * kib} kB\nHugePages_Total:       0\n"
    )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_is_free_now_and_not_what_there_is(machine: Machine) -> None:
    found = host_memory(machine.root)
    assert found is not None
    assert (found.total_bytes, found.free_bytes) == (64 * GIB, 40 * GIB)
    assert not found.container
    assert found.default_budget(page_locked=True) == int(40 * GIB * SHARE)
    assert "free now are 40.00 GiB of 64.00 GiB, 90% of which" in found.reason(page_locked=True)


def test_a_container_of_version_2(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/")
    machine.write("sys/fs/cgroup/memory.max", 8 * GIB)
    machine.write("sys/fs/cgroup/memory.current", 5 * GIB)
    machine.write("sys/fs/cgroup/memory.stat", f"anon {2 * GIB}\ninactive_file {2 * GIB}")
    found = host_memory(machine.root)
    assert found is not None
    assert (found.total_bytes, found.free_bytes) == (8 * GIB, 5 * GIB)
    assert found.container
    assert "the container's limit leaves 5.00 GiB of 8.00 GiB" in found.reason(page_locked=False)


def test_the_narrowest_group_around_decides(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/jobs/mine")
    machine.write("sys/fs/cgroup/jobs/memory.max", 16 * GIB)
    machine.write("sys/fs/cgroup/jobs/memory.current", 13 * GIB)
    machine.write("sys/fs/cgroup/jobs/mine/memory.max", "max")
    machine.write("sys/fs/cgroup/jobs/mine/memory.current", 1 * GIB)
    found = host_memory(machine.root)
    assert found is not None
    assert (found.total_bytes, found.free_bytes) == (16 * GIB, 3 * GIB)


def test_a_container_of_version_1_that_sees_the_path_of_its_host(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 12 * GIB)
    machine.write("sys/fs/cgroup/memory/memory.usage_in_bytes", 4 * GIB)
    machine.write("sys/fs/cgroup/memory/memory.stat", f"total_inactive_file {1 * GIB}")
    found = host_memory(machine.root)
    assert found is not None
    assert (found.total_bytes, found.free_bytes) == (12 * GIB, 9 * GIB)


@pytest.mark.parametrize("limit", [9223372036854771712, "max", "", "nonsense"])
def test_no_limit_is_no_limit(machine: Machine, limit: object) -> None:
    machine.write("proc/self/cgroup", "4:memory:/\n0::/")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", limit)
    machine.write("sys/fs/cgroup/memory.max", limit)
    found = host_memory(machine.root)
    assert found is not None
    assert found.free_bytes == 40 * GIB
    assert not found.container


def test_a_limit_above_the_machine_leaves_what_the_machine_has(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/")
    machine.write("sys/fs/cgroup/memory.max", 200 * GIB)
    machine.write("sys/fs/cgroup/memory.current", 1 * GIB)
    found = host_memory(machine.root)
    assert found is not None
    assert (found.total_bytes, found.free_bytes, found.container) == (64 * GIB, 40 * GIB, False)


def test_a_group_that_is_full_leaves_nothing(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/")
    machine.write("sys/fs/cgroup/memory.max", 2 * GIB)
    machine.write("sys/fs/cgroup/memory.current", 3 * GIB)
    found = host_memory(machine.root)
    assert found is not None
    assert found.default_budget(page_locked=True) == 0


def test_windows_page_locks_half_of_its_linux(machine: Machine) -> None:
    machine.write("proc/meminfo", _meminfo(16, 15))
    machine.write("proc/sys/kernel/osrelease", "5.15.153.1-microsoft-standard-WSL2")
    found = host_memory(machine.root)
    assert found is not None
    assert found.wsl
    assert found.default_budget(page_locked=True) == int(16 * GIB * WSL_PINNED_SHARE)
    assert found.default_budget(page_locked=False) == int(15 * GIB * SHARE)
    assert "Windows page-locks 50%" in found.reason(page_locked=True)
    assert "Windows" not in found.reason(page_locked=False)


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None


def test_this_machine_says_something_plausible() -> None:
    found = host_memory()
    if found is None:
        pytest.skip("not Linux")
    assert 0 <= found.free_bytes <= found.total_bytes
    assert found.total_bytes > GIB // 4


def test_huge_pages_are_those_of_the_mapping_asked_about(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(
        "7f0000000000-7f0000400000 rw-p 00000000 00:00 0\n"
        "Size:               4096 kB\nAnonHugePages:      2048 kB\nVmFlags: rd wr hg\n"
        "7f0000400000-7f0000800000 rw-p 00000000 00:00 0\n"
        "Size:               4096 kB\nAnonHugePages:         0 kB\nVmFlags: rd wr hg\n"
    )
    assert huge_page_bytes(0x7F0000000000, smaps) == 2**21
    assert huge_page_bytes(0x7F00003FFFFF, smaps) == 2**21
    assert huge_page_bytes(0x7F0000400000, smaps) == 0
    assert huge_page_bytes(0x7F0000800000, smaps) is None
    assert huge_page_bytes(0, tmp_path / "absent") is None
