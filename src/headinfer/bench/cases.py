# SPDX-License-Identifier: Apache-2.0
"""The registry: what is measured, on which shape, at which lengths, under which cap, and by whom.

A case is data; what its mode does is in `measure`. Choosing by name accepts patterns and refuses
what matches nothing with the names that exist.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from headinfer.bench.grid import GRID, ON_CPU, ON_GPU
from headinfer.errors import InputError

KIB = 1024


class Mode(enum.StrEnum):
    """What a case does."""

    RATES = "rates"
    PINNING = "pinning"
    KERNELS = "kernels"
    GENERATE = "generate"
    DECODE = "decode"
    ATTENTION = "attention"
    LAST_CHUNK = "last chunk"
    PACKED = "packed"


MODES = {
    Mode.RATES: "what the machine can do: links, memories, matrix products, attention",
    Mode.PINNING: "seconds to allocate and page-lock a GiB of host memory",
    Mode.KERNELS: "one call of every CPU attention there is",
    Mode.GENERATE: "read a prompt in chunks, then the first token, then further ones",
    Mode.DECODE: "tokens after a simulated context",
    Mode.ATTENTION: "attention inside one chunk after a simulated context",
    Mode.LAST_CHUNK: "the last chunk of a prompt whose beginning is simulated, then tokens",
    Mode.PACKED: "the lossless format: round trips, kernels over packed keys, packed streams",
}


@dataclass(frozen=True, slots=True)
class Contestant:
    """Somebody who does the work.

    Attributes:
        name: in the command line and in results.
        label: in tables and plots.
        ours: it is headinfer.
        host_factor: most bytes of host memory it may take per byte of keys and values; a run that
            cannot have them is not started.
    """

    name: str
    label: str
    ours: bool
    host_factor: float


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant("resident", "transformers, resident cache", False, 0.0),
        Contestant("offloaded", "transformers, offloaded cache", False, 3.1),
        Contestant("schedule", "HeadInfer authors' schedule, re-implemented", False, 3.1),
        Contestant("streaming", "headinfer, streaming only", True, 1.02),
        Contestant("near-data", "headinfer, near-data only", True, 1.02),
        Contestant("mixed", "headinfer, mixed", True, 1.02),
        Contestant("planned", "headinfer, as planned", True, 1.02),
        Contestant(
            "unrecorded", "headinfer, as planned, steps run by the model's code", True, 1.02
        ),
        Contestant("all-resident", "headinfer, all resident", True, 0.0),
        Contestant("streaming-lossless", "headinfer, streaming only, lossless", True, 0.8),
        Contestant("mixed-lossless", "headinfer, mixed, lossless", True, 0.8),
        Contestant("planned-lossless", "headinfer, as planned, lossless", True, 0.8),
    )
}
BY_HAND: dict[str, Contestant] = {
    name: Contestant(name, manual.label, True, 1.02) for name, manual in GRID.items()
}
KNOWN = CONTESTANTS | BY_HAND
PACKING = "-lossless"
EVERYBODY = tuple(name for name in CONTESTANTS if not name.endswith(PACKING))
PREFILLING = ("resident", "offloaded", "schedule", "streaming", "planned")
"""Near-data attention is for decode: in a prefill it would be streaming again."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    Attributes:
        name: in the command line and in results.
        mode: what is done.
        device: "cuda" or "cpu" computes; "any": what there is.
        shape: name of a `Shape`; empty where no model is needed.
        dtype: of weights, keys and values.
        contexts: lengths in tokens.
        contestants: names of `KNOWN`; empty where the mode finds its own.
        cap: GPU memory the process may use, None for all there is.
        chunk_tokens: tokens per forward pass for those who do not plan; and of mode attention.
        repeats: how often a prefill, a chunk or a kernel is timed.
        steps: tokens decoded and timed.
        default: part of what `headinfer bench` runs when nothing is named.
        kv_format: of our contestants whose name says none; None leaves it to the plan.
    """

    name: str
    mode: Mode
    device: str
    shape: str = ""
    dtype: str = "bfloat16"
    contexts: tuple[int, ...] = (0,)
    contestants: tuple[str, ...] = ()
    cap: str | None = None
    chunk_tokens: int = 8192
    repeats: int = 1
    steps: int = 16
    default: bool = True
    kv_format: str | None = None

    def runs_on(self, devices: Sequence[str]) -> bool:
        return self.device == "any" or self.device in devices

    def __str__(self) -> str:
        shape = f"{self.shape} in {self.dtype}" if self.shape else ""
        cap = f"at most {self.cap} of GPU memory" if self.cap else ""
        lengths = "" if self.contexts == (0,) else ", ".join(map(format_tokens, self.contexts))
        return "; ".join(part for part in (MODES[self.mode], shape, cap, lengths) if part)


def _lengths(*kib: int) -> tuple[int, ...]:
    return tuple(count * KIB for count in kib)


_8B = Case("", Mode.GENERATE, "cuda", "Llama-3-8B")
_PACKED_8B = replace(_8B, cap="24GiB", default=False)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("rates", Mode.RATES, "any", repeats=10),
        Case("pinning", Mode.PINNING, "cuda"),
        Case("cpu-attention", Mode.KERNELS, "cpu", contexts=_lengths(32), repeats=9),
        replace(
            _8B,
            name="resident-8b",
            mode=Mode.GENERATE,
            contexts=_lengths(8),
            contestants=("resident", "all-resident", "planned", "unrecorded"),
            repeats=5,
            steps=32,
        ),
        replace(
            _8B,
            name="attention-8b",
            mode=Mode.ATTENTION,
            contexts=_lengths(120),
            contestants=("resident", "streaming", "all-resident"),
            repeats=4,
        ),
        replace(
            _8B,
            name="prefill-8b",
            kv_format="exact",
            mode=Mode.GENERATE,
            contexts=_lengths(32, 64, 128),
            contestants=PREFILLING,
            cap="24GiB",
            steps=8,
        ),
        replace(
            _8B,
            name="decode-8b",
            kv_format="exact",
            mode=Mode.DECODE,
            contexts=_lengths(32, 64, 128, 256),
            contestants=EVERYBODY,
            cap="24GiB",
            steps=10,
        ),
        replace(
            _8B,
            name="predict-8b-24",
            contexts=_lengths(8, 64, 128, 256),
            contestants=("planned",),
            cap="24GiB",
            steps=12,
            default=False,
        ),
        *(
            replace(
                _8B,
                name=f"predict-8b-{cap}",
                contexts=_lengths(8, 64),
                contestants=("planned",),
                cap=f"{cap}GiB",
                steps=12,
                default=False,
            )
            for cap in (20, 40)
        ),
        *(
            replace(
                _8B,
                name=f"predict-8b-{cap}-end",
                mode=Mode.LAST_CHUNK,
                contexts=_lengths(256),
                contestants=("planned",),
                cap=f"{cap}GiB",
                steps=12,
                default=False,
            )
            for cap in (20, 40)
        ),
        replace(
            _8B,
            name="plan-grid-8b",
            contexts=_lengths(64),
            contestants=("planned", *(manual.name for manual in ON_GPU)),
            cap="24GiB",
            steps=12,
            default=False,
        ),
        Case(
            "predict-smollm2",
            Mode.GENERATE,
            "cpu",
            "SmolLM2-135M",
            "float32",
            contexts=_lengths(1, 2, 4),
            contestants=("planned",),
            repeats=2,
            steps=24,
            default=False,
        ),
        Case(
            "plan-grid-smollm2",
            Mode.GENERATE,
            "cpu",
            "SmolLM2-135M",
            "float32",
            contexts=_lengths(2),
            contestants=("planned", *(manual.name for manual in ON_CPU)),
            repeats=2,
            steps=16,
            default=False,
        ),
        Case(
            "lossless-format", Mode.PACKED, "any", contexts=_lengths(128), repeats=9, default=False
        ),
        replace(
            _PACKED_8B,
            name="lossless-decode-8b",
            mode=Mode.DECODE,
            contexts=_lengths(128, 256),
            contestants=("streaming", "streaming-lossless", "mixed", "mixed-lossless"),
            steps=10,
        ),
        replace(
            _PACKED_8B,
            name="lossless-prefill-8b",
            contexts=_lengths(128),
            contestants=("streaming", "streaming-lossless"),
            repeats=2,
            steps=8,
        ),
        replace(
            _PACKED_8B,
            name="lossless-prefill-256k-8b",
            contexts=_lengths(64, 128, 256),
            contestants=("planned-lossless",),
            steps=8,
        ),
        replace(
            _PACKED_8B,
            name="lossless-million-8b",
            mode=Mode.DECODE,
            contexts=(1_000_000,),
            contestants=("planned-lossless", "mixed-lossless"),
            steps=8,
        ),
        Case(
            "smollm2-cpu",
            Mode.DECODE,
            "cpu",
            "SmolLM2-135M",
            "float32",
            contexts=_lengths(8),
            contestants=("resident", "planned"),
            steps=24,
        ),
        Case(
            "smollm2-cpu-bf16",
            Mode.DECODE,
            "cpu",
            "SmolLM2-135M",
            contexts=_lengths(8),
            contestants=("resident", "planned"),
            default=False,
        ),
        Case(
            "generate-1b-cpu",
            Mode.GENERATE,
            "cpu",
            "Llama-3.2-1B",
            contexts=_lengths(2, 4),
            contestants=("resident", "schedule", "planned"),
            chunk_tokens=1024,
            steps=8,
            default=False,
        ),
        Case(
            "decode-1b-cpu",
            Mode.DECODE,
            "cpu",
            "Llama-3.2-1B",
            contexts=_lengths(8, 32),
            contestants=("resident", "schedule", "planned"),
            steps=8,
            default=False,
        ),
        Case(
            "generate-tiny",
            Mode.GENERATE,
            "cpu",
            "tiny",
            "float32",
            contexts=_lengths(2, 4, 8),
            contestants=EVERYBODY,
            chunk_tokens=1024,
            repeats=2,
            default=False,
        ),
        Case(
            "decode-tiny",
            Mode.DECODE,
            "cpu",
            "tiny",
            "float32",
            contexts=_lengths(8, 16, 32),
            contestants=EVERYBODY,
            default=False,
        ),
        Case(
            "attention-tiny",
            Mode.ATTENTION,
            "cpu",
            "tiny",
            "float32",
            contexts=_lengths(8),
            contestants=("resident", "streaming", "all-resident"),
            chunk_tokens=512,
            repeats=3,
            default=False,
        ),
    )
}
CPU_DEFAULT = (
    "rates",
    "cpu-attention",
    "smollm2-cpu",
    "generate-tiny",
    "decode-tiny",
    "attention-tiny",
)
"""What runs by default where there is no GPU: about two minutes on two cores."""


def chosen_cases(patterns: Iterable[str], *, devices: Sequence[str]) -> list[Case]:
    """The cases that match a pattern, in the order of the registry; without patterns the default.

    Raises:
        InputError: a pattern that matches nothing, or only what needs a device that is not here.
    """
    patterns = list(patterns)
    if not patterns:
        if "cuda" not in devices:
            return [CASES[name] for name in CPU_DEFAULT]
        return [case for case in CASES.values() if case.default and case.runs_on(devices)]
    wanted = _matching(patterns, CASES, "case")
    found = [CASES[name] for name in wanted if CASES[name].runs_on(devices)]
    if not found:
        raise InputError(
            f"{', '.join(wanted)}: needs a {CASES[wanted[0]].device} device, and this machine has "
            f"{', '.join(devices)}; headinfer bench --list says which cases need what"
        )
    return found


def narrowed(case: Case, *, contestants: Sequence[str], contexts: Sequence[int]) -> Case:
    """`case` with the named contestants (patterns) and lengths only; none named: all.

    Raises:
        InputError: a pattern that is no contestant's name.
    """
    names = _matching(contestants, KNOWN, "contestant") if contestants else tuple(KNOWN)
    kept = tuple(name for name in case.contestants if name in names)
    lengths = tuple(contexts) if contexts and case.contexts != (0,) else case.contexts
    return replace(case, contestants=kept, contexts=lengths)


def parse_contexts(text: str) -> tuple[int, ...]:
    """Lengths such as "32K,128K,1M" or "9000", in tokens.

    Raises:
        InputError: something that is not a length.
    """
    return tuple(_parse_tokens(part) for part in text.split(","))


def format_tokens(tokens: int) -> str:
    """131072 as "128K"; what is no multiple of 1024 in full."""
    if tokens and tokens % KIB**2 == 0:
        return f"{tokens // KIB**2}M"
    return f"{tokens // KIB}K" if tokens and tokens % KIB == 0 else f"{tokens:,}"


def _parse_tokens(text: str) -> int:
    plain = text.strip().upper()
    factor = {"K": KIB, "M": KIB**2}.get(plain[-1:], 1)
    digits = plain.rstrip("KM") if factor > 1 else plain
    if not digits.isdigit() or not int(digits):
        raise InputError(
            f"contexts: {text.strip()!r} is not a length in tokens; write 32K, 128K, 1M or 9000, "
            "with commas between"
        )
    return int(digits) * factor


def _matching(patterns: Iterable[str], known: Mapping[str, object], kind: str) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        names = [name for name in known if fnmatchcase(name, pattern)]
        if not names:
            raise InputError(f"no {kind} is called {pattern!r}; known: {', '.join(known)}")
        found.update(names)
    return [name for name in known if name in found]
