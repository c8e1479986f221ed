# SPDX-License-Identifier: Apache-2.0
"""Attention over a context that lies in several runs, as one job of the native library that needs
no interpreter: whoever runs it calls a plain function with a plain address.
"""

from __future__ import annotations

import copy
import ctypes
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headinfer.attention import packed
from headinfer.attention.native import (
    check_call,
    checked_threads,
    function_address,
    pack_call,
    raise_for,
    threads,
)
from headinfer.attention.packed import Packed, PackedRun
from headinfer.attention.types import Partial
from headinfer.errors import InputError

_JOB = struct.Struct("@4P 2d 2i")
"""headinfer_near_job of native/headinfer_native.h."""


class KeyRun(NamedTuple):
    """Keys and values [b, h, s, d] of some tokens, and the bias of all rows against them."""

    k: Tensor
    v: Tensor
    bias: Tensor | None = None


class PackedKeys(NamedTuple):
    """Keys and values of `keys` tokens in packed blocks, and the bias of all rows against them."""

    k: PackedRun
    v: PackedRun
    keys: int
    bias: Tensor | None = None


class _NearPacked(ctypes.Structure):
    _fields_ = (
        ("k", Packed),
        ("v", Packed),
        ("tokens", ctypes.c_int64),
        ("damaged", ctypes.c_int64 * 4),
    )


class NativeJob:
    """Attention of q over `runs`, at least one, merged in their order.

    Everything it was made of must stay where it is until it has run; what the tensors hold is read
    only then.

    Attributes:
        address: the argument of `NativeJob.function()`.
        at: addresses of q and of the result.
        num_threads: of each call.
    """

    def __init__(
        self,
        q: Tensor,
        runs: Sequence[KeyRun | PackedKeys],
        found: Partial,
        *,
        scale: float,
        softcap: float | None,
        num_threads: int | None = None,
    ) -> None:
        """
        Args:
            q: [b, h * q_per_kv, t, d] on the CPU.
            found: out [b, h * q_per_kv, t, e] and lse [b, h * q_per_kv, t], contiguous float32 on
                the CPU: where the result goes.
            num_threads: of each call; by default that of `native.threads()`.

        Raises:
            InputError: there are no runs, or shapes and types do not belong together.
        """
        if not runs:
            raise InputError("a job of no runs has no result: give one run of keys or more")
        count = threads() if num_threads is None else checked_threads(num_threads)
        places, self._held = _places(found, len(runs))
        calls, self._packed = [], (_NearPacked * len(runs))()
        how: Any = {"scale": scale, "softcap": softcap, "num_threads": count}
        for index, (run, place) in enumerate(zip(runs, places, strict=True)):
            if isinstance(run, PackedKeys):
                there = packed.pack_call(
                    q, run.k, run.v, None, None, place, keys=run.keys, bias=run.bias, **how
                )
                calls.append(there.args)
                mine = self._packed[index]
                mine.k, mine.v, mine.tokens = there.k, there.v, there.tokens
                mine.damaged[0] = -1  # written if a block of this run is damaged
                self._held.extend(there.held)
                continue
            check_call(q, run.k, run.v, run.bias)
            call, held = pack_call(q, run.k, run.v, place, bias=run.bias, **how)
            calls.append(call)
            self._held.extend(held)
        self._held += [q, *found]
        self._calls = ctypes.create_string_buffer(b"".join(calls))
        self._fresh = _JOB.pack(
            ctypes.addressof(self._calls), ctypes.addressof(self._packed),
            found.out.data_ptr(), found.lse.data_ptr(), 0.0, 0.0, len(runs), -1,
        )  # fmt: skip
        self.at = q.data_ptr(), found.out.data_ptr()
        self.num_threads = count
        self._begin()

    def _begin(self) -> None:
        self._job = ctypes.create_string_buffer(self._fresh)
        self.address = ctypes.addressof(self._job)

    def again(self) -> NativeJob:
        """The same job once more, with times of its own; this one runs before it or not at all."""
        twin = copy.copy(self)
        twin._begin()
        return twin

    @staticmethod
    def function() -> int:
        """Address of the C function `void (*)(void *)` that runs a job."""
        return function_address("headinfer_near_run")

    def run(self) -> None:
        """Run it now, on this thread and the pool's."""
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.function())(self.address)

    def times(self) -> tuple[float, float]:
        """When it began and ended, seconds of the monotonic clock, after it has run.

        Raises:
            InputError, MemoryError: the library refused a call; the result is NaN.
            LosslessCorrupt: a packed block is damaged; the result is NaN.
        """
        *_, started, ended, _, status = _JOB.unpack(self._job.raw[: _JOB.size])
        if status == packed.CORRUPT:
            damaged = next(
                part.damaged for part in self._packed if part.tokens and part.damaged[0] >= 0
            )
            packed.raise_damaged(list(damaged))
        raise_for(status, "attention near the data")
        return started, ended


def _places(found: Partial, count: int) -> tuple[list[Partial], list[Tensor]]:
    """Where each of `count` calls writes, and the memory of that."""
    if count == 1:
        return [found], []
    out = torch.empty((count, *found.out.shape), dtype=torch.float32, device="cpu")
    lse = torch.empty((count, *found.lse.shape), dtype=torch.float32, device="cpu")
    return [Partial(*place) for place in zip(out, lse, strict=True)], [out, lse]
