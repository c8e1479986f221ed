# SPDX-License-Identifier: Apache-2.0
"""How fast a folder's disk is written and read, the way keys and values are: past the page cache,
many requests at a time. Remembered per file system.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from headinfer.budget import GIB, MIB
from headinfer.hf.remembered import remember_disk
from headinfer.spill import queue_for
from headinfer.tiers import DiskTier, HostTier
from headinfer.tiers.disk import free_bytes, op_of

MOST_BYTES = GIB
JOB_BYTES = 8 * MIB
AHEAD = 6


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Bytes/s of a folder; `refused` says why its page cache was not passed by."""

    folder: str
    read_bytes_s: float
    write_bytes_s: float
    refused: str | None

    def __str__(self) -> str:
        how = "" if self.refused is None else f"; {self.refused}"
        return (
            f"{self.folder} is read at {self.read_bytes_s / 1e9:,.2f} GB/s, written at "
            f"{self.write_bytes_s / 1e9:,.2f} GB/s{how}"
        )


def measure_disk(folder: str) -> DiskRates:
    """Write and read up to 1 GiB in `folder`, and remember the rates for later plans.

    Raises:
        InputError: it is not a folder that can be written to.
        TierFull: it has no room.
    """
    nbytes = max(min(MOST_BYTES, free_bytes(folder) // 4) // JOB_BYTES, 1) * JOB_BYTES
    tier, host = DiskTier(folder, planned_bytes=nbytes, queue=queue_for), HostTier()
    try:
        memory = host.view(host.allocate(AHEAD * JOB_BYTES), 0, (AHEAD * JOB_BYTES,), torch.uint8)
        memory.fill_(0xA5)
        extent = tier.allocate(nbytes)
        file = tier.view(extent, 0, (nbytes,), torch.uint8)
        seconds = {}
        for write in (True, False):
            started, jobs = time.perf_counter(), list[int]()
            for place, start in enumerate(range(0, nbytes, JOB_BYTES)):
                if place >= AHEAD:
                    tier.over(jobs[place - AHEAD], block=True)
                slot = (place % AHEAD) * JOB_BYTES
                op = op_of(tier, memory[slot : slot + JOB_BYTES], file[start : start + JOB_BYTES])
                jobs.append(tier.write([op]) if write else tier.read([op]))
            for job in jobs[-AHEAD:]:
                tier.over(job, block=True)
            seconds[write] = time.perf_counter() - started
    finally:
        tier.close()
        host.close()
    found = DiskRates(folder, nbytes / seconds[False], nbytes / seconds[True], tier.direct_refused)
    remember_disk(folder, read_bytes_s=found.read_bytes_s, write_bytes_s=found.write_bytes_s)
    return found
