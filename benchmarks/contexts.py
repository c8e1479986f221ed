# SPDX-License-Identifier: Apache-2.0
"""What saved contexts cost and save: checkpoints while reading, and the first token of a second
question against reading again.

    python benchmarks/contexts.py --tokens 8000 --repeats 2 --out benchmarks/results/NAME.json

The demo model on the CPU. Plain and saved readings alternate; wall and processor seconds of each
are kept, because on a shared machine the former are noise. What the writer's thread computed is
what checkpoints take from the model where there is no core to spare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import headinfer
from headinfer.hf import contexts
from headinfer.hf.cache_name import cache_argument
from headinfer.hf.load import load_model
from headinfer.snapshot import ContextWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--every", default="30s")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    contexts.ContextWriter = _Noted  # type: ignore[misc]
    model, tokenizer = load_model("demo", device="cpu")
    text = (Path(headinfer.__file__).parent / "data" / "small_desk.md").read_text()
    ids = tokenizer(text * 20, return_tensors="pt")["input_ids"][:, : given.tokens]
    question = tokenizer("\n\nQuestion: Where was the key?\nAnswer:", return_tensors="pt")
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokens": ids.shape[1],
        "checkpoint_every": given.every,
        "load_average_at_start": os.getloadavg(),
        "readings": [],
        "second_question": [],
    }
    folder = Path(tempfile.mkdtemp()) / "book.ctx"
    with headinfer.attach(model, expected_tokens=ids.shape[1] + 64) as run, torch.inference_mode():
        warm = run.new_cache()
        headinfer.prefill(model, ids[:, :512], warm)
        for _ in range(given.repeats):
            for saved in (False, True):
                shutil.rmtree(folder, ignore_errors=True)
                found["readings"].append(_reading(model, run, ids, folder, saved, given.every))
                print(json.dumps(found["readings"][-1]), flush=True)
        for _ in range(5):
            found["second_question"].append(_ask(model, folder, ids, question["input_ids"]))
            print(json.dumps(found["second_question"][-1]), flush=True)
    plain = min(item["wall_s"] for item in found["readings"] if not item["saved"])
    asked = sorted(item["first_token_s"] for item in found["second_question"])[2]
    found["times_sooner"] = plain / asked
    shutil.rmtree(folder.parent)
    text = json.dumps(found, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


def _reading(
    model: Any, run: Any, ids: torch.Tensor, folder: Path, saved: bool, every: str
) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    writers.clear()
    if saved:
        headinfer.read_context(model, ids, folder, checkpoint_every=every)
    else:
        headinfer.prefill(model, ids, run.new_cache())
    return {
        "saved": saved,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "writer_s": sum(writer.seconds for writer in writers),
        "writer_cpu_s": sum(writer.cpu_seconds for writer in writers),
        "written_bytes": sum(writer.written_bytes for writer in writers),
    }


writers: list[ContextWriter] = []


class _Noted(ContextWriter):
    """Kept until the reading is over, to be asked."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        writers.append(self)


def _ask(model: Any, folder: Path, ids: torch.Tensor, question: torch.Tensor) -> dict[str, Any]:
    """Open the context and choose a first token; blocks are checked on the way."""
    wall = time.perf_counter()
    cache = headinfer.load_context(model, folder)
    opened = time.perf_counter() - wall
    full = torch.cat([ids, question], dim=1)
    model.generate(
        input_ids=full,
        attention_mask=torch.ones_like(full),
        **cache_argument(model, cache),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
    )
    return {"open_s": opened, "first_token_s": time.perf_counter() - wall}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
