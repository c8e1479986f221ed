# SPDX-License-Identifier: Apache-2.0
"""Attention implementations and merges side by side on one GPU, one case per kind of call.

    python benchmarks/attention_kernels.py --out benchmarks/results/attention_kernels.json

Contestants of a case run in shuffled order on the same tensors; a row has the median and the 20th
and 80th percentile, the rate, and two floors: FLOPs at the rate of a large matrix product and bytes
at that of a large copy, both measured first. `--tiny` runs every case in small, on a CPU through
Triton's interpreter: it shows that the script works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:  # before triton is imported, by whomever
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from headinfer.attention import merge
from headinfer.attention.api import IMPLEMENTATIONS, choose, spec_of
from headinfer.attention.types import Partial, Window
from headinfer.testing.interpreter import interpreter

SECONDS = 0.25
MOST_RUNS = 30


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of call: sizes, and what it asks for beyond attention."""

    name: str
    contestants: tuple[str, ...]
    rows: int
    keys: int
    heads: int = 32
    kv_heads: int = 8
    key_dim: int = 128
    value_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    softcap: float | None = None
    window: int | None = None
    masked: bool = False


ALL = ("triton", "cudnn", "flash", "mem-efficient", "reference")
CASES = (
    Case("causal 8K, for scale", ("triton", "cudnn", "flash"), 8192, 8192, causal=True),
    Case("8K x 32K, for scale", ("triton", "cudnn", "flash"), 8192, 32768),
    Case("softcap causal 8K", ALL, 8192, 8192, causal=True, softcap=50.0),
    Case("softcap 8K x 32K", ALL, 8192, 32768, softcap=50.0),
    Case("softcap causal 8K, dim 256", ALL, 8192, 8192, 16, 8, 256, 256, causal=True, softcap=50.0),
    Case("decode 1 x 128K, for scale", ("triton", "flash"), 1, 131072),
    Case("softcap decode 1 x 128K", ALL, 1, 131072, softcap=50.0),
    Case("softcap decode 1 x 128K, dim 256", ALL, 1, 131072, 16, 8, 256, 256, softcap=50.0),
    Case("float32 causal 4K", ALL, 4096, 4096, dtype=torch.float32, causal=True),
    Case("float32 decode 1 x 32K", ALL, 1, 32768, dtype=torch.float32),
    Case("window 4096, chunk 8K", ALL, 8192, 8192 + 4095, window=4096),
    Case("masked 8K", ALL, 8192, 8192, masked=True),
    Case("dims 192 and 128, causal 8K", ALL, 8192, 8192, 16, 16, 192, 128, causal=True),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arguments.add_argument("--out", type=Path, help="where the rows go, as JSON")
    arguments.add_argument("--tiny", action="store_true", help="small, in Triton's interpreter")
    arguments.add_argument("--seed", type=int, default=0, help="of values and order")
    given = arguments.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --tiny runs in Triton's interpreter")
    bench = Bench(given.tiny, given.seed)
    with interpreter() if given.tiny else nullcontext(), torch.no_grad():
        rows = [row for case in CASES for row in bench.attention(case)]
        rows += [row for name in MERGES for row in bench.merging(name)]
    found = {"machine": bench.machine(), "command": " ".join(sys.argv), "rows": rows}
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")


class Bench:
    """A device, its two measured rates, and the clock."""

    def __init__(self, tiny: bool, seed: int) -> None:
        self.tiny = tiny
        self.device = "cpu" if tiny else "cuda"
        self.order = random.Random(seed)
        self.values = torch.Generator(self.device).manual_seed(seed)
        self.flops, self.bytes = self._rates()
        print(f"matrix product {self.flops / 1e12:.1f} TFLOP/s, copy {self.bytes / 1e9:.0f} GB/s")
        print(
            f"{'case':34} {'implementation':16} {'ms':>9} {'TFLOP/s':>8} {'GB/s':>7} {'floors, ms':>16}"
        )

    def attention(self, case: Case) -> list[dict[str, Any]]:
        if self.tiny:
            case = _in_small(case)
        q = self._normal(case.dtype, case.rows, case.heads, case.key_dim)
        k = self._normal(case.dtype, case.keys, case.kv_heads, case.key_dim)
        v = self._normal(case.dtype, case.keys, case.kv_heads, case.value_dim)
        window = None
        if case.window is not None:
            window = Window(case.keys - case.rows, case.window)
        bias = None
        if case.masked:
            shape = (1, 1, case.rows, case.keys)
            bias = torch.rand(shape, generator=self.values, device=self.device) < 0.8
        calls: dict[str, Callable[[], object]] = {}
        for name in case.contestants:
            how = {"causal": case.causal, "bias": bias, "softcap": case.softcap, "window": window}
            if name == "mem-efficient" and window is not None:
                how |= {"window": None, "bias": self._mask(window, case)}
            spec = spec_of(
                q, k, v, causal=case.causal, biased=how["bias"] is not None,
                softcap=case.softcap is not None, windowed=how["window"] is not None,
            )  # fmt: skip
            if (self.tiny and name == "triton") or not IMPLEMENTATIONS[name].unsupported(spec):
                scale = case.key_dim**-0.5
                calls[name] = partial(IMPLEMENTATIONS[name], q, k, v, scale=scale, **how)
        spec = spec_of(
            q, k, v, causal=case.causal, biased=bias is not None,
            softcap=case.softcap is not None, windowed=window is not None,
        )  # fmt: skip
        flops = 2 * _pairs(case) * case.heads * (case.key_dim + case.value_dim)
        moved = (q.nbytes + k.nbytes + v.nbytes) + q.nbytes // case.key_dim * case.value_dim
        config = asdict(case) | {"dtype": str(case.dtype), "chosen": choose(spec).name}
        return self._rows(case.name, calls, flops, moved, config)

    def merging(self, name: str) -> list[dict[str, Any]]:
        shape = (1, 4, 16, 32) if self.tiny else (1, 32, 8192, 128)
        calls, moved = MERGES[name](self, shape)
        return self._rows(name, calls, 0, moved, {"shape": shape})

    def partial(self, shape: tuple[int, ...], dtype: torch.dtype) -> Partial:
        batch, heads, rows, dim = shape
        lse = torch.randn((batch, heads, rows), generator=self.values, device=self.device)
        return Partial(self._normal(dtype, rows, heads, dim), lse)

    def machine(self) -> dict[str, Any]:
        found = {"torch": torch.__version__, "python": platform.python_version()}
        if not self.tiny:
            import triton

            found |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
        return found | {"flops_per_s": self.flops, "bytes_per_s": self.bytes}

    def _rows(
        self,
        name: str,
        calls: dict[str, Callable[[], object]],
        flops: int,
        moved: int,
        config: dict[str, Any],
    ) -> list[dict[str, Any]]:
        names = list(calls)
        self.order.shuffle(names)
        times = {each: self._time(calls[each]) for each in names}
        floors = flops / self.flops, moved / self.bytes
        rows = []
        for each in sorted(times, key=lambda n: statistics.median(times[n])):
            middle = statistics.median(times[each])
            low, high = _percentile(times[each], 0.2), _percentile(times[each], 0.8)
            print(
                f"{name:34} {each:16} {middle * 1e3:9.3f} {flops / middle / 1e12:8.1f} "
                f"{moved / middle / 1e9:7.0f} {floors[0] * 1e3:8.3f} {floors[1] * 1e3:7.3f}"
            )
            rows.append(
                {
                    "case": name, "implementation": each, "unit": "s", "p50": middle, "p20": low,
                    "p80": high, "runs": len(times[each]), "flops": flops, "bytes": moved,
                    "flops_floor_s": floors[0], "bytes_floor_s": floors[1], "config": config,
                }
            )  # fmt: skip
        return rows

    def _time(self, call: Callable[[], object]) -> list[float]:
        """Seconds per run; the first two, which compile and warm up, do not count."""
        call()
        if self.tiny:
            start = time.perf_counter()
            call()
            return [time.perf_counter() - start]
        call()
        times: list[float] = []
        while sum(times) < SECONDS and len(times) < MOST_RUNS:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        return times

    def _rates(self) -> tuple[float, float]:
        side, length = (256, 2**16) if self.tiny else (8192, 2**30)
        dtype = torch.float32 if self.tiny else torch.bfloat16
        a = torch.randn((side, side), device=self.device, dtype=dtype)
        source = torch.zeros(length, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        product = statistics.median(self._time(lambda: a @ a))
        copy = statistics.median(self._time(lambda: target.copy_(source)))
        return 2 * side**3 / product, 2 * length / copy

    def _normal(self, dtype: torch.dtype, tokens: int, heads: int, dim: int) -> Tensor:
        """[1, heads, tokens, dim], head-major as the store keeps keys and values."""
        shape = (1, heads, tokens, dim)
        return torch.randn(shape, generator=self.values, device=self.device).to(dtype)

    def _mask(self, window: Window, case: Case) -> Tensor:
        rows = torch.arange(case.rows, device=self.device)[:, None]
        return window.visible(rows, torch.arange(case.keys, device=self.device))[None, None]


def _into(bench: Bench, shape: tuple[int, ...]) -> tuple[dict[str, Callable[[], object]], int]:
    total, part = bench.partial(shape, torch.float32), bench.partial(shape, _half(bench))
    moved = 2 * total.out.nbytes + part.out.nbytes

    def in_torch() -> None:
        weight = merge._share(part.lse, total.lse)
        total.out.lerp_(part.out.to(total.out.dtype), weight[..., None])
        torch.logaddexp(total.lse, part.lse, out=total.lse)

    fused = partial(merge._merge_fused, [total, part], total.out, total.lse, None)
    return {"fused": fused, "torch": in_torch}, moved


def _written(bench: Bench, shape: tuple[int, ...]) -> tuple[dict[str, Callable[[], object]], int]:
    parts = [bench.partial(shape, _half(bench)) for _ in range(2)]
    batch, heads, rows, dim = shape
    out = parts[0].out.new_empty(batch, rows, heads, dim).transpose(1, 2)

    def in_torch() -> None:
        a, b = parts
        total = a.out.float().lerp_(b.out.float(), merge._share(b.lse, a.lse)[..., None])
        torch.logaddexp(a.lse, b.lse)
        out.copy_(total)

    fused = partial(merge._merge_fused, parts, out, None, None)
    return {"fused": fused, "torch": in_torch}, 3 * out.nbytes


def _many(bench: Bench, shape: tuple[int, ...]) -> tuple[dict[str, Callable[[], object]], int]:
    small = (shape[0], shape[1], 1, shape[3])
    parts = [bench.partial(small, _half(bench)) for _ in range(8)]
    out = torch.empty(small, device=bench.device)
    lse = torch.empty(small[:3], device=bench.device)

    def in_torch() -> None:
        lses = torch.stack([part.lse for part in parts])
        weights = torch.softmax(lses, dim=0).nan_to_num_(nan=0.0)
        _ = (torch.stack([part.out for part in parts]) * weights[..., None]).sum(dim=0)
        torch.logsumexp(lses, dim=0)

    fused = partial(merge._merge_fused, parts, out, lse, None)
    return {"fused": fused, "torch": in_torch}, 8 * parts[0].out.nbytes + out.nbytes


MERGES = {
    "merge into a float32 total": _into,
    "merge two, write [b, t, h, d]": _written,
    "merge eight of one row": _many,
}


def _half(bench: Bench) -> torch.dtype:
    return torch.float16 if bench.tiny else torch.bfloat16


def _pairs(case: Case) -> int:
    """(row, key) pairs that are seen, of a mask all of them."""
    if case.window is not None:
        past = case.keys - case.rows
        return sum(min(case.window, past + row + 1) for row in range(case.rows))
    return case.rows * (case.rows + 1) // 2 if case.causal else case.rows * case.keys


def _percentile(times: list[float], share: float) -> float:
    return sorted(times)[round(share * (len(times) - 1))]


def _in_small(case: Case) -> Case:
    """The case with a hundredth of its lengths, in a type that the interpreter multiplies."""
    changes: dict[str, Any] = asdict(case)
    changes["rows"] = max(1, case.rows // 100)
    changes["keys"] = changes["rows"] if case.causal else max(1, case.keys // 100)
    changes["heads"], changes["kv_heads"] = 4, 2
    changes["window"] = None if case.window is None else case.window // 100
    if case.dtype == torch.bfloat16:
        changes["dtype"] = torch.float16
    return Case(**changes)


if __name__ == "__main__":
    main()
