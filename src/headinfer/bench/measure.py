# SPDX-License-Identifier: Apache-2.0
"""What the modes with a model do: the same calls for every contestant, in the same order.

Every step is a plain forward pass with the contestant's cache. A clock per token waits for the
device, as `generate()` does when it looks for the end of the text; a prefill is not interrupted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from headinfer.attention.compiling import finish_compiling
from headinfer.bench.cases import Case, Mode
from headinfer.bench.clock import Deadline, Marks, attention_timed
from headinfer.bench.contestants import Entry, Ground, enter, pinned_bytes
from headinfer.bench.machine import settle
from headinfer.bench.rates import filled
from headinfer.bench.results import Results, Row
from headinfer.cost import chunk_cost, chunk_time, decode_time, predict
from headinfer.hf.cache_name import cache_argument
from headinfer.hf.peak import PeakMemory
from headinfer.progress import PrefillClock, eta_errors

WARM_STEPS = 12
"""Tokens decoded after a simulated context before the clock runs: the first ones fill the ring."""
LONG_STEPS_S, FEW_STEPS = 15.0, 3
"""Slow contestants are timed over fewer tokens: no more once both are reached."""


@dataclass(slots=True)
class Figure:
    """One metric of a run.

    Attributes:
        values: seconds, in order.
        moved: bytes per path, per value.
        linear_flops, attention_flops: of the work behind one value.
        predicted: "seconds" of one value, and "eta_error" of a prefill.
        settings: what else there is to record.
    """

    metric: str
    values: list[float]
    moved: dict[str, float] = field(default_factory=dict)
    linear_flops: int = 0
    attention_flops: int = 0
    predicted: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def run(
    case: Case, contestant: str, context: int, ground: Ground, results: Results, deadline: Deadline
) -> list[Row]:
    """The rows of one contestant at one length.

    Raises:
        NotAvailable, HeadInferError: see `contestants.enter`.
        OutOfTime: the deadline came first.
        torch.OutOfMemoryError: it did not fit.
    """
    work = {
        Mode.GENERATE: _generate,
        Mode.DECODE: _decode,
        Mode.ATTENTION: _attention,
        Mode.LAST_CHUNK: _last_chunk,
    }[case.mode]
    peak, before = PeakMemory(ground.device), psutil.Process().memory_info().rss
    with peak, enter(contestant, ground) as entry:
        figures = work(case, context, entry, deadline)
        row = Row(
            case.name,
            contestant,
            context,
            held=_held(entry, context + (case.chunk_tokens if case.mode is Mode.ATTENTION else 0)),
            settings=_settings(entry),
            predicted=_predicted(entry),
            simulated=case.mode is not Mode.GENERATE,
        )
    held = {**row.held, "host_rss_growth_bytes": max(peak.host_bytes - before, 0)}
    if peak.gpu_bytes is not None:
        held["gpu_peak_bytes"] = peak.gpu_bytes
        held["gpu_reserved_bytes"] = torch.cuda.max_memory_reserved(ground.device)
    row = replace(row, held=held)
    return [_row(row, figure, ground, results) for figure in figures]


def warm_up(contestant: str, ground: Ground, *, first_token: bool = False) -> None:
    """A short run under the same plan, so that no one is charged for what happens at first use; where
    the first token after a long prompt is timed, also tokens after as long a context: merges of
    more tiles are other kernels, compiled when they are first used."""
    most = 2 * ground.chunk_tokens + 64 if ground.device.type == "cuda" else 64
    tokens = min(ground.tokens - 4, most)
    with torch.no_grad(), enter(contestant, ground) as entry:
        _read(entry, _prompt(ground, tokens), Deadline())
        for _ in range(2):
            _token(entry)
        if first_token and ground.device.type == "cuda":
            entry.renew()
            entry.fill(ground.tokens - 4)
            for _ in range(3):
                _token(entry)
        finish_compiling()
        settle(ground.device)


def _generate(case: Case, context: int, entry: Entry, deadline: Deadline) -> list[Figure]:
    """A prompt in chunks, then tokens; repeated from an empty cache."""
    ground, shape = entry.ground, entry.ground.shape
    prompt = _prompt(ground, context)
    prefills, lasts, firsts, steady = [], [], [], []
    spans: list[float] = []
    making: dict[str, Any] = {}
    moved_reading: dict[str, float] = {}
    moved_decoding: dict[str, float] = {}
    for turn in range(case.repeats):
        if turn:
            entry.renew()
        before = entry.counted()
        start = time.perf_counter()
        chunks = _read(entry, prompt, deadline)
        prefills.append(time.perf_counter() - start)
        lasts.append(chunks[-1])
        if not spans:
            spans, making = chunks, _making(entry)
        moved_reading = _difference(before, entry.counted())
        steps, moved_decoding = _steps(entry, case.steps + 1, deadline)
        firsts.append(steps[0])
        # Ours record a step when the second comes, and compare another with the recording.
        steady += steps[3:] or steps[1:]
    whole = -(-context // entry.chunk_tokens)
    last = context - (whole - 1) * entry.chunk_tokens
    figures = [
        Figure(
            "prefill",
            prefills,
            moved_reading,
            shape.linear_flops(context, logits=whole),
            shape.attention_flops(context),
            _prefill_predicted(entry, context, spans),
            {"chunk_seconds": [round(span, 6) for span in spans]} | making,
        ),
        Figure(
            "last chunk",
            lasts,
            {},
            shape.linear_flops(last),
            shape.attention_flops(last, past=context - last),
            _chunk_predicted(entry, context - last, last),
        ),
        Figure("first token", firsts),
        _token_figure(entry, context, steady, moved_decoding),
    ]
    return figures


def _decode(case: Case, context: int, entry: Entry, deadline: Deadline) -> list[Figure]:
    entry.fill(context)
    deadline.check()
    _steps(entry, WARM_STEPS, deadline)
    steps, moved = _steps(entry, case.steps, deadline)
    return [_token_figure(entry, context, steps, moved)]


def _attention(case: Case, context: int, entry: Entry, deadline: Deadline) -> list[Figure]:
    """Chunks at the same place, again and again; the first does not count."""
    ground = entry.ground
    entry.fill(context)
    chunk = _prompt(ground, case.chunk_tokens)
    inside, whole = [], []
    moved: dict[str, float] = {}
    for turn in range(case.repeats):
        deadline.check()
        marks, before = Marks(ground.device), entry.counted()
        settle(ground.device)
        start = time.perf_counter()
        with attention_timed(ground.model, marks):
            ground.model(
                chunk, use_cache=True, logits_to_keep=1, **cache_argument(ground.model, entry.cache)
            )
        spans = marks.between()
        if turn:
            whole.append(time.perf_counter() - start)
            inside.append(sum(spans[::2]))
            moved = _difference(before, entry.counted())
        entry.cache.crop(-case.chunk_tokens)
    new = case.chunk_tokens
    flops = ground.shape.attention_flops(new, past=context)
    return [
        Figure("attention", inside, moved, 0, flops),
        Figure("chunk", whole, moved, ground.shape.linear_flops(new), flops),
    ]


def _last_chunk(case: Case, context: int, entry: Entry, deadline: Deadline) -> list[Figure]:
    """The peak of a prefill is that of its last chunk, so the beginning need not be computed."""
    shape, new = entry.ground.shape, min(entry.chunk_tokens, context - 1)
    entry.fill(context - new)
    # Once unmeasured: kernels and plans for so long a context are made, as a prompt does on its way.
    _read(entry, _prompt(entry.ground, new), deadline)
    entry.cache.crop(-new)
    before = entry.counted()
    chunks = _read(entry, _prompt(entry.ground, new), deadline)
    moved = _difference(before, entry.counted())
    _steps(entry, WARM_STEPS, deadline)
    steps, moved_decoding = _steps(entry, case.steps, deadline)
    flops = shape.linear_flops(new), shape.attention_flops(new, past=context - new)
    said = _chunk_predicted(entry, context - new, new)
    return [
        Figure("chunk", [sum(chunks)], moved, *flops, said),
        _token_figure(entry, context, steps, moved_decoding),
    ]


def _prefill_predicted(entry: Entry, context: int, spans: list[float]) -> dict[str, float]:
    """Seconds of the whole prompt, and how far the remaining time at a tenth of it was off."""
    plan, rates = entry.decided, entry.ground.rates
    if plan is None or rates is None:
        return {}
    found = {"seconds": predict(plan, rates, prompt_tokens=context).prefill_s}
    chunk = entry.chunk_tokens
    clock = PrefillClock(context, chunk_cost(plan, rates), measured=True, chunk_tokens=chunk)
    late = [error for share, error in eta_errors(clock, spans, chunk) if share >= 0.1]
    return {**found, "eta_error": late[0]} if late else found


def _chunk_predicted(entry: Entry, past: int, new: int) -> dict[str, float]:
    plan, rates = entry.decided, entry.ground.rates
    if plan is None or rates is None:
        return {}
    return {"seconds": chunk_time(plan, rates, past=past, new=new).seconds}


def _token_predicted(entry: Entry, context: int) -> dict[str, float]:
    plan, rates = entry.decided, entry.ground.rates
    if plan is None or rates is None:
        return {}
    return {"seconds": decode_time(plan, rates, length=context).seconds}


def _read(entry: Entry, prompt: Tensor, deadline: Deadline) -> list[float]:
    """The cache holds the prompt; seconds of every chunk, on the device's own clock."""
    model, marks = entry.ground.model, Marks(entry.ground.device)
    marks.add()
    for part in prompt.split(entry.chunk_tokens, dim=1):
        deadline.check()
        model(part, use_cache=True, logits_to_keep=1, **cache_argument(model, entry.cache))
        marks.add()
    return marks.between()


def _steps(entry: Entry, count: int, deadline: Deadline) -> tuple[list[float], dict[str, float]]:
    """Seconds of `count` tokens or fewer slow ones, and the bytes moved for one of them."""
    found, before = [], entry.counted()
    for _ in range(count):
        deadline.check()
        start = time.perf_counter()
        _token(entry)
        settle(entry.ground.device)
        found.append(time.perf_counter() - start)
        if len(found) >= FEW_STEPS and sum(found) > LONG_STEPS_S:
            break
    moved = _difference(before, entry.counted())
    return found, {path: total / len(found) for path, total in moved.items()}


def _token(entry: Entry) -> None:
    model = entry.ground.model
    one = torch.zeros((1, 1), dtype=torch.long, device=entry.ground.device)
    model(input_ids=one, use_cache=True, logits_to_keep=1, **cache_argument(model, entry.cache))


def _token_figure(
    entry: Entry, context: int, steps: list[float], moved: dict[str, float]
) -> Figure:
    """A decoded token: what was staged or attended by the CPU was counted, the GPU read the rest."""
    ground, shape = entry.ground, entry.ground.shape
    weights, keys = shape.weight_bytes(ground.dtype), shape.kv_bytes(context, ground.dtype)
    moved = dict(moved)
    if ground.device.type == "cpu":
        # One memory: weights, and all keys and values wherever they are.
        moved["host"] = float(weights + keys)
    elif entry.counts:
        moved["gpu"] = float(weights + keys) - moved.get("host", 0.0)
    return Figure(
        "token",
        steps,
        moved,
        shape.linear_flops(1),
        shape.attention_flops(1, past=context),
        _token_predicted(entry, context),
    )


def _row(row: Row, figure: Figure, ground: Ground, results: Results) -> Row:
    """`figure` as a row, beside its two floors."""
    device = ground.device.type
    rates = {
        "h2d": results.rate("h2d"),
        "d2h": results.rate("d2h"),
        "host": results.rate("host read"),
        "gpu": results.rate("gpu copy"),
    }
    if device == "cpu":  # staging on a CPU is a copy inside one memory
        rates["h2d"] = rates["d2h"] = rates["host"]
    paths = [(moved, rates[path]) for path, moved in figure.moved.items()]
    floors = [moved / rate for moved, rate in paths if rate]
    linear = _at_rate(figure.linear_flops, results.rate(f"matmul {ground.dtype} {device}"))
    inner = _at_rate(figure.attention_flops, results.rate(f"attention {ground.dtype} {device}"))
    known = floors and len(floors) == len(paths)
    arithmetic = None if linear is None or inner is None else linear + inner
    return filled(
        replace(
            row,
            metric=figure.metric,
            unit="s",
            moved_bytes={path: round(moved, 1) for path, moved in figure.moved.items()},
            bytes_floor_s=max(floors) if known else None,
            flops_floor_s=arithmetic or None,
            predicted={**row.predicted, **figure.predicted},
            settings=row.settings | figure.settings,
        ),
        figure.values,
    )


def _at_rate(flops: int, rate: float | None) -> float | None:
    return 0.0 if not flops else None if rate is None else flops / rate


def _held(entry: Entry, context: int) -> dict[str, int]:
    ground = entry.ground
    held = {"kv_bytes": ground.shape.kv_bytes(context, ground.dtype), **entry.held()}
    pinned = pinned_bytes()
    if pinned is not None:
        held["pinned_bytes"] = pinned
    return held


def _settings(entry: Entry) -> dict[str, Any]:
    plan = entry.plan
    names = ("offloaded_heads", "near_data")
    decided: dict[str, Any] = {name: plan[name] for name in names if name in plan}
    if plan:
        decided["resident_heads"] = sum(plan["resident_heads"])
    asked = {name: value for name, value in entry.settings.items() if name != "expected_tokens"}
    return {"chunk_tokens": entry.chunk_tokens, "asked": asked, **decided}


def _making(entry: Entry) -> dict[str, Any]:
    made = entry.host_memory()
    return {"host_memory": {name: round(value, 6) for name, value in made.items()}} if made else {}


def _predicted(entry: Entry) -> dict[str, float | None]:
    plan = entry.plan
    if not plan:
        return {}
    return {
        "gpu_peak_bytes": plan["predicted_gpu_bytes"] or None,
        "host_bytes": plan["predicted_host_bytes"],
        "seconds": None,
    }


def _difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {path: after[path] - before.get(path, 0.0) for path in after}


def _prompt(ground: Ground, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens)
    return torch.randint(0, ground.shape.vocab, shape, generator=generator).to(ground.device)
