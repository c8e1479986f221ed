# SPDX-License-Identifier: Apache-2.0
"""Predicted beside measured: the clock reads events, the session puts both next to each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headinfer
from headinfer.hf.compared import Figure, RequestClock
from headinfer.hf.remembered import remember
from headinfer.progress import Event, ForwardFinished, ForwardStarted
from headinfer.rates import Rates

RATES = Rates("m", "float32", 1e10, {16: 1e10}, 1e10, 1e10, 1e-3, 1e-3)


class Times:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_request_is_timed_by_its_events() -> None:
    times, seen = Times(), []

    class Other:
        def on_event(self, event: Event) -> None:
            seen.append(event)

    clock = RequestClock(Other(), times)
    assert clock.token_s is clock.prefill_s is None
    for past, new, took in ((0, 50, 2.0), (50, 30, 3.0)):
        clock.on_event(ForwardStarted(past, new))
        times.seconds += took
        clock.on_event(ForwardFinished(past, new, took))
    for past, took in ((80, 0.2), (81, 0.4), (82, 0.4), (83, 9.0)):
        clock.on_event(ForwardStarted(past, 1))
        clock.on_event(ForwardFinished(past, 1, 0.0))
        times.seconds += took
    assert clock.prompt_tokens == 80
    assert clock.prefill_s == pytest.approx(5.0)
    assert clock.token_s == pytest.approx(0.4)
    assert len(seen) == 12
    clock.on_event(ForwardStarted(0, 7))
    assert (clock.prefill_s, clock.token_s, clock.prompt_tokens) == (None, None, 0)


def test_a_session_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path))
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(1, 41)[None]

    def generate(run: Any) -> dict[str, dict[str, float | None]]:
        model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert run.compared is not None
        return json.loads(json.dumps(run.compared.as_dict()))

    with headinfer.attach(model) as run:
        assert run.compared is None
        found = generate(run)
    assert found["time to the first token"]["predicted_s"] is None  # not measured yet
    assert found["time per token"]["measured_s"] > 0
    remember(RATES, torch.device("cpu"), torch.float32)
    with headinfer.attach(model, expected_tokens=46) as run:
        found = generate(run)
        text = str(run.compared)
    assert found["time to the first token"]["predicted_s"] > 0
    assert found["time to the first token"]["measured_s"] > 0
    held = found["keys and values in host memory"]
    assert held["measured_bytes"] <= held["predicted_bytes"]
    assert "GPU peak" not in found
    assert "time per token: predicted 3 ms, measured" in text


def test_figures_that_are_missing_are_dashes() -> None:
    assert str(Figure("x", None, 0.5, "s")) == "x: predicted -, measured 500 ms"
    assert str(Figure("x", 2.0, 3.0, "s")) == "x: predicted 2.00 s, measured 3.00 s (+50%)"
    assert "1.00 GiB" in str(Figure("x", 2**30, None, "bytes"))
