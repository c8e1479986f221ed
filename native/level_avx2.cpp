// SPDX-License-Identifier: Apache-2.0
// Vectors of eight floats: AVX2, FMA and F16C. Compiled with -mavx2 -mfma -mf16c.
#include "tile.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <cpuid.h>
#include <immintrin.h>

#include "elements.h"
#include "kernel.h"

namespace headinfer {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kDotRows = 2;
  static constexpr int kDotSums = 8;
  static constexpr int kPairs = 1;
  static constexpr int kPairsFewRows = 2;
  static constexpr bool kDirect = false;

  static inline F zero() { return _mm256_setzero_ps(); }
  static inline F set(float x) { return _mm256_set1_ps(x); }
  static inline F load(const float *p) { return _mm256_loadu_ps(p); }
  static inline void store(float *p, F x) { _mm256_storeu_ps(p, x); }
  static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
  static inline F round(F x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline F abs(F x) { return _mm256_andnot_ps(set(-0.0f), x); }
  static inline F with_sign_of(F size, F x) {
    return _mm256_or_ps(abs(size), _mm256_and_ps(x, set(-0.0f)));
  }
  static inline F zero_below(F x, F limit, F y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ), y);
  }
  static inline F choose_below(F x, F limit, F below, F otherwise) {
    return _mm256_blendv_ps(otherwise, below, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
  }
  static inline F times_power_of_two(F p, F n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  }
  static inline float sum(F x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static inline float highest(F x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }

  // Lane i is the sum of x[i].
  static inline F sums(const F *x) {
    F pairs[4], quads[2];
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i)
      pairs[i] = add(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                     _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    _Pragma("GCC unroll 2") for (int i = 0; i < 2; ++i) {
      const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
      quads[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                     _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return add(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
               _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
  }

  static inline void load2(const float *p, F &a, F &b) {
    a = load(p);
    b = load(p + 8);
  }

  // bfloat16 is the upper half of a float32: elements of even index, then those of odd.
  static inline void load2(const BFloat16 *p, F &a, F &b) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    b = _mm256_castsi256_ps(
        _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  static inline void load2(const Float16 *p, F &a, F &b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 8)));
  }

  template <class T>
  static inline void load2(const T *p, int count, F &a, F &b) {
    alignas(32) T line[2 * kWidth] = {};
    std::memcpy(line, p, sizeof(T) * static_cast<size_t>(count));
    load2(line, a, b);
  }

  template <class T>
  static inline void store2(float *p, F a, F b) {
    if constexpr (is_bfloat16(static_cast<const T *>(nullptr))) {
      const F low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
      a = _mm256_permute2f128_ps(low, high, 0x20);
      b = _mm256_permute2f128_ps(low, high, 0x31);
    }
    store(p, a);
    store(p + 8, b);
  }

  static inline void unpack(const uint8_t *mixed, const uint8_t *pairs, const uint8_t *base,
                            int64_t half, int64_t count, uint16_t *out) {
    for (int64_t token = 0; token < count; ++token)
      unpack_token(mixed + token * 2 * half, pairs + token * half, base, half,
                   out + token * 2 * half);
  }

 private:
  static inline void unpack_token(const uint8_t *mixed, const uint8_t *pairs, const uint8_t *base,
                                  int64_t half, uint16_t *out) {
    const __m256i low = _mm256_set1_epi8(15);
    int64_t j = 0;
    for (; j + 32 <= half; j += 32) {
      const __m256i both = bytes(pairs + j);
      unpack32(mixed + j, _mm256_and_si256(both, low), base + j, out + j);
      unpack32(mixed + half + j, _mm256_and_si256(_mm256_srli_epi16(both, 4), low), base + half + j,
               out + half + j);
    }
    unpack_channels(mixed, pairs, base, half, j, half, out);
  }

  static inline __m256i bytes(const uint8_t *p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  }

  // Bits of `a` where `mask` is 0, of `b` where it is 1.
  static inline __m256i choose(__m256i mask, __m256i a, __m256i b) {
    return _mm256_or_si256(_mm256_andnot_si256(mask, a), _mm256_and_si256(mask, b));
  }

  static inline void unpack32(const uint8_t *mixed, __m256i below, const uint8_t *base,
                              uint16_t *out) {
    // Bytes are joined within halves of 128 bits: quarters change places before.
    const __m256i m = _mm256_permute4x64_epi64(bytes(mixed), 0xd8);
    const __m256i e = _mm256_permute4x64_epi64(_mm256_sub_epi8(bytes(base), below), 0xd8);
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));
    const __m256i high = choose(sign, _mm256_srli_epi16(e, 1), m);
    const __m256i down = choose(sign, m, _mm256_slli_epi16(e, 7));
    __m256i *to = reinterpret_cast<__m256i *>(out);
    _mm256_storeu_si256(to, _mm256_unpacklo_epi8(down, high));
    _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi8(down, high));
  }

  static constexpr bool is_bfloat16(const BFloat16 *) { return true; }
  static constexpr bool is_bfloat16(const void *) { return false; }
};

// Not every compiler knows F16C by name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

bool runs() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

const Level level{"avx2",
                  runs,
                  {run_tile<Avx2, float>, run_tile<Avx2, BFloat16>, run_tile<Avx2, Float16>},
                  run_packed_tile<Avx2>,
                  unpack<Avx2>};

}  // namespace

const Level *level_avx2() { return &level; }

}  // namespace headinfer

#else
namespace headinfer {
const Level *level_avx2() { return nullptr; }
}  // namespace headinfer
#endif
