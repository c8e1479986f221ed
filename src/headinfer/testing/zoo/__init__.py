# SPDX-License-Identifier: Apache-2.0
"""The model zoo: tiny random-weight models of every family the streaming path must serve, or must refuse.

`ZOO` maps a name to an entry, in the order of the printed matrix; `REFUSED` maps a name to a model that
must be refused with a clear error. Nothing here imports torch or transformers before a model is built.
"""

from __future__ import annotations

from headinfer.testing.zoo.dense import DENSE, MIXTURES
from headinfer.testing.zoo.hybrid import HYBRID
from headinfer.testing.zoo.latent import LATENT
from headinfer.testing.zoo.other import ENCODER_DECODERS, MULTIMODAL
from headinfer.testing.zoo.record import Column, Entry, Flaw, Kind, ModelAbsent, Refused
from headinfer.testing.zoo.refused import REFUSALS
from headinfer.testing.zoo.windowed import WINDOWED

ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (*DENSE, *WINDOWED, *MIXTURES, *LATENT, *HYBRID, *ENCODER_DECODERS, *MULTIMODAL)
}
REFUSED: dict[str, Refused] = {refused.name: refused for refused in REFUSALS}

__all__ = ["REFUSED", "ZOO", "Column", "Entry", "Flaw", "Kind", "ModelAbsent", "Refused"]
