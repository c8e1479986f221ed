# SPDX-License-Identifier: Apache-2.0
"""The native library over packed blocks of the lossless format: attention, encoding, decoding.

Attention over packed blocks has the bits of `attention.native` over what they hold. Knows blocks
and overflow entries, no tiers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from headinfer.attention import native
from headinfer.attention.types import Partial
from headinfer.errors import InputError, LosslessCorrupt
from headinfer.formats.lossless import BlockLayout
from headinfer.formats.overflow import Overflow
from headinfer.layout import BLOCK_TOKENS

CORRUPT = 8
_NO_ENTRIES = 9


class PackedRun(NamedTuple):
    """Keys or values of consecutive blocks, packed.

    Attributes:
        slots: [h, rows as written, blocks, slot_bytes] bytes in host memory; blocks contiguous.
        overflow: where raw ones have the rest.
        row_map: for each batch row, the row as written; None is the identity.
    """

    slots: Tensor
    overflow: Overflow
    row_map: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that attending it reads, overflow aside."""
        return self.slots[:, 0].numel() * len(self.rows)

    @property
    def dim(self) -> int:
        return self.overflow.layout.dim

    @property
    def rows(self) -> Sequence[int]:
        return range(self.slots.shape[1]) if self.row_map is None else self.row_map


class Packed(ctypes.Structure):
    """headinfer_packed of native/headinfer_native.h."""

    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("chunks", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("chunk_entries", ctypes.c_int64),
        ("entries", ctypes.c_int64),
    )


class _Recode(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
        ("value_stride", ctypes.c_int64 * 3),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("free_count", ctypes.c_int64),
        ("used", ctypes.c_int64),
        ("damaged", ctypes.c_int64 * 4),
        ("encode", ctypes.c_int32),
        ("verify", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


def attend(
    q: Tensor,
    k: PackedRun,
    v: PackedRun,
    tail_k: Tensor | None,
    tail_v: Tensor | None,
    *,
    keys: int,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    level: str | None = None,
    num_threads: int | None = None,
) -> Partial:
    """Attention of q [b, h * g, t, d] over the first `keys` tokens of packed k, v and after them
    tail_k, tail_v [b, h, s, d]; bits of `native.attend` over all of them in one run.

    Raises:
        InputError: shapes, `level` or `num_threads` are not what the library takes.
        LosslessCorrupt: a block is damaged.
    """
    library = native.loaded()
    count = native.threads() if num_threads is None else native.checked_threads(num_threads)
    batch, heads, rows, _ = q.shape
    found = Partial(
        torch.empty((batch, heads, rows, v.dim), dtype=torch.float32, device="cpu"),
        torch.empty((batch, heads, rows), dtype=torch.float32, device="cpu"),
    )
    call = pack_call(
        q, k, v, tail_k, tail_v, found, keys=keys, scale=scale, bias=bias, softcap=softcap,
        level=level, num_threads=count,
    )  # fmt: skip
    damaged = (ctypes.c_int64 * 4)()
    status = library.headinfer_attend_packed(
        call.args, ctypes.byref(call.k), ctypes.byref(call.v), call.tokens, damaged
    )
    if status == CORRUPT:
        raise_damaged(list(damaged))
    native.raise_for(status, f"attention of q {tuple(q.shape)} over {call.tokens:,} packed tokens")
    return found


class PackedCall(NamedTuple):
    """A call of `attend` as the library takes it.

    Attributes:
        args: headinfer_attend_args.
        k, v: headinfer_packed of `tokens` packed tokens.
        held: must stay until the call is over.
    """

    args: bytes
    k: Packed
    v: Packed
    tokens: int
    held: list[Tensor]


def pack_call(
    q: Tensor,
    k: PackedRun,
    v: PackedRun,
    tail_k: Tensor | None,
    tail_v: Tensor | None,
    found: Partial,
    *,
    keys: int,
    scale: float,
    num_threads: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    level: str | None = None,
) -> PackedCall:
    """A call of `attend` that writes to `found`, contiguous float32.

    Raises:
        InputError: shapes or types are not what the library takes.
    """
    batch, heads, rows, key_dim = q.shape
    kv_heads, packed = k.slots.shape[0], k.slots.shape[2] * BLOCK_TOKENS
    _check_attend(q, k, v, tail_k, keys)
    bias, biased = native.checked_bias(bias, (batch, heads, rows, keys))
    none = (0, 0, 0)
    args = native.CALL.pack(
        q.data_ptr(),
        0 if tail_k is None else tail_k.data_ptr(),
        0 if tail_v is None else tail_v.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        found.out.data_ptr(), found.lse.data_ptr(),
        batch, kv_heads, heads // kv_heads, rows, keys, key_dim, v.dim,
        *q.stride(),
        *(none if tail_k is None else tail_k.stride()[:3]),
        *(none if tail_v is None else tail_v.stride()[:3]),
        *((0, 0, 0, 0) if bias is None else bias.stride()),
        scale, 0.0 if softcap is None else softcap,
        native.TYPES[q.dtype], biased, 0, num_threads, native.level_index(level),
    )  # fmt: skip
    packed_k, packed_v = _described(k), _described(v)
    held = [q, *found, k.slots, v.slots, *packed_k.held, *packed_v.held]
    held += [x for x in (tail_k, tail_v, bias) if x is not None]
    return PackedCall(args, packed_k.record, packed_v.record, packed, held)


def encode(values: Tensor, run: PackedRun, *, level: str | None = None) -> None:
    """values [h, b, blocks x 128, d] are in `run`'s slots, which have as many rows; entries for all
    blocks were reserved."""
    overflow = run.overflow
    blocks = run.slots.shape[0] * run.slots.shape[1] * run.slots.shape[2]
    # No block of this call is without an entry; those not needed stay at the front of the ring.
    free = overflow.free_numbers(blocks if overflow.entries else 0).contiguous()
    args = _recode(values, run, encode=True, level=level)
    args.free, args.free_count = free.data_ptr(), free.numel()
    described = _described(run)
    status = native.loaded().headinfer_recode(ctypes.byref(args), ctypes.byref(described.record))
    if status == _NO_ENTRIES:
        raise InputError(f"no overflow entries were reserved for {blocks:,} blocks")
    native.raise_for(status, f"encoding {blocks:,} blocks")
    overflow.counter += args.used


def decode(run: PackedRun, out: Tensor, *, verify: bool = False, level: str | None = None) -> None:
    """out [h, b, blocks x 128, d] holds what `run` does.

    Raises:
        LosslessCorrupt: a block is damaged, or, with `verify`, not the one that was written.
    """
    args = _recode(out, run, encode=False, level=level)
    args.verify = verify
    described = _described(run)
    status = native.loaded().headinfer_recode(ctypes.byref(args), ctypes.byref(described.record))
    if status == CORRUPT:
        _, row, head, block = args.damaged
        raise _damaged("keys or values", row, head, block)
    native.raise_for(status, f"decoding {tuple(run.slots.shape)}")


class _Described(NamedTuple):
    record: Packed
    held: tuple[Tensor, Tensor]  # what it points at


@lru_cache(256)
def _places_of(rows: Sequence[int], step: int) -> Tensor:
    """Where batch rows begin; not to be changed."""
    with torch.inference_mode(False):
        return torch.tensor([row * step for row in rows], dtype=torch.int64, device="cpu")


def _described(run: PackedRun) -> _Described:
    overflow = run.overflow
    entries = overflow.entries  # before the table, which may grow meanwhile
    table = overflow.table
    rows = _places_of(run.rows, run.slots.stride(1))
    record = Packed(
        run.slots.data_ptr(),
        rows.data_ptr(),
        table.data_ptr(),
        run.slots.stride(0),
        overflow.chunk_entries,
        entries,
    )
    return _Described(record, (rows, table))


def _recode(values: Tensor, run: PackedRun, *, encode: bool, level: str | None) -> _Recode:
    heads, _, blocks, width = run.slots.shape
    layout = BlockLayout(run.dim)
    expected = (heads, len(run.rows), blocks * BLOCK_TOKENS, run.dim)
    dense = run.slots.stride()[2:] == (width, 1) or blocks <= 1
    if (
        values.shape != expected
        or values.dtype is not torch.bfloat16
        or (values.stride(-1) != 1 and values.numel())
        or width != layout.slot_bytes
        or not dense
        or not (values.is_cpu and run.slots.is_cpu)
    ):
        raise InputError(
            f"packed blocks {tuple(run.slots.shape)} hold {expected} of bfloat16 in host memory, got "
            f"{tuple(values.shape)} of {values.dtype} on {values.device}"
        )
    return _Recode(
        values=values.data_ptr(),
        value_stride=(values.stride(1), values.stride(0), values.stride(2)),
        batch=len(run.rows),
        heads=heads,
        blocks=blocks,
        dim=run.dim,
        encode=encode,
        threads=native.threads(),
        level=native.level_index(level),
    )


def _check_attend(q: Tensor, k: PackedRun, v: PackedRun, tail_k: Tensor | None, keys: int) -> None:
    packed = k.slots.shape[2] * BLOCK_TOKENS
    there = packed + (0 if tail_k is None else tail_k.shape[2])
    same = k.slots.shape[0] == v.slots.shape[0] and k.slots.shape[2] == v.slots.shape[2]
    fits = (
        q.dtype is torch.bfloat16
        and q.is_cpu
        and q.shape[3] == k.dim
        and q.shape[0] == len(k.rows) == len(v.rows)
        and q.shape[1] % k.slots.shape[0] == 0
    )
    if not (same and fits and keys <= there):
        raise InputError(
            f"packed attention cannot take q {tuple(q.shape)} of {q.dtype} on {q.device} over "
            f"{keys:,} keys: slots are {tuple(k.slots.shape)} and {tuple(v.slots.shape)}, and hold "
            f"{there:,} tokens with the tail"
        )


def raise_damaged(damaged: Sequence[int]) -> NoReturn:
    """Raise what `damaged` of headinfer_attend_packed says."""
    which, row, head, block = damaged
    raise _damaged("values" if which else "keys", row, head, block)


def _damaged(what: str, row: int, head: int, block: int) -> LosslessCorrupt:
    return LosslessCorrupt(
        f"packed {what} are damaged: row {row}, head {head}, block {block} of this run (tokens "
        f"{block * BLOCK_TOKENS:,} to {(block + 1) * BLOCK_TOKENS - 1:,}); the memory of this "
        "machine changed what was written",
        block=block,
    )
