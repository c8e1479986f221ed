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
