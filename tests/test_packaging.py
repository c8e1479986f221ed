# SPDX-License-Identifier: Apache-2.0
"""The wheel holds what running needs, and the commands of scripts/ fail with one clear line."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "scripts" / "setup"
LIBRARY = "headinfer/lib/libheadinfer_native.so"


def build(kind: str, folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel or sdist made offline, and what was printed."""
    pytest.importorskip("scikit_build_core", reason="building needs scikit-build-core")
    if kind == "wheel" and not find_cmake():
        pytest.skip("building a wheel needs cmake")
    code = f"import scikit_build_core.build as b; b.build_{kind}({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.iterdir()
    return made, done.stdout + done.stderr


def find_cmake() -> bool:
    return bool(shutil.which("cmake")) or importlib.util.find_spec("cmake") is not None


def find_compiler() -> bool:
    names = (os.environ.get("CXX") or "c++", "g++", "clang++")
    return any(shutil.which(name) for name in names)


@pytest.mark.slow
def test_the_wheel_holds_the_typing_mark_the_document_and_the_command(tmp_path: Path) -> None:
    wheel, printed = build("wheel", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert b"headinfer = headinfer.cli.app:main" in archive.read(entry_points)
    source = ROOT / "src"
    data = [path for path in (source / "headinfer" / "data").rglob("*") if path.is_file()]
    for path in [source / "headinfer" / "py.typed", *data]:
        if "__pycache__" not in path.parts:
            assert str(path.relative_to(source)) in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "native/"))]
    if find_compiler():
        assert LIBRARY in names, printed
        assert wheel.name.split("-")[2:4] == ["py3", "none"], "not for every Python 3"
        assert not wheel.name.endswith("-any.whl"), "holds machine code"


def test_without_a_compiler_the_wheel_is_made_without_the_library_and_says_so(
    tmp_path: Path,
) -> None:
    wheel, printed = build("wheel", tmp_path, CXX="false", CC="false")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "headinfer/attention/native.py" in names
    assert not [name for name in names if name.endswith(".so")]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "native attention kernel was NOT built" in printed


def test_the_source_archive_holds_what_the_library_is_built_from(tmp_path: Path) -> None:
    archive, _ = build("sdist", tmp_path)
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for path in (ROOT / "native").iterdir():
        assert f"native/{path.name}" in names
    assert {"scripts/build_native", "pyproject.toml", "src/headinfer/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".o")) or "build/" in name]


def test_a_compiler_that_fails_is_named_by_the_build_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "build_native"), str(tmp_path / "library.so")],
        env={**os.environ, "CXX": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "build_native: false failed" in done.stderr
    assert not list(tmp_path.iterdir())


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SETUP), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_installing_setup_prints_one_interpreter() -> None:
    done = run_setup(HEADINFER_NO_INSTALL="1", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).exists()
    assert done.stdout.count("\n") == 1


def test_setup_names_its_only_argument() -> None:
    done = run_setup("--everything")
    assert done.returncode == 1
    assert "--dev" in done.stderr
    assert done.stdout == ""


def test_without_installing_an_interpreter_without_torch_is_refused(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")],
        check=True,
        timeout=120,
    )
    done = run_setup(HEADINFER_NO_INSTALL="1", PYTHON=str(tmp_path / "bare" / "bin" / "python"))
    assert done.returncode == 1
    assert "HEADINFER_NO_INSTALL=1" in done.stderr
    assert "lacks" in done.stderr


def test_check_explains_its_gates() -> None:
    check = ROOT / "scripts" / "check"
    done = subprocess.run([str(check), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for gate in ("--format", "--lint", "--types", "--imports", "--tests"):
        assert gate in done.stdout
