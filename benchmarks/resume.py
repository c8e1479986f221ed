# SPDX-License-Identifier: Apache-2.0
"""What a prefill that is interrupted and goes on costs, beside one that nobody disturbs.

    python benchmarks/resume.py --tokens 24000 --repeats 3 --out benchmarks/results/NAME.json

The demo model on the CPU. One process reads in one go and saves nothing; one reads with checkpoints
every 30 s and is killed, by SIGKILL, soon after one of them; one goes on from there. Processor
seconds of the children are compared, start of the program included in none: on a shared machine
wall seconds are noise. What was read twice, because it was not durable yet, is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import headinfer
from headinfer.hf import contexts
from headinfer.hf.cache_name import cache_given
from headinfer.hf.load import load_model
from headinfer.hf.remembered import machine_name
from headinfer.snapshot import Context, ContextWriter, exists


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--every", default="30s")
    parser.add_argument("--at", type=float, default=0.5, help="killed after this part of the text")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {
        "machine": machine_name(torch.device("cpu")),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokens": given.tokens,
        "checkpoint_every": given.every,
        "runs": [],
    }
    for _ in range(given.repeats):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "book.ctx"
            plain = child(given, None)
            first = child(given, path, killed=True)
            there = Context(path).manifest.tokens if exists(path) else 0
            second = child(given, path)
        run = {"plain": plain, "killed": first, "went_on": second, "durable_tokens": there}
        run["read_twice"] = first["tokens"] - there
        twice = seconds_between(first, there, first["tokens"])
        both = first["cpu_s"] + second["cpu_s"]
        run["overhead"] = both / plain["cpu_s"] - 1
        run["overhead_without_read_twice"] = (both - twice) / plain["cpu_s"] - 1
        # The same without noise: what is done besides forward passes, of what passes take.
        passes = sum(s for _, s in plain["passes"])
        beside = (
            first["cpu_s"]
            + second["cpu_s"]
            - sum(s for part in (first, second) for _, s in part["passes"])
        )
        run["beside_passes"] = beside / passes
        found["runs"].append(run)
        shown = {name: value for name, value in run.items() if not isinstance(value, dict)}
        print(json.dumps(shown), flush=True)
    for name in ("overhead", "overhead_without_read_twice", "beside_passes"):
        found[name] = statistics.median(run[name] for run in found["runs"])
    for run in found["runs"]:
        for part in ("plain", "killed", "went_on"):
            del run[part]["passes"]
    text = json.dumps(found, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


def child(given: argparse.Namespace, path: Path | None, *, killed: bool = False) -> dict[str, Any]:
    """What a process of its own measured: processor seconds, those of each pass, tokens read."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        status = 1
        try:
            work(given, path, killed, writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = [json.loads(line) for line in pipe]
    _, status = os.waitpid(pid, 0)
    if not killed and status:
        raise RuntimeError(f"the process ended with {status}")
    last = lines[-1]
    passes = [(line["tokens"], line["pass_s"]) for line in lines if "pass_s" in line]
    return {**{k: v for k, v in last.items() if k != "pass_s"}, "passes": passes}


def work(given: argparse.Namespace, path: Path | None, killed: bool, pipe: int) -> None:
    """Read the text and tell the pipe after every pass; be killed on the way if asked to."""
    writers: list[ContextWriter] = []

    class Noted(ContextWriter):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            writers.append(self)

    contexts.ContextWriter = Noted  # type: ignore[misc]
    model, tokenizer = load_model("demo", device="cpu")
    text = (Path(headinfer.__file__).parent / "data" / "small_desk.md").read_text()
    repeats = 1 + given.tokens // 3000
    ids = tokenizer(text * repeats, return_tensors="pt")["input_ids"][:, : given.tokens]
    began, wall = 0.0, 0.0

    def tell(tokens: int, **more: float) -> None:
        line = {
            "tokens": tokens,
            "cpu_s": time.process_time() - began,
            "wall_s": time.perf_counter() - wall,
            "writer_s": sum(writer.seconds for writer in writers),
            "writer_cpu_s": sum(writer.cpu_seconds for writer in writers),
            **more,
        }
        os.write(pipe, (json.dumps(line) + "\n").encode())

    with (
        headinfer.attach(model, expected_tokens=given.tokens) as run,
        torch.inference_mode(),
    ):
        headinfer.prefill(model, ids[:, :512], run.new_cache())  # threads and kernels exist
        steps = Steps(model, tell)
        began, wall = time.process_time(), time.perf_counter()
        steps.stop = given.at * given.tokens if killed else None
        steps.writers = writers
        if path is None:
            cache = run.new_cache()
            headinfer.prefill(model, ids, cache)
        else:
            cache = headinfer.read_context(model, ids, path, checkpoint_every=given.every)
    tell(cache.get_seq_length())


class Steps:
    """Processor seconds of every forward pass; kills the process once told where."""

    def __init__(self, model: Any, tell: Any) -> None:
        self.stop: float | None = None
        self.writers: list[ContextWriter] = []
        self._tell = tell
        self._began = 0.0
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        self._began = time.process_time()

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        tokens = cache_given(kwargs).get_seq_length()
        self._tell(tokens, pass_s=time.process_time() - self._began)
        durable = bool(self.writers) and self.writers[0].manifest.tokens
        if self.stop is not None and tokens >= self.stop and durable:
            os.kill(os.getpid(), signal.SIGKILL)


def seconds_between(part: dict[str, Any], start: int, stop: int) -> float:
    """Processor seconds of the passes that ended in (start, stop]."""
    return sum(seconds for tokens, seconds in part["passes"] if start < tokens <= stop)


if __name__ == "__main__":
    main()
