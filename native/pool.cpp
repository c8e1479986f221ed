// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace headinfer {
namespace {

constexpr size_t kAlign = 64;
// Memory above this is given back after the job: it serves one unusual call.
constexpr size_t kKeepBytes = size_t{64} << 20;
// Layers follow each other within microseconds; sleeping and waking costs tens of them.
constexpr std::chrono::microseconds kSpin{20};

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  bool run(Job job, int threads, void (*prepare)(void *, void *)) {
    std::lock_guard<std::mutex> one_at_a_time(jobs_);
    const size_t per_thread = aligned(job.scratch_bytes);
    const int wanted = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(job.items, 1)));
    if (!reserve(per_thread * static_cast<size_t>(wanted) + aligned(job.shared_bytes))) return false;
    char *scratch = memory_ + aligned(job.shared_bytes);
    if (prepare != nullptr) prepare(job.context, memory_);
    const int helpers = hire(wanted - 1);
    if (helpers > 0) open(job, scratch, per_thread, helpers);
    work(job, scratch);
    if (helpers > 0) close();
    next_.store(0, std::memory_order_relaxed);
    if (held_ > kKeepBytes) release();
    return true;
  }

  // Ends the threads; later jobs run on their callers alone.
  void stop() {
    std::lock_guard<std::mutex> one_at_a_time(jobs_);
    {
      std::lock_guard<std::mutex> lock(state_);
      stopped_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread &worker : workers_) worker.join();
    workers_.clear();
  }

 private:
  bool reserve(size_t bytes) {
    if (bytes <= held_) return true;
    release();
    memory_ = static_cast<char *>(std::aligned_alloc(kAlign, aligned(bytes)));
    held_ = memory_ == nullptr ? 0 : bytes;
    return memory_ != nullptr;
  }

  void release() {
    std::free(memory_);
    memory_ = nullptr;
    held_ = 0;
  }

  // As many of `count` helpers as the system allows: fewer threads give the same bits later.
  int hire(int count) {
    if (stopped_) return 0;
    try {
      while (static_cast<int>(workers_.size()) < count) {
        const int index = static_cast<int>(workers_.size());
        workers_.emplace_back([this, index] { serve(index); });
      }
    } catch (const std::system_error &) {
    }
    return std::min(count, static_cast<int>(workers_.size()));
  }

  void open(const Job &job, char *scratch, size_t per_thread, int helpers) {
    {
      std::lock_guard<std::mutex> lock(state_);
      job_ = &job;
      scratch_ = scratch;
      per_thread_ = per_thread;
      helpers_ = helpers;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

  // Nobody joins any more; waits for those who did.
  void close() {
    std::unique_lock<std::mutex> lock(state_);
    job_ = nullptr;
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  void work(const Job &job, void *scratch) {
    for (;;) {
      const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
      if (item >= job.items) return;
      job.run(job.context, item, scratch);
    }
  }

  void serve(int index) {
    uint64_t seen = 0;
    for (;;) {
      spin(seen);
      std::unique_lock<std::mutex> lock(state_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      seen = generation_.load(std::memory_order_acquire);
      if (stopped_) return;
      if (job_ == nullptr || index >= helpers_) continue;
      ++busy_;
      const Job job = *job_;
      char *scratch = scratch_ + per_thread_ * static_cast<size_t>(index + 1);
      lock.unlock();
      work(job, scratch);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void spin(uint64_t seen) const {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 16; ++i) {
        if (generation_.load(std::memory_order_acquire) != seen) return;
        relax();
      }
    }
  }

  std::mutex jobs_;  // held for the length of a job; guards workers_ and memory_
  std::vector<std::thread> workers_;
  char *memory_ = nullptr;
  size_t held_ = 0;
  std::atomic<int64_t> next_{0};

  std::mutex state_;  // guards what follows
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  const Job *job_ = nullptr;
  char *scratch_ = nullptr;
  size_t per_thread_ = 0;
  int helpers_ = 0;
  int busy_ = 0;
  bool stopped_ = false;
};

std::atomic<Pool *> pool{nullptr};

// A forked child has none of the threads and locks in unknown states: it starts over with a new
// pool, and the old one's memory stays behind.
void forget_pool() { pool.store(new Pool, std::memory_order_release); }

void stop_pool() { pool.load(std::memory_order_acquire)->stop(); }

Pool &the_pool() {
  static const bool made = [] {
    pool.store(new Pool, std::memory_order_release);
    pthread_atfork(nullptr, nullptr, forget_pool);
    std::atexit(stop_pool);
    return true;
  }();
  (void)made;
  return *pool.load(std::memory_order_acquire);
}

}  // namespace

bool run_job(Job job, int threads, void (*prepare)(void *, void *)) {
  return the_pool().run(job, threads, prepare);
}

}  // namespace headinfer
