# SPDX-License-Identifier: Apache-2.0
"""How much host memory a process may take where it runs: free now, and what a container leaves.

Read from /proc and /sys, whose root can be another folder in tests. Knows control groups of both
versions and Windows' Linux subsystem; nothing of what the memory is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headinfer.budget import KIB, format_bytes

SHARE = 0.9
"""Of the host memory that is free now, what a run takes unless told otherwise."""
WSL_PINNED_SHARE = 0.5
"""Of all memory of Windows' Linux subsystem, what its driver page-locks at most."""
UNLIMITED = 2**60
"""Control groups of version 1 write a number near 2**63 for no limit."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Host memory as this process finds it.

    Attributes:
        total_bytes: of the machine or its container, whichever is less.
        free_bytes: what can be taken now without pushing others out.
        container: a control group limits it further than the machine does.
        wsl: this is Windows' Linux subsystem.
    """

    total_bytes: int
    free_bytes: int
    container: bool = False
    wsl: bool = False

    def default_budget(self, *, page_locked: bool) -> int:
        """What a run takes when it is told nothing."""
        found = int(self.free_bytes * SHARE)
        if page_locked and self.wsl:
            found = min(found, int(self.total_bytes * WSL_PINNED_SHARE))
        return max(found, 0)

    def reason(self, *, page_locked: bool) -> str:
        """One line on where `default_budget` comes from."""
        where = "the container's limit leaves" if self.container else "free now are"
        text = (
            f"host memory: at most {format_bytes(self.default_budget(page_locked=page_locked))}; "
            f"{where} {format_bytes(self.free_bytes)} of {format_bytes(self.total_bytes)}, "
            f"{SHARE:.0%} of which are used unless host_memory says otherwise"
        )
        if page_locked and self.wsl:
            text += f"; Windows page-locks {WSL_PINNED_SHARE:.0%} of its Linux subsystem's memory"
        return text


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """What this process may take; None where the system does not say (not Linux)."""
    info = _meminfo(root / "proc/meminfo")
    total, free = info.get("MemTotal"), info.get("MemAvailable")
    if total is None or free is None:
        return None
    container = False
    for limit, used in _limits(root):
        container = container or limit < total
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return HostMemory(total, free, container, _is_wsl(root))


def _meminfo(path: Path) -> dict[str, int]:
    """Bytes by name; /proc/meminfo counts in KiB."""
    found = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * KIB
    return found


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of every control group this process is in, and of those around it."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" and not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for folder in _and_above(base, path):
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is None or limit >= UNLIMITED:
                continue
            # Files that were read once and are not used count, but go when memory is wanted.
            spare = _stat(folder / "memory.stat").get(names[2], 0)
            yield limit, max((used or 0) - spare, 0)


def _and_above(base: Path, path: str) -> Iterator[Path]:
    """The group's folder and all around it. Inside a container its path may be one of the host
    that is not there; what is mounted at `base` is then the container's own group."""
    parts = [part for part in path.strip("/").split("/") if part]
    for count in range(len(parts), -1, -1):
        folder = base.joinpath(*parts[:count])
        if folder.is_dir():
            yield folder


def _stat(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _is_wsl(root: Path) -> bool:
    return "microsoft" in _text(root / "proc/sys/kernel/osrelease").lower()


def _text(path: Path) -> str:
    """What a file of the system says; nothing if it is not there or not for us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def huge_page_bytes(address: int, smaps: Path = Path("/proc/self/smaps")) -> int | None:
    """Of the mapping of this process that `address` is in, the bytes that lie in huge pages; None
    where the system does not say."""
    try:
        lines = smaps.read_text().splitlines()
    except OSError:
        return None
    inside = False
    for line in lines:
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and first == "AnonHugePages:":
            return int(rest[0]) * KIB
    return None
