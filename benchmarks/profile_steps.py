# SPDX-License-Identifier: Apache-2.0
"""Where a forward pass's time goes: stock, resident and streamed, one token or one chunk.

    python benchmarks/profile_steps.py --context 120000 --new 8192
    python benchmarks/profile_steps.py --context 32768 --new 1

Random keys and values stand for the context, so only the pass itself is timed. Prints wall time,
then the host functions and the GPU kernels that took longest.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from typing import Any

import torch
from first_light import LLAMA3_8B, build
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import headinfer
from headinfer.hf.cache_name import cache_argument
from headinfer.hf.simulate import simulate_context


@torch.no_grad()
def passes(model: Any, cache: Any, new: int, count: int) -> float:
    """Seconds of one pass over `new` tokens; each starts from the same context."""
    tokens = torch.randint(0, 1000, (1, new), device=model.device)
    torch.cuda.synchronize()  # noqa: TID251  a clock has to see finished work
    start = time.perf_counter()
    for _ in range(count):
        model(tokens, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
    torch.cuda.synchronize()  # noqa: TID251
    return (time.perf_counter() - start) / count


@torch.no_grad()
def stock(model: Any, tokens: int) -> Any:
    cache = DynamicCache(config=model.config)
    block = torch.randn(1, 8, tokens, 128, device=model.device).bfloat16()
    for index in range(model.config.num_hidden_layers):
        cache.update(block, block, index)
    return cache


def kernels(model: Any, cache: Any, new: int) -> None:
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        passes(model, cache, new, 1)
    print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=16))


def host(model: Any, cache: Any, new: int) -> None:
    trace = cProfile.Profile()
    trace.enable()
    passes(model, cache, new, 1)
    trace.disable()
    pstats.Stats(trace).sort_stats("tottime").print_stats(24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--new", type=int, default=1)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--stock", action="store_true", help="time the resident cache as well")
    args = parser.parse_args()
    model = build(LLAMA3_8B, "cuda")
    if args.stock:
        model.set_attn_implementation("sdpa")
        cache = stock(model, args.context)
        passes(model, cache, args.new, 1)
        seconds = passes(model, cache, args.new, args.passes)
        print(f"resident DynamicCache, sdpa: {seconds * 1e3:.1f} ms a pass")
        del cache
        torch.cuda.empty_cache()
    total = args.context + (2 * args.passes + 4) * args.new
    for name, residents in (("resident", 8), ("streamed", 0)):
        with headinfer.attach(model, expected_tokens=total, resident_heads=residents) as run:
            cache = simulate_context(model, run.new_cache(), args.context)
            passes(model, cache, args.new, 2)
            loaded = cache.stats().loaded_bytes
            seconds = passes(model, cache, args.new, args.passes)
            moved = (cache.stats().loaded_bytes - loaded) / args.passes
            print(f"{name}: {seconds * 1e3:.1f} ms a pass, {moved / seconds / 1e9:.1f} GB/s in")
            kernels(model, cache, args.new)
            host(model, cache, args.new)
            cache.close()


if __name__ == "__main__":
    main()
