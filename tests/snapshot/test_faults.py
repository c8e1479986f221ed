# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to files is noticed and named, before it can influence an answer."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headinfer
from headinfer.errors import SnapshotCorrupt, SnapshotError, SnapshotWriteError
from headinfer.hf.cache_name import cache_argument
from headinfer.snapshot import Context, Manifest, durable

STAGED = {"staging": True, "tile_bytes": 4096, "num_slots": 3, "near_data": 0.0, "poison": True}
NEAR = {**STAGED, "near_data": 1.0}
PARTLY = {**STAGED, "resident_heads": 1}


def ask(model: Any, folder: Path, ids: Tensor, **options: Any) -> Tensor:
    """Logits of one more token."""
    cache = headinfer.load_context(model, folder, **options)
    with torch.no_grad():
        logits: Tensor = model(ids[:, 300:301], **cache_argument(model, cache)).logits
    return logits


def blocks(folder: Path, layer: int = 1) -> Path:
    return folder / Manifest.read(folder).files_of(layer)[0].name


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "options", [{}, STAGED, NEAR, PARTLY], ids=["place", "staged", "near", "part"]
)
def test_a_flipped_bit_is_named_before_it_is_attended(
    llama: Any, context: Path, ids: Tensor, options: dict[str, Any]
) -> None:
    path = blocks(context)
    flip(path, 130 * Manifest.read(context).layers[1].key_dim * 4)  # head 0, token 130
    with headinfer.attach(llama):
        said = rf"{path.name} is damaged: tokens 128 to 255 of layer 1, KV head 0, have checksum"
        with pytest.raises(SnapshotCorrupt, match=said) as caught:
            ask(llama, context, ids, **options)
    assert caught.value.path == str(path)


def test_every_single_bit_matters(context: Path) -> None:
    told = Context(context)
    width = told.manifest.layers[0].key_dim * 4
    for path in (blocks(context, 0), blocks(context, 1)):
        data = path.read_bytes()
        # The runs of two heads, keys and values: 256 tokens at the head of each.
        for run in range(4):
            for byte in (0, 128 * width, 256 * width - 1):
                flip(path, run * 2048 * width + byte)
                with pytest.raises(SnapshotCorrupt):
                    for _ in told.check_all():
                        pass
                path.write_bytes(data)


@pytest.mark.parametrize("verify", ["lazy", "now"])
def test_when_blocks_are_compared_is_a_choice(
    llama: Any, attached: Any, context: Path, ids: Tensor, verify: Any
) -> None:
    flip(blocks(context), 17)
    if verify == "now":
        with pytest.raises(SnapshotCorrupt):
            headinfer.load_context(llama, context, verify=verify)
    else:
        headinfer.load_context(llama, context, verify=verify)
    ask(llama, context, ids, verify="never")


def test_an_unknown_choice_is_refused(llama: Any, attached: Any, context: Path) -> None:
    with pytest.raises(headinfer.InputError, match="'lazy', 'now' or 'never'"):
        headinfer.load_context(llama, context, verify="often")  # type: ignore[arg-type]


def torn(folder: Path) -> None:
    path = blocks(folder)
    data = bytearray(path.read_bytes())
    place = 200 * Manifest.read(folder).layers[1].key_dim * 4
    data[place : place + 512] = bytes(512)
    path.write_bytes(data)


def swapped(folder: Path) -> None:
    one, other = blocks(folder, 0), blocks(folder, 1)
    between = folder / "between"
    one.rename(between)
    other.rename(one)
    between.rename(other)


def cut(name: Callable[[Path], Path]) -> Callable[[Path], None]:
    return lambda folder: os.truncate(name(folder), name(folder).stat().st_size - 1)


def gone(name: Callable[[Path], Path]) -> Callable[[Path], None]:
    return lambda folder: name(folder).unlink()


def flipped(name: Callable[[Path], Path]) -> Callable[[Path], None]:
    return lambda folder: flip(name(folder), name(folder).stat().st_size // 2)


def state(folder: Path) -> Path:
    return folder / Manifest.read(folder).state.name


def named(name: str) -> Callable[[Path], Path]:
    return lambda folder: folder / name


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (torn, "is damaged: tokens 128 to 255"),
        (swapped, "is damaged: tokens 0 to 127 of layer 0"),
        (cut(blocks), "cut short"),
        (gone(blocks), "is missing"),
        (flipped(named("sums.u32")), "sums.u32 is damaged"),
        (cut(named("sums.u32")), "cut short"),
        (flipped(named("tokens.i32")), "tokens.i32 is damaged"),
        (gone(named("tokens.i32")), "is missing"),
        (flipped(state), "is damaged: its SHA-256"),
        (cut(state), "cut short"),
        (flipped(named("manifest.json")), "manifest.json is damaged"),
    ],
)
def test_damage_is_named_and_an_undamaged_copy_answers(
    llama: Any, attached: Any, context: Path, original: Path, ids: Tensor, harm: Any, says: str
) -> None:
    expected = ask(llama, original, ids)
    harm(context)
    with pytest.raises(SnapshotCorrupt, match=says):
        ask(llama, context, ids)
    assert torch.equal(ask(llama, original, ids), expected)


def test_a_disk_that_cannot_read_is_named(
    llama: Any, attached: Any, context: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SnapshotCorrupt, match="cannot be read: Input/output error"):
        ask(llama, context, ids)


def test_files_that_may_not_be_read_are_named(
    llama: Any, attached: Any, context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, *args: Any) -> int:
        if str(path).endswith(".kv"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *args)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SnapshotError, match="cannot be read: Permission denied"):
        headinfer.load_context(llama, context)


# Writing.


def test_writes_may_be_short(
    llama: Any,
    attached: Any,
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: Any,
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:777], offset))
    cache = headinfer.read_context(llama, ids, tmp_path / "a.ctx")
    loaded = headinfer.load_context(llama, tmp_path / "a.ctx", verify="now")
    assert all(map(torch.equal, bits(cache), bits(loaded)))


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_failing_disk_leaves_what_was_durable(
    llama: Any,
    attached: Any,
    ids: Tensor,
    context: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: Any,
    call: str,
    code: int,
) -> None:
    before = bits(headinfer.load_context(llama, context, verify="now"))
    cache = headinfer.load_context(llama, context, append=True)
    headinfer.prefill(llama, ids[:, 300:400], cache)
    real = getattr(os, call)
    left = [3]

    def fail(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    if call == "rename":
        left[0] = 1  # the state file's, and then the manifest's
    with pytest.raises(SnapshotWriteError, match=re.escape(os.strerror(code))) as caught:
        headinfer.save_context(llama, cache, context)
    assert caught.value.code == code
    assert "is untouched" in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(SnapshotWriteError):  # nothing more goes through this writer
        headinfer.save_context(llama, cache, context)
    cache.saved.writer.close()
    left_over = headinfer.load_context(llama, context, verify="now")
    assert all(map(torch.equal, bits(left_over), before))
    again = headinfer.load_context(llama, context, append=True)
    headinfer.prefill(llama, ids[:, 300:400], again)
    headinfer.save_context(llama, again, context)
    assert Manifest.read(context).tokens == 400
    again.saved.writer.close()


def test_a_disk_that_fills_up_stops_the_reading_and_it_goes_on(
    llama: Any,
    attached: Any,
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: Any,
) -> None:
    folder, real, written = tmp_path / "a.ctx", os.pwrite, [0]

    def fill(descriptor: int, data: Any, offset: int) -> int:
        written[0] += len(data)
        if written[0] > 60_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fill)
    with pytest.raises(SnapshotWriteError, match=r"No space left on device \(.* are free\)"):
        headinfer.read_context(llama, ids, folder, checkpoint_every=64)
    monkeypatch.undo()
    there = []
    cache = headinfer.read_context(
        llama, ids, folder, on_start=lambda done, total: there.append(done)
    )
    assert 0 < there[0] < 400
    other = headinfer.read_context(llama, ids, tmp_path / "b.ctx")
    assert all(map(torch.equal, bits(cache), bits(other)))


def test_no_room_is_said_before_the_reading_begins(
    llama: Any, attached: Any, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "free_bytes", lambda folder: 1000)
    started: list[int] = []
    with pytest.raises(SnapshotWriteError, match=r"will take .* 1000 B are free there. Free"):
        headinfer.read_context(
            llama, ids, tmp_path / "a.ctx", on_start=lambda done, total: started.append(done)
        )
    assert not started


def test_a_clock_that_goes_back_changes_nothing(
    llama: Any,
    attached: Any,
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: Any,
) -> None:
    now = [2_000_000_000.0]

    def earlier(seconds: float | None = None) -> time.struct_time:
        now[0] -= 86_400
        return time.struct_time((2001, 9, 9, 1, 46, 40, 6, 252, 0))

    monkeypatch.setattr(time, "gmtime", earlier)
    monkeypatch.setattr(time, "time", lambda: now[0])
    folder = tmp_path / "a.ctx"
    headinfer.read_context(llama, ids[:, :256], folder, checkpoint_every=64)
    cache = headinfer.read_context(llama, ids, folder, checkpoint_every="30s")
    monkeypatch.undo()
    loaded = headinfer.load_context(llama, folder, verify="now")
    assert Manifest.read(folder).updated.startswith("2001")
    assert all(map(torch.equal, bits(cache), bits(loaded)))


def test_a_folder_without_permission_is_named(
    llama: Any, attached: Any, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SnapshotWriteError, match=r"Permission denied.*get write permission"):
        headinfer.read_context(llama, ids, tmp_path / "a.ctx")


def test_moving_the_folder_moves_the_context(
    llama: Any, attached: Any, context: Path, original: Path, ids: Tensor, tmp_path: Path
) -> None:
    moved = Path(shutil.move(context, tmp_path / "elsewhere"))
    assert torch.equal(ask(llama, moved, ids), ask(llama, original, ids))
