# SPDX-License-Identifier: Apache-2.0
"""Says what this machine and this model can do, and whether the answers agree.

Without a model: versions, devices, which attention implementation runs what and why not. With
one: the logits of random tokens, stock against headinfer and one-shot against chunked, held
against how much transformers' own implementations differ among themselves.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.attention import native
from headinfer.attention.api import choose, why_not
from headinfer.attention.types import AttentionSpec
from headinfer.budget import MIB, format_bytes
from headinfer.errors import HeadInferError, InputError, UnsupportedAttention
from headinfer.hf.attach import attach, session_of
from headinfer.hf.cache_name import cache_argument, cache_returned
from headinfer.hf.geometry import memory_here
from headinfer.hf.remembered import known_rates
from headinfer.host_stream import why_no_host_functions
from headinfer.rates import Rates
from headinfer.surroundings import huge_page_bytes
from headinfer.tiers import HostTier

TOKENS = 200
CHUNK = 64
TILE_BYTES = 2**18
"""Small enough that the check streams several tiles."""
TRIED_BYTES = 64 * MIB
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of logits: `error` must not exceed `bound`, both absolute."""

    name: str
    error: float
    bound: float
    ok: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What was found; `ok` is false when a check failed.

    `rates` are those of `device` in `dtype`, if they were measured.
    """

    versions: dict[str, str]
    devices: list[str]
    attention: dict[str, str]
    why_not: dict[str, dict[str, list[str]]]
    device: torch.device
    dtype: torch.dtype
    rates: Rates | None
    model: str | None = None
    checks: list[Check] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "ok": self.ok,
            "versions": self.versions,
            "devices": self.devices,
            "attention": self.attention,
            "why_not": self.why_not,
            "rates": None if self.rates is None else self.rates.as_dict(),
            "model": self.model,
            "warnings": self.warnings,
            "checks": [
                {name: getattr(check, name) for name in Check.__slots__} for check in self.checks
            ],
        }

    def __str__(self) -> str:
        lines = [f"{name} {found}" for name, found in self.versions.items()]
        lines += self.devices
        lines += [f"{call}: {name}" for call, name in self.attention.items()]
        if self.rates is None:
            lines.append("rates: not measured yet; `headinfer doctor --probe` does it in seconds")
        else:
            lines.append(str(self.rates))
        lines += [f"warning: {warning}" for warning in self.warnings]
        for check in self.checks:
            state = "ok" if check.ok else "FAILED"
            lines.append(f"{state}: {check.name}: {check.error:.2e} (bound {check.bound:.2e})")
            if check.note:
                lines.append(f"  {check.note}")
        return "\n".join(lines)


def doctor(model: PreTrainedModel | None = None) -> DoctorReport:
    """Examine the machine, and `model` if one is given; runs a few short forward passes.

    Raises:
        InputError: headinfer is attached to `model` already, so that nothing is left to compare.
    """
    if model is not None and session_of(model) is not None:
        raise InputError(
            f"headinfer is attached to {type(model).__name__} already, so its stock answers cannot "
            "be had; close the session, then examine the model"
        )
    calls = dict(_calls())
    device, dtype = _computes(model)
    report = DoctorReport(
        versions=_versions(),
        devices=_devices(),
        attention={name: _chosen(spec) for name, spec in calls.items()},
        why_not={name: why_not(spec) for name, spec in calls.items()},
        device=device,
        dtype=dtype,
        rates=known_rates(device, dtype),
        model=None if model is None else type(model).__name__,
    )
    if model is not None:
        _examine(model, report)
    return report


def _computes(model: PreTrainedModel | None) -> tuple[torch.device, torch.dtype]:
    """Where and in which type: the model's, or what one would load here."""
    if model is not None:
        return model.device, model.dtype
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def _examine(model: PreTrainedModel, report: DoctorReport) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(0, vocab, (1, TOKENS), generator=generator, device="cpu").to(
        model.device
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _compare(model, tokens, report)
    finally:
        model.train(was_training)


def _compare(model: PreTrainedModel, tokens: Tensor, report: DoctorReport) -> None:
    with _attention(model, "eager"):
        stock = _one_shot(model, tokens)
        stock_chunked = _chunked(model, tokens)
    with _attention(model, "sdpa"):
        other = _one_shot(model, tokens)
    rounding = torch.finfo(model.dtype).eps * float(stock.abs().max())
    # The rule for kernels: at most twice what implementations of the same type differ, plus one
    # rounding. With one stock implementation only, four roundings per layer stand in.
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    noise = _error(other, stock) or 4 * layers * rounding
    bound = 2 * (noise + rounding)
    drift = _error(stock_chunked, stock)
    note = "" if drift <= bound else "transformers' own chunked prefill differs for this model"
    try:
        with attach(model, tile_bytes=TILE_BYTES, staging=True) as run:
            report.warnings.extend(run.warnings)
            one, chunked = _one_shot(model, tokens), _chunked(model, tokens)
    except HeadInferError as refusal:
        report.checks.append(Check(f"refused: {refusal}", float("inf"), bound, False))
        return
    for name, found, against in (
        ("one-shot, headinfer against the resident cache", one, stock),
        ("chunked, headinfer against the resident cache", chunked, stock_chunked),
    ):
        error = _error(found, against)
        report.checks.append(Check(name, error, bound, error <= bound))
    report.checks.append(
        Check("chunked against one-shot, resident cache", drift, max(drift, bound), True, note)
    )


def _one_shot(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(**_inputs(model, tokens), use_cache=True).logits
    return logits.double()


def _chunked(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    if model.config.is_encoder_decoder:
        return _one_shot(model, tokens)
    cache: Any = DynamicCache(config=model.config)
    found = []
    for chunk in tokens.split(CHUNK, dim=1):
        output = model(input_ids=chunk, use_cache=True, **cache_argument(model, cache))
        cache = cache_returned(output)
        found.append(output.logits)
    return torch.cat(found, dim=1).double()


def _inputs(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def _error(found: Tensor, against: Tensor) -> float:
    return float((found - against).abs().max())


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model with a stock implementation; what cannot be set stays as it is."""
    before = model.config._attn_implementation
    if model._can_set_attn_implementation():
        try:
            model.set_attn_implementation(name)
        except ValueError:  # a model without sdpa: its eager path is compared with itself
            model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if model._can_set_attn_implementation():
            model.set_attn_implementation(before)


def _calls() -> Iterator[tuple[str, AttentionSpec]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for label, tokens, *features in (
            ("prefill", 64, True, False, False, False),
            ("decode", 1, False, False, False, False),
            ("masked", 64, False, True, False, False),
            ("softcap", 64, True, False, True, False),
            ("window", 64, False, False, False, True),
        ):
            if label == "window" and device == "cpu":
                continue  # windows become masks there
            name = f"{label}, {str(dtype).removeprefix('torch.')}, {device}"
            yield name, AttentionSpec(device, dtype, 128, 128, 4, tokens, *features)


def _chosen(spec: AttentionSpec) -> str:
    try:
        return choose(spec).name
    except UnsupportedAttention as error:
        return str(error)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "headinfer": headinfer.__version__}
    for name in ("torch", "transformers", "triton", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> list[str]:
    memory = memory_here()
    limit = " (a container's limit)" if memory.container else ""
    lines = [
        (
            f"CPU: {platform.machine()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}, host memory {format_bytes(memory.total_bytes)}, "
            f"{format_bytes(memory.free_bytes)} available{limit}"
        ),
        f"native CPU attention: {native.described()}",
        _huge_pages(),
    ]
    if not torch.cuda.is_available():
        lines.append("GPU: none that torch can use")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        lines.append(
            f"GPU {index}: {torch.cuda.get_device_name(index)}, {format_bytes(total)}, "
            f"{format_bytes(free)} free"
        )
    if torch.cuda.is_available():
        absent = why_no_host_functions() or native.why_absent()
        lines.append(
            "near-data attention: host functions of a CUDA stream"
            if absent is None
            else f"near-data attention: by a thread that waits for queries ({absent})"
        )
    return lines


def _huge_pages(setting: Path = HUGE_PAGES) -> str:
    """Whether host memory comes in huge pages, which decides how long page-locking takes."""
    try:
        found = setting.read_text().strip()
    except OSError as error:
        return f"huge pages: unknown ({error.strerror or error})"
    chosen = found.partition("[")[2].partition("]")[0] or found
    if chosen == "never":
        return "huge pages: never; page-locking memory takes several times as long as with madvise"
    memory = HostTier()
    there = memory.view(memory.allocate(TRIED_BYTES), 0, (TRIED_BYTES,), torch.uint8)
    granted = huge_page_bytes(there.fill_(1).data_ptr())
    memory.close()
    if not granted:
        return (
            f"huge pages: {chosen}, but the system granted none for {format_bytes(TRIED_BYTES)}; "
            "page-locking memory takes several times as long as with them"
        )
    return f"huge pages: {chosen}, granted"
