# SPDX-License-Identifier: Apache-2.0
"""Bytes that survive a crash: every write, sync and rename of a saved context goes through here.

A file is either only added to beyond what the manifest counts, or replaced whole: written under
another name, synced, renamed, its folder synced. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headinfer.budget import format_bytes
from headinfer.errors import SnapshotWriteError

UNFINISHED = ".unfinished"
"""How names end of files that a rename has not made visible yet."""

WRITE_BYTES = 8 * 2**20
"""Written in one call at most: the system may stop in the middle of a larger one."""


def open_for_writing(path: Path) -> int:
    """A descriptor of `path`, which comes to exist; the caller closes it."""
    with explained(path, "opened"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def write_at(descriptor: int, data: Any, offset: int, path: Path) -> None:
    """All of `data`, a contiguous buffer, is at `offset`; not durable before `sync`."""
    view = memoryview(data).cast("B")
    with explained(path, "written"):
        done = 0
        while done < len(view):
            part = view[done : done + WRITE_BYTES]
            count = os.pwrite(descriptor, part, offset + done)
            if count <= 0:
                raise OSError(errno.EIO, f"{count} of {len(part)} bytes were taken")
            done += count


def sync(descriptor: int, path: Path) -> None:
    """What was written to `descriptor` survives a power loss."""
    with explained(path, "synced"):
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Names made, changed and removed in `folder` survive a power loss."""
    with explained(folder, "synced"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """`path` holds `data`, durably; at no moment anything but what it held before or `data`."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with explained(path, "written"):
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_at(descriptor, data, 0, unfinished)
        sync(descriptor, unfinished)
    finally:
        os.close(descriptor)
    with explained(path, "renamed"):
        os.rename(unfinished, path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """There is no `path` any more; that there was none is fine."""
    with explained(path, "removed"), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def explained(path: Path, done: str) -> Iterator[None]:
    """Turns what the system says into one sentence."""
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        reason = error.strerror or str(error) or type(error).__name__
        raise SnapshotWriteError(
            f"{path} could not be {done}: {reason}{_free(path, code)}. What the context held when "
            f"it was last durable is untouched; {_remedy(code)}",
            path=str(path),
            code=code,
        ) from error


def free_bytes(folder: Path) -> int:
    """Bytes a file in `folder` could take; of the nearest folder that exists."""
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            return shutil.disk_usage(place).free
    return 0


def _free(path: Path, code: int) -> str:
    if code not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return f" ({format_bytes(free_bytes(path.parent))} are free)"


def _remedy(code: int) -> str:
    match code:
        case errno.ENOSPC | errno.EDQUOT:
            return "free some space and run the same command again to go on from there"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "get write permission, or name a folder that can be written to"
        case errno.ENOENT | errno.ENOTDIR:
            return "create the folder it should be in, or name another one"
        case _:
            return "check the disk, then run the same command again to go on from there"
