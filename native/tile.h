// SPDX-License-Identifier: Apache-2.0
// What passes between the splitting of a call (attend.cpp) and the arithmetic of one instruction
// level (level_*.cpp). A tile is some query rows of one KV head against one span of its keys.
#ifndef HEADINFER_TILE_H
#define HEADINFER_TILE_H

#include <cstddef>
#include <cstdint>

#include "headinfer_native.h"

namespace headinfer {

// Keys whose scores are held at a time: their K and V stay in the first-level cache while all
// query rows pass over them.
constexpr int64_t kBlockKeys = 64;
// Query rows of a tile; more rows make more tiles and read the keys again.
constexpr int64_t kTileRows = 64;

// Keys and values of a call that lie packed, but for those from token `tokens` on.
struct PackedCall {
  const headinfer_packed *k, *v;
  int64_t tokens;
  int64_t *damaged;  // 1 + the number of a damaged block, values after keys; 0 while there is none
};

struct Tile {
  const headinfer_attend_args *call;
  const PackedCall *packed;  // null where all lie plain
  int64_t batch, kv_head;
  int64_t first_row, rows;  // rows are packed: query head of the group, then token
  int64_t first_key, keys;
  // Written: sum of exp(score - peak) * value, [rows, value_dim]; sum of exp(score - peak); peak.
  // A row that met a NaN or +inf score has that as its peak and no weight anywhere.
  float *sums;
  float *weight;
  float *peak;
};

using RunTile = void (*)(const Tile &tile, void *scratch);

struct Level {
  const char *name;
  bool (*runs)();
  RunTile run[3];  // by headinfer_type
  RunTile run_packed;
  // Tokens `first` .. `first + count` of a packed block, [count, dim]; false if it is damaged.
  bool (*unpack)(const uint8_t *slot, const headinfer_packed &where, int64_t dim, int64_t first,
                 int64_t count, uint16_t *out);
};

// Bytes of scratch that any level needs for a tile of this call; aligned to 64 for it.
size_t tile_scratch_bytes(const headinfer_attend_args &call, bool packed);

// The level of that index, -1 for the best; null where this processor does not run it.
const Level *level_at(int32_t index);

// Calls, at least one, with the packed keys of each, or null where none are packed, as one job of as
// many threads as the first asks for; the status of the first that failed. Bits are those of the calls
// one by one.
int32_t attend_runs(const headinfer_attend_args *calls, headinfer_near_packed *packed,
                    int32_t count);

// Null where the level is not built for this processor.
const Level *level_avx512_bf16();
const Level *level_avx512();
const Level *level_avx2();
const Level *level_neon();
const Level *level_portable();

}  // namespace headinfer

#endif
