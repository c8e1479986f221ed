# SPDX-License-Identifier: Apache-2.0
"""Bytes per tier: what the user allows, parsed and printed.

GiB is 2**30 and stands for capacities; GB/s is 10**9 and stands for rates. Nothing here knows
what the bytes are for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from headinfer.errors import InputError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
_UNITS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 10**3,
    "m": MIB,
    "mib": MIB,
    "mb": 10**6,
    "g": GIB,
    "gib": GIB,
    "gb": 10**9,
    "t": TIB,
    "tib": TIB,
    "tb": 10**12,
}
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*$")


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What a run may use. None means: whatever the machine has free when the plan is made."""

    gpu_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None

    @classmethod
    def parse(
        cls,
        gpu_memory: str | int | None = None,
        host_memory: str | int | None = None,
        disk_memory: str | int | None = None,
    ) -> MemoryBudget:
        """Budget from sizes as users write them.

        Raises:
            InputError: a size that is not one.
        """
        return cls(
            gpu_bytes=None if gpu_memory is None else parse_bytes(gpu_memory, name="gpu_memory"),
            host_bytes=None
            if host_memory is None
            else parse_bytes(host_memory, name="host_memory"),
            disk_bytes=None
            if disk_memory is None
            else parse_bytes(disk_memory, name="disk_memory"),
        )


def parse_bytes(text: str | int, *, name: str = "size") -> int:
    """Bytes from "24GiB", "512 MiB", "1.5g" or a plain number of bytes.

    A unit without "i" and with "b" (GB) is decimal, every other is binary.

    Raises:
        InputError: not a size, or negative.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise InputError(f"{name}={text!r} is not a size; write for example '24GiB' or 25769803776")
    if isinstance(text, int):
        if text < 0:
            raise InputError(f"{name}={text} is negative; a size is 0 bytes or more")
        return text
    match = _SIZE.match(text)
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise InputError(
            f"{name}={text!r} is not a size; write a number and a unit (B KiB MiB GiB TiB, or "
            "KB MB GB TB for powers of ten), for example '24GiB'"
        )
    return int(float(match[1]) * unit)


def format_bytes(count: int) -> str:
    """A size as people read it: "24.00 GiB", "1.50 MiB", "312 B"."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"


def format_apart(one: int, other: int) -> tuple[str, str]:
    """Two sizes as people read them, in bytes where they would look the same and are not."""
    found = format_bytes(one), format_bytes(other)
    return found if found[0] != found[1] or one == other else (f"{one:,} B", f"{other:,} B")
