// SPDX-License-Identifier: Apache-2.0
// Packed blocks as docs/lossless.md has them: where their parts lie, and reading some tokens of one.
//
// In an unnamed namespace, like kernel.h: compiled once per level with that level's flags.
#ifndef HEADINFER_BLOCKS_H
#define HEADINFER_BLOCKS_H

#include <cstdint>
#include <cstring>

#include "headinfer_native.h"

namespace headinfer {
namespace {

constexpr int64_t kBlockTokens = 128;
constexpr int64_t kMaxPackedDim = 512;

struct BlockLayout {
  int64_t dim;

  int64_t nibbles() const { return kBlockTokens * dim; }
  int64_t bases() const { return kBlockTokens * dim * 3 / 2; }
  int64_t header() const { return bases() + dim; }
  int64_t positions() const { return header() + 8; }
  int64_t exponents() const { return positions() + 2 * most_escapes(); }
  int64_t most_escapes() const { return (trailer() - 8) / 3; }
  int64_t slot_bytes() const { return header() + trailer(); }
  int64_t entry_bytes() const { return 2 * kBlockTokens * dim - header(); }
  int64_t trailer() const {
    const int64_t fitting = dim * 3 / 4 / 16 * 16;
    return fitting < 48 ? 48 : fitting;
  }
};

template <class T>
inline T read(const uint8_t *from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline uint16_t join(uint32_t mixed, uint32_t exponent) {
  return static_cast<uint16_t>((mixed & 0x80u) << 8 | (exponent & 0xffu) << 7 | (mixed & 0x7fu));
}

// The overflow entry of a raw block; null if there is none of that number.
inline const uint8_t *entry_of(const uint8_t *slot, const BlockLayout &at,
                               const headinfer_packed &where) {
  const int64_t index = read<uint32_t>(slot + at.positions());
  if (index >= where.entries) return nullptr;
  return where.chunks[index / where.chunk_entries] +
         index % where.chunk_entries * at.entry_bytes();
}

// Channels `from` .. `to` of the lower half, and those of the upper half that share their bytes.
[[maybe_unused]] inline void unpack_channels(const uint8_t *mixed, const uint8_t *pairs,
                                             const uint8_t *base, int64_t half, int64_t from,
                                             int64_t to, uint16_t *out) {
  for (int64_t j = from; j < to; ++j) {
    out[j] = join(mixed[j], static_cast<uint32_t>(base[j] - (pairs[j] & 15)));
    out[j + half] = join(mixed[j + half], static_cast<uint32_t>(base[j + half] - (pairs[j] >> 4)));
  }
}

// A base exponent where the exponent of a bfloat16 is, with ones below: a nibble in bits 7 to 10 is
// subtracted whatever lies under it.
[[maybe_unused]] inline uint16_t widened_base(uint8_t base) {
  return static_cast<uint16_t>(base << 7 | 0x7f);
}

// Sets in `apart` the bits of those of tokens `first` .. `first + count`, at most 64, that have escapes, and
// decodes them into their rows of `out`. False if the block is raw or damaged: nothing is decoded then.
template <class S>
bool set_apart(const uint8_t *slot, const BlockLayout &at, int64_t first, int64_t count,
               uint16_t *out, uint64_t &apart) {
  const uint8_t *head = slot + at.header();
  const int64_t escapes = read<uint16_t>(head + 2);
  if (head[0] != 1 || head[1] != 0 || escapes > at.most_escapes()) return false;
  const int64_t dim = at.dim, half = dim / 2;
  uint64_t found = 0;
  for (int64_t i = 0; i < escapes; ++i) {
    const int64_t position = read<uint16_t>(slot + at.positions() + 2 * i);
    if (position >= kBlockTokens * dim) return false;
    const int64_t token = position / dim - first;
    if (token < 0 || token >= count) continue;
    if ((found >> token & 1) == 0)
      S::unpack(slot + (first + token) * dim, slot + at.nibbles() + (first + token) * half,
                slot + at.bases(), half, 1, out + token * dim);
    found |= uint64_t{1} << token;
    out[position - first * dim] = join(slot[position], slot[at.exponents() + i]);
  }
  apart = found;
  return true;
}

// S::unpack(mixed, pairs, base, half, count, out) decodes tokens of 2 x half channels, escapes aside.
template <class S>
bool unpack(const uint8_t *slot, const headinfer_packed &where, int64_t dim, int64_t first,
            int64_t count, uint16_t *out) {
  const BlockLayout at{dim};
  const uint8_t *head = slot + at.header();
  const int64_t escapes = read<uint16_t>(head + 2);
  if (head[0] != 1 || head[1] > 1) return false;
  if (head[1] == 1) {
    const uint8_t *entry = entry_of(slot, at, where);
    if (entry == nullptr || escapes != 0) return false;
    const int64_t from = 2 * first * dim, to = 2 * (first + count) * dim;
    const int64_t here = to < at.header() ? to : at.header();
    char *place = reinterpret_cast<char *>(out);
    if (from < here) std::memcpy(place, slot + from, static_cast<size_t>(here - from));
    const int64_t there = from > at.header() ? from : at.header();
    if (there < to)
      std::memcpy(place + (there - from), entry + (there - at.header()),
                  static_cast<size_t>(to - there));
    return true;
  }
  if (escapes > at.most_escapes()) return false;
  const int64_t half = dim / 2;
  const uint8_t *mixed = slot + first * dim, *pairs = slot + at.nibbles() + first * half;
  S::unpack(mixed, pairs, slot + at.bases(), half, count, out);
  for (int64_t i = 0; i < escapes; ++i) {
    const int64_t position = read<uint16_t>(slot + at.positions() + 2 * i);
    if (position >= kBlockTokens * dim) return false;
    const int64_t place = position - first * dim;
    if (place < 0 || place >= count * dim) continue;
    out[place] = join(slot[position], slot[at.exponents() + i]);
  }
  return true;
}

}  // namespace
}  // namespace headinfer

#endif
