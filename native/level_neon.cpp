// SPDX-License-Identifier: Apache-2.0
// Vectors of four floats with the instructions every 64-bit ARM processor has.
#include "tile.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "elements.h"
#include "kernel.h"

namespace headinfer {
namespace {

struct Neon {
  using F = float32x4_t;
  static constexpr int kWidth = 4;
  static constexpr int kDotRows = 4;
  static constexpr int kDotSums = 16;
  static constexpr int kPairs = 2;
  static constexpr int kPairsFewRows = 4;
  static constexpr bool kDirect = false;

  static inline F zero() { return vdupq_n_f32(0.0f); }
  static inline F set(float x) { return vdupq_n_f32(x); }
  static inline F load(const float *p) { return vld1q_f32(p); }
  static inline void store(float *p, F x) { vst1q_f32(p, x); }
  static inline F add(F a, F b) { return vaddq_f32(a, b); }
  static inline F sub(F a, F b) { return vsubq_f32(a, b); }
  static inline F mul(F a, F b) { return vmulq_f32(a, b); }
  static inline F div(F a, F b) { return vdivq_f32(a, b); }
  static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static inline F max(F a, F b) { return vmaxq_f32(a, b); }
  static inline F round(F x) { return vrndnq_f32(x); }
  static inline F abs(F x) { return vabsq_f32(x); }
  static inline F with_sign_of(F size, F x) {
    return vbslq_f32(vdupq_n_u32(0x80000000u), x, size);
  }
  static inline F zero_below(F x, F limit, F y) {
    return vreinterpretq_f32_u32(
        vbicq_u32(vreinterpretq_u32_f32(y), vcltq_f32(x, limit)));
  }
  static inline F choose_below(F x, F limit, F below, F otherwise) {
    return vbslq_f32(vcltq_f32(x, limit), below, otherwise);
  }
  static inline F times_power_of_two(F p, F n) {
    const int32x4_t exponent = vshlq_n_s32(vcvtnq_s32_f32(n), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), exponent));
  }
  static inline float sum(F x) { return vaddvq_f32(x); }
  static inline float highest(F x) { return vmaxvq_f32(x); }
  static inline F sums(const F *x) {
    return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
  }

  static inline void load2(const float *p, F &a, F &b) {
    a = vld1q_f32(p);
    b = vld1q_f32(p + 4);
  }

  // bfloat16 is the upper half of a float32: elements of even index, then those of odd.
  static inline void load2(const BFloat16 *p, F &a, F &b) {
    const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
    a = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
    b = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u)));
  }

  static inline void load2(const Float16 *p, F &a, F &b) {
    const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
    a = vcvt_f32_f16(vget_low_f16(x));
    b = vcvt_high_f32_f16(x);
  }

  template <class T>
  static inline void load2(const T *p, int count, F &a, F &b) {
    T line[2 * kWidth] = {};
    std::memcpy(line, p, sizeof(T) * static_cast<size_t>(count));
    load2(line, a, b);
  }

  template <class T>
  static inline void store2(float *p, F a, F b) {
    if constexpr (is_bfloat16(static_cast<const T *>(nullptr))) {
      store(p, vzip1q_f32(a, b));
      store(p + 4, vzip2q_f32(a, b));
    } else {
      store(p, a);
      store(p + 4, b);
    }
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
    int64_t j = 0;
    for (; j + 16 <= half; j += 16) {
      const uint8x16_t both = vld1q_u8(pairs + j);
      unpack16(mixed + j, vandq_u8(both, vdupq_n_u8(15)), base + j, out + j);
      unpack16(mixed + half + j, vshrq_n_u8(both, 4), base + half + j, out + half + j);
    }
    unpack_channels(mixed, pairs, base, half, j, half, out);
  }

  static inline void unpack16(const uint8_t *mixed, uint8x16_t below, const uint8_t *base,
                              uint16_t *out) {
    const uint8x16_t m = vld1q_u8(mixed), e = vsubq_u8(vld1q_u8(base), below);
    const uint8x16_t sign = vdupq_n_u8(0x80);
    const uint8x16_t high = vbslq_u8(sign, m, vshrq_n_u8(e, 1));
    const uint8x16_t down = vbslq_u8(sign, vshlq_n_u8(e, 7), m);
    vst1q_u16(out, vreinterpretq_u16_u8(vzip1q_u8(down, high)));
    vst1q_u16(out + 8, vreinterpretq_u16_u8(vzip2q_u8(down, high)));
  }

  static constexpr bool is_bfloat16(const BFloat16 *) { return true; }
  static constexpr bool is_bfloat16(const void *) { return false; }
};

bool runs() { return true; }

const Level level{"neon",
                  runs,
                  {run_tile<Neon, float>, run_tile<Neon, BFloat16>, run_tile<Neon, Float16>},
                  run_packed_tile<Neon>,
                  unpack<Neon>};

}  // namespace

const Level *level_neon() { return &level; }

}  // namespace headinfer

#else
namespace headinfer {
const Level *level_neon() { return nullptr; }
}  // namespace headinfer
#endif
