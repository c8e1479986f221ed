# SPDX-License-Identifier: Apache-2.0
"""Checksums of a context: a CRC-32 per block and KV head, a SHA-256 over everything small.

CRC-32 is in Python, in every other language and in hardware, and is several times as fast as a
disk; blocks need protection against accidents, not against forgers. The file of the sums is itself
under the SHA-256 in the manifest, so two files that changed places are noticed too.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np

SUM_BYTES = 4
SUMS = np.dtype("<u4")


def block_sum(k: Any, v: Any) -> int:
    """The sum of one block of one head: k, v uint8 [row, token, bytes], rows in order, keys first."""
    value = 0
    for rows in (k, v):
        for row in rows:
            value = zlib.crc32(row, value)
    return value


def sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


class Running:
    """The SHA-256 of a stream that grows."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.nbytes = 0

    def add(self, data: bytes) -> None:
        self._hash.update(data)
        self.nbytes += len(data)

    @property
    def hex(self) -> str:
        return self._hash.copy().hexdigest()
