# SPDX-License-Identifier: Apache-2.0
"""Where raw blocks of the lossless format keep what does not fit their slots.

Entries of one size in chunks of host memory that grow with need, handed out through a ring of free
numbers that an encoder takes from by itself, on a GPU too: nobody waits to learn how many blocks were
raw. So before blocks are encoded, entries for all of them are set aside; those not used come back
when the count has landed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from headinfer.blocks import CHUNK_BYTES, WRITES_AHEAD, BlockLayout
from headinfer.errors import LosslessCorrupt, TierFull

Allocate = Callable[[int], Tensor]
"""`nbytes` bytes of host memory that the compute device reaches, or TierFull."""


class Overflow:
    """The overflow entries of blocks of one dim.

    Attributes:
        chunk_entries: entries in a chunk.
        counter: [1] int64 on the compute device: numbers taken from the ring so far.
        landed: [1] int64 in host memory, what `counter` was at some time; copied by whoever encodes.
        ring: [n] int32 in host memory; the number taken as the i-th is at i modulo n.
        table: [chunks] int64 addresses in host memory.
    """

    def __init__(
        self,
        dim: int,
        allocate: Allocate,
        device: torch.device,
        *,
        wait: Callable[[object, bool], bool],
        ahead: int = WRITES_AHEAD,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.layout = BlockLayout(dim)
        self.chunk_entries = max(1, chunk_bytes // self.layout.entry_bytes)
        with torch.inference_mode(False):
            self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.chunks: list[Tensor] = []
        self._pin = device.type == "cuda"
        self.landed = self._small(1, torch.int64)
        self.ring = self._small(64, torch.int32)
        self.table = self._small(16, torch.int64)
        self._old: list[Tensor] = []  # encoders under way may still read them
        self._allocate = allocate
        self._wait = wait
        self._ahead = ahead
        self._issued = 0
        self._pending: deque[tuple[object, int]] = deque()

    @property
    def entries(self) -> int:
        """Entries there are, free ones too."""
        return len(self.chunks) * self.chunk_entries

    @property
    def used(self) -> int:
        """Entries known to be in use."""
        return self.entries - (self._issued - int(self.landed))

    @property
    def touched(self) -> bool:
        """Whether there may be a raw block."""
        return bool(self._pending) or int(self.landed) > 0

    def reserve(self, blocks: int) -> None:
        """Entries for `blocks` more blocks are free whatever their bytes; `encoded` tells when they
        have been encoded.

        Raises:
            TierFull: the host budget does not allow them; nothing has changed.
        """
        self._poll(block=False)
        full: TierFull | None = None
        while self._free < blocks:
            ahead = self.entries < self._ahead * blocks
            if full is None and (ahead or not self._pending):
                try:
                    self._grow()
                except TierFull as error:
                    full = error
            elif self._pending:
                self._poll(block=True)
            elif full is not None:
                raise self._full(blocks, full)

    def encoded(self, ticket: object, blocks: int) -> None:
        """The encoding of `blocks` reserved blocks, and after it the copy of `counter` to
        `landed`, are done when `ticket` is."""
        self._pending.append((ticket, blocks))

    def give(self, indices: Tensor) -> None:
        """The entries `indices` are free again; nothing that reads them is under way.

        A damaged block may name one that is not there, which an encoder must not be handed: it would
        write outside. The block's own entry stays in use.
        """
        entries = self.entries
        for number in indices.flatten().tolist():
            if not 0 <= number < entries:
                continue
            self.ring[self._issued % self.ring.numel()] = number
            self._issued += 1

    def give_back(self, since: Tensor) -> None:
        """The entries taken since `counter` was `since` are free again: what was encoded with them is
        not kept, and nothing is under way."""
        first, last = int(since), int(self.counter)
        self.landed.copy_(self.counter)
        taken = [int(self.ring[place % self.ring.numel()]) for place in range(first, last)]
        self.give(torch.tensor(taken, dtype=torch.int32, device="cpu"))

    def fetch(self, indices: Tensor) -> Tensor:
        """The entries at `indices` [m], copied to where `indices` are.

        Raises:
            LosslessCorrupt: there is none of that number.
        """
        found = torch.empty(
            (indices.numel(), self.layout.entry_bytes), dtype=torch.uint8, device="cpu"
        )
        for row, index in enumerate(indices.tolist()):
            found[row] = self._entry(index)
        return found.to(indices.device)

    def store(self, entries: Tensor) -> Tensor:
        """The numbers [m] under which `entries` [m, entry_bytes] are kept from now on; they were
        reserved."""
        first = int(self.counter)
        indices = torch.empty(entries.shape[0], dtype=torch.int64, device="cpu")
        for row in range(entries.shape[0]):
            index = int(self.ring[(first + row) % self.ring.numel()])
            indices[row] = index
            self._entry(index).copy_(entries[row])
        self.counter += entries.shape[0]
        return indices

    def free_numbers(self, count: int) -> Tensor:
        """The next `count` numbers of the ring, for an encoder that runs on this thread."""
        place = (int(self.counter) + torch.arange(count, device="cpu")) % self.ring.numel()
        return self.ring[place]

    @property
    def _free(self) -> int:
        return self._issued - int(self.landed) - sum(blocks for _, blocks in self._pending)

    def _poll(self, *, block: bool) -> None:
        while self._pending and self._wait(self._pending[0][0], block):
            self._pending.popleft()
            block = False

    def _grow(self) -> None:
        chunk = self._allocate(self.chunk_entries * self.layout.entry_bytes)
        first, count = self.entries, self.chunk_entries
        # Twice as long as there are numbers: one is not overwritten while it is being taken.
        while self.ring.numel() < 2 * (first + count):
            longer = self._small(2 * self.ring.numel(), torch.int32)
            for place in range(int(self.landed), self._issued):
                longer[place % longer.numel()] = self.ring[place % self.ring.numel()]
            self._old.append(self.ring)
            self.ring = longer
        if self.table.numel() <= len(self.chunks):
            longer = self._small(2 * self.table.numel(), torch.int64)
            longer[: self.table.numel()] = self.table
            self._old.append(self.table)
            self.table = longer
        self.table[len(self.chunks)] = chunk.data_ptr()
        self.chunks.append(chunk)
        self.give(torch.arange(first, first + count, device="cpu"))

    def _entry(self, index: int) -> Tensor:
        if not 0 <= index < self.entries:
            raise LosslessCorrupt(
                f"a raw block names overflow entry {index} and there are {self.entries}: memory "
                "was damaged"
            )
        size = self.layout.entry_bytes
        chunk, place = divmod(index, self.chunk_entries)
        return self.chunks[chunk][place * size : (place + 1) * size]

    def _small(self, count: int, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros(count, dtype=dtype, pin_memory=self._pin, device="cpu")

    def _full(self, blocks: int, full: TierFull) -> TierFull:
        return TierFull(
            f"keys and values compress badly: {self.used:,} blocks that had to be stored raw have "
            f"filled their overflow, and {blocks:,} more blocks may be raw. {full}; or give "
            "kv_format='exact'",
            tier=full.tier,
            budget_bytes=full.budget_bytes,
            used_bytes=full.used_bytes,
            asked_bytes=full.asked_bytes,
        )
