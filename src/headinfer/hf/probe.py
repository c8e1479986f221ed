# SPDX-License-Identifier: Apache-2.0
"""Measures what the cost model divides by, in a few seconds, and remembers it per machine.

A cached measurement counts for one machine, element type and set of library versions.
"""

from __future__ import annotations

import gc
import time

import torch

from headinfer.budget import GIB, MIB
from headinfer.hf import layer_probe, memory_probe
from headinfer.hf.probe_clock import Clock
from headinfer.hf.quiet import quiet_transformers
from headinfer.hf.remembered import known_rates, machine_name, remember
from headinfer.rates import PAGEABLE_BYTES_S, Rates

DIMS = (64, 128)
AGAIN_S = 5.0
"""A measurement of a CPU that took less is made twice."""


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
    clock = Clock(device)
    gpu = device.type == "cuda"
    with torch.no_grad(), quiet_transformers():
        if gpu:
            layer_s, token_s, weight_bytes_s = layer_probe.per_recorded_layer(clock, device, dtype)
        else:
            weight_bytes_s = layer_probe.weight_rate(clock, device, dtype)
            layer_s, token_s = layer_probe.per_layer(device, dtype, weight_bytes_s)
        block_flops = layer_probe.block_flops(clock, device, dtype)
        attention = {dim: memory_probe.prompt_attention(clock, device, dtype, dim) for dim in DIMS}
        resident = memory_probe.token_attention(clock, device, dtype, GIB if gpu else 128 * MIB)
        copies = memory_probe.copies(clock, device) if gpu else (None, None)
        near = (
            (None, None, None) if copies[0] is None else memory_probe.near(device, dtype, copies[0])
        )
        pin = memory_probe.pinning() if gpu else None
        chunks = layer_probe.chunk_layers(device, dtype) if gpu else None
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        memory_probe.empty_host_cache()
    return Rates(
        machine=machine_name(device),
        dtype=str(dtype).removeprefix("torch."),
        block_flops=block_flops,
        block_rows=layer_probe.block_rows(device),
        attention_flops=attention,
        weight_bytes_s=weight_bytes_s,
        resident_bytes_s=resident,
        layer_s=layer_s,
        token_s=token_s,
        chunk_layer_s=None if chunks is None else chunks[0],
        streamed_layer_s=None if chunks is None else chunks[1],
        h2d_bytes_s=copies[0],
        d2h_bytes_s=copies[1],
        near_bytes_s=near[0],
        h2d_beside_bytes_s=near[1],
        near_packed_bytes_s=near[2],
        near_by_threads=memory_probe.by_threads(dtype, (512 if gpu else 128) * MIB),
        host_read_bytes_s=memory_probe.host_read(),
        pin_s_per_gib=pin,
        pageable_bytes_s=memory_probe.pageable(clock, device) if gpu else PAGEABLE_BYTES_S,
        seconds=time.perf_counter() - started,
    )
