# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels before they are needed, on threads of their own, each lot once per process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Lot:
    thread: threading.Thread
    compiled: bool = False


_lots: dict[Hashable, _Lot] = {}
_paused: list[bool] = []


def compiled(key: Hashable, device: torch.device, work: Callable[[], None]) -> bool:
    """Whether `work`, which runs the kernels called `key` on `device`, has been done. Returns at once;
    the first time a thread begins to do it. If that fails it stays undone: whoever needs one of the
    kernels is told."""
    found = _lots.get(key)
    if found is None and not _paused:
        thread = threading.Thread(
            target=_compile, args=(key, device, work), name="headinfer-compile"
        )
        found = _lots[key] = _Lot(thread)
        thread.start()
    return found is not None and found.compiled


@contextmanager
def nothing_ahead() -> Iterator[None]:
    """Meanwhile no thread begins to compile: what is timed is short, and has the processor for itself."""
    _paused.append(True)
    try:
        yield
    finally:
        _paused.pop()


def finish_compiling() -> None:
    """Return when nothing is compiled ahead any more: before something is timed."""
    for lot in list(_lots.values()):
        lot.thread.join()


def _compile(key: Hashable, device: torch.device, work: Callable[[], None]) -> None:
    try:
        # Of this priority, because streams are few and those that steps are recorded on are of the other.
        stream = torch.cuda.Stream(device, priority=-1)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            work()
        stream.synchronize()
    except Exception as error:  # noqa: BLE001  whoever needs one of them is told
        _log.info("kernels were not compiled ahead (%s): %s", key, error)
        return
    _lots[key].compiled = True
