# SPDX-License-Identifier: Apache-2.0
"""Reads and writes of one file, many at a time: the seam, and threads of Python that fill it.

The native library has threads that never hold the interpreter's lock; these do the same work where
it is not built. Knows bytes and offsets only.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

PIECE_BYTES = 2**20
"""One read or write at most: large enough for the full rate, small enough for many at a time."""

THREADS = 16
"""Reads and writes under way at once: NVMe drives and network volumes need a deep queue."""

SHORT = -1
"""Code of a fault: the file ended before the bytes asked for."""

PARTIAL_LOCKS = 64
"""Blocks of the file that are changed in part at once, by different threads."""


class Op(NamedTuple):
    """`nbytes` at `offset` of the file, from or to the memory at `address`."""

    offset: int
    address: int
    nbytes: int


class Fault(NamedTuple):
    """What could not be moved: an errno or SHORT, and how much of it had been."""

    code: int
    offset: int
    nbytes: int
    done: int


class DiskQueue(Protocol):
    """Jobs of reads and writes, done by threads of its own. May be called from any thread."""

    def job(self, *, write: bool, after: int = 0) -> int:
        """The number of a new job, larger than all before. A read waits for the writes numbered up
        to `after`; bytes that a write failed to change cannot be read until another has."""
        ...

    def start(self, job: int, ops: Sequence[Op]) -> None:
        """Begin; the memory stays, unchanged, until the job is over."""
        ...

    def fail(self, job: int, code: int, ops: Sequence[Op]) -> None:
        """End a job that was not begun."""
        ...

    def over(self, job: int, *, block: bool, forget: bool = False) -> Fault | bool:
        """Whether a job is over, or what of it failed first; a job forgotten is over."""
        ...

    def lost(self) -> list[Fault]:
        """Bytes that no write has changed since one failed to, neighbours within a block of the file
        included, as far as jobs are over."""
        ...

    def drain(self) -> None:
        """Return when no job is under way."""
        ...

    def close(self) -> None:
        """End the threads; idempotent."""
        ...


Move = Callable[[int, list[Any], int], int]
"""As `os.preadv` and `os.pwritev`: descriptor, buffers, offset; the bytes moved."""


@dataclass(slots=True)
class _Job:
    write: bool
    after: int
    started: bool = False
    left: int = 0
    fault: Fault | None = None
    waiting: list[Op] = field(default_factory=list)


class ThreadQueue:
    """Threads of Python, with the calls of `os`.

    Args:
        descriptor: of a file that outlives the queue.
        alignment: what direct I/O needs of offsets, sizes and memory; 0 without it.
        read, write: move bytes (for tests).
    """

    def __init__(
        self,
        descriptor: int,
        alignment: int,
        *,
        threads: int = THREADS,
        piece_bytes: int = PIECE_BYTES,
        read: Move = os.preadv,
        write: Move = os.pwritev,
    ) -> None:
        self._descriptor = descriptor
        self._alignment = alignment
        self._piece = piece_bytes
        self._moves = {False: read, True: write}
        self._state = threading.Condition()
        self._partial = [threading.Lock() for _ in range(PARTIAL_LOCKS)]
        self._jobs: dict[int, _Job] = {}
        self._last = 0
        self._writes: set[int] = set()
        self._reads: deque[int] = deque()
        self._ready: deque[tuple[int, Op]] = deque()
        self._unfinished = 0
        self._lost: list[tuple[int, int, int]] = []
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"headinfer-disk-{place}", daemon=True)
            for place in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def job(self, *, write: bool, after: int = 0) -> int:
        with self._state:
            self._last += 1
            self._jobs[self._last] = _Job(write, after)
            if write:
                self._writes.add(self._last)
            return self._last

    def start(self, job: int, ops: Sequence[Op]) -> None:
        with self._state:
            found = self._jobs[job]
            found.started = True
            found.waiting = [piece for op in ops for piece in self._pieces(op, found.write)]
            found.left = len(found.waiting)
            if not found.left:
                self._finish(job, found)
            elif found.write or self._free_of_writes(found):
                self._release(job, found)
            else:
                self._reads.append(job)

    def fail(self, job: int, code: int, ops: Sequence[Op]) -> None:
        with self._state:
            found = self._jobs[job]
            found.started = True
            first = ops[0] if ops else Op(0, 0, 0)
            found.fault = Fault(code, first.offset, first.nbytes, 0)
            if found.write:
                self._lost += [(op.offset, op.offset + op.nbytes, code) for op in ops]
            self._finish(job, found)

    def over(self, job: int, *, block: bool, forget: bool = False) -> Fault | bool:
        with self._state:
            found = self._jobs.get(job)
            while found is not None and not (found.started and not found.left):
                if not block:
                    return False
                self._state.wait()
                found = self._jobs.get(job)
            if found is None:
                return True
            if forget:
                del self._jobs[job]
            return True if found.fault is None else found.fault

    def lost(self) -> list[Fault]:
        with self._state:
            return [Fault(code, start, stop - start, 0) for start, stop, code in self._lost]

    def drain(self) -> None:
        with self._state:
            while self._unfinished or self._writes or self._reads:
                self._state.wait()

    def close(self) -> None:
        with self._state:
            self._stopped = True
            self._state.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _pieces(self, op: Op, write: bool) -> list[Op]:
        """`op` cut where the file's blocks begin. Of a write, a partial block is a piece of its own:
        it is read first, and nobody else may change it meanwhile."""
        found, at, unit = [], 0, self._alignment
        while at < op.nbytes:
            past = (op.offset + at) % unit if unit else 0
            step = self._piece - past
            if write and past:
                step = unit - past
            elif write and unit and op.nbytes - at > unit:
                step = min(step, (op.nbytes - at) // unit * unit)
            step = min(step, op.nbytes - at)
            found.append(Op(op.offset + at, op.address + at, step))
            at += step
        return found

    def _free_of_writes(self, job: _Job) -> bool:
        return not self._writes or min(self._writes) > job.after

    def _release(self, number: int, job: _Job) -> None:
        self._unfinished += job.left
        self._ready.extend((number, piece) for piece in job.waiting)
        job.waiting = []
        self._state.notify_all()

    def _finish(self, number: int, job: _Job) -> None:
        if job.write:
            self._writes.discard(number)
            for read in list(self._reads):
                if self._free_of_writes(self._jobs[read]):
                    self._reads.remove(read)
                    self._release(read, self._jobs[read])
        self._state.notify_all()

    def _serve(self) -> None:
        scratch = mmap.mmap(-1, self._piece + 2 * max(self._alignment, 1))  # whole pages
        while True:
            with self._state:
                while not self._ready and not self._stopped:
                    self._state.wait()
                if not self._ready:
                    return
                number, piece = self._ready.popleft()
                job = self._jobs[number]
                fault = None if job.write else self._lost_of(piece)
            if fault is None:
                fault = self._run(piece, job.write, memoryview(scratch))
            with self._state:
                job.fault = job.fault or fault
                if job.write:
                    self._remember(piece, 0 if fault is None else fault.code)
                self._unfinished -= 1
                job.left -= 1
                if not job.left:
                    self._finish(number, job)

    def _lost_of(self, piece: Op) -> Fault | None:
        """What of a piece to be read was lost."""
        for start, stop, code in self._lost:
            first, last = max(start, piece.offset), min(stop, piece.offset + piece.nbytes)
            if first < last:
                return Fault(code, first, last - first, 0)
        return None

    def _remember(self, piece: Op, code: int) -> None:
        """What was written again is there again; what failed is not, and with it a block of the file
        that was to be changed in part: what it held may be gone."""
        if not code and not self._lost:
            return
        first, last, unit = piece.offset, piece.offset + piece.nbytes, max(self._alignment, 1)
        if code:
            first, last = first // unit * unit, -(-last // unit) * unit
        kept = [(start, min(stop, first), why) for start, stop, why in self._lost if start < first]
        kept += [(max(start, last), stop, why) for start, stop, why in self._lost if stop > last]
        self._lost = kept + ([(first, last, code)] if code else [])

    def _run(self, piece: Op, write: bool, scratch: memoryview) -> Fault | None:
        memory = memoryview((ctypes.c_char * piece.nbytes).from_address(piece.address)).cast("B")
        unit = self._alignment
        before = piece.offset % unit if unit else 0
        start, size = piece.offset - before, before + piece.nbytes
        size = -(-size // unit) * unit if unit else size
        whole = size == piece.nbytes
        if not unit or (whole and not piece.address % unit):
            return self._move(memory, start, write)
        here = scratch[:size]
        if not write:
            fault = self._move(here, start, False)
            if fault is None:
                memory[:] = here[before : before + piece.nbytes]
        elif whole:
            here[:] = memory
            fault = self._move(here, start, True)
        else:
            with self._partial[start // unit % PARTIAL_LOCKS]:
                fault = self._move(here, start, False)
                if fault is None:
                    here[before : before + piece.nbytes] = memory
                    fault = self._move(here, start, True)
        if fault is None:
            return None
        # Who reads of it asked for these bytes, not for the whole blocks they lie in.
        done = min(max(fault.done - before, 0), piece.nbytes)
        return Fault(fault.code, piece.offset, piece.nbytes, done)

    def _move(self, memory: memoryview, offset: int, write: bool) -> Fault | None:
        done = 0
        while done < len(memory):
            try:
                count = self._moves[write](self._descriptor, [memory[done:]], offset + done)
            except OSError as error:
                return Fault(error.errno or errno.EIO, offset, len(memory), done)
            if count <= 0:
                return Fault(SHORT, offset, len(memory), done)
            done += count
        if not self._alignment:
            os.posix_fadvise(self._descriptor, offset, len(memory), os.POSIX_FADV_DONTNEED)
        return None
