# SPDX-License-Identifier: Apache-2.0
"""Measures what the cost model divides by, in a few seconds, and remembers it per machine.

Layers are timed on random-weight Llamas, because what transformers itself costs per layer and per
token is part of every prediction. A cached measurement counts for one machine, element type and
set of library versions.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaModel

from headinfer.attention import native, packed
from headinfer.attention.api import attend
from headinfer.attention.compiling import finish_compiling, nothing_ahead
from headinfer.attention.packed import PackedRun
from headinfer.attention.placed import Kind, ready
from headinfer.budget import GIB, MIB
from headinfer.heads.codec import Codec
from headinfer.hf.attach import attach
from headinfer.hf.cache_name import cache_argument
from headinfer.hf.quiet import quiet_transformers
from headinfer.hf.remembered import known_rates, machine_name, remember
from headinfer.layout import BLOCK_TOKENS
from headinfer.near import job_threads
from headinfer.rates import BLOCK_ROWS, PAGEABLE_BYTES_S, Rates
from headinfer.tiers import HostTier
from headinfer.transfer import InlineEngine

DIMS = (64, 128)
AGAIN_S = 5.0
"""A measurement of a CPU that took less is made twice."""
NO_ATTENTION = "headinfer-probe"
TINY_DIM, PER_KV = 128, 4
"""Of the layers that are timed: head dim, and query heads for each KV head, as most models have them."""
LARGE_PARAMS = 4096 * (3 * 14336 + 2 * 4096 + 2 * 1024)
"""Of a layer as wide as those of models of 8 billion parameters."""
BUSY, BUSY_TIMES = 8192, 2
"""Rows of the matrices that keep a GPU busy while the host enqueues what is timed, and how often they are
multiplied."""
LASTING_S = 0.15
CHUNK_HEADS, CHUNKS = 8, 8
NEAR_BYTES = 2 * GIB
"""Keys and values that the CPU attends beside copies: far more than its caches hold, which on servers
are hundreds of MiB."""
NEAR_TIMES = 3
COPIED = 256 * MIB


def rates_for(device: torch.device | str, dtype: torch.dtype, *, refresh: bool = False) -> Rates:
    """The rates of this machine, from the cache or measured now (a few seconds).

    Args:
        device: where models compute.
        dtype: of weights, keys and values.
        refresh: measure even if a measurement is there.
    """
    device = torch.device(device)
    if not refresh and (found := known_rates(device, dtype)) is not None:
        return found
    rates = measure(device, dtype)
    if device.type == "cpu" and rates.seconds < AGAIN_S:
        # Others take the CPU for a second or two at a time: what is best of both is the machine's.
        rates = rates.best_of(measure(device, dtype))
    remember(rates, device, dtype)
    return rates


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure now; takes a few seconds and up to 2 GiB on the device."""
    started = time.perf_counter()
    clock = _Clock(device)
    gpu = device.type == "cuda"
    with torch.no_grad(), quiet_transformers():
        if gpu:  # what recorded steps consist of is compiled before anything is timed
            ready(Kind(dtype, TINY_DIM, TINY_DIM, PER_KV, 1, False), device)
            finish_compiling()
            layer_s, token_s, weight_bytes_s = _per_recorded_layer(clock, device, dtype)
        else:
            layer_s, token_s = _per_layer(device, dtype)
            weight_bytes_s = _weight_rate(clock, device, dtype)
        block_flops = _block_flops(clock, device, dtype)
        attention = {dim: _prompt_attention(clock, device, dtype, dim) for dim in DIMS}
        resident = _token_attention(clock, device, dtype, GIB if gpu else 128 * MIB)
        copies = _copies(clock, device) if gpu else (None, None)
        near = (None, None, None) if copies[0] is None else _near(device, dtype, copies[0])
        pin = _pinning() if gpu else None
        chunk_layers: tuple[float, float] | tuple[None, None] = (None, None)
        if gpu:
            chunk_layers = _chunk_layers(device, dtype)
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        empty_host_cache()
    return Rates(
        machine=machine_name(device),
        dtype=str(dtype).removeprefix("torch."),
        block_flops=block_flops,
        block_rows=_block_rows(device),
        attention_flops=attention,
        weight_bytes_s=weight_bytes_s,
        resident_bytes_s=resident,
        layer_s=layer_s,
        token_s=token_s,
        chunk_layer_s=chunk_layers[0],
        streamed_layer_s=chunk_layers[1],
        h2d_bytes_s=copies[0],
        d2h_bytes_s=copies[1],
        near_bytes_s=near[0],
        h2d_beside_bytes_s=near[1],
        near_packed_bytes_s=near[2],
        near_by_threads=_by_threads(dtype, (512 if gpu else 128) * MIB),
        host_read_bytes_s=_host_read(),
        pin_s_per_gib=pin,
        pageable_bytes_s=_pageable(clock, device) if gpu else PAGEABLE_BYTES_S,
        seconds=time.perf_counter() - started,
    )


class _Clock:
    """Seconds of work on a device: the shortest of several runs after one that warms up, because
    whatever else the machine does only ever makes one longer.

    On a GPU its own clock counts, from when it begins to when it is done, and it is kept busy while
    the host enqueues: a host that is slow, or just now slowed down, is measured elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._busy: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda":
            x = torch.zeros((BUSY, BUSY), dtype=torch.bfloat16, device=device)
            self._busy = x, torch.empty_like(x)

    def seconds(self, run: Callable[[], Any], *, times: int = 5) -> float:
        run()
        if self._busy is not None:
            return min(self._on_device(run, *self._busy) for _ in range(times))
        found = []
        for _ in range(times):
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
        return min(found)

    def lasting_seconds(self, run: Callable[[], Any], *, times: int) -> float:
        """Of one of many runs on end: a GPU that multiplies for longer than an instant slows down, for
        the power it takes."""
        once = self.seconds(run, times=times)
        if self._busy is None:
            return once
        count = max(int(LASTING_S / once), 1)

        def again() -> None:
            for _ in range(count):
                run()

        return self._on_device(again, *self._busy) / count

    def wait(self) -> None:
        """Return when the device has nothing to do."""
        if self._busy is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def _on_device(self, run: Callable[[], Any], x: Tensor, out: Tensor) -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(BUSY_TIMES):
            torch.mm(x, x, out=out)
        begun.record()
        run()
        ended.record()
        self.wait()
        return float(begun.elapsed_time(ended)) / 1e3


def _per_layer(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a layer with next to nothing to compute, and of a token beside its layers."""
    seconds = dict.fromkeys((2, 10), float("inf"))
    for depth in (
        2,
        10,
        2,
        10,
    ):  # turn by turn: others take the CPU for a while, and not for one alone
        took = _decode_s(device, dtype, _llama(64, 128, depth, 16))
        seconds[depth] = min(seconds[depth], took)
    layer = max((seconds[10] - seconds[2]) / 8, 1e-6)
    return layer, max(seconds[2] - 2 * layer, 0.0)


def _per_recorded_layer(
    clock: _Clock, device: torch.device, dtype: torch.dtype
) -> tuple[float, float, float]:
    """The same of steps that are recorded: the host is done with one before the GPU has begun it, so
    both count. And bytes/s of the weights of layers as large models have them, beside what a layer
    takes anyway."""
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
    generated = _decode_s(device, dtype, _llama(64, 128, 10)) - many.device_s
    token = max(few.host_s - 2 * on_host, generated, 0.0)
    whole = (three.device_s - one.device_s) / 2
    weights = max(whole - on_device, 0.2 * whole, 1e-6)
    return max(on_device + on_host, 1e-6), token, LARGE_PARAMS * dtype.itemsize / weights


class _Recorded(NamedTuple):
    """Seconds of a step that is replayed: of the device, and until the host is done enqueueing it."""

    device_s: float
    host_s: float


def _recorded(
    clock: _Clock, device: torch.device, dtype: torch.dtype, config: LlamaConfig
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
        device_s, hosts = clock.seconds(step, times=8), []
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
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24,
                       do_sample=False, eos_token_id=None, pad_token_id=0, streamer=step)  # fmt: skip
    steps = sorted(step.seconds[5:])
    return steps[len(steps) // 4]  # a step that nobody disturbs, not the luckiest one


def _chunk_layers(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a layer of a prompt's chunk with next to nothing to compute: resident, and streamed."""
    found = []
    for resident in (CHUNK_HEADS, 0):
        seconds = [_chunk_s(device, dtype, depth, resident) for depth in (2, 10)]
        found.append(max((seconds[1] - seconds[0]) / 8, 1e-6))
    return found[0], found[1]


def _chunk_s(device: torch.device, dtype: torch.dtype, depth: int, resident: int) -> float:
    config = LlamaConfig(
        hidden_size=CHUNK_HEADS * 64,
        intermediate_size=128,
        num_hidden_layers=depth,
        num_attention_heads=CHUNK_HEADS,
        num_key_value_heads=CHUNK_HEADS,
        vocab_size=256,
        max_position_embeddings=4096,
    )
    model, seconds = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval(), []
    ids = torch.ones((1, 256), dtype=torch.long, device=device)
    how: dict[str, Any] = {
        "resident_heads": resident,
        "near_data": 0.0,
        "staging": True,
        "kv_format": "exact",
    }
    with nothing_ahead(), attach(model, expected_tokens=CHUNKS * 256 + 1, **how) as run:
        cache = run.new_cache()
        for _ in range(CHUNKS):
            started = time.perf_counter()
            out = model(input_ids=ids, logits_to_keep=1, **cache_argument(model, cache))
            _ = out.logits[0, 0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - started)
        cache.close()
    # The first ones compile, build plans and make host memory.
    return sorted(seconds[CHUNKS // 2 :])[1]


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


def _block_flops(clock: _Clock, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of layers without their attention, norms and activations included."""
    AttentionInterface.register(NO_ATTENTION, _no_attention)
    hidden, inner = (4096, 14336) if device.type == "cuda" else (1024, 2816)
    rows = _block_rows(device)
    config = _llama(hidden, inner, 2)
    config._attn_implementation = NO_ATTENTION
    with torch.device(device):
        model = LlamaModel(config).to(dtype).eval()
    weights = sum(w.numel() for layer in model.layers for w in layer.parameters() if w.dim() == 2)
    x = torch.randn((1, rows, hidden), device=device, dtype=dtype)
    seconds = clock.lasting_seconds(lambda: model(inputs_embeds=x, use_cache=False), times=7)
    return float(2 * rows * weights) / seconds


def _block_rows(device: torch.device) -> int:
    return BLOCK_ROWS if device.type == "cuda" else 256


def _weight_rate(clock: _Clock, device: torch.device, dtype: torch.dtype) -> float:
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


def _prompt_attention(clock: _Clock, device: torch.device, dtype: torch.dtype, dim: int) -> float:
    rows, keys = (4096, 32768) if device.type == "cuda" else (256, 4096)
    q = torch.randn((1, 4, rows, dim), device=device, dtype=dtype)
    k, v = (torch.randn((1, 1, keys, dim), device=device, dtype=dtype) for _ in range(2))
    seconds = clock.lasting_seconds(lambda: attend(q, k, v, scale=dim**-0.5), times=5)
    flops = 4.0 * 4 * rows * keys * dim
    return flops / seconds


def _token_attention(clock: _Clock, device: torch.device, dtype: torch.dtype, nbytes: int) -> float:
    """Bytes/s of keys and values attended by one token, more than caches hold."""
    run, size = _one_token(device, dtype, nbytes)
    return size / clock.seconds(run, times=3)


def _one_token(
    device: torch.device, dtype: torch.dtype, nbytes: int, num_threads: int | None = None
) -> tuple[Callable[[], Any], int]:
    """Attention of one token, 4 query heads for each of 4 KV heads, over about `nbytes` of keys and
    values, and how many those are."""
    dim, heads = 128, 4
    keys = nbytes // (2 * heads * dim * dtype.itemsize)
    q = torch.randn((1, 4 * heads, 1, dim), device=device, dtype=dtype)
    k, v = (torch.zeros((1, heads, keys, dim), device=device, dtype=dtype) for _ in range(2))
    run = partial(attend, q, k, v, scale=dim**-0.5)
    if num_threads is not None and native.why_absent() is None:
        run = partial(native.attend, q, k, v, scale=dim**-0.5, num_threads=num_threads)
    return run, k.nbytes + v.nbytes


def _by_threads(dtype: torch.dtype, nbytes: int) -> dict[int, float]:
    """Bytes/s that the native kernel attends, by threads: powers of two, and all there are."""
    if native.why_absent() is not None:
        return {}
    dim, heads, most = 128, 4, torch.get_num_threads()
    keys = nbytes // (2 * heads * dim * dtype.itemsize)
    q = torch.randn((1, 4 * heads, 1, dim), dtype=dtype, device="cpu")
    k, v = (torch.zeros((1, heads, keys, dim), dtype=dtype, device="cpu") for _ in range(2))
    clock, found = _Clock(torch.device("cpu")), {}
    for count in sorted({*(2**power for power in range(most.bit_length())), most}):
        if count <= most:
            run = partial(native.attend, q, k, v, scale=dim**-0.5, num_threads=count)
            found[count] = (k.nbytes + v.nbytes) / clock.seconds(run, times=3)
    return found


def _near(
    device: torch.device, dtype: torch.dtype, link: float
) -> tuple[float, float | None, float | None]:
    """Bytes/s that the CPU attends while the link, of `link` bytes/s alone, reads the same memory, as it
    does in decode; those of the link; and what the CPU attends of packed keys and values. None where
    memory cannot be page-locked, keys and values do not pack, or there is no native library."""
    nbytes = min(NEAR_BYTES, psutil.virtual_memory().available // 8)
    beside = _Beside(device, link)
    plain = beside.rate(*_one_token(torch.device("cpu"), dtype, nbytes, job_threads()))
    packed_rate = None
    if dtype == torch.bfloat16 and native.why_absent() is None:
        packed_rate = beside.rate(*_one_packed_token(nbytes))[0]
    return plain[0], plain[1], packed_rate


class _Beside:
    """Copies to the device that go on while something else is timed."""

    def __init__(self, device: torch.device, link: float) -> None:
        self._link, self._stream = link, torch.cuda.Stream(device)
        self._there = torch.empty(COPIED, dtype=torch.uint8, device=device)
        # Other bytes with every copy, or caches would hold them.
        count = min(max(psutil.virtual_memory().available // 8 // COPIED, 1), 4)
        try:
            here = torch.empty(count * COPIED, dtype=torch.uint8, pin_memory=True, device="cpu")
        except RuntimeError:  # as much cannot be page-locked here
            here = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._here = here.view(-1, COPIED)

    def rate(self, run: Callable[[], Any], nbytes: int) -> tuple[float, float | None]:
        """Bytes/s of `run`, which reads `nbytes`, and of the copies that came to an end meanwhile."""
        started = time.perf_counter()
        run()
        alone = time.perf_counter() - started
        if not len(self._here):
            return nbytes / alone, None
        # Half as long again as it took alone: it is slowed down.
        copies = int(1.5 * alone * self._link / COPIED) + 3
        seconds, links = [], []
        for _ in range(NEAR_TIMES):
            landed = self._copy(copies)
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
            ended = sum(event.query() for event in landed)
            self._stream.synchronize()
            if ended >= 3:
                milliseconds = landed[0].elapsed_time(landed[ended - 1])
                links.append(COPIED * (ended - 1) / milliseconds * 1e3)
        return nbytes / min(seconds), max(links, default=None)

    def _copy(self, count: int) -> list[torch.cuda.Event]:
        landed = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        with torch.cuda.stream(self._stream):
            for place, event in enumerate(landed):
                self._there.copy_(self._here[place % len(self._here)], non_blocking=True)
                event.record(self._stream)
        return landed


def _one_packed_token(nbytes: int) -> tuple[Callable[[], Any], int]:
    """The same over packed ones."""
    dim, heads, host = 128, 4, torch.device("cpu")
    tier = HostTier()
    codec = Codec(InlineEngine(), host, lambda: tier)
    some = 16  # blocks that differ; attending them takes as long wherever they came from
    values = torch.randn((heads, 1, some * BLOCK_TOKENS, dim), dtype=torch.float32, device="cpu")
    values = values.to(torch.bfloat16)
    codec.reserve({dim: heads * some})
    size = codec.overflow(dim).layout.slot_bytes
    slots = torch.empty((heads, 1, some, size), dtype=torch.uint8, device="cpu")
    codec.encode(values, slots)
    times = max(nbytes // (2 * slots.nbytes), 1)
    k, v = (PackedRun(slots.repeat(1, 1, times, 1), codec.overflow(dim)) for _ in range(2))
    q = torch.randn((1, 4 * heads, 1, dim), dtype=torch.float32, device="cpu").to(torch.bfloat16)
    keys = times * some * BLOCK_TOKENS
    how: dict[str, Any] = {"keys": keys, "scale": dim**-0.5, "num_threads": job_threads()}
    run = partial(packed.attend, q, k, v, None, None, **how)
    return run, 2 * k.slots.nbytes


def empty_host_cache() -> None:
    """Page-locked memory that torch keeps for later goes back to the system: it is out of reach for
    everybody else. The call has changed its name between versions, and the oldest supported one may lack it."""
    for owner, name in (
        (torch.accelerator, "empty_host_cache"),
        (torch._C, "_accelerator_emptyHostCache"),
        (torch._C, "_host_emptyCache"),
    ):
        if hasattr(owner, name):
            getattr(owner, name)()
            break


def _copies(clock: _Clock, device: torch.device) -> tuple[float, float]:
    there = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    here = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True, device="cpu")
    down = clock.seconds(lambda: there.copy_(here, non_blocking=True))
    up = clock.seconds(lambda: here.copy_(there, non_blocking=True))
    return here.numel() / down, here.numel() / up


def _pageable(clock: _Clock, device: torch.device) -> float:
    """Bytes/s to the device from memory as accelerate keeps offloaded weights in."""
    here = torch.ones(64 * MIB, dtype=torch.uint8, device="cpu")
    there = torch.empty_like(here, device=device)
    return here.numel() / clock.seconds(lambda: there.copy_(here), times=3)


def _pinning() -> float | None:
    """Seconds per GiB of page-locking memory touched before; None where it is refused."""
    found = []
    for _ in range(2):
        tier = HostTier(pin=True, touch=native.touch if native.why_absent() is None else None)
        started = time.perf_counter()
        tier.allocate(GIB // 2)
        found.append(2 * (time.perf_counter() - started))
        refused = tier.pin_failure
        tier.close()
        if refused is not None:
            return None
    return found[-1]


def _host_read() -> float:
    size = min(GIB, psutil.virtual_memory().available // 8)
    memory = torch.ones(size // 4, dtype=torch.float32, device="cpu")
    if native.why_absent() is None:
        times = [native.read_seconds(memory.data_ptr(), memory.nbytes) for _ in range(4)]
        return memory.nbytes / min(times)
    return memory.nbytes / _Clock(torch.device("cpu")).seconds(memory.sum, times=3)
