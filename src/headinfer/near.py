# SPDX-License-Identifier: Apache-2.0
"""Near-data attention: the CPU attends heads where their bytes are, while others stream.

Queries go down and partials come up, a few KiB a layer. One thread of its own waits for the
queries and runs the kernel, so that launching kernels and copies goes on meanwhile. Which heads,
and whether at all, is the runner's decision.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from headinfer.attention.api import AUTO
from headinfer.attention.masks import on_host
from headinfer.attention.types import Partial
from headinfer.heads import OffloadedHeads
from headinfer.layout import HeadGroup
from headinfer.totals import Query, Total
from headinfer.transfer import Ticket, TransferEngine

NEAR_ROWS = 16
"""Query tokens attended on the CPU at most: beyond, attention is arithmetic, which the GPU does."""


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
        attended_bytes: keys and values read so far.
        seconds: spent in the kernel so far.
    """

    def __init__(self, engine: TransferEngine, device: torch.device, attention: str = AUTO) -> None:
        self.attended_bytes = 0
        self.seconds = 0.0
        self._engine = engine
        self._device = device
        self._attention = attention
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headinfer-near")
        self._buffers: dict[str, Tensor] = {}

    def start(
        self, heads: OffloadedHeads, group: HeadGroup, length: int, q: Tensor, call: Query
    ) -> NearJob:
        """Begin attention over the stored part of [0, length) of `group`.

        Nothing that is stored may change until the job is over.

        Args:
            heads: the range `group` is part of.
            group: KV heads to attend.
            length: tokens.
            q: queries of all the layer's heads, on the compute device.
            call: the rest of the call, from `host_query`.
        """
        per_kv = q.shape[1] // heads.shape.num_kv_heads
        q = q[:, group.start * per_kv : group.stop * per_kv]
        # Both buffers are free: the stream has passed the last upload when these queries exist,
        # and the last job is over.
        down = self._buffer("q", q.shape, q.dtype)
        down.copy_(q, non_blocking=True)
        ready = self._engine.fence()
        out = self._buffer("out", (*q.shape[:3], call.value_dim), torch.float32)
        lse = self._buffer("lse", q.shape[:3], torch.float32)
        after = (ready, heads.last_write)
        work = _Work(heads, group, length, replace(call, q=down), Partial(out, lse), after)
        return NearJob(self._thread.submit(self._run, work), self._device)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _run(self, work: _Work) -> Partial:
        for ticket in work.after:
            self._engine.done(ticket, block=True)
        started = time.perf_counter()
        query = work.query
        total = Total(query, query.q, (0, query.q.shape[1]), self._attention, collect=True)
        with torch.inference_mode():
            for piece in work.heads.in_place(work.group, work.length):
                total.add(piece)
                self.attended_bytes += piece.nbytes
            found = total.partial
            work.found.out.copy_(found.out)
            work.found.lse.copy_(found.lse)
        self.seconds += time.perf_counter() - started
        return work.found

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Page-locked memory that stays where it is as long as shapes do not grow."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        held = self._buffers.get(name)
        if held is None or held.numel() < nbytes:
            # An inference tensor could not be written to by a later call outside that mode.
            with torch.inference_mode(False):
                held = torch.empty(
                    nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda"
                )
            self._buffers[name] = held
        return held[:nbytes].view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class _Work:
    """What the thread needs; `found` is where the result goes."""

    heads: OffloadedHeads
    group: HeadGroup
    length: int
    query: Query
    found: Partial
    after: tuple[Ticket, ...]


class NearJob:
    """Attention under way on the CPU; leaving its `with` block waits for the end."""

    def __init__(self, future: Future[Partial], device: torch.device) -> None:
        self._future = future
        self._device = device

    def partial(self) -> Partial:
        """What was found, on the compute device; waits for the CPU."""
        found = self._future.result()
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
