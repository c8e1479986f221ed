# SPDX-License-Identifier: Apache-2.0
"""Help and documentation say the same thing as the program, and the golden copy shows changes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "cli_help.txt"
COMMANDS = (
    "demo",
    "run",
    "plan",
    "doctor",
    "bench",
    "contexts",
    "contexts list",
    "contexts show",
    "contexts verify",
    "contexts remove",
)

Program = Any


def words(text: str) -> list[str]:
    """Text without boxes, line breaks and type names, which differ between versions of typer."""
    return re.sub(r"[^\x21-\x7e]+|<\w+>", " ", text).split()


def test_help_is_what_it_was(headinfer: Program) -> None:
    # Refresh: COLUMNS=80 headinfer --help > tests/golden/cli_help.txt
    assert words(headinfer("--help").out) == words(GOLDEN.read_text(encoding="utf-8"))


def test_no_command_shows_help(headinfer: Program) -> None:
    result = headinfer()
    assert result.status == 0
    assert words(result.out) == words(headinfer("-h").out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(headinfer: Program, command: str) -> None:
    result = headinfer(*command.split(), "--help")
    assert result.status == 0
    assert f"headinfer {command}" in result.out
    assert "Examples" in result.out


@pytest.mark.parametrize("command", ["verify", "show", "plot"])
def test_what_belongs_to_bench_has_help_too(headinfer: Program, command: str) -> None:
    result = headinfer("bench", command, "--help")
    assert result.status == 0
    assert f"headinfer bench {command}" in result.out
    assert "Examples" in result.out


def test_every_option_is_explained() -> None:
    import typer.main

    from headinfer.cli.app import app

    root: Any = typer.main.get_command(app)
    silent = [
        f"{name} {option.opts[0]}"
        for name, group in root.commands.items()
        for command in (group, *getattr(group, "commands", {}).values())
        for option in command.params
        if not option.help
    ]
    assert silent == []


def test_the_version_is_the_package_version(headinfer: Program) -> None:
    import headinfer as package

    assert headinfer("--version").out == f"headinfer {package.__version__}\n"


def test_the_document_is_up_to_date() -> None:
    check = [sys.executable, str(ROOT / "scripts" / "cli_docs"), "--check"]
    found = subprocess.run(check, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
