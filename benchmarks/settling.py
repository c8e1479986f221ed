# SPDX-License-Identifier: Apache-2.0
"""The first tokens after a context, one by one, while the CPU's share of the heads settles: what the
host took to enqueue each, what it took in all, and how many heads the CPU attended.

    python benchmarks/settling.py --tokens 131072 --gpu-memory 24GiB --kv-format lossless
    python benchmarks/settling.py --shape tiny --tokens 4096 --device cpu --count 6

Random weights, and random keys and values for the context. No heads are resident.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3-8B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--gpu-memory")
    parser.add_argument("--kv-format", choices=("exact", "lossless"), default="exact")
    given = parser.parse_args()
    model = build(SHAPES[given.shape], "bfloat16", given.device)
    options: dict[str, Any] = {"kv_format": given.kv_format, "resident_heads": 0}
    if given.gpu_memory is not None:
        options["gpu_memory"] = given.gpu_memory
    if given.device == "cpu":  # there nothing adapts
        options |= {"staging": True, "near_data": 0.5}
    one = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    expected = given.tokens + given.count
    with torch.no_grad(), headinfer.attach(model, expected_tokens=expected, **options) as run:
        cache = simulate_context(model, run.new_cache(), given.tokens)
        print("token  host ms  all ms  heads of the CPU")
        for number in range(given.count):
            settle(model.device)
            started = time.perf_counter()
            model(input_ids=one, logits_to_keep=1, **cache_argument(model, cache))
            host = time.perf_counter() - started
            settle(model.device)
            whole = time.perf_counter() - started
            print(
                f"{number:5} {1e3 * host:8.1f} {1e3 * whole:7.1f} {cache.stats().near_heads:6}",
                flush=True,
            )
        cache.close()


if __name__ == "__main__":
    main()
