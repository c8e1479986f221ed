// SPDX-License-Identifier: Apache-2.0
// AVX-512 whose dot products of bfloat16 pairs give the scores. The products are exact and summed
// in float32, so no score loses by it; weights stay float32, because rounding them would show.
// Compiled with the flags of level_avx512.cpp and -mavx512bf16.
#include "tile.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512BF16__)
#include "kernel.h"
#include "simd_avx512.h"

namespace headinfer {
namespace {

struct PairDots {
  using F = Avx512::F;
  using Packed = BFloat16;
  using Part = __m512bh;
  static constexpr int kStep = 32;

  static inline Part query(const Packed *p) { return (Part)_mm512_loadu_si512(p); }
  static inline Part keys(const BFloat16 *p) { return (Part)_mm512_loadu_si512(p); }
  static inline Part keys(const BFloat16 *p, int count) {
    return (Part)_mm512_maskz_loadu_epi16(~uint32_t{0} >> (32 - count), p);
  }
  static inline Part of(__m512i elements) { return (Part)elements; }
  static inline F add(F sum, Part q, Part k) { return _mm512_dpbf16_ps(sum, q, k); }
  static inline void pack(const BFloat16 *from, int count, Packed *to) {
    for (int i = 0; i < kStep; ++i) to[i] = i < count ? from[i] : BFloat16{0};
  }
};

bool runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512bf16");
}

const Level level{"avx512-bf16",
                  runs,
                  {run_tile<Avx512, float>, run_tile<Avx512, BFloat16, PairDots>,
                   run_tile<Avx512, Float16>},
                  run_packed_tile<Avx512, PairDots>,
                  unpack<Avx512>};

}  // namespace

const Level *level_avx512_bf16() { return &level; }

}  // namespace headinfer

#else
namespace headinfer {
const Level *level_avx512_bf16() { return nullptr; }
}  // namespace headinfer
#endif
