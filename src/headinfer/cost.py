# SPDX-License-Identifier: Apache-2.0
"""How long a planned run takes: bytes and FLOPs of its geometry over the rates of its machine.

A prefill chunk is affine in the tokens before it; a decode step is the slowest of the paths that
bytes take. Pure arithmetic; every term can be printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from headinfer import enqueueing
from headinfer.budget import GIB
from headinfer.decision import Plan
from headinfer.geometry import Geometry, LayerGeometry, LayerKind
from headinfer.packing import packs, ratio_of
from headinfer.rates import Rates

SHAPE_ONLY = Rates("any", "any", 1e12, {128: 1e12}, 1e15, 1e15, 0.0, 0.0)
"""Of no machine: what is left is how attention relates to everything else."""

SAMPLES = 17
"""Chunks that stand for all of a long prompt."""
NOT_HIDDEN = 0.1
"""Of what goes on beside the slowest path of a chunk, what it delays that one by: they share the
memory's bandwidth, and neither starts or ends with the other. An assumption."""
NEAR_WAIT_S = 0.7e-3
"""What a layer waits for the CPU beside what that takes to read: queries go down, threads wake, results
come up, the last tile is attended. Fitted to tokens of an H200; an assumption elsewhere."""
UNEVEN = 1.06
"""What a token takes, of the longer of the CPU's path and the link's where its share has been found by trying:
heads are whole, layers differ by one, and the link pauses between tiles. As on four H200s; an assumption."""
LASTING = 0.94
"""What attention of a prompt reaches of the rate measured, as it goes on for minutes and its chunks have a
triangle each: so on H200s. An assumption."""
NEAR_PACKED = 0.9
"""Bytes per second that the CPU attends of packed blocks, of its rate over plain ones where the link
reads the same memory: as H200s' hosts did. Where it was not measured."""
ENCODED, DECODED = 0.06, 0.45
"""Plain bytes per second that a GPU encodes and decodes, of the rate at which it reads weights: as H200s
did. An assumption elsewhere."""
ANSWER_TOKENS = 64
"""Of a request of which no more is known than how long it gets."""
DISK = "disk read rate"


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
    for weight, past, new in _chunks(prompt_tokens, plan.chunk_tokens):
        step = chunk_time(plan, rates, past=past, new=new)
        prefill += weight * step.seconds
        limits[step.limit] = limits.get(step.limit, 0.0) + weight * step.seconds
    decode = decode_time(plan, rates, length=prompt_tokens)
    longest = max(limits, key=lambda name: limits[name]) if limits else ""
    return Prediction(prefill, decode.seconds, longest, decode.limit)


def request_s(
    plan: Plan, rates: Rates, *, prompt_tokens: int, new_tokens: int = ANSWER_TOKENS
) -> float:
    """Seconds of a whole request: the prompt, and the tokens that come after it."""
    found = predict(plan, rates, prompt_tokens=prompt_tokens)
    return found.prefill_s + new_tokens * found.decode_s


def _chunks(tokens: int, chunk: int) -> Iterator[tuple[float, int, int]]:
    """(weight, tokens before, tokens in it) of the chunks of a prompt. Of many whole ones a few
    stand for all by the trapezoid rule, which is exact where time is linear in the tokens before."""
    whole, rest = divmod(tokens, chunk)
    if whole <= SAMPLES:
        yield from ((1.0, index * chunk, chunk) for index in range(whole))
    else:
        span = (whole - 1) / (SAMPLES - 1)
        for sample in range(SAMPLES):
            end = sample in (0, SAMPLES - 1)
            weight = span / 2 + 0.5 if end else span
            yield weight, round(sample * span * chunk), chunk
    if rest:
        yield 1.0, whole * chunk, rest


def chunk_cost(plan: Plan, rates: Rates | None) -> Callable[[int, int], tuple[float, float]]:
    """Seconds of a chunk in two parts, for `headinfer.progress.PrefillClock`: what it takes at the
    start of a prompt, and what the tokens before it add.

    Without rates the parts have no unit, but the relation of one to the other that a machine has
    whose attention runs at the rate of its matrix products.
    """
    found = rates or SHAPE_ONLY

    def parts(past: int, new: int) -> tuple[float, float]:
        base = chunk_time(plan, found, past=0, new=new).seconds
        return base, max(chunk_time(plan, found, past=past, new=new).seconds - base, 0.0)

    return parts


def chunk_time(plan: Plan, rates: Rates, *, past: int, new: int) -> StepTime:
    """A forward pass over `new` tokens after `past`."""
    geometry, batch = plan.geometry, plan.batch
    compute = {
        "projections and MLP": _block_s(geometry, rates, rows=batch * new),
        "expanding latents": batch
        * (past + new)
        * sum(layer.expansion_flops for layer in geometry.layers)
        / rates.block_flops,
        "bringing weights": moved_weights_s(geometry, rates),
        "packing": _packing_s(plan, rates, past=past, new=new),
        "attention": sum(
            attention_flops(layer, past=past, new=new, batch=batch)
            / (LASTING * rates.attention_flops_of(max(layer.attended_dims)))
            for layer in geometry.layers
        ),
        "output projection": batch
        * geometry.hidden_size
        * geometry.vocab_size
        * geometry.itemsize
        / rates.weight_bytes_s,
    }
    host_s = enqueueing.chunk_s(plan, rates, past=past, new=new)
    parts = {**compute, "launching": host_s}
    disk = _disk_paths(plan, rates, past)
    if rates.h2d_bytes_s is None:  # a CPU does one thing after another, while threads read a disk
        return _beside(_one_by_one(parts), disk)
    paths = {"compute": sum(compute.values()), "launching": host_s}
    paths["streaming"] = moved_bytes(plan, past) / rates.h2d_bytes_s
    if rates.pin_s_per_gib is not None:  # by a thread of its own, while chunks are computed
        paths["page-locking"] = _new_host_bytes(plan, past, new) / GIB * rates.pin_s_per_gib
    paths |= disk
    found = _slowest(paths, parts | {name: paths[name] for name in paths if name != "compute"})
    hidden = sum(paths.values()) - found.seconds
    return replace(found, seconds=found.seconds + NOT_HIDDEN * hidden)


def decode_time(plan: Plan, rates: Rates, *, length: int) -> StepTime:
    """A forward pass over one token after `length`."""
    parts, moved = _token_parts(plan, rates, length)
    if rates.h2d_bytes_s is None:  # a CPU does one thing after another
        return _beside(_one_by_one(parts), _disk_paths(plan, rates, length))
    shares = [0.0]
    if rates.near_bytes_s and rates.shared_h2d_bytes_s:
        if not plan.near_adapts:
            shares = [plan.near_share]
        elif moved:
            shares.append(_both_at_once(plan, rates, offloaded=moved, chain_s=sum(parts.values())))
    # The share that adapts is the better one: the link, which the CPU slows down, may be quicker alone.
    return min(
        (_decode_with(plan, rates, length, parts, moved, share) for share in shares),
        key=lambda step: step.seconds,
    )


def _decode_with(
    plan: Plan, rates: Rates, length: int, parts: dict[str, float], moved: int, near_share: float
) -> StepTime:
    """A token while the CPU attends that share of the offloaded bytes."""
    chain, near_s, link = sum(parts.values()), 0.0, rates.h2d_bytes_s or 0.0
    if near_share and moved:
        near_s = near_share * moved / _near_rate(plan, rates) + _near_waits_s(plan)
        link = rates.shared_h2d_bytes_s or link
    elif moved and plan.near_adapts and rates.near_bytes_s:
        near_s = NEAR_WAIT_S  # one layer asks for one head, or nobody would know if it paid
    streamed = (1 - near_share) * offloaded_bytes(plan, length)
    beside = {
        "streaming": (1 - near_share) * moved / link,
        "enqueueing tiles": enqueueing.tiles_s(plan, streamed) if moved else 0.0,
    }
    parts = parts | {"near-data attention": near_s} | beside
    paths = {"chain": chain + near_s, **beside}
    if near_share and plan.near_adapts:
        for name in ("chain", "streaming"):
            paths[name] *= UNEVEN
    disk = _disk_paths(plan, rates, length)
    paths, parts = paths | disk, parts | disk
    found = _slowest(paths, parts)
    if found.limit == "chain":
        waits = {name: parts[name] for name in parts if name not in paths}
        return StepTime(found.seconds, parts, max(waits, key=lambda name: waits[name]))
    return found


def _token_parts(plan: Plan, rates: Rates, length: int) -> tuple[dict[str, float], int]:
    """Seconds of what a compute device does for one token, one thing after another, and bytes of heads
    that are elsewhere."""
    geometry, batch = plan.geometry, plan.batch
    parts = {
        "weights": token_bytes(geometry) / rates.weight_bytes_s,
        "bringing weights": moved_weights_s(geometry, rates),
        "expanding latents": batch
        * length
        * sum(layer.expansion_flops for layer in geometry.layers)
        / rates.block_flops,
        # Of heads that stream as well, once they are there; what the CPU attends instead is a few percent.
        "attention": geometry.kv_bytes(length, batch=batch) / rates.resident_bytes_s,
        "launching": enqueueing.token_s(plan, rates),
    }
    elsewhere = plan.staging and not plan.host_computes
    return parts, moved_bytes(plan, length) if elsewhere else 0


def balanced_share(plan: Plan, rates: Rates, *, length: int) -> float:
    """The share of offloaded heads with which the CPU ends when the link does, after `length` tokens;
    0 where a token is predicted to end sooner without it."""
    if not plan.near_adapts or not rates.near_bytes_s or not rates.shared_h2d_bytes_s:
        return plan.near_share
    parts, moved = _token_parts(plan, rates, length)
    if not moved:
        return 0.0
    share = _both_at_once(plan, rates, offloaded=moved, chain_s=sum(parts.values()))
    shared, alone = (
        _decode_with(plan, rates, length, parts, moved, near).seconds for near in (share, 0.0)
    )
    return share if shared < alone else 0.0


def _both_at_once(plan: Plan, rates: Rates, *, offloaded: int, chain_s: float) -> float:
    """The share of offloaded bytes with which the CPU's path takes as long as the link's: chain + waits +
    share * bytes / near rate, and (1 - share) * bytes / link rate; see `headinfer.balance`."""
    by_link = offloaded / (rates.shared_h2d_bytes_s or 1.0)
    by_cpu = offloaded / _near_rate(plan, rates)
    with_cpu = chain_s + _near_waits_s(plan)
    return min(max((by_link - with_cpu) / (by_link + by_cpu), 0.0), 1.0)


def _near_rate(plan: Plan, rates: Rates) -> float:
    plain = rates.near_bytes_s or 0.0
    if not packs(plan.geometry, plan.kv_format):
        return plain
    return rates.near_packed_bytes_s or NEAR_PACKED * plain


def _packing_s(plan: Plan, rates: Rates, *, past: int, new: int) -> float:
    """Seconds that a GPU encodes what a chunk brings and decodes what it attends."""
    if rates.h2d_bytes_s is None or not packs(plan.geometry, plan.kv_format):
        return 0.0
    encoded = offloaded_bytes(plan, past + new) - offloaded_bytes(plan, past)
    return (encoded / ENCODED + offloaded_bytes(plan, past) / DECODED) / rates.weight_bytes_s


def _near_waits_s(plan: Plan) -> float:
    """Seconds that layers with offloaded heads wait for the CPU, in all."""
    return NEAR_WAIT_S * enqueueing.streamed_layers(plan)


def block_params(geometry: Geometry) -> int:
    """Weights that multiply every token: projections and the (active) MLP of all layers."""
    if geometry.weights.token_params:
        return geometry.weights.token_params
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
    if geometry.weight_bytes and not geometry.weights.token_bytes:
        return min(total, geometry.weight_bytes // geometry.itemsize)
    return total


def _block_s(geometry: Geometry, rates: Rates, *, rows: int) -> float:
    """Projections and MLP of `rows` tokens: arithmetic, and every weight is read once a chunk, which
    is why short ones cost more. The rate was measured with that reading included."""
    reading = geometry.itemsize / (2 * rates.block_rows * rates.weight_bytes_s)
    flop_s = max(1 / rates.block_flops - reading, 0.5 / rates.block_flops)
    weights = geometry.weight_bytes or block_params(geometry) * geometry.itemsize
    return 2.0 * rows * block_params(geometry) * flop_s + weights / rates.weight_bytes_s


def token_bytes(geometry: Geometry) -> int:
    """Bytes of weights that one token reads, the output projection included."""
    params = block_params(geometry) + geometry.hidden_size * geometry.vocab_size
    return geometry.weights.token_bytes or params * geometry.itemsize


def moved_weights_s(geometry: Geometry, rates: Rates) -> float:
    """Seconds per forward pass to bring weights that accelerate keeps in host memory, which is not
    page-locked. Those on disk are not counted: how fast it is was not measured."""
    if rates.h2d_bytes_s is None:
        return 0.0
    return geometry.weights.host_bytes / min(rates.pageable_bytes_s, rates.h2d_bytes_s)


def attention_flops(layer: LayerGeometry, *, past: int, new: int, batch: int = 1) -> float:
    """FLOPs of q k^T and p v in one layer, two per multiplication and addition."""
    if layer.kind in (LayerKind.STATE, LayerKind.NONE):
        return 0.0
    seen = past + (new + 1) / 2  # keys a row sees, on average
    if layer.kind is LayerKind.SLIDING:
        seen = min(seen, float(layer.window))
    return 2.0 * batch * layer.num_query_heads * sum(layer.attended_dims) * new * seen


def offloaded_bytes(plan: Plan, tokens: int) -> int:
    """Bytes of the heads that are not resident, over `tokens` tokens."""
    total = 0
    for layer, resident in zip(plan.geometry.layers, plan.resident_heads, strict=True):
        if layer.kind is LayerKind.FULL:
            heads = layer.num_kv_heads - resident
            total += plan.batch * heads * layer.head_bytes(tokens, plan.geometry.itemsize)
    return total


def disk_bytes(plan: Plan, tokens: int) -> int:
    """Bytes on disk of the keys and values of `tokens` tokens, as they are stored."""
    if plan.disk is None:
        return 0
    below, room = moved_bytes(plan, tokens), plan.host_room
    if plan.host_computes:
        return below
    return 0 if room is None else max(below - (room - plan.kept_bytes), 0)


def _new_host_bytes(plan: Plan, past: int, new: int) -> int:
    """Bytes of host memory that a chunk is the first to need."""
    after, before = past + new, past
    below = moved_bytes(plan, after) - moved_bytes(plan, before)
    return below - (disk_bytes(plan, after) - disk_bytes(plan, before))


def _disk_paths(plan: Plan, rates: Rates, tokens: int) -> dict[str, float]:
    """Seconds that a pass after `tokens` tokens reads from disk, beside everything else; none where
    nothing lies there, or its rate is not known."""
    below = disk_bytes(plan, tokens)
    return {DISK: below / rates.disk_read_bytes_s} if below and rates.disk_read_bytes_s else {}


def moved_bytes(plan: Plan, tokens: int) -> int:
    """Bytes of offloaded heads as they are stored, over `tokens` tokens: what crosses a link."""
    return int(offloaded_bytes(plan, tokens) * ratio_of(plan.geometry, plan.kv_format))


def _one_by_one(parts: dict[str, float]) -> StepTime:
    return StepTime(sum(parts.values()), parts, max(parts, key=lambda name: parts[name]))


def _beside(step: StepTime, others: dict[str, float]) -> StepTime:
    """`step` while `others` go on: the slowest decides."""
    parts = step.parts | others
    limit = max(others, key=lambda name: others[name], default=step.limit)
    if others.get(limit, 0.0) <= step.seconds:
        return replace(step, parts=parts)
    return StepTime(others[limit], parts, limit)


def _slowest(paths: dict[str, float], parts: dict[str, float]) -> StepTime:
    limit = max(paths, key=lambda name: paths[name])
    seconds = paths[limit]
    if limit == "compute":
        compute = {name: parts[name] for name in parts if name not in paths}
        limit = max(compute, key=lambda name: compute[name])
    return StepTime(seconds, parts, limit)
