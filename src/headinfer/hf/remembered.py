# SPDX-License-Identifier: Apache-2.0
"""Rates measured before, remembered per machine, element type and set of library versions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import __version__ as transformers_version

import headinfer
from headinfer.budget import GIB
from headinfer.hf.demo_model import cache_folder
from headinfer.rates import Rates

_log = logging.getLogger(__name__)


def known_rates(
    device: torch.device | str, dtype: torch.dtype, disk: str | None = None
) -> Rates | None:
    """The rates of this machine if they were measured before, and those of `disk`, a folder."""
    found = _read(_path(torch.device(device), dtype))
    rates = None if found is None else Rates.from_dict(found)
    return rates if rates is None or disk is None else with_disk(rates, disk)


def with_disk(rates: Rates, disk: str) -> Rates:
    """`rates` with those of the folder `disk`, None where it was not measured."""
    there = _read(_disk_path(disk)) or {}
    read, write = there.get("read_bytes_s"), there.get("write_bytes_s")
    return replace(rates, disk_read_bytes_s=read, disk_write_bytes_s=write)


def remember_disk(folder: str, *, read_bytes_s: float, write_bytes_s: float) -> None:
    """Later calls of `known_rates` for folders of the same file system have these rates."""
    found = {"read_bytes_s": read_bytes_s, "write_bytes_s": write_bytes_s}
    _keep(_disk_path(folder), lambda: found)


def remember(rates: Rates, device: torch.device, dtype: torch.dtype) -> None:
    """Later calls of `known_rates` give `rates`; says so where they cannot be kept."""
    _keep(_path(device, dtype), lambda: rates.as_dict())


def _keep(path: Path, found: Callable[[], dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(found(), indent=2))
        draft.replace(path)
    except OSError as error:  # a measurement that cannot be kept is still one
        _log.warning("the rates of this machine cannot be kept in %s: %s", path.parent, error)


def machine_name(device: torch.device) -> str:
    """Processor, cores, memory, and the GPU if that computes."""
    memory = round(psutil.virtual_memory().total / GIB)
    host = f"{_processor()}, {torch.get_num_threads()} threads, {memory} GiB"
    return host if device.type == "cpu" else f"{torch.cuda.get_device_name(device)} on {host}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the general name will do
    return platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _disk_path(folder: str) -> Path:
    """By file system, on this machine."""
    try:
        system = os.stat(folder).st_dev
    except OSError:
        system = -1
    key = hashlib.sha256(f"{platform.node()}\n{system}".encode()).hexdigest()[:16]
    return cache_folder() / f"disk-{key}.json"


def _path(device: torch.device, dtype: torch.dtype) -> Path:
    return cache_folder() / f"rates-{_key(device, dtype)}.json"


def _key(device: torch.device, dtype: torch.dtype) -> str:
    parts = [machine_name(device), str(dtype), torch.__version__, transformers_version]
    parts.append(headinfer.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
