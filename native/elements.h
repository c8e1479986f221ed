// SPDX-License-Identifier: Apache-2.0
// The element types of keys and values, and their exact conversion to float32 without special
// instructions.
#ifndef HEADINFER_ELEMENTS_H
#define HEADINFER_ELEMENTS_H

#include <cstdint>
#include <cstring>

namespace headinfer {
namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

[[maybe_unused]] inline float widen(float x) { return x; }

[[maybe_unused]] inline float widen(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }

[[maybe_unused]] inline float widen(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t size = x.bits & 0x7fffu;
  if (size >= 0x7c00u) return from_bits(sign | 0x7f800000u | (size & 0x3ffu) << 13);
  if (size >= 0x0400u) return from_bits(sign | ((size << 13) + (112u << 23)));
  // Subnormal: `size` times 2^-24, both exact.
  const float value = static_cast<float>(size) * 5.9604644775390625e-8f;
  return sign != 0 ? -value : value;
}

}  // namespace
}  // namespace headinfer

#endif
