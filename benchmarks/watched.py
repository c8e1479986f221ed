# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a command, seen from outside its process: the GPU as its driver counts it, and the
resident set of the command and of everything it started.

    python benchmarks/watched.py --out peaks.json -- headinfer bench --case lossless-million-8b

The driver counts what a process cannot see by itself: contexts, libraries and what an allocator
keeps. Page-locked memory is part of the resident set. Both are sampled, so a peak shorter than the
interval can be missed. The exit status is the command's own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

INTERVAL_S = 0.2
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file; default: standard error only")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    given = parser.parse_args()
    with Gpu() as gpu:
        before = gpu.latest
        free = psutil.virtual_memory().available
        started = psutil.Popen(given.command)
        peaks = watch(started)
        code = started.wait()
    found = {
        "command": given.command,
        "exit_status": code,
        "interval_s": INTERVAL_S,
        "rss_peak_bytes": peaks["rss"],
        "available_before_bytes": free,
        "available_least_bytes": peaks["available"],
        "gpu_used_before_bytes": before,
        "gpu_used_peak_bytes": gpu.peak,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found), file=sys.stderr)
    return 128 - code if code < 0 else code  # as a shell says that a signal ended it


def watch(started: psutil.Popen) -> dict[str, int]:
    """Largest resident set of the process and its descendants, and the least free memory beside
    them, until it ends."""
    rss, available = 0, psutil.virtual_memory().available
    while started.poll() is None:
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [started, *started.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    total += process.memory_info().rss
        rss = max(rss, total)
        available = min(available, psutil.virtual_memory().available)
        time.sleep(INTERVAL_S)
    return {"rss": rss, "available": available}


class Gpu:
    """Used memory of the first GPU, as its driver reports it.

    Attributes:
        latest, peak: bytes; None where there is no NVIDIA driver to ask.
    """

    def __init__(self) -> None:
        self.latest: int | None = None
        self.peak: int | None = None
        self._asked: subprocess.Popen[str] | None = None

    def __enter__(self) -> Gpu:
        if shutil.which("nvidia-smi") is None:
            return self
        query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        self._asked = subprocess.Popen(
            ["nvidia-smi", *query, f"--loop-ms={round(INTERVAL_S * 1000)}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        first = threading.Event()
        lines = self._asked.stdout or ()
        threading.Thread(target=self._read, args=(lines, first), daemon=True).start()
        first.wait(10)
        return self

    def _read(self, lines: Iterable[str], first: threading.Event) -> None:
        for line in lines:
            if line.strip().isdigit():
                self.latest = int(line) * MIB
                self.peak = max(self.peak or 0, self.latest)
                first.set()

    def __exit__(self, *_: object) -> None:
        if self._asked is not None:
            self._asked.terminate()
            self._asked.wait()


if __name__ == "__main__":
    sys.exit(main())
