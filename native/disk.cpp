// SPDX-License-Identifier: Apache-2.0
// Reads and writes of one file by threads of its own, many at a time: what a disk needs to be busy.
//
// A job is a list of operations; jobs run side by side, except that a read can wait for all writes
// registered before it. Operations are cut into pieces, so that one large job keeps every thread
// busy. On a file opened for direct I/O, whatever does not lie on the file's alignment passes
// through a buffer of the thread; partial blocks are read, changed and written one after another.
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <system_error>
#include <thread>
#include <vector>

#include "headinfer_native.h"

namespace headinfer {
namespace {

struct Piece {
  int64_t job, offset, nbytes;
  char *memory;
};

struct Job {
  bool write = false, started = false;
  int64_t left = 0;   // pieces not done yet
  int64_t after = 0;  // of a read: writes up to this number come first
  headinfer_disk_fault fault = {0, 0, 0, 0};
  std::vector<Piece> waiting;
};

// Bytes that a write should have changed and did not: whoever reads them is told.
struct Lost {
  int64_t start, stop;
  int32_t code;
};

class Queue {
 public:
  Queue(int fd, int64_t alignment, int64_t piece_bytes)
      : fd_(fd), alignment_(alignment), piece_(piece_bytes) {}

  bool hire(int threads) {
    try {
      for (int i = 0; i < threads; ++i) workers_.emplace_back([this] { serve(); });
    } catch (const std::system_error &) {
    }
    return !workers_.empty();
  }

  ~Queue() {
    {
      std::lock_guard<std::mutex> lock(state_);
      stopped_ = true;
    }
    work_.notify_all();
    for (std::thread &worker : workers_) worker.join();
  }

  int64_t open(bool write, int64_t after) {
    std::lock_guard<std::mutex> lock(state_);
    Job &job = jobs_[++last_];
    job.write = write;
    job.after = after;
    if (write) writes_.insert(last_);
    return last_;
  }

  int32_t start(int64_t number, const headinfer_disk_op *ops, int64_t count) {
    std::unique_lock<std::mutex> lock(state_);
    const auto found = jobs_.find(number);
    if (found == jobs_.end() || found->second.started) return HEADINFER_BAD_SHAPE;
    Job &job = found->second;
    job.started = true;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t at = 0; at < ops[i].nbytes;) {
        // Cut where the file's blocks begin. Of a write, a partial block is a piece of its own: it
        // is read first, and nobody else may change it meanwhile.
        const int64_t left = ops[i].nbytes - at;
        const int64_t past = alignment_ > 0 ? (ops[i].offset + at) % alignment_ : 0;
        int64_t step = piece_ - past;
        if (job.write && past > 0)
          step = alignment_ - past;
        else if (job.write && alignment_ > 0 && left > alignment_)
          step = std::min(step, left / alignment_ * alignment_);
        step = std::min(step, left);
        job.waiting.push_back(
            {number, ops[i].offset + at, step, static_cast<char *>(ops[i].memory) + at});
        at += step;
      }
    }
    job.left = static_cast<int64_t>(job.waiting.size());
    if (job.left == 0) {
      finish(number, job);
    } else if (job.write || free_of_writes(job)) {
      release(job);
    } else {
      reads_.push_back(number);
    }
    return HEADINFER_OK;
  }

  // A job that will never be started ends with `code`; of a write, these bytes are lost.
  int32_t fail(int64_t number, int32_t code, const headinfer_disk_op *ops, int64_t count) {
    std::lock_guard<std::mutex> lock(state_);
    const auto found = jobs_.find(number);
    if (found == jobs_.end() || found->second.started) return HEADINFER_BAD_SHAPE;
    Job &job = found->second;
    job.started = true;
    job.fault.code = code;
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0) job.fault.offset = ops[i].offset, job.fault.nbytes = ops[i].nbytes;
      if (job.write) lost_.push_back({ops[i].offset, ops[i].offset + ops[i].nbytes, code});
    }
    finish(number, job);
    return HEADINFER_OK;
  }

  // 1 when the job is over, 0 while it is not; its record goes when it is over and `forget`.
  int32_t ask(int64_t number, bool block, bool forget, headinfer_disk_fault *fault) {
    std::unique_lock<std::mutex> lock(state_);
    auto found = jobs_.find(number);
    const auto over = [&] { return found->second.started && found->second.left == 0; };
    if (found == jobs_.end()) return 1;  // seen by somebody before
    if (block) {
      ended_.wait(lock, [&] {
        found = jobs_.find(number);
        return found == jobs_.end() || over();
      });
      if (found == jobs_.end()) return 1;
    } else if (!over()) {
      return 0;
    }
    if (fault != nullptr) *fault = found->second.fault;
    if (forget) jobs_.erase(found);
    return 1;
  }

  // The bytes lost, one range after the other; 0 when there is none of that number.
  int32_t lost(int64_t place, headinfer_disk_fault *fault) {
    std::lock_guard<std::mutex> lock(state_);
    if (place < 0 || place >= static_cast<int64_t>(lost_.size())) return 0;
    const Lost &found = lost_[static_cast<size_t>(place)];
    *fault = {found.code, found.start, found.stop - found.start, 0};
    return 1;
  }

  void drain() {
    std::unique_lock<std::mutex> lock(state_);
    ended_.wait(lock, [this] { return unfinished_ == 0 && writes_.empty() && reads_.empty(); });
  }

 private:
  bool free_of_writes(const Job &job) const {
    return writes_.empty() || *writes_.begin() > job.after;
  }

  void release(Job &job) {
    unfinished_ += job.left;
    for (const Piece &piece : job.waiting) ready_.push_back(piece);
    job.waiting.clear();
    job.waiting.shrink_to_fit();
    work_.notify_all();
  }

  void finish(int64_t number, Job &job) {
    if (job.write) {
      writes_.erase(number);
      for (auto read = reads_.begin(); read != reads_.end();) {
        Job &waiting = jobs_.at(*read);
        if (free_of_writes(waiting)) {
          release(waiting);
          read = reads_.erase(read);
        } else {
          ++read;
        }
      }
    }
    ended_.notify_all();
  }

  void serve() {
    // Two alignments more than a piece: a partial block on either side.
    char *scratch = nullptr;
    if (alignment_ > 0) {
      scratch = static_cast<char *>(std::aligned_alloc(
          static_cast<size_t>(alignment_), static_cast<size_t>(piece_ + 2 * alignment_)));
    }
    std::unique_lock<std::mutex> lock(state_);
    for (;;) {
      work_.wait(lock, [this] { return stopped_ || !ready_.empty(); });
      if (ready_.empty()) break;
      const Piece piece = ready_.front();
      ready_.pop_front();
      const bool write = jobs_.at(piece.job).write;
      headinfer_disk_fault fault = {0, 0, 0, 0};
      if (!write) fault = lost_of(piece);
      lock.unlock();
      if (fault.code != 0) {
        // Nothing to read.
      } else if (alignment_ > 0 && scratch == nullptr) {
        fault = {ENOMEM, piece.offset, piece.nbytes, 0};
      } else {
        fault = run(piece, write, scratch);
      }
      lock.lock();
      Job &job = jobs_.at(piece.job);
      if (fault.code != 0 && job.fault.code == 0) job.fault = fault;
      if (write) remember(piece, fault.code);
      --unfinished_;
      if (--job.left == 0) finish(piece.job, job);
    }
    lock.unlock();
    std::free(scratch);
  }

  // What of a piece to be read was lost.
  headinfer_disk_fault lost_of(const Piece &piece) const {
    const int64_t stop = piece.offset + piece.nbytes;
    for (const Lost &lost : lost_) {
      const int64_t first = std::max(lost.start, piece.offset), last = std::min(lost.stop, stop);
      if (first < last) return {lost.code, first, last - first, 0};
    }
    return {0, 0, 0, 0};
  }

  // What was written again is there again; what failed is not, and with it a block of the file that
  // was to be changed in part: what it held may be gone.
  void remember(const Piece &piece, int32_t code) {
    int64_t start = piece.offset, stop = piece.offset + piece.nbytes;
    if (code == 0 && lost_.empty()) return;
    if (code != 0 && alignment_ > 0) {
      start -= start % alignment_;
      stop = (stop + alignment_ - 1) / alignment_ * alignment_;
    }
    std::vector<Lost> kept;
    for (const Lost &lost : lost_) {
      if (lost.start < start) kept.push_back({lost.start, std::min(lost.stop, start), lost.code});
      if (lost.stop > stop) kept.push_back({std::max(lost.start, stop), lost.stop, lost.code});
    }
    if (code != 0) kept.push_back({start, stop, code});
    lost_.swap(kept);
  }

  headinfer_disk_fault run(const Piece &piece, bool write, char *scratch) {
    headinfer_disk_fault fault = moved(piece, write, scratch);
    if (fault.code != 0) {
      // Who reads of it asked for these bytes, not for the whole blocks they lie in.
      const int64_t before = piece.offset - fault.offset;
      fault.offset = piece.offset;
      fault.nbytes = piece.nbytes;
      fault.done = std::min(std::max<int64_t>(fault.done - before, 0), piece.nbytes);
    }
    return fault;
  }

  headinfer_disk_fault moved(const Piece &piece, bool write, char *scratch) {
    const int64_t before = alignment_ > 0 ? piece.offset % alignment_ : 0;
    const int64_t start = piece.offset - before;
    int64_t size = before + piece.nbytes;
    if (alignment_ > 0) size = (size + alignment_ - 1) / alignment_ * alignment_;
    const bool whole = size == piece.nbytes;
    const bool here = alignment_ == 0 ||
                      (whole && reinterpret_cast<uintptr_t>(piece.memory) %
                                        static_cast<uintptr_t>(alignment_) == 0);
    if (here) return transfer(piece.memory, start, size, write);
    if (!write) {
      const headinfer_disk_fault fault = transfer(scratch, start, size, false);
      if (fault.code == 0)
        std::memcpy(piece.memory, scratch + before, static_cast<size_t>(piece.nbytes));
      return fault;
    }
    if (whole) {
      std::memcpy(scratch, piece.memory, static_cast<size_t>(piece.nbytes));
      return transfer(scratch, start, size, true);
    }
    std::lock_guard<std::mutex> one_at_a_time(partial_[start / alignment_ % kPartialLocks]);
    const headinfer_disk_fault fault = transfer(scratch, start, size, false);
    if (fault.code != 0) return fault;
    std::memcpy(scratch + before, piece.memory, static_cast<size_t>(piece.nbytes));
    return transfer(scratch, start, size, true);
  }

  headinfer_disk_fault transfer(char *memory, int64_t offset, int64_t nbytes, bool write) const {
    int64_t done = 0;
    while (done < nbytes) {
      char *at = memory + done;
      const size_t left = static_cast<size_t>(nbytes - done);
      const ssize_t count = write ? pwrite(fd_, at, left, offset + done)
                                  : pread(fd_, at, left, offset + done);
      if (count < 0 && errno == EINTR) continue;
      // An end of the file where there should be bytes has no number of its own.
      if (count <= 0)
        return {count < 0 ? errno : HEADINFER_DISK_SHORT, offset, nbytes, done};
      done += count;
    }
    // Without direct I/O the system keeps what passes by in memory that is not ours to fill.
    if (alignment_ == 0) posix_fadvise(fd_, offset, nbytes, POSIX_FADV_DONTNEED);
    return {0, 0, 0, 0};
  }

  const int fd_;
  const int64_t alignment_, piece_;
  std::vector<std::thread> workers_;
  static constexpr int64_t kPartialLocks = 64;
  std::mutex partial_[kPartialLocks];  // one is held while part of a block is changed

  std::mutex state_;  // guards what follows
  std::condition_variable work_, ended_;
  bool stopped_ = false;
  int64_t last_ = 0, unfinished_ = 0;
  std::map<int64_t, Job> jobs_;
  std::set<int64_t> writes_;   // not over yet
  std::deque<int64_t> reads_;  // started, and waiting for writes
  std::deque<Piece> ready_;
  std::vector<Lost> lost_;
};

Queue *queue_of(void *handle) { return static_cast<Queue *>(handle); }

}  // namespace
}  // namespace headinfer

using headinfer::queue_of;

void *headinfer_disk_open(int32_t fd, int64_t alignment, int64_t piece_bytes, int32_t threads) {
  if (fd < 0 || alignment < 0 || piece_bytes < 1 || threads < 1 || threads > HEADINFER_MAX_THREADS ||
      (alignment > 0 && piece_bytes % alignment != 0))
    return nullptr;
  auto *queue = new (std::nothrow) headinfer::Queue(fd, alignment, piece_bytes);
  if (queue != nullptr && !queue->hire(threads)) {
    delete queue;
    return nullptr;
  }
  return queue;
}

int64_t headinfer_disk_job(void *handle, int32_t write, int64_t after) {
  try {
    return queue_of(handle)->open(write != 0, after);
  } catch (...) {
    return -1;
  }
}

int32_t headinfer_disk_start(void *handle, int64_t job, const headinfer_disk_op *ops,
                             int64_t count) {
  try {
    return queue_of(handle)->start(job, ops, count);
  } catch (...) {
    return HEADINFER_NO_MEMORY;
  }
}

int32_t headinfer_disk_fail(void *handle, int64_t job, int32_t code, const headinfer_disk_op *ops,
                            int64_t count) {
  try {
    return queue_of(handle)->fail(job, code, ops, count);
  } catch (...) {
    return HEADINFER_NO_MEMORY;
  }
}

int32_t headinfer_disk_ask(void *handle, int64_t job, int32_t block, int32_t forget,
                           headinfer_disk_fault *fault) {
  return queue_of(handle)->ask(job, block != 0, forget != 0, fault);
}

int32_t headinfer_disk_lost(void *handle, int64_t place, headinfer_disk_fault *fault) {
  return queue_of(handle)->lost(place, fault);
}

void headinfer_disk_drain(void *handle) { queue_of(handle)->drain(); }

void headinfer_disk_close(void *handle) { delete queue_of(handle); }
