// SPDX-License-Identifier: Apache-2.0
// Vectors of sixteen floats: AVX-512 F, BW, DQ and VL.
#ifndef HEADINFER_SIMD_AVX512_H
#define HEADINFER_SIMD_AVX512_H

#include <immintrin.h>

#include "elements.h"

namespace headinfer {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kDotRows = 4;
  static constexpr int kDotSums = 16;
  static constexpr int kPairs = 2;
  static constexpr int kPairsFewRows = 4;

  static inline F zero() { return _mm512_setzero_ps(); }
  static inline F set(float x) { return _mm512_set1_ps(x); }
  static inline F load(const float *p) { return _mm512_loadu_ps(p); }
  static inline void store(float *p, F x) { _mm512_storeu_ps(p, x); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  static inline F round(F x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline F abs(F x) { return _mm512_abs_ps(x); }
  static inline F with_sign_of(F size, F x) {
    return _mm512_or_ps(_mm512_abs_ps(size), _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
  }
  static inline F zero_below(F x, F limit, F y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y);
  }
  static inline F choose_below(F x, F limit, F below, F otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), below);
  }
  static inline F times_power_of_two(F p, F n) { return _mm512_scalef_ps(p, n); }
  static inline float sum(F x) {
    const F sums_of_lanes[16] = {x,      zero(), zero(), zero(), zero(), zero(), zero(), zero(),
                                 zero(), zero(), zero(), zero(), zero(), zero(), zero(), zero()};
    return _mm512_cvtss_f32(sums(sums_of_lanes));
  }
  static inline float highest(F x) { return _mm512_reduce_max_ps(x); }

  // Lane i is the sum of x[i]: halves meet three times within, then across, 128-bit lanes.
  static inline F sums(const F *x) {
    F pairs[8], quads[4];
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; ++i)
      pairs[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                     _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
      quads[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                     _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const F low = add(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44),
                      _mm512_shuffle_f32x4(quads[0], quads[1], 0xee));
    const F high = add(_mm512_shuffle_f32x4(quads[2], quads[3], 0x44),
                       _mm512_shuffle_f32x4(quads[2], quads[3], 0xee));
    return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }

  static inline void load2(const float *p, F &a, F &b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 16);
  }
  static inline void load2(const float *p, int count, F &a, F &b) {
    const uint32_t mask = low_bits(count);
    a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
    b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16);
  }

  // bfloat16 is the upper half of a float32: elements of even index, then those of odd.
  static inline void load2(const BFloat16 *p, F &a, F &b) { split(_mm512_loadu_si512(p), a, b); }
  static inline void load2(const BFloat16 *p, int count, F &a, F &b) {
    split(_mm512_maskz_loadu_epi16(low_bits(count), p), a, b);
  }
  static inline void split(__m512i x, F &a, F &b) {
    a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  static inline void load2(const Float16 *p, F &a, F &b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 16)));
  }
  static inline void load2(const Float16 *p, int count, F &a, F &b) {
    const uint32_t mask = low_bits(count);
    a = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
    b = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask >> 16), p + 16));
  }

  // 32 packed values as bfloat16, their bytes from `mixed` and `pairs` on, whose nibbles are those of
  // the lower half of the channels. Nibbles of the upper half keep those of the lower under them.
  using Base = __m512i;
  static constexpr bool kDirect = true;
  static inline Base bases(const uint16_t *p) { return _mm512_loadu_si512(p); }
  static inline __m512i lower(const uint8_t *mixed, const uint8_t *pairs, Base base) {
    const __m512i nibbles =
        _mm512_and_si512(_mm512_slli_epi16(bytes32(pairs), 7), _mm512_set1_epi16(15 << 7));
    return with_exponent(mixed, _mm512_sub_epi16(base, nibbles));
  }
  static inline __m512i upper(const uint8_t *mixed, const uint8_t *pairs, Base base) {
    return with_exponent(mixed, _mm512_sub_epi16(base, _mm512_slli_epi16(bytes32(pairs), 3)));
  }
  static inline __m512i lower(const uint8_t *mixed, const uint8_t *pairs, const uint16_t *base) {
    return lower(mixed, pairs, bases(base));
  }
  static inline __m512i upper(const uint8_t *mixed, const uint8_t *pairs, const uint16_t *base) {
    return upper(mixed, pairs, bases(base));
  }

  template <class T>
  static inline void store2(float *p, F a, F b) {
    if constexpr (is_bfloat16(static_cast<const T *>(nullptr))) {
      const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
      store(p, _mm512_permutex2var_ps(a, low, b));
      store(p + 16, _mm512_permutex2var_ps(a, high, b));
    } else {
      store(p, a);
      store(p + 16, b);
    }
  }

  static inline void unpack(const uint8_t *mixed, const uint8_t *pairs, const uint8_t *base,
                            int64_t half, int64_t count, uint16_t *out) {
    if (half == 64) return unpack_128(mixed, pairs, base, count, out);
    if (half == 32) return unpack_64(mixed, pairs, base, count, out);
    for (; count > 0; --count, mixed += 2 * half, pairs += half, out += 2 * half)
      unpack_token(mixed, pairs, base, half, out);
  }

 private:
  static inline __m512i bytes32(const uint8_t *p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  }

  // Widened with its sign, a byte of sign and mantissa has both where they belong.
  static inline __m512i with_exponent(const uint8_t *mixed, __m512i exponent) {
    const __m512i wide =
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(mixed)));
    return _mm512_ternarylogic_epi64(_mm512_set1_epi16(0x7f80), wide, exponent, kChoose);
  }

  // Bits of the third operand where the first has ones, else of the second.
  static constexpr int kChoose = 0xac;

  // The two most common dims, without masks.
  static inline void unpack_128(const uint8_t *mixed, const uint8_t *pairs, const uint8_t *base,
                                int64_t count, uint16_t *out) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i lower = _mm512_loadu_si512(base), upper = _mm512_loadu_si512(base + 64);
    for (; count > 0; --count, mixed += 128, pairs += 64, out += 128) {
      const __m512i both = _mm512_loadu_si512(pairs);
      unpack64(_mm512_loadu_si512(mixed), _mm512_and_si512(both, low), lower, 64, out);
      unpack64(_mm512_loadu_si512(mixed + 64),
               _mm512_and_si512(_mm512_srli_epi16(both, 4), low), upper, 64, out + 64);
    }
  }

  static inline void unpack_64(const uint8_t *mixed, const uint8_t *pairs, const uint8_t *base,
                               int64_t count, uint16_t *out) {
    const __m512i low = _mm512_set1_epi8(15), bases = _mm512_loadu_si512(base);
    for (; count > 0; --count, mixed += 64, pairs += 32, out += 64) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(pairs));
      const __m512i nibbles =
          _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
      unpack64(_mm512_loadu_si512(mixed), _mm512_and_si512(nibbles, low), bases, 64, out);
    }
  }

  static inline void unpack_token(const uint8_t *mixed, const uint8_t *pairs, const uint8_t *base,
                                  int64_t half, uint16_t *out) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t j = 0; j < half; j += 64) {
      const int64_t count = half - j < 64 ? half - j : 64;
      const __mmask64 mask = ~uint64_t{0} >> (64 - count);
      const __m512i both = _mm512_maskz_loadu_epi8(mask, pairs + j);
      unpack64(_mm512_maskz_loadu_epi8(mask, mixed + j), _mm512_and_si512(both, low),
               _mm512_maskz_loadu_epi8(mask, base + j), count, out + j);
      unpack64(_mm512_maskz_loadu_epi8(mask, mixed + half + j),
               _mm512_and_si512(_mm512_srli_epi16(both, 4), low),
               _mm512_maskz_loadu_epi8(mask, base + half + j), count, out + half + j);
    }
  }

  static inline void unpack64(__m512i mixed, __m512i below, __m512i base, int64_t count,
                              uint16_t *out) {
    // Bytes are joined within quarters of 128 bits: eighths change places before.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i m = _mm512_permutexvar_epi64(order, mixed);
    const __m512i e = _mm512_permutexvar_epi64(order, _mm512_sub_epi8(base, below));
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i high = _mm512_ternarylogic_epi64(sign, _mm512_srli_epi16(e, 1), m, kChoose);
    const __m512i down = _mm512_ternarylogic_epi64(sign, m, _mm512_slli_epi16(e, 7), kChoose);
    const __m512i first = _mm512_unpacklo_epi8(down, high);
    const __m512i second = _mm512_unpackhi_epi8(down, high);
    if (count == 64) {
      _mm512_storeu_si512(out, first);
      _mm512_storeu_si512(out + 32, second);
      return;
    }
    _mm512_mask_storeu_epi16(out, low_bits(count < 32 ? static_cast<int>(count) : 32), first);
    if (count > 32) _mm512_mask_storeu_epi16(out + 32, low_bits(static_cast<int>(count) - 32), second);
  }

  static inline uint32_t low_bits(int count) { return ~uint32_t{0} >> (32 - count); }  // 1..32
  static constexpr bool is_bfloat16(const BFloat16 *) { return true; }
  static constexpr bool is_bfloat16(const void *) { return false; }
};

}  // namespace
}  // namespace headinfer

#endif
