# SPDX-License-Identifier: Apache-2.0
"""Prompts, sampling flags and timings of one answer."""

from __future__ import annotations

from typing import Any

import pytest

from headinfer.errors import InputError
from headinfer.hf.generate import Sampling, build_prompt, check_positions, generate_text
from headinfer.hf.load import load_model
from headinfer.hf.peak import PeakMemory
from headinfer.testing.folders import write_tiny_llama


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(str(write_tiny_llama(tmp_path_factory.mktemp("tiny"))), device="cpu")


@pytest.mark.parametrize(
    ("text", "question", "chat", "framed"),
    [
        (
            "T",
            "Q",
            True,
            "[user]<text>\nT\n</text>\n\nAnswer this question from the text: Q[assistant]",
        ),
        ("T", None, True, "[user]T[assistant]"),
        (None, "Q", None, "[user]Q[assistant]"),
        ("T", "Q", False, "T\n\nQuestion: Q\nAnswer:"),
        ("T ", None, False, "T "),
    ],
)
def test_prompts_are_framed(
    loaded: tuple[Any, Any], text: str | None, question: str | None, chat: bool | None, framed: str
) -> None:
    _, tokenizer = loaded
    prompt = build_prompt(tokenizer, text, question, chat=chat)
    assert tokenizer.decode(prompt.ids[0]) == framed
    assert prompt.tokens == len(framed)


@pytest.mark.parametrize(("text", "question"), [(None, None), (" ", None), ("", " \n")])
def test_an_empty_prompt_is_refused(
    loaded: tuple[Any, Any], text: str | None, question: str | None
) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        build_prompt(loaded[1], text, question)


def test_the_pieces_are_the_answer(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    pieces: list[str] = []
    found = generate_text(
        model, tokenizer, build_prompt(tokenizer, "abc", None), max_new_tokens=20,
        on_text=pieces.append,
    )  # fmt: skip
    assert "".join(pieces) == found.text
    assert len(found.token_ids) == 20
    assert found.stopped == "length"
    assert found.ttft_s is not None
    assert found.itl_s is not None
    assert found.seconds == pytest.approx(found.ttft_s + 19 * found.itl_s)


def test_one_token_has_no_interval(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    found = generate_text(model, tokenizer, build_prompt(tokenizer, "a", None), max_new_tokens=1)
    assert found.itl_s is None
    assert found.timings()["tokens_per_s"] is None


@pytest.mark.parametrize("flag", [{"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 3}])
def test_flags_that_would_be_ignored_are_refused(flag: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="without --do-sample"):
        Sampling(**flag)
    assert Sampling(do_sample=True, **flag).arguments().items() >= flag.items()


def test_positions_are_counted_with_the_answer(loaded: tuple[Any, Any]) -> None:
    config = loaded[0].config
    check_positions(config, prompt_tokens=2000, new_tokens=48)
    with pytest.raises(InputError, match="2,049 positions; the model was made for 2,048"):
        check_positions(config, prompt_tokens=2001, new_tokens=48)


def test_peak_memory_sees_what_was_held() -> None:
    import torch

    with PeakMemory(torch.device("cpu")) as before:
        pass
    with PeakMemory(torch.device("cpu")) as during:
        block = torch.ones(2**25)
        for _ in range(20):
            block.add_(1)
    assert during.host_bytes >= before.host_bytes + 2**26
    assert during.as_dict() == {"gpu_bytes": None, "host_rss_bytes": during.host_bytes}
