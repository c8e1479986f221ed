# SPDX-License-Identifier: Apache-2.0
"""How long a planned run takes: bytes and FLOPs of its geometry over the rates of its machine.

A prefill chunk is affine in the tokens before it; a decode step is the slowest of the paths that
bytes take. Pure arithmetic; every term can be printed.
"""

from __future__ import annotations

from dataclasses import dataclass

from headinfer.geometry import Geometry, LayerGeometry, LayerKind
from headinfer.packing import ratio_of
from headinfer.plan import Plan
from headinfer.rates import Rates


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one forward pass, part by part; `limit` names the part that decides."""

    seconds: float
    parts: dict[str, float]
    limit: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a request.

    Attributes:
        prefill_s: until the first token can be chosen.
        decode_s: a token after it, at the end of the prompt.
        prefill_limit, decode_limit: what most of the time goes into.
    """

    prefill_s: float
    decode_s: float
    prefill_limit: str
    decode_limit: str


def predict(plan: Plan, rates: Rates, *, prompt_tokens: int) -> Prediction:
    """Prefill of `prompt_tokens` and the decode step after it, with what `plan` decided."""
    prefill = 0.0
    limits: dict[str, float] = {}
    for past in range(0, prompt_tokens, plan.chunk_tokens):
        step = chunk_time(plan, rates, past=past, new=min(plan.chunk_tokens, prompt_tokens - past))
        prefill += step.seconds
        limits[step.limit] = limits.get(step.limit, 0.0) + step.seconds
    decode = decode_time(plan, rates, length=prompt_tokens)
    longest = max(limits, key=lambda name: limits[name]) if limits else ""
    return Prediction(prefill, decode.seconds, longest, decode.limit)


def chunk_time(plan: Plan, rates: Rates, *, past: int, new: int) -> StepTime:
    """A forward pass over `new` tokens after `past`."""
    geometry, batch = plan.geometry, plan.batch
    compute = {
        "projections and MLP": 2.0 * batch * new * block_params(geometry) / rates.block_flops,
        "attention": sum(
            attention_flops(layer, past=past, new=new, batch=batch)
            / rates.attention_flops_of(max(layer.key_dim, layer.value_dim))
            for layer in geometry.layers
        ),
        "output projection": batch
        * geometry.hidden_size
        * geometry.vocab_size
        * geometry.itemsize
        / rates.weight_bytes_s,
    }
    parts = dict(compute)
    paths = {"compute": sum(compute.values()), "launching": _host_s(plan, rates)}
    if rates.h2d_bytes_s is not None:
        paths["streaming"] = moved_bytes(plan, past) / rates.h2d_bytes_s
        parts["streaming"] = paths["streaming"]
    parts["launching"] = paths["launching"]
    return _slowest(paths, parts)


def decode_time(plan: Plan, rates: Rates, *, length: int) -> StepTime:
    """A forward pass over one token after `length`."""
    geometry, batch = plan.geometry, plan.batch
    params = block_params(geometry) + geometry.hidden_size * geometry.vocab_size
    everything = geometry.kv_bytes(length, batch=batch)
    offloaded = offloaded_bytes(plan, length) if plan.staging else 0
    device = {
        "weights": params * geometry.itemsize / rates.weight_bytes_s,
        "resident keys": (everything - offloaded) / rates.resident_bytes_s,
    }
    moved = moved_bytes(plan, length) if plan.staging else 0
    host_s = _host_s(plan, rates)
    parts = {**device, "launching": host_s}
    if rates.h2d_bytes_s is None:  # a CPU does one thing after another
        total = sum(parts.values())
        return StepTime(total, parts, max(parts, key=lambda name: parts[name]))
    chain = max(host_s, sum(device.values()))
    near_share = share_near(plan, rates, offloaded=moved, chain_s=chain)
    near_s = 0.0
    if near_share and rates.near_bytes_s is not None:
        near_s = near_share * moved / rates.near_bytes_s
    parts["near-data attention"] = near_s
    parts["streaming"] = (1 - near_share) * moved / rates.h2d_bytes_s
    found = _slowest({"chain": chain + near_s, "streaming": parts["streaming"]}, parts)
    if found.limit == "chain":
        waits = {name: parts[name] for name in parts if name != "streaming"}
        return StepTime(found.seconds, parts, max(waits, key=lambda name: waits[name]))
    return found


def share_near(plan: Plan, rates: Rates, *, offloaded: int, chain_s: float) -> float:
    """The share of offloaded bytes the CPU attends: given, or where both paths take as long.

    The CPU's path takes chain + share * bytes / near rate, the link's (1 - share) * bytes / link
    rate; see `headinfer.balance`.
    """
    if not plan.near_adapts or rates.near_bytes_s is None or not rates.h2d_bytes_s:
        return plan.near_share if rates.near_bytes_s is not None else 0.0
    if not offloaded:
        return 0.0
    by_link, by_cpu = offloaded / rates.h2d_bytes_s, offloaded / rates.near_bytes_s
    return min(max((by_link - chain_s) / (by_link + by_cpu), 0.0), 1.0)


def block_params(geometry: Geometry) -> int:
    """Weights that multiply every token: projections and the (active) MLP of all layers."""
    hidden, total = geometry.hidden_size, 0
    for layer in geometry.layers:
        attention = 0
        if layer.kind in (LayerKind.FULL, LayerKind.SLIDING):
            q_and_out = layer.num_query_heads * (layer.key_dim + layer.value_dim)
            attention = hidden * (
                q_and_out + layer.num_kv_heads * (layer.key_dim + layer.value_dim)
            )
        elif layer.kind is LayerKind.STATE:
            attention = 4 * hidden * hidden
        total += attention + 3 * hidden * geometry.intermediate_size
    if geometry.weight_bytes:
        return min(total, geometry.weight_bytes // geometry.itemsize)
    return total


def attention_flops(layer: LayerGeometry, *, past: int, new: int, batch: int = 1) -> float:
    """FLOPs of q k^T and p v in one layer, two per multiplication and addition."""
    if layer.kind in (LayerKind.STATE, LayerKind.NONE):
        return 0.0
    seen = past + (new + 1) / 2  # keys a row sees, on average
    if layer.kind is LayerKind.SLIDING:
        seen = min(seen, float(layer.window))
    return 2.0 * batch * layer.num_query_heads * (layer.key_dim + layer.value_dim) * new * seen


def offloaded_bytes(plan: Plan, tokens: int) -> int:
    """Bytes of the heads that are not resident, over `tokens` tokens."""
    total = 0
    for layer, resident in zip(plan.geometry.layers, plan.resident_heads, strict=True):
        if layer.kind is LayerKind.FULL:
            heads = layer.num_kv_heads - resident
            total += plan.batch * heads * layer.head_bytes(tokens, plan.geometry.itemsize)
    return total


def moved_bytes(plan: Plan, tokens: int) -> int:
    """Bytes of offloaded heads as they are stored, over `tokens` tokens: what crosses a link."""
    return int(offloaded_bytes(plan, tokens) * ratio_of(plan.geometry, plan.kv_format))


def _host_s(plan: Plan, rates: Rates) -> float:
    return len(plan.geometry.layers) * rates.layer_s + rates.token_s


def _slowest(paths: dict[str, float], parts: dict[str, float]) -> StepTime:
    limit = max(paths, key=lambda name: paths[name])
    seconds = paths[limit]
    if limit == "compute":
        compute = {name: parts[name] for name in parts if name not in paths}
        limit = max(compute, key=lambda name: compute[name])
    return StepTime(seconds, parts, limit)
