# SPDX-License-Identifier: Apache-2.0
"""Times layers of random-weight Llamas, because what transformers itself costs per layer and per token is
part of every prediction.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaModel

from headinfer.attention.compiling import finish_compiling, nothing_ahead
from headinfer.attention.placed import Kind, ready
from headinfer.hf.attach import attach
from headinfer.hf.cache_name import cache_argument
from headinfer.hf.probe_clock import Clock
from headinfer.rates import BLOCK_ROWS

NO_ATTENTION = "headinfer-probe"
TINY_DIM, PER_KV = 128, 4
"""Of the layers that are timed: head dim, and query heads for each KV head, as most models have them."""
SMALL_PARAMS = 512 * (3 * 1536 + 2 * 512 + 2 * 128)
"""Of a layer as wide as those of models of 100 million parameters."""
LARGE_PARAMS = 4096 * (3 * 14336 + 2 * 4096 + 2 * 1024)
"""Of a layer as wide as those of models of 8 billion parameters."""
STEPS = 24
"""Recorded steps of which the shortest counts."""
CHUNK_HEADS, CHUNK_DIM, CHUNK_TOKENS, TOKENS_BEFORE = 8, 64, 256, 1536
CHUNKS = 9
"""Of those that are timed, all at the same place: whatever is made for a shape is there."""


def per_layer(
    device: torch.device, dtype: torch.dtype, weight_bytes_s: float
) -> tuple[float, float]:
    """Seconds of a layer beside reading its weights at that rate, and of a token beside its layers. The
    layers are of a small model: what passes through caches from one to the next makes the rest slower. Many
    of them, as large caches would keep the weights of a few, and a difference of few is mostly noise."""
    less, more = 2, 16
    seconds = dict.fromkeys((less, more), float("inf"))
    for depth in (less, more, less, more):  # others take the CPU for a while, and not for one alone
        took = _decode_s(device, dtype, _llama(512, 1536, depth, 64))
        seconds[depth] = min(seconds[depth], took)
    whole = (seconds[more] - seconds[less]) / (more - less)
    layer = max(whole - SMALL_PARAMS * dtype.itemsize / weight_bytes_s, 0.2 * whole, 1e-6)
    return layer, max(seconds[less] - less * whole, 0.0)


def per_recorded_layer(
    clock: Clock, device: torch.device, dtype: torch.dtype
) -> tuple[float, float, float]:
    """The same of steps that are recorded: the host is done with one before the GPU has begun it, so
    both count. And bytes/s of the weights of layers as large models have them, beside what a layer
    takes anyway."""
    # What recorded steps consist of is compiled before anything is timed.
    ready(Kind(dtype, TINY_DIM, TINY_DIM, PER_KV, 1, False), device)
    finish_compiling()
    few, many, one, three = (
        _recorded(clock, device, dtype, config)
        for config in (
            _llama(64, 128, 2),
            _llama(64, 128, 10),
            _llama(4096, 14336, 1),
            _llama(4096, 14336, 3),
        )
    )
    on_device, on_host = ((more - less) / 8 for more, less in zip(many, few, strict=True))
    # The host is timed twice, a second or two apart: others take it for a while, and not for one alone.
    generated = min(_decode_s(device, dtype, _llama(64, 128, 10)) for _ in range(2))
    again = _recorded(clock, device, dtype, _llama(64, 128, 2))
    token = max(min(few.host_s, again.host_s) - 2 * on_host, generated - many.device_s, 0.0)
    whole = (three.device_s - one.device_s) / 2
    weights = max(whole - on_device, 0.2 * whole, 1e-6)
    return max(on_device + on_host, 1e-6), token, LARGE_PARAMS * dtype.itemsize / weights


class _Recorded(NamedTuple):
    """Seconds of a step that is replayed: of the device, and until the host is done enqueueing it."""

    device_s: float
    host_s: float


def _recorded(
    clock: Clock, device: torch.device, dtype: torch.dtype, config: LlamaConfig
) -> _Recorded:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.ones((1, 32), dtype=torch.long, device=device)
    with attach(model, expected_tokens=64) as run:
        cache = run.new_cache()

        def step() -> None:
            model(input_ids=ids[:, :1], **cache_argument(model, cache))

        model(input_ids=ids, **cache_argument(model, cache))
        for _ in range(4):  # one as ever, one that is recorded, one that is compared
            step()
        # The GPU has waited for a model to be made: its clocks rise while it is busy.
        device_s, hosts = clock.seconds(step, times=STEPS), []
        for _ in range(8):
            started = time.perf_counter()
            step()
            hosts.append(time.perf_counter() - started)
            clock.wait()
        return _Recorded(device_s, sorted(hosts)[2])


def _decode_s(device: torch.device, dtype: torch.dtype, config: LlamaConfig) -> float:
    """Seconds of a token of `generate`."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.ones((1, 32), dtype=torch.long, device=device)
    step = _Steps()
    with attach(model, expected_tokens=64):
        new = 16 if device.type == "cpu" else 24
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                       do_sample=False, eos_token_id=None, pad_token_id=0, streamer=step)  # fmt: skip
    steps = sorted(step.seconds[5:])
    # A CPU is disturbed while a model runs as much as now; what disturbs a GPU's host is hidden by the GPU.
    return steps[len(steps) // (2 if device.type == "cpu" else 4)]


def chunk_layers(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a layer of a prompt's chunk with next to nothing to compute: resident, and streamed."""
    found = []
    for resident in (CHUNK_HEADS, 0):
        shallow, deep = (_chunk_s(device, dtype, depth, resident) for depth in (2, 10))
        found.append(max((deep - shallow) / 8, 1e-6))
    return found[0], found[1]


def _chunk_s(device: torch.device, dtype: torch.dtype, depth: int, resident: int) -> float:
    config = LlamaConfig(
        hidden_size=CHUNK_HEADS * CHUNK_DIM,
        intermediate_size=128,
        num_hidden_layers=depth,
        num_attention_heads=CHUNK_HEADS,
        num_key_value_heads=CHUNK_HEADS,
        vocab_size=256,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        model, seconds = AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), []
    ids = torch.ones((1, TOKENS_BEFORE), dtype=torch.long, device=device)
    how: dict[str, Any] = {
        "resident_heads": resident,
        "near_data": 0.0,
        "staging": True,
        "kv_format": "exact",
    }
    with nothing_ahead(), attach(model, expected_tokens=2 * TOKENS_BEFORE, **how) as run:
        cache = run.new_cache()
        model(input_ids=ids, logits_to_keep=1, **cache_argument(model, cache))
        for _ in range(1 + CHUNKS):
            started = time.perf_counter()
            out = model(
                input_ids=ids[:, :CHUNK_TOKENS], logits_to_keep=1, **cache_argument(model, cache)
            )
            _ = out.logits[0, 0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - started)
            cache.crop(TOKENS_BEFORE)
        cache.close()
    return sorted(seconds[1:])[
        CHUNKS // 3
    ]  # the first one compiles, builds plans, makes host memory


class _Steps:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def put(self, value: Tensor) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def end(self) -> None:
        """Nothing is held back."""


def block_flops(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of layers without their attention, norms and activations included."""
    AttentionInterface.register(NO_ATTENTION, _no_attention)
    hidden, inner = (4096, 14336) if device.type == "cuda" else (1024, 2816)
    rows = block_rows(device)
    config = _llama(hidden, inner, 2)
    config._attn_implementation = NO_ATTENTION
    with torch.device(device):
        model = LlamaModel(config).to(dtype).eval()
    weights = sum(w.numel() for layer in model.layers for w in layer.parameters() if w.dim() == 2)
    x = torch.randn((1, rows, hidden), device=device, dtype=dtype)
    seconds = clock.lasting_seconds(lambda: model(inputs_embeds=x, use_cache=False), times=7)
    return float(2 * rows * weights) / seconds


def block_rows(device: torch.device) -> int:
    return BLOCK_ROWS if device.type == "cuda" else 256


def weight_rate(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s of weights that one token passes, more of them than caches hold."""
    count, hidden = (16, 4096) if device.type == "cuda" else (32, 1024)
    weights = [torch.zeros((2 * hidden, hidden), device=device, dtype=dtype) for _ in range(count)]
    x = torch.zeros((1, hidden), device=device, dtype=dtype)

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    return sum(weight.nbytes for weight in weights) / clock.seconds(run)


def _no_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Any:
    return query.transpose(1, 2), None


def _llama(hidden: int, inner: int, depth: int, dim: int = TINY_DIM) -> LlamaConfig:
    heads = max(hidden // dim, PER_KV)
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads // PER_KV,
        head_dim=dim,
        vocab_size=256,
        max_position_embeddings=4096,
    )
