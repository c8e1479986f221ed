# SPDX-License-Identifier: Apache-2.0
"""Runs of keys and values, cut into whole blocks of bytes wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headinfer.layout import BLOCK_TOKENS, Span
from headinfer.snapshot.sums import block_sum

COPY_BYTES = 16 * 2**20
"""Keys and values that are not in host memory are brought there this much at a time."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Run:
    """Keys and values [row, head, token, dim] of heads of one layer from token `start` on.

    They stay unchanged until the step is over. With `read` they are elsewhere, k and v have shapes
    alone, and it brings the tokens [first, last) of the run.
    """

    layer: int
    head: int
    start: int
    k: Tensor
    v: Tensor
    read: Callable[[int, int], tuple[Tensor, Tensor]] | None = None

    @property
    def stop(self) -> int:
        return self.start + self.k.shape[2]

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of the tokens [start, stop), those that are here."""
        here = slice(max(start - self.start, 0), min(stop, self.stop) - self.start)
        if self.read is not None:
            return self.read(here.start, here.stop)
        return self.k[:, :, here], self.v[:, :, here]


def pieces_of(runs: Sequence[Run], span: Span) -> Iterator[tuple[int, int, Bytes, Bytes]]:
    """Start, first head and bytes [row, head, token, byte] of `runs` within `span`, cut at whole
    blocks; a block that several runs share is put together."""
    for head in sorted({run.head for run in runs}):
        mine = [run for run in runs if run.head == head]
        position = span.start
        while position < span.stop:
            run = next(run for run in mine if run.start <= position < run.stop)
            whole = (min(run.stop, span.stop) - position) // BLOCK_TOKENS * BLOCK_TOKENS
            if whole:
                whole = min(whole, _step_tokens(run))
                k, v = run.part(position, position + whole)
            else:
                whole = BLOCK_TOKENS
                parts = [
                    other.part(position, position + whole)
                    for other in sorted(mine, key=lambda run: run.start)
                    if other.start < position + whole and position < other.stop
                ]
                k = torch.cat([on_host(part[0]) for part in parts], dim=2)
                v = torch.cat([on_host(part[1]) for part in parts], dim=2)
            yield position, head, _bytes(k), _bytes(v)
            position += whole


def _step_tokens(run: Run) -> int:
    if run.k.device.type == "cpu":  # others, packed ones too, are brought here in pieces
        return run.stop
    per_token = (run.k[:, :, :1].numel() + run.v[:, :, :1].numel()) * run.k.element_size()
    return max(COPY_BYTES // per_token // BLOCK_TOKENS, 1) * BLOCK_TOKENS


def add_sums(sums: np.ndarray[Any, Any], k: Bytes, v: Bytes) -> None:
    """Put the sums of k, v [row, head, token, byte] into `sums` [block, head]."""
    for block in range(k.shape[2] // BLOCK_TOKENS):
        span = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
        for head in range(k.shape[1]):
            sums[block, head] = block_sum(k[:, head, span], v[:, head, span])


def on_host(tensor: Tensor) -> Tensor:
    """The same, contiguous in host memory."""
    return tensor.detach().cpu().contiguous()


def _bytes(tensor: Tensor) -> Bytes:
    found = tensor.detach().cpu()
    if not found.numel():
        return np.empty(found.shape, dtype=np.uint8)
    if found.stride(-1) != 1 or found.stride(-2) != found.shape[-1]:
        found = found.contiguous()
    array: Bytes = found.view(torch.uint8).numpy()
    return array
