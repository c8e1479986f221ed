# SPDX-License-Identifier: Apache-2.0
"""`headinfer plan` for a config of tests/configs: what the golden files hold."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from pathlib import Path

from typer.testing import CliRunner


def answer(command: str, configs: Path) -> str:
    """Standard output, then the error if there is one, of a line "$ headinfer plan NAME ..."."""
    from headinfer.cli.app import app

    _, program, verb, name, *options = shlex.split(command)
    assert (program, verb) == ("headinfer", "plan")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, name)
        model.mkdir()
        shutil.copy(configs / f"{name}.json", model / "config.json")
        found = CliRunner().invoke(app, [verb, str(model), *options])
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    return found.stdout + "".join(f"{line}\n" for line in errors)
