# SPDX-License-Identifier: Apache-2.0
"""The state of the tree itself: what no file may contain, and how large things have become."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONG_MODULE = 300
LONG_FUNCTION = 60

# Only hosts a reader may be sent to. Package indexes and mirrors are the business of the machine.
LINKED_HOSTS = (
    "apache.org",
    "arxiv.org",
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "semver.org",
    "spdx.org",
    "w3.org",  # namespaces of SVG: nobody is sent there
    "localhost",
    "127.0.0.1",
)
MACHINE_PATH = re.compile(r"(?<![\w.~}$/-])/(?:home|root|opt|work|mnt|scratch|Users)/\w")
URL_HOST = re.compile(r"https?://(?:www\.)?([\w.-]+)")
WAITING_WORD = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?!\((?:#\d+|v\d[\d.]*|[a-z]+ [\d.]+)\))")
CONFLICT = re.compile(r"^(<{7}|>{7}|={7}$)", re.MULTILINE)
CUDA_CALL = re.compile(r"\.cuda\(\)")
NOBODYS_MODULE = re.compile(r"^(utils?|commons?|helpers?|misc)$")


@cache
def tracked_files() -> list[Path]:
    """The files under version control; of an unpacked source archive, all of them."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return sorted(
                ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()
            )

    def is_ours(path: Path) -> bool:
        folders = path.relative_to(ROOT).parts[:-1]
        made = {"__pycache__", "build", "dist"}
        return not any(f in made or (f.startswith(".") and f != ".ci") for f in folders)

    return sorted(path for path in ROOT.rglob("*") if path.is_file() and is_ours(path))


def text_files() -> Iterator[tuple[str, str]]:
    """Name and content of every tracked text file except this one, which has to name the words."""
    for path in tracked_files():
        if path == Path(__file__).resolve():
            continue
        try:
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def python_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py"]


def lines_with(pattern: re.Pattern[str], *, only: str = "") -> list[str]:
    """`file:line: text` of every match."""
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in text_files()
        if name.endswith(only) and not name.startswith("LICENSE")
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_file_names_a_path_of_one_machine() -> None:
    assert lines_with(MACHINE_PATH) == []


def test_links_lead_only_to_known_hosts() -> None:
    strange = []
    for line in lines_with(URL_HOST):
        for host in URL_HOST.findall(line):
            if not any(host == known or host.endswith("." + known) for known in LINKED_HOSTS):
                strange.append(line)
    assert strange == []


def test_a_note_to_come_back_names_its_occasion() -> None:
    """Write `TODO(#12)` or `TODO(torch 2.14)`: a note without an anchor is never read again."""
    assert lines_with(WAITING_WORD, only=".py") == []


def test_no_conflict_markers() -> None:
    assert [name for name, text in text_files() if CONFLICT.search(text)] == []


def test_tensors_move_to_a_named_device() -> None:
    """`.cuda()` picks whichever device is current; write `.to(device)`."""
    assert lines_with(CUDA_CALL, only=".py") == []


def test_no_module_is_a_drawer_for_everything() -> None:
    names = [
        part for path in python_files() for part in path.relative_to(ROOT).with_suffix("").parts
    ]
    assert [name for name in names if NOBODYS_MODULE.match(name)] == []


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_python_file_says_its_licence_and_its_purpose(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        pytest.fail("empty file: a package without __init__.py content does not need one to exist")
    head = text.splitlines()[:2]
    assert "# SPDX-License-Identifier: Apache-2.0" in head
    assert ast.get_docstring(ast.parse(text)), "no docstring at the top of the file"


def test_executable_scripts_are_executable() -> None:
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    assert scripts
    for path in [*scripts, ROOT / ".ci" / "run"]:
        assert path.read_text().startswith("#!/usr/bin/env "), path
        assert path.stat().st_mode & 0o111, f"{path} is not executable"


def test_sizes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Not a limit: a list to look at when the reading gets slow."""
    report = []
    for path in python_files():
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        length = source.count("\n")
        if length > LONG_MODULE:
            report.append(f"  {length:5d} lines  {name}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONG_FUNCTION:
                    report.append(f"  {length:5d} lines  {name}:{node.lineno} {node.name}()")
    with capsys.disabled():
        if report:
            print(f"\nmodules over {LONG_MODULE} lines, functions over {LONG_FUNCTION}:")
            print("\n".join(sorted(report, reverse=True)))
