# SPDX-License-Identifier: Apache-2.0
"""Packed blocks as others see them: a piece of the context that is attended, and keys and values that
a saved context, which holds plain bytes, is made of or fills.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.attention.packed import PackedRun
from headinfer.blocks import BlockLayout
from headinfer.heads.codec import Codec, decode_on_host
from headinfer.heads.on_disk import brought
from headinfer.heads.pieces import Piece
from headinfer.layout import BLOCK_TOKENS, aligned
from headinfer.tiers.arena import bytes_as
from headinfer.tiers.disk import DiskTier


@dataclass(frozen=True, slots=True)
class PackedPiece:
    """Keys and values of the tokens from `start` on in host memory, packed, and plain ones after
    them: what `Piece` is for plain ones.

    Attributes:
        tokens: packed ones, of which the last block may have more.
        packed_k, packed_v: their blocks.
        tail: k, v [b, h, t, d] of what follows, or None.
        scratch: gives memory that keys and values are decoded into one after the other, or None.
    """

    start: int
    tokens: int
    packed_k: PackedRun
    packed_v: PackedRun
    tail: tuple[Tensor, Tensor] | None = None
    scratch: Callable[[int], Tensor] | None = None

    @property
    def stop(self) -> int:
        return self.start + self.tokens + (0 if self.tail is None else self.tail[0].shape[2])

    @property
    def heads(self) -> int:
        return self.packed_k.slots.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that attending it reads, overflow aside."""
        rows = len(self.packed_k.rows)
        packed = sum(run.slots[:, 0].numel() * rows for run in (self.packed_k, self.packed_v))
        return packed + (0 if self.tail is None else sum(x.nbytes for x in self.tail))

    @property
    def k(self) -> Tensor:
        """Keys [b, h, t, d], decoded."""
        return self._plain(0, 0, self.stop - self.start, slice(None))

    @property
    def v(self) -> Tensor:
        """Values [b, h, t, d], decoded."""
        return self._plain(1, 0, self.stop - self.start, slice(None))

    def plain(self, first: int, last: int, heads: slice = slice(None)) -> Piece:
        """The tokens [first, last) of the piece, decoded."""
        k_memory = v_memory = None
        if self.scratch is not None:
            k_bytes, v_bytes = (self._decoded_bytes(run) for run in (self.packed_k, self.packed_v))
            memory = self.scratch(aligned(k_bytes) + v_bytes)
            k_memory, v_memory = memory[:k_bytes], memory[aligned(k_bytes) :]
        k = self._plain(0, first, last, heads, k_memory)
        v = self._plain(1, first, last, heads, v_memory)
        return Piece(self.start + first, k, v)

    def _decoded_bytes(self, run: PackedRun) -> int:
        return run.slots[:, 0, :, 0].numel() * len(run.rows) * 2 * BLOCK_TOKENS * run.dim

    def _plain(
        self, which: int, first: int, last: int, heads: slice, memory: Tensor | None = None
    ) -> Tensor:
        run = (self.packed_k, self.packed_v)[which]
        parts: list[Tensor] = []
        if first < self.tokens:
            block, stop = first // BLOCK_TOKENS, -(-min(last, self.tokens) // BLOCK_TOKENS)
            part = run._replace(slots=run.slots[heads, :, block:stop])
            count, rows = part.slots.shape[0], len(run.rows)
            size = (count, rows, (stop - block) * BLOCK_TOKENS, run.dim)
            out = (
                torch.empty(size, dtype=torch.bfloat16, device="cpu")
                if memory is None
                else bytes_as(memory, 0, size, torch.bfloat16)
            )
            decode_on_host(part, out)
            here = slice(
                first - block * BLOCK_TOKENS, min(last, self.tokens) - block * BLOCK_TOKENS
            )
            parts.append(out[:, :, here].transpose(0, 1))
        if self.tail is not None and last > self.tokens:
            rest = slice(max(first - self.tokens, 0), last - self.tokens)
            parts.append(self.tail[which][:, heads, rest])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class Stored:
    """Keys or values [b, h, t, d] of whole packed blocks, read and decoded when they are asked for:
    what a saved context reads in the place of a tensor. Checksums are compared."""

    device = torch.device("meta")  # not to be read as they lie

    def __init__(self, run: PackedRun, tokens: int, disk: DiskTier | None) -> None:
        self._run, self._disk = run, disk
        self.shape = (len(run.rows), run.slots.shape[0], tokens, run.dim)

    def __getitem__(self, place: tuple[slice, slice, slice]) -> Stored:
        start, stop, _ = place[2].indices(self.shape[2])
        blocks = slice(start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS))
        part = self._run._replace(slots=self._run.slots[:, :, blocks])
        return Stored(part, stop - start, self._disk)

    def numel(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3]

    def element_size(self) -> int:
        return torch.bfloat16.itemsize

    def detach(self) -> Tensor:
        """The tensor.

        Raises:
            LosslessCorrupt: a block is not what was written.
            DiskError: it could not be read.
        """
        rows, heads, tokens, dim = self.shape
        run = self._run
        if self._disk is not None:
            run = run._replace(slots=brought(self._disk, run.slots, run.rows), row_map=None)
        blocks = run.slots.shape[2]
        out = torch.empty(
            (heads, rows, blocks * BLOCK_TOKENS, dim), dtype=torch.bfloat16, device="cpu"
        )
        decode_on_host(run, out, verify=True)
        return out[:, :, :tokens].transpose(0, 1)


class Blocks(NamedTuple):
    """Blocks that are to be filled.

    Attributes:
        run: their slots, in memory or on disk.
        labels: [h, rows, blocks, LABEL_BYTES], kept in memory of those on disk; else None.
        disk: where the slots lie; None if in memory.
    """

    run: PackedRun
    labels: Tensor | None
    disk: DiskTier | None

    def part(self, heads: slice, blocks: slice) -> Blocks:
        labels = None if self.labels is None else self.labels[heads, :, blocks]
        return self._replace(
            run=self.run._replace(slots=self.run.slots[heads, :, blocks]), labels=labels
        )


class Filling:
    """Keys or values [h, b, t, d], [b, t, d] of one head, or tokens of these, to be written into
    packed blocks by whoever reads a saved context."""

    device = torch.device("meta")
    dtype = torch.bfloat16

    def __init__(self, blocks: Blocks, codec: Codec, heads: bool = True) -> None:
        self._blocks, self._codec, self._heads = blocks, codec, heads
        slots = blocks.run.slots
        heads_rows = slots.shape[:2] if heads else slots.shape[1:2]
        self.shape = (*heads_rows, slots.shape[2] * BLOCK_TOKENS, blocks.run.dim)

    def __getitem__(self, place: int | tuple[slice, slice]) -> Filling:
        if isinstance(place, int):
            part = self._blocks.part(slice(place, place + 1), slice(None))
        else:
            start, stop, _ = place[1].indices(self.shape[1])
            blocks = slice(start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS))
            part = self._blocks.part(slice(None), blocks)
        return Filling(part, self._codec, heads=False)

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def element_size(self) -> int:
        return torch.bfloat16.itemsize

    def copy_(self, values: Tensor) -> None:
        """values [b, t, d] of one head are stored."""
        run, labels, disk = self._blocks
        if disk is None:
            self._codec.pack_on_host(values[None], run)
            return
        made = torch.empty(run.slots.shape, dtype=torch.uint8, device="cpu")
        self._codec.pack_on_host(values[None], run._replace(slots=made))
        for row in range(made.shape[1] if made.numel() else 0):
            disk.store(run.slots[0, row], made[0, row])
        if labels is not None:
            labels.copy_(made[..., BlockLayout(run.dim).label])
