# SPDX-License-Identifier: Apache-2.0
"""Near-data attention: the CPU attends heads where their bytes are, while others stream.

Queries go down and partials come up, a few KiB a layer. On CUDA the native kernel is part of a
stream's order, and nobody waits for it but the device. What that cannot do (rows that beams
reordered, types without a native kernel, keys on disk) a thread does that waits for the queries.
Which heads, and whether at all, is the runner's decision.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor

from headinfer.attention import native
from headinfer.attention.api import AUTO
from headinfer.attention.masks import Block, on_host
from headinfer.attention.native_job import KeyRun, NativeJob, PackedKeys
from headinfer.attention.types import AttentionSpec, Partial
from headinfer.heads import OffloadedHeads, PackedPiece, Piece
from headinfer.host_stream import Finished, HostJob, HostStream, why_no_host_functions
from headinfer.layout import HeadGroup
from headinfer.spill import DiskEngine
from headinfer.spill.engine import DiskTicket
from headinfer.totals import Query, Total
from headinfer.transfer import CudaEngine, Ticket, TransferEngine

NEAR_ROWS = 16
"""Query tokens attended on the CPU at most: beyond, attention is arithmetic, which the GPU does."""

SPARED_THREADS = 1
"""Of those that attend: the thread that enqueues the model's kernels runs at the same time, and one
that waits for a processor would hold up all of them."""


def job_threads() -> int:
    """How many threads attend in a job that is part of a stream's order."""
    return max(1, min(native.threads(), torch.get_num_threads() - SPARED_THREADS))


def host_query(query: Query) -> Query | None:
    """`query` as the CPU answers it, its `q` left out; None where it cannot."""
    q = query.q
    if q.shape[2] > NEAR_ROWS or q.dtype.itemsize > 4 or query.expand is not None:
        return None
    recipe = on_host(query.recipe)
    return None if recipe is None else replace(query, recipe=recipe, sink=None)


class NearData:
    """Attends offloaded heads in host memory for one compute device.

    Attributes:
        attended_bytes: keys and values of the jobs given so far.
    """

    def __init__(self, engine: TransferEngine, device: torch.device, attention: str = AUTO) -> None:
        self.attended_bytes = 0
        self._engine = engine
        self._device = device
        self._attention = attention
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headinfer-near")
        self._buffers: dict[str, Tensor] = {}
        self._finished: list[Finished] = []
        self._stream: HostStream | None = None
        self._listed: dict[int, dict[HeadGroup, _Listed]] = {}
        moves = engine.inner if isinstance(engine, DiskEngine) else engine
        if isinstance(moves, CudaEngine) and attention == AUTO and _native_in_streams():
            self._stream = HostStream(device)

    def start(
        self, heads: OffloadedHeads, group: HeadGroup, length: int, q: Tensor, call: Query
    ) -> NearJob:
        """Begin attention over the stored part of [0, length) of `group`.

        Nothing that is stored may change until the job is over; `settle` waits for that.

        Args:
            heads: the range `group` is part of.
            group: KV heads to attend.
            length: tokens.
            q: queries of all the layer's heads, on the compute device.
            call: the rest of the call, from `host_query`.
        """
        per_kv = q.shape[1] // heads.shape.num_kv_heads
        q = q[:, group.start * per_kv : group.stop * per_kv]
        if self._stream is not None:
            listed = self._list(heads, group, length, q, call)
            if listed is not None:
                return self._in_stream(self._stream, listed, heads, q, call)
        # Both buffers are free: the stream has passed the last upload when these queries exist,
        # and the last job is over.
        down = self._buffer("q", q.shape, q.dtype)
        down.copy_(q, non_blocking=True)
        ready = self._engine.fence()
        out = self._buffer("out", (*q.shape[:3], call.value_dim), torch.float32)
        lse = self._buffer("lse", q.shape[:3], torch.float32)
        after = (ready, heads.last_write)
        work = _Work(heads, group, length, replace(call, q=down), Partial(out, lse), after)
        return ThreadJob(self._thread.submit(self._run, work), self._device, self._finished)

    def lap(self) -> Lap | None:
        """What the jobs since this was asked last took; None if there were none, or if some are
        still under way and belong to a later answer.

        Raises:
            InputError, MemoryError: the native library refused one; its result was NaN.
        """
        if self._stream is not None:
            self._finished += self._stream.finished()
            if self._stream.busy:
                return None
        jobs = list(self._finished)
        self._finished.clear()
        if not jobs:
            return None
        return Lap(
            seconds=max(job.ended for job in jobs) - min(job.started for job in jobs),
            near_s=sum(job.ended - job.started for job in jobs),
            near_bytes=sum(job.nbytes for job in jobs),
            slack_s=sum(job.slack_s for job in jobs),
        )

    def settle(self) -> None:
        """Return when every job is over; what is stored may change then."""
        self._listed.clear()
        if self._stream is not None:
            self._stream.drain()

    def close(self) -> None:
        """Return when every job is over; the thread ends."""
        self.settle()
        self._thread.shutdown()

    def _list(
        self, heads: OffloadedHeads, group: HeadGroup, length: int, q: Tensor, call: Query
    ) -> _Listed | None:
        """The keys of a job in the stream; None where it has to be one of the thread. A token of a
        decode asks for the same as the one before, until a block is full; while the share of the
        CPU settles, for what one of the last few asked for."""
        if isinstance(heads.last_write, DiskTicket):  # no event that a stream could wait for
            return None
        how = length, heads.store.epoch, q.shape[::2], q.dtype, call.scale, call.softcap
        # A mask could hide others of them each time.
        plain = _sees_all(call, q.shape[2], length)
        kept = self._listed.setdefault(id(heads), {})
        found = kept.get(group)
        if found is not None and found.heads is heads and found.how == how:
            if plain:
                return found
        elif found is not None or any(one.how != how for one in kept.values()):
            kept.clear()  # those of other groups are as old
        runs = _runs(heads, group, length, q, call)
        if runs is None:
            return None
        nbytes = sum(run.k.nbytes + run.v.nbytes for run in runs)
        found = _Listed(heads, how, runs, nbytes)
        if plain:
            kept[group] = found
        return found

    def _in_stream(
        self, stream: HostStream, listed: _Listed, heads: OffloadedHeads, q: Tensor, call: Query
    ) -> NearJob:
        self._finished += stream.finished()
        num_threads = job_threads()

        def job_for(down: Tensor, found: Partial) -> NativeJob:
            last = listed.job
            at = down.data_ptr(), found.out.data_ptr()
            if last is not None and last.at == at and last.num_threads == num_threads:
                listed.job = last.again()
            else:
                listed.job = NativeJob(
                    down,
                    listed.runs,
                    found,
                    scale=call.scale,
                    softcap=call.softcap,
                    num_threads=num_threads,
                )
            return listed.job

        after = [cast(torch.cuda.Event, heads.last_write)]
        self.attended_bytes += listed.nbytes
        return StreamJob(
            stream.submit(q, call.value_dim, job_for, after=after, nbytes=listed.nbytes)
        )

    def _run(self, work: _Work) -> tuple[Partial, float, float, int]:
        for ticket in work.after:
            self._engine.done(ticket, block=True)
        started, nbytes = time.perf_counter(), 0
        query = work.query
        total = Total(query, query.q, (0, query.q.shape[1]), self._attention, collect=True)
        with torch.inference_mode():
            for piece in work.heads.in_place(work.group, work.length):
                total.add(piece)
                nbytes += piece.nbytes
            found = total.partial
            work.found.out.copy_(found.out)
            work.found.lse.copy_(found.lse)
        self.attended_bytes += nbytes
        return work.found, started, time.perf_counter(), nbytes

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Page-locked memory that stays where it is as long as shapes do not grow."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        held = self._buffers.get(name)
        if held is None or held.numel() < nbytes:
            # An inference tensor could not be written to by a later call outside that mode.
            with torch.inference_mode(False):
                held = torch.empty(
                    nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda", device="cpu"
                )
            self._buffers[name] = held
        return held[:nbytes].view(dtype).view(shape)


class Lap(NamedTuple):
    """What some jobs took.

    Attributes:
        seconds: from the first one's begin to the last one's end.
        near_s: of these, what the CPU spent in its kernel.
        near_bytes: keys and values it read.
        slack_s: how much later than asked for the results came, in all; negative if earlier.
    """

    seconds: float
    near_s: float
    near_bytes: int
    slack_s: float


@dataclass(frozen=True, slots=True)
class _Work:
    """What the thread needs; `found` is where the result goes."""

    heads: OffloadedHeads
    group: HeadGroup
    length: int
    query: Query
    found: Partial
    after: tuple[Ticket, ...]


@dataclass(slots=True)
class _Listed:
    """What a job in the stream attends.

    Attributes:
        how: what the list depends on.
        job: the last one made of it.
    """

    heads: OffloadedHeads
    how: tuple[object, ...]
    runs: list[KeyRun | PackedKeys]
    nbytes: int
    job: NativeJob | None = None


class NearJob(Protocol):
    """Attention under way on the CPU; on leaving its `with` block nothing that it needs is needed
    any more by what is enqueued later."""

    def partial(self) -> Partial:
        """What was found, on the compute device, for work enqueued from now on."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class ThreadJob:
    """A job of the thread; asking for its partial waits for it."""

    def __init__(
        self,
        future: Future[tuple[Partial, float, float, int]],
        device: torch.device,
        finished: list[Finished],
    ) -> None:
        self._future = future
        self._device = device
        self._finished = finished

    def partial(self) -> Partial:
        asked = time.perf_counter()
        found, started, ended, nbytes = self._future.result()
        self._finished.append(Finished(started, ended, ended - asked, nbytes))
        if self._device.type == "cpu":
            return Partial(found.out.clone(), found.lse.clone())
        return Partial(
            found.out.to(self._device, non_blocking=True),
            found.lse.to(self._device, non_blocking=True),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._future.exception()  # waits; `partial` has raised it, or another error is on its way


class StreamJob:
    """A job in a stream of its own; compute waits for it, the host does not."""

    def __init__(self, job: HostJob) -> None:
        self._job = job

    def partial(self) -> Partial:
        self._job.wait()
        return self._job.found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The queries and the result may be let go: compute reuses their memory after the job.
        self._job.wait()


def _native_in_streams() -> bool:
    return native.why_absent() is None and why_no_host_functions() is None


def _sees_all(call: Query, rows: int, length: int) -> bool:
    """Whether nothing hides one of the first `length` keys from one of `rows` rows."""
    blocks = list(call.recipe.blocks((0, rows), (0, length)))
    return len(blocks) == 1 and _hides_nothing(blocks[0], (0, rows), (0, length))


def _hides_nothing(block: Block, rows: tuple[int, int], keys: tuple[int, int]) -> bool:
    plain = block.bias is None and block.window is None and not block.causal
    return plain and (block.rows, block.keys) == (rows, keys)


def _runs(
    heads: OffloadedHeads, group: HeadGroup, length: int, q: Tensor, call: Query
) -> list[KeyRun | PackedKeys] | None:
    """The keys that all rows of `call` see, as they lie; None where the native library or the
    order of the rows asks for more than that, or where some are on disk.

    The job begins when its stream gets there, so what is listed now has to be in memory until then.
    """
    if not heads.lies_in_order(length) or not heads.lies_in_memory(length):
        return None
    everything = 0, q.shape[2]
    found: list[KeyRun | PackedKeys] = []
    pieces: Iterator[Piece | PackedPiece] = heads.in_place(group, length)
    for piece in pieces:
        stop = piece.stop if isinstance(piece, PackedPiece) else piece.start + piece.k.shape[2]
        for block in call.recipe.blocks(everything, (piece.start, stop)):
            bias = block.bias
            if block.rows != everything or block.causal or block.window is not None:
                return None
            if bias is not None and bias.shape[1] != 1:
                return None
            here = slice(block.keys[0] - piece.start, block.keys[1] - piece.start)
            if not isinstance(piece, PackedPiece):
                found.append(KeyRun(piece.k[:, :, here], piece.v[:, :, here], bias))
            elif here.start or piece.tail is not None:  # would have to be decoded first
                return None
            else:
                found.append(PackedKeys(piece.packed_k, piece.packed_v, here.stop, bias))
    if not found:
        return None
    biased = any(run.bias is not None for run in found)
    spec = AttentionSpec(
        device="cpu",
        dtype=q.dtype,
        key_dim=q.shape[-1],
        value_dim=call.value_dim,
        q_per_kv=q.shape[1] // group.heads,
        query_tokens=q.shape[2],
        causal=False,
        biased=biased,
        softcap=call.softcap is not None,
    )
    return None if native.NativeAttention().unsupported(spec) else found
