# SPDX-License-Identifier: Apache-2.0
"""The interface of the published HeadInfer code runs on current transformers, for other models too."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import headinfer
from headinfer.cache import OffloadedCache
from headinfer.hf.cache import HeadLayer
from headinfer.hf.cache_name import cache_argument, cache_returned
from headinfer.mp import mp_headinfer, mp_simulate_decode
from headinfer.testing.folders import write_tiny_llama
from headinfer.testing.zoo import REFUSED, ZOO

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ["llama", "mistral", "qwen2", "gemma2", "qwen3_next", "deepseek_v3"]
BOUND = 1e-5


def tokens(model: Any, count: int = 180) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (1, count), generator=generator)


def chunks(model: Any, cache: Any, ids: Tensor, sizes: tuple[int, ...], **more: Any) -> Tensor:
    """Logits of the last token of every chunk."""
    found, start = [], 0
    with torch.no_grad():
        for size in sizes:
            out = model(
                input_ids=ids[:, start : start + size],
                use_cache=True,
                **cache_argument(model, cache),
                **more,
            )
            cache = cache_returned(out)
            found.append(out.logits[:, -1])
            start += size
    return torch.stack(found)


def published_cache() -> Any:
    past = OffloadedCache()
    past.max_cache_len = 0
    past._seen_tokens = 0
    return past


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_snippet_runs(family: str) -> None:
    model = ZOO[family].build()
    ids = tokens(model)
    sizes = (80, 80, 19, 1)
    expected = chunks(model, DynamicCache(config=model.config), ids, sizes)

    mp_headinfer(model)
    past_key_values = published_cache()
    with torch.no_grad():
        outputs = model(
            input_ids=ids[:, :80],
            past_key_values=past_key_values,
            use_cache=True,
            num_logits_to_keep=1,
        )
    assert cache_returned(outputs) is past_key_values
    assert outputs.logits.shape[1] == 1
    rest = chunks(model, past_key_values, ids[:, 80:], sizes[1:], num_logits_to_keep=1)
    found = torch.cat([outputs.logits[:, -1][None], rest])
    assert (found - expected).abs().max() <= BOUND * expected.abs().max()
    assert past_key_values.get_seq_length() == 180


def test_the_cache_learns_the_layers_of_the_model() -> None:
    model = ZOO["gemma2"].build()
    mp_headinfer(model)
    past = published_cache()
    assert not past.layers
    chunks(model, past, tokens(model), (180,))
    stock = DynamicCache(config=model.config)
    assert [isinstance(layer, HeadLayer) for layer in past.layers] == [
        not layer.is_sliding for layer in stock.layers
    ]
    assert len(past.head_layers) < len(past.layers)


def test_generate_takes_the_published_cache() -> None:
    model = ZOO["llama"].build()
    ids = tokens(model)
    given: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 9,
        "do_sample": False,
    }
    expected = model.generate(ids, **given)
    mp_headinfer(model, chunk_tokens=32)
    past = published_cache()
    assert model.generate(ids, **cache_argument(model, past), **given).tolist() == expected.tolist()
    assert past.get_seq_length() == 188


def test_patching_twice_changes_nothing() -> None:
    model = ZOO["llama"].build()
    assert mp_headinfer(model) is model
    hooks = len(model._forward_pre_hooks)
    assert mp_headinfer(model) is model
    assert len(model._forward_pre_hooks) == hooks


def test_a_model_that_was_attached_understands_the_old_names_too() -> None:
    model = ZOO["llama"].build()
    with headinfer.attach(model):
        mp_headinfer(model)
        out = model(
            input_ids=tokens(model), past_key_values=published_cache(), num_logits_to_keep=1
        )
        assert out.logits.shape[1] == 1


def test_a_refused_model_is_left_as_it_was() -> None:
    model = REFUSED["bloom"].build()
    with pytest.raises(headinfer.UnsupportedModel):
        mp_headinfer(model)
    assert not model._forward_pre_hooks


def test_a_patched_model_can_be_collected() -> None:
    model = mp_headinfer(ZOO["llama"].build())
    chunks(model, published_cache(), tokens(model), (180,))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copied_cache_is_independent() -> None:
    model = mp_headinfer(ZOO["llama"].build())
    past = published_cache()
    ids = tokens(model)
    chunks(model, past, ids, (170, 10))
    twin = copy.deepcopy(past)
    assert type(twin) is OffloadedCache
    first = chunks(model, past, ids[:, :5], (5,))
    assert torch.equal(chunks(model, twin, ids[:, :5], (5,)), first)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_simulated_context_can_be_decoded(family: str) -> None:
    model = ZOO[family].build()
    cache = mp_simulate_decode(model, start_length=20_000)
    assert isinstance(cache, OffloadedCache)
    assert cache.get_seq_length() == 20_000
    for layer in cache.head_layers:
        assert layer.get_seq_length() == 20_000
    out = chunks(model, cache, tokens(model, 3), (1, 1, 1))
    assert torch.isfinite(out).all()
    assert cache.get_seq_length() == 20_003


def test_putting_a_context_in_place_is_no_long_forward_pass(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = ZOO["llama"].build()
    with caplog.at_level("WARNING", "headinfer"):
        cache = mp_simulate_decode(model, start_length=1300)
        model(input_ids=tokens(model, 1), **cache_argument(model, cache))
        assert not [record for record in caplog.records if "forward pass" in record.message]
        model(input_ids=tokens(model, 1100), **cache_argument(model, cache))
    assert len([record for record in caplog.records if "forward pass" in record.message]) == 1


def test_a_simulated_context_is_attended_in_full() -> None:
    """The whole of it: the answer is that of a resident cache with the same keys and values."""
    model = ZOO["llama"].build()
    resident = DynamicCache(config=model.config)
    cache = mp_simulate_decode(model, start_length=20_000)
    for index, layer in enumerate(cache.layers):
        length = layer.get_seq_length()
        resident.update(
            layer.gather(length, values=False), layer.gather(length, values=True), index
        )
    found = chunks(model, cache, tokens(model, 1), (1,))
    stock = ZOO["llama"].build()
    expected = chunks(stock, resident, tokens(model, 1), (1,))
    assert (found - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize("length", [0, -5])
def test_a_simulated_context_of_nothing_is_an_error(length: int) -> None:
    with pytest.raises(headinfer.InputError, match=f"start_length={length}"):
        mp_simulate_decode(ZOO["llama"].build(), start_length=length)


def test_a_simulated_context_too_long_for_memory_names_the_budget() -> None:
    with pytest.raises(headinfer.BudgetTooSmall, match="host_memory"):
        mp_simulate_decode(ZOO["llama"].build(), start_length=10**6, host_memory="1MiB")


def test_main_says_what_it_does() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in (
        "--model",
        "--chunk-tokens",
        "--chunks",
        "--start-length",
        "--new-tokens",
        "--device",
    ):
        assert option in done.stdout


def test_main_runs_a_local_model(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    command = [sys.executable, str(ROOT / "main.py"), "--model", str(tmp_path), "--device", "cpu"]
    sizes = ["--chunk-tokens", "64", "--chunks", "3", "--start-length", "2000", "--new-tokens", "4"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "192 tokens" in done.stdout
    assert "2,000 tokens" in done.stdout
    assert "tokens/s" in done.stdout
    missing = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "--model", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr
    assert missing.stderr.startswith("error: ")
