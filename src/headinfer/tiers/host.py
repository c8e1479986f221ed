# SPDX-License-Identifier: Apache-2.0
"""The tier of host memory: exact-size anonymous mappings, page-locked when a GPU copies from them.

Every extent is a mapping of its own, so memory in use is what was asked for (torch's pinned
allocator rounds up to a power of two) and growth never copies what is stored. Huge pages and
touching by all threads make page-locking several times faster than allocating pinned memory.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from headinfer.budget import format_bytes
from headinfer.errors import TierClosed, TierFull
from headinfer.layout import Extent, aligned
from headinfer.tiers.arena import bytes_as

_log = logging.getLogger(__name__)

Touch = Callable[[int, int], None]

A_MAPPING_S = 60.0
"""Longer than making one takes; over when it is made."""

PASS_GAP_S = 0.03
"""Between two layers that make their first memory: until that long after one, others are expected."""


class HostTier:
    """Extents in host memory, at most `budget_bytes` in all (None: what the system gives).

    Attributes:
        wanted_bytes: what is known to be asked for in all; a full tier names at least that.
        kept_bytes: of the budget, kept free for `adopt` to take.
        beside_bytes: what of the user's budget is not this tier's, for messages.
        pin: extents are page-locked for a CUDA device.
        pin_failure: why page-locking was given up, None while it works.
        used_bytes: allocated now.
        made_bytes, made_s: what was mapped so far, and the seconds that took, on whichever thread.
        waited_s: of these, what `allocate` waited for.
    """

    name = "host"

    def __init__(
        self,
        *,
        budget_bytes: int | None = None,
        pin: bool = False,
        wanted_bytes: int = 0,
        kept_bytes: int = 0,
        beside_bytes: int = 0,
        touch: Touch | None = None,
    ) -> None:
        self._touch = touch
        self.kept_bytes = kept_bytes
        self.beside_bytes = beside_bytes
        self._kept_used = 0
        self.budget_bytes = budget_bytes
        self.wanted_bytes = wanted_bytes
        self.pin = pin
        self.pin_failure: str | None = None
        self.used_bytes = 0
        self.made_bytes = 0
        self.made_s = self.waited_s = 0.0
        self._arenas: dict[int, _Mapping | _Adopted] = {}
        self._ready: dict[int, deque[Future[_Mapping]]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._maker = _Maker(touch)
        weakref.finalize(self, self._maker.stop)
        self._next = 0
        self._closed = False

    @property
    def ready_bytes(self) -> int:
        """Prepared and not asked for yet."""
        return sum(size * len(waiting) for size, waiting in self._ready.items())

    def prepare(self, nbytes: int) -> None:
        """Map, touch and page-lock an extent of `nbytes` on a thread of its own, if the budget
        allows; `allocate` hands it out. Only where page-locking takes time to save."""
        size = aligned(nbytes)
        taken = self._taken + self.ready_bytes
        full = self.budget_bytes is not None and taken + size > self.budget_bytes
        if not self.pin or self._closed or full:  # mapping alone takes no time
            return
        if self._thread is None:
            # Page-locking on a thread of its own would else happen for the first GPU.
            device = torch.cuda.current_device() if torch.cuda.is_available() else None
            self._thread = ThreadPoolExecutor(1, "headinfer-arena", _on_device, (device,))
        self._ready.setdefault(size, deque()).append(self._thread.submit(self._maker.make, size))

    def allocate(self, nbytes: int) -> Extent:
        if self._closed:
            raise TierClosed(f"the {self.name} tier is closed")
        size = aligned(nbytes)
        budget, ready = self.budget_bytes, self._ready.get(size)
        if budget is not None and self._taken + size > budget:
            raise self._full(self._taken, size, f"of {format_bytes(budget)} allowed")
        if not ready and budget is not None and self._taken + self.ready_bytes + size > budget:
            self.forget_ready()
        begun = time.perf_counter()
        try:
            mapping = self._taken_from(ready) if ready else self._mapping(size)
        except (OSError, ValueError) as error:
            why = f"and the system refused more ({error})"
            raise self._full(self._taken, size, why) from error
        self.waited_s += time.perf_counter() - begun
        self.made_s += mapping.seconds
        self.made_bytes += size
        if self.pin:
            self.pin_failure = mapping.pin_failure
            if self.pin_failure is not None:
                self.pin = False
                _log.warning(
                    "host memory is not page-locked, transfers will be several times slower: %s",
                    self.pin_failure,
                )
        self._next += 1
        self._arenas[self._next] = mapping
        self.used_bytes += size
        return Extent(self._next, 0, size)

    def _taken_from(self, ready: deque[Future[_Mapping]]) -> _Mapping:
        first = ready.popleft()
        if not first.done():
            self._maker.waited_for.set()
        try:
            return first.result()
        finally:
            self._maker.waited_for.clear()

    @property
    def _taken(self) -> int:
        """Bytes of the budget that `allocate` has no claim to."""
        return self.used_bytes + max(self.kept_bytes - self._kept_used, 0)

    def _mapping(self, size: int) -> _Mapping:
        self._maker.rest(A_MAPPING_S)
        try:
            return _Mapping(size, pin=self.pin, touch=self._touch)
        finally:
            self._maker.rest(PASS_GAP_S)

    def adopt(self, memory: Tensor, nbytes: int, *, kept: bool = False) -> Extent:
        """Memory that somebody else mapped is an extent; `nbytes` of it count as used, of what is
        `kept` first if told so.

        Raises:
            TierFull: the budget does not allow them.
            TierClosed: the tier was closed.
        """
        if self._closed:
            raise TierClosed(f"the {self.name} tier is closed")
        size, budget = aligned(nbytes), self.budget_bytes
        taken = self.used_bytes if kept else self._taken
        if budget is not None and taken + size > budget:
            raise self._full(taken, size, f"of {format_bytes(budget)} allowed")
        self._next += 1
        self._arenas[self._next] = _Adopted(memory, kept=kept)
        self.used_bytes += size
        self._kept_used += size if kept else 0
        return Extent(self._next, 0, size)

    def view(
        self, extent: Extent, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        return bytes_as(self._arenas[extent.arena].bytes, extent.offset + offset, shape, dtype)

    def free(self, extent: Extent) -> None:
        found = self._arenas.pop(extent.arena)
        self.used_bytes -= extent.nbytes
        self._kept_used -= extent.nbytes if isinstance(found, _Adopted) and found.kept else 0
        found.release()

    def close(self) -> None:
        self.forget_ready()
        if self._thread is not None:
            self._thread.shutdown()
        for mapping in self._arenas.values():
            mapping.release()
        self._arenas.clear()
        self.used_bytes = self._kept_used = 0
        self._closed = True

    def forget_ready(self) -> None:
        """Give back what was prepared and is not wanted any more."""
        prepared = [made for waiting in self._ready.values() for made in waiting]
        self._ready.clear()
        begun = [made for made in prepared if not made.cancel()]
        if any(not made.done() for made in begun):
            self._maker.waited_for.set()
        for made in begun:
            if made.exception() is None:
                made.result().release()
        self._maker.waited_for.clear()

    def _full(self, taken: int, size: int, why: str) -> TierFull:
        needed = max(taken + size + self.beside_bytes, self.wanted_bytes)
        return TierFull(
            f"keys and values need {format_bytes(size)} more host memory: "
            f"{format_bytes(taken)} are used {why}; raise host_memory to {needed} bytes "
            f"({format_bytes(needed)}) or more, or shorten the context",
            tier=self.name,
            budget_bytes=self.budget_bytes or 0,
            used_bytes=self.used_bytes,
            asked_bytes=size,
        )


def _on_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


class _Maker:
    """Makes page-locked mappings on a thread, with a pause as long as the last one took after each,
    unless somebody waits. The driver takes no work while it page-locks: one mapping after the other
    would keep it from whoever enqueues kernels, until all of a pass are made. And it makes none
    while the first pass makes its own, one layer after the other: both would take twice as long,
    of which the pass would wait for all.

    Attributes:
        waited_for: set while somebody waits.
    """

    def __init__(self, touch: Touch | None) -> None:
        self.waited_for = threading.Event()
        self._touch = touch
        self._pause_until = self._rest_until = 0.0
        self._stopped = False

    def make(self, size: int) -> _Mapping:
        while not self.waited_for.is_set():
            left = max(self._pause_until, self._rest_until) - time.perf_counter()
            if left <= 0:
                break
            self.waited_for.wait(left)
        if self._stopped:
            raise TierClosed("host memory is not wanted any more")
        mapping = _Mapping(size, pin=True, touch=self._touch)
        self._pause_until = time.perf_counter() + mapping.seconds
        return mapping

    def rest(self, seconds: float) -> None:
        """Somebody makes a mapping of his own, or will soon."""
        self._rest_until = time.perf_counter() + seconds

    def stop(self) -> None:
        """Nothing is made any more: the tier is gone."""
        self._stopped = True
        self.waited_for.set()


class _Adopted:
    """Memory mapped elsewhere; goes with its last view."""

    def __init__(self, memory: Tensor, *, kept: bool) -> None:
        self.bytes = memory
        self.kept = kept

    def release(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")


class _Mapping:
    """One anonymous mapping, page-locked until `release` if asked for and granted.

    Attributes:
        pin_failure: why it is not page-locked though that was asked for.
        seconds: that making it took.
    """

    def __init__(self, nbytes: int, *, pin: bool, touch: Touch | None) -> None:
        begun = time.perf_counter()
        # Private: what a process could share with its children is shared memory to the system, which
        # gives no huge pages to that unless told so by its administrator.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        region = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        if pin and hasattr(mmap, "MADV_DONTFORK"):
            # A child's copy would leave the GPU with the old pages of whatever is written next.
            region.madvise(mmap.MADV_DONTFORK)
        self.bytes: Tensor = torch.frombuffer(region, dtype=torch.uint8)[:nbytes]
        self._unlock: weakref.finalize[[int], _Mapping] | None = None
        self.pin_failure = self._register(touch) if pin else None
        self.seconds = time.perf_counter() - begun

    def _register(self, touch: Touch | None) -> str | None:
        """Page-lock for CUDA; returns why that failed, None when it worked."""
        pointer = self.bytes.data_ptr()
        # Pages that several threads have given it beforehand are only pinned here.
        if touch is not None:
            touch(pointer, self.bytes.numel())
        else:
            self.bytes.zero_()
        cudart = torch.cuda.cudart()
        error = cudart.cudaHostRegister(pointer, self.bytes.numel(), 0)
        if int(error) != 0:
            return f"cudaHostRegister of {self.bytes.numel()} B failed with {error}"
        # Also runs at interpreter exit, before the mapping's memory goes.
        self._unlock = weakref.finalize(self, cudart.cudaHostUnregister, pointer)
        return None

    def release(self) -> None:
        if self._unlock is not None:
            self._unlock()
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
