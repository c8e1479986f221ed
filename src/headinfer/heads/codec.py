# SPDX-License-Identifier: Apache-2.0
"""Encodes and decodes packed blocks for one compute device, with whatever runs there: Triton's
kernels on CUDA, the native library on a CPU, torch where there is none.

Owns what blocks share: overflow entries, the buffer that tiles are unpacked into, and the cell in
which kernels say that a block is damaged. Nothing here waits for the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from headinfer.attention import native, packed
from headinfer.attention.packed import PackedRun
from headinfer.blocks import WRITES_AHEAD
from headinfer.errors import LosslessCorrupt, TierError
from headinfer.formats import lossless
from headinfer.formats.overflow import Overflow
from headinfer.layout import BLOCK_TOKENS, Extent
from headinfer.spill import DiskEngine
from headinfer.tiers import HostTier
from headinfer.transfer import Copy, InlineEngine, Ticket, TransferEngine


class Codec:
    """The lossless format on `device`, its overflow in host memory.

    Attributes:
        unpacked: [scratch_bytes] where tiles lie as compute reads them, one at a time.
    """

    def __init__(
        self,
        engine: TransferEngine,
        device: torch.device,
        host: Callable[[], HostTier],
        *,
        scratch_bytes: int = 0,
        poison: bool = False,
    ) -> None:
        self.device = device
        self._engine = engine
        inner = engine.inner if isinstance(engine, DiskEngine) else engine
        # An encoding is over when it returns.
        self._at_once = isinstance(inner, InlineEngine)
        self._host = host
        self._poison = poison
        self._overflow: dict[int, Overflow] = {}
        self._lock = threading.Lock()
        with torch.inference_mode(False):
            self.unpacked = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
            self._damaged = torch.zeros(
                3, dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu"
            )

    @property
    def overflows(self) -> dict[int, Overflow]:
        """By dim of the blocks."""
        return self._overflow

    def overflow(self, dim: int) -> Overflow:
        found = self._overflow.get(dim)
        if found is None:
            ahead = 1 if self._at_once else WRITES_AHEAD
            found = self._overflow[dim] = Overflow(
                dim, self._allocate, self.device, wait=self._done, ahead=ahead
            )
        return found

    def reserve(self, blocks: dict[int, int]) -> None:
        """Entries for that many more blocks, by dim, are free whatever their bytes.

        Raises:
            TierFull: the host budget does not allow them.
        """
        with self._lock:
            for dim, count in blocks.items():
                self.overflow(dim).reserve(count)

    def taken(self, *dims: int) -> list[tuple[Overflow, Tensor]]:
        """How many entries blocks of `dims` have taken so far, for `Overflow.give_back`."""
        found = [self.overflow(dim) for dim in dict.fromkeys(dims)]
        return [(one, one.counter.clone()) for one in found]

    def counted(self, *dims: int) -> list[Copy]:
        """The copies, after an encoding, that tell the host how many entries it took."""
        found = [self.overflow(dim) for dim in dict.fromkeys(dims)]
        return [Copy(one.landed, one.counter) for one in found]

    def encoded(self, ticket: Ticket, blocks: dict[int, int]) -> None:
        """Encodings of that many blocks, by dim, and `counted` after them, are over with `ticket`."""
        with self._lock:
            for dim, count in blocks.items():
                self.overflow(dim).encoded(ticket, count)

    def encode(self, values: Tensor, slots: Tensor) -> None:
        """slots [h, b, blocks, slot_bytes], contiguous, become values [h, b, blocks x 128, d], of which
        the last axis is dense; both on the device, entries reserved."""
        overflow = self.overflow(values.shape[-1])
        if self.device.type == "cuda":
            from headinfer.formats.lossless_kernels import encode_blocks

            encode_blocks(values, slots.view(-1, overflow.layout.slot_bytes), overflow)
        else:
            _encode_on_host(values, PackedRun(slots, overflow))

    def decode(self, slots: Tensor, out: Tensor, layer: int) -> None:
        """out [h, b, blocks x 128, d] becomes what slots [h, b, blocks, slot_bytes] hold, which are
        contiguous on the device; heads and rows of `out` are equally far apart, and contiguous
        each. A damaged block on a GPU is reported by `check`.

        Raises:
            LosslessCorrupt: a damaged block on a CPU.
        """
        overflow = self.overflow(out.shape[-1])
        if self.device.type == "cuda":
            from headinfer.formats.lossless_kernels import decode_blocks

            dim, size = overflow.layout.dim, overflow.layout.slot_bytes
            blocks = out.shape[2] // BLOCK_TOKENS
            shape = out.shape[0] * out.shape[1], blocks, BLOCK_TOKENS, dim
            runs = out.as_strided(shape, (out.stride(1), BLOCK_TOKENS * dim, dim, 1))
            decode_blocks(
                slots.view(-1, size),
                runs,
                overflow,
                self._damaged,
                layer,
            )
        else:
            decode_on_host(PackedRun(slots, overflow), out)

    def scratch(self, nbytes: int) -> Tensor:
        """`nbytes` bytes that nobody reads any more, on the compute stream."""
        found = self.unpacked[:nbytes] if nbytes <= self.unpacked.numel() else None
        if found is None:
            found = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if self._poison:
            found.fill_(0xFF)
        return found

    def holds(self, buffer: Tensor) -> bool:
        """Whether `scratch` gave that memory and will give it again."""
        return bool(self.unpacked.numel()) and buffer.data_ptr() == self.unpacked.data_ptr()

    def pack_on_host(self, values: Tensor, run: PackedRun) -> None:
        """values [h, b, blocks x 128, d] in host memory are in `run`'s slots, there too; from any
        thread, while nothing else is encoded.

        Raises:
            TierFull: the host budget does not allow their overflow.
        """
        with self._lock:
            run.overflow.reserve(run.slots.shape[:3].numel())
            _encode_on_host(values, run)
            run.overflow.landed.copy_(run.overflow.counter)

    def check(self) -> None:
        """Raises LosslessCorrupt if a kernel met a damaged block since the last time."""
        found, layer, block = self._damaged.tolist()
        if found:
            self._damaged.zero_()
            raise LosslessCorrupt(
                f"a packed block of layer {layer} is damaged (block {block} of a tile): the memory of "
                "this machine changed what was written. Read the context again, with kv_format="
                "'exact' if it happens again",
                block=block,
            )

    def hold(self, nbytes: int) -> tuple[Tensor, Extent]:
        """`nbytes` zeros in host memory that the device reaches, part of the host budget until they
        are given to `release`.

        Raises:
            TierFull: the host budget does not allow them.
            TierError: the system gives none.
        """
        # Not an extent of the tier's own: a GPU reaches registered memory under its host address
        # only on some systems, memory that CUDA allocated on all of them.
        pin = self.device.type == "cuda"
        try:
            with torch.inference_mode(False):
                found = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pin, device="cpu")
        except RuntimeError as error:
            raise TierError(
                f"the system gave no {nbytes} B of {'page-locked ' if pin else ''}host memory for blocks "
                f"that do not compress ({error}). Use kv_format='exact'"
            ) from error
        return found, self._host().adopt(found, nbytes, kept=True)

    def release(self, extent: Extent) -> None:
        """What `hold` gave is not needed any more."""
        self._host().free(extent)

    def _allocate(self, nbytes: int) -> Tensor:
        return self.hold(nbytes)[0]

    def _done(self, ticket: object, block: bool) -> bool:
        # What goes on to disk has been counted by then.
        if isinstance(self._engine, DiskEngine):
            return self._engine.copied(ticket, block=block)
        return self._engine.done(ticket, block=block)


def decode_on_host(run: PackedRun, out: Tensor, *, verify: bool = False) -> None:
    """out [h, rows, blocks x 128, d] becomes what `run` holds, both in host memory.

    Raises:
        LosslessCorrupt: a block is damaged, or, with `verify`, not the one that was written.
    """
    if native.why_absent() is None:
        packed.decode(run, out, verify=verify)
        return
    slots = run.slots if run.row_map is None else run.slots[:, list(run.row_map)]
    flat = slots.reshape(-1, slots.shape[-1])
    found = lossless.decode(flat, run.dim, run.overflow.fetch, verify=verify)
    out.copy_(found.view(out.shape))


def _encode_on_host(values: Tensor, run: PackedRun) -> None:
    if native.why_absent() is None:
        packed.encode(values, run)
        return
    made = lossless.encode(values.reshape(-1, BLOCK_TOKENS, run.dim))
    lossless.point_to(made, run.overflow.store(made.entries))
    run.slots.copy_(made.slots.view(run.slots.shape))
