# SPDX-License-Identifier: Apache-2.0
"""An independent reader of packed blocks, written from docs/lossless.md alone."""

from __future__ import annotations

import struct

import numpy as np


def read_block(slot: bytes, dim: int, entries: list[bytes]) -> np.ndarray:
    """The bits [128, dim] uint16 of one block; `entries` are the overflow entries."""
    count, header = 128 * dim, 193 * dim
    trailer = max(48, 3 * dim // 4 // 16 * 16)
    most = (trailer - 8) // 3
    assert len(slot) == header + trailer
    version, kind, escapes, checksum, index = struct.unpack_from("<BBHII", slot, header)
    assert version == 1
    assert kind in (0, 1)
    body = np.frombuffer(slot, "<u4", header // 4)
    last = np.zeros(63 * dim // 4, "<u4")
    if kind == 1:
        assert escapes == 0
        last[:] = np.frombuffer(entries[index], "<u4")
        bits = np.frombuffer(slot[:header] + entries[index], "<u2").reshape(128, dim)
    else:
        assert escapes <= most
        positions = np.frombuffer(slot, "<u2", escapes, header + 8)
        listed = np.frombuffer(slot, "u1", escapes, header + 8 + 2 * most)
        last[:escapes] = positions.astype("u4") | listed.astype("u4") << 16
        mixed = np.frombuffer(slot, "u1", count).astype("u2")
        pairs = np.frombuffer(slot, "u1", count // 2, count).reshape(128, dim // 2)
        below = np.concatenate([pairs & 15, pairs >> 4], axis=1)
        base = np.frombuffer(slot, "u1", dim, count * 3 // 2)
        exponent = (base - below).ravel().astype("u2")  # modulo 256
        exponent[positions] = listed
        bits = ((mixed & 0x80) << 8 | exponent << 7 | mixed & 0x7F).reshape(128, dim)
    head = np.array([version | kind << 8 | escapes << 16], "<u4")
    words = np.concatenate([body, last, head]).astype(np.uint64)
    factors = 2 * np.arange(words.size, dtype=np.uint64) + 1
    assert int((words * factors).sum()) % 2**32 == checksum
    return bits
