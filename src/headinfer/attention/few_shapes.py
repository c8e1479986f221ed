# SPDX-License-Identifier: Apache-2.0
"""Calls cut so that few shapes arise, for a kernel that is built anew for each.

cuDNN builds a plan for every shape and stride that it has not seen, and waits for the device before
it does: 50 ms each on an H200 with torch 2.11, on which nothing else runs. Over a long prompt every
chunk sees more keys than the one before. In spans of a power of two chunks, one KV head at a time,
a prompt of a thousand chunks needs ten shapes.
"""

from __future__ import annotations

from torch import Tensor

BLOCK_ROWS = 128
"""Query rows that a multiprocessor works on at a time."""

LEAST_BUSY = 0.9
"""Of the multiprocessors, how many must be at work in a call over one head, on average over its waves.
H200, 132 of them: with 16,384 rows eight calls take 6.4 ms and one over all heads 6.5; with half
the rows 6.1 and 3.4."""

FIXED_STRIDE = 2**30
"""Elements from one head, or batch row, to the next where there is but one: part of a plan all the
same, which counts in 32 bits."""

WHOLE_TOKENS = 1024
"""Chunks are multiples of this, the last one of a prompt hardly ever."""


def fills_alone(rows: int, multiprocessors: int) -> bool:
    """Whether a call over one KV head with `rows` query rows, those of its group together, takes no
    longer than its part of a call over several heads."""
    blocks = -(-rows // BLOCK_ROWS)
    waves = -(-blocks // multiprocessors)
    return blocks >= LEAST_BUSY * waves * multiprocessors


def key_spans(k: Tensor, rows: int) -> list[tuple[int, int]]:
    """Where the keys k [b, h, s, d] of a call with `rows` queries are cut: spans of `rows` times a
    power of two, the longest first, then what is left.

    Everything at once where that would save no shape: heads that lie as far apart as these keys
    are long; a number of keys that comes again, as a full tile's does; the last chunk of a
    prompt, whose rows make every shape a new one.
    """
    keys = k.shape[2]
    units, rest = divmod(keys, rows)
    comes_again = keys & (keys - 1) == 0
    last_chunk = rest and rows % WHOLE_TOKENS
    if not units or comes_again or last_chunk or not _of_fixed_stride(k):
        return [(0, keys)]
    spans, start = [], 0
    for power in range(units.bit_length() - 1, -1, -1):
        if units >> power & 1:
            spans.append((start, start + (rows << power)))
            start = spans[-1][1]
    return [*spans, (start, keys)] if rest else spans


def of_one_stride(x: Tensor) -> Tensor:
    """x [b, h, s, d] with strides that do not depend on s where b and h are 1."""
    if x.shape[0] != 1 or x.shape[1] != 1:
        return x
    return x.as_strided(x.shape, (FIXED_STRIDE, FIXED_STRIDE, x.stride(2), x.stride(3)))


def _of_fixed_stride(k: Tensor) -> bool:
    """Whether heads and batch rows are where they are whatever the number of keys: there is one of
    them, or these are a part of larger memory."""
    length = k.shape[2] * k.stride(2)
    return all(k.shape[dim] == 1 or k.stride(dim) > length for dim in (0, 1))
