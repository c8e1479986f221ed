# SPDX-License-Identifier: Apache-2.0
"""After a power loss at any moment the context is what it was when it was last durable, or newer.

Every write, sync, rename and removal is recorded; then, for every moment, a folder is made of what
a disk may hold then: what was synced is there, what was not is there, is not, or is garbage.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import headinfer
from headinfer.snapshot import Context, Manifest, durable, exists

Action = tuple[Any, ...]


class Recorder:
    """Records what `durable` asks of the system, with the data."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actions: list[Action] = []
        self.tokens: list[int] = []
        real_write, real_sync = durable.write_at, durable.sync
        real_folder, real_remove, real_rename = durable.sync_folder, durable.remove, os.rename

        def write_at(descriptor: int, data: Any, offset: int, path: Path) -> None:
            self.actions.append(("write", path.name, offset, bytes(memoryview(data).cast("B"))))
            real_write(descriptor, data, offset, path)

        def sync(descriptor: int, path: Path) -> None:
            self.actions.append(("sync", path.name))
            real_sync(descriptor, path)

        def sync_folder(folder: Path) -> None:
            self.actions.append(("folder",))
            real_folder(folder)

        def remove(path: Path) -> None:
            self.actions.append(("remove", path.name))
            real_remove(path)

        def rename(source: Path, target: Path) -> None:
            self.actions.append(("rename", Path(source).name, Path(target).name))
            real_rename(source, target)

        for name, wrapped in (
            ("write_at", write_at),
            ("sync", sync),
            ("sync_folder", sync_folder),
            ("remove", remove),
        ):
            monkeypatch.setattr(durable, name, wrapped)
        monkeypatch.setattr(os, "rename", rename)


class Disk:
    """A folder as a disk holds it: names and contents, each with a durable and a hoped-for state."""

    def __init__(self) -> None:
        self.files: dict[int, bytearray] = {}
        self.synced: dict[int, bytearray] = {}
        self.names: dict[str, int] = {}
        self.durable_names: dict[str, int] = {}
        self.pending: list[Action] = []
        self._next = 0

    def do(self, action: Action) -> None:
        match action:
            case "write", name, offset, data:
                if name not in self.names:
                    self._next += 1
                    self.names[name] = self._next
                    self.files[self._next] = bytearray()
                    self.synced[self._next] = bytearray()
                    self.pending.append(("name", name, self._next))
                content = self.files[self.names[name]]
                content.extend(bytes(max(0, offset + len(data) - len(content))))
                content[offset : offset + len(data)] = data
            case "sync", name:
                self.synced[self.names[name]] = bytearray(self.files[self.names[name]])
            case "rename", source, target:
                self.names[target] = self.names.pop(source)
                self.pending += [("name", target, self.names[target]), ("gone", source)]
            case "remove", name:
                if self.names.pop(name, None) is not None:
                    self.pending.append(("gone", name))
            case ("folder",):
                self.durable_names = dict(self.names)
                self.pending.clear()

    def after_power_loss(self, folder: Path, chance: random.Random) -> None:
        """What is found afterwards."""
        names = dict(self.durable_names)
        for change in self.pending[: chance.randint(0, len(self.pending))]:
            if change[0] == "name":
                names[change[1]] = change[2]
            else:
                names.pop(change[1], None)
        folder.mkdir()
        for name, which in names.items():
            (folder / name).write_bytes(self._content(which, chance))

    def _content(self, which: int, chance: random.Random) -> bytes:
        hoped, sure = self.files[which], self.synced[which]
        if hoped == sure:
            return bytes(sure)
        found = bytearray(hoped[: chance.randint(len(sure), max(len(sure), len(hoped)))])
        for page in range(0, len(found), 512):  # each page came, or did not, or came as garbage
            piece = slice(page, min(page + 512, len(found)))
            if found[piece] == sure[piece]:
                continue
            size = piece.stop - piece.start
            old = bytes(sure[piece]).ljust(size, b"\0")
            found[piece] = chance.choice([found[piece], old, chance.randbytes(size)])
            same = sure[piece]
            # Bytes of a page that were durable and not written again stay.
            for place, byte in enumerate(same):
                if hoped[page + place] == byte:
                    found[page + place] = byte
        return bytes(found)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    yield Recorder(monkeypatch)
    monkeypatch.undo()


def check(folder: Path, least: int, most: int) -> int:
    """The tokens of a context that is sound and has between `least` and `most`."""
    if not exists(folder):
        assert not least
        return 0
    context = Context(folder)
    for _ in context.check_all():
        pass
    assert least <= context.manifest.tokens <= most
    return context.manifest.tokens


def test_any_moment_of_reading_and_appending_leaves_a_sound_context(
    recorder: Recorder,
    llama: Any,
    attached: Any,
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "a.ctx"
    headinfer.read_context(llama, ids[:, :200], folder, checkpoint_every=64)
    cache = headinfer.load_context(llama, folder, append=True)
    headinfer.prefill(llama, ids[:, 200:330], cache)
    headinfer.save_context(llama, cache, folder)
    cache.saved.writer.close()
    monkeypatch.undo()
    disk, chance, least, seen = Disk(), random.Random(4), 0, set()
    for moment, action in enumerate(recorder.actions):
        disk.do(action)
        found = tmp_path / f"moment-{moment}"
        disk.after_power_loss(found, chance)
        seen.add(check(found, least, 330))
        if action == ("folder",) and "manifest.json" in disk.durable_names:
            sure = tmp_path / f"sure-{moment}"
            sure.mkdir()
            which = disk.durable_names["manifest.json"]
            (sure / "manifest.json").write_bytes(disk.synced[which])
            least = Manifest.read(sure).tokens
    assert least == 330
    assert {0, 200, 330} <= seen


def test_the_recorder_notices_a_missing_sync(
    recorder: Recorder, llama: Any, attached: Any, ids: Tensor, tmp_path: Path
) -> None:
    """The negative control: without syncs of block files some moment leaves damage."""
    folder = tmp_path / "a.ctx"
    headinfer.read_context(llama, ids[:, :300], folder, checkpoint_every=64)
    disk, chance, broken = Disk(), random.Random(4), 0
    for moment, action in enumerate(recorder.actions):
        if action[0] == "sync" and action[1].endswith(".kv"):
            continue
        disk.do(action)
        found = tmp_path / f"moment-{moment}"
        disk.after_power_loss(found, chance)
        try:
            check(found, 0, 300)
        except headinfer.SnapshotCorrupt:
            broken += 1
    assert broken
