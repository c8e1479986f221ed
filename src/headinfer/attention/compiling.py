# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels before they are needed, on a thread of its own, each lot once per process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch

_log = logging.getLogger(__name__)

_lots: dict[Hashable, Future[bool]] = {}
_lock = threading.Lock()
_paused: list[bool] = []


def compiled(key: Hashable, device: torch.device, work: Callable[[], None]) -> bool:
    """Whether `work`, which runs the kernels called `key` on `device`, has been done. Returns at once;
    the first time a thread gets it to do, one lot after another. If that fails it stays undone, and
    whoever needs one of the kernels is told; but for want of memory it is tried again."""
    with _lock:
        found = _lots.get(key)
        if found is None and not _paused:
            found = _lots[key] = _thread().submit(_compile, key, device, work)
    return found is not None and found.done() and found.result()


@contextmanager
def nothing_ahead() -> Iterator[None]:
    """Meanwhile nothing begins to be compiled: what is timed is short, and has the processor for itself."""
    _paused.append(True)
    try:
        yield
    finally:
        _paused.pop()


def finish_compiling() -> None:
    """Return when nothing is compiled ahead any more: before something is timed."""
    for lot in list(_lots.values()):
        lot.result()


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="headinfer-compile")


def _compile(key: Hashable, device: torch.device, work: Callable[[], None]) -> bool:
    try:
        _run(device, work)
    except torch.OutOfMemoryError as error:  # a prompt fills the device, and leaves it again
        _log.info("kernels were not compiled ahead yet (%s): %s", key, error)
        with _lock:
            _lots.pop(key, None)
        return False
    except Exception as error:  # noqa: BLE001  whoever needs one of them is told
        _log.info("kernels were not compiled ahead (%s): %s", key, error)
        return False
    return True


def _run(device: torch.device, work: Callable[[], None]) -> None:
    # Of this priority, because streams are few and those that steps are recorded on are of the other.
    stream = torch.cuda.Stream(device, priority=-1)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        work()
    stream.synchronize()
