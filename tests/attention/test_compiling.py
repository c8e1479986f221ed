# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled ahead: once, not while something is timed, and a failure is nobody's but the caller's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from headinfer.attention import compiling, merge_ahead
from headinfer.attention.compiling import compiled, finish_compiling, nothing_ahead

DEVICE = torch.device("cuda", 7)  # nothing is done on it


@pytest.fixture(autouse=True)
def no_lots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiling, "_lots", {})
    monkeypatch.setattr(compiling, "_run", lambda device, work: work())
    yield
    finish_compiling()


def test_nobody_waits_and_the_answer_changes_when_it_is_done() -> None:
    go, begun = threading.Event(), []

    def work() -> None:
        begun.append(threading.current_thread().name)
        assert go.wait(10)

    assert not compiled("some kernels", DEVICE, work)
    assert not compiled("some kernels", DEVICE, work)
    go.set()
    finish_compiling()
    assert compiled("some kernels", DEVICE, work)
    assert [name.startswith("headinfer-compile") for name in begun] == [True]


def test_what_cannot_be_compiled_is_not_tried_again() -> None:
    tried = []

    def work() -> None:
        tried.append(1)
        raise RuntimeError("no such architecture")

    for _ in range(3):
        assert not compiled("some kernels", DEVICE, work)
        finish_compiling()
    assert len(tried) == 1


def test_a_device_that_was_full_is_asked_again() -> None:
    tried = []

    def work() -> None:
        tried.append(1)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("a prompt fills it")

    assert not compiled("some kernels", DEVICE, work)
    finish_compiling()
    assert not compiled("some kernels", DEVICE, work)
    finish_compiling()
    assert compiled("some kernels", DEVICE, work)
    assert len(tried) == 2


def test_nothing_begins_while_something_is_timed() -> None:
    with nothing_ahead():
        assert not compiled("some kernels", DEVICE, lambda: pytest.fail("it began"))
    assert not compiling._lots


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_merges_are_compiled_once_for_every_kind_of_output(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(
        merge_ahead,
        "merge_everything",
        lambda device, dtype, width, *, sink: begun.append((device, dtype, width, sink)),
    )
    for sink in (False, True, False):
        merge_ahead.compile_ahead(DEVICE, torch.bfloat16, 72, sink=sink)
    merge_ahead.compile_ahead(torch.device("cpu"), torch.bfloat16, 72, sink=False)
    merge_ahead.compile_ahead(DEVICE, torch.float64, 72, sink=False)
    finish_compiling()
    assert begun == [(DEVICE, torch.bfloat16, 72, sink) for sink in (False, True)]
