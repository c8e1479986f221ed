# SPDX-License-Identifier: Apache-2.0
"""Functions of single numbers in Triton's language, to float32's precision.

The hardware's exponential is off by two roundings, and its argument by more: with thousands of keys
that is what decides the error of a float32 call. Importing this file imports triton.
"""

import triton
import triton.language as tl


@triton.jit
def precise_exp(x):
    """exp(x) for x <= 0 within 1.2 roundings; 0 below -87, where float32 has no full precision."""
    # x = n ln 2 + r with |r| <= ln(2) / 2. 355 / 512 is ln 2 in few bits: its product with n is exact.
    from_here = tl.maximum(x, -87.0)
    n = tl.floor(from_here * 1.4426950408889634 + 0.5)
    r = tl.fma(n, tl.full(n.shape, -0.693359375, tl.float32), from_here)
    r = tl.fma(n, tl.full(n.shape, 0.00021219444005469057, tl.float32), r)
    # (exp(r) - 1 - r) / r^2, fitted at Chebyshev nodes.
    tail = 0.0013933733571320772 + r * 0.00019899391918443143
    tail = 0.041666463017463684 + r * (0.0083332983776927 + r * tail)
    tail = 0.5 + r * (0.1666666716337204 + r * tail)
    found = 1.0 + (r + r * r * tail)
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    found = tl.where(x < -87.0, 0.0, found * power)
    return tl.where(x == x, found, x)  # NaN has to show


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    # exp(-2|x|) cannot overflow. The difference cancels for small x: an error of one rounding of 1,
    # too much for float32, which below 1/2 takes an odd polynomial fitted to tanh there (3e-9).
    size = tl.abs(x)
    t = precise_exp(-2.0 * size) if PRECISE else tl.exp(-2.0 * size)
    found = (1.0 - t) / (1.0 + t)
    found = tl.where(x < 0, -found, found)
    if PRECISE:
        z = x * x
        tail = 0.0214657848 + z * -0.00694477229
        tail = -0.0539314249 + z * tail
        tail = -0.3333333227 + z * (0.1333320392 + z * tail)
        found = tl.where(size < 0.5, x + x * z * tail, found)
    return found
