# SPDX-License-Identifier: Apache-2.0
"""How fast a folder's disk is written and read, the way keys and values are: past the page cache,
many requests at a time. Remembered per file system.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from headinfer.budget import GIB, MIB
from headinfer.hf.remembered import remember_disk
from headinfer.spill import queue_for
from headinfer.tiers import DiskTier, HostTier
from headinfer.tiers.disk import free_bytes, op_of

MOST_BYTES = GIB
JOB_BYTES = 8 * MIB
AHEAD = 6
KVIKIO = ("kvikio", "kvikio-cu12", "kvikio-cu13")
"""Names of its package: one for each major version of CUDA, and that of conda."""


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Bytes/s of a folder.

    Attributes:
        refused: why its page cache was not passed by; None if it was.
        gpu_direct: whether bytes could go between the disk and a GPU without host memory.
    """

    folder: str
    read_bytes_s: float
    write_bytes_s: float
    refused: str | None
    gpu_direct: str

    def __str__(self) -> str:
        how = "" if self.refused is None else f"; {self.refused}"
        return (
            f"{self.folder} is read at {self.read_bytes_s / 1e9:,.2f} GB/s, written at "
            f"{self.write_bytes_s / 1e9:,.2f} GB/s{how}\n{self.gpu_direct}"
        )


def gpu_direct() -> str:
    """What is known here of GPUDirect Storage, and what is done instead."""
    there = [one for one in KVIKIO if _version(one) is not None]
    found = f"KvikIO {_version(there[0])} is installed" if there else "KvikIO is not installed"
    return (
        f"GPUDirect Storage: not used ({found}). On the way to a GPU a tile is read into page-locked "
        "host memory, past the page cache, and copied from there while the next one is read; reading "
        "straight into GPU memory was not built, because it could be measured nowhere yet"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    found = DiskRates(
        folder,
        nbytes / seconds[False],
        nbytes / seconds[True],
        tier.direct_refused,
        gpu_direct(),
    )
    remember_disk(folder, read_bytes_s=found.read_bytes_s, write_bytes_s=found.write_bytes_s)
    return found
