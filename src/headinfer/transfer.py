# SPDX-License-Identifier: Apache-2.0
"""Moves bytes between tiers: two copy lanes, tickets that streams wait for, the staging ring.

This is where a tile is copied. Ordering is by events in both directions (the lane waits until a
slot's last reader is done, compute waits until the slot is full) and the host never waits. Knows
nothing of heads, plans or formats: a tile is an opaque key, and the caller lists its copies.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from headinfer.errors import TransferError
from headinfer.layout import Tile

TIMED_BYTES = 4 * 2**20
"""Copies in from this size on tell the link's rate; smaller ones tell how long a launch takes."""


class Lane(Enum):
    """Copies in one lane run in order; the two lanes run at the same time."""

    IN = "in"
    OUT = "out"


class Copy(NamedTuple):
    """`dst` becomes a copy of `src`: same shape and type, both contiguous; `src` need not be where it
    is a few bytes out of each of many blocks, and neither is on disk."""

    dst: Tensor
    src: Tensor

    @property
    def nbytes(self) -> int:
        return self.dst.nbytes


class Moves(list[Copy]):
    """Copies asked for again and again, not to be changed: what they are is looked up once."""

    @cached_property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self)

    @cached_property
    def addresses(self) -> list[tuple[int, int, int]]:
        """Where each goes, where it comes from, and bytes; its tensors are contiguous."""
        return [(copy.dst.data_ptr(), copy.src.data_ptr(), copy.nbytes) for copy in self]


def total_bytes(copies: Sequence[Copy]) -> int:
    """Bytes that all of `copies` move."""
    if isinstance(copies, Moves):
        return copies.nbytes
    return sum(copy.nbytes for copy in copies)


class Ticket(Protocol):
    """Something under way; handed out and understood by one engine."""


class TransferEngine(Protocol):
    """Runs copies. Called on the thread that runs the model, `done` on any; no call waits for the
    device except `drain` and `done` when told to block. Both ends of a copy stay allocated and
    unchanged until its ticket was waited for.

    Attributes:
        in_rate: bytes/s measured lately on the lane in; None until it is known.
    """

    in_rate: float | None

    def submit(self, copies: Sequence[Copy], *, lane: Lane, after: Sequence[Ticket] = ()) -> Ticket:
        """Enqueue `copies` on `lane`, to start when all of `after` are done."""
        ...

    def fence(self) -> Ticket:
        """A ticket for everything enqueued on the compute stream so far."""
        ...

    def wait(self, ticket: Ticket) -> None:
        """Work enqueued from now on on the compute stream starts after `ticket`."""
        ...

    def done(self, ticket: Ticket, *, block: bool) -> bool:
        """Whether `ticket` is done; with `block` the calling thread waits until it is."""
        ...

    def drain(self) -> None:
        """Return when everything submitted has landed."""
        ...


class InlineEngine:
    """Copies at once, on the calling thread: for a compute device that is the CPU."""

    _DONE = object()

    def __init__(self) -> None:
        self.in_rate: float | None = None

    def submit(self, copies: Sequence[Copy], *, lane: Lane, after: Sequence[Ticket] = ()) -> Ticket:
        started = time.perf_counter()
        for copy in copies:
            copy.dst.copy_(copy.src)
        seconds = time.perf_counter() - started
        if lane is Lane.IN and copies and seconds > 0:
            self.in_rate = sum(copy.nbytes for copy in copies) / seconds
        return self._DONE

    def fence(self) -> Ticket:
        return self._DONE

    def wait(self, ticket: Ticket) -> None:
        """Nothing is ever under way."""

    def done(self, ticket: Ticket, *, block: bool) -> bool:
        return True

    def drain(self) -> None:
        """Nothing is ever under way."""


class CudaEngine:
    """One stream per lane beside the compute stream of `device`; tickets are events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.in_rate: float | None = None
        self._lanes = {lane: torch.cuda.Stream(device) for lane in Lane}
        self._index = self._lanes[Lane.IN].device_index
        self._timed: tuple[torch.cuda.Event, torch.cuda.Event, int] | None = None

    def submit(self, copies: Sequence[Copy], *, lane: Lane, after: Sequence[Ticket] = ()) -> Ticket:
        stream = self._lanes[lane]
        nbytes = total_bytes(copies) if lane is Lane.IN else 0
        timed = nbytes >= TIMED_BYTES and self._ready_to_time()
        for ticket in after:
            stream.wait_event(cast(torch.cuda.Event, ticket))
        begun = torch.cuda.Event(enable_timing=timed)
        if timed:
            begun.record(stream)
        self._enqueue(copies, stream)
        done = torch.cuda.Event(enable_timing=timed)
        done.record(stream)
        if timed:
            self._timed = begun, done, nbytes
        return done

    def _enqueue(self, copies: Sequence[Copy], stream: torch.cuda.Stream) -> None:
        by_address = _memcpy() if isinstance(copies, Moves) else None
        # The driver copies within its current context, which is that of torch's current device.
        if by_address is None or torch.cuda.current_device() != self._index:
            with torch.cuda.stream(stream):
                for copy in copies:
                    copy.dst.copy_(copy.src, non_blocking=True)
            return
        handle = stream.cuda_stream
        for dst, src, nbytes in cast(Moves, copies).addresses:
            status = by_address(dst, src, nbytes, handle)
            if status:
                raise TransferError(
                    f"the CUDA driver refused a copy of {nbytes} B to {self.device} (status "
                    f"{status}); if the device has failed, a new process is needed"
                )

    def _ready_to_time(self) -> bool:
        """Take the last measurement if it is there; one at a time is measured."""
        if self._timed is None:
            return True
        begun, done, nbytes = self._timed
        if not done.query():
            return False
        milliseconds = begun.elapsed_time(done)
        if milliseconds > 0:
            rate = nbytes / milliseconds * 1e3
            # Smoothed: copies meet write-back and the CPU's own reads now and then.
            self.in_rate = rate if self.in_rate is None else 0.8 * self.in_rate + 0.2 * rate
        self._timed = None
        return True

    def fence(self) -> Ticket:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._index))
        return event

    def wait(self, ticket: Ticket) -> None:
        torch.cuda.current_stream(self._index).wait_event(cast(torch.cuda.Event, ticket))

    def done(self, ticket: Ticket, *, block: bool) -> bool:
        event = cast(torch.cuda.Event, ticket)
        if block:
            event.synchronize()  # gives the interpreter lock away while it waits
        return block or event.query()

    def drain(self) -> None:
        for stream in self._lanes.values():
            stream.synchronize()


@cache
def _memcpy() -> Callable[[int, int, int, int], int] | None:
    """cuMemcpyAsync, which costs the host half of what a copy between tensors does; None where the
    driver is not found."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuMemcpyAsync
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


@dataclass(slots=True)
class Slot:
    """One landing place of the ring; `free_after` is its last reader's ticket."""

    buffer: Tensor
    free_after: Ticket


class _Staged(NamedTuple):
    tile: Tile
    slot: Slot
    landed: Ticket


Loader = Callable[[Tile, Tensor], tuple[Sequence[Copy], Sequence[Ticket]]]
"""For a tile and a slot's bytes: the copies that fill it and what they must come after."""


class StagingRing:
    """Tiles on their way to compute, in the order they will be used, a fixed number of slots.

    Slots are filled ahead of use as they become free. Asking for a tile that is not the next one
    drops what was staged.

    Attributes:
        poison: fill a slot with NaN bytes when it is given back, so that a read too late shows.
        latest: when the tile taken last landed, or will.
        loaded_bytes: copied into slots so far.
        loaded_tiles: staged so far.
        dropped_tiles: staged for nothing so far.
    """

    def __init__(
        self,
        engine: TransferEngine,
        slots: Sequence[Tensor],
        load: Loader,
        *,
        poison: bool = False,
    ) -> None:
        self.poison = poison
        self._engine = engine
        self._load = load
        self._free = deque(Slot(buffer, engine.fence()) for buffer in slots)
        self._staged: deque[_Staged] = deque()
        self._taken: Slot | None = None
        self.latest: Ticket | None = None
        self.loaded_bytes = 0
        self.loaded_tiles = 0
        self.dropped_tiles = 0

    def take(self, tile: Tile) -> Tensor:
        """The slot's bytes holding `tile`; compute waits for them. One tile at a time."""
        if not self._staged or self._staged[0].tile != tile:
            self.flush()
            self._stage(tile)
        staged = self._staged.popleft()
        try:
            self._engine.wait(staged.landed)
        except BaseException:  # it never arrived: the slot is free for another
            self._free.append(staged.slot)
            raise
        self.latest = staged.landed
        self._taken = staged.slot
        return staged.slot.buffer

    def give_back(self) -> None:
        """Compute has enqueued its last read of the tile taken."""
        if self._taken is None:
            raise TransferError("give_back() without take(): no tile is in use")
        if self.poison:
            self._taken.buffer.fill_(0xFF)
        self._taken.free_after = self._engine.fence()
        self._free.append(self._taken)
        self._taken = None

    @property
    def upcoming(self) -> Tile | None:
        """The tile staged for the next `take`."""
        return self._staged[0].tile if self._staged else None

    def prefetch(self, source: Callable[[], Tile | None]) -> None:
        """Stage tiles from `source` while slots are free; it answers None when it has no next."""
        while self._free:
            tile = source()
            if tile is None:
                return
            self._stage(tile)

    def flush(self) -> None:
        """Forget what is staged: what is stored has changed, or another tile is wanted."""
        self.dropped_tiles += len(self._staged)
        while self._staged:
            self._free.append(self._staged.popleft().slot)

    def _stage(self, tile: Tile) -> None:
        slot = self._free.popleft()
        copies, after = self._load(tile, slot.buffer)
        landed = self._engine.submit(copies, lane=Lane.IN, after=[slot.free_after, *after])
        self._staged.append(_Staged(tile, slot, landed))
        self.loaded_bytes += total_bytes(copies)
        self.loaded_tiles += 1
