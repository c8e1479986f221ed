// SPDX-License-Identifier: Apache-2.0
// Attention of one tile, written once over a vector type `S` that each level brings.
//
// Per block of keys: scores of all rows, their running softmax, then the weighted sum of values.
// K and V are used as they lie; rows are blocked in registers so that each loaded vector serves
// several of them. A row's bits depend neither on the other rows nor on how rows are blocked.
//
// Everything here is in an unnamed namespace: compiled once per level with that level's flags, no
// copy may be shared between levels by the linker.
#ifndef HEADINFER_KERNEL_H
#define HEADINFER_KERNEL_H

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "blocks.h"
#include "elements.h"
#include "tile.h"
#include "vector_math.h"

#define HEADINFER_UNROLL _Pragma("GCC unroll 16")

namespace headinfer {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// What has to be in the caches soon: `next` on, `lines` cache lines per row, rows `stride` apart.
struct Ahead {
  const char *next;
  int64_t stride;
  int64_t rows;
  int lines;

  inline void fetch(int64_t count) {
    for (; count > 0 && rows > 0; --count, --rows, next += stride)
      for (int line = 0; line < lines; ++line) __builtin_prefetch(next + line * 64, 0, 3);
  }
};

// Fetches evenly while `passes` loops pass over as many keys each: a core can wait for few lines at a
// time, so a burst of them stops it, and afterwards memory has nothing to do.
template <class A>
struct Spread {
  A ahead;
  int64_t passes, due = 0;

  inline void fetch(int64_t keys) {
    for (due += keys; due >= passes; due -= passes) ahead.fetch(1);
  }
};

// Where the rows of some keys or values are.
template <class T>
struct Rows {
  const T *first;
  int64_t stride;
};

// Packed keys or values of one block that are decoded in registers, from its token `first` on. Rows
// whose bit is set in `apart` are not: they lie decoded in `rows`.
struct Unread {
  Rows<BFloat16> rows;
  const uint8_t *mixed, *pairs;
  const uint16_t *base;
  uint64_t apart;
};

// Keys or values that lie plain.
template <class T>
class PlainRows {
 public:
  PlainRows(const T *first, int64_t stride, int64_t dim, int64_t)
      : first_(first), stride_(stride), dim_(dim) {}

  static constexpr int64_t kScoredKeys = kBlockKeys;
  static int64_t scratch_bytes(int64_t) { return 0; }
  void lend(char *) {}
  Rows<T> get(int64_t key, int64_t) const { return {first_ + key * stride_, stride_}; }
  Ahead ahead(int64_t key, int64_t keys) const {
    constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
    return {reinterpret_cast<const char *>(first_ + key * stride_), stride_ * kSize, keys,
            static_cast<int>((dim_ * kSize + 63) / 64)};
  }

 private:
  const T *first_;
  int64_t stride_, dim_;
};

// Both parts of packed keys or values.
struct AheadPacked {
  Ahead mixed, pairs;

  inline void fetch(int64_t count) {
    mixed.fetch(count);
    pairs.fetch(count);
  }
};

// Keys or values in packed blocks, and plain ones after them. `get` decodes a block of keys at a time;
// `unread` leaves that to whoever reads them.
template <class S>
class PackedRows {
 public:
  // `first` is the row's key 0 as if all lay plain; blocks are those of `where` for row and head.
  PackedRows(const BFloat16 *tail, int64_t stride, int64_t dim, int64_t first_key)
      : tail_(tail), stride_(stride), first_key_(first_key), at_{dim} {}

  void place(const headinfer_packed &where, const Tile &tile, bool values) {
    const headinfer_attend_args &call = *tile.call;
    where_ = &where;
    slots_ = where.slots + where.rows[tile.batch] + tile.kv_head * where.head_stride;
    tokens_ = tile.packed->tokens;
    damaged_ = tile.packed->damaged;
    const int64_t blocks = tokens_ / kBlockTokens;
    number_ = 1 + (((values ? call.batch : 0) + tile.batch) * call.kv_heads + tile.kv_head) * blocks;
  }

  // Keys that are decoded before they are scored: few, so that they stay near.
  static constexpr int64_t kScoredKeys = 32;
  static int64_t scratch_bytes(int64_t dim) {
    return round_up((kBlockKeys + 1) * dim * static_cast<int64_t>(sizeof(BFloat16)), 64);
  }
  void lend(char *scratch) {
    scratch_ = reinterpret_cast<BFloat16 *>(scratch);
    base_ = &scratch_[kBlockKeys * at_.dim].bits;
  }

  // Whether `unread` can be asked from `key` on: both halves of the channels are whole vectors.
  bool direct(int64_t key) const { return at_.dim % 64 == 0 && first_key_ + key < tokens_; }

  Unread unread(int64_t key, int64_t keys) const {
    key += first_key_;
    const int64_t block = key / kBlockTokens, token = key % kBlockTokens;
    const uint8_t *slot = slots_ + block * at_.slot_bytes();
    const uint8_t *mixed = slot + token * at_.dim;
    const uint8_t *pairs = slot + at_.nibbles() + token * at_.dim / 2;
    Unread found{{scratch_, at_.dim}, mixed, pairs, base_, ~uint64_t{0}};
    if (!headinfer::set_apart<S>(slot, at_, token, keys, &scratch_->bits, found.apart)) {
      get(key - first_key_, keys);  // raw or damaged
      return found;
    }
    for (int64_t d = 0; d < at_.dim; ++d) base_[d] = widened_base(slot[at_.bases() + d]);
    return found;
  }

  Rows<BFloat16> get(int64_t key, int64_t keys) const {
    key += first_key_;
    if (key >= tokens_) return {tail_ + (key - tokens_) * stride_, stride_};
    const int64_t block = key / kBlockTokens;
    if (!headinfer::unpack<S>(slots_ + block * at_.slot_bytes(), *where_, at_.dim,
                              key % kBlockTokens, keys, &scratch_->bits)) {
      std::memset(scratch_, 0, static_cast<size_t>(keys * at_.dim) * sizeof(BFloat16));
      __atomic_store_n(damaged_, number_ + block, __ATOMIC_RELAXED);
    }
    return {scratch_, at_.dim};
  }

  AheadPacked ahead(int64_t key, int64_t keys) const {
    key += first_key_;
    if (key >= tokens_) keys = 0;
    const uint8_t *slot = slots_ + key / kBlockTokens * at_.slot_bytes();
    const int64_t token = key % kBlockTokens, half = at_.dim / 2;
    const char *mixed = reinterpret_cast<const char *>(slot + token * at_.dim);
    const char *pairs = reinterpret_cast<const char *>(slot + at_.nibbles() + token * half);
    if (keys > 0 && token == 0)  // bases, header and escapes
      for (int64_t byte = at_.bases(); byte < at_.slot_bytes(); byte += 64)
        __builtin_prefetch(slot + byte, 0, 3);
    return {{mixed, at_.dim, keys, static_cast<int>((at_.dim + 63) / 64)},
            {pairs, half, keys, static_cast<int>((half + 63) / 64)}};
  }

 private:
  const headinfer_packed *where_ = nullptr;
  const uint8_t *slots_ = nullptr;
  const BFloat16 *tail_;
  int64_t stride_, first_key_;
  BlockLayout at_;
  BFloat16 *scratch_ = nullptr;
  uint16_t *base_ = nullptr;
  int64_t tokens_ = 0, number_ = 0;
  int64_t *damaged_ = nullptr;
};

// Scores of keys in float32: two vectors of elements at a time, multiplied and added.
template <class S, class T>
struct FloatDots {
  using F = typename S::F;
  using Packed = float;
  static constexpr int kStep = 2 * S::kWidth;
  struct Part {
    F a, b;
  };

  static inline Part query(const Packed *p) { return {S::load(p), S::load(p + S::kWidth)}; }
  static inline Part keys(const T *p) {
    Part part;
    S::load2(p, part.a, part.b);
    return part;
  }
  static inline Part keys(const T *p, int count) {
    Part part;
    S::load2(p, count, part.a, part.b);
    return part;
  }
  template <class V>
  static inline Part of(V elements) {
    Part part;
    S::split(elements, part.a, part.b);
    return part;
  }
  static inline F add(F sum, const Part &q, const Part &k) {
    return S::fma(q.b, k.b, S::fma(q.a, k.a, sum));
  }
  static inline void pack(const T *from, int count, Packed *to) {
    const Part part = keys(from, count);
    S::store(to, part.a);
    S::store(to + S::kWidth, part.b);
  }
};

template <class S, class T, class Dots, class Source>
class TileRun {
  using F = typename S::F;
  using Packed = typename Dots::Packed;
  static constexpr int W = S::kWidth;
  static constexpr int64_t P = kBlockKeys;
  static constexpr bool kPacked = !std::is_same<Source, PlainRows<T>>::value;
  static constexpr bool kDirect = kPacked && S::kDirect;
  static constexpr int64_t kFew = 4;  // keys between two questions that need none of the sums

 public:
  TileRun(const Tile &tile, void *scratch)
      : tile_(tile),
        call_(*tile.call),
        k_(at(call_.k, call_.k_stride, tile), call_.k_stride[2], call_.key_dim, tile.first_key),
        v_(at(call_.v, call_.v_stride, tile), call_.v_stride[2], call_.value_dim, tile.first_key),
        q_width_(round_up(call_.key_dim, Dots::kStep)),
        o_width_(round_up(call_.value_dim, 2 * W)) {
    char *free = static_cast<char *>(scratch);
    sums_ = carve<float>(free, tile.rows * o_width_);
    p_ = carve<float>(free, tile.rows * P);
    rescale_ = carve<float>(free, tile.rows);
    q_ = carve<Packed>(free, tile.rows * q_width_);
    k_.lend(carve<char>(free, Source::scratch_bytes(call_.key_dim)));
    v_.lend(carve<char>(free, Source::scratch_bytes(call_.value_dim)));
    if constexpr (kPacked) {
      k_.place(*tile.packed->k, tile, false);
      v_.place(*tile.packed->v, tile, true);
    }
  }

  void run() {
    pack_queries();
    std::memset(sums_, 0, sizeof(float) * static_cast<size_t>(tile_.rows * o_width_));
    for (int64_t row = 0; row < tile_.rows; ++row) {
      tile_.weight[row] = 0.0f;
      tile_.peak[row] = -kInfinity;
    }
    for (int64_t key = 0; key < tile_.keys; key += P) {
      const int64_t left = tile_.keys - key;
      const int64_t keys = left < P ? left : P;
      score(key, keys);
      for (int64_t row = 0; row < tile_.rows; ++row) soften(row, key, keys);
      weigh(key, keys, left - keys);
    }
    unpack_sums();
  }

 private:
  template <class U>
  static U *carve(char *&free, int64_t count) {
    U *here = reinterpret_cast<U *>(free);
    free += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return here;
  }

  // Key `first_key` of the tile's row and head; of packed ones, the first that lies plain.
  static const T *at(const void *kv, const int64_t *stride, const Tile &tile) {
    if (kv == nullptr) return nullptr;
    return static_cast<const T *>(kv) + tile.batch * stride[0] + tile.kv_head * stride[1] +
           (kPacked ? 0 : tile.first_key * stride[2]);
  }

  void pack_queries() {
    alignas(64) T line[Dots::kStep];
    for (int64_t row = 0; row < tile_.rows; ++row) {
      const T *from = query(row);
      for (int64_t d = 0; d < q_width_; d += Dots::kStep) {
        const int64_t left = call_.key_dim - d;
        const int count = static_cast<int>(left < Dots::kStep ? left : Dots::kStep);
        for (int i = 0; i < count; ++i) line[i] = from[(d + i) * call_.q_stride[3]];
        Dots::pack(line, count, q_ + row * q_width_ + d);
      }
    }
  }

  int64_t head(int64_t row) const {
    return tile_.kv_head * call_.q_per_kv + (tile_.first_row + row) / call_.rows;
  }
  int64_t token(int64_t row) const { return (tile_.first_row + row) % call_.rows; }
  const T *query(int64_t row) const {
    return static_cast<const T *>(call_.q) + tile_.batch * call_.q_stride[0] +
           head(row) * call_.q_stride[1] + token(row) * call_.q_stride[2];
  }

  // Scaled scores of `keys` keys from `key` on into p_; values of the same keys are fetched ahead.
  void score(int64_t key, int64_t keys) {
    Spread<decltype(v_.ahead(0, 0))> ahead{v_.ahead(key, keys), row_groups(S::kDotRows)};
    if constexpr (kDirect) {
      if (tile_.rows <= S::kDotRows && k_.direct(key)) return score_unread(key, keys, ahead);
    }
    constexpr int64_t kStep = Source::kScoredKeys;
    for (int64_t first = 0; first < keys; first += kStep) {
      const int64_t some = keys - first < kStep ? keys - first : kStep;
      score_some(k_.get(key + first, some), first, some, ahead);
    }
  }

  template <class Fetch>
  void score_some(const Rows<T> &k, int64_t first, int64_t keys, Fetch &ahead) {
    int64_t row = 0;
    if constexpr (S::kDotRows >= 4)
      for (; row + 4 <= tile_.rows; row += 4) dots<4>(row, k, first, keys, ahead);
    if constexpr (S::kDotRows >= 3)
      if (row + 3 <= tile_.rows) dots<3>(row, k, first, keys, ahead), row += 3;
    for (; row + 2 <= tile_.rows; row += 2) dots<2>(row, k, first, keys, ahead);
    if (row < tile_.rows) dots<1>(row, k, first, keys, ahead);
  }

  int64_t row_groups(int64_t of) const { return (tile_.rows + of - 1) / of; }

  // Keys for as many rows as one pass serves are decoded in registers.
  template <class Fetch>
  void score_unread(int64_t key, int64_t keys, Fetch &ahead) {
    const Unread k = k_.unread(key, keys);
    switch (tile_.rows) {
      case 1: return dots_unread<1>(k, keys, ahead);
      case 2: return dots_unread<2>(k, keys, ahead);
      case 3: return dots_unread<3>(k, keys, ahead);
      default: return dots_unread<4>(k, keys, ahead);
    }
  }

  template <int R, class Fetch>
  void dots_unread(const Unread &k, int64_t keys, Fetch &ahead) {
    if (call_.key_dim == 128) dots_halves<R, 64>(k, keys, ahead);
    else dots_halves<R, 0>(k, keys, ahead);
  }

  // All R rows of the tile; kHalf is half the dim where that is known, else 0. The order of the
  // additions is that of dots().
  template <int R, int kHalf, class Fetch>
  void dots_halves(const Unread &k, int64_t keys, Fetch &ahead) {
    constexpr int K = S::kDotSums / (R == 3 ? 4 : R);
    constexpr int kSums = (R * K + W - 1) / W * W;
    const F scale = S::set(call_.scale);
    const int64_t half = kHalf != 0 ? kHalf : call_.key_dim / 2, width = 2 * half;
    const Packed *q = q_;
    for (int64_t key = 0; key < keys; key += K) {
      ahead.fetch(K);
      F sum[kSums];
      HEADINFER_UNROLL for (int i = 0; i < kSums; ++i) sum[i] = S::zero();
      HEADINFER_UNROLL for (int i = 0; i < K; ++i) {
        const int64_t mine = key + i < keys ? key + i : keys - 1;
        const auto add = [&](const typename Dots::Part &part, int64_t d) {
          HEADINFER_UNROLL for (int r = 0; r < R; ++r)
            sum[r * K + i] = Dots::add(sum[r * K + i], Dots::query(q + r * width + d), part);
        };
        if ((k.apart >> mine & 1) != 0) {
          const T *from = k.rows.first + mine * width;
          for (int64_t d = 0; d < width; d += Dots::kStep) add(Dots::keys(from + d), d);
          continue;
        }
        const uint8_t *mixed = k.mixed + mine * width, *pairs = k.pairs + mine * half;
        for (int64_t d = 0; d < half; d += 32)
          add(Dots::of(S::lower(mixed + d, pairs + d, k.base + d)), d);
        for (int64_t d = 0; d < half; d += 32)
          add(Dots::of(S::upper(mixed + half + d, pairs + d, k.base + half + d)), half + d);
      }
      alignas(64) float found[kSums];
      HEADINFER_UNROLL for (int i = 0; i < kSums; i += W)
        S::store(found + i, S::mul(S::sums(sum + i), scale));
      HEADINFER_UNROLL for (int r = 0; r < R; ++r)
        std::memcpy(p_ + r * P + key, found + r * K, sizeof(float) * K);
    }
  }

  // R rows against all keys of the block, as many keys at a time as fill the sums of one reduction.
  template <int R, class Fetch>
  void dots(int64_t row, const Rows<T> &k, int64_t first, int64_t keys, Fetch &ahead) {
    constexpr int K = S::kDotSums / (R == 3 ? 4 : R);
    constexpr int kSums = (R * K + W - 1) / W * W;
    const F scale = S::set(call_.scale);
    const Packed *q = q_ + row * q_width_;
    const int64_t whole = call_.key_dim / Dots::kStep * Dots::kStep;
    const int tail = static_cast<int>(call_.key_dim - whole);
    for (int64_t key = 0; key < keys; key += K) {
      ahead.fetch(K);
      // Past the end the last key is repeated: its scores are replaced, nothing else is read.
      const T *from[K];
      HEADINFER_UNROLL for (int i = 0; i < K; ++i)
        from[i] = k.first + (key + i < keys ? key + i : keys - 1) * k.stride;
      F sum[kSums];
      HEADINFER_UNROLL for (int i = 0; i < kSums; ++i) sum[i] = S::zero();
      for (int64_t d = 0; d < whole; d += Dots::kStep) {
        typename Dots::Part part[R];
        HEADINFER_UNROLL for (int r = 0; r < R; ++r) part[r] = Dots::query(q + r * q_width_ + d);
        HEADINFER_UNROLL for (int i = 0; i < K; ++i) {
          const typename Dots::Part mine = Dots::keys(from[i] + d);
          HEADINFER_UNROLL for (int r = 0; r < R; ++r)
            sum[r * K + i] = Dots::add(sum[r * K + i], part[r], mine);
        }
      }
      if (tail != 0) {
        typename Dots::Part part[R];
        HEADINFER_UNROLL for (int r = 0; r < R; ++r) part[r] = Dots::query(q + r * q_width_ + whole);
        HEADINFER_UNROLL for (int i = 0; i < K; ++i) {
          const typename Dots::Part mine = Dots::keys(from[i] + whole, tail);
          HEADINFER_UNROLL for (int r = 0; r < R; ++r)
            sum[r * K + i] = Dots::add(sum[r * K + i], part[r], mine);
        }
      }
      alignas(64) float found[kSums];
      HEADINFER_UNROLL for (int i = 0; i < kSums; i += W)
        S::store(found + i, S::mul(S::sums(sum + i), scale));
      HEADINFER_UNROLL for (int r = 0; r < R; ++r)
        std::memcpy(p_ + (row + r) * P + first + key, found + r * K, sizeof(float) * K);
    }
  }

  // Scores of a row become weights exp(score - peak); peak, weight and rescale_ follow.
  void soften(int64_t row, int64_t key, int64_t keys) {
    float *p = p_ + row * P;
    if (call_.softcap != 0.0f) cap(p);
    if (call_.causal != 0 || call_.biased != HEADINFER_NO_BIAS) hide(p, row, key, keys);
    const int64_t padded = round_up(keys, W);
    for (int64_t i = keys; i < padded; ++i) p[i] = -kInfinity;

    const float before = tile_.peak[row];
    F most = S::load(p);
    for (int64_t i = W; i < padded; i += W) most = S::max(most, S::load(p + i));
    const float block = S::highest(most);
    const float peak = block > before ? block : before;
    float sum = 0.0f;
    if (peak > -kInfinity && peak < kInfinity) {
      const F shift = S::set(peak);
      F total = S::zero();
      for (int64_t i = 0; i < padded; i += W) {
        const F weight = exp_nonpositive<S>(S::sub(S::load(p + i), shift));
        S::store(p + i, weight);
        total = S::add(total, weight);
      }
      sum = S::sum(total);
      if (sum < kInfinity) {
        rescale_[row] = before == peak ? 1.0f : std::exp(before - peak);
        tile_.weight[row] = tile_.weight[row] * rescale_[row] + sum;
        tile_.peak[row] = peak;
        return;
      }
    }
    // Nothing seen so far, or a score without a finite exponential: as in the softmax of the
    // reference, whose NaN weights become 0, no value counts.
    const bool seen = peak != -kInfinity || has_nan(p, keys);
    if (seen) tile_.peak[row] = has_nan(p, keys) || std::isnan(before) || sum != sum
                                    ? std::numeric_limits<float>::quiet_NaN()
                                    : kInfinity;
    rescale_[row] = seen ? 0.0f : 1.0f;
    for (int64_t i = 0; i < padded; ++i) p[i] = 0.0f;
  }

  static bool has_nan(const float *p, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      if (std::isnan(p[i])) return true;
    return false;
  }

  void cap(float *p) const {
    const F cap = S::set(call_.softcap);
    for (int64_t i = 0; i < P; i += W)
      S::store(p + i, S::mul(cap, tanh_any<S>(S::div(S::load(p + i), cap))));
  }

  void hide(float *p, int64_t row, int64_t key, int64_t keys) const {
    const int64_t first = tile_.first_key + key;
    if (call_.causal != 0)
      for (int64_t i = token(row) - first + 1 < 0 ? 0 : token(row) - first + 1; i < keys; ++i)
        p[i] = -kInfinity;
    if (call_.biased == HEADINFER_NO_BIAS) return;
    const int64_t *stride = call_.bias_stride;
    const int64_t start = tile_.batch * stride[0] + head(row) * stride[1] + token(row) * stride[2] +
                          first * stride[3];
    if (call_.biased == HEADINFER_BOOL_BIAS) {
      const unsigned char *seen = static_cast<const unsigned char *>(call_.bias) + start;
      for (int64_t i = 0; i < keys; ++i) p[i] = seen[i * stride[3]] != 0 ? p[i] : -kInfinity;
    } else {
      const float *bias = static_cast<const float *>(call_.bias) + start;
      for (int64_t i = 0; i < keys; ++i) p[i] += bias[i * stride[3]];
    }
  }

  // sums_ = sums_ * rescale_ + weights times values; keys of the next block are fetched ahead.
  void weigh(int64_t key, int64_t keys, int64_t later) {
    Spread<decltype(k_.ahead(0, 0))> ahead{k_.ahead(key + keys, later < P ? later : P), 1};
    if constexpr (kDirect) {
      if (tile_.rows <= 4 && v_.direct(key)) return weigh_unread(key, keys, ahead);
    }
    const Rows<T> v = v_.get(key, keys);
    ahead.passes = passes();
    int64_t row = 0;
    for (; row + 4 <= tile_.rows; row += 4) columns<4>(row, v, keys, ahead);
    if (row + 3 <= tile_.rows) columns<3>(row, v, keys, ahead), row += 3;
    if (row + 2 <= tile_.rows) columns<2>(row, v, keys, ahead), row += 2;
    if (row < tile_.rows) columns<1>(row, v, keys, ahead);
  }

  // Strips of all rows that weigh() reads the values for.
  int64_t passes() const {
    const int64_t rest = tile_.rows % 4;
    return tile_.rows / 4 * strips(S::kPairs) +
           (rest == 3 ? strips(S::kPairs) : rest == 0 ? 0 : strips(S::kPairsFewRows));
  }
  int64_t strips(int64_t pairs) const {
    const int64_t wide = 2 * W * pairs, left = call_.value_dim % wide;
    return call_.value_dim / wide + (left + 2 * W - 1) / (2 * W);
  }

  // Values for rows that one pass serves are decoded in registers.
  template <class Fetch>
  void weigh_unread(int64_t key, int64_t keys, Fetch &ahead) {
    const Unread v = v_.unread(key, keys);
    switch (tile_.rows) {
      case 1: return halves<1>(v, keys, ahead);
      case 2: return halves<2>(v, keys, ahead);
      case 3: return halves<3>(v, keys, ahead);
      default: return halves<4>(v, keys, ahead);
    }
  }

  template <int R, class Fetch>
  void halves(const Unread &v, int64_t keys, Fetch &ahead) {
    constexpr int kPieces = R > 2 ? 1 : 2;
    const int64_t half = call_.value_dim / 2, wide = 32 * kPieces;
    ahead.passes = half / wide + (half % wide != 0 ? 1 : 0);
    int64_t column = 0;
    for (; column + wide <= half; column += wide) strip_halves<R, kPieces>(column, v, keys, ahead);
    if (column < half) strip_halves<R, 1>(column, v, keys, ahead);
  }

  // 32 columns of the lower half and the 32 of the upper one that share their bytes, kPieces times.
  template <int R, int kPieces, class Fetch>
  void strip_halves(int64_t column, const Unread &v, int64_t keys, Fetch &ahead) {
    const int64_t width = call_.value_dim, half = width / 2;
    const uint8_t *mixed = v.mixed + column, *pairs = v.pairs + column;
    const T *apart = v.rows.first + column;
    const float *p = p_;
    F sum[R][4 * kPieces];
    HEADINFER_UNROLL for (int r = 0; r < R; ++r)
      HEADINFER_UNROLL for (int c = 0; c < 4 * kPieces; ++c) sum[r][c] = S::zero();
    typename S::Base base[2 * kPieces];
    HEADINFER_UNROLL for (int c = 0; c < kPieces; ++c) {
      base[2 * c] = S::bases(v.base + column + 32 * c);
      base[2 * c + 1] = S::bases(v.base + half + column + 32 * c);
    }
    const auto add = [&](const F *value, int64_t key) {
      HEADINFER_UNROLL for (int r = 0; r < R; ++r) {
        const F weight = S::set(p[r * P + key]);
        HEADINFER_UNROLL for (int c = 0; c < 4 * kPieces; ++c)
          sum[r][c] = S::fma(weight, value[c], sum[r][c]);
      }
    };
    F value[4 * kPieces];
    for (int64_t key = 0; key < keys;) {
      const int64_t end = keys - key < kFew ? keys : key + kFew;
      ahead.fetch(end - key);
      if ((v.apart >> key & ((1u << kFew) - 1)) == 0) {
        for (; key < end; ++key, mixed += width, pairs += half) {
          HEADINFER_UNROLL for (int c = 0; c < kPieces; ++c) {
            F *to = value + 4 * c;
            S::split(S::lower(mixed + 32 * c, pairs + 32 * c, base[2 * c]), to[0], to[1]);
            S::split(S::upper(mixed + half + 32 * c, pairs + 32 * c, base[2 * c + 1]), to[2], to[3]);
          }
          add(value, key);
        }
        continue;
      }
      for (; key < end; ++key, mixed += width, pairs += half) {
        HEADINFER_UNROLL for (int c = 0; c < kPieces; ++c) {
          F *to = value + 4 * c;
          if ((v.apart >> key & 1) != 0) {
            S::load2(apart + key * width + 32 * c, to[0], to[1]);
            S::load2(apart + key * width + half + 32 * c, to[2], to[3]);
          } else {
            S::split(S::lower(mixed + 32 * c, pairs + 32 * c, base[2 * c]), to[0], to[1]);
            S::split(S::upper(mixed + half + 32 * c, pairs + 32 * c, base[2 * c + 1]), to[2], to[3]);
          }
        }
        add(value, key);
      }
    }
    HEADINFER_UNROLL for (int r = 0; r < R; ++r) {
      const F rescale = S::set(rescale_[r]);
      HEADINFER_UNROLL for (int c = 0; c < 4 * kPieces; ++c) {
        float *to = sums_ + r * o_width_ + column + (c / 2 % 2) * half + 32 * (c / 4) + c % 2 * W;
        S::store(to, S::fma(S::load(to), rescale, sum[r][c]));
      }
    }
  }

  template <int R, class Fetch>
  void columns(int64_t row, const Rows<T> &v, int64_t keys, Fetch &ahead) {
    constexpr int kPairs = R > 2 ? S::kPairs : S::kPairsFewRows;
    int64_t column = 0;
    for (; column + 2 * W * kPairs <= call_.value_dim; column += 2 * W * kPairs)
      strip<R, kPairs, false>(row, column, v, keys, ahead);
    for (; column + 2 * W <= call_.value_dim; column += 2 * W)
      strip<R, 1, false>(row, column, v, keys, ahead);
    if (column < call_.value_dim) strip<R, 1, true>(row, column, v, keys, ahead);
  }

  // R rows of `pairs` times two vectors of columns over all keys of the block.
  template <int R, int kPairs, bool kTail, class Fetch>
  void strip(int64_t row, int64_t column, const Rows<T> &v, int64_t keys, Fetch &ahead) {
    const int tail = static_cast<int>(call_.value_dim - column);
    const float *p = p_ + row * P;
    const T *from = v.first + column;
    F sum[R][2 * kPairs];
    HEADINFER_UNROLL for (int r = 0; r < R; ++r)
      HEADINFER_UNROLL for (int c = 0; c < 2 * kPairs; ++c) sum[r][c] = S::zero();
    for (int64_t key = 0; key < keys; ++key, from += v.stride) {
      ahead.fetch(1);
      F value[2 * kPairs];
      HEADINFER_UNROLL for (int c = 0; c < kPairs; ++c) {
        if constexpr (kTail) S::load2(from, tail, value[0], value[1]);
        else S::load2(from + 2 * W * c, value[2 * c], value[2 * c + 1]);
      }
      HEADINFER_UNROLL for (int r = 0; r < R; ++r) {
        const F weight = S::set(p[r * P + key]);
        HEADINFER_UNROLL for (int c = 0; c < 2 * kPairs; ++c)
          sum[r][c] = S::fma(weight, value[c], sum[r][c]);
      }
    }
    HEADINFER_UNROLL for (int r = 0; r < R; ++r) {
      const F rescale = S::set(rescale_[row + r]);
      float *to = sums_ + (row + r) * o_width_ + column;
      HEADINFER_UNROLL for (int c = 0; c < 2 * kPairs; ++c)
        S::store(to + W * c, S::fma(S::load(to + W * c), rescale, sum[r][c]));
    }
  }

  void unpack_sums() {
    alignas(64) float line[2 * W];
    for (int64_t row = 0; row < tile_.rows; ++row)
      for (int64_t column = 0; column < o_width_; column += 2 * W) {
        const float *from = sums_ + row * o_width_ + column;
        S::template store2<T>(line, S::load(from), S::load(from + W));
        const int64_t left = call_.value_dim - column;
        std::memcpy(tile_.sums + row * call_.value_dim + column, line,
                    sizeof(float) * static_cast<size_t>(left < 2 * W ? left : 2 * W));
      }
  }

  const Tile &tile_;
  const headinfer_attend_args &call_;
  Source k_, v_;
  int64_t q_width_, o_width_;
  float *sums_;     // [rows, o_width_], columns in the order S::load2 gives them
  float *p_;        // [rows, P] scores, then weights
  float *rescale_;  // [rows] what sums so far are multiplied with
  Packed *q_;       // [rows, q_width_], dims in the order of Dots, zeros after the last
};

template <class S, class T, class Dots = FloatDots<S, T>>
void run_tile(const Tile &tile, void *scratch) {
  TileRun<S, T, Dots, PlainRows<T>>(tile, scratch).run();
}

template <class S, class Dots = FloatDots<S, BFloat16>>
void run_packed_tile(const Tile &tile, void *scratch) {
  TileRun<S, BFloat16, Dots, PackedRows<S>>(tile, scratch).run();
}

}  // namespace
}  // namespace headinfer

#endif
