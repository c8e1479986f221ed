# SPDX-License-Identifier: Apache-2.0
"""`--disk` on the command line: the same answer, a plan, a measurement, and what is refused."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from headinfer.hf import geometry

Program = Any


def test_the_answer_is_that_of_host_memory(
    headinfer: Program, endless: str, book: str, tmp_path: Path
) -> None:
    asked = ("run", endless, book, "--question", "Who?", "--max-new-tokens", "8", "--json")
    plain = json.loads(headinfer(*asked).out)
    small = ("--disk", str(tmp_path), "--host-memory", "1800KiB", "--chunk-tokens", "128")
    spilled = json.loads(headinfer(*asked, *small).out)
    assert spilled["answer"] == plain["answer"]
    assert spilled["plan"]["disk"] == str(tmp_path)
    assert spilled["plan"]["predicted_disk_bytes"] >= spilled["stats"]["disk_bytes"]
    assert not [path for path in tmp_path.iterdir() if path.name != "book.txt"]


def test_a_plan_has_a_column_of_the_disk(headinfer: Program, tiny: str, tmp_path: Path) -> None:
    result = headinfer(
        "plan", tiny, "--tokens", "64K", "--device", "cpu",
        "--disk", str(tmp_path), "--host-memory", "8MiB",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "keys and values on disk: " in result.out
    header = next(line for line in result.out.splitlines() if "first token" in line)
    assert header.split()[:5] == ["tokens", "fits", "GPU", "host", "disk"]
    assert re.search(r"- disk: at most [\d.]+ [KMGT]iB, 98% of what is free in /", result.out)


def test_times_for_a_named_gpu_have_the_disk_or_say_that_they_do_not(
    headinfer: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headinfer.hf.remembered import remember_disk

    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(geometry, "free_bytes", lambda folder: 2**40)
    config = Path(__file__).parents[1] / "configs" / "llama-3-8b.json"
    (tmp_path / "config.json").write_text(config.read_text())
    asked = ("plan", str(tmp_path), "--tokens", "256K", "--gpu", "RTX 4090", "--ram", "16GiB",
             "--disk", str(tmp_path))  # fmt: skip
    unknown = headinfer(*asked)
    assert "the times leave out reading" in unknown.err
    remember_disk(str(tmp_path), read_bytes_s=2e9, write_bytes_s=1e9)
    known = headinfer(*asked)
    assert "the times leave out reading" not in known.err
    assert "disk read rate" in known.out
    last = json.loads(headinfer(*asked, "--json").out)["contexts"][-1]
    assert last["decode_limit"] == "disk read rate"
    assert last["predicted_itl_s"] > 0.5 * last["predicted_disk_bytes"] / 2e9


def test_doctor_measures_a_disk(
    headinfer: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headinfer.hf import disk_probe

    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(disk_probe, "MOST_BYTES", 2**26)
    found = json.loads(headinfer("doctor", "--disk", str(tmp_path), "--json").out)["disk"]
    assert found["read_bytes_s"] > 0
    assert found["write_bytes_s"] > 0
    text = headinfer("doctor", "--disk", str(tmp_path)).out
    assert f"{tmp_path} is read at " in text
    assert "GPUDirect Storage: not used (KvikIO is not installed). On the way to a GPU" in text
    assert found["gpu_direct"] in text
    assert len(list((tmp_path / "cache").glob("disk-*.json"))) == 1


def test_doctor_says_that_kvikio_is_there_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from headinfer.hf import disk_probe

    def version(package: str) -> str:
        if package != "kvikio-cu12":
            raise PackageNotFoundError(package)
        return "26.10.0"

    monkeypatch.setattr(disk_probe, "version", version)
    said = disk_probe.gpu_direct()
    assert said.startswith("GPUDirect Storage: not used (KvikIO 26.10.0 is installed). ")
    assert "read into page-locked host memory" in said


def test_packed_keys_on_disk_are_planned_and_predicted(
    headinfer: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headinfer.hf.remembered import remember_disk

    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(geometry, "free_bytes", lambda folder: 2**40)
    config = Path(__file__).parents[1] / "configs" / "llama-3-8b.json"
    (tmp_path / "config.json").write_text(config.read_text())
    remember_disk(str(tmp_path), read_bytes_s=2e9, write_bytes_s=1e9)
    asked = ("plan", str(tmp_path), "--tokens", "256K", "--gpu", "RTX 4090", "--ram", "16GiB",
             "--disk", str(tmp_path))  # fmt: skip
    exact, packed = (
        json.loads(headinfer(*asked, "--kv-format", name, "--json").out)
        for name in ("exact", "lossless")
    )
    assert packed["kv_format"] == "lossless"
    assert packed["kept_bytes"] > exact["kept_bytes"] == 0
    assert packed["predicted_disk_bytes"] < 0.76 * exact["predicted_disk_bytes"]
    steps = [found["contexts"][-1]["predicted_itl_s"] for found in (exact, packed)]
    assert steps[1] < 0.76 * steps[0]
    text = headinfer(*asked, "--kv-format", "lossless").out
    assert "in host memory and on disk are stored without loss in 75.7% of their bytes" in text
    assert "are kept for packed blocks" in text


def test_what_cannot_be_is_one_line(
    headinfer: Program, tiny: str, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("run", tiny, book, "--max-new-tokens", "2")
    assert "no folder for it" in headinfer(*asked, "--disk-memory", "1GiB").error
    missing = headinfer(*asked, "--disk", str(tmp_path / "missing"))
    assert "does not exist; name a folder on a fast local disk" in missing.error
    assert missing.status != 0
    monkeypatch.setattr(geometry, "free_bytes", lambda folder: 50_000)
    full = headinfer("plan", tiny, "--tokens", "64K", "--device", "cpu",
                     "--disk", str(tmp_path), "--host-memory", "8MiB")  # fmt: skip
    assert "47.85 KiB are allowed or free there" in full.error
