# SPDX-License-Identifier: Apache-2.0
"""Every code block of README.md and docs/ does what a reader is told it does.

Python blocks of one file run in order in one namespace. Command lines are parsed by the real
command line with --help behind them. `<!-- not run: reason -->` above a block opts it out.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(
    r"(?:<!--\s*not run:\s*(?P<reason>[^>]+?)\s*-->\s*\n)?```(?P<language>\w*)\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
SHELLS = ("sh", "bash", "console")
PLAIN = ("", "text", "toml", "json", "yaml")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Block(page, line, match["language"], match["code"], match["reason"])


SHELL_BLOCKS = [block for page in PAGES for block in blocks(page) if block.language in SHELLS]


def commands(block: Block) -> Iterator[list[str]]:
    """The command lines of a shell block, continuation lines joined, output of a console left out."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        words = shlex.split(line, comments=True)
        # A reader pipes into the program; what is checked is the program.
        if "|" in words:
            words = words[words.index("|") + 1 :]
        if words:
            yield words


def need_demo_model() -> None:
    """The demo model is there or can be got; only where nothing can be installed may it be absent."""
    from headinfer.errors import InputError
    from headinfer.hf.demo_model import demo_folder

    try:
        demo_folder()
    except (InputError, ImportError) as error:
        if os.environ.get("HEADINFER_NO_INSTALL") == "1":
            pytest.skip(f"HEADINFER_NO_INSTALL=1 and no demo model: {error}")
        raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if 'load_model("demo")' in page.read_text(encoding="utf-8"):
        need_demo_model()
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            # Padding puts the page's own line numbers into a traceback.
            source = "\n" * block.line + block.code
            exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_of_a_kind_that_is_checked(page: Path) -> None:
    known = ("python", *SHELLS, *PLAIN)
    assert [str(block) for block in blocks(page) if block.language not in known] == []


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_command_lines_parse(block: Block) -> None:
    if block.reason is not None:
        pytest.skip(block.reason)
    for words in commands(block):
        if words[0] == "headinfer":
            start = (
                "import sys; sys.argv[0] = 'headinfer'; from headinfer.cli.app import main; main()"
            )
            command = [sys.executable, "-c", start, *words[1:], "--help"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
        elif words[0].startswith(("./scripts/", "scripts/", ".ci/")):
            assert (ROOT / words[0]).stat().st_mode & 0o111, f"{words[0]} is not executable"
        else:
            pytest.fail(
                f"{block}: no way to check {words[0]!r}; say <!-- not run: reason --> above"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_ci_runs_the_command_that_the_readme_names() -> None:
    command = "./scripts/test"
    assert f"\n{command}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith(f"exec {command}")


def test_the_measured_table_is_the_committed_result() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "readme_figures"), "--check"], check=False
    )
    assert done.returncode == 0, "run scripts/readme_figures"
