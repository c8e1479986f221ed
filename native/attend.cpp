// SPDX-License-Identifier: Apache-2.0
// One attention call: checked, cut into tiles, run by the pool, merged.
//
// How it is cut depends on the shape alone, and partial results are merged in the order of their
// keys: bits depend on neither the number of threads nor who was faster.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "blocks.h"
#include "pool.h"
#include "tile.h"

namespace headinfer {
namespace {

// A span is at least this long, so that its partial result (rows x value_dim floats) is small
// beside its keys, and there are at most this many of them.
constexpr int64_t kSpanKeys = 512;
constexpr int64_t kSpans = 32;

const Level *const *levels(int32_t &count) {
  static const Level *found[8];
  static const int32_t number = [] {
    int32_t n = 0;
    for (const Level *level : {level_avx512_bf16(), level_avx512(), level_avx2(), level_neon(),
                               level_portable()})
      if (level != nullptr) found[n++] = level;
    return n;
  }();
  count = number;
  return found;
}

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// `packed` keys are not looked for in args->k and args->v.
int32_t check(const headinfer_attend_args *args, int64_t packed) {
  if (args == nullptr) return HEADINFER_NULL_POINTER;
  const headinfer_attend_args &a = *args;
  if (a.threads < 1 || a.threads > HEADINFER_MAX_THREADS) return HEADINFER_BAD_THREADS;
  if (a.type < HEADINFER_FLOAT32 || a.type > HEADINFER_FLOAT16) return HEADINFER_BAD_TYPE;
  if (a.biased < HEADINFER_NO_BIAS || a.biased > HEADINFER_FLOAT_BIAS) return HEADINFER_BAD_TYPE;
  if (a.batch < 0 || a.kv_heads < 0 || a.q_per_kv < 1 || a.rows < 0 || a.keys < 0 ||
      a.key_dim < 1 || a.value_dim < 1 || a.key_dim > HEADINFER_MAX_DIM ||
      a.value_dim > HEADINFER_MAX_DIM || (a.causal != 0 && a.rows != a.keys) || a.softcap < 0)
    return HEADINFER_BAD_SHAPE;
  if (level_at(a.level) == nullptr) return HEADINFER_BAD_LEVEL;
  const bool empty = a.batch * a.kv_heads * a.rows == 0;
  if (!empty && (a.out == nullptr || a.lse == nullptr)) return HEADINFER_NULL_POINTER;
  if (!empty && a.keys > 0 && a.q == nullptr) return HEADINFER_NULL_POINTER;
  if (!empty && a.keys > packed && (a.k == nullptr || a.v == nullptr))
    return HEADINFER_NULL_POINTER;
  if (!empty && a.keys > 0 && a.biased != HEADINFER_NO_BIAS && a.bias == nullptr)
    return HEADINFER_NULL_POINTER;
  return HEADINFER_OK;
}

// The tiles of a call, numbered batch, KV head, block of rows, span: `spans` consecutive tiles
// share their rows, and whoever finishes the last of them merges.
class Split {
 public:
  Split(const headinfer_attend_args &call, const PackedCall *packed, RunTile run_tile)
      : call_(call),
        packed_(packed),
        run_(run_tile),
        packed_rows_(call.q_per_kv * call.rows),
        row_blocks_(divide_up(packed_rows_, kTileRows)),
        span_keys_(std::max(kSpanKeys, divide_up(divide_up(call.keys, kSpans), kBlockKeys) *
                                           kBlockKeys)),
        spans_(std::max<int64_t>(1, divide_up(call.keys, span_keys_))),
        groups_(call.batch * call.kv_heads * row_blocks_),
        partial_floats_(std::min(packed_rows_, kTileRows) * (call.value_dim + 2)) {}

  Job job() const {
    const size_t partials = sizeof(float) * static_cast<size_t>(groups_ * spans_ * partial_floats_);
    const size_t counters = sizeof(std::atomic<int64_t>) * static_cast<size_t>(groups_);
    return Job{run_item, nullptr, groups_ * spans_, tile_scratch_bytes(call_, packed_ != nullptr),
               counters + partials};
  }

  static void lay_out(void *context, void *shared) {
    Split &split = *static_cast<Split *>(context);
    split.unfinished_ = static_cast<std::atomic<int64_t> *>(shared);
    for (int64_t group = 0; group < split.groups_; ++group)
      new (split.unfinished_ + group) std::atomic<int64_t>(split.spans_);
    split.partials_ = reinterpret_cast<float *>(split.unfinished_ + split.groups_);
  }

  static void run_item(void *context, int64_t item, void *scratch) {
    static_cast<Split *>(context)->run(item, scratch);
  }

 private:

  void run(int64_t item, void *scratch) {
    const Tile mine = tile(item);
    run_(mine, scratch);
    const int64_t group = item / spans_;
    if (unfinished_[group].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(group);
  }

  Tile tile(int64_t item) const {
    const int64_t group = item / spans_, span = item % spans_;
    const int64_t block = group % row_blocks_, head = group / row_blocks_;
    Tile t{};
    t.call = &call_;
    t.packed = packed_;
    t.kv_head = head % call_.kv_heads;
    t.batch = head / call_.kv_heads;
    t.first_row = block * kTileRows;
    t.rows = std::min(kTileRows, packed_rows_ - t.first_row);
    t.first_key = span * span_keys_;
    t.keys = std::max<int64_t>(0, std::min(span_keys_, seen_keys(t) - t.first_key));
    t.sums = sums(item);
    t.weight = weight(item, t.rows);
    t.peak = peak(item, t.rows);
    return t;
  }

  float *sums(int64_t item) const { return partials_ + item * partial_floats_; }
  float *weight(int64_t item, int64_t rows) const { return sums(item) + rows * call_.value_dim; }
  float *peak(int64_t item, int64_t rows) const { return weight(item, rows) + rows; }

  // Causal rows see no key after the last of them.
  int64_t seen_keys(const Tile &t) const {
    if (call_.causal == 0) return call_.keys;
    const bool one_head = t.first_row / call_.rows == (t.first_row + t.rows - 1) / call_.rows;
    return one_head ? (t.first_row + t.rows - 1) % call_.rows + 1 : call_.keys;
  }

  void merge(int64_t group) const {
    const Tile first = tile(group * spans_);
    const int64_t dim = call_.value_dim;
    const int64_t heads = call_.kv_heads * call_.q_per_kv;
    for (int64_t row = 0; row < first.rows; ++row) {
      const int64_t packed = first.first_row + row;
      const int64_t head = first.kv_head * call_.q_per_kv + packed / call_.rows;
      const int64_t index = (first.batch * heads + head) * call_.rows + packed % call_.rows;
      call_.lse[index] = merge_row(group * spans_, row, first.rows, call_.out + index * dim);
    }
  }

  // out becomes the weighted mean of the spans from `item` on; returns the log of the sum of exp.
  float merge_row(int64_t item, int64_t row, int64_t rows, float *out) const {
    const int64_t dim = call_.value_dim;
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    float most = -kInfinity;
    for (int64_t span = 0; span < spans_ && !std::isnan(most); ++span) {
      const float mine = peak(item + span, rows)[row];
      if (mine > most || std::isnan(mine)) most = mine;
    }
    const bool counts = most > -kInfinity && most < kInfinity;
    double total = 0;
    std::fill(out, out + dim, 0.0f);
    for (int64_t span = 0; span < spans_; ++span) {
      const double share = counts ? std::exp(double{peak(item + span, rows)[row]} - most) : 0.0;
      total += share * weight(item + span, rows)[row];
      // Added even where the share is 0: values that are NaN or infinite have to show.
      const float factor = static_cast<float>(share);
      const float *from = sums(item + span) + row * dim;
      for (int64_t column = 0; column < dim; ++column) out[column] += factor * from[column];
    }
    if (!counts) return most;
    for (int64_t column = 0; column < dim; ++column)
      out[column] = static_cast<float>(out[column] / total);
    return static_cast<float>(most + std::log(total));
  }

  const headinfer_attend_args &call_;
  const PackedCall *packed_;
  RunTile run_;
  int64_t packed_rows_, row_blocks_, span_keys_, spans_, groups_, partial_floats_;
  std::atomic<int64_t> *unfinished_ = nullptr;  // [groups_] tiles
  float *partials_ = nullptr;                   // [groups_ * spans_] of sums, weight, peak
};

// Several calls as one job of the pool: threads are woken once, and none waits at the end of a call
// for the others.
class Calls {
 public:
  void add(const headinfer_attend_args &call, const PackedCall *packed) {
    if (call.batch * call.kv_heads * call.rows == 0) return;
    const Level *level = level_at(call.level);
    splits_.emplace_back(call, packed,
                         packed == nullptr ? level->run[call.type] : level->run_packed);
  }

  int32_t run(int32_t threads) {
    if (splits_.empty()) return HEADINFER_OK;
    Job all{run_item, this, 0, 0, 0};
    for (const Split &split : splits_) {
      const Job job = split.job();
      first_item_.push_back(all.items);
      shared_at_.push_back(all.shared_bytes);
      all.items += job.items;
      all.scratch_bytes = std::max(all.scratch_bytes, job.scratch_bytes);
      // Atomic counters come first in what each has.
      all.shared_bytes += (job.shared_bytes + kAlign - 1) / kAlign * kAlign;
    }
    return run_job(all, threads, lay_out) ? HEADINFER_OK : HEADINFER_NO_MEMORY;
  }

 private:
  static constexpr size_t kAlign = 64;

  static void lay_out(void *context, void *shared) {
    Calls &calls = *static_cast<Calls *>(context);
    for (size_t i = 0; i < calls.splits_.size(); ++i)
      Split::lay_out(&calls.splits_[i], static_cast<char *>(shared) + calls.shared_at_[i]);
  }

  static void run_item(void *context, int64_t item, void *scratch) {
    Calls &calls = *static_cast<Calls *>(context);
    const auto after =
        std::upper_bound(calls.first_item_.begin(), calls.first_item_.end(), item);
    const size_t index = static_cast<size_t>(after - calls.first_item_.begin()) - 1;
    Split::run_item(&calls.splits_[index], item - calls.first_item_[index], scratch);
  }

  std::vector<Split> splits_;
  std::vector<int64_t> first_item_;
  std::vector<size_t> shared_at_;
};

bool packs(int64_t dim) { return dim >= 16 && dim <= kMaxPackedDim && dim % 16 == 0; }

bool describes(const headinfer_packed *packed) {
  return packed != nullptr && packed->slots != nullptr && packed->rows != nullptr &&
         packed->entries >= 0 && (packed->entries == 0 || packed->chunks != nullptr) &&
         packed->chunk_entries > 0;
}

int32_t check_packed(const headinfer_attend_args &a, const headinfer_packed *k,
                     const headinfer_packed *v, int64_t packed, const int64_t *damaged) {
  if (damaged == nullptr || !describes(k) || !describes(v)) return HEADINFER_NULL_POINTER;
  if (a.type != HEADINFER_BFLOAT16) return HEADINFER_BAD_TYPE;
  const bool whole = packed % kBlockTokens == 0;
  if (packed < 0 || (a.keys > packed && !whole) || !packs(a.key_dim) || !packs(a.value_dim))
    return HEADINFER_BAD_SHAPE;
  return HEADINFER_OK;
}

}  // namespace

const Level *level_at(int32_t index) {
  int32_t count = 0;
  const Level *const *all = levels(count);
  if (index >= 0) return index < count && all[index]->runs() ? all[index] : nullptr;
  if (index != -1) return nullptr;
  return *std::find_if(all, all + count, [](const Level *level) { return level->runs(); });
}

size_t tile_scratch_bytes(const headinfer_attend_args &call, bool packed) {
  // Widths are rounded up to the widest step of any level, 32 elements.
  const int64_t rows = std::min(kTileRows, call.q_per_kv * call.rows);
  const int64_t floats = rows * (divide_up(call.key_dim, 32) * 32 +
                                 divide_up(call.value_dim, 32) * 32 + kBlockKeys + 1);
  const int64_t decoded = packed ? 2 * (kBlockKeys + 1) * (call.key_dim + call.value_dim) : 0;
  return sizeof(float) * static_cast<size_t>(floats) + static_cast<size_t>(decoded) + 6 * 64;
}

}  // namespace headinfer

int32_t headinfer_abi(void) { return HEADINFER_ABI; }

int32_t headinfer_level_count(void) {
  int32_t count = 0;
  headinfer::levels(count);
  return count;
}

const char *headinfer_level_name(int32_t level) {
  int32_t count = 0;
  const headinfer::Level *const *all = headinfer::levels(count);
  return level >= 0 && level < count ? all[level]->name : nullptr;
}

int32_t headinfer_level_runs(int32_t level) {
  return level >= 0 && headinfer::level_at(level) != nullptr ? 1 : 0;
}

namespace headinfer {

namespace {

// A call's packed keys, and where it says which block is damaged.
struct Given {
  PackedCall packed;
  int64_t number = 0;
};

void name_damaged(const headinfer_attend_args &call, const Given &given, int64_t damaged[4]) {
  const int64_t blocks = given.packed.tokens / kBlockTokens, block = given.number - 1;
  damaged[3] = block % blocks;
  damaged[2] = block / blocks % call.kv_heads;
  damaged[1] = block / blocks / call.kv_heads % call.batch;
  damaged[0] = block / blocks / call.kv_heads / call.batch;
}

int32_t attend_checked(const headinfer_attend_args *calls, headinfer_near_packed *packed,
                       int32_t count) {
  std::vector<Given> given(static_cast<size_t>(count));
  Calls together;
  for (int32_t i = 0; i < count; ++i) {
    const bool packs = packed != nullptr && packed[i].tokens > 0;
    Given &mine = given[static_cast<size_t>(i)];
    // Blocks that are packed for more tokens than are attended are not looked at.
    if (packs)
      mine.packed = PackedCall{&packed[i].k, &packed[i].v,
                               divide_up(packed[i].tokens, kBlockTokens) * kBlockTokens,
                               &mine.number};
    together.add(calls[i], packs ? &mine.packed : nullptr);
  }
  const int32_t status = together.run(calls[0].threads);
  for (int32_t i = 0; i < count && status == HEADINFER_OK; ++i) {
    if (given[static_cast<size_t>(i)].number == 0) continue;
    name_damaged(calls[i], given[static_cast<size_t>(i)], packed[i].damaged);
    return HEADINFER_CORRUPT;
  }
  return status;
}

}  // namespace

int32_t attend_runs(const headinfer_attend_args *calls, headinfer_near_packed *packed,
                    int32_t count) {
  if (calls == nullptr) return HEADINFER_NULL_POINTER;
  if (count < 1) return HEADINFER_BAD_SHAPE;
  for (int32_t i = 0; i < count; ++i) {
    const int64_t tokens = packed == nullptr ? 0 : packed[i].tokens;
    int32_t problem = check(&calls[i], tokens);
    if (problem == HEADINFER_OK && tokens > 0)
      problem = check_packed(calls[i], &packed[i].k, &packed[i].v, tokens, packed[i].damaged);
    if (problem != HEADINFER_OK) return problem;
  }
  try {
    return attend_checked(calls, packed, count);
  } catch (const std::bad_alloc &) {
    return HEADINFER_NO_MEMORY;
  } catch (...) {
    return HEADINFER_SYSTEM_ERROR;
  }
}

}  // namespace headinfer

int32_t headinfer_attend(const headinfer_attend_args *args) {
  return headinfer::attend_runs(args, nullptr, 1);
}

int32_t headinfer_attend_packed(const headinfer_attend_args *args, const headinfer_packed *k,
                                const headinfer_packed *v, int64_t packed, int64_t damaged[4]) {
  using namespace headinfer;
  int32_t problem = check(args, packed);
  if (problem == HEADINFER_OK) problem = check_packed(*args, k, v, packed, damaged);
  if (problem != HEADINFER_OK) return problem;
  headinfer_near_packed there{*k, *v, packed, {}};
  problem = attend_runs(args, &there, 1);
  if (problem == HEADINFER_CORRUPT) std::copy(there.damaged, there.damaged + 4, damaged);
  return problem;
}
