# SPDX-License-Identifier: Apache-2.0
"""Merging of partials on CUDA: everything a row needs is read once and written once.

The arithmetic of `attention/merge.py`, which decides when these run; importing this file imports
triton. A row is one query token of one head; outputs may have any strides but a dense last axis.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headinfer.attention.merge import FEW
from headinfer.attention.triton_math import precise_exp
from headinfer.attention.types import Partial

ELEMENTS = 4096
"""Output elements a program merges at a time: 32 per thread."""

FEW_ELEMENTS = 2048
"""What a program of `merge_few` holds of each."""

STACKED = 32
"""Stacked partials read at a time."""


def merge_two(
    a: Partial, b: Partial | None, *, out: Tensor, lse: Tensor | None, sink: Tensor | None = None
) -> None:
    """Write the merge of both, a [b, h, t, d], into out [b, h, t, d] and lse [b, h, t].

    Args:
        b: None writes `a` itself.
        out: of any float type; may be `a.out`.
        lse: without the sink; may be `a.lse`.
        sink: [h] one more logit per head whose value is zero.
    """
    batch, heads, rows, width = a.out.shape
    block = max(16, triton.next_power_of_2(width))
    step = max(1, ELEMENTS // block)
    count = batch * heads * rows
    other = a if b is None else b
    first, second = _dense(a.out), _dense(other.out)
    align = _alignment(first, second, out)
    with _on(out):
        _merge_two[(triton.cdiv(count, step),)](
            first,
            second,
            out,
            a.lse,
            other.lse,
            lse,
            sink,
            *_steps(first, align),
            *_steps(second, align),
            *_steps(out, align),
            *a.lse.stride(),
            *other.lse.stride(),
            *((0, 0, 0) if lse is None else lse.stride()),
            heads,
            rows,
            count,
            WIDTH=width,
            BLOCK=block,
            STEP=step,
            ALIGN=align,
            TWO=b is not None,
            WRITE_LSE=lse is not None,
            SINK=sink is not None,
        )


def alike(parts: Sequence[Partial]) -> bool:
    """Whether `merge_few` takes them: all but the first have the same type and strides."""
    if not 3 <= len(parts) <= FEW:
        return False
    one = parts[1]
    how = one.out.dtype, one.out.stride(), one.lse.stride()
    same = all((x.out.dtype, x.out.stride(), x.lse.stride()) == how for x in parts[2:])
    return same and all(x.out.stride(-1) == 1 for x in parts)


def merge_few(
    parts: Sequence[Partial], *, out: Tensor, lse: Tensor | None, sink: Tensor | None = None
) -> None:
    """Write the merge of three or four partials that are `alike`, in their order, into out and lse as
    `merge_two` does: each is read once, where merging two by two reads and writes a sum each time."""
    first, second = parts[0], parts[1]
    batch, heads, rows, width = first.out.shape
    block = max(16, triton.next_power_of_2(width))
    step = max(1, FEW_ELEMENTS // block)
    count = batch * heads * rows
    third, fourth = parts[2], parts[-1]
    align = _alignment(first.out, second.out, out)
    with _on(out):
        _merge_few[(triton.cdiv(count, step),)](
            first.out,
            second.out,
            third.out,
            fourth.out,
            out,
            first.lse,
            second.lse,
            third.lse,
            fourth.lse,
            lse,
            sink,
            *_steps(first.out, align),
            *_steps(second.out, align),
            *_steps(out, align),
            *first.lse.stride(),
            *second.lse.stride(),
            *((0, 0, 0) if lse is None else lse.stride()),
            heads,
            rows,
            count,
            WIDTH=width,
            BLOCK=block,
            STEP=step,
            ALIGN=align,
            FOUR=len(parts) == FEW,
            WRITE_LSE=lse is not None,
            SINK=sink is not None,
        )


def merge_stacked(
    outs: Tensor,
    lses: Tensor,
    *,
    out: Tensor,
    lse: Tensor | None,
    sink: Tensor | None = None,
    totals: Tensor | None = None,
) -> None:
    """Write the merge of outs [n, b, h, t, d], lses [n, b, h, t], in their order, into out and lse
    as `merge_two` does; for few rows and many partials.

    Args:
        totals: where `outs` are sums that nobody has divided yet, what to divide them by, and then
            `lses` are the largest scores; laid out like `lses`.
    """
    parts, batch, heads, rows, width = outs.shape
    outs = _dense(outs)
    align = _alignment(outs, out)
    with _on(out):
        _merge_stacked[(batch * heads * rows,)](
            outs,
            lses,
            totals,
            out,
            lse,
            sink,
            *_steps(outs, align),
            *lses.stride(),
            *_steps(out, align),
            *((0, 0, 0) if lse is None else lse.stride()),
            parts,
            heads,
            rows,
            WIDTH=width,
            BLOCK=max(16, triton.next_power_of_2(width)),
            PARTS=STACKED,
            ALIGN=align,
            DIVIDED=totals is None,
            WRITE_LSE=lse is not None,
            SINK=sink is not None,
        )


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _alignment(*tensors: Tensor) -> int:
    """8 if that divides every stride but the last, so that rows are read in wide loads; else 1."""
    return 8 if all(step % 8 == 0 for x in tensors for step in x.stride()[:-1]) else 1


def _steps(x: Tensor, align: int) -> tuple[int, ...]:
    return tuple(step // align for step in x.stride()[:-1])


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(x)


@triton.jit
def _share(part, rest):
    # exp(part) / (exp(part) + exp(rest)); of two rows that saw nothing none has a share.
    larger = tl.maximum(part, rest)
    larger = tl.where(larger == -float("inf"), 0.0, larger)
    up, down = precise_exp(part - larger), precise_exp(rest - larger)
    whole = up + down
    return up / tl.where(whole == 0.0, 1.0, whole)


@triton.jit
def _log_sum(a, b):
    larger = tl.maximum(a, b)
    finite = tl.where(larger == -float("inf"), 0.0, larger)
    whole = tl.exp(a - finite) + tl.exp(b - finite)
    return tl.where(whole == 0.0, larger, finite + tl.log(tl.where(whole == 0.0, 1.0, whole)))


@triton.jit
def _rows_of(heads, rows, count, STEP: tl.constexpr):
    """Batch row, head and query token of this program's rows, and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    t, bh = row % rows, row // rows
    return bh // heads, bh % heads, t, row < count


@triton.jit
def _place(b, h, t, b_step, h_step, t_step, d, ALIGN: tl.constexpr):
    return (b * b_step + h * h_step + t * t_step)[:, None] * ALIGN + d[None, :]


@triton.jit
def _without_sink(x, x_lse, sink, h, real):
    logit = tl.load(sink + h, mask=real, other=0.0).to(tl.float32)
    return x * _share(x_lse, logit)[:, None]


@triton.jit
def _part(x, place, inside):
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


_PLACES = [
    f"{name}_{axis}" for name in ("a", "c", "o", "al", "cl", "ol") for axis in "bht"
]  # fmt: skip


@triton.jit(do_not_specialize=["heads", "rows", "count", *_PLACES])
def _merge_two(
    a, c, out, a_lse, c_lse, lse, sink,
    a_b: tl.int64, a_h: tl.int64, a_t: tl.int64,
    c_b: tl.int64, c_h: tl.int64, c_t: tl.int64,
    o_b: tl.int64, o_h: tl.int64, o_t: tl.int64,
    al_b: tl.int64, al_h: tl.int64, al_t: tl.int64,
    cl_b: tl.int64, cl_h: tl.int64, cl_t: tl.int64,
    ol_b: tl.int64, ol_h: tl.int64, ol_t: tl.int64,
    heads, rows, count,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, ALIGN: tl.constexpr,
    TWO: tl.constexpr, WRITE_LSE: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    b, h, t, real = _rows_of(heads, rows, count, STEP)
    d = tl.arange(0, BLOCK)
    inside = real[:, None] & (d < WIDTH)[None, :]
    x = _part(a, _place(b, h, t, a_b, a_h, a_t, d, ALIGN), inside)
    x_lse = tl.load(a_lse + b * al_b + h * al_h + t * al_t, mask=real, other=0.0)
    if TWO:
        y = _part(c, _place(b, h, t, c_b, c_h, c_t, d, ALIGN), inside)
        y_lse = tl.load(c_lse + b * cl_b + h * cl_h + t * cl_t, mask=real, other=0.0)
        share, rest = _share(y_lse, x_lse)[:, None], _share(x_lse, y_lse)[:, None]
        # From the nearer end, so that a share of 0 or 1 leaves that output's bits alone.
        x = tl.where(share < 0.5, x + share * (y - x), y + rest * (x - y))
        x_lse = _log_sum(x_lse, y_lse)
    if WRITE_LSE:
        # A row's log-sum-exp is read by several warps, and may lie where it is written.
        tl.debug_barrier()
        tl.store(lse + b * ol_b + h * ol_h + t * ol_t, x_lse, mask=real)
    if SINK:
        x = _without_sink(x, x_lse, sink, h, real)
    place = out + _place(b, h, t, o_b, o_h, o_t, d, ALIGN)
    tl.store(place, x.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "rows", "count", *_PLACES])
def _merge_few(
    a, c, e, f, out, a_lse, c_lse, e_lse, f_lse, lse, sink,
    a_b: tl.int64, a_h: tl.int64, a_t: tl.int64,
    c_b: tl.int64, c_h: tl.int64, c_t: tl.int64,
    o_b: tl.int64, o_h: tl.int64, o_t: tl.int64,
    al_b: tl.int64, al_h: tl.int64, al_t: tl.int64,
    cl_b: tl.int64, cl_h: tl.int64, cl_t: tl.int64,
    ol_b: tl.int64, ol_h: tl.int64, ol_t: tl.int64,
    heads, rows, count,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, ALIGN: tl.constexpr,
    FOUR: tl.constexpr, WRITE_LSE: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    b, h, t, real = _rows_of(heads, rows, count, STEP)
    d = tl.arange(0, BLOCK)
    inside = real[:, None] & (d < WIDTH)[None, :]
    place = _place(b, h, t, a_b, a_h, a_t, d, ALIGN)
    others = _place(b, h, t, c_b, c_h, c_t, d, ALIGN)
    at = b * cl_b + h * cl_h + t * cl_t
    l0 = tl.load(a_lse + b * al_b + h * al_h + t * al_t, mask=real, other=0.0)
    l1 = tl.load(c_lse + at, mask=real, other=0.0)
    l2 = tl.load(e_lse + at, mask=real, other=0.0)
    top = tl.maximum(tl.maximum(l0, l1), l2)
    if FOUR:
        l3 = tl.load(f_lse + at, mask=real, other=0.0)
        top = tl.maximum(top, l3)
    safe = tl.where(top == -float("inf"), 0.0, top)
    w0, w1, w2 = precise_exp(l0 - safe), precise_exp(l1 - safe), precise_exp(l2 - safe)
    x = _part(a, place, inside) * w0[:, None] + _part(c, others, inside) * w1[:, None]
    x += _part(e, others, inside) * w2[:, None]
    whole = w0 + w1 + w2
    if FOUR:
        w3 = precise_exp(l3 - safe)
        x += _part(f, others, inside) * w3[:, None]
        whole += w3
    divisor = tl.where(whole == 0.0, 1.0, whole)
    x = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    found = tl.where(whole == 0.0, top, safe + tl.log(divisor))
    if WRITE_LSE:
        tl.store(lse + b * ol_b + h * ol_h + t * ol_t, found, mask=real)
    if SINK:
        x = _without_sink(x, found, sink, h, real)
    to = out + _place(b, h, t, o_b, o_h, o_t, d, ALIGN)
    tl.store(to, x.to(out.dtype.element_ty), mask=inside)


_STACK = [
    *(f"{name}_{axis}" for name in ("x", "xl") for axis in "nbht"),
    *(f"{name}_{axis}" for name in ("o", "ol") for axis in "bht"),
]


@triton.jit(do_not_specialize=["parts", "heads", "rows", *_STACK])
def _merge_stacked(
    x, x_lse, x_total, out, lse, sink,
    x_n: tl.int64, x_b: tl.int64, x_h: tl.int64, x_t: tl.int64,
    xl_n: tl.int64, xl_b: tl.int64, xl_h: tl.int64, xl_t: tl.int64,
    o_b: tl.int64, o_h: tl.int64, o_t: tl.int64,
    ol_b: tl.int64, ol_h: tl.int64, ol_t: tl.int64,
    parts, heads, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    DIVIDED: tl.constexpr, WRITE_LSE: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, bh = row % rows, row // rows
    h, b = bh % heads, bh // heads
    d, n = tl.arange(0, BLOCK), tl.arange(0, PARTS)
    x += (b * x_b + h * x_h + t * x_t) * ALIGN
    lse_place = b * xl_b + h * xl_h + t * xl_t
    x_lse += lse_place
    top = tl.full([PARTS], -float("inf"), dtype=tl.float32)
    for first in range(0, parts, PARTS):
        here = first + n
        top = tl.maximum(top, tl.load(x_lse + here * xl_n, mask=here < parts, other=-float("inf")))
    largest = tl.max(top, 0)
    safe = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.zeros([PARTS], dtype=tl.float32)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, parts, PARTS):
        here = first + n
        weight = precise_exp(
            tl.load(x_lse + here * xl_n, mask=here < parts, other=-float("inf")) - safe
        )
        inside = (here < parts)[:, None] & (d < WIDTH)[None, :]
        part = tl.load(x + (here * x_n)[:, None] * ALIGN + d[None, :], mask=inside, other=0.0)
        acc += tl.sum(part.to(tl.float32) * weight[:, None], 0)
        if DIVIDED:
            total += weight
        else:
            part = tl.load(x_total + lse_place + here * xl_n, mask=here < parts, other=0.0)
            total += weight * part
    whole = tl.sum(total, 0)
    found = tl.div_rn(acc, tl.broadcast_to(tl.where(whole == 0.0, 1.0, whole), acc.shape))
    logarithm = tl.where(whole == 0.0, largest, safe + tl.log(tl.where(whole == 0.0, 1.0, whole)))
    if WRITE_LSE:
        tl.store(lse + b * ol_b + h * ol_h + t * ol_t, logarithm)
    if SINK:
        found *= _share(logarithm, tl.load(sink + h).to(tl.float32))
    place = out + (b * o_b + h * o_h + t * o_t) * ALIGN + d
    tl.store(place, found.to(out.dtype.element_ty), mask=d < WIDTH)
