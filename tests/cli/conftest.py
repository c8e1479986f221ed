# SPDX-License-Identifier: Apache-2.0
"""A tiny model on disk, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headinfer.cli.app import app
from headinfer.testing.folders import write_tiny_gguf, write_tiny_llama

Headinfer = Callable[..., "Result"]


class Result:
    """What a run of the program left behind."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def error(self) -> str:
        """The one line that says what was wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("error: ")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random Llama and a tokenizer with a chat template."""
    return str(write_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama that never ends its text: what must not depend on how fast it is."""
    return str(write_tiny_llama(tmp_path_factory.mktemp("endless"), ends=False))


@pytest.fixture(scope="session")
def tiny_raw(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same without a chat template."""
    return str(write_tiny_llama(tmp_path_factory.mktemp("tiny-raw"), chat=False))


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf"))


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("The keeper kept the light. " * 12, encoding="utf-8")
    return str(path)


@pytest.fixture
def headinfer() -> Headinfer:
    """Run the program: `headinfer("run", folder, "--prompt", "hi")`."""

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        found = CliRunner().invoke(app, list(arguments), input=stdin)
        return Result(found.exit_code, found.stdout, found.stderr)

    return run
