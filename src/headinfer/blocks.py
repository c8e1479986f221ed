# SPDX-License-Identifier: Apache-2.0
"""The lossless format's blocks, counted in bytes: what fits a slot, and what cannot be packed.

docs/lossless.md has the bytes; `formats.lossless` writes them. Pure arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

from headinfer.layout import BLOCK_TOKENS

HEADER_BYTES = 8
LEAST_TRAILER_BYTES = 48
LABEL_BYTES = HEADER_BYTES + 4
"""The header, and of a raw block the number of its overflow entry."""

STEP_DIM = 16
"""Dims are multiples of it, so that every part of a slot is aligned to 16 bytes."""

MAX_DIM = 512
"""The place of a value within a block is stored in 16 bits."""

CHUNK_BYTES = 2**20
"""Overflow entries are allocated this much at a time."""

WRITES_AHEAD = 8
"""Encodings under way that overflow entries are set aside for before the host waits."""


class BlockLayout(NamedTuple):
    """Where the parts of a slot lie: 128 tokens x `dim` channels of one head's keys or values."""

    dim: int

    @property
    def nibbles(self) -> int:
        """Sign and mantissa bytes come before, one per value."""
        return BLOCK_TOKENS * self.dim

    @property
    def bases(self) -> int:
        """Nibbles come before, two values a byte."""
        return BLOCK_TOKENS * self.dim * 3 // 2

    @property
    def header(self) -> int:
        """One base exponent per channel comes before. Of a raw block everything before is the
        first part of its values."""
        return self.bases + self.dim

    @property
    def positions(self) -> int:
        return self.header + HEADER_BYTES

    @property
    def label(self) -> slice:
        """What a block is, and where the rest of it lies if it is raw."""
        return slice(self.header, self.header + LABEL_BYTES)

    @property
    def exponents(self) -> int:
        return self.positions + 2 * self.most_escapes

    @property
    def most_escapes(self) -> int:
        """Escapes that fit a slot; a block with more is stored raw."""
        return (self._trailer - HEADER_BYTES) // 3

    @property
    def slot_bytes(self) -> int:
        return self.header + self._trailer

    @property
    def entry_bytes(self) -> int:
        """What a raw block has beyond its slot."""
        return 2 * BLOCK_TOKENS * self.dim - self.header

    @property
    def _trailer(self) -> int:
        return max(LEAST_TRAILER_BYTES, self.dim * 3 // 4 // 16 * 16)


def why_not_packed(dtype: str, *dims: int) -> str | None:
    """Why keys and values of `dims` channels cannot be packed; None if they can."""
    if dtype != "bfloat16":
        return f"keys and values are {dtype}, and only bfloat16 has exponent bits to spare"
    for dim in dims:
        if dim % STEP_DIM or not STEP_DIM <= dim <= MAX_DIM:
            return f"a head dim of {dim} is not a multiple of {STEP_DIM} up to {MAX_DIM}"
    return None
