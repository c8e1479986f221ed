# SPDX-License-Identifier: Apache-2.0
"""Where bytes can lie: the seam and the tiers that fill it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from headinfer.layout import Extent
from headinfer.tiers.disk import DiskTier
from headinfer.tiers.gpu import DeviceTier
from headinfer.tiers.host import HostTier


class Tier(Protocol):
    """Holds extents of bytes within a budget; knows nothing about heads, layers or formats.

    Called on the thread that runs the model. `allocate` and `free` do bookkeeping and may map
    memory; nothing is copied. The caller keeps copies and kernels off an extent it frees.
    """

    name: str
    used_bytes: int

    def allocate(self, nbytes: int) -> Extent:
        """An extent of exactly `nbytes` (rounded up to the alignment).

        Raises:
            TierFull: the budget does not allow it; carries the numbers.
            TierClosed: the tier was closed.
        """
        ...

    def prepare(self, nbytes: int) -> None:
        """An extent of `nbytes` will be asked for: what takes time may begin meanwhile."""
        ...

    def view(
        self, extent: Extent, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """The bytes from `offset` on as a contiguous tensor; shares memory with the extent."""
        ...

    def free(self, extent: Extent) -> None:
        """Give the extent back."""
        ...

    def close(self) -> None:
        """Give everything back; idempotent."""
        ...


__all__ = ["DeviceTier", "DiskTier", "HostTier", "Tier"]
