# SPDX-License-Identifier: Apache-2.0
"""`headinfer plan` and `headinfer doctor`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

Program = Any


def test_a_plan_needs_no_weights(headinfer: Program, tiny: str, tmp_path: Path) -> None:
    shutil.copy(f"{tiny}/config.json", tmp_path)
    result = headinfer("plan", str(tmp_path), "--tokens", "1000", "--gpu-memory", "1GiB", "--json")
    plan = json.loads(result.out)
    assert plan["device"] == "cuda"
    assert plan["expected_tokens"] == 1256
    weights = sum(
        part.stat().st_size for part in Path(tiny).glob("*.safetensors")
    )  # and a header of names
    assert 0.9 * weights < plan["predicted_gpu_parts"]["weights"] < weights


def test_a_plan_beyond_the_positions_says_so(headinfer: Program, tiny: str) -> None:
    result = headinfer("plan", tiny, "--tokens", "5000", "--device", "cpu")
    assert result.status == 0
    assert "made for 2,048 positions" in result.err
    assert "5,256 tokens" in result.out


def test_half_precision_halves_the_plan(headinfer: Program, tiny: str) -> None:
    def host(dtype: str) -> int:
        asked = ("plan", tiny, "--tokens", "1000", "--device", "cpu", "--json", "--dtype", dtype)
        return int(json.loads(headinfer(*asked).out)["predicted_host_bytes"])

    assert host("float32") == pytest.approx(2 * host("bfloat16"), rel=0.01)


def test_doctor_says_what_runs_and_what_not(headinfer: Program) -> None:
    result = headinfer("doctor")
    assert result.status == 0
    assert "torch" in result.out
    assert "reference: runs every call above" in result.out


def test_doctor_compares_a_model(headinfer: Program, tiny: str) -> None:
    report = json.loads(headinfer("doctor", tiny, "--json").out)
    assert report["ok"] is True
    assert report["checks"]


def test_doctor_fails_when_an_answer_differs(
    headinfer: Program, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headinfer.hf.doctor import DoctorReport

    monkeypatch.setattr(DoctorReport, "ok", property(lambda report: False))
    assert headinfer("doctor", tiny).status == 1


def test_a_plan_for_another_machine_has_a_table_by_context(headinfer: Program, tiny: str) -> None:
    asked = ("plan", tiny, "--tokens", "40K", "--gpu", "RTX 4090", "--ram", "64GiB")
    text = headinfer(*asked).out
    assert "estimated from public figures" in text
    for length in ("8,192", "16,384", "32,768", "40,960"):
        assert f"{length}  " in text
    plan = json.loads(headinfer(*asked, "--json").out)
    assert [line["tokens"] for line in plan["contexts"]] == [8192, 16384, 32768, 40960]
    assert all(line["predicted_itl_s"] > 0 for line in plan["contexts"])


def test_an_unknown_gpu_and_a_wrong_length_are_single_lines(headinfer: Program, tiny: str) -> None:
    result = headinfer("plan", tiny, "--tokens", "1M", "--gpu", "Voodoo 2")
    assert result.status == 1
    assert "known: T4" in result.error
    for wrong in ("0", "1G", "-5", "1.5K", "x"):
        result = headinfer("plan", tiny, "--tokens", wrong)
        assert result.status == 2
        assert "write for example 131072, 128K or 1M" in result.error


def test_doctor_measures_this_machine_when_asked(
    headinfer: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from headinfer.hf import probe
    from headinfer.rates import Rates

    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path))
    rates = Rates("this machine", "float32", 1e11, {64: 1e11}, 1e10, 1e10, 1e-4, 1e-3)
    monkeypatch.setattr(probe, "measure", lambda device, dtype: rates)
    assert "not measured yet" in headinfer("doctor").out
    assert "rates of this machine in float32" in headinfer("doctor", "--probe").out
    assert "rates of this machine in float32" in headinfer("doctor").out
    assert json.loads(headinfer("doctor", "--json").out)["rates"]["weight_bytes_s"] == 1e10


def test_doctor_measures_in_the_type_asked_for(
    headinfer: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The type that `plan` names when it has no times."""
    from headinfer.hf import probe
    from headinfer.rates import Rates

    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path))
    asked: list[str] = []

    def measure(device: Any, dtype: Any) -> Rates:
        asked.append(str(dtype))
        return Rates("this machine", "bfloat16", 1e11, {64: 1e11}, 1e10, 1e10, 1e-4, 1e-3)

    monkeypatch.setattr(probe, "measure", measure)
    assert headinfer("doctor", "--probe", "--dtype", "bfloat16").status == 0
    assert set(asked) == {"torch.bfloat16"}


def test_a_plan_that_is_not_of_the_length_asked_for_says_so(headinfer: Program, tiny: str) -> None:
    asked = ("plan", tiny, "--tokens", "100K", "--allow-beyond-positions", "--device", "cpu")
    found = headinfer(*asked, "--host-memory", "8MiB")
    assert found.status == 1
    assert "102,400 tokens do not fit, as the error below says" in found.out
    longest = found.out.split("the longest context that fits: ")[1].split(" tokens")[0]
    again = (*asked[:3], longest.replace(",", ""), *asked[4:], "--host-memory", "8MiB")
    assert headinfer(*again).status == 0, "the number is in the units it is typed in"
