# SPDX-License-Identifier: Apache-2.0
"""Keys and values on disk: what decode reads per second beside what the disk gives, and what host
memory a run takes.

    python benchmarks/disk.py --disk FOLDER --out benchmarks/results/NAME.json
    python benchmarks/disk.py --disk FOLDER --kv-format both --tokens 65536 --host-memory 512MiB
    python benchmarks/disk.py --disk FOLDER --shape llama3-8b --device cuda --gpu-memory 24GiB \\
        --host-memory 16GiB --tokens 262144 --out benchmarks/results/NAME.json

With `--kv-format both` two caches of the same keys and values, one of each format, take turns: whatever
else the machine does meanwhile, it does to both. Weights, keys and values are random, normal in bfloat16,
which packs like a model's own (docs/lossless.md). The cache is filled layer by layer without a prefill, which
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
    parser.add_argument("--kv-format", choices=("exact", "lossless", "both"), default="exact")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="decode steps between plain reads")
    parser.add_argument("--settle", type=int, default=5, help="decode steps before any counts")
    parser.add_argument("--raw", help="bytes of the file that plain reads read; by default all")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = build(given.shape, given.device)
    found = compare(model, given) if given.kv_format == "both" else measure(model, given)
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
    budgets = budgets_of(given)
    with headinfer.attach(
        model, expected_tokens=given.tokens + 64, kv_format=given.kv_format, **budgets
    ) as run:
        print(run.plan, flush=True)
        with PeakMemory(device) as peak:  # plain reads have buffers of their own: not among them
            cache = run.new_cache()
            fill_s = fill(model, cache, given.tokens)
            for _ in range(given.settle):  # the CPU's share settles, the order of layers is known
                timed(model, cache, step)
        disk = cache.backing.runner._provision.disk
        some = None if given.raw is None else parse_bytes(given.raw)
        raw_best = max(RAW, key=lambda how: raw_rate(disk, *how, some)) if disk else None
        steps, raws, queued = [], [], []
        for _ in range(given.rounds):
            if disk:
                raws.append(raw_rate(disk, *raw_best, some))
                queued.append(queue_rate(disk, some))
            for _ in range(given.steps):
                steps.append(timed(model, cache, step))
        stats, plan = cache.stats().as_dict(), run.plan.as_dict()
        refused = None if disk is None else disk.direct_refused
    seconds = statistics.median(found["seconds"] for found in steps)
    rate = statistics.median(found["disk_bytes"] / found["seconds"] for found in steps)
    growth, budget = peak.host_bytes - before, parse_bytes(given.host_memory)
    result = {
        **case_of(model, given),
        "kv_format": given.kv_format,
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


def budgets_of(given: argparse.Namespace) -> dict[str, Any]:
    found = {"host_memory": given.host_memory, "disk": given.disk}
    if given.gpu_memory is not None:
        found["gpu_memory"] = given.gpu_memory
    if given.near_data is not None:
        found["near_data"] = given.near_data
    return found


def case_of(model: LlamaForCausalLM, given: argparse.Namespace) -> dict[str, Any]:
    """What was measured, where."""
    return {
        "machine": machine_name(model.device),
        "kernel": platform.release(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "headinfer": headinfer.__version__,
        "shape": given.shape,
        "tokens": given.tokens,
        "kv_bytes": 2 * KV_HEADS * DIM * 2 * SHAPES[given.shape]["layers"] * given.tokens,
        "host_budget_bytes": parse_bytes(given.host_memory),
    }


@torch.inference_mode()
def compare(model: LlamaForCausalLM, given: argparse.Namespace) -> dict[str, Any]:
    """Decode steps of both formats in turns, and plain reads of the exact one's file between them."""
    step = torch.ones((1, 1), dtype=torch.long, device=model.device)
    runs: dict[str, dict[str, Any]] = {}
    caches: dict[str, headinfer.HeadCache] = {}
    refused: dict[str, str | None] = {}
    for name in ("exact", "lossless"):
        torch.manual_seed(0)
        with headinfer.attach(
            model, expected_tokens=given.tokens + 64, kv_format=name, **budgets_of(given)
        ) as run:
            print(run.plan, flush=True)
            caches[name] = run.new_cache()
            filled = fill(model, caches[name], given.tokens)
            for _ in range(3):
                timed(model, caches[name], step)
            disk = caches[name].backing.runner._provision.disk
            refused[name] = disk.direct_refused
            runs[name] = {"plan": run.plan.as_dict(), "fill_s": filled, "steps": []}
    file = caches["exact"].backing.runner._provision.disk
    raws = []
    with headinfer.attach(model, expected_tokens=given.tokens + 64, **budgets_of(given)):
        for turn in range(given.rounds):
            raws.append(queue_rate(file))
            names = list(caches)[:: 1 if turn % 2 else -1]
            for name in names:
                for _ in range(given.steps):
                    runs[name]["steps"].append(timed(model, caches[name], step))
    for name, cache in caches.items():
        found = runs[name]
        found["stats"] = cache.stats().as_dict()
        found["step_s"] = statistics.median(one["seconds"] for one in found["steps"])
        found["disk_bytes_per_step"] = found["steps"][-1]["disk_bytes"]
        cache.close()
    pairs = [
        packed["seconds"] / exact["seconds"]
        for exact, packed in zip(runs["exact"]["steps"], runs["lossless"]["steps"], strict=True)
    ]
    return {
        **case_of(model, given),
        "formats": runs,
        "lossless_of_exact_s": statistics.median(pairs),
        "lossless_of_exact_s_all": pairs,
        "raw_queue_bytes_s": raws,
        "direct_refused": refused["exact"],
        "load_average": os.getloadavg(),
    }


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


def raw_rate(disk: Any, mib: int, threads: int, some: int | None = None) -> float:
    """Bytes/s of plain reads of everything in the file, or the first `some` bytes, by threads with a
    buffer each."""
    block = mib * MIB
    starts = range(0, min(disk.used_bytes, some or disk.used_bytes) - block + 1, block)
    buffers = [mmap.mmap(-1, block) for _ in range(threads)]

    def read(place: int) -> None:
        for start in starts[place::threads]:
            os.preadv(disk._descriptor, [buffers[place]], start)

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(read, range(threads)))
        return len(starts) * block / (time.perf_counter() - started)


def queue_rate(disk: Any, some: int | None = None) -> float:
    """Bytes/s of the same by the tier's own threads, with nothing but reads to do."""
    block, ahead = 8 * MIB, 8
    memory = mmap.mmap(-1, block * ahead)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    starts = range(0, min(disk.used_bytes, some or disk.used_bytes) - block + 1, block)
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
