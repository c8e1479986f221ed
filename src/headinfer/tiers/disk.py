# SPDX-License-Identifier: Apache-2.0
"""The tier of a disk: one file without a name, read and written past the system's page cache.

A view of an extent is a tensor of the "meta" device: it has shape and strides and no memory, and
its place in storage is its place in the file. So whoever slices what is stored does the same for
every tier, and only who copies (`headinfer.spill`) reads or writes. The file has lost its name
before the first byte is stored: it goes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.budget import format_bytes
from headinfer.errors import DiskError, InputError, TierClosed, TierFull
from headinfer.layout import Extent
from headinfer.tiers.arena import bytes_as
from headinfer.tiers.disk_queue import SHORT, DiskQueue, Fault, Op, ThreadQueue

_log = logging.getLogger(__name__)

ALIGNMENT = 4096
"""What direct I/O needs of offsets, sizes and memory, on drives of 512 and of 4096 byte sectors."""

LARGEST = 2**48
"""Bytes of the file there are offsets for."""

ARENA = -1
"""The arena number of every extent of this tier."""

QueueFactory = Callable[[int, int], DiskQueue]


class Place(NamedTuple):
    """What an extent's bytes are, for messages: layer, text, first token."""

    layer: int
    text: str
    start: int


Teller = Callable[[int, int], Place | None]
"""Says what `nbytes` from an offset of an extent on are; None if they are nothing."""


class DiskTier:
    """Extents in a file in `folder`, at most `budget_bytes` in all (None: what is free there).

    Called on the thread that runs the model, except `read`, `write` and `wait`.

    Args:
        planned_bytes: set aside at once; more is added as it is asked for.
        queue: makes what reads and writes, from a descriptor and an alignment.

    Attributes:
        direct_refused: why the system's page cache is used after all; None if it is not.
        read_bytes, written_bytes: moved so far.
        used_bytes: allocated now.

    Raises:
        InputError: `folder` is none, or cannot be written to.
        TierFull: there is no room for `planned_bytes`.
    """

    name = "disk"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        budget_bytes: int | None = None,
        planned_bytes: int = 0,
        queue: QueueFactory = ThreadQueue,
    ) -> None:
        self.folder = Path(folder)
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.read_bytes = self.written_bytes = 0
        self._reserved = self._end = 0
        self._holes: list[tuple[int, int]] = []
        self._tellers: dict[int, tuple[int, Teller]] = {}
        self._closed = False
        self._arena = torch.empty(LARGEST, dtype=torch.uint8, device="meta")
        self._storage = self._arena.untyped_storage()._cdata
        self._descriptor = nameless(self.folder)
        try:
            self._reserve(max(planned_bytes, ALIGNMENT))
            self.direct_refused = _go_direct(self._descriptor)
            if self.direct_refused is not None:
                _log.warning(
                    "%s is read and written through the system's page cache: %s",
                    self.folder,
                    self.direct_refused,
                )
            self.queue = queue(self._descriptor, 0 if self.direct_refused else ALIGNMENT)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._end_all = weakref.finalize(self, _end, self.queue, self._descriptor)

    def allocate(self, nbytes: int) -> Extent:
        if self._closed:
            raise TierClosed(f"the {self.name} tier is closed")
        size = whole_blocks(nbytes)
        if self.budget_bytes is not None and self.used_bytes + size > self.budget_bytes:
            raise self._full(size, f"of {format_bytes(self.budget_bytes)} allowed", "disk_memory")
        offset = self._hole(size)
        if offset is None:
            offset = self._end
            self._reserve(offset + size)
            self._end += size
        self.used_bytes += size
        return Extent(ARENA, offset, size)

    def prepare(self, nbytes: int) -> None:
        """Room is set aside when it is asked for."""

    def view(
        self, extent: Extent, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        return bytes_as(self._arena, extent.offset + offset, shape, dtype)

    def free(self, extent: Extent) -> None:
        self._tellers.pop(extent.offset, None)
        self.used_bytes -= extent.nbytes
        holes = sorted([*self._holes, (extent.offset, extent.offset + extent.nbytes)])
        joined: list[tuple[int, int]] = []
        for start, stop in holes:
            if joined and joined[-1][1] == start:
                joined[-1] = joined[-1][0], stop
            else:
                joined.append((start, stop))
        if joined[-1][1] == self._end:
            self._end = joined.pop()[0]
        self._holes = joined

    def close(self) -> None:
        self._end_all()
        self.used_bytes = 0
        self._closed = True

    def name_extent(self, extent: Extent, teller: Teller) -> None:
        """Messages about bytes of `extent` say what `teller` does."""
        self._tellers[extent.offset] = extent.nbytes, teller

    def place_of(self, view: Tensor) -> int:
        """Where in the file a contiguous view of this tier begins.

        Raises:
            TypeError: not a view of this tier, or not contiguous: something computed with one.
        """
        mine = view.is_meta and view.untyped_storage()._cdata == self._storage
        if not mine or not view.is_contiguous():
            raise TypeError(
                f"a tensor {tuple(view.shape)} on {view.device} is not one place of this disk"
            )
        return int(view.storage_offset()) * view.element_size()

    def read(self, ops: Sequence[Op], *, after: int = 0) -> int:
        """A job that fills memory; it comes after the writes numbered up to `after`."""
        job = self.queue.job(write=False, after=after)
        self.read_bytes += sum(op.nbytes for op in ops)
        self.queue.start(job, ops)
        return job

    def write(self, ops: Sequence[Op]) -> int:
        """A job that writes memory, which stays unchanged until it is over."""
        job = self.queue.job(write=True)
        self.begin_write(job, ops)
        return job

    def begin_write(self, job: int, ops: Sequence[Op]) -> None:
        """As `write`, of a job numbered beforehand."""
        self.written_bytes += sum(op.nbytes for op in ops)
        self.queue.start(job, ops)

    def over(self, job: int, *, block: bool) -> bool:
        """Whether a job is over; afterwards nobody else learns how it ended.

        Raises:
            DiskError: it failed.
        """
        found = self.queue.over(job, block=block, forget=True)
        if isinstance(found, Fault):
            raise self.explained(found)
        return found

    def fill(self, memory: Tensor, view: Tensor) -> None:
        """Contiguous host `memory` holds what is stored in `view`; waits. Raises DiskError."""
        self.over(self.read([op_of(self, memory, view)]), block=True)

    def store(self, view: Tensor, memory: Tensor) -> None:
        """`view` holds what contiguous host `memory` does; waits. Raises DiskError."""
        self.over(self.write([op_of(self, memory, view)]), block=True)

    def explained(self, fault: Fault) -> DiskError:
        """What a job's fault means to whoever runs the model; returns when no other job is under way
        that may fail, too."""
        self.queue.drain()
        place = self._named(fault) or Place(-1, f"{fault.nbytes:,} bytes at {fault.offset:,}", 0)
        complete = min([place.start, *(lost.start for lost in self.lost())])
        code = 0 if fault.code == SHORT else fault.code
        why = "the file ends there" if fault.code == SHORT else os.strerror(fault.code)
        return DiskError(
            f"{place.text} could not be moved to or from the disk at {self.folder}: {why}, after "
            f"{fault.done:,} of {fault.nbytes:,} bytes. What lies before token {complete:,} is "
            "complete: crop the cache to it, with crop_to_complete(), or reset it; then check the disk, "
            "or name another folder with disk=",
            path=str(self.folder),
            code=code,
            where=place.text,
            layer=place.layer,
            start=complete,
        )

    def lost(self) -> list[Place]:
        """What of the extents there are could not be written, and has not been since; of jobs that
        are over."""
        found = (self._named(fault) for fault in self.queue.lost())
        return [place for place in found if place is not None]

    def _named(self, fault: Fault) -> Place | None:
        """What was to lie there, if it is part of an extent that somebody named."""
        first = max((at for at in self._tellers if at <= fault.offset), default=None)
        if first is None:
            return None
        nbytes, teller = self._tellers[first]
        return teller(fault.offset - first, fault.nbytes) if fault.offset < first + nbytes else None

    def _hole(self, size: int) -> int | None:
        for place, (start, stop) in enumerate(self._holes):
            if stop - start >= size:
                self._holes[place : place + 1] = (
                    [(start + size, stop)] if stop - start > size else []
                )
                return start
        return None

    def _reserve(self, end: int) -> None:
        """The file has room for `end` bytes that nobody else can take."""
        more = end - self._reserved
        if more <= 0:
            return
        try:
            os.posix_fallocate(self._descriptor, self._reserved, more)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                free = format_bytes(shutil.disk_usage(self.folder).free)
                raise self._full(more, f"and {self.folder} has {free} free", "the room") from error
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise InputError(
                    f"disk={self.folder}: no room could be set aside: {error.strerror}"
                ) from error
            if shutil.disk_usage(self.folder).free < more:
                raise self._full(more, f"and {self.folder} has less free", "the room") from error
            os.ftruncate(self._descriptor, end)
        self._reserved = end

    def _full(self, size: int, why: str, what: str) -> TierFull:
        needed = self.used_bytes + size
        return TierFull(
            f"keys and values need {format_bytes(size)} more on disk: "
            f"{format_bytes(self.used_bytes)} are used {why}; raise {what} to {needed} bytes "
            f"({format_bytes(needed)}) or more, name a folder on a larger disk with disk=, or "
            "shorten the context",
            tier=self.name,
            budget_bytes=self.budget_bytes or 0,
            used_bytes=self.used_bytes,
            asked_bytes=size,
        )


def whole_blocks(nbytes: int) -> int:
    """`nbytes` rounded up to what an extent of this tier takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def op_of(tier: DiskTier, memory: Tensor, view: Tensor) -> Op:
    """Contiguous host `memory` beside a contiguous view of `tier` of the same size."""
    return Op(tier.place_of(view), memory.data_ptr(), memory.numel() * memory.element_size())


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes a file in `folder` could take.

    Raises:
        InputError: it is not a folder.
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise InputError(f"disk={str(folder)!r} {what}; name a folder on a fast local disk")
    return shutil.disk_usage(path).free


def nameless(folder: Path) -> int:
    """A descriptor of a new file in `folder` that has no name.

    Raises:
        InputError: that is not possible there.
    """
    free_bytes(folder)
    try:
        with contextlib.suppress(OSError):  # not every file system has nameless files
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        descriptor, path = tempfile.mkstemp(prefix="headinfer-", suffix=".kv", dir=folder)
        os.unlink(path)
    except OSError as error:
        raise InputError(
            f"disk={str(folder)!r}: no file can be made there: {error.strerror}; name a folder that "
            "can be written to"
        ) from error
    return descriptor


def _go_direct(descriptor: int) -> str | None:
    """Go past the page cache from now on; why not, if the file system refuses."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with mmap.mmap(-1, ALIGNMENT) as page:
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            # Some file systems take the flag and refuse the first read or write.
            os.pwritev(descriptor, [page], 0)
            os.preadv(descriptor, [page], 0)
        except OSError as error:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
            return f"its file system refuses direct I/O ({error.strerror})"
    return None


def _end(queue: DiskQueue, descriptor: int) -> None:
    queue.drain()
    queue.close()
    os.close(descriptor)
