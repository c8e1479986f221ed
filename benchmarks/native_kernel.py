# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernel against every way torch has to compute the same, in one run.

    python benchmarks/native_kernel.py --out benchmarks/results/native_kernel.json

Decode shapes with random values. Each case is first held against float64 by the 2x rule; then the
contestants take turns in random order. Beside every time stands the floor: bytes of keys and values
over the rate at which the same threads only read memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headinfer.attention import native
from headinfer.testing.numerics import check, eager, oracle

CHECKED_KEYS = 4096
READ_BYTES = 2**30
MACHINE_CHANGES = 1.5
"""Read rates before and after that differ by more than this factor make a run worthless."""


@dataclass(frozen=True, slots=True)
class Case:
    """One attention call: a batch of one, `rows` query tokens."""

    dtype: str
    keys: int
    kv_heads: int = 8
    q_per_kv: int = 4
    rows: int = 1
    dim: int = 128

    def tensors(self, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        dtype = getattr(torch, self.dtype)
        heads = self.kv_heads * self.q_per_kv
        q = torch.randn(1, heads, self.rows, self.dim).to(dtype)
        k, v = (torch.randn(1, self.kv_heads, keys, self.dim).to(dtype) for _ in range(2))
        return q, k, v

    def __str__(self) -> str:
        return (
            f"{self.dtype}, {self.keys:,} keys, {self.kv_heads} KV heads x {self.q_per_kv} queries, "
            f"{self.rows} row{'s' if self.rows > 1 else ''}, dim {self.dim}"
        )


CASES = (
    Case("bfloat16", 32768),
    Case("bfloat16", 32768, q_per_kv=1),
    Case("bfloat16", 32768, q_per_kv=8),
    Case("bfloat16", 32768, q_per_kv=16, kv_heads=2),
    Case("bfloat16", 32768, rows=4),
    Case("bfloat16", 32768, dim=64),
    Case("bfloat16", 32768, dim=256, kv_heads=4),
    Case("bfloat16", 131072),
    Case("bfloat16", 2048),
    Case("float16", 32768),
    Case("float32", 32768, kv_heads=4),
)


def contestants(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Callable[[], Any]]:
    """The same attention, computed by us and in every way torch offers."""
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    packed = q.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    sdpa = scaled_dot_product_attention

    def matmul() -> Tensor:
        scores = packed @ k.transpose(-1, -2) * scale
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    def matmul_keys_first() -> Tensor:
        scores = (k @ packed.transpose(-1, -2)).transpose(-1, -2) * scale
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    return {
        "native": lambda: native.attend(q, k, v, scale=scale),
        "torch flash": lambda: flash(q, k, v, 0.0, False, scale=scale),
        "torch flash, packed": lambda: flash(packed, k, v, 0.0, False, scale=scale),
        "torch sdpa, enable_gqa": lambda: sdpa(q, k, v, scale=scale, enable_gqa=True),
        "torch sdpa, packed": lambda: sdpa(packed, k, v, scale=scale),
        "torch matmul, packed": matmul,
        "torch matmul, keys first": matmul_keys_first,
    }


def verify(case: Case) -> None:
    """Raises AssertionError unless the native kernel follows the numerics rule."""
    q, k, v = case.tensors(CHECKED_KEYS)
    how: dict[str, Any] = {"scale": 1 / math.sqrt(case.dim)}
    found, same, exact = (
        native.attend(q, k, v, **how),
        eager(q, k, v, **how),
        oracle(q, k, v, **how),
    )
    check(found.out, same.out, exact.out)


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant, `rounds` of them each, in random order."""
    q, k, v = case.tensors(case.keys)
    runs = contestants(q, k, v, 1 / math.sqrt(case.dim))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        names = list(runs)
        random.shuffle(names)
        for name in names:
            # What a contestant leaves spinning in torch's thread pool is not the next one's time.
            time.sleep(0.01)
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def rows_of(case: Case, times: dict[str, list[float]], read_rate: float) -> list[dict[str, Any]]:
    itemsize = getattr(torch, case.dtype).itemsize
    nbytes = 2 * case.kv_heads * case.keys * case.dim * itemsize
    rows = []
    for name, found in times.items():
        p20, median, p80 = (quantile(found, share) for share in (0.2, 0.5, 0.8))
        rows.append(
            {
                **asdict(case),
                "contestant": name,
                "kv_bytes": nbytes,
                "floor_s": nbytes / read_rate,
                "min_s": min(found),
                "p20_s": p20,
                "median_s": median,
                "p80_s": p80,
                "gb_per_s": nbytes / median / 1e9,
            }
        )
    return rows


def quantile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=10, method="inclusive")[round(share * 10) - 1]


def show(case: Case, rows: list[dict[str, Any]]) -> None:
    ours = rows[0]
    best = min(rows[1:], key=lambda row: row["median_s"])
    least = min(row["min_s"] for row in rows[1:])
    print(f"\n{case}: floor {ours['floor_s'] * 1e3:.2f} ms")
    for row in rows:
        print(
            f"  {row['contestant']:26} {row['median_s'] * 1e3:9.2f} ms"
            f"  (p20 {row['p20_s'] * 1e3:8.2f}, p80 {row['p80_s'] * 1e3:8.2f})"
            f"  {row['gb_per_s']:6.1f} GB/s"
        )
    print(
        f"  native is {best['median_s'] / ours['median_s']:.1f} x as fast as torch's best by medians"
        f" ({best['contestant']}), {least / ours['min_s']:.1f} x by minima",
        flush=True,
    )


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""

    def field(name: str) -> str:
        lines = (
            line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(name)
        )
        return next(lines, "")

    return {
        "cpu": field("model name") or platform.processor(),
        "cpu_family": field("cpu family"),
        "cpu_model": field("model\t"),
        "cores": torch.get_num_threads(),
        "native_level": native.level(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def read_rate(memory: Tensor) -> float:
    """Bytes per second at which the threads of the native kernel read memory."""
    return memory.nbytes / min(
        native.read_seconds(memory.data_ptr(), memory.nbytes) for _ in range(5)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)
    memory = torch.ones(READ_BYTES, dtype=torch.uint8)
    rates, loads = [read_rate(memory)], [os.getloadavg()[0]]
    print(f"{machine()}\nmemory read: {rates[0] / 1e9:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    for case in CASES:
        verify(case)
        found = rows_of(case, measure(case, options.rounds), rates[0])
        show(case, found)
        rows += found
    rates.append(read_rate(memory))
    loads.append(os.getloadavg()[0])
    print(f"\nmemory read afterwards: {rates[1] / 1e9:.1f} GB/s")
    if max(rates) > MACHINE_CHANGES * min(rates):
        raise SystemExit("the machine changed while this ran: run it again when others are quiet")
    if options.out:
        report = {
            "command": "python benchmarks/native_kernel.py",
            "machine": machine(),
            "rounds": options.rounds,
            "load_average": loads,
            "read_gb_per_s": [rate / 1e9 for rate in rates],
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
