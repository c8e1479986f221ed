# SPDX-License-Identifier: Apache-2.0
"""How keys and values are stored: the seam and the formats that fill it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from headinfer.errors import InputError
from headinfer.formats.exact import ExactFormat
from headinfer.geometry import FormatSpec


class KVFormat(Protocol):
    """Encodes a run of keys or values for a tier and decodes it in a staging slot.

    Called by the runner on the thread that runs the model. `encode` and `decode` enqueue work on
    the current stream and do not wait for it. A format whose `spec.exact` is true gives the same
    bits back for every input, NaN payloads included.
    """

    spec: FormatSpec

    def stored_bytes(self, elements: int, itemsize: int) -> int:
        """Bytes that `elements` elements of `itemsize` bytes take when stored."""
        ...

    def encode(self, kv: Tensor, out: Tensor) -> None:
        """Write `kv` [..., t, d] into `out` of the same shape, as it is to be stored."""
        ...

    def decode(self, stored: Tensor) -> Tensor:
        """The keys or values [..., t, d] that `stored` holds; may be a view of it."""
        ...


FORMATS: dict[str, KVFormat] = {"exact": ExactFormat()}


def format_named(name: str) -> KVFormat:
    """The format users call `name`.

    Raises:
        InputError: there is none; names those there are.
    """
    if name not in FORMATS:
        raise InputError(f"kv_format={name!r} is not known; known: {', '.join(sorted(FORMATS))}")
    return FORMATS[name]
