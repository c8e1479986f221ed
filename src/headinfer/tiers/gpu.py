# SPDX-License-Identifier: Apache-2.0
"""The tier of the compute device itself: one exact-size tensor per extent.

On a CUDA device this is GPU memory for resident heads; on a CPU-only machine the compute device
is the CPU and these are ordinary tensors.
"""

from __future__ import annotations

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
        self._next = 0
        self._closed = False

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
        self._arenas[self._next] = torch.empty(size, dtype=torch.uint8, device=self.device)
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
        self.used_bytes = 0
        self._closed = True
