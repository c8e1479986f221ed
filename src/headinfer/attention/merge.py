# SPDX-License-Identifier: Apache-2.0
"""Partials over different spans become one: a commutative monoid with identity (0, -inf).

With weights w_i = exp(lse_i - lse), lse = log sum exp lse_i, the outputs add as sum w_i out_i;
this is the rescaling step of online softmax (Milakov and Gimelshein, arXiv 1805.02867).

The torch code is the definition. On CUDA the kernels of `attention/merge_kernels.py` do the same
in one pass over memory, unless triton is not installed, a gradient is recorded or values are
float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from headinfer.attention.types import Partial

FEW = 4
"""Partials that a GPU merges in one pass over memory."""

STACKED_BYTES = 2**20
"""Outputs up to this size are stacked to merge any number of them; a copy of larger ones costs more."""


def identity(shape: tuple[int, int, int, int], *, device: torch.device) -> Partial:
    """The partial over no keys at all, for outputs of `shape` [b, h, t, d]."""
    out = torch.zeros(shape, dtype=torch.float32, device=device)
    return Partial(out, torch.full(shape[:3], -torch.inf, dtype=torch.float32, device=device))


def merge(a: Partial, b: Partial) -> Partial:
    """The partial over both spans, in the wider of float32 and the inputs' type."""
    if _fused(a, b):
        return _new_fused([a, b])
    dtype = torch.promote_types(a.lse.dtype, torch.float32)
    total = Partial(a.out.to(dtype, copy=True), a.lse.clone())
    merge_into(total, b)
    return total


def merge_all(parts: Sequence[Partial]) -> Partial:
    """The merge of several partials at once: a few kernels however many there are."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return merge(*parts)
    if _fused(*parts):
        return _new_fused(parts)
    lses = torch.stack([part.lse for part in parts])
    # Rows that saw nothing anywhere give 0 / 0 here; their weights are 0, not NaN.
    weights = torch.softmax(lses, dim=0).nan_to_num_(nan=0.0)
    outs = torch.stack([part.out for part in parts])
    return Partial((outs * weights[..., None]).sum(dim=0), torch.logsumexp(lses, dim=0))


def merge_into(total: Partial, part: Partial) -> None:
    """`total` becomes the merge of both, in place; `total.out` is float32 or wider."""
    if _fused(total, part):
        _merge_fused([total, part], total.out, total.lse, None)
        return
    weight = _share(part.lse, total.lse)
    total.out.lerp_(part.out.to(total.out.dtype), weight[..., None])
    torch.logaddexp(total.lse, part.lse, out=total.lse)


def write_merged(parts: Sequence[Partial], out: Tensor, *, sink: Tensor | None = None) -> None:
    """The merge of `parts` is in out [b, h, t, d], in its type; `sink` as in `add_sink`."""
    if (len(parts) > 1 or sink is not None) and _fused(*parts, sink=sink):
        _merge_fused(parts, out, None, sink)
        return
    total = merge_all(parts)
    if sink is not None:
        total = add_sink(total, sink)
    out.copy_(total.out)


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


_FUSED = (torch.float32, torch.float16, torch.bfloat16)


def fuses(dtype: torch.dtype) -> bool:
    """Whether kernels merge outputs of `dtype` where these are on CUDA."""
    return dtype in _FUSED and _triton_installed()


def _fused(*parts: Partial, sink: Tensor | None = None) -> bool:
    """Whether the kernels merge these: all on CUDA, none in float64, no gradient to record."""
    if not parts[0].out.is_cuda or not _triton_installed():
        return False
    recorded = sink is not None and sink.requires_grad
    for part in parts:
        if part.out.dtype not in _FUSED or part.lse.dtype != torch.float32:
            return False
        recorded = recorded or part.out.requires_grad or part.lse.requires_grad
    return not (recorded and torch.is_grad_enabled())


@lru_cache(maxsize=1)
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def _new_fused(parts: Sequence[Partial]) -> Partial:
    like = parts[0].out
    out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    lse = torch.empty(like.shape[:3], dtype=torch.float32, device=like.device)
    _merge_fused(parts, out, lse, None)
    return Partial(out, lse)


def _merge_fused(
    parts: Sequence[Partial], out: Tensor, lse: Tensor | None, sink: Tensor | None
) -> None:
    from headinfer.attention.merge_kernels import alike, merge_few, merge_stacked, merge_two

    if len(parts) <= 2:
        merge_two(parts[0], parts[1] if len(parts) > 1 else None, out=out, lse=lse, sink=sink)
        return
    if alike(parts):
        merge_few(parts, out=out, lse=lse, sink=sink)
        return
    if parts[0].out.nbytes > STACKED_BYTES:
        total = _new_fused(parts[:2])
        for part in parts[2:-1]:
            merge_into(total, part)
        merge_two(total, parts[-1], out=out, lse=lse, sink=sink)
        return
    outs = torch.stack([part.out for part in parts])
    lses = torch.stack([part.lse for part in parts])
    merge_stacked(outs, lses, out=out, lse=lse, sink=sink)
