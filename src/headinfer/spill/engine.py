# SPDX-License-Identifier: Apache-2.0
"""A transfer engine around another: copies that begin or end on disk take a step through host memory.

Towards a device a tile is read into a page-locked buffer and copied from there once it has arrived;
where the CPU computes it is read straight into the staging slot. The host waits only for a tile
that is wanted now. Blocks on their way down are copied into a buffer and written by threads.
Everything else is the inner engine's business.

No wait can be circular: a buffer is given up by reads and writes that need nothing but the disk, and
by copies whose tickets were all handed out before.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headinfer.errors import DiskError
from headinfer.layout import aligned
from headinfer.tiers import HostTier
from headinfer.tiers.disk import ALIGNMENT, DiskTier, op_of, whole_blocks
from headinfer.tiers.disk_queue import Op
from headinfer.transfer import Copy, InlineEngine, Lane, Ticket, TransferEngine

BUFFER_BYTES = 8 * 2**20
"""A block on its way down takes one of these, several for a large chunk."""

WRITE_BUFFERS = 4


@dataclass(eq=False, slots=True)
class DiskTicket:
    """A copy one end of which is on disk.

    Attributes:
        lane: its lane of the inner engine.
        copies: what the inner engine moves once everything was read; of a write, what it moved.
        after: what that comes after.
        inner: the inner engine's ticket, once there is one.
        parts: reads that have not been passed on yet.
        jobs: numbers of writes.
        error: why it will never be done.
    """

    lane: Lane
    copies: list[Copy]
    after: list[Ticket]
    inner: Ticket | None = None
    parts: int = 0
    jobs: list[int] = field(default_factory=list)
    error: DiskError | None = None


@dataclass(eq=False, slots=True)
class _Part:
    """A read under way and what happens to it then.

    Attributes:
        low, high: the addresses that it, or what follows it, fills.
        copies: from the buffer to where it is wanted; none if it is read straight there.
    """

    ticket: DiskTicket
    job: int
    low: int
    high: int
    copies: list[Copy]
    buffer: Tensor | None
    keep: list[Tensor]


@dataclass(eq=False, slots=True)
class _Written:
    job: int
    sources: list[Tensor]
    buffer: Tensor | None
    started: Future[None] | None = None


class DiskEngine:
    """See `TransferEngine`. A tensor on the "meta" device is a place of `disk`.

    Args:
        inner: moves everything that does not begin or end on disk.
        disk: where the rest lies.
        pin: buffers are page-locked.
        slot_bytes, num_slots: of the staging ring, which as many buffers of that size stand behind.

    Attributes:
        lost: writes that failed, until whoever crops or drops what they were of removes them.
    """

    def __init__(
        self,
        inner: TransferEngine,
        disk: DiskTier,
        *,
        pin: bool,
        slot_bytes: int,
        num_slots: int,
    ) -> None:
        self.inner = inner
        self.disk = disk
        # Where compute is at once, slots are host memory that a read can go to.
        self.straight = isinstance(inner, InlineEngine)
        self._memory = HostTier(pin=pin)
        self._sizes = {
            Lane.IN: whole_blocks(max(slot_bytes, ALIGNMENT)) + 2 * ALIGNMENT,
            Lane.OUT: BUFFER_BYTES,
        }
        self._counts = {Lane.IN: num_slots + 1, Lane.OUT: WRITE_BUFFERS}
        self._made = dict.fromkeys(Lane, 0)
        self._idle: deque[tuple[Tensor, Ticket]] = deque()
        self._pending: deque[_Part] = deque()
        self._written: deque[_Written] = deque()
        self._spare: list[Tensor] = []
        self._errors: list[DiskError] = []
        self.lost: list[DiskError] = []
        self._thread: ThreadPoolExecutor | None = None

    @property
    def in_rate(self) -> float | None:
        return self.inner.in_rate

    @in_rate.setter
    def in_rate(self, rate: float | None) -> None:
        self.inner.in_rate = rate

    @property
    def buffer_bytes(self) -> int:
        """Host memory taken beside what is stored."""
        return self._memory.used_bytes

    def buffer(self, nbytes: int) -> Tensor:
        """Host memory that begins on a page, for as long as this engine lives."""
        extent = self._memory.allocate(whole_blocks(nbytes))
        return self._memory.view(extent, 0, (nbytes,), torch.uint8)

    def submit(self, copies: Sequence[Copy], *, lane: Lane, after: Sequence[Ticket] = ()) -> Ticket:
        """As the protocol has it.

        Raises:
            DiskError: an earlier write failed; the copies asked for were not begun.
        """
        self._pass_on()
        if lane is Lane.OUT:
            self._look_after_writes()
            while self._errors:
                error = self._errors.pop(0)
                if error in self.lost:  # still of something that is held
                    raise error
            down = [copy for copy in copies if copy.dst.is_meta]
            if down:
                rest = [copy for copy in copies if not copy.dst.is_meta]
                return self._write(down, rest, self._inner_of(after))
            return self.inner.submit(copies, lane=lane, after=self._inner_of(after))
        self._settle(copies)
        up = [copy for copy in copies if copy.src.is_meta]
        if not up:
            return self.inner.submit(copies, lane=lane, after=self._inner_of(after))
        rest = [copy for copy in copies if not copy.src.is_meta]
        return self._read(up, rest, after)

    def fence(self) -> Ticket:
        return self.inner.fence()

    def wait(self, ticket: Ticket) -> None:
        """As the protocol has it; of a read, the host waits until it is there, and of a write,
        compute may change the source afterwards.

        Raises:
            DiskError: the read failed.
        """
        if not isinstance(ticket, DiskTicket):
            self.inner.wait(ticket)
            return
        if ticket.lane is Lane.OUT and self.straight:
            self._await_writes(ticket)
        while ticket.parts:
            self._pass_on(force=True)
        if ticket.error is not None:
            raise ticket.error
        if ticket.inner is not None:
            self.inner.wait(ticket.inner)
        self._pass_on()

    def done(self, ticket: Ticket, *, block: bool) -> bool:
        """As the protocol has it; of writes only on other threads. Bytes that a failed write should
        have changed cannot be read."""
        if not isinstance(ticket, DiskTicket):
            return self.inner.done(ticket, block=block)
        if ticket.inner is not None and not self.inner.done(ticket.inner, block=block):
            return False
        if ticket.lane is Lane.OUT:
            return all(bool(self.disk.queue.over(job, block=block)) for job in ticket.jobs)
        while ticket.parts and block:
            self._pass_on(force=True)
        return not ticket.parts

    def copied(self, ticket: Ticket, *, block: bool) -> bool:
        """Whether of a write what the inner engine moves is done, beside the disk or towards it."""
        if isinstance(ticket, DiskTicket):
            return ticket.inner is None or self.inner.done(ticket.inner, block=block)
        return self.inner.done(ticket, block=block)

    def drain(self) -> None:
        while self._pending:
            self._pass_on(force=True)
        while self._written:
            self._look_after_writes(block=True)
        self.inner.drain()

    # Up.

    def _read(self, up: list[Copy], rest: list[Copy], after: Sequence[Ticket]) -> DiskTicket:
        writes = [t.jobs[-1] for t in after if isinstance(t, DiskTicket) and t.jobs]
        behind = max(writes, default=0)
        ticket = DiskTicket(Lane.IN, rest, self._inner_of(after))
        if self.straight:
            for before in ticket.after:
                self.inner.done(before, block=True)
            ops = [op_of(self.disk, copy.dst, copy.src) for copy in up]
            self._start_read(ticket, ops, behind, [], None, [copy.dst for copy in up])
            return ticket
        size = self._sizes[Lane.IN]
        for part in _packed(up, size):
            buffer = self._acquire_up()
            copies, ops = [], []
            for copy, at in part:
                here = buffer[at : at + copy.nbytes]
                ops.append(op_of(self.disk, here, copy.src))
                copies.append(Copy(copy.dst, here.view(copy.dst.dtype).view(copy.dst.shape)))
            self._start_read(ticket, ops, behind, copies, buffer, [copy.dst for copy in copies])
        return ticket

    def _start_read(
        self,
        ticket: DiskTicket,
        ops: list[Op],
        behind: int,
        copies: list[Copy],
        buffer: Tensor | None,
        filled: list[Tensor],
    ) -> None:
        low, high = _addresses(filled)
        job = self.disk.read(ops, after=behind)
        ticket.parts += 1
        self._pending.append(_Part(ticket, job, low, high, copies, buffer, filled))

    def _pass_on(self, *, force: bool = False) -> None:
        """Reads that are over go on to the device, in order; with `force` the oldest is waited for."""
        while self._pending:
            part = self._pending[0]
            ticket = part.ticket
            try:
                if not self.disk.over(part.job, block=force):
                    return
            except DiskError as error:
                ticket.error = ticket.error or error
            force = False
            self._pending.popleft()
            ticket.parts -= 1
            copies = part.copies
            if not ticket.parts:
                copies, ticket.copies = [*ticket.copies, *copies], []
            if copies and ticket.error is None:
                ticket.inner = self.inner.submit(copies, lane=Lane.IN, after=ticket.after)
            if part.buffer is not None:
                # Not before the copy out of it has ended.
                last = self.inner.fence() if ticket.inner is None else ticket.inner
                self._idle.append((part.buffer, last))

    def _acquire_up(self) -> Tensor:
        """A buffer that nothing reads from any more."""
        if not self._idle and self._made[Lane.IN] < self._counts[Lane.IN]:
            self._made[Lane.IN] += 1
            return self.buffer(self._sizes[Lane.IN])
        while not self._idle:
            self._pass_on(force=True)
        buffer, last = self._idle.popleft()
        self.inner.done(last, block=True)
        return buffer

    def _settle(self, copies: Sequence[Copy]) -> None:
        """A read that was asked for and is not wanted any more may still fill the same memory."""
        if not self._pending or not copies:
            return
        low, high = _addresses([copy.dst for copy in copies])
        while any(part.low < high and low < part.high for part in self._pending):
            self._pass_on(force=True)

    # Down.

    def _write(self, down: list[Copy], rest: list[Copy], after: list[Ticket]) -> DiskTicket:
        ticket = DiskTicket(Lane.OUT, rest, after)
        if rest:
            ticket.inner = self.inner.submit(rest, lane=Lane.OUT, after=after)
        if self.straight:
            ops = [op_of(self.disk, copy.src, copy.dst) for copy in down]
            job = self.disk.write(ops)
            ticket.jobs.append(job)
            self._written.append(_Written(job, [copy.src for copy in down], None))
            return ticket
        for part in _packed(down, self._sizes[Lane.OUT]):
            buffer = self._acquire_down()
            copies, ops = [], []
            for copy, at in part:
                here = buffer[at : at + copy.nbytes]
                ops.append(op_of(self.disk, here, copy.dst))
                copies.append(Copy(here.view(copy.src.dtype).view(copy.src.shape), copy.src))
            ticket.inner = self.inner.submit(copies, lane=Lane.OUT, after=after)
            job = self.disk.queue.job(write=True)
            ticket.jobs.append(job)
            begun = _Written(job, [copy.src for copy in copies], buffer)
            if self.inner.done(ticket.inner, block=False):
                self.disk.begin_write(job, ops)
            else:
                begun.started = self._helper().submit(self._begin_later, ticket.inner, job, ops)
            self._written.append(begun)
        return ticket

    def _begin_later(self, copied: Ticket, job: int, ops: list[Op]) -> None:
        """On the helper's thread: the device is waited for, then the write begins."""
        try:
            self.inner.done(copied, block=True)
        except BaseException:
            self.disk.queue.fail(job, errno.EIO, ops)  # nobody may wait for it in vain
            raise
        self.disk.begin_write(job, ops)

    def _helper(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "headinfer-write")
        return self._thread

    def _acquire_down(self) -> Tensor:
        if not self._spare and self._made[Lane.OUT] < self._counts[Lane.OUT]:
            self._made[Lane.OUT] += 1
            return self.buffer(self._sizes[Lane.OUT])
        while not self._spare:
            self._look_after_writes(block=True)
        return self._spare.pop()

    def _look_after_writes(self, *, block: bool = False) -> None:
        """Buffers of writes that are over are free; with `block` the oldest is waited for."""
        waiting: deque[_Written] = deque()
        while self._written:
            begun = self._written.popleft()
            try:
                if not self.disk.over(begun.job, block=block):
                    waiting.append(begun)
                    continue
            except DiskError as error:
                self._errors.append(error)
                self.lost.append(error)
            block = False
            if begun.buffer is not None:
                self._spare.append(begun.buffer)
        self._written = waiting

    def _await_writes(self, ticket: DiskTicket) -> None:
        for job in ticket.jobs:
            self.disk.queue.over(job, block=True)

    def _inner_of(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        found = [t.inner if isinstance(t, DiskTicket) else t for t in tickets]
        return [ticket for ticket in found if ticket is not None]


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, int]:
    starts = [tensor.data_ptr() for tensor in tensors]
    stops = [tensor.data_ptr() + tensor.numel() * tensor.element_size() for tensor in tensors]
    return min(starts), max(stops)


def _packed(copies: Sequence[Copy], size: int) -> Iterator[list[tuple[Copy, int]]]:
    """`copies`, cut where they are larger than a buffer of `size`, and their places in buffers.

    A copy of whole blocks of the file lies on blocks of the buffer, so that nothing stands between.
    """
    found: list[tuple[Copy, int]] = []
    used = 0
    for copy in copies:
        flat_dst, flat_src = copy.dst.reshape(-1), copy.src.reshape(-1)
        width = copy.dst.element_size()
        for start in range(0, flat_dst.numel(), size // width):
            stop = min(start + size // width, flat_dst.numel())
            part = copy
            if stop - start < flat_dst.numel():
                part = Copy(flat_dst[start:stop], flat_src[start:stop])
            place = aligned(used) if part.nbytes % ALIGNMENT else whole_blocks(used)
            if place + part.nbytes > size:
                yield found
                found, place = [], 0
            found.append((part, place))
            used = place + part.nbytes
    if found:
        yield found
