# SPDX-License-Identifier: Apache-2.0
"""The attention kernel in Triton's language: softmax(q k^T) v in one pass over the keys, with the
log-sum-exp of every row (FlashAttention-2, arXiv 2307.08691).

Only `attention/triton.py` and `attention/placed.py` import this file, and only when a call needs
it: importing it imports triton. Tile sizes, splits and the choice of variants are made there.
"""

import triton
import triton.language as tl

from headinfer.attention.triton_math import precise_exp, tanh

CHUNK = tl.constexpr(16)
"""Dims of a float32 product kept in registers at a time."""

# Whole numbers a context changes: specialising on them would compile anew as it grows.
_LENGTHS = ["kv_heads", "q_per_kv", "rows", "keys", "split_keys", "window_offset", "window_size"]
_STRIDES = [f"{name}_{axis}" for name, axes in (
    ("q", "bht"), ("k", "bhs"), ("v", "bhs"), ("bias", "bht")
) for axis in axes]  # fmt: skip


@triton.jit
def _load(
    place, key, stop, dim, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Keys or values at `place`; zeros from key `stop` and dim WIDTH on."""
    if MASKED:
        if WIDTH == BLOCK:
            return tl.load(place, mask=(key < stop)[:, None], other=0.0)
        else:
            inside = (key < stop)[:, None] & (dim < WIDTH)[None, :]
            return tl.load(place, mask=inside, other=0.0)
    elif WIDTH == BLOCK:
        return tl.load(place)
    else:
        return tl.load(place, mask=(dim < WIDTH)[None, :], other=0.0)


@triton.jit
def _span(
    q, k, v, bias, acc, acc_lost, top, total, lost, position, real,
    first, first_blocks, second, blocks, stop, scale, softcap,
    q_d, k_s, k_d, v_s, v_d, bias_s, window_offset, window_size,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, PRECISE: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """`blocks` blocks of keys: `first_blocks` from key `first` on, the others from `second` on.

    q are queries, or where they lie if PRECISE. Keys from `stop` on are not there. k, v and bias
    point at the head's key 0. Unless NATURAL, scores are in units of log 2: the hardware's
    exponential has base 2.
    """
    UNIT: tl.constexpr = 1.0 if NATURAL else 1.4426950408889634
    column = tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k_place = column[:, None] * k_s.to(tl.int32) + d[None, :] * k_d
    v_place = column[:, None] * v_s.to(tl.int32) + e[None, :] * v_d
    for block in range(blocks):
        start = first + block * BLOCK_N
        if MASKED:
            start = tl.where(block < first_blocks, start, second + (block - first_blocks) * BLOCK_N)
        start = tl.multiple_of(start, BLOCK_N)
        here = start + column
        k_from, v_from = k + start.to(tl.int64) * k_s, v + start.to(tl.int64) * v_s
        if PRECISE:
            # Without tensor cores a dot keeps both operands in registers: so a few dims at a time.
            score = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for part in tl.static_range(0, BLOCK_D, CHUNK):
                c = part + tl.arange(0, CHUNK)
                some = tl.load(
                    q + c[None, :] * q_d, mask=real[:, None] & (c < D)[None, :], other=0.0
                )
                key = _load(k_from + column[:, None] * k_s.to(tl.int32) + c[None, :] * k_d,
                            here, stop, c, D, BLOCK_D, MASKED)  # fmt: skip
                score = tl.dot(some, tl.trans(key), score, input_precision="ieee")
        else:
            key = _load(k_from + k_place, here, stop, d, D, BLOCK_D, MASKED)
            score = tl.dot(q, tl.trans(key))
        value = _load(v_from + v_place, here, stop, e, E, BLOCK_E, MASKED)
        if SOFTCAP:
            if PRECISE:
                # A quotient of the two, rounded once, would stretch all scores alike.
                score *= scale
                score = tl.div_rn(score, tl.zeros_like(score) + softcap)
            else:
                score *= scale / softcap
            score = softcap * UNIT * tanh(score, PRECISE)
        else:
            score *= scale * UNIT
        if MASKED:
            seen = (here < stop)[None, :]
            if BIAS != 0:
                bias_from = bias + here.to(tl.int64)[None, :] * bias_s
                if BIAS == 1:
                    seen = seen & (tl.load(bias_from, mask=seen, other=0) != 0)
                else:
                    score += tl.load(bias_from, mask=seen, other=0.0).to(tl.float32)
            if WINDOWED:
                last = position + window_offset
                seen = seen & (here[None, :] <= last[:, None])
                seen = seen & (here[None, :] > last[:, None] - window_size)
            score = tl.where(seen, score, -float("inf"))

        new_top = tl.maximum(top, tl.max(score, 1))
        # A row that has seen nothing yet: its exponents would be -inf + inf.
        safe = tl.where(new_top == -float("inf"), 0.0, new_top) if MASKED else new_top
        if PRECISE:
            weight, keep = precise_exp(score - safe[:, None]), precise_exp(top - safe)
        elif NATURAL:
            weight, keep = tl.exp(score - safe[:, None]), tl.exp(top - safe)
        else:
            weight, keep = tl.exp2(score - safe[:, None]), tl.exp2(top - safe)
        if PRECISE:
            # The lost low bits of the sums are carried along: every block is a rounding, and
            # eager attention's matrix products have a fraction of them.
            more = tl.sum(weight, 1) - lost * keep
            old = total * keep
            total = old + more
            lost = (total - old) - more
            # A product of its own: as the dot's accumulator, acc would be rounded once per key.
            found = tl.dot(weight, value, input_precision="ieee") - acc_lost * keep[:, None]
            before = acc * keep[:, None]
            acc = before + found
            acc_lost = (acc - before) - found
        else:
            total = total * keep + tl.sum(weight, 1)
            acc = tl.dot(weight.to(value.dtype), value, acc * keep[:, None])
        top = new_top
    return acc, acc_lost, top, total, lost


@triton.jit
def _tile(
    q, k, v, bias, out, lse, scale, softcap,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, bias_b, bias_h, bias_t, bias_s,
    kv_heads, q_per_kv, rows, keys, split_keys, window_offset, window_size,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, PRECISE: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The tile of query rows, KV head and split of the keys that this program has; see `attend_kernel`."""
    # A factor that the compiler sees is how it learns that rows are aligned.
    q_b, q_h, q_t = q_b * ALIGN, q_h * ALIGN, q_t * ALIGN
    k_b, k_h, k_s = k_b * ALIGN, k_h * ALIGN, k_s * ALIGN
    v_b, v_h, v_s = v_b * ALIGN, v_h * ALIGN, v_s * ALIGN
    tile = tl.program_id(0)
    if WINDOWED:  # causal: the last tiles have the most keys, so they start first
        tile = tl.num_programs(0) - 1 - tile
    # Natural where that is what is asked for, or where a bias of the lowest number would overflow.
    NATURAL: tl.constexpr = PRECISE or BIAS == 2
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    split = tl.program_id(2)
    packed = q_per_kv * rows
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    position, head = m // q_per_kv, kv_head * q_per_kv + m % q_per_kv
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    real = m < packed

    q_from = q + batch.to(tl.int64) * q_b
    q_from = q_from + (head.to(tl.int64) * q_h + position.to(tl.int64) * q_t)[:, None]
    if PRECISE:
        query = q_from
    else:
        inside = real[:, None] & (d < D)[None, :]
        query = tl.load(q_from + d[None, :] * q_d, mask=inside, other=0.0)
    k += batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    v += batch.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    if BIAS != 0:
        # Rows past the end read the last one's bias: every address stays inside.
        at = tl.minimum(m, packed - 1)
        token, bias_head = at // q_per_kv, kv_head * q_per_kv + at % q_per_kv
        bias += batch.to(tl.int64) * bias_b
        bias = bias + (bias_head.to(tl.int64) * bias_h + token.to(tl.int64) * bias_t)[:, None]

    low = split * split_keys
    stop = tl.minimum(low + split_keys, keys)
    # Blocks from `full_low` to `full_high` are seen by every row; those around them need a mask.
    full_low, full_high = low, tl.maximum(low, stop // BLOCK_N * BLOCK_N)
    if WINDOWED:
        first_row = tile * BLOCK_M // q_per_kv
        last_row = tl.minimum((tile + 1) * BLOCK_M - 1, packed - 1) // q_per_kv
        oldest = first_row + window_offset - window_size + 1
        low = tl.maximum(low, tl.maximum(oldest, 0) // BLOCK_N * BLOCK_N)
        stop = tl.maximum(tl.minimum(stop, last_row + window_offset + 1), low)
        newest = tl.maximum(first_row + window_offset + 1, 0)
        full_low = tl.maximum(last_row + window_offset - window_size + 1, low)
        full_low = tl.cdiv(tl.minimum(full_low, stop), BLOCK_N) * BLOCK_N
        full_high = tl.maximum(tl.minimum(stop, newest) // BLOCK_N * BLOCK_N, full_low)
    if BIAS != 0:
        full_low, full_high = low, low
    before = (full_low - low) // BLOCK_N
    after = tl.cdiv(tl.maximum(stop - full_high, 0), BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    lost = tl.zeros([BLOCK_M], dtype=tl.float32)
    # What only float32 carries is a row of one element elsewhere.
    acc_lost = tl.zeros([BLOCK_M, BLOCK_E if PRECISE else 1], dtype=tl.float32)
    acc, acc_lost, top, total, lost = _span(
        query, k, v, bias, acc, acc_lost, top, total, lost, position, real,
        low, before, full_high, before + after, stop, scale, softcap,
        q_d, k_s, k_d, v_s, v_d, bias_s, window_offset, window_size,
        D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, True,
        WINDOWED, SOFTCAP, BIAS, PRECISE, NATURAL,
    )  # fmt: skip
    if BIAS == 0:
        acc, acc_lost, top, total, lost = _span(
            query, k, v, bias, acc, acc_lost, top, total, lost, position, real,
            full_low, 0, full_low, (full_high - full_low) // BLOCK_N, stop, scale, softcap,
            q_d, k_s, k_d, v_s, v_d, bias_s, window_offset, window_size,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, False,
            WINDOWED, SOFTCAP, BIAS, PRECISE, NATURAL,
        )  # fmt: skip

    blank = total == 0.0
    safe = tl.where(blank, 1.0, total)
    if SPLIT:
        found = acc
        logarithm = top if NATURAL else top * 0.6931471805599453
    else:
        found = tl.div_rn(acc, tl.broadcast_to(safe[:, None], acc.shape))
        if NATURAL:
            logarithm = top + tl.log(safe)
        else:
            logarithm = (top + tl.log2(safe)) * 0.6931471805599453
    logarithm = tl.where(blank, -float("inf"), logarithm)
    batches, heads = tl.num_programs(1) // kv_heads, kv_heads * q_per_kv
    place = (split * batches + batch).to(tl.int64) * rows * heads
    out_place = (place + position.to(tl.int64) * heads + head) * E
    tl.store(
        out + out_place[:, None] + e[None, :],
        found.to(out.dtype.element_ty),
        mask=real[:, None] & (e < E)[None, :],
    )
    row = place + head.to(tl.int64) * rows + position
    tl.store(lse + row, logarithm, mask=real)
    if SPLIT:
        after = tl.num_programs(2).to(tl.int64) * batches * rows * heads
        tl.store(lse + after + row, total, mask=real)


@triton.jit(do_not_specialize=[*_LENGTHS, *_STRIDES])
def attend_kernel(
    q, k, v, bias, out, lse, scale, softcap,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, q_d,
    k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, k_d,
    v_b: tl.int64, v_h: tl.int64, v_s: tl.int64, v_d,
    bias_b: tl.int64, bias_h: tl.int64, bias_t: tl.int64, bias_s,
    kv_heads, q_per_kv, rows, keys, split_keys, window_offset, window_size,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, PRECISE: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one KV head over one split of the keys.

    Grid: (tiles, batch * kv_heads, splits). The q_per_kv query heads are rows too: row m is token
    m // q_per_kv of query head m % q_per_kv, so that a tile's tokens are close and its keys few.
    Strides of q, k and v other than the last come divided by ALIGN. BIAS: 0 there is none, 1 bytes
    that are true where a key is seen, 2 numbers to add.
    Split i sees keys [i * split_keys, (i + 1) * split_keys), split_keys a multiple of BLOCK_N.
    Writes out [splits, batch, rows, heads, E] and lse [splits, batch, heads, rows], contiguous. If
    SPLIT these are sums that nobody has divided yet and the largest score of each row, and what to
    divide by follows in a second lse: a log-sum-exp is rounded, which shows where splits merge.
    """
    _tile(
        q, k, v, bias, out, lse, scale, softcap,
        q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, bias_b, bias_h, bias_t, bias_s,
        kv_heads, q_per_kv, rows, keys, split_keys, window_offset, window_size,
        D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, WINDOWED, SOFTCAP, BIAS, PRECISE, ALIGN, SPLIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["q_b", "q_h", "q_t", "kv_heads", "q_per_kv", "rows"])
def attend_placed_kernel(
    q, place, length, out, lse, scale, softcap,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, q_d, kv_heads, q_per_kv, rows,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEVERAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """As `attend_kernel` with splits, over keys and values whose place and number memory says when this
    runs, not the call: so that a recorded call goes on being right while the context grows.

    place: [6] see `headinfer.attention.placed.PlaceTable`; its numbers too come divided by ALIGN.
    length: [1] tokens before the `rows` new ones, which are there already; row i sees the first
    length + i + 1. SEVERAL: there is more than one row. LEAST: keys of a split, at least; the splits
    of the grid that are too many for that find nothing.
    """
    # From an argument, which the compiler knows to be aligned, by a number of which it sees a factor.
    here = place.to(q.dtype, bitcast=True)
    k, v = here + tl.load(place) * ALIGN, here + tl.load(place + 1) * ALIGN
    past = tl.load(length).to(tl.int32)
    keys = past + rows
    splits = tl.minimum(tl.maximum(keys // LEAST, 1), tl.num_programs(2))
    split_keys = tl.cdiv(tl.cdiv(keys, splits), BLOCK_N) * BLOCK_N
    k_s, v_s = tl.full([], D // ALIGN, tl.int64), tl.full([], E // ALIGN, tl.int64)
    # No window is as long as this, and sums with it stay whole numbers of 32 bits.
    endless = 1 << 30
    _tile(
        q, k, v, None, out, lse, scale, softcap,
        q_b, q_h, q_t, q_d, tl.load(place + 2), tl.load(place + 3), k_s, 1,
        tl.load(place + 4), tl.load(place + 5), v_s, 1, 0, 0, 0, 0,
        kv_heads, q_per_kv, rows, keys, split_keys, past, endless,
        D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, SEVERAL, SOFTCAP, 0, False, ALIGN, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=[
    "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "heads", "tokens",
])  # fmt: skip
def store_placed_kernel(
    k, v, place, length,
    k_b: tl.int64, k_h: tl.int64, k_t: tl.int64, k_d,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64, v_d, heads, tokens,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Key and value of one new token of one head go where `place` says, after `length` others.

    Grid: (batch * heads * tokens). Strides of k and v in elements, those of `place` as above.
    """
    token, at = tl.program_id(0) % tokens, tl.program_id(0) // tokens
    head, batch = (at % heads).to(tl.int64), (at // heads).to(tl.int64)
    to = tl.load(length) + token
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    key = tl.load(k + batch * k_b + head * k_h + token * k_t + d * k_d, mask=d < D, other=0.0)
    value = tl.load(v + batch * v_b + head * v_h + token * v_t + e * v_d, mask=e < E, other=0.0)
    here = place.to(k.dtype, bitcast=True)
    keys, values = here + tl.load(place) * ALIGN, here + tl.load(place + 1) * ALIGN
    keys += (batch * tl.load(place + 2) + head * tl.load(place + 3)) * ALIGN + to * D
    values += (batch * tl.load(place + 4) + head * tl.load(place + 5)) * ALIGN + to * E
    tl.store(keys + d, key, mask=d < D)
    tl.store(values + e, value, mask=e < E)
