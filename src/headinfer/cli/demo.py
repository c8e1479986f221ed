# SPDX-License-Identifier: Apache-2.0
"""`headinfer demo`: a real model, a real document, and what it took to answer from it."""

from __future__ import annotations

from importlib.resources import files

from headinfer.budget import format_bytes
from headinfer.cli.console import print_table, stderr
from headinfer.cli.job import Job, Outcome, Run, execute, print_comparison, print_json

QUESTION = "Where was the cellar key hung?"
DOCUMENT = "small_desk.md"


def document() -> str:
    """The story that comes with the package."""
    return (files("headinfer") / "data" / DOCUMENT).read_text(encoding="utf-8")


def demo(job: Job) -> None:
    """Ask, then show what was measured."""
    if not job.as_json:
        stderr.print(f"question: {job.question}", style="bold", markup=False)
    outcome = execute(job)
    if job.as_json:
        print_json(outcome.as_dict())
    else:
        print_measured(outcome)
        print_comparison(outcome)


def print_measured(outcome: Outcome) -> None:
    """The figures of both runs side by side, on standard error."""
    stats, resident = outcome.stats, outcome.resident
    moved = f"{_bytes(stats['loaded_bytes'])} in, {_bytes(stats['written_bytes'])} out"
    on_gpu = stats["resident_bytes"] + stats["tail_bytes"]
    rows = [
        ["keys and values in host memory", _bytes(stats["host_bytes"])],
        ["keys and values on the GPU", _bytes(on_gpu)],
        ["staging buffers on the GPU", _bytes(stats["staging_bytes"])],
        ["moved to and from the GPU", moved],
    ]
    header = ["measured", "headinfer"]
    if resident is None:
        rows += [[name, value] for name, value in _figures(outcome.headwise)]
    else:
        header.append("cache resident")
        rows = [[*row, ""] for row in rows]
        pairs = zip(_figures(outcome.headwise), _figures(resident), strict=True)
        rows += [[name, value, other] for (name, value), (_, other) in pairs]
    answer = outcome.headwise.answer
    title = f"{answer.prompt_tokens:,} tokens read, {len(answer.token_ids):,} written"
    print_table(title, header, rows)
    if resident is not None:
        stderr.print(_verdict(outcome), markup=False)


def _figures(run: Run) -> list[tuple[str, str]]:
    timings, gpu, host = run.answer.timings(), run.peak["gpu_bytes"], run.peak["host_rss_bytes"]
    ttft, rate = timings["ttft_s"], timings["tokens_per_s"]
    return [
        ("peak GPU memory", "no GPU" if gpu is None else _bytes(gpu)),
        ("peak host memory of the process", _bytes(host or 0)),
        ("time to first token", "" if ttft is None else f"{ttft:.2f} s"),
        ("tokens per second after it", "" if rate is None else f"{rate:.1f}"),
    ]


def _bytes(count: int) -> str:
    return format_bytes(count) if count else "0"


def _verdict(outcome: Outcome) -> str:
    if outcome.same_tokens or outcome.resident is None:
        return "The resident cache gives the same answer, token for token."
    return f"The resident cache gives another answer: {outcome.resident.answer.text}"
