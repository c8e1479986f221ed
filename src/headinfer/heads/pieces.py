# SPDX-License-Identifier: Apache-2.0
"""A layer's shape, and pieces of the context as compute reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.layout import HeadGroup


class KVShape(NamedTuple):
    """What is the same for every token of a layer."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def token_bytes(self, batch: int) -> int:
        """Bytes of one token of one head, keys and values, all batch rows."""
        return batch * (self.key_dim + self.value_dim) * self.dtype.itemsize


class Piece(NamedTuple):
    """Keys and values [b, h, t, d] of the tokens from `start` on, readable by compute.

    What lies on disk has shapes only, and `read` brings the tokens [first, last) of it.
    """

    start: int
    k: Tensor
    v: Tensor
    read: Callable[[int, int], tuple[Tensor, Tensor]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that attending it reads."""
        return self.k.nbytes + self.v.nbytes


def clip(piece: Piece, length: int) -> Piece:
    keep = length - piece.start
    if keep >= piece.k.shape[2]:
        return piece
    return Piece(piece.start, piece.k[:, :, :keep], piece.v[:, :, :keep])


def of_group(piece: Piece, heads: HeadGroup, group: HeadGroup) -> Piece:
    """What `piece`, of `heads`, has of `group`."""
    if group == heads:
        return piece
    mine = slice(group.start - heads.start, group.stop - heads.start)
    return Piece(piece.start, piece.k[:, mine], piece.v[:, mine])
