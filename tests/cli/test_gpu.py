# SPDX-License-Identifier: Apache-2.0
"""The command line on a GPU: budgets that bind, peaks that are measured, the same answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headinfer.cli.job import Job, Memory, execute

Program = Any
pytestmark = pytest.mark.gpu


def test_the_answer_is_that_of_the_resident_cache(tiny: str) -> None:
    outcome = execute(
        Job(
            model=tiny,
            text="The keeper kept the light. " * 60,
            question="Who?",
            max_new_tokens=24,
            memory=Memory(chunk_tokens=200),
            device="cuda",
            compare=True,
            as_json=True,
        )
    )
    assert outcome.same_tokens is True
    assert outcome.plan["device"] == "cuda"
    assert (outcome.headwise.peak["gpu_bytes"] or 0) > 0


def test_the_least_gpu_budget_named_works_and_is_kept(headinfer: Program, tiny: str) -> None:
    asked = ("run", tiny, "--prompt", "x" * 1500, "--max-new-tokens", "4", "--device", "cuda")
    refused = headinfer(*asked, "--gpu-memory", "1MiB")
    assert refused.status == 1, refused.err
    least = refused.error.split("Raise --gpu-memory to ")[1].split(" bytes")[0]
    result = headinfer(*asked, "--gpu-memory", least, "--json")
    assert result.status == 0, result.err
    told = json.loads(result.out)
    assert told["peak"]["gpu_bytes"] <= int(least)
    assert told["stats"]["host_bytes"] > 0


def test_memory_that_runs_out_is_one_line(headinfer: Program, tiny: str) -> None:
    import torch

    asked = ("run", tiny, "--prompt", "x" * 1500, "--max-new-tokens", "4", "--device", "cuda")
    refused = headinfer(*asked, "--gpu-memory", "1MiB")
    least = refused.error.split("Raise --gpu-memory to ")[1].split(" bytes")[0]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(32 * 2**20 / total)  # less than the staging ring
    try:
        result = headinfer(*asked, "--gpu-memory", least)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert result.status == 1, result.err
    assert "memory" in result.error
