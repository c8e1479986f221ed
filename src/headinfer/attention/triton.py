# SPDX-License-Identifier: Apache-2.0
"""Fused attention on CUDA for what torch's kernels do not take: softcap, float32, windows, masks,
different widths of keys and values.

Decides tile sizes and splits, from tables and never by trying: the first call of a shape is as
slow as a compilation, no call is slower than that. triton itself is imported at the first call.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headinfer.attention.types import AttentionSpec, Partial, Window

MAX_DIM = 256
TYPES = (torch.float32, torch.float16, torch.bfloat16)

SPLIT_KEYS = 256
"""A split of the keys is at least this long: less does not pay for the merge of one more part."""

WAVES = 2
"""Programs wanted per multiprocessor before keys are no longer split: two fit at a time."""


class Tiles(NamedTuple):
    """Query rows and keys of a tile, warps, and stages of loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


class Machine(NamedTuple):
    """What of a GPU decides tiles and splits."""

    shared_bytes: int  # per program
    processors: int


class TritonAttention:
    """The kernel of `attention/triton_kernels.py`."""

    name = "triton"

    def unsupported(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if spec.device != "cuda":
            reasons.append(f"tensors are on {spec.device}; runs on cuda")
        elif not available():
            reasons.append("triton is not installed")
        elif not torch.cuda.is_available():
            reasons.append("torch sees no CUDA device")
        elif torch.cuda.get_device_capability() < (8, 0):
            reasons.append("the GPU is older than compute capability 8.0")
        if spec.dtype not in TYPES:
            reasons.append(f"type {spec.dtype}; runs float32, float16, bfloat16")
        if max(spec.key_dim, spec.value_dim) > MAX_DIM:
            reasons.append(f"head dim {max(spec.key_dim, spec.value_dim)}; runs up to {MAX_DIM}")
        if spec.gradient:
            reasons.append("a gradient is asked for")
        return reasons

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool = False,
        bias: Tensor | None = None,
        softcap: float | None = None,
        window: Window | None = None,
    ) -> Partial:
        machine = machine_of(q.device)
        packed = q.shape[1] // k.shape[1] * q.shape[2]
        tiles = tiles_for(
            q.dtype,
            max(q.shape[-1], v.shape[-1]),
            packed,
            machine.shared_bytes,
            bias_bytes=0 if bias is None else bias.element_size(),
        )
        if causal:
            window = Window(0, k.shape[2])
        splits, split_keys = _splits(q, k, tiles, machine.processors, window)
        if splits == 1:
            return _launch(q, k, v, scale, bias, softcap, window, tiles, 1, split_keys)
        parts = _launch(q, k, v, scale, bias, softcap, window, tiles, splits, split_keys)
        tops, totals = parts.lse
        from headinfer.attention.merge_kernels import merge_stacked

        batch, heads, rows, _ = q.shape
        out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
        merge_stacked(parts.out, tops, out=out, lse=lse, totals=totals)
        return Partial(out, lse)


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether triton can be imported; looks without importing."""
    return find_spec("triton") is not None


@lru_cache(maxsize=16)
def machine_of(device: torch.device) -> Machine:
    """The GPU's figures; of a CPU, where only Triton's interpreter runs, those of a small GPU."""
    if device.type != "cuda":
        return Machine(227 * 2**10, 4)
    found: Any = torch.cuda.get_device_properties(device)
    return Machine(found.shared_memory_per_block_optin, found.multi_processor_count)


def tiles_for(
    dtype: torch.dtype, dim: int, packed: int, shared_bytes: int, *, bias_bytes: int = 0
) -> Tiles:
    """Tiles for `packed` query rows per KV head (query heads x tokens) of up to `dim` wide.

    Chosen from what the compiler reports for sm_90 (registers spilled, shared memory); see
    docs/attention.md. `bias_bytes`: size of a bias element, 0 without one.
    """
    width = max(16, power_of_two(dim))
    size = 4 if dtype == torch.float32 else 2
    tiles = (_FLOAT32 if size == 4 else _HALF)[width]
    least = tiles.few if packed <= 32 else tiles.some if packed <= 64 else tiles.many
    found = least._replace(rows=min(least.rows, max(16, power_of_two(packed))))
    if bias_bytes:  # its addresses take the registers of the scores twice over
        warps = 8 if found.rows > 32 or (size == 4 and found.rows > 16) else 4
        found = Tiles(min(found.rows, 64), min(found.keys, 32), warps, 2)
    while _shared(found, width, size, bias_bytes) > shared_bytes:
        if found.stages > 2:
            found = found._replace(stages=found.stages - 1)
        elif found.rows > found.keys:
            found = found._replace(rows=found.rows // 2)
        elif found.keys > 16:
            found = found._replace(keys=found.keys // 2)
        else:
            break
    return found


class _Choice(NamedTuple):
    """Tiles for up to 32 packed rows, up to 64, and more."""

    few: Tiles
    some: Tiles
    many: Tiles


# Many rows: two warpgroups of 64 rows share one read of the keys; as many keys as leave scores and
# accumulator in registers. Few rows are bound by memory: small programs, deep pipelines.
_HALF = {
    16: _Choice(Tiles(32, 128, 4, 4), Tiles(64, 128, 4, 3), Tiles(128, 128, 8, 3)),
    32: _Choice(Tiles(32, 128, 4, 4), Tiles(64, 128, 4, 3), Tiles(128, 128, 8, 3)),
    64: _Choice(Tiles(32, 128, 4, 4), Tiles(64, 64, 4, 3), Tiles(128, 128, 8, 3)),
    128: _Choice(Tiles(32, 64, 4, 4), Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 3)),
    256: _Choice(Tiles(32, 32, 4, 4), Tiles(64, 64, 8, 2), Tiles(128, 64, 8, 2)),
}
# No tensor cores at this precision: the multiplications bind, and registers bind the tiles.
_FLOAT32 = {
    16: _Choice(Tiles(16, 32, 4, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    32: _Choice(Tiles(16, 32, 4, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    64: _Choice(Tiles(16, 32, 2, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    128: _Choice(Tiles(16, 64, 4, 2), Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 2)),
    256: _Choice(Tiles(16, 16, 4, 2), Tiles(32, 16, 8, 2), Tiles(32, 16, 8, 2)),
}


def _shared(tiles: Tiles, width: int, size: int, bias_bytes: int) -> int:
    """An upper bound of what a program keeps in shared memory: queries, weights, what is staged."""
    queries = tiles.rows * width * size
    keys = 2 * tiles.stages * tiles.keys * width * size
    scores = tiles.rows * tiles.keys
    return queries + keys + scores * (size + tiles.stages * bias_bytes)


def _splits(
    q: Tensor, k: Tensor, tiles: Tiles, processors: int, window: Window | None
) -> tuple[int, int]:
    """How many splits of the keys fill the GPU, and keys per split, a multiple of a tile's."""
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    programs = batch * kv_heads * -(-(heads // kv_heads * rows) // tiles.rows)
    seen = keys if window is None else min(keys, window.size + rows)
    splits = max(1, min(WAVES * processors // programs, seen // SPLIT_KEYS))
    split_keys = -(-keys // splits)
    split_keys += -split_keys % tiles.keys
    return -(-keys // split_keys), split_keys


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    softcap: float | None,
    window: Window | None,
    tiles: Tiles,
    splits: int,
    split_keys: int,
) -> Partial:
    """Attention over all keys, in q's type; or of every split the sums, [splits, b, h, t, e] in
    float32, with largest scores and what to divide by, [2, splits, b, h, t]."""
    from headinfer.attention.triton_kernels import attend_kernel

    batch, heads, rows, dim = q.shape
    kv_heads, keys, width = k.shape[1], k.shape[2], v.shape[-1]
    shape = (splits, batch, rows, heads, width)
    out = q.new_empty(shape, dtype=torch.float32 if splits > 1 else q.dtype)
    lse = q.new_empty((2 if splits > 1 else 1, splits, batch, heads, rows), dtype=torch.float32)
    kind, bias, bias_strides = _bias(bias)
    k, v = _near(k), _near(v)
    align = _alignment(q, k, v)
    with torch.cuda.device_of(q):
        attend_kernel[(-(-(heads // kv_heads * rows) // tiles.rows), batch * kv_heads, splits)](
            q,
            k,
            v,
            bias,
            out,
            lse,
            float(scale),
            0.0 if softcap is None else float(softcap),
            *strides_in(q, align),
            *strides_in(k, align),
            *strides_in(v, align),
            *bias_strides,
            kv_heads,
            heads // kv_heads,
            rows,
            keys,
            split_keys,
            0 if window is None else window.offset,
            0 if window is None else min(window.size, keys + rows + abs(window.offset)),
            D=dim,
            E=width,
            BLOCK_D=max(16, power_of_two(dim)),
            BLOCK_E=max(16, power_of_two(width)),
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.keys,
            WINDOWED=window is not None,
            SOFTCAP=softcap is not None,
            BIAS=kind,
            PRECISE=q.dtype == torch.float32,
            ALIGN=align,
            SPLIT=splits > 1,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    found = out.transpose(2, 3)
    return Partial(found, lse) if splits > 1 else Partial(found[0], lse[0, 0])


def _bias(bias: Tensor | None) -> tuple[int, Tensor | None, tuple[int, int, int, int]]:
    """The kernel's kind of bias, its pointer and its strides, 0 where one entry serves all."""
    if bias is None:
        return 0, None, (0, 0, 0, 0)
    batch, head, row = (
        0 if size == 1 else step for size, step in zip(bias.shape[:3], bias.stride(), strict=False)
    )
    strides = (batch, head, row, bias.stride(3))
    if bias.dtype == torch.bool:
        return 1, bias.view(torch.uint8), strides
    return 2, bias, strides


def _alignment(*tensors: Tensor) -> int:
    """How many elements surely divide every stride: as many as one load of 16 bytes, or 1."""
    wide = 16 // tensors[0].element_size()
    even = all(step % wide == 0 for x in tensors for step in x.stride()[:-1])
    return wide if even else 1


def _near(x: Tensor) -> Tensor:
    """`x`, copied if its tokens lie so far apart that places within a tile overflow 32 bits."""
    return x if x.stride(2) < 2**23 else x.contiguous()


def strides_in(x: Tensor, align: int) -> tuple[int, ...]:
    """In units of `align` elements but for the last axis."""
    return (*(step // align for step in x.stride()[:-1]), x.stride(-1))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
