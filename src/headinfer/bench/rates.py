# SPDX-License-Identifier: Apache-2.0
"""What the machine can do, measured here and now: every floor of every row comes from this.

Also the two things that need no model: page-locking host memory, and one call of every CPU
attention there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headinfer.attention.api import IMPLEMENTATIONS, attend
from headinfer.attention.types import AttentionSpec
from headinfer.bench.cases import Case
from headinfer.bench.clock import Deadline, times
from headinfer.bench.contestants import clean
from headinfer.bench.findings import TORCH_CPU_ATTENTION
from headinfer.bench.results import NOT_AVAILABLE, Results, Row, quantile
from headinfer.tiers import HostTier

MIB, GIB = 2**20, 2**30


def rate_rows(case: Case, *, cuda: bool, quick: bool, deadline: Deadline) -> Iterator[Row]:
    """Links, memories, matrix products and attention, one row each."""

    def row(metric: str, work: Callable[[], object], count: float, device: torch.device) -> Row:
        found = times(work, device, case.repeats, deadline=deadline)
        unit, scale = ("TFLOP/s", 1e12) if metric.startswith(_ARITHMETIC) else ("GB/s", 1e9)
        return filled(
            Row("rates", "machine", 0, metric, unit), [count / each / scale for each in found]
        )

    for device in ("cpu", "cuda") if cuda else ("cpu",):
        kinds = [_host_memory(quick=quick) if device == "cpu" else _link()]
        dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
        kinds += [_arithmetic(torch.device(device), dtype) for dtype in dtypes]
        for kind in kinds:
            for name, work, count in kind:
                yield row(name, work, count, torch.device(device))


def pinning_rows(case: Case, *, quick: bool) -> Iterator[Row]:
    """Seconds per GiB to have page-locked host memory, ours and torch's, twice each.

    Memory that the machine had not touched before is slower: the first row of whoever comes first
    has that, "again" has not.
    """
    nbytes = (1 if quick else 8) * GIB
    torch.ones(1, device="cuda")  # nobody is charged for starting CUDA

    def ours() -> object:
        tier = HostTier(pin=True)
        tier.allocate(nbytes)
        if tier.pin_failure is not None:
            raise RuntimeError(tier.pin_failure)
        return tier.close

    def torchs() -> object:
        held = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return lambda: held

    for name, take in (("headinfer arena", ours), ("torch pin_memory", torchs)):
        for metric in ("first", "again"):
            start = time.perf_counter()
            give = take()
            seconds = (time.perf_counter() - start) / (nbytes / GIB)
            if callable(give):
                give()
            del give
            clean(torch.device("cuda"))
            settings = {"gib": nbytes // GIB}
            yield filled(Row(case.name, name, 0, metric, "s/GiB", settings=settings), [seconds])


def kernel_rows(case: Case, context: int, results: Results, *, deadline: Deadline) -> Iterator[Row]:
    """One decode call, 8 KV heads of 128 dims with 4 query heads each, by every implementation."""
    generator = torch.Generator().manual_seed(0)
    kv_heads, per_kv, dim, dtype = 8, 4, 128, getattr(torch, case.dtype)
    q = torch.randn(1, kv_heads * per_kv, 1, dim, generator=generator).to(dtype)
    k, v = (torch.randn(1, kv_heads, context, dim, generator=generator).to(dtype) for _ in range(2))
    spec = AttentionSpec("cpu", dtype, dim, dim, per_kv, 1, False, False, False)
    scale, cpu = dim**-0.5, torch.device("cpu")
    work: dict[str, Callable[[], object]] = {}
    for name, run in IMPLEMENTATIONS.items():
        if not run.unsupported(spec):
            work[name] = lambda run=run: run(q, k, v, scale=scale)  # type: ignore[misc]
    work |= _torch_forms(q, k, v, scale)
    host = results.rate("host read")
    nbytes = k.numel() * k.element_size() * 2
    flops = 4 * kv_heads * per_kv * dim * context
    rate = results.rate(f"matmul {case.dtype} cpu")
    for name, call in work.items():
        found = times(call, cpu, case.repeats, deadline=deadline)
        row = Row(case.name, name, context, "attention", "s", moved_bytes={"host": nbytes})
        row = replace(
            row,
            bytes_floor_s=nbytes / host if host else None,
            flops_floor_s=flops / rate if rate else None,
        )
        yield filled(row, found)
    if set(work) <= set(TORCH_CPU_ATTENTION):
        note = "this version has no CPU attention kernel of its own"
        yield Row(case.name, "native", context, status=NOT_AVAILABLE, note=note)


def filled(row: Row, values: list[float]) -> Row:
    """`row` with its figures."""
    median = quantile(values, 0.5)

    def share(floor: float | None) -> float | None:
        return floor / median if floor is not None and median > 0 else None

    return replace(
        row,
        median=median,
        p20=quantile(values, 0.2),
        p80=quantile(values, 0.8),
        n=len(values),
        values=tuple(values),
        achieved_bytes=share(row.bytes_floor_s),
        achieved_flops=share(row.flops_floor_s),
    )


_ARITHMETIC = ("matmul", "attention")

_Work = Iterator[tuple[str, Callable[[], object], float]]
"""Name, what is timed, and the bytes or FLOPs of it."""


def _host_memory(*, quick: bool) -> _Work:
    numbers = torch.ones((256 if quick else 1024) * MIB // 4)
    yield "host read", lambda: numbers.sum(), numbers.numel() * 4


def _link() -> _Work:
    host = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
    one, other = (torch.empty_like(host, device="cuda") for _ in range(2))
    nbytes = host.numel()
    yield "h2d", lambda: one.copy_(host, non_blocking=True), nbytes
    yield "d2h", lambda: host.copy_(one, non_blocking=True), nbytes
    yield "gpu copy", lambda: other.copy_(one), 2 * nbytes


def _arithmetic(device: torch.device, dtype: torch.dtype) -> _Work:
    """The product of a model's MLP, and attention of a chunk over resident keys."""
    gpu = device.type == "cuda"
    label = f"{str(dtype).removeprefix('torch.')} {device.type}"
    rows, inner, wide = (8192, 4096, 14336) if gpu else (256, 1024, 2816)
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(wide, inner, device=device).to(dtype)
    yield f"matmul {label}", lambda: torch.nn.functional.linear(a, b), 2 * rows * inner * wide
    kv_heads, new, past, dim = (8, 8192, 65536, 128) if gpu else (1, 256, 4096, 64)
    q = torch.randn(1, 4 * kv_heads, new, dim, device=device).to(dtype)
    k, v = (torch.randn(1, kv_heads, past, dim, device=device).to(dtype) for _ in range(2))
    flops = 4 * 4 * kv_heads * new * past * dim
    yield f"attention {label}", lambda: attend(q, k, v, scale=dim**-0.5), flops


def _torch_forms(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Callable[[], object]]:
    """Other ways to write the same with torch; who is fastest depends on the machine."""
    kv_heads = k.shape[1]
    packed = q.view(1, kv_heads, -1, q.shape[-1])

    def by_matmul() -> Tensor:
        scores = (packed @ k.transpose(-1, -2)).float() * scale
        return torch.softmax(scores, dim=-1).to(v.dtype) @ v

    return {
        "torch sdpa": lambda: scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True),
        "torch sdpa, packed": lambda: scaled_dot_product_attention(packed, k, v, scale=scale),
        "torch matmul": by_matmul,
    }
