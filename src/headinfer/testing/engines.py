# SPDX-License-Identifier: Apache-2.0
"""Transfer engines that make a missing wait visible.

`DeferredEngine` runs a copy at the last moment the contract allows: when somebody waits for it.
`DelayedCudaEngine` lets each copy stream sleep for random times. `DeferredHostStream` runs a native
job at its last moment. Together with NaN-filled slots a
read that is not ordered after its copy gives NaN or stale bytes instead of luck.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headinfer.attention.native_job import NativeJob
from headinfer.attention.types import Partial
from headinfer.errors import TransferError
from headinfer.host_stream import Finished
from headinfer.spill.engine import DiskTicket
from headinfer.transfer import Copy, CudaEngine, Lane, Ticket, TransferEngine


@dataclass(eq=False, slots=True)
class _Job:
    lane: Lane
    copies: list[Copy]
    after: list[_Job]
    done: bool = False
    running: bool = field(default=False, repr=False)


class DeferredEngine:
    """A CPU engine whose copies run only when waited for, lanes in order."""

    def __init__(self) -> None:
        self.in_rate: float | None = None
        self._lock = threading.RLock()  # `done` is asked on other threads too
        self._queues: dict[Lane, deque[_Job]] = {lane: deque() for lane in Lane}

    def submit(self, copies: Sequence[Copy], *, lane: Lane, after: Sequence[Ticket] = ()) -> Ticket:
        job = _Job(lane, list(copies), [ticket for ticket in after if isinstance(ticket, _Job)])
        with self._lock:
            self._queues[lane].append(job)
        return job

    def fence(self) -> Ticket:
        """Compute runs at once here, so everything enqueued on it is done."""
        return _Job(Lane.IN, [], [], done=True)

    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _Job)
        with self._lock:
            self._run(ticket)

    def done(self, ticket: Ticket, *, block: bool) -> bool:
        assert isinstance(ticket, _Job)
        if block:
            self.wait(ticket)
        return ticket.done

    def drain(self) -> None:
        with self._lock:
            for queue in self._queues.values():
                while queue:
                    self._run(queue[0])

    def _run(self, job: _Job) -> None:
        if job.done:
            return
        if job.running:
            raise TransferError("two copies wait for each other")
        queue = self._queues[job.lane]
        while queue and not job.done:
            first = queue[0]
            if first.running:
                raise TransferError("a copy waits for a later one of its own lane")
            first.running = True
            for ticket in first.after:
                self._run(ticket)
            started = time.perf_counter()
            for copy in first.copies:
                copy.dst.copy_(copy.src)
            if first.copies and first.lane is Lane.IN:
                nbytes = sum(copy.nbytes for copy in first.copies)
                self.in_rate = nbytes / max(time.perf_counter() - started, 1e-9)
            first.done = True
            queue.popleft()


@dataclass(eq=False, slots=True)
class _HostJob:
    found: Partial
    up: Partial
    job: NativeJob
    nbytes: int
    after: list[Ticket]
    engine: TransferEngine
    over: bool = False

    def wait(self) -> None:
        if not self.over:
            for ticket in self.after:
                self.engine.done(ticket, block=True)
            self.job.run()
            for found, up in zip(self.found, self.up, strict=True):
                found.copy_(up)
            self.over = True


class DeferredHostStream:
    """Stands in for `headinfer.host_stream.HostStream` where there is no CUDA: a job runs when its
    result is waited for, all do on `drain`, and one before the next is given, as they share the memory
    of queries and result.

    Attributes:
        given: jobs so far.
    """

    def __init__(self, engine: TransferEngine) -> None:
        self.given = 0
        self._engine = engine
        self._issued: list[_HostJob] = []
        self._memory: dict[tuple[object, ...], tuple[Tensor, Partial]] = {}

    def submit(
        self,
        q: Tensor,
        value_dim: int,
        job_for: Callable[[Tensor, Partial], NativeJob],
        *,
        after: Sequence[Ticket],
        nbytes: int,
    ) -> _HostJob:
        if any(isinstance(ticket, DiskTicket) for ticket in after):
            raise TransferError("a stream has no event to wait for a write to disk with")
        self.drain()
        shape, how = q.shape[:3], (q.shape, q.dtype, value_dim)
        if how not in self._memory:
            out, lse = (
                torch.empty(size, dtype=torch.float32, device="cpu")
                for size in ((*shape, value_dim), shape)
            )
            up = Partial(out, lse)
            self._memory[how] = torch.empty(q.shape, dtype=q.dtype), up
        down, up = self._memory[how]
        down.copy_(q)
        job = job_for(down, up)
        found = Partial(torch.full((*shape, value_dim), torch.nan), torch.full(shape, torch.nan))
        issued = _HostJob(found, up, job, nbytes, list(after), self._engine)
        self._issued.append(issued)
        self.given += 1
        return issued

    def finished(self) -> list[Finished]:
        over = [job for job in self._issued if job.over]
        self._issued = [job for job in self._issued if not job.over]
        return [Finished(*job.job.times(), 0.0, job.nbytes) for job in over]

    @property
    def busy(self) -> bool:
        return bool(self._issued)

    def drain(self) -> None:
        for job in self._issued:
            job.wait()


class DelayedCudaEngine(CudaEngine):
    """A CUDA engine whose lanes sleep up to `most_cycles` GPU cycles before each submission."""

    def __init__(
        self, device: torch.device, *, seed: int = 0, most_cycles: int = 2_000_000
    ) -> None:
        super().__init__(device)
        self._random = random.Random(seed)
        self._most_cycles = most_cycles

    def submit(self, copies: Sequence[Copy], *, lane: Lane, after: Sequence[Ticket] = ()) -> Ticket:
        with torch.cuda.stream(self._lanes[lane]):
            torch.cuda._sleep(self._random.randrange(self._most_cycles))
        return super().submit(copies, lane=lane, after=after)
