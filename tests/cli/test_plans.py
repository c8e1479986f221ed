# SPDX-License-Identifier: Apache-2.0
"""`headinfer plan` for models of many shapes: golden answers, known cases, bad input, pictures."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from headinfer.testing.golden_plans import answer

TESTS = Path(__file__).resolve().parents[1]
CONFIGS = TESTS / "configs"
ROUTERS_IN_FLOAT32 = [int(part) for part in version("transformers").split(".")[:2]] >= [5, 24]
GOLDEN = sorted((TESTS / "golden" / "plans").glob("*.txt"))

Program = Any


@pytest.fixture
def shape(tmp_path: Path) -> Any:
    """A folder with a config of tests/configs, changed here and there."""

    def make(name: str, **changes: Any) -> str:
        config = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        kept = {key: value for key, value in config.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(kept))
        return str(folder)

    return make


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_plans_are_what_they_were(path: Path) -> None:
    # Refresh: scripts/plan_golden
    if path.stem.startswith("deepseek-v3") and not ROUTERS_IN_FLOAT32:
        pytest.skip("transformers before 5.24 keeps this model's routers in bfloat16")
    command, _, rest = path.read_text(encoding="utf-8").partition("\n")
    assert answer(command, CONFIGS) == rest


# Maximum context on one 24 GB RTX 4090 with 512 GB of host memory, published for head-wise
# offloading (HeadInfer, arXiv 2502.12574, table 3), in thousands of tokens.
PUBLISHED = {
    "llama-3-8b": 4096,
    "llama-2-7b": 1024,
    "mistral-7b": 4096,
    "qwen2-7b": 4200,
    "gemma-2-9b": 1300,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_longest_context_is_at_least_the_published_one(
    headinfer: Program, shape: Any, name: str
) -> None:
    tokens = PUBLISHED[name] * 1024
    result = headinfer(
        "plan", shape(name), "--tokens", str(tokens), "--new-tokens", "0", "--gpu", "RTX 4090",
        "--host-memory", "512GiB", "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    plan = json.loads(result.out)
    assert plan["contexts"][-1]["fits"]
    assert plan["longest_tokens"] >= tokens
    assert plan["predicted_gpu_bytes"] <= 24 * 2**30
    assert plan["predicted_host_bytes"] <= 512 * 2**30


def test_beyond_the_positions_is_said_unless_allowed(headinfer: Program, shape: Any) -> None:
    asked = ("plan", shape("llama-3-8b"), "--tokens", "16K", "--gpu", "RTX 4090")
    warned = headinfer(*asked)
    assert warned.status == 0
    assert (
        "made for 8,192 positions; a run beyond them needs --allow-beyond-positions" in warned.err
    )
    allowed = headinfer(*asked, "--allow-beyond-positions")
    assert allowed.out == warned.out
    assert "positions" not in allowed.err


def test_an_unknown_model_type(headinfer: Program, shape: Any) -> None:
    result = headinfer("plan", shape("llama-3-8b", model_type="nonesuch"), "--tokens", "8K")
    assert result.status == 1
    assert "nonesuch" in result.error


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("hidden_size", r"how wide the model is \(hidden_size\)"),
        ("num_hidden_layers", r"how many layers it has \(num_hidden_layers\)"),
        ("vocab_size", r"how many tokens it knows \(vocab_size\)"),
    ],
)
def test_a_config_without_a_size_is_refused_rather_than_filled_in(
    headinfer: Program, shape: Any, field: str, words: str
) -> None:
    result = headinfer("plan", shape("llama-3-8b", **{field: "absent"}), "--tokens", "8K")
    assert result.status == 1
    assert re.search(words, result.error)
    assert "sizes of some other model" in result.error


@pytest.mark.parametrize("changes", [{"hidden_size": 0}, {"num_hidden_layers": -3}])
def test_a_config_with_a_size_that_is_none(
    headinfer: Program, shape: Any, changes: dict[str, int]
) -> None:
    (name, value) = next(iter(changes.items()))
    result = headinfer("plan", shape("llama-3-8b", **changes), "--tokens", "8K")
    assert result.status == 1
    assert f"has {name}={value}; a model has at least 1" in result.error


@pytest.mark.parametrize(
    "wrong",
    [
        ("--gpu-memory", "-3GiB"),
        ("--gpu-memory", "much"),
        ("--ram", "12 parsecs"),
        ("--host-memory", "1.5.2GiB"),
        ("--batch", "0"),
        ("--new-tokens", "-1"),
        ("--chunk-tokens", "0"),
    ],
)
def test_nonsense_sizes_are_single_lines(
    headinfer: Program, shape: Any, wrong: tuple[str, str]
) -> None:
    result = headinfer("plan", shape("llama-3-8b"), "--tokens", "8K", *wrong)
    assert result.status == 2
    assert wrong[0] in result.error


@pytest.mark.parametrize("ram", ["0", "0GiB"])
def test_a_machine_without_memory(headinfer: Program, shape: Any, ram: str) -> None:
    result = headinfer(
        "plan", shape("llama-3-8b"), "--tokens", "8K", "--device", "cpu", "--ram", ram
    )
    assert result.status == 1
    assert "has no room" in result.error


def test_less_memory_than_the_weights_on_a_gpu(headinfer: Program, shape: Any) -> None:
    model = shape("llama-3-8b")
    asked = ("plan", model, "--tokens", "8K", "--gpu", "RTX 3070", "--ram", "64GiB")
    result = headinfer(*asked)
    assert result.status == 1
    assert "14.96 GiB weights" in result.error
    assert "the GPU budget is 7.52 GiB" in result.error
    enough = re.search(r"Raise --gpu-memory to (\d+) bytes", result.error)
    room = re.search(r"weights that take at most (\d+) bytes on the GPU", result.error)
    assert enough is not None
    assert room is not None
    assert headinfer(*asked, "--gpu-memory", enough[1]).status == 0
    quantised = shape(
        "llama-3-8b",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )
    smaller = headinfer("plan", quantised, *asked[2:], "--json")
    assert smaller.status == 0, smaller.err
    assert json.loads(smaller.out)["predicted_gpu_parts"]["weights"] <= int(room[1])


def test_less_memory_than_the_weights_on_a_cpu(headinfer: Program, shape: Any) -> None:
    asked = ("plan", shape("llama-3-8b"), "--tokens", "8K", "--device", "cpu")
    result = headinfer(*asked, "--ram", "8GiB")
    assert result.status == 1
    assert "has no room beside 14.96 GiB of weights" in result.error
    enough = re.search(r"give at least (\d+) bytes", result.error)
    assert enough is not None
    assert headinfer(*asked[:2], "--tokens", "1", *asked[4:], "--ram", enough[1]).status == 0


def test_weights_that_this_machine_cannot_hold(
    headinfer: Program, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headinfer.hf import geometry
    from headinfer.surroundings import HostMemory

    monkeypatch.setattr(geometry, "host_memory", lambda: HostMemory(16 * 2**30, 12 * 2**30))
    result = headinfer("plan", shape("llama-3-8b"), "--tokens", "8K", "--device", "cpu")
    assert result.status == 1
    assert "the weights do not fit: they take 14.96 GiB of host memory, and 10.80 GiB can be" in (
        result.error
    )


def test_an_unknown_gpu_lists_the_known_ones(headinfer: Program, shape: Any) -> None:
    from headinfer.machines import MACHINES

    result = headinfer("plan", shape("llama-3-8b"), "--tokens", "8K", "--gpu", "Voodoo 2")
    assert result.status == 1
    assert all(machine.name in result.error for machine in MACHINES.values())


def test_a_method_of_quantisation_that_is_not_known(headinfer: Program, shape: Any) -> None:
    model = shape("llama-3-8b", quantization_config={"quant_method": "origami"})
    result = headinfer("plan", model, "--tokens", "8K", "--gpu", "RTX 4090")
    assert result.status == 1
    assert "'origami', whose bytes are not known here; known: bitsandbytes" in result.error


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_of_time_and_memory(
    headinfer: Program, shape: Any, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("matplotlib")
    model, found = shape("qwen2.5-7b"), []
    for name in ("one", "two"):
        path = tmp_path / "plots" / f"{name}.{kind}"
        asked = ("plan", model, "--tokens", "64K", "--gpu", "RTX 4090", "--ram", "64GiB")
        result = headinfer(*asked, "--plot", str(path))
        assert result.status == 0, result.err
        found.append(path.read_bytes())
    assert found[0] == found[1]
    assert found[0].startswith(b"\x89PNG" if kind == "png" else b"<?xml")


def test_a_picture_without_times_and_one_that_cannot_be(
    headinfer: Program, shape: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    asked = ("plan", shape("qwen2.5-7b"), "--tokens", "16K", "--gpu-memory", "24GiB")
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    path = tmp_path / "memory.svg"
    assert headinfer(*asked, "--plot", str(path)).status == 0
    assert path.stat().st_size > 1000
    assert "has to end with .png or .svg" in headinfer(*asked, "--plot", "plan.jpeg").error
    (tmp_path / "file").write_text("")
    blocked = headinfer(*asked, "--plot", str(tmp_path / "file" / "p.png"))
    assert "cannot be written" in blocked.error
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "headinfer[bench]" in headinfer(*asked, "--plot", str(path)).error
