# SPDX-License-Identifier: Apache-2.0
"""What a run was predicted to take stands beside what it took; the plan is held against a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from headinfer.bench.cases import BY_HAND, CASES, KNOWN, Mode
from headinfer.bench.foretold import eta_at_a_tenth, pairs, plan_against_grid
from headinfer.bench.grid import GRID, ON_CPU, ON_GPU, options_of
from headinfer.bench.results import Results, Row
from headinfer.bench.tables import markdown
from headinfer.rates import Rates

Measure = Callable[..., Results]
RATES = Rates("m", "float32", 1e10, {64: 1e10}, 1e10, 1e10, 1e-4, 1e-3)


@pytest.fixture
def foretelling(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> Measure:
    monkeypatch.setattr("headinfer.bench.program.rates_for", lambda device, dtype: RATES)
    return measure


def test_times_as_planned_are_predicted(foretelling: Measure) -> None:
    results = foretelling(contestants=("planned", "resident"), contexts=(80,))
    found = {pair.what: pair for pair in pairs(results)}
    assert set(found) == {"prefill", "last chunk", "token"}
    for pair in found.values():
        assert pair.predicted > 0
        assert pair.off == pair.measured / pair.predicted - 1
    prefill = results.find("small", "planned", 80, "prefill")
    assert prefill is not None
    assert len(prefill.settings["chunk_seconds"]) == 1
    assert all(0 < loop < 1000 for loop in prefill.settings["interpreter_ms"])
    assert results.sessions[0].machine["rates"] == {"float32 on cpu": RATES.as_dict()}
    resident = results.find("small", "resident", 80, "prefill")
    assert resident is not None
    assert not resident.predicted
    assert "| small | 80 | prefill" in markdown(results)


def test_the_remaining_time_is_judged_chunk_by_chunk(
    foretelling: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headinfer.plan.CPU_CHUNK_TOKENS", 16)
    results = foretelling(contestants=("planned",), contexts=(80,))
    row = results.find("small", "planned", 80, "prefill")
    assert row is not None
    assert len(row.settings["chunk_seconds"]) == 5
    error = row.predicted["eta_error"]
    assert error is not None
    assert error > -1
    long = replace(row, context_tokens=2**17, predicted={"eta_error": -0.07})
    assert eta_at_a_tenth(Results(rows=[long])).value == pytest.approx(0.07)
    assert eta_at_a_tenth(results).value is None  # short prompts do not count


def test_the_end_of_a_prompt_stands_for_all_of_it(
    foretelling: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "small", replace(CASES["small"], mode=Mode.LAST_CHUNK))
    monkeypatch.setattr("headinfer.plan.CPU_CHUNK_TOKENS", 16)
    results = foretelling(contestants=("planned",), contexts=(80,))
    rows = [row for row in results.rows if row.case == "small"]
    assert {row.metric for row in rows} == {"chunk", "token"}
    assert all(row.simulated and row.predicted["seconds"] for row in rows), rows[0].note


def test_every_manual_setting_is_a_contestant_of_its_grid() -> None:
    assert set(BY_HAND) == set(GRID)
    assert len(GRID) == len(ON_GPU) + len(ON_CPU)
    assert KNOWN["grid-8192-most-50"].label.endswith("50% attended by the CPU")
    assert set(CASES["plan-grid-8b"].contestants) == {"planned"} | {m.name for m in ON_GPU}
    assert set(CASES["plan-grid-smollm2"].contestants) == {"planned"} | {m.name for m in ON_CPU}


def test_a_manual_setting_on_a_cpu_runs_with_its_chunk(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = replace(CASES["small"], contestants=("grid-128", "grid-8192-most-50"))
    monkeypatch.setitem(CASES, "small", both)
    results = measure(contexts=(80,))
    row = results.find("small", "grid-128", 80, "prefill")
    assert row is not None
    assert row.settings["chunk_tokens"] == 128
    other = next(row for row in results.rows if row.contestant == "grid-8192-most-50")
    assert other.note == "these settings are for cuda"


def test_as_many_residents_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch
    from transformers import LlamaConfig

    from headinfer.bench import grid
    from headinfer.hf import geometry

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype=torch.bfloat16,
    )
    model = SimpleNamespace(config=config, device=torch.device("cuda"))
    monkeypatch.setattr(geometry, "weight_bytes_of", lambda model, device: 15 * 2**30)
    given = {"expected_tokens": 65_600, "gpu_memory": "24GiB", "host_memory": "64GiB"}
    found = options_of(grid.GRID["grid-8192-most-50"], model, given)
    assert found["resident_heads"] == 6  # of 8: a GiB each, and 6.9 are left
    assert found["near_data"] == 0.5
    assert options_of(grid.GRID["grid-8192-none-0"], model, given)["resident_heads"] == 0


def test_the_plan_is_judged_by_the_whole_request() -> None:
    def rows(name: str, prefill: float, token: float) -> list[Row]:
        return [
            Row("plan-grid-8b", name, 65536, "prefill", "s", median=prefill),
            Row("plan-grid-8b", name, 65536, "token", "s", median=token),
        ]

    # 64 tokens: 5 + 6.4 planned; 8 + 3.2 by hand, though its prefill takes longer
    results = Results(rows=rows("planned", 5.0, 0.1) + rows("grid-2048-most-50", 8.0, 0.05))
    found = plan_against_grid(results)
    assert found.value == pytest.approx(11.2 / 11.4)
    assert plan_against_grid(Results()).value is None
