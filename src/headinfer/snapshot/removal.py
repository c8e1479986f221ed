# SPDX-License-Identifier: Apache-2.0
"""Which files belong to a context, what they take, and removing them: the manifest first, under
the writer's lock."""

from __future__ import annotations

import contextlib
from pathlib import Path

from headinfer.errors import SnapshotCorrupt
from headinfer.snapshot import durable
from headinfer.snapshot.lock import NAME as LOCK
from headinfer.snapshot.lock import WriterLock
from headinfer.snapshot.manifest import NAME, Manifest
from headinfer.snapshot.writer import SUMS_NAME, TOKENS_NAME

ENDINGS = (".kv", ".safetensors", durable.UNFINISHED)
NAMES = (NAME, SUMS_NAME, TOKENS_NAME, LOCK)


def remove_context(folder: Path) -> list[str]:
    """There is no context `folder` any more; returns the names of other files that stay.

    Raises:
        SnapshotError: there is none.
        SnapshotLocked: another process writes to it.
        SnapshotWriteError: there is no permission.
    """
    with contextlib.suppress(SnapshotCorrupt):  # damaged ones are removed like others
        Manifest.read(folder)
    lock = WriterLock(folder)
    try:
        ours = [item for item in folder.iterdir() if is_ours(item.name)]
        durable.remove(folder / NAME)
        durable.sync_folder(folder)
        for item in ours:
            durable.remove(item)
    finally:
        lock.release()
    left = sorted(item.name for item in folder.iterdir())
    if not left:
        with durable.explained(folder, "removed"):
            folder.rmdir()
    return left


def is_ours(name: str) -> bool:
    """Whether a file of this name in a context's folder belongs to it."""
    return name in NAMES or name.endswith(ENDINGS)


def size_of(folder: Path) -> int:
    """Bytes a context takes on disk, holes not counted; 0 if there is none."""
    if not folder.is_dir():
        return 0
    return sum(item.stat().st_blocks * 512 for item in folder.iterdir() if is_ours(item.name))
