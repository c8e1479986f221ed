# SPDX-License-Identifier: Apache-2.0
"""Native jobs in the order of a CUDA stream: queries come down, the CPU attends, partials go up,
and no thread of Python waits for any of it.

The CUDA driver calls a host function when its stream gets there, and the stream goes on when it
returns (cuLaunchHostFunc). So a whole decode step can be enqueued ahead, as it can be where every
head streams.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.attention.native_job import NativeJob
from headinfer.attention.types import Partial
from headinfer.errors import HeadInferError

_log = logging.getLogger(__name__)


class Finished(NamedTuple):
    """A job that is over.

    Attributes:
        started, ended: when it ran, by the monotonic clock.
        slack_s: how much later its result came than it was asked for; negative if earlier.
        nbytes: of keys and values that it read.
    """

    started: float
    ended: float
    slack_s: float
    nbytes: int


@dataclass(slots=True)
class HostJob:
    """A job of a `HostStream`.

    Attributes:
        found: the result on the device, there for work enqueued after `wait`.
    """

    found: Partial
    job: NativeJob
    nbytes: int
    begun: torch.cuda.Event
    ended: torch.cuda.Event
    done: torch.cuda.Event
    _asked: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Work enqueued from now on on the current stream comes after the job."""
        stream = torch.cuda.current_stream(self.found.out.device)
        if self._asked is None:
            self._asked = torch.cuda.Event(enable_timing=True)
            self._asked.record(stream)
        stream.wait_event(self.done)

    def finished(self) -> Finished | None:
        """What it took; None while it is under way, or nothing has come to ask for it."""
        if self._asked is None or not self._asked.query() or not self.done.query():
            return None
        # From an event before both: a time between two events is no less than zero. The way up is
        # left out: it may wait behind tiles, which says nothing of who is faster.
        slack_ms = self.begun.elapsed_time(self.ended) - self.begun.elapsed_time(self._asked)
        return Finished(*self.job.times(), slack_ms / 1e3, self.nbytes)


class HostStream:
    """One CUDA stream of native jobs, which run in the order given."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._issued: deque[HostJob] = deque()
        # Page-locked, and one of each: a job's queries come down when the job before has left.
        self._down = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._up = torch.empty(0, dtype=torch.float32, device="cpu")
        self._up_seen: Tensor | None = None  # the same memory as kernels see it

    def submit(
        self,
        q: Tensor,
        value_dim: int,
        job_for: Callable[[Tensor, Partial], NativeJob],
        *,
        after: Sequence[torch.cuda.Event],
        nbytes: int,
    ) -> HostJob:
        """Enqueue a job; its `wait` has to be called before what it was given is let go.

        Args:
            q: [b, h, t, d] on the device, made by what is enqueued on the current stream.
            value_dim: width of the result.
            job_for: makes the job, from queries and a place for the result in host memory.
            after: what has to be done before.
            nbytes: keys and values that it reads.
        """
        lse_size = q.shape[:3].numel()
        self._reserve(q.nbytes, lse_size * (value_dim + 1))
        down = self._down[: q.nbytes].view(q.dtype).view(q.shape)
        up = self._up[: lse_size * (value_dim + 1)]
        landed = torch.empty_like(up, device=self._device)
        job = job_for(down, _partial(up, q.shape, value_dim))
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        done = torch.cuda.Event()
        begun.record(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for event in (begun, *after):
                self._stream.wait_event(event)
            down.copy_(q, non_blocking=True)
            _launch(self._stream, job)
            ended.record(self._stream)
            if self._up_seen is None:
                landed.copy_(up, non_blocking=True)
            else:
                # By a kernel: the copy engine would bring it after megabytes of tiles.
                torch.mul(self._up_seen[: up.numel()], 1.0, out=landed)
            done.record(self._stream)
        issued = HostJob(_partial(landed, q.shape, value_dim), job, nbytes, begun, ended, done)
        self._issued.append(issued)
        return issued

    def finished(self) -> list[Finished]:
        """The jobs that are over since this was asked last.

        Raises:
            InputError, MemoryError: the native library refused one; its result was NaN.
        """
        found: list[Finished] = []
        while self._issued:
            job = self._issued[0].finished()
            if job is None:
                break
            self._issued.popleft()
            found.append(job)
        return found

    @property
    def busy(self) -> bool:
        """Whether a job is not known to be over."""
        return bool(self._issued)

    def drain(self) -> None:
        """Return when every job is over."""
        self._stream.synchronize()

    def _reserve(self, down_bytes: int, up_floats: int) -> None:
        if down_bytes <= self._down.numel() and up_floats <= self._up.numel():
            return
        self.drain()
        # An inference tensor could not be written to by a later call outside that mode.
        with torch.inference_mode(False):
            if down_bytes > self._down.numel():
                self._down = torch.empty(
                    down_bytes, dtype=torch.uint8, pin_memory=True, device="cpu"
                )
            if up_floats > self._up.numel():
                self._up = torch.empty(
                    up_floats, dtype=torch.float32, pin_memory=True, device="cpu"
                )
                self._up_seen = _seen_by_kernels(self._up, self._device)


def why_no_host_functions() -> str | None:
    """Why the driver cannot call the CPU from a stream; None if it can."""
    found = _driver()
    return found if isinstance(found, str) else None


class _OnDevice:
    """Page-locked memory under the address that kernels read it at, which is its own: the CUDA
    array interface, by which torch takes memory of others."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": tuple(memory.shape),
            "typestr": "<f4",
            "data": (memory.data_ptr(), False),
            "strides": None,
            "version": 2,
        }


def _seen_by_kernels(memory: Tensor, device: torch.device) -> Tensor | None:
    """`memory`, float32 and page-locked, as a tensor of `device`; None where torch refuses."""
    try:
        found = torch.as_tensor(_OnDevice(memory), device=device)
    except (RuntimeError, TypeError, ValueError) as error:
        _log.info("results of the CPU go up by copies, not by a kernel: %s", error)
        return None
    return found if found.data_ptr() == memory.data_ptr() else None


def _partial(memory: Tensor, shape: torch.Size, value_dim: int) -> Partial:
    """Out [b, h, t, value_dim] and lse [b, h, t] in `memory`."""
    lse_size = shape[:3].numel()
    out = memory[: lse_size * value_dim].view(*shape[:3], value_dim)
    return Partial(out, memory[lse_size * value_dim :].view(shape[:3]))


def _launch(stream: torch.cuda.Stream, job: NativeJob) -> None:
    driver = _driver()
    if isinstance(driver, str):
        raise HeadInferError(driver)
    status = driver(stream.cuda_stream, NativeJob.function(), job.address)
    if status:
        raise HeadInferError(
            f"the CUDA driver did not take a host function (status {status}); near_data=0 leaves "
            "the CPU out"
        )


@cache
def _driver() -> Callable[[int, int, int], int] | str:
    """cuLaunchHostFunc, or why there is none."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
    except (OSError, AttributeError) as error:
        return f"the CUDA driver has no host functions: {error}"
    function.argtypes = [ctypes.c_void_p] * 3
    function.restype = ctypes.c_int
    return function
