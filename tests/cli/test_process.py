# SPDX-License-Identifier: Apache-2.0
"""The program as a process: signals, pipes, terminals, start-up time."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

PROGRAM = [sys.executable, "-m", "headinfer"]


def test_help_and_version_start_at_once() -> None:
    for flag in ("--help", "--version"):
        command = [sys.executable, "-X", "importtime", *PROGRAM[1:], flag]
        ran = subprocess.run(command, capture_output=True, check=True, text=True)
        loaded = {line.split("|")[-1].strip() for line in ran.stderr.splitlines() if "|" in line}
        assert "headinfer.cli.app" in loaded
        assert not loaded & {"torch", "transformers"}  # seconds, where all else is tenths


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_and_restores_the_terminal(
    endless: str, number: signal.Signals, status: int
) -> None:
    ours, theirs = pty.openpty()
    command = [*PROGRAM, "run", endless, "--prompt", "x" * 200, "--max-new-tokens", "100000"]
    with subprocess.Popen(
        [*command, "--allow-beyond-positions"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        # A test run started in the background ignores interrupts, and its children would too.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it is generating
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(timeout=60) == status
    os.close(theirs)
    shown = _read_all(ours)
    assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h")  # cursor hidden, shown again
    assert b"Traceback" not in shown


def test_a_closed_pipe_ends_it_quietly(endless: str) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "run", endless, "--prompt", "hi", "--max-new-tokens", "100000"]
        + ["--allow-beyond-positions"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    shown = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in shown
    assert b"BrokenPipe" not in shown


def _read_all(descriptor: int) -> bytes:
    found = b""
    try:
        while block := os.read(descriptor, 65536):
            found += block
    except OSError:  # how a pseudo-terminal says that nobody writes to it any more
        pass
    os.close(descriptor)
    return found
