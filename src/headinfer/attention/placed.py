# SPDX-License-Identifier: Apache-2.0
"""Decode attention over keys whose place and number the device knows, and not the call.

A decode step that is recorded as a CUDA graph runs again with the arguments it was recorded with,
while the context grows and the next one lies elsewhere. These kernels read both from memory, so
layers whose heads are all resident can be part of the graph. Steps that are not recorded use the
same kernels, and so give the same bits.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from headinfer.attention.compiling import compiled
from headinfer.attention.triton import (
    SPLIT_KEYS,
    WAVES,
    TritonAttention,
    machine_of,
    power_of_two,
    strides_in,
    tiles_for,
)
from headinfer.attention.types import AttentionSpec

MOST_ROWS = 16
"""New tokens of a step at most: beyond, it is a prompt."""


class Place(NamedTuple):
    """Where keys [b, h, s, d] and values [b, h, s, e] lie, tokens and dims dense.

    Attributes:
        unit: bytes of `alignment` elements.
        keys, values: addresses.
        key_row, key_head, value_row, value_head: strides, in units.
    """

    unit: int
    keys: int
    values: int
    key_row: int
    key_head: int
    value_row: int
    value_head: int


class Kind(NamedTuple):
    """What kernels are compiled for, beside tile sizes that follow from it.

    Attributes:
        rows: new tokens.
        softcap: whether there is one.
    """

    dtype: torch.dtype
    key_dim: int
    value_dim: int
    q_per_kv: int
    rows: int
    softcap: bool


class PlaceTable:
    """Places of layers and the number of tokens they hold, where kernels read them.

    Attributes:
        length: [1] tokens before those of the step.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # such tensors could not be written to outside that mode
            self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows: dict[int, Tensor] = {}
        self._places: dict[int, Place] = {}

    def row(self, index: int, place: Place) -> Tensor:
        """[6] the place of layer `index`, for what is enqueued from now on; always the same memory. Where
        keys and values are is said as seen from there, in units; the strides follow."""
        held = self._rows.get(index)
        if held is None:
            with torch.inference_mode(False):
                held = torch.zeros(6, dtype=torch.int64, device=self.length.device)
            self._rows[index] = held
        if self._places.get(index) != place:
            away = [at - held.data_ptr() for at in (place.keys, place.values)]
            if any(distance % place.unit for distance in away):
                raise ValueError(f"{place} is not a whole number of units from {held.data_ptr()}")
            seen = (distance // place.unit for distance in away)
            held.copy_(torch.tensor([*seen, *place[3:]], dtype=torch.int64, device="cpu"))
            self._places[index] = place
        return held


def alignment(key_dim: int, value_dim: int, itemsize: int) -> int:
    """Elements that divide every stride of dense keys and values: of one load of 16 bytes, or 1."""
    wide = 16 // itemsize
    return 1 if key_dim % wide or value_dim % wide else wide


def place_of(k: Tensor, v: Tensor) -> Place:
    """The place of k [h, b, s, d] and v [h, b, s, e], as segments lie in memory."""
    unit = alignment(k.shape[-1], v.shape[-1], k.element_size())
    strides = (x.stride(axis) // unit for x in (k, v) for axis in (1, 0))
    return Place(unit * k.element_size(), k.data_ptr(), v.data_ptr(), *strides)


def ready(kind: Kind, device: torch.device) -> bool:
    """Whether the kernels for such calls are compiled; begins to do so the first time. Never waits."""
    spec = AttentionSpec(
        device=device.type,
        dtype=kind.dtype,
        key_dim=kind.key_dim,
        value_dim=kind.value_dim,
        q_per_kv=kind.q_per_kv,
        query_tokens=kind.rows,
        causal=False,
        biased=False,
        softcap=kind.softcap,
    )
    # In float32 a row of one token would not keep to twice the error of eager attention.
    if kind.rows > MOST_ROWS or kind.dtype == torch.float32 or TritonAttention().unsupported(spec):
        return False
    return compiled(("placed", device, kind), device, partial(run_once, kind, device))


def run_once(kind: Kind, device: torch.device) -> None:
    """Kernels of `kind` run on a few tokens, which compiles them."""
    with torch.inference_mode(False), torch.no_grad():
        dims = (1, 1, MOST_ROWS, kind.key_dim), (1, 1, MOST_ROWS, kind.value_dim)
        k, v = (torch.zeros(shape, dtype=kind.dtype, device=device) for shape in dims)
        q = k.new_zeros((1, kind.q_per_kv, kind.rows, kind.key_dim))
        out = k.new_empty((1, kind.rows, kind.q_per_kv, kind.value_dim))
        table = PlaceTable(device)
        row = table.row(0, place_of(k, v))
        store(k[:, :, : kind.rows], v[:, :, : kind.rows], row, table.length)
        softcap = 1.0 if kind.softcap else None
        attend(q, row, table.length, out, kv_heads=1, scale=1.0, softcap=softcap)


def store(k: Tensor, v: Tensor, place: Tensor, length: Tensor) -> None:
    """New k [b, h, t, d], v [b, h, t, e] come after the `length` [1] tokens at `place` [6], where there
    has to be room for them."""
    from headinfer.attention.triton_kernels import store_placed_kernel

    batch, heads, tokens, dim = k.shape
    width = v.shape[-1]
    with torch.cuda.device_of(k):
        store_placed_kernel[(batch * heads * tokens,)](
            k,
            v,
            place,
            length,
            *k.stride(),
            *v.stride(),
            heads,
            tokens,
            D=dim,
            E=width,
            BLOCK_D=power_of_two(dim),
            BLOCK_E=power_of_two(width),
            ALIGN=alignment(dim, width, k.element_size()),
            num_warps=1,
        )


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
    """Attention of q [b, h * q_per_kv, t, d] over the `length` [1] tokens at `place` [6] and the t new ones
    after them, of which row i sees the first i + 1, into out [b, t, h * q_per_kv, e].

    How the keys are split depends on their number alone; see `attention/triton.py`.
    """
    from headinfer.attention.merge_kernels import merge_stacked
    from headinfer.attention.triton_kernels import attend_placed_kernel

    q = q.contiguous()
    batch, heads, rows, dim = q.shape
    width, per_kv = out.shape[-1], heads // kv_heads
    machine = machine_of(q.device)
    tiles = tiles_for(q.dtype, max(dim, width), per_kv * rows, machine.shared_bytes)
    programs = batch * kv_heads * -(-(per_kv * rows) // tiles.rows)
    splits = max(1, WAVES * machine.processors // programs)
    sums = q.new_empty((splits, batch, rows, heads, width), dtype=torch.float32)
    tops, totals = q.new_empty((2, splits, batch, heads, rows), dtype=torch.float32)
    align = alignment(dim, width, q.element_size())
    with torch.cuda.device_of(q):
        attend_placed_kernel[(programs // (batch * kv_heads), batch * kv_heads, splits)](
            q,
            place,
            length,
            sums,
            tops,
            float(scale),
            0.0 if softcap is None else float(softcap),
            *strides_in(q, align),
            kv_heads,
            per_kv,
            rows,
            D=dim,
            E=width,
            BLOCK_D=max(16, power_of_two(dim)),
            BLOCK_E=max(16, power_of_two(width)),
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.keys,
            SEVERAL=rows > 1,
            SOFTCAP=softcap is not None,
            ALIGN=align,
            LEAST=SPLIT_KEYS,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    merge_stacked(sums.transpose(2, 3), tops, out=out.transpose(1, 2), lse=None, totals=totals)
