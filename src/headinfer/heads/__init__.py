# SPDX-License-Identifier: Apache-2.0
"""A range of KV heads of one layer and the memory its keys and values lie in.

`DirectHeads` lie where the compute device reads them in place (resident on the GPU, or host
memory when the CPU computes). `OffloadedHeads` lie in a tier that must be staged; their newest
tokens wait in a tail on the compute device and go down in whole blocks. Neither attends.
"""

from __future__ import annotations

from headinfer.heads.codec import Codec
from headinfer.heads.direct import DirectHeads
from headinfer.heads.memory import (
    Adopt,
    Guard,
    KVShape,
    Mapped,
    Piece,
    SavedLayer,
    of_group,
)
from headinfer.heads.offloaded import OffloadedHeads, WriteBuffers
from headinfer.heads.packed import PackedHeads
from headinfer.heads.packed_in_place import PackedInPlace
from headinfer.heads.packed_pieces import PackedPiece

__all__ = [
    "Adopt",
    "Codec",
    "DirectHeads",
    "Guard",
    "KVShape",
    "Mapped",
    "OffloadedHeads",
    "PackedHeads",
    "PackedInPlace",
    "PackedPiece",
    "Piece",
    "SavedLayer",
    "WriteBuffers",
    "of_group",
]
