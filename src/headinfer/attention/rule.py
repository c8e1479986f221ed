# SPDX-License-Identifier: Apache-2.0
"""The 2x rule: an implementation may err against float64 at most twice what eager attention in
the same type errs, plus one rounding of the largest value. No tolerance is picked by hand.

Tests hold every implementation against it, and `headinfer bench verify` does on the machine that
is about to be measured."""

from __future__ import annotations

import torch
from torch import Tensor

from headinfer.attention.reference import ReferenceAttention
from headinfer.attention.types import Partial

_reference = ReferenceAttention()


def oracle(q: Tensor, k: Tensor, v: Tensor, **how: object) -> Partial:
    """Attention in float64."""
    bias = how.get("bias")
    if isinstance(bias, Tensor) and bias.dtype != torch.bool:
        how["bias"] = bias.double()
    return _reference(q.double(), k.double(), v.double(), **how)  # type: ignore[arg-type]


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """What transformers' eager attention computes, in the inputs' own type."""
    per_kv = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(per_kv, dim=1), v.repeat_interleave(per_kv, dim=1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if bias is not None:
        if bias.dtype == torch.bool:
            scores = scores.masked_fill(~bias, -torch.inf)
        else:
            scores = scores + bias.to(scores.dtype)
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
    return Partial(weights.nan_to_num(0.0) @ v, torch.logsumexp(scores.float(), dim=-1))


def within_rule(found: Tensor, same_dtype: Tensor, exact: Tensor) -> tuple[bool, float, float]:
    """(holds, error, bound) of the 2x rule; what is infinite must be so in all three."""
    finite = exact.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return False, float("inf"), 0.0
    found, same_dtype, exact = found[finite], same_dtype[finite], exact[finite]
    error = float((found.double() - exact).abs().max()) if found.numel() else 0.0
    baseline = float((same_dtype.double() - exact).abs().max()) if found.numel() else 0.0
    largest = float(exact.abs().max()) if found.numel() else 0.0
    rounding = torch.finfo(same_dtype.dtype).eps * largest
    bound = 2 * (baseline + rounding)
    return error <= bound, error, bound
