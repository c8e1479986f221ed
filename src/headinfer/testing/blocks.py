# SPDX-License-Identifier: Apache-2.0
"""Blocks of every kind of bit pattern, and overflow entries in a list."""

from __future__ import annotations

import torch
from torch import Tensor

from headinfer.errors import LosslessCorrupt
from headinfer.formats.lossless import BlockLayout, Fetch

KINDS = ("normal", "any bits", "equal", "zeros", "special", "wide", "few far", "edge", "tall")


def bits_of(kind: str, count: int, dim: int, seed: int) -> Tensor:
    """[count, 128, dim] bfloat16 of one kind."""
    random = torch.Generator().manual_seed(seed)
    shape = (count, 128, dim)

    def below(limit: int, *size: int) -> Tensor:
        return torch.randint(limit, size or shape, generator=random)

    def mixed(exponent: Tensor) -> Tensor:
        return below(256) % 128 | exponent << 7 | below(2) << 15

    if kind == "normal":
        return (torch.randn(shape, generator=random) * 3).to(torch.bfloat16)
    if kind == "any bits":
        bits = below(2**16)
    elif kind == "equal":
        bits = below(2**16, 1, 1, 1).expand(shape)
    elif kind == "zeros":
        bits = below(2) << 15
    elif kind == "special":  # NaN payloads, infinities, subnormals, both zeros
        choice = torch.tensor([0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x807F, 0x0000, 0x8000])
        bits = choice[below(8)]
    elif kind == "wide":  # exactly the range of the nibbles in every channel
        bits = mixed(below(15) + below(241, count, 1, dim))
    elif kind == "few far":  # near the number of escapes that fit
        exponent = below(8) + 120
        far = torch.rand(shape, generator=random) < 0.7 * 3 / 16 / 128
        bits = mixed(torch.where(far, below(100), exponent))
    elif kind == "edge":  # the number of escapes that fit, one fewer and one more
        exponent = torch.full(shape, 130).flatten(1)
        for block in range(count):
            some = BlockLayout(dim).most_escapes + block % 3 - 1
            far = torch.randperm(127 * dim, generator=random)[:some] + dim
            exponent[block, far] = below(116, some)
        bits = mixed(exponent.view(shape))
    else:  # one infinity at the top of every channel
        bits = mixed(below(8) + 120)
        bits[:, 5] = 0x7F80
    return bits.to(torch.int16).contiguous().view(torch.bfloat16)


def fetch_from(entries: Tensor) -> Fetch:
    """Reads overflow entries from [m, entry_bytes]."""

    def fetch(indices: Tensor) -> Tensor:
        if bool((indices >= entries.shape[0]).any()):
            raise LosslessCorrupt("no such overflow entry")
        return entries[indices]

    return fetch
