# SPDX-License-Identifier: Apache-2.0
"""The first tokens after a context, one by one, while the CPU's share of the heads settles: what the
host took to enqueue each, what it took in all, how many heads the CPU attended, and at what rate.

    python benchmarks/settling.py --tokens 131072 --gpu-memory 24GiB --kv-format lossless
    python benchmarks/settling.py --shape tiny --tokens 4096 --device cpu --count 6

Random weights, and random keys and values for the context. No heads are resident, unless --planned.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import headinfer
from headinfer.bench.machine import settle
from headinfer.bench.models import build
from headinfer.bench.shapes import SHAPES
from headinfer.hf.cache_name import cache_argument
from headinfer.hf.simulate import simulate_context
from headinfer.near import Lap, NearData


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3-8B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--gpu-memory")
    parser.add_argument("--kv-format", choices=("exact", "lossless"), default="exact")
    parser.add_argument("--planned", action="store_true", help="as many heads resident as fit")
    given = parser.parse_args()
    model = build(SHAPES[given.shape], "bfloat16", given.device)
    options: dict[str, Any] = {"kv_format": given.kv_format}
    if not given.planned:
        options["resident_heads"] = 0
    laps: list[Lap] = []
    lap_of = NearData.lap

    def lap(near: NearData) -> Lap | None:
        found = lap_of(near)
        if found is not None:
            laps.append(found)
        return found

    NearData.lap = lap  # type: ignore[assignment, method-assign]
    if given.gpu_memory is not None:
        options["gpu_memory"] = given.gpu_memory
    if given.device == "cpu":  # there nothing adapts
        options |= {"staging": True, "near_data": 0.5}
    one = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    expected = given.tokens + given.count
    with torch.no_grad(), headinfer.attach(model, expected_tokens=expected, **options) as run:
        cache = simulate_context(model, run.new_cache(), given.tokens)
        print("token  host ms  all ms  heads of the CPU  GB/s of the one before")
        for number in range(given.count):
            settle(model.device)
            started = time.perf_counter()
            model(input_ids=one, logits_to_keep=1, **cache_argument(model, cache))
            host = time.perf_counter() - started
            settle(model.device)
            whole = time.perf_counter() - started
            last = laps[-1] if laps else None
            rate = last.near_bytes / last.near_s / 1e9 if last and last.near_s else 0.0
            print(
                f"{number:5} {1e3 * host:8.1f} {1e3 * whole:7.1f} {cache.stats().near_heads:6} {rate:8.1f}",
                flush=True,
            )
        cache.close()


if __name__ == "__main__":
    main()
