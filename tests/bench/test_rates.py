# SPDX-License-Identifier: Apache-2.0
"""Rates, kernels and attention inside a chunk: what is timed is what the row says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headinfer.bench import rates
from headinfer.bench.cases import CASES
from headinfer.bench.clock import Deadline, Marks, OutOfTime, attention_timed, times
from headinfer.bench.contestants import Ground, enter
from headinfer.bench.findings import TORCH_CPU_ATTENTION
from headinfer.bench.measure import run
from headinfer.bench.models import build
from headinfer.bench.results import MEASURED, Results, Row
from headinfer.bench.shapes import SHAPES
from headinfer.hf.cache_name import cache_argument

CPU = torch.device("cpu")


def test_rates_are_those_that_floors_ask_for() -> None:
    case = replace(CASES["rates"], repeats=1)
    rows = list(rates.rate_rows(case, cuda=False, quick=True, deadline=Deadline()))
    results = Results(rows=rows)
    for dtype in ("float32", "bfloat16"):
        for name in ("host read", f"matmul {dtype} cpu", f"attention {dtype} cpu"):
            assert (results.rate(name) or 0) > 0
    assert results.rate("h2d") is None


def test_every_cpu_attention_is_timed_once() -> None:
    case = replace(CASES["cpu-attention"], repeats=1)
    known = Results(rows=[Row("rates", "machine", 0, "host read", "GB/s", median=10.0)])
    rows = list(rates.kernel_rows(case, 256, known, deadline=Deadline()))
    measured = {row.contestant for row in rows if row.status == MEASURED}
    assert set(TORCH_CPU_ATTENTION) <= measured
    flash = next(row for row in rows if row.contestant == "cpu-flash")
    assert flash.moved_bytes == {"host": 2 * 8 * 256 * 128 * 2}
    assert flash.bytes_floor_s == pytest.approx(flash.moved_bytes["host"] / 10e9)


def test_the_forms_of_torch_compute_the_same() -> None:
    q, k, v = torch.randn(1, 32, 1, 16), torch.randn(1, 8, 50, 16), torch.randn(1, 8, 50, 16)
    found = [call() for call in rates._torch_forms(q, k, v, 0.25).values()]
    for other in found[1:]:
        assert torch.allclose(found[0].flatten(), other.flatten(), atol=1e-5)


def test_the_first_call_does_not_count_and_a_deadline_ends_it() -> None:
    calls: list[int] = []
    assert len(times(lambda: calls.append(1), CPU, 3, deadline=Deadline())) == 3
    assert len(calls) == 4
    with pytest.raises(OutOfTime):
        times(lambda: None, CPU, 1, deadline=Deadline(0.0))


@pytest.mark.parametrize("name", ["resident", "streaming", "all-resident"])
def test_attention_inside_a_chunk_is_timed_layer_by_layer(name: str) -> None:
    shape = SHAPES["tiny, odd"]
    ground = Ground(build(shape, "float32", "cpu"), shape, "float32", 200, 32)
    case = replace(CASES["attention-tiny"], chunk_tokens=32, repeats=3)
    rows = run(case, name, 100, ground, Results(), Deadline())
    inside, whole = rows
    assert (inside.metric, whole.metric, inside.n) == ("attention", "chunk", 2)
    assert inside.median is not None
    assert whole.median is not None
    assert 0 < inside.median < whole.median
    assert inside.simulated
    with enter(name, ground) as entry, torch.no_grad():
        marks = Marks(CPU)
        with attention_timed(ground.model, marks):
            ground.model(
                torch.zeros((1, 4), dtype=torch.long), **cache_argument(ground.model, entry.cache)
            )
        assert len(marks.between()) == 2 * shape.layers - 1
        ground.model(
            torch.zeros((1, 1), dtype=torch.long), **cache_argument(ground.model, entry.cache)
        )
        assert len(marks.between()) == 2 * shape.layers - 1
