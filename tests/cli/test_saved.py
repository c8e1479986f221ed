# SPDX-License-Identifier: Apache-2.0
"""A text is read once on the command line and asked often; interrupted, the same line goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headinfer.snapshot import Manifest, WriterLock

Program = Any
SHORT = ("--max-new-tokens", "6")


def as_json(result: Any) -> dict[str, Any]:
    assert result.status == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


@pytest.fixture
def ctx(tmp_path: Path) -> str:
    return str(tmp_path / "book.ctx")


@pytest.mark.parametrize("mode", ["--chat", "--raw"])
def test_a_book_is_read_once_and_asked_often(
    headinfer: Program, tiny: str, book: str, ctx: str, mode: str
) -> None:
    read = headinfer("run", tiny, book, "--save", ctx, mode)
    assert read.status == 0, read.err
    assert read.out == ""
    assert f"ask about them with --context {ctx}" in read.err
    before = sorted((path.name, path.read_bytes()) for path in Path(ctx).glob("*.*"))
    for question in ("Who?", "Why?", "Who?"):
        told = as_json(
            headinfer("run", tiny, "--context", ctx, "--question", question, *SHORT, "--json")
        )
        other = ctx + question.strip("?")
        whole = as_json(
            headinfer(
                "run", tiny, book, "--save", other, "--question", question, *SHORT, mode, "--json"
            )
        )
        assert told["answer"] == whole["answer"]
        assert told["prompt_tokens"] == whole["prompt_tokens"]
        assert told["context"]["tokens_there_before"] == Manifest.read(Path(ctx)).tokens
    assert sorted((path.name, path.read_bytes()) for path in Path(ctx).glob("*.*")) == before


def test_the_prompt_is_that_of_a_run_without_a_context(
    headinfer: Program, tiny: str, book: str, ctx: str
) -> None:
    """Here a token is a byte, so that parts meet where the whole would have been cut too."""
    flags = ("--question", "Who?", *SHORT, "--json", "--chunk-tokens", "512")
    plain = as_json(headinfer("run", tiny, book, *flags))
    saved = as_json(headinfer("run", tiny, book, "--save", ctx, *flags))
    assert saved["prompt_tokens"] == plain["prompt_tokens"]
    assert saved["answer"] == plain["answer"]


def test_append_keeps_question_and_answer(
    headinfer: Program, tiny: str, book: str, ctx: str
) -> None:
    headinfer("run", tiny, book, "--save", ctx)
    tokens = Manifest.read(Path(ctx)).tokens
    ask = ("run", tiny, "--context", ctx, *SHORT, "--json", "--question")
    first = as_json(headinfer(*ask, "Who?", "--append"))
    grown = Manifest.read(Path(ctx))
    asked = len("\n\nAnswer this question from the text: Who?[assistant]")
    assert grown.tokens == first["context"]["tokens"]
    assert grown.tokens == tokens + asked + first["new_tokens"] - (first["stopped"] == "eos")
    assert grown.prompt["turns"] == 1
    second = as_json(headinfer(*ask, "And?"))
    assert second["prompt_tokens"] == grown.tokens + len("[user]And?[assistant]")
    assert Manifest.read(Path(ctx)).tokens == grown.tokens
    again = headinfer("run", tiny, book, "--save", ctx)
    assert again.status == 1
    assert "questions and answers among them" in again.error
    assert headinfer("run", tiny, book, "--save", ctx, "--restart").status == 0
    assert Manifest.read(Path(ctx)).tokens == tokens


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_reading_goes_on_and_answers_the_same(
    headinfer: Program, tiny: str, tmp_path: Path, ctx: str, number: signal.Signals
) -> None:
    book = tmp_path / "long.txt"
    book.write_text("The keeper kept the light. " * 45)
    flags = ("--question", "Who?", *SHORT, "--chunk-tokens", "128", "--checkpoint-every", "128")
    whole = as_json(headinfer("run", tiny, str(book), "--save", ctx + "2", *flags, "--json"))
    with subprocess.Popen(
        [sys.executable, "-m", "headinfer", "run", tiny, str(book), "--save", ctx, *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A test run started in the background ignores interrupts, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        manifest = Path(ctx) / "manifest.json"
        while not manifest.exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        assert process.stderr is not None
        shown = process.stderr.read()
        status = process.wait(timeout=60)
    assert status in (0, -number, 128 + number), shown  # 0: it was done first
    assert b"Traceback" not in shown
    if status == 130:
        assert b"the same command goes on from there" in shown
    there = Manifest.read(Path(ctx)).tokens
    assert there
    result = headinfer("run", tiny, str(book), "--save", ctx, *flags, "--json")
    told = as_json(result)
    assert told["answer"] == whole["answer"]
    assert told["context"]["tokens_there_before"] == there
    assert "tokens are in" in result.err
    if there < told["context"]["tokens"]:
        assert "going on from there" in result.err
    names = [path.name for path in Path(ctx).glob("*.kv")]
    for name in names:
        # Names count manifests, which depend on the moment; the bytes do not.
        layer = name[: len("layer-000-token-000000000")]
        (other,) = Path(ctx + "2").glob(f"{layer}*")
        assert (Path(ctx) / name).read_bytes() == other.read_bytes()


def test_a_context_that_is_not_complete_is_not_asked(
    headinfer: Program, tiny: str, book: str, ctx: str
) -> None:
    headinfer("run", tiny, book, "--save", ctx)
    manifest = Manifest.read(Path(ctx))
    object.__setattr__(manifest, "wanted_tokens", manifest.tokens + 50)
    manifest.write(Path(ctx))
    asked = headinfer("run", tiny, "--context", ctx, "--question", "Who?")
    assert asked.status == 1
    assert "reading was interrupted. Run the command with --save again" in asked.error
    assert (
        f"of {manifest.tokens + 50:,} tokens"
        in headinfer("contexts", "list", str(Path(ctx).parent)).out
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--save", "a", "--context", "b"), "use one of them"),
        (("--append", "--prompt", "x"), "--append goes with --context"),
        (("--restart", "--prompt", "x"), "--restart goes with --save"),
        (("--context", "a", "--prompt", "x", "--question", "y"), "has its text already"),
        (("--context", "a"), "needs --question"),
        (("--save", "a", "--prompt", "x", "--num-beams", "2"), "has one sequence"),
        (("--context", "{tmp}/none", "--question", "x"), "there is no context"),
        (("--context", "{tmp}", "--question", "x"), "it has no manifest.json"),
        (("--context", "{tmp}/file", "--question", "x"), "is a file"),
        (("--save", "{tmp}/file", "--prompt", "x"), "is a file"),
        (("--save", "{tmp}", "--prompt", "x"), "is not a saved context and not empty"),
        (("--save", "{tmp}/file/a", "--prompt", "x"), "Not a directory"),
        (("--save", "{tmp}/a", "--question", "x"), "--save needs a text"),
        (("--save", "{tmp}/a", "--prompt", "x", "--checkpoint-every", "soon"), "30s, 5m or 4096"),
        (("{tmp}/file", "--prompt-file", "b", "--save", "{tmp}/a"), "were both given"),
    ],
)
def test_bad_input_is_one_line(
    headinfer: Program, tiny: str, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "file").write_text("hi")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    result = headinfer("run", tiny, *given)
    assert result.status == 1
    assert says in result.error
    assert result.out == ""


def test_another_model_is_refused_in_one_line(
    headinfer: Program, tiny: str, endless: str, tiny_raw: str, book: str, ctx: str
) -> None:
    headinfer("run", tiny, book, "--save", ctx, "--raw")
    for other, what in ((tiny_raw, "tokenizer"), (endless, "config.eos_token_id")):
        result = headinfer("run", other, "--context", ctx, "--question", "Who?")
        assert result.status == 1
        assert "belongs to another model" in result.error
        assert what in result.error


def test_a_read_only_folder_is_asked_and_not_written(
    headinfer: Program, tiny: str, book: str, ctx: str, tmp_path: Path
) -> None:
    headinfer("run", tiny, book, "--save", ctx)
    if os.geteuid() == 0:
        pytest.skip("permissions do not hold for the superuser")
    Path(ctx).chmod(0o500)
    ask = ("run", tiny, "--context", ctx, "--question", "Who?", *SHORT)
    assert headinfer(*ask).status == 0
    assert "Permission denied" in headinfer(*ask, "--append").error
    Path(ctx).chmod(0o700)


def test_two_terminals(headinfer: Program, tiny: str, book: str, ctx: str) -> None:
    headinfer("run", tiny, book, "--save", ctx)
    lock = WriterLock(Path(ctx))
    ask = ("run", tiny, "--context", ctx, "--question", "Who?", *SHORT)
    assert headinfer(*ask).status == 0
    assert f"being written by process {os.getpid()}" in headinfer(*ask, "--append").error
    assert "being written by" in headinfer("contexts", "remove", ctx).error
    assert "being written by" in headinfer("contexts", "list", str(Path(ctx).parent)).out
    lock.release()
    assert headinfer(*ask, "--append").status == 0


def test_contexts_are_looked_after(headinfer: Program, tiny: str, book: str, ctx: str) -> None:
    folder = str(Path(ctx).parent)
    assert "no saved context" in headinfer("contexts", "list", folder).err
    headinfer("run", tiny, book, "--save", ctx)
    (line,) = headinfer("contexts", "list", folder).out.splitlines()
    assert line.startswith(ctx)
    assert "LlamaForCausalLM" in line
    (told,) = as_json_list(headinfer("contexts", "list", folder, "--json"))
    shown = as_json(headinfer("contexts", "show", ctx, "--json"))
    assert told.items() <= shown.items()
    assert f"tokens: {shown['tokens']:,}" in headinfer("contexts", "show", ctx).out
    assert "is sound" in headinfer("contexts", "verify", ctx).out
    path = next(Path(ctx).glob("*.kv"))
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    assert f"{path.name} is damaged" in headinfer("contexts", "verify", ctx).error
    (Path(ctx) / "manifest.json").write_text("{")
    assert "is damaged" in headinfer("contexts", "list", folder).out
    assert headinfer("contexts", "remove", ctx).status == 0
    assert not Path(ctx).exists()
    assert "there is no context" in headinfer("contexts", "remove", ctx).error
    assert "there is no folder" in headinfer("contexts", "list", ctx).error
    assert "Usage" in headinfer("contexts").out


def as_json_list(result: Any) -> list[dict[str, Any]]:
    assert result.status == 0, result.err
    found: list[dict[str, Any]] = json.loads(result.out)
    return found
