# SPDX-License-Identifier: Apache-2.0
"""Times attention, and the memories it reads: the device's, the host's, and the link between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch

from headinfer.attention import native, packed
from headinfer.attention.api import attend
from headinfer.attention.packed import PackedRun
from headinfer.budget import GIB, MIB
from headinfer.heads.codec import Codec
from headinfer.hf.probe_clock import Clock
from headinfer.layout import BLOCK_TOKENS
from headinfer.near import job_threads
from headinfer.tiers import HostTier
from headinfer.transfer import InlineEngine

NEAR_BYTES = 2 * GIB
"""Keys and values that the CPU attends beside copies: far more than its caches hold, which on servers
are hundreds of MiB."""
NEAR_TIMES = 3
COPIED = 256 * MIB


def prompt_attention(clock: Clock, device: torch.device, dtype: torch.dtype, dim: int) -> float:
    rows, keys = (4096, 32768) if device.type == "cuda" else (256, 4096)
    q = torch.randn((1, 4, rows, dim), device=device, dtype=dtype)
    k, v = (torch.randn((1, 1, keys, dim), device=device, dtype=dtype) for _ in range(2))
    seconds = clock.lasting_seconds(lambda: attend(q, k, v, scale=dim**-0.5), times=5)
    flops = 4.0 * 4 * rows * keys * dim
    return flops / seconds


def token_attention(clock: Clock, device: torch.device, dtype: torch.dtype, nbytes: int) -> float:
    """Bytes/s of keys and values attended by one token, more than caches hold."""
    run, size = one_token(device, dtype, nbytes)
    return size / clock.seconds(run, times=3)


def one_token(
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


def by_threads(dtype: torch.dtype, nbytes: int) -> dict[int, float]:
    """Bytes/s that the native kernel attends, by threads: powers of two, and all there are."""
    if native.why_absent() is not None:
        return {}
    dim, heads, most = 128, 4, torch.get_num_threads()
    keys = nbytes // (2 * heads * dim * dtype.itemsize)
    q = torch.randn((1, 4 * heads, 1, dim), dtype=dtype, device="cpu")
    k, v = (torch.zeros((1, heads, keys, dim), dtype=dtype, device="cpu") for _ in range(2))
    clock, found = Clock(torch.device("cpu"), shortest=True), {}
    for count in sorted({*(2**power for power in range(most.bit_length())), most}):
        if count <= most:
            run = partial(native.attend, q, k, v, scale=dim**-0.5, num_threads=count)
            found[count] = (k.nbytes + v.nbytes) / clock.seconds(run, times=3)
    return found


def near(
    device: torch.device, dtype: torch.dtype, link: float
) -> tuple[float, float | None, float | None]:
    """Bytes/s that the CPU attends while the link, of `link` bytes/s alone, reads the same memory, as it
    does in decode; those of the link; and what the CPU attends of packed keys and values. None where
    memory cannot be page-locked, keys and values do not pack, or there is no native library."""
    nbytes = min(NEAR_BYTES, psutil.virtual_memory().available // 8)
    beside = Beside(device, link)
    plain = beside.rate(*one_token(torch.device("cpu"), dtype, nbytes, job_threads()))
    packed_rate = None
    if dtype == torch.bfloat16 and native.why_absent() is None:
        packed_rate = beside.rate(*one_packed_token(nbytes))[0]
    return plain[0], plain[1], packed_rate


class Beside:
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


def one_packed_token(nbytes: int) -> tuple[Callable[[], Any], int]:
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


def copies(clock: Clock, device: torch.device) -> tuple[float, float]:
    there = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    here = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True, device="cpu")
    down = clock.seconds(lambda: there.copy_(here, non_blocking=True))
    up = clock.seconds(lambda: here.copy_(there, non_blocking=True))
    return here.numel() / down, here.numel() / up


def pageable(clock: Clock, device: torch.device) -> float:
    """Bytes/s to the device from memory as accelerate keeps offloaded weights in."""
    here = torch.ones(64 * MIB, dtype=torch.uint8, device="cpu")
    there = torch.empty_like(here, device=device)
    return here.numel() / clock.seconds(lambda: there.copy_(here), times=3)


def pinning() -> float | None:
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


def host_read() -> float:
    size = min(GIB, psutil.virtual_memory().available // 8)
    memory = torch.ones(size // 4, dtype=torch.float32, device="cpu")
    if native.why_absent() is None:
        times = [native.read_seconds(memory.data_ptr(), memory.nbytes) for _ in range(4)]
        return memory.nbytes / min(times)
    return memory.nbytes / Clock(torch.device("cpu"), shortest=True).seconds(memory.sum, times=3)
