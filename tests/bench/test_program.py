# SPDX-License-Identifier: Apache-2.0
"""Runs become rows, failures too, and a second process goes on where the first one ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headinfer.bench import measure as measuring
from headinfer.bench import program
from headinfer.bench.clock import OutOfTime
from headinfer.bench.results import (
    FAILED,
    MEASURED,
    NOT_AVAILABLE,
    OUT_OF_MEMORY,
    REFUSED,
    Results,
    read,
    write,
)
from headinfer.errors import BudgetTooSmall, InputError

Measure = Callable[..., Results]
METRICS = {"prefill", "last chunk", "first token", "token"}


def test_every_contestant_at_every_length_has_its_rows(measure: Measure, tmp_path: Path) -> None:
    results = measure()
    runs = {row.key for row in results.rows if row.case == "small"}
    assert len(runs) == 10
    for key in runs:
        rows = [row for row in results.rows if row.key == key]
        assert {row.status for row in rows} == {MEASURED}, rows[0].note
        assert {row.metric for row in rows} == METRICS
        for row in rows:
            assert row.median is not None
            assert row.p20 is not None
            assert row.p80 is not None
            assert 0 < row.p20 <= row.median <= row.p80
            assert row.n == len(row.values) >= 1
            assert row.held["kv_bytes"] == 2 * 3 * 80 * key[2] * 4
            assert row.others_busy is not None
    assert read(tmp_path / "results.json") == results
    token = results.find("small", "planned", 80, "token")
    assert token is not None
    assert token.bytes_floor_s is not None  # the rate of host memory is known ...
    assert token.flops_floor_s is None  # ... and no other
    assert token.predicted["seconds"] is None
    assert token.held["host_bytes"] <= (token.predicted["host_bytes"] or 0)


def test_the_order_is_shuffled_by_the_seed_and_recorded(measure: Measure, tmp_path: Path) -> None:
    def order(seed: int) -> list[str]:
        results = measure(seed=seed, contexts=(48,), out=tmp_path / f"{seed}.json")
        rows = {row.position: row.contestant for row in results.rows if row.case == "small"}
        assert results.sessions[0].seed == seed
        return [rows[place] for place in sorted(rows)]

    one, other = order(0), order(1)
    assert sorted(one) == sorted(other)
    assert one != other


def test_contestants_and_lengths_can_be_chosen(measure: Measure) -> None:
    results = measure(contestants=("pl*",), contexts=(40,))
    assert {row.key for row in results.rows if row.case == "small"} == {("small", "planned", 40)}


def test_resume_does_not_repeat_what_is_there(measure: Measure) -> None:
    first = measure(contexts=(48,))
    again: list[str] = []
    second = measure(again.append, resume=True)
    assert any("6 of 11 runs are in the file already" in line for line in again)
    assert len(second.sessions) == 2
    before = [row for row in second.rows if row.session == 0]
    assert before == first.rows
    assert {row.context_tokens for row in second.rows if row.session == 1} == {80}


def test_without_resume_a_file_is_not_overwritten(measure: Measure) -> None:
    measure(contestants=("planned",), contexts=(48,))
    with pytest.raises(InputError, match="--resume goes on with it"):
        measure()


def test_figures_of_two_machines_do_not_share_a_file(measure: Measure, tmp_path: Path) -> None:
    results = measure(contestants=("planned",), contexts=(48,))
    results.sessions = [replace(results.sessions[0], commit="another")]
    write(results, tmp_path / "results.json")
    with pytest.raises(InputError, match="Figures of two machines"):
        measure(resume=True)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), OUT_OF_MEMORY, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OUT_OF_MEMORY, "allocate"),
        (MemoryError("no more"), OUT_OF_MEMORY, "no more"),
        (RuntimeError("illegal instruction"), FAILED, "RuntimeError: illegal instruction"),
        (
            BudgetTooSmall("too small", tier="gpu", budget_bytes=1, needed_bytes=2),
            REFUSED,
            "too small",
        ),
    ],
)
def test_a_failure_is_a_row_and_the_others_go_on(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, says: str
) -> None:
    run = measuring.run

    def failing(case: Any, contestant: str, *rest: Any) -> Any:
        if contestant == "schedule":
            raise error
        return run(case, contestant, *rest)

    monkeypatch.setattr(measuring, "run", failing)
    results = measure(contestants=("schedule", "planned"), contexts=(48,))
    states = {row.contestant: row for row in results.rows if row.case == "small"}
    assert states["planned"].status == MEASURED
    assert states["schedule"].status == status
    assert says in states["schedule"].note
    assert states["schedule"].median is None


def test_what_is_not_available_is_a_row(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, ground: Any, **how: bool) -> None:
        raise program.NotAvailable("not in this version")

    monkeypatch.setattr(measuring, "warm_up", absent)
    results = measure(contestants=("planned",), contexts=(48,))
    assert results.rows[-1].status == NOT_AVAILABLE


def test_a_run_that_ends_its_process_twice_is_given_up(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = measuring.run

    def killed(case: Any, contestant: str, *rest: Any) -> Any:
        if contestant == "schedule":
            raise KeyboardInterrupt  # as far as the file can tell, any death is the same
        return run(case, contestant, *rest)

    monkeypatch.setattr(measuring, "run", killed)
    choice = {"contestants": ("schedule", "planned"), "contexts": (48,)}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure(resume=True, **choice)
        assert read(tmp_path / "results.json").pending == ("small", "schedule", 48)
    results = measure(resume=True, **choice)
    (row,) = [row for row in results.rows if row.contestant == "schedule"]
    assert (row.status, row.note) == (FAILED, "two processes ended during this run")
    assert results.pending is None
    assert results.find("small", "planned", 48, "token") is not None


def test_time_running_out_leaves_the_rest_for_later(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = measuring.run
    made: list[str] = []

    def slow(case: Any, contestant: str, *rest: Any) -> Any:
        if made:
            raise OutOfTime
        made.append(contestant)
        return run(case, contestant, *rest)

    monkeypatch.setattr(measuring, "run", slow)
    measure(contexts=(48,), max_seconds=1000)
    stored = read(tmp_path / "results.json")
    assert stored.pending is None
    assert {row.contestant for row in stored.rows if row.case == "small"} == set(made)
    monkeypatch.setattr(measuring, "run", run)
    results = measure(contexts=(48,), resume=True)
    assert len({row.key for row in results.rows if row.case == "small"}) == 5


def test_a_run_that_host_memory_would_not_hold_is_not_started(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "SPARE_HOST_BYTES", 2**60)
    results = measure(contestants=("planned",), contexts=(2**14,))
    assert results.rows[-1].status == OUT_OF_MEMORY
    assert "not started" in results.rows[-1].note


def test_failed_exactness_is_kept_in_the_file(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headinfer.bench.results import Check

    wrong = Check("planted", False, 2.0, 1.0)
    monkeypatch.setattr(program, "verify", lambda devices, say: [wrong])
    results = measure(contestants=("planned",), contexts=(48,))
    assert not results.verified
    assert results.find("small", "planned", 48, "token") is not None
