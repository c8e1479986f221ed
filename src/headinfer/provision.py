# SPDX-License-Identifier: Apache-2.0
"""Where the layers of a runner lie: its tiers, made when they are first needed, and the ranges of
heads that are made in them. Which heads stay where is the plan's decision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from headinfer.attention import native
from headinfer.formats import format_named
from headinfer.formats.lossless import why_not
from headinfer.geometry import EXACT
from headinfer.heads import (
    Codec,
    DirectHeads,
    KVShape,
    OffloadedHeads,
    PackedHeads,
    PackedInPlace,
)
from headinfer.heads.memory import SegmentMemory
from headinfer.layer import DiskSettings, Layer, RunnerSettings, Stats
from headinfer.layout import HeadGroup
from headinfer.link import Link
from headinfer.spill import SpillTier
from headinfer.tiers import DeviceTier, DiskTier, HostTier, Tier
from headinfer.tiers.disk import QueueFactory


class HostMemory(NamedTuple):
    """What making host memory (mapping, touching, page-locking) took.

    Attributes:
        made_bytes: made so far.
        made_s: the seconds of that, most of them on a thread of its own.
        waited_s: what the model waited for them.
    """

    made_bytes: int = 0
    made_s: float = 0.0
    waited_s: float = 0.0


class Provision:
    """Tiers and ranges of heads for one runner.

    Attributes:
        disk: the disk tier, if one was needed.
        pin: host memory is page-locked, for a CUDA device.
    """

    def __init__(self, settings: RunnerSettings, disk_queue: QueueFactory) -> None:
        self.settings = settings
        self.disk_queue = disk_queue
        self.disk: DiskTier | None = None
        self.pin = False
        self._host: HostTier | None = None
        self._device_tiers: dict[torch.device, DeviceTier] = {}

    def layer(self, index: int, shape: KVShape, link: Link) -> Layer:
        """An empty layer on the link's device, its heads where the plan wants them."""
        settings, count = self.settings, shape.num_kv_heads
        resident = count
        if settings.staging:
            planned = settings.resident_heads
            resident = min(planned[index] if index < len(planned) else 0, count)
        ranges: list[DirectHeads | OffloadedHeads | PackedInPlace] = []
        codec = _codec(shape, link)
        group, expected = HeadGroup(0, resident), settings.expected_tokens
        if resident and codec is not None and (settings.host_computes or not settings.staging):
            host = self.host()
            ranges.append(PackedInPlace(host, shape, group, codec=codec, expected_tokens=expected))
        elif resident:
            tier = self._resident_tier_of(link.device)
            ranges.append(DirectHeads(tier, shape, group, expected_tokens=expected))
        layer = Layer(index, shape, link.device, ranges)
        if resident < count:
            ranges.append(self.offloaded(layer, HeadGroup(resident, count), link))
        return layer

    def take_at_once(self, shape: KVShape, batch: int, device: torch.device) -> None:
        """Resident heads of all layers have their memory, if all are like this one; else their
        memory is taken layer by layer."""
        settings = self.settings
        tokens, planned = settings.expected_tokens, settings.resident_heads
        if not (settings.at_once and settings.staging and tokens and any(planned)):
            return
        tier = self._resident_tier_of(device)
        if isinstance(tier, DeviceTier):
            groups = [HeadGroup(0, min(heads, shape.num_kv_heads)) for heads in planned if heads]
            memories = [SegmentMemory(tier, shape, group) for group in groups]
            tier.take(memory.extent_bytes(batch, tokens) for memory in memories)

    def offloaded(self, layer: Layer, heads: HeadGroup, link: Link) -> OffloadedHeads:
        """Heads of `layer` that do not stay where compute reads."""
        codec = _codec(layer.shape, link)
        if codec is not None:
            return PackedHeads(
                self._offloaded_tier(),
                layer.shape,
                heads,
                engine=link.engine,
                device=layer.device,
                codec=codec,
                expected_tokens=self.settings.expected_tokens,
                layer=layer.index,
            )
        return OffloadedHeads(
            self._offloaded_tier(),
            layer.shape,
            heads,
            engine=link.engine,
            device=layer.device,
            fmt=format_named(EXACT.name),
            expected_tokens=self.settings.expected_tokens,
            layer=layer.index,
        )

    def tier_of(
        self, heads: DirectHeads | OffloadedHeads | PackedInPlace, device: torch.device
    ) -> Tier:
        """Where such heads lie."""
        if isinstance(heads, OffloadedHeads):
            return self._offloaded_tier()
        return self._resident_tier_of(device)

    @property
    def resident_tier(self) -> str:
        """Name of the tier whose heads are demoted when it is full; empty if there is none below."""
        if not self.settings.staging:
            return ""
        return HostTier.name if self.settings.host_computes else DeviceTier.name

    def host(self) -> HostTier:
        """Host memory."""
        if self._host is None:
            self._host = HostTier(
                budget_bytes=self.settings.host_bytes,
                pin=self.pin,
                wanted_bytes=self.settings.wanted_bytes,
                kept_bytes=self.settings.kept_bytes,
                beside_bytes=self.settings.beside_bytes,
                touch=native.touch if native.why_absent() is None else None,
            )
        return self._host

    def disk_for(self, wanted: DiskSettings) -> DiskTier:
        """The disk tier."""
        if self.disk is None:
            self.disk = DiskTier(
                wanted.folder,
                budget_bytes=wanted.budget_bytes,
                planned_bytes=wanted.planned_bytes,
                queue=self.disk_queue,
            )
        return self.disk

    def prompt_is_over(self) -> None:
        """No chunk like the last one comes any more: what was made ready for one goes."""
        if self._host is not None:
            self._host.forget_ready()

    @property
    def host_memory(self) -> HostMemory:
        """What making host memory took so far."""
        host = self._host
        return (
            HostMemory()
            if host is None
            else HostMemory(host.made_bytes, host.made_s, host.waited_s)
        )

    @property
    def pin_failure(self) -> str | None:
        """Why host memory could not be page-locked; None when it is, or need not be."""
        return None if self._host is None else self._host.pin_failure

    def count(self, found: Stats) -> None:
        """Bytes held per tier, into `found`."""
        if self._host is not None:
            found.host_bytes = self._host.used_bytes
        if self.disk is not None:
            found.disk_bytes = self.disk.used_bytes
            found.disk_read_bytes = self.disk.read_bytes
            found.disk_written_bytes = self.disk.written_bytes
        found.resident_bytes = sum(tier.used_bytes for tier in self._device_tiers.values())

    def close(self) -> None:
        """Free every tier; those needed later are made anew."""
        if self._host is not None:
            self._host.close()
        if self.disk is not None:
            self.disk.close()
        for tier in self._device_tiers.values():
            tier.close()
        self._host = self.disk = None
        self._device_tiers.clear()

    def _resident_tier_of(self, device: torch.device) -> HostTier | DeviceTier:
        """Where compute reads in place: host memory itself if the CPU computes."""
        if not self.settings.staging or self.settings.host_computes:
            return self.host()
        if device not in self._device_tiers:
            self._device_tiers[device] = DeviceTier(device, self.settings.resident_bytes)
        return self._device_tiers[device]

    def _offloaded_tier(self) -> Tier:
        wanted = self.settings.disk
        if wanted is None:
            return self.host()
        if self.settings.host_computes:
            return self.disk_for(wanted)
        return SpillTier(self.host(), self.disk_for(wanted))


def _codec(shape: KVShape, link: Link) -> Codec | None:
    """What packs a layer's blocks; None where they stay plain."""
    return link.codec if why_not(shape.dtype, shape.key_dim, shape.value_dim) is None else None
