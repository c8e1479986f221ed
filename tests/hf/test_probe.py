# SPDX-License-Identifier: Apache-2.0
"""Measured rates: plausible, remembered, and used by forecasts."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from headinfer.attention import native
from headinfer.attention.few_shapes import key_spans
from headinfer.enqueueing import PROBED_CALLS, PROBED_TILES
from headinfer.errors import BudgetTooSmall, InputError
from headinfer.hf import layer_probe, memory_probe, probe
from headinfer.hf.forecast import contexts_up_to, forecast
from headinfer.hf.probe import rates_for
from headinfer.hf.remembered import known_rates
from headinfer.layout import HeadGroup, tiles
from headinfer.rates import Rates

CPU = torch.device("cpu")
SOME = Rates("m", "float32", 1e11, {64: 1e11}, 1e10, 1e10, 1e-4, 1e-3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path))
    return tmp_path


def shape(**more: Any) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1000,
        **more,
    )
    config.dtype = torch.float32
    return config


def test_this_machine_is_measured_once_and_remembered(cache: Path) -> None:
    assert known_rates(CPU, torch.float32) is None
    rates = rates_for(CPU, torch.float32)
    assert 1e6 < rates.block_flops < 1e15
    assert set(rates.attention_flops) == set(probe.DIMS)
    for rate in (rates.weight_bytes_s, rates.resident_bytes_s, rates.host_read_bytes_s):
        assert rate is not None
        assert 1e6 < rate < 1e13
    if native.why_absent() is None:
        assert {1, torch.get_num_threads()} <= set(rates.near_by_threads)
        assert all(1e8 < rate < 1e13 for rate in rates.near_by_threads.values())
        assert rates.threads_enough in rates.near_by_threads
    assert rates.h2d_bytes_s is rates.pin_s_per_gib is None
    assert known_rates(CPU, torch.float32) == rates_for(CPU, torch.float32) == rates
    assert known_rates(CPU, torch.bfloat16) is None
    (file,) = cache.glob("rates-*.json")
    file.write_text("{torn")
    assert known_rates(CPU, torch.float32) is None


def test_rates_that_cannot_be_kept_are_still_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADINFER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(probe, "measure", lambda device, dtype: SOME)
    assert rates_for(CPU, torch.float32) == SOME
    assert "cannot be kept" in caplog.text


def test_a_forecast_has_a_line_per_context_and_refusals_are_lines_too(cache: Path) -> None:
    lengths = contexts_up_to(100_000)
    assert lengths == [8192, 16384, 32768, 65536, 100_000]
    found = forecast(shape(), lengths, gpu="RTX 4090", ram="64GiB", new_tokens=10)
    assert [outlook.tokens for outlook in found.outlooks] == lengths
    assert all(outlook.plan is not None for outlook in found.outlooks)
    seconds = [outlook.prediction.prefill_s for outlook in found.outlooks if outlook.prediction]
    assert seconds == sorted(seconds)
    assert len(seconds) == len(lengths)
    assert found.rates is not None
    assert "estimated" in found.rates.machine
    json.dumps(found.as_dict())
    short = forecast(shape(), lengths, gpu="RTX 4090", ram="64KiB", gpu_memory="450MiB")
    assert "host budget is" in str(short.refusal)
    assert short.outlooks[-1].plan is None
    fitting = [outlook.plan for outlook in short.outlooks if outlook.plan is not None]
    assert short.plan is fitting[-1]
    assert short.longest_tokens is not None
    assert fitting[-1].expected_tokens <= short.longest_tokens < 100_010
    with pytest.raises(BudgetTooSmall, match="GPU budget is"):
        forecast(shape(), lengths, gpu="RTX 4090", ram="64GiB", gpu_memory="45MiB")
    with pytest.raises(InputError, match="called 'Voodoo 2'"):
        forecast(shape(), lengths, gpu="Voodoo 2")


def test_a_machine_that_was_not_measured_gives_memory_without_times(cache: Path) -> None:
    found = forecast(shape(), [4096], device="cpu")
    assert found.rates is None
    assert found.outlooks[0].prediction is None
    assert "predicted_ttft_s" not in found.outlooks[0].as_dict()


@pytest.mark.parametrize("new", [0, 256])
def test_the_longest_context_may_be_shorter_than_the_answer_and_a_prompt(new: int) -> None:
    """What is tried on the way to it has no room for the answer that was asked for."""
    token_bytes = 4 * 2 * 2 * 32 * 4
    found = forecast(shape(), [100], new_tokens=new, device="cpu", host_memory=400 * token_bytes)
    assert found.longest_tokens == 384


def test_a_machine_that_was_measured_gives_times(cache: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(probe, "measure", lambda device, dtype: SOME)
    rates_for(CPU, torch.float32)
    found = forecast(shape(), [4096], device="cpu")
    assert found.rates == SOME
    assert found.outlooks[0].prediction is not None
    assert found.outlooks[0].prediction.decode_s > 4 * 1e-4


def test_a_chunk_is_enqueued_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_probe, "CHUNKS", 2)
    with torch.no_grad():
        found = layer_probe.chunk_layers(CPU, torch.float32)
    assert all(0 < seconds < 10 for seconds in found)


def test_a_chunk_is_timed_where_a_layer_has_as_many_tiles_and_calls_as_the_model_says() -> None:
    token_bytes = 2 * layer_probe.CHUNK_DIM * 2
    heads, before = HeadGroup(0, layer_probe.CHUNK_HEADS), layer_probe.TOKENS_BEFORE
    cut = list(tiles(0, heads, before, slot_bytes=64 * 2**20, token_bytes=token_bytes))
    assert len(cut) == PROBED_TILES
    # Keys as a tile has them in a slot: its heads are as far apart in any of them.
    keys = torch.empty(1, 8, 2 * before, layer_probe.CHUNK_DIM)[:, :, :before]
    assert 1 + len(key_spans(keys, layer_probe.CHUNK_TOKENS)) == PROBED_CALLS


def test_packed_keys_are_attended_as_plain_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.why_absent() is not None:
        pytest.skip(str(native.why_absent()))
    (plain, size), (packed, packed_size) = (
        memory_probe.one_token(CPU, torch.bfloat16, 2**23),
        memory_probe.one_packed_token(2**23),
    )
    assert plain().out.shape == packed().out.shape == (1, 16, 1, 128)
    assert 0.7 < packed_size / size < 1


def test_what_is_timed_beside_copies_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device made up here, whose copies take 10 ms each."""

    class Event:
        def __init__(self, **how: Any) -> None:
            self.at = 0.0

        def record(self, stream: Any) -> None:
            stream.ends.append(max(time.perf_counter(), *stream.ends, 0.0) + 0.01)
            self.at = stream.ends[-1]

        def query(self) -> bool:
            return time.perf_counter() >= self.at

        def elapsed_time(self, other: Any) -> float:
            return 1e3 * (other.at - self.at)

    class Stream:
        def __init__(self, device: Any) -> None:
            self.ends = [0.0]

        def synchronize(self) -> None:
            time.sleep(max(self.ends[-1] - time.perf_counter(), 0))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(memory_probe, "COPIED", 1000)
    beside = memory_probe.Beside(CPU, 1000 / 0.01)
    beside._here = torch.zeros(2, 1000, dtype=torch.uint8)  # nothing is page-locked on a CPU
    rate, link = beside.rate(lambda: time.sleep(0.1), 10**6)
    assert 5e6 < rate <= 10.01e6
    assert link == pytest.approx(1e5, rel=0.3)
