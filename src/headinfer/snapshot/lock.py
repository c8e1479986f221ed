# SPDX-License-Identifier: Apache-2.0
"""One writer per context: a lock the system releases when its owner dies, and the owner's name.

`flock` decides; what the file says is for messages and for file systems shared between machines,
where a lock may be known to one machine only. Readers need no lock: nothing a manifest counts is
ever changed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from headinfer.errors import SnapshotError, SnapshotLocked, SnapshotWriteError
from headinfer.snapshot import durable

NAME = "lock"
SHARED_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "ceph", "gluster", "lustre", "beegfs", "gpfs")
"""How types begin of file systems that other machines write to, too; and "fuse." for any."""

TRIES = 5
"""Whoever asks for the owner holds the lock for a moment."""

_log = logging.getLogger(__name__)


class WriterLock:
    """Held from construction until `release`.

    Args:
        folder: the context's.

    Raises:
        SnapshotLocked: another process holds it.
        SnapshotError: the file system has no locks.
        SnapshotWriteError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._descriptor = self._acquire()
        try:
            self._take_over()
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = -1
            raise

    def release(self) -> None:
        """Others may write; idempotent."""
        if self._descriptor >= 0:
            try:
                os.ftruncate(self._descriptor, 0)  # nobody: a lock left behind names its owner
            except OSError as error:
                _log.debug("the lock's owner could not be erased: %s", error)
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.release()

    def _acquire(self) -> int:
        tries = 0
        while True:
            descriptor = durable.open_for_writing(self._path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Removed and made again between opening and locking: this one locks nothing.
                if os.fstat(descriptor).st_ino == os.stat(self._path).st_ino:
                    return descriptor
            except FileNotFoundError:
                pass
            except OSError as error:
                tries += 1
                if error.errno != errno.EWOULDBLOCK or tries == TRIES:
                    owner = _owner(descriptor)
                    os.close(descriptor)
                    raise _refusal(self._path, owner, error) from error
                time.sleep(0.02)
            os.close(descriptor)

    def _take_over(self) -> None:
        """Write this process's name; what an earlier owner left tells whether it is gone."""
        left = _owner(self._descriptor)
        if left is not None:
            elsewhere = left.get("host") != socket.gethostname()
            if elsewhere and is_shared(self._path):
                raise SnapshotLocked(
                    f"{self._path.parent} was being written by {_named(left)}, and this file "
                    "system is shared with other machines, whose locks may not be seen here. If "
                    f"that process has ended, remove {self._path} and try again"
                )
            _log.info("the writer lock left behind by %s is taken over", _named(left))
        data = json.dumps(_myself()).encode() + b"\n"
        os.ftruncate(self._descriptor, 0)
        durable.write_at(self._descriptor, data, 0, self._path)


def owner_of(folder: Path) -> str | None:
    """Who writes to the context now, in words; None if nobody does."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _named(_owner(descriptor))
    finally:
        os.close(descriptor)
    return None


def is_shared(path: Path) -> bool:
    """Whether other machines may write to the file system that `path` is on."""
    place, found = str(path.absolute().parent), ("", "")
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4]
        if f"{place}/".startswith(f"{point.rstrip('/')}/") and len(point) >= len(found[0]):
            found = point, after.split()[0]
    return found[1].startswith((*SHARED_FILE_SYSTEMS, "fuse."))


def _myself() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": started}


def _owner(descriptor: int) -> dict[str, Any] | None:
    """What the lock file says; None for nobody, and for what is no owner."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _named(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "a process that left no name"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"


def _refusal(
    path: Path, owner: dict[str, Any] | None, error: OSError
) -> SnapshotLocked | SnapshotError:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        return SnapshotLocked(
            f"{path.parent} is being written by {_named(owner)}; a context has one writer. Wait "
            "until it is done, or ask without --append and --save: any number may read"
        )
    if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
        return SnapshotError(
            f"{path.parent} is on a file system without locks ({error.strerror}), where two "
            "processes could write to one context unnoticed. Save to a local disk and copy the "
            "folder afterwards"
        )
    return SnapshotWriteError(
        f"{path} could not be locked: {error.strerror}", path=str(path), code=error.errno or 0
    )
