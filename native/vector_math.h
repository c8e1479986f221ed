// SPDX-License-Identifier: Apache-2.0
// exp and tanh over a vector type `S`, within about one unit in the last place of float32.
#ifndef HEADINFER_VECTOR_MATH_H
#define HEADINFER_VECTOR_MATH_H

#include <limits>

namespace headinfer {
namespace {

// exp(x) for x <= 0, NaN for NaN; exactly 0 below -87.3, where float32 has no normal numbers left.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by a polynomial of degree 6 whose coefficients are
// the minimax ones for the relative error (3e-9, a twentieth of a rounding).
template <class S>
inline typename S::F exp_nonpositive(typename S::F x) {
  using F = typename S::F;
  const F lowest = S::set(-87.3f);
  const F kept = S::max(lowest, x);  // the second argument where either is NaN
  const F n = S::round(S::mul(kept, S::set(1.44269504f)));
  // ln 2 in two parts, the first short enough for n times it to be exact.
  F r = S::fma(n, S::set(-0.693359375f), kept);
  r = S::fma(n, S::set(2.12194440e-4f), r);
  F p = S::set(1.381446689e-3f);
  p = S::fma(p, r, S::set(8.368780415e-3f));
  p = S::fma(p, r, S::set(4.166839421e-2f));
  p = S::fma(p, r, S::set(1.666652011e-1f));
  p = S::fma(p, r, S::set(4.999999341e-01f));
  // 1 + (r + r^2 p): the rounding of the last addition is the only one that counts.
  p = S::fma(S::mul(p, r), r, r);
  p = S::add(p, S::set(1.0f));
  return S::zero_below(x, lowest, S::times_power_of_two(p, n));
}

// tanh(x) = x + x^3 p(x^2) for small |x|, where 1 - 2 / (exp(2|x|) + 1) would cancel.
template <class S>
inline typename S::F tanh_any(typename S::F x) {
  using F = typename S::F;
  const F size = S::abs(x);
  const F x2 = S::mul(x, x);
  F p = S::set(-5.704986926e-3f);
  p = S::fma(p, x2, S::set(2.063908716e-2f));
  p = S::fma(p, x2, S::set(-5.373971505e-2f));
  p = S::fma(p, x2, S::set(1.333144220e-1f));
  p = S::fma(p, x2, S::set(-3.333328194e-1f));
  const F small = S::fma(S::mul(p, x2), x, x);
  const F e = exp_nonpositive<S>(S::mul(size, S::set(-2.0f)));
  const F one = S::set(1.0f);
  const F large = S::with_sign_of(S::div(S::sub(one, e), S::add(one, e)), x);
  return S::choose_below(size, S::set(0.625f), small, large);
}

}  // namespace
}  // namespace headinfer

#endif
