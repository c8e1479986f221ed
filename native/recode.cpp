// SPDX-License-Identifier: Apache-2.0
// Packed blocks from plain keys or values and back, a block per item of the pool.
#include <algorithm>

#include "blocks.h"
#include "pool.h"
#include "tile.h"

namespace headinfer {
namespace {

uint32_t exponent_of(uint16_t bits) { return bits >> 7 & 0xffu; }

template <class T>
void write(uint8_t *to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// Sum of (2 i + 1) w_i over `count` words from `from` on, the first of which has number `i`.
uint32_t sum_words(const uint8_t *from, int64_t count, int64_t i) {
  uint32_t sum = 0;
  for (int64_t word = 0; word < count; ++word)
    sum += static_cast<uint32_t>(2 * (i + word) + 1) * read<uint32_t>(from + 4 * word);
  return sum;
}

uint32_t checksum(const uint8_t *slot, const uint8_t *entry, const BlockLayout &at) {
  const uint8_t *head = slot + at.header();
  const int64_t body = at.header() / 4, rest = at.entry_bytes() / 4;
  const int64_t escapes = read<uint16_t>(head + 2);
  uint32_t sum = sum_words(slot, body, 0);
  if (entry != nullptr) sum += sum_words(entry, rest, body);
  for (int64_t i = 0; entry == nullptr && i < escapes; ++i) {
    const uint32_t word = read<uint16_t>(slot + at.positions() + 2 * i) |
                          static_cast<uint32_t>(slot[at.exponents() + i]) << 16;
    sum += static_cast<uint32_t>(2 * (body + i) + 1) * word;
  }
  return sum + static_cast<uint32_t>(2 * (body + rest) + 1) * read<uint32_t>(head);
}

class Recoding {
 public:
  Recoding(headinfer_recode_args &args, const headinfer_packed &packed, const Level &level)
      : args_(args), packed_(packed), level_(level), at_{args.dim} {}

  int64_t items() const { return args_.batch * args_.heads * args_.blocks; }
  size_t scratch_bytes() const { return static_cast<size_t>(2 * kBlockTokens * args_.dim); }

  static void run(void *context, int64_t item, void *scratch) {
    Recoding &self = *static_cast<Recoding *>(context);
    if (self.args_.encode != 0) self.encode(item, static_cast<uint16_t *>(scratch));
    else self.decode(item, static_cast<uint16_t *>(scratch));
  }

  int32_t finish() {
    args_.used = std::min(used_, args_.free_count);
    if (used_ > args_.free_count) return HEADINFER_NO_ENTRIES;
    if (damaged_ == 0) return HEADINFER_OK;
    const int64_t block = damaged_ - 1;
    args_.damaged[0] = 0;
    args_.damaged[1] = block / args_.blocks / args_.heads;
    args_.damaged[2] = block / args_.blocks % args_.heads;
    args_.damaged[3] = block % args_.blocks;
    return HEADINFER_CORRUPT;
  }

 private:
  uint8_t *slot(int64_t item) const {
    const int64_t block = item % args_.blocks, head = item / args_.blocks % args_.heads;
    return packed_.slots + packed_.rows[item / args_.blocks / args_.heads] +
           head * packed_.head_stride + block * at_.slot_bytes();
  }

  uint16_t *token(int64_t item, int64_t index) const {
    const int64_t block = item % args_.blocks, head = item / args_.blocks % args_.heads;
    const int64_t row = item / args_.blocks / args_.heads;
    return args_.values + row * args_.value_stride[0] + head * args_.value_stride[1] +
           (block * kBlockTokens + index) * args_.value_stride[2];
  }

  void encode(int64_t item, uint16_t *values) {
    const int64_t dim = args_.dim, half = dim / 2;
    uint8_t *to = slot(item), *base = to + at_.bases();
    std::memset(base, 0, static_cast<size_t>(at_.slot_bytes() - at_.bases()));
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      std::memcpy(values + t * dim, token(item, t), sizeof(uint16_t) * static_cast<size_t>(dim));
      for (int64_t d = 0; d < dim; ++d) {
        const uint8_t exponent = static_cast<uint8_t>(exponent_of(values[t * dim + d]));
        base[d] = exponent > base[d] ? exponent : base[d];
      }
    }
    int64_t escapes = 0;
    uint8_t nibble[kMaxPackedDim];
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      const uint16_t *line = values + t * dim;
      uint8_t *mixed = to + t * dim, *pairs = to + at_.nibbles() + t * half;
      int far = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const uint32_t below = base[d] - exponent_of(line[d]);
        mixed[d] = static_cast<uint8_t>((line[d] >> 8 & 0x80) | (line[d] & 0x7f));
        nibble[d] = static_cast<uint8_t>(below < 15 ? below : 15);
        far |= below > 14;
      }
      for (int64_t j = 0; j < half; ++j)
        pairs[j] = static_cast<uint8_t>(nibble[j] | nibble[j + half] << 4);
      for (int64_t d = 0; far != 0 && d < dim; ++d) {
        if (nibble[d] != 15) continue;
        if (escapes < at_.most_escapes()) {
          write(to + at_.positions() + 2 * escapes, static_cast<uint16_t>(t * dim + d));
          to[at_.exponents() + escapes] = static_cast<uint8_t>(exponent_of(line[d]));
        }
        ++escapes;
      }
    }
    uint8_t *head = to + at_.header();
    uint8_t *entry = nullptr;
    head[0] = 1;
    if (escapes > at_.most_escapes()) {
      const int64_t place = __atomic_fetch_add(&used_, 1, __ATOMIC_RELAXED);
      if (place >= args_.free_count) return;
      const int64_t index = args_.free[place];
      entry = const_cast<uint8_t *>(packed_.chunks[index / packed_.chunk_entries]) +
              index % packed_.chunk_entries * at_.entry_bytes();
      const uint8_t *made = reinterpret_cast<const uint8_t *>(values);
      std::memcpy(to, made, static_cast<size_t>(at_.header()));
      std::memcpy(entry, made + at_.header(), static_cast<size_t>(at_.entry_bytes()));
      std::memset(head + 8, 0, static_cast<size_t>(at_.trailer() - 8));
      head[1] = 1;
      write(to + at_.positions(), static_cast<uint32_t>(index));
    } else {
      write(head + 2, static_cast<uint16_t>(escapes));
    }
    write(head + 4, checksum(to, entry, at_));
  }

  void decode(int64_t item, uint16_t *values) {
    const uint8_t *from = slot(item);
    bool good = level_.unpack(from, packed_, args_.dim, 0, kBlockTokens, values);
    if (good && args_.verify != 0) {
      const bool raw = from[at_.header() + 1] == 1;
      good = read<uint32_t>(from + at_.header() + 4) ==
             checksum(from, raw ? entry_of(from, at_, packed_) : nullptr, at_);
    }
    if (!good) {
      __atomic_store_n(&damaged_, 1 + item, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t t = 0; t < kBlockTokens; ++t)
      std::memcpy(token(item, t), values + t * args_.dim,
                  sizeof(uint16_t) * static_cast<size_t>(args_.dim));
  }

  headinfer_recode_args &args_;
  const headinfer_packed &packed_;
  const Level &level_;
  const BlockLayout at_;
  int64_t used_ = 0, damaged_ = 0;
};

int32_t check(const headinfer_recode_args *args, const headinfer_packed *packed) {
  if (args == nullptr || packed == nullptr) return HEADINFER_NULL_POINTER;
  const headinfer_recode_args &a = *args;
  if (a.threads < 1 || a.threads > HEADINFER_MAX_THREADS) return HEADINFER_BAD_THREADS;
  if (a.batch < 0 || a.heads < 0 || a.blocks < 0 || a.dim < 16 || a.dim > kMaxPackedDim ||
      a.dim % 16 != 0 || a.free_count < 0 || packed->entries < 0 || packed->chunk_entries < 1)
    return HEADINFER_BAD_SHAPE;
  if (level_at(a.level) == nullptr) return HEADINFER_BAD_LEVEL;
  const bool empty = a.batch * a.heads * a.blocks == 0;
  const bool missing = a.values == nullptr || packed->slots == nullptr || packed->rows == nullptr ||
                       (packed->entries > 0 && packed->chunks == nullptr) ||
                       (a.free_count > 0 && a.free == nullptr);
  if (!empty && missing) return HEADINFER_NULL_POINTER;
  for (int64_t i = 0; a.encode != 0 && i < a.free_count; ++i)
    if (a.free[i] < 0 || a.free[i] >= packed->entries) return HEADINFER_BAD_SHAPE;
  return HEADINFER_OK;
}

}  // namespace
}  // namespace headinfer

int32_t headinfer_recode(headinfer_recode_args *args, const headinfer_packed *packed) {
  using namespace headinfer;
  const int32_t problem = check(args, packed);
  if (problem != HEADINFER_OK) return problem;
  args->used = 0;
  Recoding recoding(*args, *packed, *level_at(args->level));
  try {
    const Job job{Recoding::run, &recoding, recoding.items(), recoding.scratch_bytes(), 0};
    if (!run_job(job, args->threads)) return HEADINFER_NO_MEMORY;
  } catch (...) {
    return HEADINFER_SYSTEM_ERROR;
  }
  return recoding.finish();
}
