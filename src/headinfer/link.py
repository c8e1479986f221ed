# SPDX-License-Identifier: Apache-2.0
"""The way between host memory and one compute device: engine, staging ring, write buffers, the
schedule of tiles, and the CPU that attends what stays behind. Made once per device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from headinfer.attention.api import AUTO
from headinfer.balance import Pass
from headinfer.errors import HeadInferError
from headinfer.geometry import LOSSLESS
from headinfer.heads import Codec, WriteBuffers
from headinfer.layer import RunnerSettings
from headinfer.layout import Tile, aligned
from headinfer.near import NearData
from headinfer.schedule import Schedule
from headinfer.spill import DiskEngine
from headinfer.tiers import HostTier
from headinfer.transfer import CudaEngine, InlineEngine, Loader, StagingRing, TransferEngine


class Link:
    """What one compute device needs to keep heads elsewhere.

    Attributes:
        engine: moves bytes.
        ring: tiles on their way here.
        buffers: blocks on their way down.
        schedule: which tiles will be wanted.
        near: attends on the CPU; None where every head streams.
        codec: encodes and decodes packed blocks; None where all are plain.
    """

    ring: StagingRing
    buffers: WriteBuffers
    schedule: Schedule

    def __init__(
        self,
        device: torch.device,
        settings: RunnerSettings,
        engine: TransferEngine,
        load: Loader,
        tiles_of: Callable[[int], Iterator[Tile]],
        host: Callable[[], HostTier],
    ) -> None:
        self.device = device
        self.engine = engine
        self.near: NearData | None = None
        self.codec = _codec(engine, device, settings, host)
        self._layer = -1
        self._loaded_before = 0
        self.staging_bytes = 0
        if not settings.staging:
            if device.type != "cpu":
                raise HeadInferError(
                    f"staging=False attends host memory in place, which {device} cannot; leave "
                    "staging out, or set it to True"
                )
            return
        size = (settings.ring_slot_bytes or settings.slot_bytes) + aligned(1)
        # What direct I/O reads into and writes from begins on a page.
        pages = engine.buffer if isinstance(engine, DiskEngine) and engine.straight else None
        slots = [
            torch.empty(size, dtype=torch.uint8, device=device) if pages is None else pages(size)
            for _ in range(settings.num_slots)
        ]
        self.ring = StagingRing(engine, slots, load, poison=settings.poison)
        self.buffers = WriteBuffers(engine, device, settings.write_bytes, pages)
        self.schedule = Schedule(tiles_of)
        held = settings.ring_slot_bytes or settings.slot_bytes
        self.staging_bytes = settings.num_slots * held + 2 * settings.write_bytes
        if self.codec is not None:
            self.staging_bytes += settings.slot_bytes
        if settings.near_share or settings.near_adapts:
            # An implementation insisted on is the GPU's, unless it runs everywhere.
            attention = settings.attention if settings.attention == "reference" else AUTO
            self.near = NearData(engine, device, attention)

    def begin(self, layer: int, *, near: bool) -> Pass | None:
        """Attention of `layer` begins; what the forward pass before it took, if this is the first
        layer of another, and it was one in which the CPU took part and has done so."""
        if self.codec is not None:
            self.codec.check()
        first, self._layer = layer <= self._layer or not near, layer if near else -1
        if self.near is None or not first:
            return None
        lap = self.near.lap()
        if lap is None:
            if not near:
                self._loaded_before = self.ring.loaded_bytes
            return None
        loaded = self.ring.loaded_bytes - self._loaded_before
        self._loaded_before = self.ring.loaded_bytes
        return Pass(*lap, loaded_bytes=loaded, link_rate=self.engine.in_rate)

    def settle(self) -> None:
        """What is stored is about to change other than by appending."""
        if self.near is not None:
            self.near.settle()
        if self.staging_bytes:
            self.ring.flush()
            self.schedule.stop()

    def drain(self) -> None:
        """Return when nothing is under way any more."""
        if self.near is not None:
            self.near.settle()
        self.engine.drain()

    def close(self) -> None:
        """Return when nothing is under way any more; the CPU's thread ends."""
        if self.near is not None:
            self.near.close()
        self.engine.drain()


def _codec(
    engine: TransferEngine,
    device: torch.device,
    settings: RunnerSettings,
    host: Callable[[], HostTier],
) -> Codec | None:
    if settings.kv_format != LOSSLESS.name:
        return None
    scratch = settings.slot_bytes + aligned(1) if settings.staging else 0
    return Codec(engine, device, host, scratch_bytes=scratch, poison=settings.poison)


def default_engine(device: torch.device) -> TransferEngine:
    return CudaEngine(device) if device.type == "cuda" else InlineEngine()
