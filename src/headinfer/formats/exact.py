# SPDX-License-Identifier: Apache-2.0
"""The format that stores the model's own bytes: nothing is encoded, nothing is lost."""

from __future__ import annotations

from torch import Tensor

from headinfer.geometry import EXACT, FormatSpec


class ExactFormat:
    """Bytes as the model made them."""

    spec: FormatSpec = EXACT

    def stored_bytes(self, elements: int, itemsize: int) -> int:
        return elements * itemsize

    def encode(self, kv: Tensor, out: Tensor) -> None:
        out.copy_(kv)

    def decode(self, stored: Tensor) -> Tensor:
        return stored
