# SPDX-License-Identifier: Apache-2.0
"""Disks that take their time, move less than asked, and fail where they are told to.

A queue of Python threads whose reads and writes pass through here. Half of all calls move a part
only, which is no fault and has to be continued; a fault is an error number or nothing moved at all.
"""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any

from headinfer.tiers.disk_queue import ThreadQueue


class Trouble:
    """What may happen, and what did.

    Args:
        seed: of delays and of how much is moved at once.
        slow_s: longest delay of a call.

    Attributes:
        read_code, write_code: error numbers that reads and writes end with from now on; 0 for
            moving nothing, None for no fault.
        spare_reads, spare_writes: calls that still succeed before the fault.
        reads, writes: calls so far.
    """

    def __init__(self, *, seed: int = 0, slow_s: float = 0.002) -> None:
        self.read_code: int | None = None
        self.write_code: int | None = None
        self.spare_reads = self.spare_writes = 0
        self.reads = self.writes = 0
        self._slow_s = slow_s
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def queue(self, descriptor: int, alignment: int) -> ThreadQueue:
        """For `DiskTier` and `Runner`."""
        return ThreadQueue(
            descriptor, alignment, threads=4, piece_bytes=8192, read=self._read, write=self._write
        )

    def _read(self, descriptor: int, buffers: list[Any], offset: int) -> int:
        with self._lock:
            self.reads += 1
            spared = self.spare_reads > 0
            self.spare_reads -= spared
        if self.read_code is not None and not spared:
            return _fault(self.read_code)
        return os.preadv(descriptor, [self._some(buffers[0])], offset)

    def _write(self, descriptor: int, buffers: list[Any], offset: int) -> int:
        with self._lock:
            self.writes += 1
            spared = self.spare_writes > 0
            self.spare_writes -= spared
        if self.write_code is not None and not spared:
            return _fault(self.write_code)
        return os.pwritev(descriptor, [self._some(buffers[0])], offset)

    def _some(self, buffer: memoryview) -> memoryview:
        with self._lock:
            delay = self._random.random() * self._slow_s * (self._random.random() < 0.2)
            whole = self._random.random() < 0.5
        time.sleep(delay)
        blocks = len(buffer) // 4096
        return buffer if whole or blocks < 2 else buffer[: blocks // 2 * 4096]


def _fault(code: int) -> int:
    if code:
        raise OSError(code, os.strerror(code))
    return 0
