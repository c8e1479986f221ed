# SPDX-License-Identifier: Apache-2.0
"""Which machine, which versions, which commit: what a figure is worth nothing without."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import headinfer
from headinfer.bench.results import Session
from headinfer.errors import InputError


def session_now(command: str, seed: int, commit: str | None = None) -> Session:
    """This process on this machine; `commit` where git cannot tell."""
    return Session(
        started=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        command=command,
        seed=seed,
        machine=_machine(),
        versions={
            "headinfer": headinfer.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        commit=commit or _commit(),
    )


def devices_here(wanted: str | None = None) -> tuple[str, ...]:
    """ "cpu", and "cuda" where there is one and `wanted` is not "cpu".

    Raises:
        InputError: `wanted` is neither, or is not here.
    """
    there = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    if wanted is None:
        return there
    if wanted not in ("cuda", "cpu"):
        raise InputError(f"device {wanted!r} cannot be measured; known: cuda, cpu")
    if wanted not in there:
        raise InputError(f"torch {torch.__version__} sees 0 CUDA devices; leave --device out")
    return ("cpu",) if wanted == "cpu" else there


def settle(device: torch.device) -> None:
    """All work of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # noqa: TID251  a clock has to see finished work


def interpreter_ms() -> float:
    """Milliseconds of a loop that is always the same: how fast this processor runs Python just now, which
    neighbours on the same core change without a trace elsewhere."""
    found = []
    for _ in range(5):
        started, total = time.perf_counter(), 0
        for number in range(20_000):
            total += number & 7
        found.append(time.perf_counter() - started)
    return round(1e3 * sorted(found)[2], 3)


class Others:
    """How busy other processes keep the machine's CPUs, since this was made; on a virtual machine those
    of its neighbours, too, as far as it is told."""

    def __init__(self) -> None:
        self._start, self._used = time.monotonic(), self._used_by_others()

    def share(self) -> float:
        """0 when this process is alone, 1 when it gets nothing."""
        elapsed = (time.monotonic() - self._start) * (psutil.cpu_count() or 1)
        used = self._used_by_others() - self._used
        return round(min(max(used / max(elapsed, 1e-9), 0.0), 1.0), 3)

    @staticmethod
    def _used_by_others() -> float:
        everybody, own = psutil.cpu_times(), psutil.Process().cpu_times()
        stolen = getattr(everybody, "steal", 0.0)
        used = everybody.user + everybody.system + everybody.nice + stolen
        return float(used - own.user - own.system)


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name(0) if gpu else None,
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "host_bytes": psutil.virtual_memory().total,
    }


def _cpu_name() -> str:
    """As the system calls it; "AMD EPYC" is all that some virtual machines say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the checkout this package runs from, with "+" if tracked files were changed."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", str(here.parent)])
    except OSError:
        return None
    # A repository around an installed package is not this one.
    if head.returncode or "site-packages" in here.parts:
        return None
    return head.stdout.strip() + ("+" if changed.returncode else "")
