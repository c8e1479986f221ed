# SPDX-License-Identifier: Apache-2.0
"""Killed at random moments, nothing is lost and nothing is wrong.

In full: python -m headinfer.testing.kills --kills 200
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_twenty_kills_lose_nothing() -> None:
    command = [sys.executable, "-m", "headinfer.testing.kills", "--kills", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] >= 20
    assert told["completed"]
    assert told["in_spills"]
    assert (told["lost"], told["wrong"], told["left"]) == (0, 0, 0), told["problems"]
