# SPDX-License-Identifier: Apache-2.0
"""Segments on disk, read into host memory by whoever needs them there.

The staging ring has its own way (`headinfer.spill.engine`); this is for the CPU that attends what
is stored, for saving a context, and for copies of a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from headinfer.heads.pieces import KVShape, Piece
from headinfer.layout import BLOCK_TOKENS, Span
from headinfer.store import Run
from headinfer.tiers.disk import DiskTier, op_of

READ_BYTES = 8 * 2**20
"""Read ahead of the kernel at once; two of these are held."""


def disk_of(tier: Any) -> DiskTier | None:
    """The disk that extents of `tier` may lie on."""
    return tier if isinstance(tier, DiskTier) else getattr(tier, "disk", None)


def read_pieces(disk: DiskTier, run: Run, k: Tensor, v: Tensor, shape: KVShape) -> Iterator[Piece]:
    """A run of a segment's k, v [h, rows, capacity, d] on `disk`, piece by piece as it arrives; the
    next one is on its way meanwhile. Rows are in today's order."""
    per_token = k.shape[0] * shape.token_bytes(_rows(run, k))
    step = max(READ_BYTES // per_token // BLOCK_TOKENS, 1) * BLOCK_TOKENS
    spans = [
        Span(start, min(start + step, run.span.tokens)) for start in range(0, run.span.tokens, step)
    ]
    coming = _begin(disk, run, k, v, spans[0])
    for place in range(len(spans)):
        job, piece = coming
        if place + 1 < len(spans):
            coming = _begin(disk, run, k, v, spans[place + 1])
        try:
            disk.over(job, block=True)
            yield piece
        except BaseException:  # what is on its way fills memory that is about to go
            if place + 1 < len(spans):
                disk.queue.over(coming[0], block=True, forget=True)
            raise


def later(disk: DiskTier, run: Run, k: Tensor, v: Tensor) -> Piece:
    """A run as a piece without memory, whose `read` brings part of it."""
    rows = _rows(run, k)

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        job, piece = _begin(disk, run, k, v, Span(start, stop))
        disk.over(job, block=True)
        return piece.k, piece.v

    def shaped(x: Tensor) -> Tensor:
        size = (rows, x.shape[0], run.span.tokens, x.shape[3])
        return torch.empty(size, dtype=x.dtype, device="meta")

    return Piece(run.span.start, shaped(k), shaped(v), read)


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


def _rows(run: Run, k: Tensor) -> int:
    return k.shape[1] if run.row_map is None else len(run.row_map)


def _begin(disk: DiskTier, run: Run, k: Tensor, v: Tensor, span: Span) -> tuple[int, Piece]:
    """A read of the tokens `span` of a run is under way."""
    rows = range(k.shape[1]) if run.row_map is None else run.row_map
    there = slice(run.offset + span.start, run.offset + span.stop)
    ops, found = [], []
    for stored in (k, v):
        size = (stored.shape[0], len(rows), span.tokens, stored.shape[3])
        memory = torch.empty(size, dtype=stored.dtype, device="cpu")
        for head in range(stored.shape[0]):
            for row, written in enumerate(rows):
                if memory.numel():
                    ops.append(op_of(disk, memory[head, row], stored[head, written, there]))
        found.append(memory.transpose(0, 1))
    return disk.read(ops), Piece(run.span.start + span.start, found[0], found[1])
