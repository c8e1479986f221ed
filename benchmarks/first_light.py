# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode of a Llama-3-8B shape under a GPU memory cap, and the check that it is exact.

    python benchmarks/first_light.py --out benchmarks/results/first_light.json

Random weights: memory, speed and exactness do not depend on their values. First the logits of a
32K prompt are held against the resident cache by the 2x rule (oracle: the same model in float32),
without the cap; then every length is prefilled and decoded under the cap.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StoppingCriteria

import headinfer
from headinfer.budget import GIB, format_bytes, parse_bytes
from headinfer.hf.cache_name import cache_argument
from headinfer.testing.numerics import within_rule

CHUNK_TOKENS = 8192

LLAMA3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=1_048_576,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    dtype="bfloat16",
)


class Clock(StoppingCriteria):
    """Wall time of every new token; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        _settle()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def build(config: LlamaConfig, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure(model: LlamaForCausalLM, tokens: int, new: int, **options: Any) -> dict[str, Any]:
    """One run through unmodified generate(); every figure is measured."""
    prompt = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    _empty()
    clock = Clock()
    with headinfer.attach(model, **options) as run:
        start = time.perf_counter()
        model.generate(
            prompt,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=[clock],
        )
        _settle()
        plan, stats = run.plan, run.stats.as_dict()
        if plan is None:
            raise RuntimeError("no plan was made")
        steps = [b - a for a, b in pairwise(clock.times)]
        row = {
            "contestant": "headinfer",
            "tokens": tokens,
            "new_tokens": new,
            "chunk_tokens": plan.chunk_tokens,
            "resident_heads": sum(plan.resident_heads),
            "offloaded_heads": plan.offloaded_heads,
            "ttft_s": clock.times[0] - start,
            "itl_first_s": steps[0],
            "itl_p20_s": _quantile(steps[1:], 0.2),
            "itl_p50_s": _quantile(steps[1:], 0.5),
            "itl_p80_s": _quantile(steps[1:], 0.8),
            "gpu_peak_allocated_bytes": _peak()[0],
            "gpu_peak_reserved_bytes": _peak()[1],
            "gpu_peak_predicted_bytes": plan.gpu_bytes,
            "gpu_parts_predicted": plan.gpu_parts,
            "host_predicted_bytes": plan.host_bytes,
            "pinned": run.cache is not None and run.cache.backing.runner.pin_failure is None,
            **stats,
        }
        if run.cache is not None:
            row["host_memory"] = run.cache.backing.runner.host_memory._asdict()
            run.cache.close()
    return row


def stock(model: LlamaForCausalLM, tokens: int, new: int, *, offloading: bool) -> dict[str, Any]:
    """transformers' own caches on the same model, chunk and cap."""
    prompt = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    row: dict[str, Any] = {
        "contestant": "transformers offloaded" if offloading else "transformers resident",
        "tokens": tokens,
        "new_tokens": new,
        "chunk_tokens": CHUNK_TOKENS,
    }
    model.set_attn_implementation("sdpa")
    _empty()
    clock, start = Clock(), time.perf_counter()
    try:
        model.generate(
            prompt,
            **cache_argument(model, DynamicCache(config=model.config, offloading=offloading)),
            prefill_chunk_size=CHUNK_TOKENS,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=[clock],
        )
    except torch.OutOfMemoryError as error:
        return {**row, "fits": False, "error": str(error).split(". ")[0]}
    steps = [b - a for a, b in pairwise(clock.times)]
    return {
        **row,
        "fits": True,
        "ttft_s": clock.times[0] - start,
        "itl_first_s": steps[0],
        "itl_p50_s": _quantile(steps[1:], 0.5),
        "gpu_peak_allocated_bytes": _peak()[0],
        "gpu_peak_reserved_bytes": _peak()[1],
    }


def exactness(config: LlamaConfig, device: str, tokens: int, chunk: int) -> dict[str, Any]:
    """Logits of the last 64 positions: headinfer and resident in bf16, float32 as the oracle."""
    model = build(config, device)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, config.vocab_size, (1, tokens), generator=generator).to(device)
    found = {}
    for name in ("headinfer", "headinfer, nothing resident", "resident"):
        cache: Any = DynamicCache(config=config)
        options: dict[str, Any] = {"expected_tokens": tokens}
        if name.endswith("nothing resident"):
            options["resident_heads"] = 0
        session = None if name == "resident" else headinfer.attach(model, **options)
        if session is None:
            model.set_attn_implementation("sdpa")
        else:
            cache = session.new_cache()
        found[name] = prefill(model, prompt, cache, chunk)
        if session is not None:
            cache.close()
            session.close()
        del cache
        _empty()
    model = model.float()
    model.set_attn_implementation("sdpa")
    oracle = prefill(model, prompt, DynamicCache(config=config), chunk).double()
    rows = {}
    for name in ("headinfer", "headinfer, nothing resident"):
        holds, error, bound = within_rule(found[name], found["resident"], oracle)
        rows[name] = {"holds": holds, "error": error, "bound": bound}
    resident = float((found["resident"].double() - oracle).abs().max())
    apart = float((found["headinfer"].double() - found["resident"].double()).abs().max())
    return {
        "tokens": tokens,
        "rule": rows,
        "resident_error": resident,
        "headinfer_against_resident": apart,
        "largest_logit": float(oracle.abs().max()),
        "argmax_equal": bool(
            (found["headinfer"].argmax(-1) == found["resident"].argmax(-1)).float().mean() == 1
        ),
    }


@torch.no_grad()
def prefill(model: LlamaForCausalLM, prompt: Tensor, cache: Any, chunk: int) -> Tensor:
    for part in prompt.split(chunk, dim=1):
        output = model(part, use_cache=True, logits_to_keep=64, **cache_argument(model, cache))
    return output.logits.float().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap", default="24GiB")
    parser.add_argument("--lengths", default="32768,65536,131072")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--check-tokens", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=CHUNK_TOKENS)
    parser.add_argument("--stock-tokens", type=int, default=5, help="new tokens of the baselines")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LLAMA3_8B
    if args.tiny:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1000}
        config = LlamaConfig(**{**LLAMA3_8B.to_dict(), **sizes, **heads, "head_dim": 32})
    report: dict[str, Any] = {
        "command": "python benchmarks/first_light.py",
        "shape": "Llama-3-8B, random weights, bfloat16, batch 1",
        "machine": machine(),
        "cap": args.cap,
        "rows": [],
    }
    report["exactness"] = exactness(config, device, args.check_tokens, args.chunk)
    print(json.dumps(report["exactness"]), flush=True)
    _empty()
    options: dict[str, Any] = {}
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(parse_bytes(args.cap) / total)
        options["gpu_memory"] = args.cap
    model = build(config, device)
    for tokens in map(int, args.lengths.split(",")):
        for residents in ({}, {"resident_heads": 0}):
            if residents and device == "cpu":
                continue
            row = measure(model, tokens, args.new_tokens, **options, **residents)
            row["nothing_resident"] = bool(residents)
            keep(report, row, args.out)
    for offloading in (False, True) if device == "cuda" else ():
        for tokens in map(int, args.lengths.split(",")):
            row = stock(model, tokens, args.stock_tokens, offloading=offloading)
            keep(report, row, args.out)
    over = [
        row["tokens"]
        for row in report["rows"]
        if row.get("gpu_peak_predicted_bytes", 0)
        and row["gpu_peak_allocated_bytes"] > row["gpu_peak_predicted_bytes"]
    ]
    if over or not all(rule["holds"] for rule in report["exactness"]["rule"].values()):
        raise SystemExit(f"peak above prediction at {over}, or logits beyond the rule")
    for row in report["rows"]:
        if row["contestant"] != "headinfer":
            continue
        print(
            f"{row['tokens']:>8,} tokens, {row['resident_heads']:>3} heads resident: "
            f"first token {row['ttft_s']:.2f} s, then {row['itl_p50_s'] * 1e3:.0f} ms a token, "
            f"peak {format_bytes(row['gpu_peak_allocated_bytes'])} "
            f"(predicted {format_bytes(row['gpu_peak_predicted_bytes'])}), "
            f"staging {format_bytes(row['staging_bytes'])}, "
            f"host {row['host_bytes'] / GIB:.2f} GiB"
        )


def keep(report: dict[str, Any], row: dict[str, Any], out: Path | None) -> None:
    report["rows"].append(row)
    print(json.dumps(row), flush=True)
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name(0) if gpu else None,
        "cpu_threads": torch.get_num_threads(),
        "host_gib": round(psutil.virtual_memory().total / GIB, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "headinfer": headinfer.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # noqa: TID251  a clock has to see finished work


def _empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> tuple[int, int]:
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


if __name__ == "__main__":
    main()
