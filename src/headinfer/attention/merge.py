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
    lse = torch.logaddexp(a.lse, b.lse)
    weight_a, weight_b = _weight(a.lse, lse), _weight(b.lse, lse)
    dtype = torch.promote_types(lse.dtype, torch.float32)
    out = a.out.to(dtype) * weight_a[..., None] + b.out.to(dtype) * weight_b[..., None]
    return Partial(out, lse)


def merge_all(parts: Sequence[Partial]) -> Partial:
    """The merge of several partials at once: a few kernels however many there are."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([part.lse for part in parts])
    lse = torch.logsumexp(lses, dim=0)
    outs = torch.stack([part.out for part in parts])
    return Partial((outs * _weight(lses, lse)[..., None]).sum(dim=0), lse)


def merge_into(total: Partial, part: Partial) -> None:
    """`total` becomes the merge of both, in place; `total.out` is float32."""
    lse = torch.logaddexp(total.lse, part.lse)
    total.out.mul_(_weight(total.lse, lse)[..., None])
    total.out.addcmul_(part.out.to(total.out.dtype), _weight(part.lse, lse)[..., None])
    total.lse.copy_(lse)


def add_sink(total: Partial, sink: Tensor) -> Partial:
    """One more logit per query head, `sink` [h], whose value is zero.

    Applied once, after every span was merged: it only takes weight away.
    """
    lse = torch.logaddexp(total.lse, sink.to(total.lse.dtype).view(1, -1, 1))
    return Partial(total.out * _weight(total.lse, lse)[..., None], lse)


def _weight(part: Tensor, whole: Tensor) -> Tensor:
    # Rows that saw nothing anywhere have -inf - -inf here; their weight is 0, not NaN.
    return torch.exp(part - whole).nan_to_num_(nan=0.0)
