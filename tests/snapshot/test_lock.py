# SPDX-License-Identifier: Apache-2.0
"""One writer, many readers; a lock nobody holds any more is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headinfer
from headinfer.errors import SnapshotError, SnapshotLocked
from headinfer.hf.cache_name import cache_argument
from headinfer.snapshot import Manifest, WriterLock, lock, owner_of, remove_context

HOLD = """
import sys
from pathlib import Path
from headinfer.snapshot.lock import WriterLock
held = WriterLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(context: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to the context."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(context)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_told_who_the_first_is(
    other: Any, llama: Any, attached: Any, context: Path, ids: Tensor
) -> None:
    said = rf"is being written by process {other.pid} on .*since 20.*one writer"
    with pytest.raises(SnapshotLocked, match=said):
        headinfer.load_context(llama, context, append=True)
    with pytest.raises(SnapshotLocked, match=said):
        headinfer.read_context(llama, ids, context)
    with pytest.raises(SnapshotLocked, match=said):
        remove_context(context)
    assert str(other.pid) in str(owner_of(context))


def test_readers_do_not_mind_a_writer(other: Any, llama: Any, attached: Any, context: Path) -> None:
    first = headinfer.load_context(llama, context)
    second = headinfer.load_context(llama, context)
    assert first.get_seq_length() == second.get_seq_length() == 300


def test_the_lock_of_a_killed_writer_is_free(
    other: Any, llama: Any, attached: Any, context: Path
) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert json.loads((context / "lock").read_text())["pid"] == other.pid
    assert owner_of(context) is None
    cache = headinfer.load_context(llama, context, append=True)
    assert str(os.getpid()) in str(owner_of(context))
    cache.saved.writer.close()
    assert owner_of(context) is None


def test_one_process_cannot_write_twice(llama: Any, attached: Any, context: Path) -> None:
    cache = headinfer.load_context(llama, context, append=True)
    with pytest.raises(SnapshotLocked, match=str(os.getpid())):
        headinfer.load_context(llama, context, append=True)
    cache.close()
    headinfer.load_context(llama, context, append=True).close()


def test_a_lock_left_on_a_shared_file_system_by_another_machine_is_asked_about(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {"pid": 1, "host": "another", "since": "2020-01-01T00:00:00Z"}
    (context / "lock").write_text(json.dumps(left))
    monkeypatch.setattr(lock, "is_shared", lambda path: True)
    with pytest.raises(SnapshotLocked, match=r"process 1 on another.*remove .*lock"):
        WriterLock(context)
    monkeypatch.setattr(lock, "is_shared", lambda path: False)
    WriterLock(context).release()  # this machine under an earlier name, a container for example


@pytest.mark.parametrize(
    ("mounts", "shared"),
    [
        ("1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:9 / {tmp} rw - nfs4 server:/x rw\n", True),
        ("1 0 8:1 / / rw - nfs server:/ rw\n2 1 0:9 / {tmp} rw - tmpfs tmpfs rw\n", False),
        ("1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:9 / {tmp}o rw - nfs4 server:/x rw\n", False),
        ("1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:9 / {tmp} rw - fuse.sshfs x rw\n", True),
    ],
)
def test_shared_file_systems_are_known_by_their_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: str, shared: bool
) -> None:
    text = mounts.format(tmp=tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda self, **more: text)
    assert lock.is_shared(tmp_path / "lock") is shared


def test_a_file_system_without_locks_is_refused(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(SnapshotError, match=r"without locks .*Save to a local disk"):
        WriterLock(context)


def test_readers_see_one_state_while_a_writer_adds_to_it(
    llama: Any, attached: Any, context: Path, ids: Tensor
) -> None:
    expected = ids[:, 300:301]
    before = headinfer.load_context(llama, context)
    with torch.no_grad():
        answer = llama(expected, **cache_argument(llama, before)).logits
    lengths: set[int] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            lengths.add(headinfer.snapshot.Context(context).manifest.tokens)

    reader = threading.Thread(target=read)
    reader.start()
    writer = headinfer.load_context(llama, context, append=True)
    early = headinfer.load_context(llama, context)
    for start in range(300, 400, 20):
        headinfer.prefill(llama, ids[:, start : start + 20], writer)
        headinfer.save_context(llama, writer, context)
    stop.set()
    reader.join()
    writer.saved.writer.close()
    assert lengths <= set(range(300, 401, 20))
    with torch.no_grad():  # read from files that have grown since
        assert torch.equal(llama(expected, **cache_argument(llama, early)).logits, answer)
    assert Manifest.read(context).tokens == 400


def test_removing_leaves_what_is_not_ours(context: Path) -> None:
    (context / "notes.txt").write_text("mine")
    assert remove_context(context) == ["notes.txt"]
    assert [item.name for item in context.iterdir()] == ["notes.txt"]
    (context / "notes.txt").unlink()
    with pytest.raises(SnapshotError, match=r"it has no manifest\.json"):
        remove_context(context)
