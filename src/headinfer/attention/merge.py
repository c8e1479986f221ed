# SPDX-License-Identifier: Apache-2.0
"""Partials over different spans become one: a commutative monoid with identity (0, -inf).

With weights w_i = exp(lse_i - lse), lse = log sum exp lse_i, the outputs add as sum w_i out_i;
this is the rescaling step of online softmax (Milakov and Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headinfer.attention.types import Partial


def identity(shape: tuple[int, int, int, int], *, device: torch.device) -> Partial:
    """The partial over no keys at all, for outputs of `shape` [b, h, t, d]."""
    out = torch.zeros(shape, dtype=torch.float32, device=device)
    return Partial(out, torch.full(shape[:3], -torch.inf, dtype=torch.float32, device=device))


def merge(a: Partial, b: Partial) -> Partial:
    """The partial over both spans, in the wider of float32 and the inputs' type."""
    dtype = torch.promote_types(a.lse.dtype, torch.float32)
    total = Partial(a.out.to(dtype, copy=True), a.lse.clone())
    merge_into(total, b)
    return total


def merge_all(parts: Sequence[Partial]) -> Partial:
    """The merge of several partials at once: a few kernels however many there are."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([part.lse for part in parts])
    # Rows that saw nothing anywhere give 0 / 0 here; their weights are 0, not NaN.
    weights = torch.softmax(lses, dim=0).nan_to_num_(nan=0.0)
    outs = torch.stack([part.out for part in parts])
    return Partial((outs * weights[..., None]).sum(dim=0), torch.logsumexp(lses, dim=0))


def merge_into(total: Partial, part: Partial) -> None:
    """`total` becomes the merge of both, in place; `total.out` is float32 or wider."""
    weight = _share(part.lse, total.lse)
    total.out.lerp_(part.out.to(total.out.dtype), weight[..., None])
    torch.logaddexp(total.lse, part.lse, out=total.lse)


def add_sink(total: Partial, sink: Tensor) -> Partial:
    """One more logit per query head, `sink` [h], whose value is zero.

    Applied once, after every span was merged: it only takes weight away.
    """
    logit = sink.to(total.lse.dtype).view(1, -1, 1)
    weight = _share(total.lse, logit)
    return Partial(total.out * weight[..., None], torch.logaddexp(total.lse, logit))


def _share(part: Tensor, rest: Tensor) -> Tensor:
    """exp(part) / (exp(part) + exp(rest)): shares of a pair add up to 1 whatever the rounding of
    their log-sum-exps, which would otherwise scale the whole output."""
    return torch.sigmoid(part - rest).nan_to_num_(nan=0.0)
