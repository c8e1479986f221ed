# SPDX-License-Identifier: Apache-2.0
"""The native kernel over packed keys and values beside itself over plain ones, in one run.

    python benchmarks/packed_kernel.py --out benchmarks/results/packed-kernel.json

Decode over many layers' keys and values, so that none of them is in a cache when its turn comes; and
over so few that all are, which is what a core can do where memory is no limit. Calls take turns in random
order, and the processor seconds that they took are reported beside those of the clock: on a machine
that others use too, these say more. What the same threads only read, of the same memory, is beside
both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from native_kernel import machine
from torch import Tensor

from headinfer.attention import native, packed
from headinfer.attention.packed import PackedRun
from headinfer.formats.overflow import Overflow
from headinfer.layout import BLOCK_TOKENS

KV_HEADS, DIM = 8, 128
CACHED_KEYS = 1024
"""Two megabytes of keys for all heads."""

READ_EVERY = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One decode call of a batch of one; `layers` of them have keys and values of their own."""

    keys: int
    q_per_kv: int
    layers: int
    threads: int


@dataclass(frozen=True, slots=True)
class Layer:
    """The same keys and values twice."""

    k: Tensor
    v: Tensor
    packed_k: PackedRun
    packed_v: PackedRun


def layer(case: Case, generator: torch.Generator) -> Layer:
    shape = (1, KV_HEADS, case.keys, DIM)
    k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in "kv")
    return Layer(k, v, pack(k), pack(v))


def pack(values: Tensor) -> PackedRun:
    """values [1, h, t, d] as packed blocks."""
    overflow = Overflow(
        DIM,
        lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
        torch.device("cpu"),
        wait=lambda ticket, block: True,
        ahead=1,
    )
    blocks = values.shape[2] // BLOCK_TOKENS
    overflow.reserve(KV_HEADS * blocks)
    slots = torch.empty((KV_HEADS, 1, blocks, overflow.layout.slot_bytes), dtype=torch.uint8)
    run = PackedRun(slots, overflow)
    packed.encode(values.transpose(0, 1), run)
    return run


def measure(case: Case, layers: list[Layer], rounds: int) -> dict[str, Any]:
    """Seconds of both, of the clock and of processors, and what the threads read meanwhile."""
    q = torch.randn(1, KV_HEADS * case.q_per_kv, 1, DIM).bfloat16()
    scale = DIM**-0.5

    def plain(one: Layer) -> Any:
        return native.attend(q, one.k, one.v, scale=scale)

    def over_packed(one: Layer) -> Any:
        return packed.attend(q, one.packed_k, one.packed_v, None, None, keys=case.keys, scale=scale)

    work: dict[str, Callable[[Layer], Any]] = {"plain": plain, "packed": over_packed}
    for one in layers[:2]:
        if not torch.equal(plain(one).out, over_packed(one).out):
            raise SystemExit("packed attention does not have the bits of plain attention")
    clock: dict[str, list[float]] = {name: [] for name in work}
    processor: dict[str, list[float]] = {name: [] for name in work}
    reads, turn = [], 0
    for number in range(rounds):
        for name in random.sample(list(work), len(work)):
            one, turn = layers[turn % len(layers)], turn + 1
            began, used = time.perf_counter(), time.process_time()
            work[name](one)
            processor[name].append(time.process_time() - used)
            clock[name].append(time.perf_counter() - began)
        if number % READ_EVERY == 0:
            one, turn = layers[turn % len(layers)], turn + 1
            reads.append(one.k.nbytes / native.read_seconds(one.k.data_ptr(), one.k.nbytes))
    return {"clock": clock, "processor": processor, "read": reads}


def row(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    plain_bytes = 2 * KV_HEADS * case.keys * DIM * 2
    made: dict[str, Any] = {**asdict(case), "kv_bytes": plain_bytes}
    for kind in ("clock", "processor"):
        for name, seconds in found[kind].items():
            made[f"{name}_{kind}_median_s"] = statistics.median(seconds)
            made[f"{name}_{kind}_min_s"] = min(seconds)
        for of in ("median", "min"):
            made[f"ratio_{kind}_{of}"] = (
                made[f"plain_{kind}_{of}_s"] / made[f"packed_{kind}_{of}_s"]
            )
    made["read_median_gb_per_s"] = statistics.median(found["read"]) / 1e9
    made["read_max_gb_per_s"] = max(found["read"]) / 1e9
    return made


def show(made: dict[str, Any]) -> None:
    where = "from memory" if made["layers"] > 1 else "from the caches"
    print(
        f"\n{made['keys']:,} keys, {made['q_per_kv']} query heads per KV head, {made['threads']} "
        f"thread(s), {where}; read {made['read_median_gb_per_s']:.1f} "
        f"(most {made['read_max_gb_per_s']:.1f}) GB/s"
    )
    for name in ("plain", "packed"):
        clock, used = made[f"{name}_clock_median_s"], made[f"{name}_processor_median_s"]
        least = made[f"{name}_clock_min_s"]
        print(
            f"  {name:<7} {clock * 1e3:7.3f} ms (least {least * 1e3:7.3f}), {used * 1e3:7.3f} ms of "
            f"processors: {made['kv_bytes'] / used / 1e9:5.1f} GB/s of bfloat16"
        )
    print(
        f"  packed is {made['ratio_clock_median']:.2f} times as fast by medians, "
        f"{made['ratio_clock_min']:.2f} by minima, {made['ratio_processor_median']:.2f} and "
        f"{made['ratio_processor_min']:.2f} in processor time"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--keys", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--q-per-kv", type=int, nargs="+", default=[4, 1, 8])
    options = parser.parse_args()
    rows, loads = [], [os.getloadavg()[0]]
    for keys, count, factor in ((options.keys, options.layers, 1), (CACHED_KEYS, 1, 40)):
        generator = torch.Generator().manual_seed(0)
        layers: list[Layer] = []
        for threads in options.threads:
            native.set_threads(threads)
            for q_per_kv in options.q_per_kv:
                case = Case(keys, q_per_kv, count, threads)
                layers = layers or [layer(case, generator) for _ in range(count)]
                rows.append(row(case, measure(case, layers, factor * options.rounds)))
                show(rows[-1])
    loads.append(os.getloadavg()[0])
    if options.out:
        report = {
            "command": "python benchmarks/packed_kernel.py",
            "machine": machine(),
            "level": native.level(),
            "rounds": options.rounds,
            "load_average": loads,
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
