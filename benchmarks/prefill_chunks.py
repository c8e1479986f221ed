# SPDX-License-Identifier: Apache-2.0
"""Where the chunks of a prompt lose time to making host memory: the same prompt again and again, with
memory made while it is read, and with memory that an earlier run left.

    python benchmarks/prefill_chunks.py --tokens 131072 --chunk 8192 --gpu-memory 24GiB
    python benchmarks/prefill_chunks.py --shape tiny --tokens 8192 --chunk 512 --device cpu

Random weights. Prints, for each run, the seconds of all chunks together, those of every chunk by the
device's clock, when the host had enqueued each, and what making host memory took. The first run also
compiles kernels and lets cuDNN build plans, so it is the runs after it that compare.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

import torch

import headinfer
from headinfer.bench.clock import Marks
from headinfer.bench.models import build
from headinfer.bench.shapes import SHAPES
from headinfer.budget import parse_bytes
from headinfer.hf.cache_name import cache_argument
from headinfer.tiers import host

KEPT: dict[int, list[Any]] = defaultdict(list)
Mapping = host._Mapping


class Kept(Mapping):
    """A mapping that goes to whoever wants one of its size next, instead of back to the system."""

    def release(self) -> None:
        KEPT[self.bytes.numel()].append(self)


def kept(size: int, *, pin: bool, touch: host.Touch | None) -> Any:
    if KEPT[size]:
        found = KEPT[size].pop()
        found.seconds = 0.0
        return found
    return Kept(size, pin=pin, touch=touch)


@torch.inference_mode()
def read(model: Any, name: str, tokens: int, chunk: int | None, options: dict[str, Any]) -> None:
    ids = torch.randint(0, 1000, (1, tokens), device=model.device)
    with headinfer.attach(model, expected_tokens=tokens, **options) as run:
        size = chunk or run.plan.chunk_tokens
        cache, marks, hosts = run.new_cache(), Marks(model.device), []
        started = time.perf_counter()
        marks.add()
        for part in ids.split(size, dim=1):
            model(input_ids=part, logits_to_keep=1, **cache_argument(model, cache))
            marks.add()
            hosts.append(time.perf_counter() - started)
        spans = marks.between()
        made = cache.backing.runner.host_memory
        print(
            f"{name}: {sum(spans):.2f} s, {sum(run.plan.resident_heads)} heads resident; host memory: "
            f"{made.made_bytes / 2**30:.2f} GiB in {made.made_s:.2f} s, {made.waited_s:.2f} of them waited "
            f"for\n  chunks, ms: {' '.join(f'{1e3 * x:.0f}' for x in spans)}"
            f"\n  enqueued after, ms: {' '.join(f'{1e3 * x:.0f}' for x in hosts)}",
            flush=True,
        )
        cache.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3-8B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--chunk", type=int, help="tokens per chunk; by default the plan's")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--kv-format", choices=("exact", "lossless"), default="exact")
    parser.add_argument("--resident-heads", type=int)
    given = parser.parse_args()
    model = build(SHAPES[given.shape], "bfloat16", given.device)
    names = ("gpu_memory", "kv_format", "resident_heads")
    options = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if given.device == "cpu":
        options["staging"] = True
    elif given.gpu_memory is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        cap = parse_bytes(given.gpu_memory)
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    how = given.tokens, given.chunk, options
    read(model, "the first", *how)
    read(model, "memory made meanwhile", *how)
    host._Mapping = kept  # type: ignore[assignment, misc]
    read(model, "memory made meanwhile, and kept", *how)
    read(model, "memory kept", *how)


if __name__ == "__main__":
    main()
