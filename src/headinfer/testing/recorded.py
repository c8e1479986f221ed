# SPDX-License-Identifier: Apache-2.0
"""A model's shape and a machine's rates that predictions were measured with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headinfer.budget import GIB
from headinfer.geometry import Geometry, LayerGeometry, LayerKind
from headinfer.rates import VERSION, Rates

FULL = LayerGeometry(LayerKind.FULL, 8, 128, 128, 32)
LLAMA3_8B = Geometry(
    (FULL,) * 32, 2, 4096, 14336, 128256, 15 * GIB, 8192, "Llama-3-8B", dtype="bfloat16"
)
H200 = Rates(
    machine="NVIDIA H200",
    dtype="bfloat16",
    block_flops=496.8e12,
    attention_flops={64: 457e12, 128: 635e12},
    weight_bytes_s=3651e9,
    resident_bytes_s=3551e9,
    layer_s=0.089e-3,
    token_s=0.47e-3,
    chunk_layer_s=1.52e-3,
    streamed_layer_s=3.42e-3,
    h2d_bytes_s=55.5e9,
    d2h_bytes_s=55.3e9,
    near_bytes_s=85.3e9,
    h2d_beside_bytes_s=48.8e9,
    near_packed_bytes_s=83.6e9,
    pin_s_per_gib=0.047,
)
"""As in benchmarks/results/nvidia-h200-predicted.json."""


class Measured(NamedTuple):
    """A row of a results file whose plan was made from rates.

    Attributes:
        rates: of its machine.
        gpu_bytes: what the plan was allowed.
        row: as in the file.
    """

    rates: Rates
    gpu_bytes: int
    row: dict[str, Any]


def as_planned(path: Path, metric: str) -> Iterator[Measured]:
    """Rows of cases `predict-*` of the bench on a GPU, as planned."""
    found = json.loads(path.read_text(encoding="utf-8"))
    for row in found["rows"]:
        if not row["case"].startswith("predict-") or row["metric"] != metric:
            continue
        measured = found["sessions"][row["session"]]["machine"]["rates"]["bfloat16 on cuda"]
        # Of another version, which measures otherwise, but what it measures is the same.
        rates = Rates.from_dict(measured | {"version": VERSION})
        cap = row["settings"]["asked"]["gpu_memory"].removesuffix("GiB")
        if rates is not None:
            yield Measured(rates, int(cap) * GIB, row)
