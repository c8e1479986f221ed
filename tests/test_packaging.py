# SPDX-License-Identifier: Apache-2.0
"""The wheel holds what running needs, and the commands of scripts/ fail with one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "scripts" / "setup"


def test_the_wheel_holds_the_typing_mark_the_document_and_the_command(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
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
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


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
