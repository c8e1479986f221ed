# SPDX-License-Identifier: Apache-2.0
"""The native library's queue: threads that read and write without the interpreter's lock."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from headinfer.attention import native
from headinfer.errors import TierError
from headinfer.tiers.disk_queue import PIECE_BYTES, THREADS, DiskQueue, Fault, Op, ThreadQueue

_OP = struct.Struct("@qPq")


class _Fault(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("nbytes", ctypes.c_int64),
        ("done", ctypes.c_int64),
    )


class NativeQueue:
    """See `headinfer.tiers.disk_queue.DiskQueue`; native/disk.cpp does the work.

    Raises:
        TierError: no thread could be had.
    """

    def __init__(
        self,
        descriptor: int,
        alignment: int,
        *,
        threads: int = THREADS,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._library = _declared(native.loaded())
        self._handle = self._library.headinfer_disk_open(
            descriptor, alignment, piece_bytes, threads
        )
        if not self._handle:
            raise TierError(
                f"the native library could not start {threads} threads that read and write; end "
                "other programs, or raise the limit on threads (ulimit -u)"
            )

    def job(self, *, write: bool, after: int = 0) -> int:
        number = int(self._library.headinfer_disk_job(self._handle, write, after))
        if number < 0:
            raise MemoryError("no memory is left to note down a read or write")
        return number

    def start(self, job: int, ops: Sequence[Op]) -> None:
        packed = b"".join(_OP.pack(*op) for op in ops)
        status = self._library.headinfer_disk_start(self._handle, job, packed, len(ops))
        if status:
            raise TierError(f"the native library refused job {job} with status {status}")

    def fail(self, job: int, code: int, ops: Sequence[Op]) -> None:
        packed = b"".join(_OP.pack(*op) for op in ops)
        self._library.headinfer_disk_fail(self._handle, job, code, packed, len(ops))

    def over(self, job: int, *, block: bool, forget: bool = False) -> Fault | bool:
        if not self._handle:  # closed, which waited for everything
            return True
        found = _Fault()
        ask = self._library.headinfer_disk_ask
        if not ask(self._handle, job, block, forget, ctypes.byref(found)):
            return False
        if not found.code:
            return True
        return Fault(found.code, found.offset, found.nbytes, found.done)

    def lost(self) -> list[Fault]:
        ranges: list[Fault] = []
        found = _Fault()
        ask = self._library.headinfer_disk_lost
        while self._handle and ask(self._handle, len(ranges), ctypes.byref(found)):
            ranges.append(Fault(found.code, found.offset, found.nbytes, 0))
        return ranges

    def drain(self) -> None:
        if self._handle:
            self._library.headinfer_disk_drain(self._handle)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle:
            self._library.headinfer_disk_close(handle)


def queue_for(descriptor: int, alignment: int) -> DiskQueue:
    """The native queue, or the one of Python threads where the library is not built."""
    if native.why_absent() is None:
        return NativeQueue(descriptor, alignment)
    return ThreadQueue(descriptor, alignment)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    handle, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.headinfer_disk_open.restype = handle
    library.headinfer_disk_open.argtypes = [flag, number, number, flag]
    library.headinfer_disk_job.restype = number
    library.headinfer_disk_job.argtypes = [handle, flag, number]
    library.headinfer_disk_start.argtypes = [handle, number, ctypes.c_char_p, number]
    library.headinfer_disk_fail.argtypes = [handle, number, flag, ctypes.c_char_p, number]
    library.headinfer_disk_ask.argtypes = [handle, number, flag, flag, ctypes.POINTER(_Fault)]
    library.headinfer_disk_lost.argtypes = [handle, number, ctypes.POINTER(_Fault)]
    library.headinfer_disk_drain.argtypes = [handle]
    library.headinfer_disk_drain.restype = None
    library.headinfer_disk_close.argtypes = [handle]
    library.headinfer_disk_close.restype = None
    return library
