# SPDX-License-Identifier: Apache-2.0
"""Host memory first, then disk: an extent lies where there is room, and stays there."""

from __future__ import annotations

import torch
from torch import Tensor

from headinfer.errors import TierFull
from headinfer.layout import Extent
from headinfer.tiers import HostTier
from headinfer.tiers.disk import ARENA, DiskTier


class SpillTier:
    """A host tier and, once that is full, a disk; owns neither, closes neither.

    Attributes:
        disk: the tier below.
        used_bytes: allocated through this one now.
    """

    name = "host"

    def __init__(self, host: HostTier, disk: DiskTier) -> None:
        self._host = host
        self.disk = disk
        self.used_bytes = 0

    def allocate(self, nbytes: int, *, below: int | None = None) -> Extent:
        """As the protocol has it; on disk it takes `below` bytes, if these are others."""
        extent = self._allocate(nbytes, nbytes if below is None else below)
        self.used_bytes += extent.nbytes
        return extent

    def _allocate(self, nbytes: int, below: int) -> Extent:
        try:
            return self._host.allocate(nbytes)
        except TierFull as full:
            try:
                return self.disk.allocate(below)
            except TierFull as both:
                raise TierFull(
                    f"{both}. Host memory is full too: {full}",
                    tier=both.tier,
                    budget_bytes=both.budget_bytes,
                    used_bytes=both.used_bytes,
                    asked_bytes=both.asked_bytes,
                ) from both

    def prepare(self, nbytes: int) -> None:
        self._host.prepare(nbytes)

    def view(
        self, extent: Extent, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        tier = self.disk if extent.arena == ARENA else self._host
        return tier.view(extent, offset, shape, dtype)

    def free(self, extent: Extent) -> None:
        self.used_bytes -= extent.nbytes
        (self.disk if extent.arena == ARENA else self._host).free(extent)

    def close(self) -> None:
        """Both tiers are closed by who made them."""
