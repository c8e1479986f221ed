# SPDX-License-Identifier: Apache-2.0
"""Somebody with a laptop who knows nothing but what the messages say gets to a run that works."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LAPTOP = ("--gpu-memory", "8GiB", "--host-memory", "12GiB")

Program = Any


def number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return None if found is None else int(found[1].replace(",", ""))


@pytest.mark.parametrize(
    ("name", "tokens"), [("llama-3-8b", 1_000_000), ("qwen2.5-7b", 400_000), ("gpt-oss-20b", 10**6)]
)
def test_a_plan_for_a_laptop(headinfer: Program, tmp_path: Path, name: str, tokens: int) -> None:
    """The machine cannot grow: other weights and a shorter text are what is left to follow."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    followed = []
    for _ in range(4):
        (tmp_path / "config.json").write_text(json.dumps(config))
        asked = ("plan", str(tmp_path), "--tokens", str(tokens), "--new-tokens", "0", *LAPTOP)
        result = headinfer(*asked, "--json")
        if result.status == 0:
            break
        message = result.error
        if number(r"weights that take at most (\d+) bytes", message) is not None:
            followed.append("weights")
            config = smaller(config)
        elif (shorter := number(r"shorten the context to ([\d,]+) tokens", message)) is not None:
            followed.append("tokens")
            tokens = shorter
        else:
            raise AssertionError(f"nothing to follow in {message!r}")
    assert result.status == 0, result.err
    plan = json.loads(result.out)
    assert plan["predicted_gpu_bytes"] <= 8 * 2**30
    assert plan["predicted_host_bytes"] <= 12 * 2**30
    assert plan["contexts"][-1]["tokens"] == tokens
    assert followed
    assert len(followed) <= 2


def smaller(config: dict[str, Any]) -> dict[str, Any]:
    """Weights in 4 bits; of a model that has them already, the smaller one of its kind."""
    if "quantization_config" not in config:
        return config | {
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
        }
    return config | {"num_hidden_layers": config["num_hidden_layers"] // 3}


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    path.write_text("The keeper kept the light. " * 120, encoding="utf-8")
    return path


def raise_memory(asked: list[str], message: str, novel: Path) -> bool:
    least = number(r"Raise --host-memory to (\d+) bytes", message)
    if least is None:
        return False
    asked[asked.index("--host-memory") + 1] = str(least)
    return True


def shorten_text(asked: list[str], message: str, novel: Path) -> bool:
    tokens = number(r"at ([\d,]+) tokens does not fit", message)
    fewer = number(r"shorten the context to ([\d,]+) tokens", message)
    if tokens is None or fewer is None:
        return False
    text = novel.read_text(encoding="utf-8")
    # The answer and the question take their part of the tokens, too: what is cut is the text's.
    kept = len(text) * max(fewer - 24, 0) // tokens
    novel.write_text(text[:kept], encoding="utf-8")
    return True


@pytest.mark.parametrize("follow", [raise_memory, shorten_text])
def test_a_run_with_too_little_memory(
    headinfer: Program, endless: str, novel: Path, follow: Callable[..., bool]
) -> None:
    asked = ["run", endless, "--prompt-file", str(novel), "--raw", "--max-new-tokens", "8",
             "--host-memory", "64KiB", "--allow-beyond-positions", "--json"]  # fmt: skip
    refused = headinfer(*asked)
    assert refused.status == 1
    for _ in range(3):
        assert follow(asked, refused.error, novel), refused.error
        result = headinfer(*asked)
        if result.status == 0:
            break
        refused = result
    told = json.loads(result.out)
    assert told["new_tokens"] == 8
    assert told["stats"]["host_bytes"] <= told["plan"]["host_budget_bytes"]
