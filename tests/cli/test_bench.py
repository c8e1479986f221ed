# SPDX-License-Identifier: Apache-2.0
"""`headinfer bench`: what it lists, refuses, prints and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headinfer.bench.cases import CASES, CONTESTANTS
from headinfer.bench.results import Check, Results, Row, Session, read, write

Program = Any


def some_results(ok: bool = True) -> Results:
    rows = [
        Row(
            "smollm2-cpu", name, 8192, "token", "s", median=value, p20=value, p80=value, n=1
        )
        for name, value in (("resident", 0.4), ("planned", 0.2))
    ]  # fmt: skip
    session = Session("2026-01-02 03:04:05", "headinfer bench", 0, {"cpu": "A CPU"}, {})
    return Results([session], [Check("exact", ok, 0.0, 1.0)], rows)


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Measuring costs nothing; the requests are kept."""
    from headinfer.bench import program

    requests: list[Any] = []

    def bench(request: Any, say: Any) -> Any:
        requests.append(request)
        say("measuring")
        write(some_results(), request.out)
        why = "the 5 s allowed are over" if request.max_seconds else ""
        return program.Ended(some_results("wrong" not in request.cases), 3 if why else 0, why)

    monkeypatch.setattr(program, "bench", bench)
    return requests


def test_every_case_and_contestant_is_listed(headinfer: Program) -> None:
    shown = headinfer("bench", "--list")
    assert shown.status == 0
    for name in (*CASES, *CONTESTANTS):
        assert name in shown.out


def test_what_is_typed_is_what_is_asked(
    headinfer: Program, instant: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    choice = ("--case", "decode-*", "--case", "rates", "--contestant", "planned")
    how = ("--contexts", "32K,1M", "--quick", "--seed", "7", "--resume", "--commit", "abc")
    result = headinfer("bench", *choice, *how, "--out", str(out), "--device", "cpu")
    assert result.status == 0, result.err
    (request,) = instant
    assert request.cases == ("decode-*", "rates")
    assert request.contestants == ("planned",)
    assert request.contexts == (32768, 2**20)
    assert (request.quick, request.seed, request.resume) == (True, 7, True)
    assert (request.commit, request.device, request.out) == ("abc", "cpu", out)
    assert "SmolLM2 shape on the CPU" in result.out
    assert "2.00x" in result.out
    assert f"results are in {out}" in result.err


def test_the_exit_status_says_how_it_ended(
    headinfer: Program, instant: list[Any], tmp_path: Path
) -> None:
    out = ("--out", str(tmp_path / "out.json"))
    assert headinfer("bench", *out).status == 0
    unfinished = headinfer("bench", *out, "--max-seconds", "5")
    assert unfinished.status == 3
    assert "3 runs are left: the 5 s allowed are over; go on with --resume" in unfinished.err
    wrong = headinfer("bench", *out, "--case", "wrong")
    assert wrong.status == 1
    assert "no speed-ups: exactness checks failed: exact" in wrong.out
    assert "2.00x" not in wrong.out


def test_a_real_run_leaves_a_file_that_can_be_shown(
    headinfer: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headinfer.bench import program

    checked = [Check("taken for granted", True, 0.0, 1.0)]
    monkeypatch.setattr(program, "verify", lambda devices, say: checked)
    # What is measured while other tests run is nothing for anybody's plans.
    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path / "cache"))
    out = str(tmp_path / "out.json")
    choice = ("--case", "decode-tiny", "--contestant", "planned", "--contexts", "64")
    result = headinfer("bench", *choice, "--quick", "--device", "cpu", "--out", out)
    assert result.status == 0, result.err
    assert "decode-tiny: planned at 64 tokens" in result.err
    results = read(Path(out))
    assert results.find("decode-tiny", "planned", 64, "token") is not None
    assert results.rate("host read") is not None
    assert results.sessions[0].versions["headinfer"]
    assert list((tmp_path / "cache").glob("rates-*.json"))
    assert json.loads(Path(out).read_text())["sessions"][0]["command"].startswith("headinfer")
    shown = headinfer("bench", "show", out)
    assert shown.out == result.out


def test_tables_for_a_page_are_markdown(headinfer: Program, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write(some_results(), path)
    lines = headinfer("bench", "show", str(path), "--markdown").out.splitlines()
    assert "| smollm2-cpu | 8K | planned | token | 200 ms |  |  |  |" in lines
    widths = {line.count(" | ") for line in lines if line.startswith("| ")}
    assert widths == {5, 7}
    assert any("| 2.00x |" in line and "| holds |" in line for line in lines)


def test_verify_fails_when_a_check_does(
    headinfer: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headinfer.bench import program

    def verdict(ok: bool) -> Any:
        return lambda device, say: Results(checks=[Check("planted", ok, 0.0, 1.0)])

    monkeypatch.setattr(program, "verify_only", verdict(True))
    good = headinfer("bench", "verify")
    assert (good.status, good.out) == (0, "1 checks, 0 failed\n")
    monkeypatch.setattr(program, "verify_only", verdict(False))
    assert headinfer("bench", "verify").status == 1


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--case", "nope"), 1, "no case is called 'nope'; known: rates"),
        (("--contestant", "nope"), 1, "no contestant is called 'nope'; known: resident"),
        (("--contexts", "12Q"), 1, "'12Q' is not a length"),
        (("--device", "abacus"), 1, "known: cuda, cpu"),
        (("--max-seconds", "0"), 2, "(headinfer bench --help)"),
        (("plot",), 2, "(headinfer bench plot --help)"),
        (("show", "{tmp}/none.json"), 1, "No such file"),
        (("show", "{tmp}/other.json"), 1, "reads schema 1"),
        (("plot", "{tmp}/other.json"), 1, "reads schema 1"),
        (("--out", "{tmp}/other.json"), 1, "--resume goes on with it"),
        (("--out", "{tmp}/other.json", "--resume"), 1, "reads schema 1"),
    ],
)
def test_bad_input_is_one_line(
    headinfer: Program, tmp_path: Path, arguments: tuple[str, ...], status: int, says: str
) -> None:
    (tmp_path / "other.json").write_text("{}")
    result = headinfer("bench", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.status == status
    assert says in result.error
    assert result.out == ""


def test_a_case_for_a_gpu_needs_one(headinfer: Program) -> None:
    error = headinfer("bench", "--case", "prefill-8b", "--device", "cpu").error
    assert "needs a cuda device" in error
