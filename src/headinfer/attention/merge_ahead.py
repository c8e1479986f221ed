# SPDX-License-Identifier: Apache-2.0
"""Compiles what a prompt is merged by before it is needed.

How many partials a chunk leaves depends on how far the prompt has come, so a kernel for one more of
them would be compiled in the middle of it: on an H200 chunks at 28K, 60K and 124K tokens took 0.3
to 0.6 s longer on a machine whose triton cache was empty. Later processes find it filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from headinfer.attention import merge
from headinfer.attention.compiling import compiled
from headinfer.attention.types import Partial

ROWS = 16
MOST_PARTS = 2 * merge.FEW
"""As many as show every kernel: what comes after is merged like the second four."""


def compile_ahead(device: torch.device, dtype: torch.dtype, width: int, *, sink: bool) -> None:
    """Outputs [b, h, t, width] of `dtype` will be merged on `device`, with a sink or without. Returns at
    once; the first time for such outputs a thread begins to compile for them, if there is anything
    to compile."""
    if device.type == "cuda" and merge.fuses(dtype):
        work = partial(merge_everything, device, dtype, width, sink=sink)
        compiled(("merge", device, dtype, width, sink), device, work)


def merge_everything(
    device: torch.device, dtype: torch.dtype, width: int, *, sink: bool = False
) -> None:
    """Partials of a few rows are merged in every way that chunks and tokens are."""
    with torch.inference_mode(False), torch.no_grad():
        out = torch.zeros((1, 1, ROWS, width), dtype=dtype, device=device)
        part = Partial(out, torch.zeros((1, 1, ROWS), dtype=torch.float32, device=device))
        written = torch.empty((1, ROWS, 1, width), dtype=dtype, device=device).transpose(1, 2)
        logit = torch.zeros(1, dtype=dtype, device=device) if sink else None
        for count in range(1, MOST_PARTS + 1):  # in the order in which a prompt gets there
            merge.write_merged(_held([part] * count, merge.FEW), written, sink=logit)
        for most in range(2, merge.FEW):  # larger ones, of which fewer are held
            for count in range(most + 1, 3 * most):
                merge.write_merged(_held([part] * count, most), written, sink=logit)
        many = [part] * (merge.FEW + 1)  # those of a token, all at once
        merge.merge_all(many)
        merge.write_merged(many, written, sink=logit)


def _held(parts: Sequence[Partial], most: int) -> list[Partial]:
    """What is left to be merged in the end where at most `most` are held, as in `headinfer.totals`."""
    found: list[Partial] = []
    owned = False
    for part in parts:
        if len(found) == most:
            if most == 2 and owned:
                merge.merge_into(found[0], found[1])
                found = found[:1]
            else:
                found = [merge.merge_all(found)]
            owned = True
        found.append(part)
    return found
