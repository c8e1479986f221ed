# SPDX-License-Identifier: Apache-2.0
"""Keys and values on disk: what decode reads per second beside what the disk gives, and what host
memory a run takes.

    python benchmarks/disk.py --disk FOLDER --out benchmarks/results/NAME.json
    python benchmarks/disk.py --disk FOLDER --shape llama3-8b --device cuda --gpu-memory 24GiB \\
        --host-memory 16GiB --tokens 262144 --out benchmarks/results/NAME.json

Weights, keys and values are random. The cache is filled layer by layer without a prefill, which
would take hours on a CPU; decode steps then are the model's own. Between steps the same bytes of
the same file are read with direct I/O as fast as they come, by plain threads and by the tier's own,
and the faster of both is what the disk gives: on shared disks the rate changes from minute to
minute, and only what is measured side by side can be compared. The resident set
is sampled 50 times a second, and counted from before the cache existed.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import headinfer
from headinfer.budget import MIB, parse_bytes
from headinfer.hf.cache_name import cache_argument
from headinfer.hf.peak import PeakMemory
from headinfer.hf.remembered import machine_name
from headinfer.tiers.disk_queue import Op

SHAPES = {
    # 32 KiB of keys and values a token: 8 GiB at 256K tokens.
    "small": {"hidden": 256, "inner": 512, "layers": 8, "heads": 32, "vocab": 256},
    "llama3-8b": {"hidden": 4096, "inner": 14336, "layers": 32, "heads": 32, "vocab": 128256},
}
KV_HEADS, DIM = 8, 128
FILL_TOKENS = 1024
RAW = ((1, 4), (1, 16), (1, 32), (4, 16))
"""MiB and threads of plain reads; the fastest of them is what the disk gives."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disk", required=True, metavar="FOLDER")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--host-memory", default="2GiB")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--near-data", type=float)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="decode steps between plain reads")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = build(given.shape, given.device)
    found = measure(model, given)
    text = json.dumps(found, indent=1).replace(given.disk, "FOLDER")
    if given.out is not None:
        given.out.write_text(text + "\n")
    print(text)


def build(shape: str, device: str) -> LlamaForCausalLM:
    """Random weights, in the type that models have."""
    size = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        vocab_size=size["vocab"],
        max_position_embeddings=2**21,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def measure(model: LlamaForCausalLM, given: argparse.Namespace) -> dict[str, Any]:
    device, process = model.device, psutil.Process()
    step = torch.ones((1, 1), dtype=torch.long, device=device)
    model(step)  # kernels and thread pools exist
    before = process.memory_info().rss
    budgets = {"host_memory": given.host_memory, "disk": given.disk}
    if given.gpu_memory is not None:
        budgets["gpu_memory"] = given.gpu_memory
    if given.near_data is not None:
        budgets["near_data"] = given.near_data
    with headinfer.attach(model, expected_tokens=given.tokens + 64, **budgets) as run:
        print(run.plan, flush=True)
        with PeakMemory(device) as peak:  # plain reads have buffers of their own: not among them
            cache = run.new_cache()
            fill_s = fill(model, cache, given.tokens)
            for _ in range(5):  # the share of the CPU settles, the order of layers is known
                timed(model, cache, step)
        disk = cache.backing.runner._provision.disk
        raw_best = max(RAW, key=lambda how: raw_rate(disk, *how)) if disk else None
        steps, raws, queued = [], [], []
        for _ in range(given.rounds):
            if disk:
                raws.append(raw_rate(disk, *raw_best))
                queued.append(queue_rate(disk))
            for _ in range(given.steps):
                steps.append(timed(model, cache, step))
        stats, plan = cache.stats().as_dict(), run.plan.as_dict()
        refused = None if disk is None else disk.direct_refused
    seconds = statistics.median(found["seconds"] for found in steps)
    rate = statistics.median(found["disk_bytes"] / found["seconds"] for found in steps)
    growth, budget = peak.host_bytes - before, parse_bytes(given.host_memory)
    result = {
        "machine": machine_name(device),
        "kernel": platform.release(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "headinfer": headinfer.__version__,
        "shape": given.shape,
        "tokens": given.tokens,
        "kv_bytes": 2 * KV_HEADS * DIM * 2 * SHAPES[given.shape]["layers"] * given.tokens,
        "host_budget_bytes": budget,
        "host_growth_bytes": growth,
        "host_growth_of_budget": growth / budget,
        "gpu_peak_bytes": peak.gpu_bytes,
        "fill_s": fill_s,
        "step_s": seconds,
        "disk_bytes_per_step": steps[-1]["disk_bytes"],
        "disk_bytes_s": rate,
        "steps": steps,
        "direct_refused": refused,
        "load_average": os.getloadavg(),
        "plan": plan,
        "stats": stats,
    }
    if raws:
        best = [max(pair) for pair in zip(raws, queued, strict=True)]
        raw = statistics.median(best)
        pairs = [rate_of(steps, i, given.steps) / best[i] for i in range(len(best))]
        result |= {
            "raw_bytes_s": raw,
            "raw_threads_bytes_s": raws,
            "raw_queue_bytes_s": queued,
            "raw_read": {"mib": raw_best[0], "threads": raw_best[1]},
            "of_raw": statistics.median(pairs),
            "of_raw_all": pairs,
            "step_floor_s": steps[-1]["disk_bytes"] / raw,
        }
    return result


def rate_of(steps: list[dict[str, float]], place: int, count: int) -> float:
    """Bytes/s of the steps of one round."""
    mine = steps[place * count : (place + 1) * count]
    return sum(found["disk_bytes"] for found in mine) / sum(found["seconds"] for found in mine)


def fill(model: LlamaForCausalLM, cache: headinfer.HeadCache, tokens: int) -> float:
    """Random keys and values of `tokens` tokens in every layer; seconds it took."""
    started = time.perf_counter()
    k, v = (
        torch.randn((1, KV_HEADS, FILL_TOKENS, DIM), dtype=model.dtype, device=model.device)
        for _ in range(2)
    )
    for start in range(0, tokens, FILL_TOKENS):
        part = slice(0, min(FILL_TOKENS, tokens - start))
        for layer in range(model.config.num_hidden_layers):
            cache.update(k[:, :, part].roll(layer, 2), v[:, :, part], layer)
    return time.perf_counter() - started


def timed(
    model: LlamaForCausalLM, cache: headinfer.HeadCache, step: torch.Tensor
) -> dict[str, float]:
    """One decode step: its seconds, and the bytes it read from disk."""
    before, started = cache.stats().disk_read_bytes, time.perf_counter()
    model(step, **cache_argument(model, cache)).logits.float().sum().item()  # waits for the device
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "disk_bytes": cache.stats().disk_read_bytes - before}


def raw_rate(disk: Any, mib: int, threads: int) -> float:
    """Bytes/s of plain reads of everything in the file, by threads with a buffer each."""
    block = mib * MIB
    starts = range(0, disk.used_bytes - block + 1, block)
    buffers = [mmap.mmap(-1, block) for _ in range(threads)]

    def read(place: int) -> None:
        for start in starts[place::threads]:
            os.preadv(disk._descriptor, [buffers[place]], start)

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(read, range(threads)))
        return len(starts) * block / (time.perf_counter() - started)


def queue_rate(disk: Any) -> float:
    """Bytes/s of the same by the tier's own threads, with nothing but reads to do."""
    block, ahead = 8 * MIB, 8
    memory = mmap.mmap(-1, block * ahead)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    starts = range(0, disk.used_bytes - block + 1, block)
    jobs: list[int] = []
    started = time.perf_counter()
    for place, start in enumerate(starts):
        if place >= ahead:
            disk.over(jobs[place - ahead], block=True)
        jobs.append(disk.read([Op(start, address + place % ahead * block, block)]))
    for job in jobs[-ahead:]:
        disk.over(job, block=True)
    return len(starts) * block / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
