// SPDX-License-Identifier: Apache-2.0
// The level for every processor: vectors of four as the compiler knows them, no fused multiply-add.
#include "elements.h"
#include "kernel.h"

namespace headinfer {
namespace {

struct Portable {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static constexpr int kDotRows = 2;
  static constexpr int kDotSums = 8;
  static constexpr int kPairs = 1;
  static constexpr int kPairsFewRows = 2;
  static constexpr bool kDirect = false;

  static inline F zero() { return F{0, 0, 0, 0}; }
  static inline F set(float x) { return F{x, x, x, x}; }
  static inline F load(const float *p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static inline void store(float *p, F x) { std::memcpy(p, &x, sizeof x); }
  static inline F add(F a, F b) { return a + b; }
  static inline F sub(F a, F b) { return a - b; }
  static inline F mul(F a, F b) { return a * b; }
  static inline F div(F a, F b) { return a / b; }
  static inline F fma(F a, F b, F c) { return a * b + c; }
  static inline F max(F a, F b) { return a > b ? a : b; }
  static inline F round(F x) {
    // Adding 1.5 * 2^23 leaves no bits for the fraction; |x| < 2^22 here.
    return (x + 12582912.0f) - 12582912.0f;
  }
  static inline F abs(F x) { return (F)((I)x & 0x7fffffff); }
  static inline F with_sign_of(F size, F x) {
    return (F)(((I)size & 0x7fffffff) | ((I)x & static_cast<int32_t>(0x80000000u)));
  }
  static inline F zero_below(F x, F limit, F y) { return x < limit ? zero() : y; }
  static inline F choose_below(F x, F limit, F below, F otherwise) {
    return x < limit ? below : otherwise;
  }
  static inline F times_power_of_two(F p, F n) {
    F found;
    for (int i = 0; i < kWidth; ++i) {
      // A comparison that NaN fails: converting NaN to an integer is undefined.
      const int32_t exponent = n[i] >= -126.0f ? static_cast<int32_t>(n[i]) : 0;
      found[i] = p[i] * from_bits(static_cast<uint32_t>(exponent + 127) << 23);
    }
    return found;
  }
  static inline float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static inline float highest(F x) {
    const float a = x[0] > x[1] ? x[0] : x[1];
    const float b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
  }
  static inline F sums(const F *x) { return F{sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3])}; }

  template <class T>
  static inline void load2(const T *p, F &a, F &b) {
    a = F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
    b = F{widen(p[4]), widen(p[5]), widen(p[6]), widen(p[7])};
  }
  template <class T>
  static inline void load2(const T *p, int count, F &a, F &b) {
    T line[2 * kWidth] = {};
    std::memcpy(line, p, sizeof(T) * static_cast<size_t>(count));
    load2(line, a, b);
  }
  template <class T>
  static inline void store2(float *p, F a, F b) {
    store(p, a);
    store(p + kWidth, b);
  }

  static inline void unpack(const uint8_t *mixed, const uint8_t *pairs, const uint8_t *base,
                            int64_t half, int64_t count, uint16_t *out) {
    for (int64_t token = 0; token < count; ++token)
      unpack_token(mixed + token * 2 * half, pairs + token * half, base, half,
                   out + token * 2 * half);
  }

  static inline void unpack_token(const uint8_t *mixed, const uint8_t *pairs, const uint8_t *base,
                                  int64_t half, uint16_t *out) {
    unpack_channels(mixed, pairs, base, half, 0, half, out);
  }
};

bool runs() { return true; }

const Level level{
    "portable",
    runs,
    {run_tile<Portable, float>, run_tile<Portable, BFloat16>, run_tile<Portable, Float16>},
    run_packed_tile<Portable>,
    unpack<Portable>};

}  // namespace

const Level *level_portable() { return &level; }

}  // namespace headinfer
