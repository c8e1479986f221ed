# SPDX-License-Identifier: Apache-2.0
"""Bad input gives one line that says what, the numbers and the remedy; never a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Program = Any


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (
            ("run", "{tiny}", "--prompt", "hi", "--gpu-memory", "banana"),
            2,
            "'banana' is not a size",
        ),
        (("run", "{tiny}", "--prompt", "hi", "--host-memory", "-3GiB"), 2, "'-3GiB' is not a size"),
        (("run", "{tiny}", "--prompt", "hi", "--max-new-tokens", "0"), 2, "--max-new-tokens"),
        (("run", "{tiny}", "--prompt", "hi", "--dtype", "int3"), 2, "float16"),
        (("run", "{tiny}", "--prompt", "hi", "--seed", "-1"), 2, "--seed"),
        (("run", "{tiny}", "--prompt", "hi", "--seed", str(2**64)), 2, "--seed"),
        (("run",), 2, "MODEL"),
        (("rnu",), 2, "No such command 'rnu'"),
        (("run", "{tiny}", "--prompt", "hi", "--frobnicate"), 2, "--frobnicate"),
        (("plan", "{tiny}"), 2, "--tokens"),
        (("run", "/no/such/folder", "--prompt", "hi"), 1, "no folder or file /no/such/folder"),
        (("run", "no-one/nothing", "--prompt", "hi"), 1, "HF_HUB_OFFLINE is set"),
        (("run", "{tiny}/config.json", "--prompt", "hi"), 1, "not a GGUF file"),
        (("run", "{tmp}", "--prompt", "hi"), 1, "no config.json"),
        (("run", "{tiny}"), 1, "there is no prompt"),
        (("run", "{tiny}", "--prompt", "  "), 1, "the prompt is empty"),
        (("run", "{tiny}", "--prompt-file", "{tmp}/none.txt"), 1, "No such file"),
        (("run", "{tiny}", "--prompt-file", "{tmp}"), 1, "Is a directory"),
        (("run", "{tiny}", "--prompt-file", "{tmp}/empty.txt"), 1, "the prompt is empty"),
        (("run", "{tiny}", "--prompt-file", "-"), 1, "standard input has 0 characters"),
        (("run", "{tiny}", "--prompt-file", "{tmp}/latin.txt"), 1, "byte 0xe9 at offset 3 of 4"),
        (("run", "{tiny}", "--prompt-file", "a", "--prompt", "b"), 1, "use one of them"),
        (("run", "{tiny_raw}", "--prompt", "hi", "--chat"), 1, "no chat template; use --raw"),
        (("run", "{tiny}", "--prompt", "hi", "--temperature", "0.5"), 1, "--do-sample"),
        (("run", "{tiny}", "--prompt", "hi", "--device", "abacus"), 1, "not a device"),
        (("run", "{tiny}", "--prompt", "hi", "--host-memory", "1KiB"), 1, "Raise --host-memory to"),
        (("plan", "{tiny}", "--tokens", "9", "--gpu-memory", "1MiB"), 1, "Raise --gpu-memory to"),
        (("doctor", "/no/such/folder"), 1, "no folder or file"),
    ],
)
def test_bad_input_is_one_line(
    headinfer: Program,
    tiny: str,
    tiny_raw: str,
    tmp_path: Path,
    arguments: tuple[str, ...],
    status: int,
    says: str,
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin1"))
    places = {"tiny": tiny, "tiny_raw": tiny_raw, "tmp": str(tmp_path)}
    result = headinfer(*(argument.format(**places) for argument in arguments))
    assert result.status == status
    assert says in result.error
    assert result.out == ""


def test_the_budget_named_in_the_refusal_works(headinfer: Program, tiny: str) -> None:
    asked = ("run", tiny, "--prompt", "hello", "--max-new-tokens", "2", "--json")
    refused = headinfer(*asked, "--host-memory", "1KiB").error
    least = refused.split("Raise --host-memory to ")[1].split(" bytes")[0]
    assert headinfer(*asked, "--host-memory", least).status == 0
    assert headinfer(*asked, "--host-memory", str(int(least) - 1)).status == 1


def test_cuda_without_cuda_is_refused(headinfer: Program, tiny: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert (
        "sees 0 CUDA devices" in headinfer("run", tiny, "--prompt", "hi", "--device", "cuda").error
    )


def test_a_hub_that_does_not_answer_is_one_line(
    headinfer: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("headinfer.hf.load._hub_answers", lambda: False)
    error = headinfer("run", "no-one/nothing", "--prompt", "hi").error
    assert "the model hub cannot be reached" in error
    assert "Name a local folder" in error


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (RuntimeError("no\nway"), "RuntimeError: no way (unexpected: HEADINFER_DEBUG=1 shows"),
        (MemoryError(), "the machine ran out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
)
def test_an_unexpected_error_is_one_line_too(
    headinfer: Program, monkeypatch: pytest.MonkeyPatch, raised: Exception, says: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr("headinfer.cli.job.execute", fail)
    result = headinfer("run", "demo", "--prompt", "hi")
    assert result.status == 1
    assert says in result.error


def test_debug_shows_where_it_happened(tiny: str) -> None:
    command = [sys.executable, "-m", "headinfer", "run", tiny, "--prompt", " "]
    environment = {**os.environ, "HEADINFER_DEBUG": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 1
    assert "Traceback" in found.stderr


def test_out_of_gpu_memory_is_one_line(
    headinfer: Program, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    error = headinfer("run", tiny, "--prompt", "hi").error
    assert "1.00 GiB of 8.00 GiB are free" in error
    assert "--chunk-tokens" in error
