# SPDX-License-Identifier: Apache-2.0
"""`headinfer run`: where the prompt comes from, what is printed where, and that it is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import headinfer.hf.generate as answers
from headinfer.hf.load import load_model

Program = Any


def as_json(result: Any) -> dict[str, Any]:
    assert result.status == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_the_answer_alone_goes_to_standard_output(headinfer: Program, tiny: str, book: str) -> None:
    question = ("--question", "Who?", "--max-new-tokens", "6")
    told = as_json(headinfer("run", tiny, "--prompt-file", book, *question, "--json"))
    plain = headinfer("run", tiny, "--prompt-file", book, *question)
    assert plain.status == 0
    assert plain.out == told["answer"] + "\n"
    assert "head by head" in plain.err
    assert f"read {told['prompt_tokens']} tokens" in plain.err


def test_the_answer_is_that_of_the_stock_cache(headinfer: Program, tiny: str, book: str) -> None:
    told = as_json(
        headinfer(
            "run", tiny, "--prompt-file", book, "--max-new-tokens", "12", "--chunk-tokens", "7",
            "--json",
        )
    )  # fmt: skip
    model, tokenizer = load_model(tiny, device="cpu")
    prompt = answers.build_prompt(tokenizer, Path(book).read_text(encoding="utf-8"), None)
    stock = answers.generate_text(model, tokenizer, prompt, max_new_tokens=12)
    assert told["answer"] == stock.text
    assert told["prompt_tokens"] == prompt.tokens
    assert told["plan"]["chunk_tokens"] == 7


def test_json_has_plan_stats_timings_and_peak(headinfer: Program, tiny: str) -> None:
    told = as_json(headinfer("run", tiny, "--prompt", "abc", "--max-new-tokens", "4", "--json"))
    assert told["model"] == tiny
    assert (told["device"], told["dtype"]) == ("cpu", "float32")
    assert told["plan"]["expected_tokens"] == told["prompt_tokens"] + 4
    assert told["stats"]["host_bytes"] > 0
    assert told["timings"]["ttft_s"] > 0
    assert told["peak"]["host_rss_bytes"] > 0
    assert told["peak"]["gpu_bytes"] is None
    assert told["stopped"] in {"eos", "length"}


@pytest.mark.parametrize("arguments", [(), ("--prompt-file", "-")])
def test_piped_text_is_the_prompt(
    headinfer: Program, tiny: str, arguments: tuple[str, ...]
) -> None:
    text = "naïve text with accents: é ü 漢"
    piped = as_json(
        headinfer("run", tiny, *arguments, "--json", "--max-new-tokens", "4", stdin=text.encode())
    )
    given = as_json(headinfer("run", tiny, "--prompt", text, "--json", "--max-new-tokens", "4"))
    assert piped["prompt_tokens"] == given["prompt_tokens"]
    assert piped["answer"] == given["answer"]


def test_an_empty_pipe_is_no_prompt_when_there_is_a_question(headinfer: Program, tiny: str) -> None:
    told = as_json(headinfer("run", tiny, "--question", "Who?", "--json", "--max-new-tokens", "2"))
    assert told["prompt_tokens"] == len("[user]Who?[assistant]")


def test_chat_and_raw_frame_the_prompt(headinfer: Program, tiny: str, tiny_raw: str) -> None:
    def tokens(model: str, *flags: str) -> int:
        told = headinfer("run", model, "--prompt", "hello", *flags, "--json")
        return int(as_json(told)["prompt_tokens"])

    assert tokens(tiny) == tokens(tiny, "--chat") == len("[user]hello[assistant]")
    assert tokens(tiny, "--raw") == tokens(tiny_raw) == len("hello")


def test_a_gguf_file_is_a_model(headinfer: Program, tiny_gguf: str) -> None:
    told = as_json(
        headinfer("run", tiny_gguf, "--prompt", "abc", "--max-new-tokens", "3", "--json")
    )
    assert told["dtype"] == "float32"
    assert told["prompt_tokens"] == 3


def test_sampling_flags_reach_generate(headinfer: Program, tiny: str) -> None:
    def answer(*flags: str) -> str:
        told = headinfer("run", tiny, "--prompt", "hi", "--max-new-tokens", "16", "--json", *flags)
        return str(as_json(told)["answer"])

    hot = ("--do-sample", "--temperature", "5.0", "--top-k", "200", "--top-p", "1.0", "--seed")
    assert answer(*hot, "1") == answer(*hot, "1")
    assert answer(*hot, "1") != answer(*hot, "2")
    assert answer("--do-sample", "--top-k", "1") == answer()


def test_beams_print_the_answer_at_once(headinfer: Program, tiny: str) -> None:
    flags = ("--prompt", "hi", "--max-new-tokens", "5", "--num-beams", "2")
    told = as_json(headinfer("run", tiny, *flags, "--json"))
    assert told["timings"]["ttft_s"] is None
    assert headinfer("run", tiny, *flags).out == told["answer"] + "\n"


def test_a_text_beyond_the_positions_can_be_allowed(headinfer: Program, tiny: str) -> None:
    long = ("--prompt", "x" * 2100, "--max-new-tokens", "1", "--json")
    refused = headinfer("run", tiny, *long)
    assert refused.status == 1
    assert "2,117 tokens and 1 new ones make 2,118 positions" in refused.error
    assert "made for 2,048" in refused.error
    assert as_json(headinfer("run", tiny, *long, "--allow-beyond-positions"))["new_tokens"] == 1


def test_the_plan_is_made_for_the_beams(headinfer: Program, tiny: str) -> None:
    flags = ("--prompt", "hi", "--max-new-tokens", "5", "--num-beams", "3")
    found = headinfer("run", tiny, *flags, "--json")
    said, done = found.err, json.loads(found.out)["plan"]
    assert "batch 3" in said
    assert done["batch"] == 3


@pytest.mark.parametrize("question", [(), ("--question", "Who keeps it?")])
@pytest.mark.parametrize("mode", ["--chat", "--raw"])
def test_a_text_shortened_as_advised_is_accepted(
    headinfer: Program, tiny: str, tmp_path: Path, mode: str, question: tuple[str, ...]
) -> None:
    book = tmp_path / "long.txt"
    flags = ("--prompt-file", str(book), "--max-new-tokens", "2", mode, *question)
    book.write_text("a" * 3000)
    refused = headinfer("run", tiny, *flags)
    most = int(refused.error.split("Shorten the text to ")[1].split(" tokens")[0].replace(",", ""))
    book.write_text("a" * most)  # a token is a byte here
    assert headinfer("run", tiny, *flags).status == 0
    book.write_text("a" * (most + 1))
    assert headinfer("run", tiny, *flags).status == 1


def test_what_was_predicted_is_shown_beside_what_was_measured(
    headinfer: Program, tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    from headinfer.hf import probe
    from headinfer.rates import Rates

    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path))
    asked = ("run", tiny, "--prompt", "hello", "--max-new-tokens", "3")
    assert "first token: predicted" not in headinfer(*asked).err
    assert json.loads(headinfer(*asked, "--json").out)["predicted"] is None
    rates = Rates("m", "float32", 1e11, {64: 1e11}, 1e10, 1e10, 1e-4, 1e-3)
    monkeypatch.setattr(probe, "measure", lambda device, dtype: rates)
    probe.rates_for(torch.device("cpu"), torch.float32)
    assert "to the first token" in headinfer(*asked).err
    predicted = json.loads(headinfer(*asked, "--json").out)["predicted"]
    assert predicted["itl_s"] > 2e-4
    assert predicted["decode_limit"]
