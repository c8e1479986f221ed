# SPDX-License-Identifier: Apache-2.0
"""The kernels of `headinfer.attention.placed` for tensors of a CPU, in torch: what a recorded step does
with layers that are all resident, where there is no GPU to record it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from headinfer.attention import placed
from headinfer.attention.placed import alignment
from headinfer.attention.reference import ReferenceAttention
from headinfer.attention.types import Window


def play_on_cpu(monkeypatch: Any) -> None:
    """Until the test ends, every kernel of `placed` counts as compiled and is played by these."""
    monkeypatch.setattr(placed, "ready", lambda kind, device: kind.rows <= placed.MOST_ROWS)
    monkeypatch.setattr(placed, "store", store)
    monkeypatch.setattr(placed, "attend", attend)


def store(k: Tensor, v: Tensor, place: Tensor, length: Tensor) -> None:
    first, new = int(length), k.shape[2]
    for there, given in zip(_views(k, v.shape[-1], place, first + new), (k, v), strict=True):
        there[:, :, first:] = given


def attend(
    q: Tensor,
    place: Tensor,
    length: Tensor,
    out: Tensor,
    *,
    kv_heads: int,
    scale: float,
    softcap: float | None = None,
) -> None:
    past, rows = int(length), q.shape[2]
    like = q[:, :kv_heads]
    k, v = _views(like, out.shape[-1], place, past + rows)
    seen = Window(past, past + rows)
    found = ReferenceAttention()(q, k, v, scale=scale, softcap=softcap, window=seen)
    out.copy_(found.out.transpose(1, 2))


def _views(like: Tensor, width: int, place: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys [b, h, tokens, d] and values [b, h, tokens, width] in the memory that `place` names."""
    batch, heads, _, dim = like.shape
    to_keys, to_values, *strides = (int(x) for x in place)
    unit = alignment(dim, width, like.element_size())
    keys, values = (
        place.data_ptr() + there * unit * like.element_size() for there in (to_keys, to_values)
    )
    return (
        _at(keys, (batch, heads, tokens, dim), strides[:2], unit, like.dtype),
        _at(values, (batch, heads, tokens, width), strides[2:], unit, like.dtype),
    )


def _at(
    address: int, shape: tuple[int, ...], strides: list[int], unit: int, dtype: torch.dtype
) -> Tensor:
    batch, heads, tokens, width = shape
    row, head = (stride * unit for stride in strides)
    count = (batch - 1) * row + (heads - 1) * head + tokens * width
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    with torch.inference_mode(False):
        flat = torch.frombuffer(memory, dtype=dtype)
    return flat.as_strided(shape, (row, head, width, 1))
