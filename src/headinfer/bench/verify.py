# SPDX-License-Identifier: Apache-2.0
"""Exactness first: on this device, in this version, before any figure is compared with another.

Tiny models in every way of working, held against the resident cache: greedy tokens equal in
float32, logits within the 2x rule, whose oracle is the same model in float64. Then every attention
implementation against float64 attention. What fails withholds every speed-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from headinfer.attention.api import IMPLEMENTATIONS
from headinfer.attention.rule import eager, oracle, within_rule
from headinfer.attention.types import AttentionSpec
from headinfer.bench.baseline import attend_one_head
from headinfer.bench.cases import CONTESTANTS, PACKING
from headinfer.bench.contestants import Ground, NotAvailable, clean, enter
from headinfer.bench.models import build
from headinfer.bench.results import Check
from headinfer.bench.shapes import SHAPES, Shape
from headinfer.hf.cache_name import cache_argument
from headinfer.layout import BLOCK_TOKENS

PROMPT_TOKENS, NEW_TOKENS, CHUNK_TOKENS = 323, 6, 64
SMALL = {"tile_bytes": 16384, "chunk_tokens": CHUNK_TOKENS}
"""Tiles and chunks so small that a short text passes through many of them."""
FEW, DRAWS = 64, 24
"""Few values alone may flatter eager attention, which the bound is made of: short queries are drawn
several times."""
GATING_PEERS = ("schedule",)
"""Peers that are code of ours; transformers' own caches are looked at and not answered for."""

Say = Callable[[str], None]


def verify(devices: Sequence[str], say: Say = lambda line: None) -> list[Check]:
    """Every check on each of `devices`, in order; `say` hears of each."""
    found = []
    checks = (kind(device) for device in devices for kind in (_attention_checks, _model_checks))
    for check in chain.from_iterable(checks):
        state = "ok" if check.ok else "FAILED" if check.gates else "differs"
        say(f"{state}: {check.name}" + (f" ({check.note})" if check.note else ""))
        found.append(check)
    for device in devices:
        clean(torch.device(device))
    return found


def _model_checks(device: str) -> Iterator[Check]:
    dtypes = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    for shape in (SHAPES["tiny"], SHAPES["tiny, odd"]):
        for dtype in dtypes:
            yield from _contestants_against_resident(shape, dtype, device)


def _contestants_against_resident(shape: Shape, dtype: str, device: str) -> Iterator[Check]:
    model = build(shape, dtype, device)
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, shape.vocab, (1, PROMPT_TOKENS), generator=generator).to(device)

    def ground(name: str) -> Ground:
        extra: dict[str, Any] = dict(SMALL) if CONTESTANTS[name].ours else {}
        if name.endswith(PACKING):  # a slot holds one block of one head at least
            extra["tile_bytes"] = 2 * BLOCK_TOKENS * 2 * shape.head_dim
        tokens = PROMPT_TOKENS + NEW_TOKENS
        return Ground(model, shape, dtype, tokens, CHUNK_TOKENS, extra=extra)

    with torch.no_grad():
        with enter("resident", ground("resident")) as entry:
            resident, text = _answer(model, prompt, entry.cache, entry.chunk_tokens)
        exact = _exact_logits(shape, dtype, device, text)
        for name, contestant in CONTESTANTS.items():
            if name == "resident":
                continue
            title = (
                f"{contestant.label} against the resident cache, {shape.name}, {dtype}, {device}"
            )
            gates = contestant.ours or name in GATING_PEERS
            try:
                with enter(name, ground(name)) as entry:
                    found, told = _answer(model, prompt, entry.cache, entry.chunk_tokens, text)
            except NotAvailable:
                continue
            except Exception as error:  # noqa: BLE001  a check that cannot run has failed
                yield Check(title, False, None, None, f"{type(error).__name__}: {error}", gates)
                continue
            holds, off, bound = within_rule(found, resident, exact)
            equal = dtype != "float32" or torch.equal(told, text)
            note = "" if equal else "greedy tokens differ"
            yield Check(title, holds and equal, _finite(off), bound, note, gates)


def _answer(
    model: Any, prompt: Tensor, cache: Any, chunk: int, follow: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocab] over prompt and answer, and the text [1, tokens] with greedy tokens.

    With `follow`, each step is given that text's token, so that one early difference does not
    make all later ones incomparable; the tokens returned are still the model's own choice.
    """
    found = []
    for part in prompt.split(chunk, dim=1):
        found.append(model(part, use_cache=True, **cache_argument(model, cache)).logits[0])
    text = prompt
    for step in range(NEW_TOKENS):
        told = found[-1][-1:].argmax(dim=-1)[None]
        text = torch.cat([text, told], dim=1)
        place = prompt.shape[1] + step
        given = told if follow is None else follow[:, place : place + 1]
        found.append(model(given, use_cache=True, **cache_argument(model, cache)).logits[0])
    return torch.cat(found).cpu(), text


def _exact_logits(shape: Shape, dtype: str, device: str, text: Tensor) -> Tensor:
    """The same weights in float64, all tokens at once."""
    model = build(shape, dtype, device).double()
    model.set_attn_implementation("eager")
    logits: Tensor = model(text, **cache_argument(model, DynamicCache(config=model.config))).logits[
        0
    ]
    return logits.cpu()


def _attention_checks(device: str) -> Iterator[Check]:
    runs: dict[str, Callable[[torch.dtype], tuple[float, float] | None]] = {
        f"attention {name!r}": partial(_worst, run, device) for name, run in IMPLEMENTATIONS.items()
    }
    runs["attention of the baseline"] = partial(_baseline_error, device)
    for name, run in runs.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            title = f"{name} against float64, {str(dtype).removeprefix('torch.')}, {device}"
            try:
                found = run(dtype)
            except Exception as error:  # noqa: BLE001  a check that cannot run has failed
                yield Check(title, False, None, None, f"{type(error).__name__}: {error}")
                continue
            if found is not None:
                off, bound = found
                yield Check(title, off <= bound, _finite(off), bound)


def _worst(run: Any, device: str, dtype: torch.dtype) -> tuple[float, float] | None:
    """Error and bound where they are closest, over shapes; None if it runs none of them."""
    worst: tuple[float, float] | None = None
    for per_kv, dim, new, keys, causal in (
        (4, 128, 1, 1000, False),
        (1, 64, 1, 63, False),
        (7, 80, 3, 257, False),
        (4, 128, 200, 1000, False),
        (4, 64, 200, 200, True),
    ):
        spec = AttentionSpec(device, dtype, dim, dim, per_kv, min(new, 64), causal, False, False)
        if run.unsupported(spec):
            continue
        how: dict[str, Any] = {"scale": dim**-0.5, "causal": causal}
        draws = [
            _random(device, dtype, 2 * per_kv, 2, new, keys, dim, seed=seed)
            for seed in range(DRAWS if new < FEW else 1)
        ]
        parts = [[attend(*draw, **how) for draw in draws] for attend in (run, eager, oracle)]
        for what in ("out", "lse"):
            mine, theirs, true = (
                torch.cat([getattr(part, what).flatten() for part in found]) for found in parts
            )
            _, off, bound = within_rule(mine, theirs, true)
            if worst is None or off * worst[1] > worst[0] * bound:
                worst = off, bound
    return worst


def _baseline_error(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Of the last 96 of 700 tokens, as the baseline attends them."""
    q, k, v = _random(device, dtype, 4, 1, 96, 700, 64)
    hidden = torch.ones(96, 700, dtype=torch.bool, device=device).triu(700 - 96 + 1)
    how: dict[str, Any] = {"scale": 64**-0.5, "bias": ~hidden[None, None]}
    found = attend_one_head(q, k, v, 64**-0.5)
    _, off, bound = within_rule(found, eager(q, k, v, **how).out, oracle(q, k, v, **how).out)
    return off, bound


def _random(
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    new: int,
    keys: int,
    dim: int,
    *,
    seed: int = 7,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, h, t, dim, generator=generator).to(device=device, dtype=dtype)
        for h, t in ((heads, new), (kv_heads, keys), (kv_heads, keys))
    )
    return q, k, v


def _finite(value: float) -> float | None:
    """JSON knows no infinity; None is "not even finite where it has to be"."""
    return value if value < float("inf") else None
