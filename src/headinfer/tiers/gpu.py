# SPDX-License-Identifier: Apache-2.0
"""The tier of the compute device itself: one exact-size tensor per extent.

On a CUDA device this is GPU memory for resident heads; on a CPU-only machine the compute device
is the CPU and these are ordinary tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from headinfer.errors import TierClosed, TierFull
from headinfer.layout import Extent, aligned
from headinfer.tiers.arena import bytes_as


class DeviceTier:
    """Extents on `device`, at most `budget_bytes` in all (None: no limit of our own)."""

    name = "gpu"

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        self.device = device
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._arenas: dict[int, Tensor] = {}
        self._taken: dict[int, list[Tensor]] = {}
        self._next = 0
        self._closed = False

    def take(self, sizes: Iterable[int]) -> None:
        """Memory for extents of these sizes is taken now, and theirs when they are allocated.

        Taken one by one amid a model's activations, each would come out of a block that those left
        behind, and what remains of the block fits no activation any more. An extent of another size
        than was said gives back what nobody asked for yet.
        """
        room = None if self.budget_bytes is None else self.budget_bytes - self.used_bytes
        for size in map(aligned, sizes):
            if room is not None:
                if size > room:
                    return
                room -= size
            self._taken.setdefault(size, []).append(self._memory(size))

    def allocate(self, nbytes: int) -> Extent:
        if self._closed:
            raise TierClosed(f"the {self.name} tier is closed")
        size = aligned(nbytes)
        if self.budget_bytes is not None and self.used_bytes + size > self.budget_bytes:
            raise TierFull(
                f"resident keys and values need {size} B more on {self.device}, "
                f"{self.used_bytes} B of {self.budget_bytes} B are used; keep fewer heads resident",
                tier=self.name,
                budget_bytes=self.budget_bytes,
                used_bytes=self.used_bytes,
                asked_bytes=size,
            )
        self._next += 1
        if self._taken.get(size):
            self._arenas[self._next] = self._taken[size].pop()
        else:
            self._taken.clear()
            self._arenas[self._next] = self._memory(size)
        self.used_bytes += size
        return Extent(self._next, 0, size)

    def prepare(self, nbytes: int) -> None:
        """Allocating takes no time here."""

    def view(
        self, extent: Extent, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        return bytes_as(self._arenas[extent.arena], extent.offset + offset, shape, dtype)

    def free(self, extent: Extent) -> None:
        del self._arenas[extent.arena]
        self.used_bytes -= extent.nbytes

    def close(self) -> None:
        self._arenas.clear()
        self._taken.clear()
        self.used_bytes = 0
        self._closed = True

    def _memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
