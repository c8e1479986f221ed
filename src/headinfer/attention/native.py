# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows over keys and values in host memory, by the native library.

Each key and value is read once for all rows, at the speed of the memory; docs/native.md has the
arithmetic. The library is looked for at the first question, never on import, and a call releases
the GIL. Knows no tiers.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor

from headinfer.attention.types import AttentionSpec, Partial, Window
from headinfer.errors import InputError

LIBRARY = Path("lib", "libheadinfer_native.so")
"""Below the folder of the package."""

ABI = 5
MAX_THREADS = 1024
MAX_DIM = 1024
MAX_Q_PER_KV = 16
MAX_QUERY_TOKENS = 63
"""Prefill is for cpu-flash, whose matrix products may have instructions of their own, except with
softcap, which it does not do."""

LEVEL_VARIABLE = "HEADINFER_NATIVE_LEVEL"
"""Environment variable that names the instruction level to use instead of the best."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NAME = "native"
_threads: int | None = None
_enough: int | None = None


class NativeAttention:
    """CPU calls with few query rows: decode, a batch of it, speculative tokens. With softcap, all."""

    name = NAME

    def unsupported(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if spec.device != "cpu":
            reasons.append(f"tensors are on {spec.device}; runs on cpu")
        else:
            absent = why_absent()
            reasons += [absent] if absent else []
        if spec.windowed:
            reasons.append("a window")
        if spec.gradient:
            reasons.append("a gradient")
        if spec.dtype not in TYPES:
            reasons.append(f"type {spec.dtype}; runs float32, float16, bfloat16")
        if max(spec.key_dim, spec.value_dim) > MAX_DIM:
            reasons.append(f"head dims {spec.key_dim} and {spec.value_dim}; runs up to {MAX_DIM}")
        if spec.q_per_kv > MAX_Q_PER_KV:
            reasons.append(f"{spec.q_per_kv} query heads per KV head; runs up to {MAX_Q_PER_KV}")
        if spec.query_tokens > MAX_QUERY_TOKENS and not spec.softcap:
            reasons.append(
                f"{spec.query_tokens} or more query tokens; runs up to {MAX_QUERY_TOKENS}"
            )
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
        return attend(q, k, v, scale=scale, causal=causal, bias=bias, softcap=softcap)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    level: str | None = None,
    num_threads: int | None = None,
) -> Partial:
    """Attention as `AttentionImpl.__call__` has it, out and lse in float32; s may be 0.

    Args:
        level: instruction level; by default that of `level()`.
        num_threads: by default that of `threads()`. The bits do not depend on it.

    Raises:
        InputError: shapes, types, `level` or `num_threads` are not what the library takes.
    """
    library = loaded()
    check_call(q, k, v, bias, causal=causal)
    batch, heads, rows = q.shape[:3]
    found = Partial(
        torch.empty((batch, heads, rows, v.shape[-1]), dtype=torch.float32, device="cpu"),
        torch.empty((batch, heads, rows), dtype=torch.float32, device="cpu"),
    )
    call, _held = pack_call(
        q, k, v, found, scale=scale, causal=causal, bias=bias, softcap=softcap, level=level,
        num_threads=threads() if num_threads is None else checked_threads(num_threads),
    )  # fmt: skip
    status = library.headinfer_attend(call)
    if status:
        raise_for(status, f"attention of {_shapes(q, k, v)}")
    return found


def pack_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: Partial,
    *,
    scale: float,
    num_threads: int,
    causal: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    level: str | None = None,
) -> tuple[bytes, list[Tensor]]:
    """A call of `attend`, found good by `check_call`, as the library takes it, and the tensors that
    must stay until it is over.

    Args:
        found: out [b, h * q_per_kv, t, e] and lse [b, h * q_per_kv, t], contiguous float32.
    """
    k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (k, v))
    batch, heads, rows, key_dim = q.shape
    kv_heads, keys, value_dim = v.shape[1:]
    bias, biased = checked_bias(bias, (batch, heads, rows, keys))
    call = CALL.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if bias is None else bias.data_ptr(),
        found.out.data_ptr(), found.lse.data_ptr(),
        batch, kv_heads, heads // kv_heads, rows, keys, key_dim, value_dim,
        *q.stride(), *k.stride()[:3], *v.stride()[:3],
        *((0, 0, 0, 0) if bias is None else bias.stride()),
        scale, 0.0 if softcap is None else softcap,
        TYPES[q.dtype], biased, causal, num_threads, level_index(level),
    )  # fmt: skip
    return call, [k, v] if bias is None else [k, v, bias]


def function_address(name: str) -> int:
    """Where the library's function `name` lies.

    Raises:
        InputError: there is no library.
    """
    return ctypes.cast(getattr(loaded(), name), ctypes.c_void_p).value or 0


def threads() -> int:
    """Threads of a call, its own included: what `set_threads` said, or else torch's number, and no
    more than are known to make a difference."""
    if _threads is not None:
        return _threads
    count = torch.get_num_threads()
    return count if _enough is None else min(count, _enough)


def suggest_threads(count: int | None) -> None:
    """No more than `count` threads make a difference on this machine; None if that is not known."""
    global _enough
    _enough = None if count is None else checked_threads(count)


def set_threads(count: int | None) -> None:
    """Later calls run on `count` threads, whatever was suggested; None follows that, and
    `torch.get_num_threads()`, again.

    Raises:
        InputError: not an integer from 1 to MAX_THREADS.
    """
    global _threads
    _threads = None if count is None else checked_threads(count)


def checked_threads(count: int) -> int:
    """`count` itself. Raises InputError unless it is an integer from 1 to MAX_THREADS."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_THREADS:
        raise InputError(
            f"native attention cannot run on {count!r} threads: it takes 1 to {MAX_THREADS}, the "
            "calling thread included. None follows torch.get_num_threads()."
        )
    return count


def why_absent() -> str | None:
    """Why there is no native library here; None if there is."""
    found = _load()
    return found if isinstance(found, str) else None


def levels() -> dict[str, bool]:
    """The instruction levels built into the library, best first, and whether this CPU runs them."""
    library = loaded()
    names = [library.headinfer_level_name(i) for i in range(library.headinfer_level_count())]
    return {name.decode(): bool(library.headinfer_level_runs(i)) for i, name in enumerate(names)}


def level() -> str:
    """The level calls use: the one HEADINFER_NATIVE_LEVEL names, or else the best that runs.

    Raises:
        InputError: the variable names a level that is not built or that this CPU does not run.
    """
    forced = os.environ.get(LEVEL_VARIABLE)
    found = levels()
    if not forced:
        return next(name for name, runs in found.items() if runs)
    return _checked_level(forced, f"{LEVEL_VARIABLE}={forced!r}")


def described() -> str:
    """The level and the threads of calls, or why there are none, in one line."""
    absent = why_absent()
    if absent is not None:
        return f"none: {absent}"
    try:
        used = level()
    except InputError as error:
        return f"refused: {error}"
    able = ", ".join(name for name, runs in levels().items() if runs)
    return f"{used} with {threads()} threads (runs here: {able})"


def touch(address: int, nbytes: int, *, num_threads: int | None = None) -> None:
    """Every page of [address, address + nbytes) has memory behind it; contents stay.

    Raises:
        InputError: not a mapped range, or `num_threads` out of range.
        MemoryError: the system has no memory left for the pages.
    """
    count = threads() if num_threads is None else checked_threads(num_threads)
    status = loaded().headinfer_touch(address, nbytes, count)
    raise_for(status, f"touching {nbytes:,} bytes")


def read_seconds(address: int, nbytes: int, *, num_threads: int | None = None) -> float:
    """Seconds that all threads together take to read [address, address + nbytes) once.

    Raises:
        InputError: `num_threads` out of range, or a null address.
    """
    count = threads() if num_threads is None else checked_threads(num_threads)
    seconds = ctypes.c_double()
    library = loaded()
    status = library.headinfer_read(address, nbytes, count, ctypes.byref(seconds))
    raise_for(status, f"reading {nbytes:,} bytes")
    return seconds.value


CALL = struct.Struct("@6P 7q 4q 3q 3q 4q 2f 5i 4x")
"""headinfer_attend_args of native/headinfer_native.h; filling a ctypes.Structure takes longer than
attending a thousand keys."""

_PROBLEMS = {
    1: "a pointer is null",
    2: "the shapes do not belong together",
    3: f"the number of threads is not from 1 to {MAX_THREADS}",
    4: "the instruction level is not built or this CPU does not run it",
    5: "the element type is unknown",
    6: "the system has no memory left for it",
    7: "the system refused",
    8: "a packed block is damaged",
    9: "there are no overflow entries left",
}


def raise_for(status: int, what: str) -> None:
    """Raise what `status` of a call of the library means; 0 is success."""
    if status == 0:
        return
    message = f"{what} was refused by the native library: {_PROBLEMS.get(status, status)}"
    raise MemoryError(message) if status == 6 else InputError(message)


def check_call(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, causal: bool = False
) -> None:
    """Raise InputError unless q, k, v and bias can be what `attend` takes."""
    if not (q.dim() == k.dim() == v.dim() == 4 and q.dtype == k.dtype == v.dtype):
        raise InputError(
            f"native attention takes q, k, v [b, h, t, d] of one type, got {_shapes(q, k, v)} of "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.dtype not in TYPES or not (q.is_cpu and k.is_cpu and v.is_cpu):
        raise InputError(f"native attention runs float types on cpu, got {q.dtype} on {q.device}")
    (batch, heads, rows, dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    fits = (
        (batch, kv_heads, keys, dim) == k.shape
        and (batch, kv_heads, keys) == v.shape[:3]
        and kv_heads > 0
        and heads % kv_heads == 0
        and not (causal and rows != keys)
    )
    if not fits:
        raise InputError(
            f"native attention cannot take {_shapes(q, k, v)}, causal={causal}: they disagree"
        )
    if bias is not None and not bias.is_cpu:
        raise InputError(f"native attention takes a bias on cpu, got {bias.device}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def checked_bias(
    bias: Tensor | None, shape: tuple[int, int, int, int]
) -> tuple[Tensor | None, int]:
    """`bias` seen as `shape`, and its headinfer_bias."""
    if bias is None:
        return None, 0
    if bias.dtype == torch.bool:
        return bias.expand(shape), 1
    return bias.float().expand(shape), 2


def level_index(name: str | None) -> int:
    if name is None:
        if LEVEL_VARIABLE not in os.environ:
            return -1
        name = level()
    return list(levels()).index(_checked_level(name, f"level={name!r}"))


def _checked_level(name: str, asked: str) -> str:
    found = levels()
    if not found.get(name):
        why = "this CPU does not have its instructions" if name in found else "it is not built"
        able = ", ".join(known for known, runs in found.items() if runs)
        raise InputError(f"{asked} cannot be used: {why}. Levels that run here: {able}.")
    return name


def loaded() -> ctypes.CDLL:
    found = _load()
    if isinstance(found, str):
        raise InputError(found)
    return found


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    places = _places()
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        looked = " nor ".join(str(place.parent) for place in places)
        return (
            f"the native library was not built: it is not in {looked}. With a C++ compiler, install "
            "headinfer again, or in a checkout run scripts/build_native"
        )
    try:
        library = ctypes.CDLL(str(path))
        abi = library.headinfer_abi()
    except (OSError, AttributeError) as error:
        return f"the native library {path} cannot be loaded: {error}"
    if abi != ABI:
        return f"the native library {path} has interface {abi}, not {ABI}: build it again"
    library.headinfer_attend.argtypes = [ctypes.c_char_p]
    library.headinfer_attend_packed.argtypes = [
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.headinfer_recode.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.headinfer_level_name.restype = ctypes.c_char_p
    library.headinfer_touch.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    library.headinfer_read.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.POINTER(ctypes.c_double)
    ]  # fmt: skip
    return library


def _places() -> list[Path]:
    """Inside the package; built in this checkout; and, for a checkout, inside what is installed."""
    package = Path(__file__).resolve().parents[1]
    places = [package / LIBRARY]
    if package.parent.name == "src":
        places.append(package.parents[1] / "build" / "native" / LIBRARY.name)
    try:
        places.append(Path(str(distribution("headinfer").locate_file("headinfer"))) / LIBRARY)
    except PackageNotFoundError:
        pass
    return list(dict.fromkeys(places))
