// SPDX-License-Identifier: Apache-2.0
// Plain memory in parallel: backed with pages, or read to measure how fast that goes.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "headinfer_native.h"
#include "pool.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older kernels answer EINVAL
#endif

namespace headinfer {
namespace {

constexpr int64_t kPieceBytes = int64_t{32} << 20;  // whole huge pages

struct Touch {
  char *start;
  int64_t nbytes, page;
  std::atomic<int32_t> status{HEADINFER_OK};
};

// Writes to a page without changing it, also while others write there.
void rewrite_byte(char *byte) {
  char seen = __atomic_load_n(byte, __ATOMIC_RELAXED);
  __atomic_compare_exchange_n(byte, &seen, seen, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

void touch_piece(void *context, int64_t item, void *) {
  Touch &touch = *static_cast<Touch *>(context);
  char *start = touch.start + item * kPieceBytes;
  const int64_t nbytes = std::min(kPieceBytes, touch.nbytes - item * kPieceBytes);
  if (madvise(start, static_cast<size_t>(nbytes), MADV_POPULATE_WRITE) == 0) return;
  if (errno == EINVAL) {
    for (int64_t at = 0; at < nbytes; at += touch.page) rewrite_byte(start + at);
    return;
  }
  touch.status.store(errno == ENOMEM ? HEADINFER_NO_MEMORY : HEADINFER_SYSTEM_ERROR);
}

struct Read {
  const char *start;
  int64_t nbytes;
  std::atomic<uint64_t> sum{0};
};

// The sum is kept so that no read can be left out.
void read_piece(void *context, int64_t item, void *) {
  Read &read = *static_cast<Read *>(context);
  const char *at = read.start + item * kPieceBytes;
  int64_t left = std::min(kPieceBytes, read.nbytes - item * kPieceBytes);
  uint64_t sums[16] = {};
  for (; left >= static_cast<int64_t>(sizeof sums); left -= sizeof sums, at += sizeof sums) {
    uint64_t words[16];
    std::memcpy(words, at, sizeof words);
    __builtin_prefetch(at + 4096);
    for (int i = 0; i < 16; ++i) sums[i] ^= words[i];
  }
  for (; left > 0; --left, ++at) sums[0] += static_cast<unsigned char>(*at);
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  read.sum.fetch_add(sum, std::memory_order_relaxed);
}

int32_t check(const void *memory, int64_t nbytes, int32_t threads) {
  if (threads < 1 || threads > HEADINFER_MAX_THREADS) return HEADINFER_BAD_THREADS;
  if (nbytes < 0) return HEADINFER_BAD_SHAPE;
  return memory == nullptr && nbytes > 0 ? HEADINFER_NULL_POINTER : HEADINFER_OK;
}

int64_t pieces(int64_t nbytes) { return (nbytes + kPieceBytes - 1) / kPieceBytes; }

}  // namespace
}  // namespace headinfer

int32_t headinfer_touch(void *memory, int64_t nbytes, int32_t threads) {
  using namespace headinfer;
  const int32_t problem = check(memory, nbytes, threads);
  if (problem != HEADINFER_OK || nbytes == 0) return problem;
  Touch touch;
  touch.page = sysconf(_SC_PAGESIZE);
  // The whole of the first page is there if a part of it is.
  const int64_t before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory) %
                                              static_cast<uintptr_t>(touch.page));
  touch.start = static_cast<char *>(memory) - before;
  touch.nbytes = nbytes + before;
  try {
    if (!run_job(Job{touch_piece, &touch, pieces(touch.nbytes), 0, 0}, threads))
      return HEADINFER_NO_MEMORY;
  } catch (...) {
    return HEADINFER_SYSTEM_ERROR;
  }
  return touch.status.load();
}

int32_t headinfer_read(const void *memory, int64_t nbytes, int32_t threads, double *seconds) {
  using namespace headinfer;
  const int32_t problem = check(memory, nbytes, threads);
  if (problem != HEADINFER_OK) return problem;
  if (seconds == nullptr) return HEADINFER_NULL_POINTER;
  Read read;
  read.start = static_cast<const char *>(memory);
  read.nbytes = nbytes;
  const auto begin = std::chrono::steady_clock::now();
  try {
    if (!run_job(Job{read_piece, &read, pieces(nbytes), 0, 0}, threads)) return HEADINFER_NO_MEMORY;
  } catch (...) {
    return HEADINFER_SYSTEM_ERROR;
  }
  *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return HEADINFER_OK;
}
