# SPDX-License-Identifier: Apache-2.0
"""A file of results as an H100 might have written it, and a bench too small to take time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from headinfer.bench.cases import CASES, KIB, Case, Mode
from headinfer.bench.program import Request, bench
from headinfer.bench.results import OUT_OF_MEMORY, Check, Results, Row, Session

Measure = Callable[..., Results]

LONG = 128 * KIB
KV = 16 * 2**30
"""Keys and values of the 8B shape at 128K."""

SMALL = Case(
    "small",
    Mode.GENERATE,
    "cpu",
    "tiny, odd",
    "float32",
    contexts=(48, 80),
    contestants=("resident", "schedule", "streaming", "planned", "all-resident"),
    chunk_tokens=32,
    steps=2,
)


def row(case: str, contestant: str, context: int, metric: str, value: float, **more) -> Row:
    figures = {"unit": "s", "median": value, "p20": value, "p80": value, "n": 1}
    return Row(case, contestant, context, metric, **{**figures, **more})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for their threads, and for long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def synthetic() -> Results:
    """Every row that a bound reads; all bounds hold."""
    held = {"kv_bytes": KV, "host_bytes": KV, "staging_bytes": 200 * 2**20}
    rows = [
        row("rates", "machine", 0, "h2d", 50.0, unit="GB/s"),
        row("pinning", "headinfer arena", 0, "again", 0.1, unit="s/GiB"),
        row("pinning", "torch pin_memory", 0, "again", 0.7, unit="s/GiB"),
        row("cpu-attention", "cpu-flash", 32 * KIB, "attention", 0.4),
        row("cpu-attention", "torch sdpa, packed", 32 * KIB, "attention", 0.05),
        row("cpu-attention", "native", 32 * KIB, "attention", 0.02),
        row("attention-8b", "streaming", 120 * KIB, "attention", 1.0),
        row("attention-8b", "all-resident", 120 * KIB, "attention", 0.9),
    ]
    for name, prefill, first, token in (
        ("planned", 11.0, 0.2, 0.18),
        ("streaming", 11.2, 0.4, 0.34),
        ("offloaded", 39.0, 15.0, 1.0),
        ("schedule", 44.0, 24.0, 0.5),
    ):
        more = {"held": held} if name in ("planned", "streaming") else {}
        for metric, value in (("prefill", prefill), ("first token", first), ("token", token)):
            rows.append(row("prefill-8b", name, LONG, metric, value, **more))
    for name, token in (("mixed", 0.17), ("streaming", 0.35), ("schedule", 0.52)):
        moved = {"h2d": KV} if name == "streaming" else {}
        rows.append(row("decode-8b", name, LONG, "token", token, held=held, moved_bytes=moved))
    for name, token in (("mixed", 0.35), ("planned", 0.28)):
        rows.append(row("decode-8b", name, 2 * LONG, "token", token))
    for case, context, contestants in (
        ("resident-8b", 8 * KIB, ("resident", "all-resident")),
        ("smollm2-cpu", 8 * KIB, ("resident", "planned")),
    ):
        for place, name in enumerate(contestants):
            for metric in ("prefill", "token"):
                rows.append(row(case, name, context, metric, 0.3 - 0.001 * place))
    for name, metric, value in (
        ("codec", "wrong values", 0.0),
        ("plain stream", "stream", 0.4),
        ("packed stream", "stream", 0.3),
        ("native", "attention", 0.02),
        ("native, packed", "attention", 0.021),
    ):
        rows.append(row("lossless-format", name, LONG, metric, value, values=(value,)))
    for context, longer in ((LONG, 1), (2 * LONG, 2)):
        rows.append(row("lossless-decode-8b", "mixed", context, "token", 0.17 * longer))
        rows.append(row("lossless-decode-8b", "mixed-lossless", context, "token", 0.15 * longer))
    rows.append(row("lossless-prefill-8b", "streaming", LONG, "prefill", 11.2))
    rows.append(row("lossless-prefill-8b", "streaming-lossless", LONG, "prefill", 11.4))
    rows.append(row("lossless-million-8b", "planned-lossless", 1_000_000, "token", 0.9))
    for context in (32 * KIB, 64 * KIB):
        rows.append(row("decode-8b", "mixed", context, "token", 0.1, held={"gpu_peak_bytes": KV}))
    said = {"gpu_peak_bytes": 1.05 * KV, "seconds": 9.5, "eta_error": -0.08}
    held = {"gpu_peak_bytes": KV}
    for case, metric in (("predict-8b-24", "prefill"), ("predict-8b-20", "token"),
                         ("predict-smollm2", "token")):  # fmt: skip
        rows.append(row(case, "planned", LONG, metric, 10.0, predicted=said, held=held))
    for name, prefill in (("planned", 5.1), ("grid-8192-most-50", 5.0), ("grid-2048-none-0", 9.0)):
        for metric, value in (("prefill", prefill), ("token", 0.06)):
            rows.append(row("plan-grid-8b", name, 32 * KIB, metric, value))
    rows.append(Row("decode-8b", "resident", LONG, status=OUT_OF_MEMORY, note="no room"))
    machine = {"gpu": "NVIDIA H100", "cpu": "Some CPU", "cpu_threads": 16}
    versions = {"headinfer": "0.1.0", "python": "3.12", "torch": "2.11.0", "transformers": "5.17"}
    session = Session("2026-01-02 03:04:05", "headinfer bench", 0, machine, versions, "abc1234")
    return Results([session], [Check("all of it", True, 0.1, 0.2)], rows)


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Run the case `small`, with rates that cost nothing and exactness taken for granted."""
    monkeypatch.setitem(CASES, "small", SMALL)
    monkeypatch.setattr("headinfer.bench.program.verify", lambda devices, say: [CHECKED])
    rates = [row("rates", "machine", 0, "host read", 10.0, unit="GB/s")]
    monkeypatch.setattr("headinfer.bench.program.rate_rows", lambda case, **how: iter(rates))
    monkeypatch.setattr("headinfer.bench.program.rates_for", lambda device, dtype: None)
    monkeypatch.setattr("headinfer.bench.program.clean", lambda device: None)  # a second a run

    def run(say=lambda line: None, **how) -> Results:
        out = how.pop("out", tmp_path / "results.json")
        given = {"cases": ("small",), "device": "cpu", "commit": "abc1234", **how}
        return bench(Request(out=out, **given), say).results

    return run


CHECKED = Check("taken for granted", True, 0.0, 1.0)
