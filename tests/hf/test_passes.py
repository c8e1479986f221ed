# SPDX-License-Identifier: Apache-2.0
"""Passes are reported when they were computed, in order, with few outstanding."""

from __future__ import annotations

from typing import Any

import pytest

import headinfer
from headinfer.hf.passes import Passes
from headinfer.progress import Event, ForwardFinished
from headinfer.testing.zoo import ZOO
from headinfer.testing.zoo.measure import prompt


class Device:
    """A device that finishes work only when somebody waits for it."""

    def __init__(self) -> None:
        self.enqueued = self.computed = self.most = 0
        self.events: list[Event] = []

    def mark(self) -> Any:
        self.enqueued += 1
        number = self.enqueued
        self.most = max(self.most, self.enqueued - self.computed)

        def wait() -> None:
            self.computed = max(self.computed, number)

        return wait

    def on_event(self, event: Event) -> None:
        if isinstance(event, ForwardFinished) and event.new_tokens > 1:
            assert self.computed >= event.past_tokens // 100 + 1, "reported before it was computed"
        self.events.append(event)

    def finished(self) -> list[int]:
        return [e.past_tokens for e in self.events if isinstance(e, ForwardFinished)]


def test_a_prompt_is_reported_as_it_is_computed() -> None:
    device = Device()
    passes = Passes(device, device.mark)
    for chunk in range(5):
        passes.begin(100 * chunk, 100)
        passes.end(100 * chunk, 100)
    assert device.most == 2
    assert device.finished() == [0, 100, 200, 300]
    passes.begin(500, 1)
    assert device.finished() == [0, 100, 200, 300, 400]
    passes.end(500, 1)
    assert device.finished()[-1] == 500
    assert device.computed == 5  # nobody waited for the token's own pass


def test_without_an_observer_the_queue_is_short_all_the_same() -> None:
    device = Device()
    passes = Passes(None, device.mark)
    for chunk in range(5):
        passes.begin(100 * chunk, 100)
        passes.end(100 * chunk, 100)
    assert device.most == 2
    passes.flush()
    assert device.computed == 5


def test_a_processor_that_computes_at_once_reports_at_once() -> None:
    device = Device()
    device.computed = 99
    passes = Passes(device, lambda: None)
    for chunk in range(3):
        passes.begin(100 * chunk, 100)
        passes.end(100 * chunk, 100)
        assert device.finished()[-1] == 100 * chunk


class Raises:
    """An observer that fails once a pass has been computed."""

    def on_event(self, event: Event) -> None:
        if isinstance(event, ForwardFinished):
            raise InterruptedError


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are computed when somebody waits for them, as on a GPU."""
    monkeypatch.setattr("headinfer.hf.attach.mark_on", lambda device: lambda: lambda: None)


def tiny() -> Any:
    return ZOO["llama"].build().eval()


def is_restored(model: Any) -> bool:
    return "_prefill" not in model.__dict__ and model.config._attn_implementation != "headinfer"


@pytest.mark.usefixtures("late")
def test_an_observer_that_raises_at_the_end_leaves_the_model_restored() -> None:
    model = tiny()
    run = headinfer.attach(model, observer=Raises())
    model(prompt(1, 40))
    with pytest.raises(InterruptedError):
        run.close()
    assert is_restored(model)
    run.close()


@pytest.mark.usefixtures("late")
def test_an_error_on_its_way_out_is_not_hidden_by_the_observers() -> None:
    model = tiny()

    def fail() -> None:
        with headinfer.attach(model, observer=Raises()):
            model(prompt(1, 40))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert is_restored(model)
