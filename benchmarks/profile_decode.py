# SPDX-License-Identifier: Apache-2.0
"""Where a decode step's time goes: host profile of stock, resident and streamed decode.

    python benchmarks/profile_decode.py --tokens 32768

Random keys and values stand for the context (`headinfer.mp.mp_simulate_decode`'s way), so only
decoding is timed.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from typing import Any

import torch
from first_light import LLAMA3_8B, build
from transformers import DynamicCache

import headinfer
from headinfer.hf.simulate import simulate_context


@torch.no_grad()
def steps(model: Any, cache: Any, count: int) -> float:
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    for _ in range(3):
        model(token, past_key_values=cache, use_cache=True)
    torch.cuda.synchronize()  # noqa: TID251  a clock has to see finished work
    start = time.perf_counter()
    for _ in range(count):
        model(token, past_key_values=cache, use_cache=True)
    torch.cuda.synchronize()  # noqa: TID251
    return (time.perf_counter() - start) / count


@torch.no_grad()
def stock(model: Any, tokens: int) -> Any:
    cache = DynamicCache(config=model.config)
    block = torch.randn(1, 8, tokens, 128, device=model.device).bfloat16()
    for index in range(model.config.num_hidden_layers):
        cache.update(block, block, index)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    model = build(LLAMA3_8B, "cuda")
    model.set_attn_implementation("sdpa")
    cache = stock(model, args.tokens)
    print(f"resident DynamicCache, sdpa: {steps(model, cache, args.steps) * 1e3:.1f} ms a token")
    del cache
    torch.cuda.empty_cache()
    for name, residents in (("resident", 8), ("streamed", 0)):
        options = {"expected_tokens": args.tokens + 1000, "resident_heads": residents}
        with headinfer.attach(model, **options) as run:
            cache = simulate_context(model, run.new_cache(), args.tokens)
            seconds = steps(model, cache, args.steps)
            loaded = cache.stats().loaded_bytes
            profile = cProfile.Profile()
            profile.enable()
            with torch.no_grad():
                for _ in range(args.steps):
                    model(
                        torch.zeros((1, 1), dtype=torch.long, device="cuda"),
                        past_key_values=cache,
                        use_cache=True,
                    )
            profile.disable()
            moved = (cache.stats().loaded_bytes - loaded) / args.steps
            print(f"{name}: {seconds * 1e3:.1f} ms a token, {moved / seconds / 1e9:.1f} GB/s")
            pstats.Stats(profile).sort_stats("tottime").print_stats(32)
            cache.close()


if __name__ == "__main__":
    main()
