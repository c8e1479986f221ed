# SPDX-License-Identifier: Apache-2.0
"""Segments on disk, read into host memory by whoever needs them there.

The staging ring has its own way (`headinfer.spill.engine`); this is for the CPU that attends what
is stored, for saving a context, and for copies of a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headinfer.heads.pieces import KVShape, Piece
from headinfer.layout import BLOCK_TOKENS, Span
from headinfer.store import Run
from headinfer.tiers.disk import DiskTier, op_of
from headinfer.tiers.disk_queue import Op

READ_BYTES = 8 * 2**20
"""Read ahead of the kernel at once; two of these are held."""


def disk_of(tier: Any) -> DiskTier | None:
    """The disk that extents of `tier` may lie on."""
    return tier if isinstance(tier, DiskTier) else getattr(tier, "disk", None)


def read_pieces(disk: DiskTier, run: Run, k: Tensor, v: Tensor, shape: KVShape) -> Iterator[Piece]:
    """A run of a segment's k, v [h, rows, capacity, d] on `disk`, piece by piece as it arrives; the
    next one is on its way meanwhile. Rows are in today's order."""
    step = read_blocks(k.shape[0] * shape.token_bytes(len(rows_of(run, k)))) * BLOCK_TOKENS
    for span, some_k, some_v in read_ahead(disk, run, k, v, step):
        yield Piece(run.span.start + span.start, some_k.transpose(0, 1), some_v.transpose(0, 1))


def read_blocks(token_bytes: int) -> int:
    """Blocks of tokens of `token_bytes`, as compute reads them, that are read at once."""
    return max(READ_BYTES // token_bytes // BLOCK_TOKENS, 1)


def read_ahead(
    disk: DiskTier, run: Run, k: Tensor, v: Tensor, step: int
) -> Iterator[tuple[Span, Tensor, Tensor]]:
    """A run of k, v [h, rows, n, width] on `disk`, `step` of the n at a time: which of the run, and
    both in host memory, rows in today's order; the next are on their way meanwhile."""
    tokens = run.span.tokens
    spans = [Span(start, min(start + step, tokens)) for start in range(0, tokens, step)]
    coming = _begin(disk, run, k, v, spans[0])
    for place, span in enumerate(spans):
        job, some_k, some_v = coming
        if place + 1 < len(spans):
            coming = _begin(disk, run, k, v, spans[place + 1])
        try:
            disk.over(job, block=True)
            yield span, some_k, some_v
        except BaseException:  # what is on its way fills memory that is about to go
            if place + 1 < len(spans):
                disk.queue.over(coming[0], block=True, forget=True)
            raise


def later(disk: DiskTier, run: Run, k: Tensor, v: Tensor) -> Piece:
    """A run as a piece without memory, whose `read` brings part of it."""
    rows = len(rows_of(run, k))

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        job, some_k, some_v = _begin(disk, run, k, v, Span(start, stop))
        disk.over(job, block=True)
        return some_k.transpose(0, 1), some_v.transpose(0, 1)

    def shaped(x: Tensor) -> Tensor:
        size = (rows, x.shape[0], run.span.tokens, x.shape[3])
        return torch.empty(size, dtype=x.dtype, device="meta")

    return Piece(run.span.start, shaped(k), shaped(v), read)


def brought(disk: DiskTier, stored: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of `rows` of stored [h, rows, n, width] in host memory; waits."""
    memory, ops = _copied(disk, stored, rows)
    disk.over(disk.read(ops), block=True)
    return memory


def copy_segment(
    dst: Tensor, src: Tensor, *, to_disk: DiskTier | None, from_disk: DiskTier | None
) -> None:
    """Contiguous `dst` holds what `src` does; one or both lie on the disk given for it."""
    to, come = dst.reshape(-1), src.reshape(-1)
    step = READ_BYTES // dst.element_size()
    host = torch.empty(min(step, to.numel()), dtype=dst.dtype, device="cpu")
    for start in range(0, to.numel(), step):
        part = slice(start, start + step)
        here = host[: to[part].numel()]
        if from_disk is not None:
            from_disk.fill(here, come[part])
        else:
            here.copy_(come[part])
        if to_disk is not None:
            to_disk.store(to[part], here)
        else:
            to[part].copy_(here)


def rows_of(run: Run, stored: Tensor) -> Sequence[int]:
    """For each batch row of today, the one of stored [h, rows, n, width]."""
    return range(stored.shape[1]) if run.row_map is None else run.row_map


def _begin(
    disk: DiskTier, run: Run, k: Tensor, v: Tensor, span: Span
) -> tuple[int, Tensor, Tensor]:
    """A read of the part `span` of a run is under way, into memory."""
    there = slice(run.offset + span.start, run.offset + span.stop)
    rows = rows_of(run, k)
    some_k, k_ops = _copied(disk, k[:, :, there], rows)
    some_v, v_ops = _copied(disk, v[:, :, there], rows)
    return disk.read([*k_ops, *v_ops]), some_k, some_v


def _copied(disk: DiskTier, stored: Tensor, rows: Sequence[int]) -> tuple[Tensor, list[Op]]:
    """Memory for `rows` of stored [h, rows, n, width], and what fills it."""
    size = (stored.shape[0], len(rows), *stored.shape[2:])
    memory = torch.empty(size, dtype=stored.dtype, device="cpu")
    ops = [
        op_of(disk, memory[head, row], stored[head, written])
        for head in range(stored.shape[0] if memory.numel() else 0)
        for row, written in enumerate(rows)
    ]
    return memory, ops
