// SPDX-License-Identifier: Apache-2.0
// Threads that wait for work between calls. The calling thread always takes part, so a job ends
// even if no other thread ever wakes; who did which item never shows in a result.
#ifndef HEADINFER_POOL_H
#define HEADINFER_POOL_H

#include <cstddef>
#include <cstdint>

namespace headinfer {

// What a job does with item number `item`; `scratch` belongs to the running thread until it returns.
struct Job {
  void (*run)(void *context, int64_t item, void *scratch);
  void *context;
  int64_t items;
  size_t scratch_bytes;  // per thread
  size_t shared_bytes;   // for the whole job
};

// Runs all items on up to `threads` threads and returns when they are done. Jobs of different
// callers run one after another. `prepare` is called first, with the job's shared memory.
// Returns false, having run nothing, when there is no memory for scratch_bytes or shared_bytes.
bool run_job(Job job, int threads, void (*prepare)(void *context, void *shared) = nullptr);

}  // namespace headinfer

#endif
