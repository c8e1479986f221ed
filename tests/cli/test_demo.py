# SPDX-License-Identifier: Apache-2.0
"""The demo: a real model answers from the document, and the resident cache agrees."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headinfer.cli.demo import QUESTION, document
from headinfer.errors import InputError

Program = Any
ANSWER = "The cellar key was hung on a brass hook behind the barometer."


@pytest.fixture(scope="session")
def demo_model() -> str:
    """The demo model's folder, in $HEADINFER_CACHE or the user's cache like the demo's own."""
    from headinfer.hf.demo_model import demo_folder

    try:
        return str(demo_folder())
    except InputError as error:
        pytest.skip(f"no demo model: {error}")


def test_the_document_has_the_answer_and_the_length(demo_model: str) -> None:
    from headinfer.hf.generate import build_prompt
    from headinfer.hf.load import load_model

    text = document()
    assert "hung on a brass hook behind the barometer" in text
    _, tokenizer = load_model("demo", device="cpu")
    assert 6000 <= len(tokenizer(text)["input_ids"]) <= 7200
    assert build_prompt(tokenizer, text, QUESTION).tokens + 256 <= 8192


@pytest.mark.slow
@pytest.mark.usefixtures("demo_model")
def test_the_demo_answers_and_the_resident_cache_agrees(headinfer: Program) -> None:
    result = headinfer("demo", "--json", "--device", "cpu")
    assert result.status == 0, result.err
    told = json.loads(result.out)
    assert told["answer"] == ANSWER
    assert told["prompt_tokens"] > 6000
    assert told["resident"]["same_tokens"] is True
    assert told["stats"]["host_bytes"] > told["prompt_tokens"] * 30 * 2 * 3 * 64 * 4
    assert told["timings"]["tokens_per_s"] > 0


def test_the_table_shows_what_was_measured(headinfer: Program, tiny: str) -> None:
    from headinfer.cli.demo import print_measured
    from headinfer.cli.job import Job, execute

    assert headinfer("--version").status == 0
    outcome = execute(
        Job(model=tiny, text="text", question="q", max_new_tokens=4, compare=True, as_json=True)
    )
    assert outcome.same_tokens is True
    from headinfer.cli.console import stderr

    with stderr.capture() as shown:
        print_measured(outcome)
    for name in ("host memory", "time to first token", "tokens per second", "moved"):
        assert name in shown.get()
    assert "same answer, token for token" in shown.get()
