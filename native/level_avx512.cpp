// SPDX-License-Identifier: Apache-2.0
// AVX-512 without the bfloat16 instructions. Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl.
#include "tile.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "kernel.h"
#include "simd_avx512.h"

namespace headinfer {
namespace {

bool runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}

const Level level{"avx512",
                  runs,
                  {run_tile<Avx512, float>, run_tile<Avx512, BFloat16>, run_tile<Avx512, Float16>},
                  run_packed_tile<Avx512>,
                  unpack<Avx512>};

}  // namespace

const Level *level_avx512() { return &level; }

}  // namespace headinfer

#else
namespace headinfer {
const Level *level_avx512() { return nullptr; }
}  // namespace headinfer
#endif
