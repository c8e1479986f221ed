// SPDX-License-Identifier: Apache-2.0
// Runs the native library the way sanitizers want to see it: several callers at once, every level,
// memory that ends where the tensors end, a fork, and results held against double precision.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "guarded.h"
#include "headinfer_native.h"

namespace {

struct Shape {
  int64_t batch, kv_heads, q_per_kv, rows, keys, key_dim, value_dim;
  int32_t type;
  bool causal, biased;
  float softcap;
};

// Heap blocks of exactly the size needed: one byte more and AddressSanitizer ends the run.
template <class T>
std::unique_ptr<T[]> block(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

float random_float(uint32_t &state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f;
}

float widen(const void *from, int64_t index, int32_t type) {
  if (type == HEADINFER_FLOAT32) return static_cast<const float *>(from)[index];
  const uint32_t half = static_cast<const uint16_t *>(from)[index];
  uint32_t bits = half << 16;
  if (type == HEADINFER_FLOAT16)
    bits = (half & 0x8000u) << 16 | (((half & 0x7fffu) << 13) + (112u << 23));
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Normal numbers between 1/16 and 1 in size, of either sign.
std::unique_ptr<Guarded> tensor(int64_t count, int32_t type, uint32_t &state) {
  const int64_t size = type == HEADINFER_FLOAT32 ? 4 : 2;
  auto tensor = std::make_unique<Guarded>(count * size);
  char *made = tensor->get();
  for (int64_t i = 0; i < count; ++i) {
    float value = random_float(state);
    value = std::copysign(std::fmax(std::fabs(value), 0.0625f), value);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t brain = static_cast<uint16_t>(bits >> 16);
    const uint16_t half =
        static_cast<uint16_t>((bits >> 16 & 0x8000u) | (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
    if (type == HEADINFER_FLOAT32) std::memcpy(&made[i * 4], &value, 4);
    else std::memcpy(&made[i * 2], type == HEADINFER_BFLOAT16 ? &brain : &half, 2);
  }
  return tensor;
}

class Case {
 public:
  explicit Case(const Shape &s, uint32_t seed) : s_(s) {
    const int64_t heads = s.kv_heads * s.q_per_kv;
    q_ = tensor(s.batch * heads * s.rows * s.key_dim, s.type, seed);
    k_ = tensor(s.batch * s.kv_heads * s.keys * s.key_dim, s.type, seed);
    v_ = tensor(s.batch * s.kv_heads * s.keys * s.value_dim, s.type, seed);
    bias_ = tensor(heads * s.keys, HEADINFER_FLOAT32, seed);
    outputs_ = s.batch * heads * s.rows;
    args_.q = q_->get();
    args_.k = k_->get();
    args_.v = v_->get();
    args_.batch = s.batch;
    args_.kv_heads = s.kv_heads;
    args_.q_per_kv = s.q_per_kv;
    args_.rows = s.rows;
    args_.keys = s.keys;
    args_.key_dim = s.key_dim;
    args_.value_dim = s.value_dim;
    const int64_t q[4] = {heads * s.rows * s.key_dim, s.rows * s.key_dim, s.key_dim, 1};
    const int64_t k[3] = {s.kv_heads * s.keys * s.key_dim, s.keys * s.key_dim, s.key_dim};
    const int64_t v[3] = {s.kv_heads * s.keys * s.value_dim, s.keys * s.value_dim, s.value_dim};
    const int64_t bias[4] = {0, s.keys, 0, 1};
    std::memcpy(args_.q_stride, q, sizeof q);
    std::memcpy(args_.k_stride, k, sizeof k);
    std::memcpy(args_.v_stride, v, sizeof v);
    std::memcpy(args_.bias_stride, bias, sizeof bias);
    if (s.biased) {
      args_.bias = bias_->get();
      args_.biased = HEADINFER_FLOAT_BIAS;
    }
    args_.scale = 0.5f;
    args_.softcap = s.softcap;
    args_.type = s.type;
    args_.causal = s.causal ? 1 : 0;
  }

  // True when all levels are near double precision and thread counts give the same bits.
  bool holds() const {
    const std::vector<double> exact = reference();
    for (int32_t level = 0; level < headinfer_level_count(); ++level) {
      if (!headinfer_level_runs(level)) continue;
      const std::vector<float> one = run(level, 1);
      for (size_t i = 0; i < exact.size(); ++i)
        if (!(std::fabs(one[i] - exact[i]) < 1e-4)) {
          std::printf("%s: output %zu is %g, not %g\n", headinfer_level_name(level), i,
                      static_cast<double>(one[i]), exact[i]);
          return false;
        }
      for (const int32_t threads : {2, 3, 7})
        if (run(level, threads) != one) {
          std::printf("%s: other bits with %d threads\n", headinfer_level_name(level), threads);
          return false;
        }
    }
    return true;
  }

  // True when a job whose keys are cut in three gives what one call gives.
  bool joins() const {
    const std::vector<float> whole = run(-1, 3);
    headinfer_attend_args cut[3] = {args_, args_, args_};
    std::unique_ptr<float[]> outs[3], lses[3];
    const int64_t edges[4] = {0, s_.keys / 3, s_.keys / 2, s_.keys};
    const int64_t width[3] = {4, 2, 2};
    for (int i = 0; i < 3; ++i) {
      outs[i] = block<float>(outputs_ * s_.value_dim);
      lses[i] = block<float>(outputs_);
      cut[i].out = outs[i].get();
      cut[i].lse = lses[i].get();
      cut[i].keys = edges[i + 1] - edges[i];
      cut[i].level = -1;
      cut[i].threads = 2 + i;
      cut[i].k = k_->get() + edges[i] * s_.key_dim * width[s_.type];
      cut[i].v = v_->get() + edges[i] * s_.value_dim * width[s_.type];
      if (s_.biased) cut[i].bias = bias_->get() + edges[i] * 4;
    }
    auto out = block<float>(outputs_ * s_.value_dim);
    auto lse = block<float>(outputs_);
    headinfer_near_job job{cut, nullptr, out.get(), lse.get(), 0, 0, 3, -1};
    headinfer_near_run(&job);
    if (job.status != HEADINFER_OK || job.ended < job.started) return false;
    for (int64_t i = 0; i < outputs_ * s_.value_dim; ++i)
      if (!(std::fabs(out[i] - whole[static_cast<size_t>(i)]) < 1e-5)) return false;
    cut[1].threads = 0;  // refused: nothing of it may look like a result
    headinfer_near_run(&job);
    return job.status == HEADINFER_BAD_THREADS && std::isnan(out[0]) && std::isnan(lse[0]);
  }

 private:
  // out, then lse.
  std::vector<float> run(int32_t level, int32_t threads) const {
    auto out = block<float>(outputs_ * s_.value_dim);
    auto lse = block<float>(outputs_);
    headinfer_attend_args args = args_;
    args.out = out.get();
    args.lse = lse.get();
    args.level = level;
    args.threads = threads;
    if (headinfer_attend(&args) != HEADINFER_OK) return {};
    std::vector<float> found(out.get(), out.get() + outputs_ * s_.value_dim);
    found.insert(found.end(), lse.get(), lse.get() + outputs_);
    return found;
  }

  std::vector<double> reference() const {
    std::vector<double> out, lse;
    const int64_t heads = s_.kv_heads * s_.q_per_kv;
    for (int64_t index = 0; index < outputs_; ++index) {
      const int64_t row = index % s_.rows, head = index / s_.rows % heads;
      const int64_t kv = index / s_.rows / heads * s_.kv_heads + head / s_.q_per_kv;
      const int64_t keys = s_.causal ? row + 1 : s_.keys;
      std::vector<double> mean(static_cast<size_t>(s_.value_dim));
      double total = 0;
      for (int64_t key = 0; key < keys; ++key) {
        double score = 0;
        for (int64_t d = 0; d < s_.key_dim; ++d)
          score += double{widen(q_->get(), index * s_.key_dim + d, s_.type)} *
                   widen(k_->get(), (kv * s_.keys + key) * s_.key_dim + d, s_.type);
        score *= 0.5;
        if (s_.softcap > 0) score = s_.softcap * std::tanh(score / s_.softcap);
        if (s_.biased) score += widen(bias_->get(), head * s_.keys + key, HEADINFER_FLOAT32);
        const double weight = std::exp(score);
        total += weight;
        for (int64_t d = 0; d < s_.value_dim; ++d)
          mean[static_cast<size_t>(d)] +=
              weight * widen(v_->get(), (kv * s_.keys + key) * s_.value_dim + d, s_.type);
      }
      for (const double sum : mean) out.push_back(sum / total);
      lse.push_back(std::log(total));
    }
    out.insert(out.end(), lse.begin(), lse.end());
    return out;
  }

  Shape s_;
  std::unique_ptr<Guarded> q_, k_, v_, bias_;
  int64_t outputs_;
  headinfer_attend_args args_{};
};

const Shape kShapes[] = {
    {1, 2, 4, 1, 1100, 64, 64, HEADINFER_BFLOAT16, false, false, 0},
    {2, 1, 7, 3, 129, 80, 48, HEADINFER_FLOAT16, false, true, 0},
    {1, 1, 3, 37, 37, 33, 17, HEADINFER_FLOAT32, true, false, 3},
    {1, 3, 1, 1, 1, 128, 128, HEADINFER_BFLOAT16, false, false, 0},
    {1, 1, 16, 5, 65, 40, 256, HEADINFER_FLOAT16, false, false, 2},
    {1, 2, 2, 40, 40, 16, 24, HEADINFER_BFLOAT16, true, true, 0},
};

bool all_hold(uint32_t seed) {
  for (const Shape &shape : kShapes)
    if (!Case(shape, seed).holds() || (!shape.causal && !Case(shape, seed).joins())) return false;
  return true;
}

bool memory_holds() {
  const int64_t nbytes = 3 * 4096 + 5;
  auto memory = block<char>(nbytes);
  for (int64_t i = 0; i < nbytes; ++i) memory[static_cast<size_t>(i)] = static_cast<char>(i);
  double seconds = -1;
  if (headinfer_touch(memory.get() + 1, nbytes - 1, 3) != HEADINFER_OK) return false;
  if (headinfer_read(memory.get(), nbytes, 3, &seconds) != HEADINFER_OK) return false;
  for (int64_t i = 0; i < nbytes; ++i)
    if (memory[static_cast<size_t>(i)] != static_cast<char>(i)) return false;
  return seconds >= 0 && headinfer_touch(nullptr, 1, 1) == HEADINFER_NULL_POINTER &&
         headinfer_touch(memory.get(), 1, 0) == HEADINFER_BAD_THREADS;
}

// Several callers write odd pieces of one file and read them back, each after its own writes.
bool disk_caller_holds(void *queue, int64_t first, unsigned char mark) {
  constexpr int64_t kBytes = 5000;
  unsigned char data[kBytes], found[kBytes];
  for (int64_t turn = 0; turn < 40; ++turn) {
    const int64_t nbytes = kBytes - 100 * turn, offset = first + 37 * turn;
    std::memset(data, mark + static_cast<int>(turn), static_cast<size_t>(nbytes));
    const headinfer_disk_op write = {offset, data, nbytes}, read = {offset, found, nbytes};
    const int64_t written = headinfer_disk_job(queue, 1, 0);
    const int64_t wanted = headinfer_disk_job(queue, 0, written);
    headinfer_disk_fault fault = {};
    if (headinfer_disk_start(queue, wanted, &read, 1) != HEADINFER_OK) return false;
    if (headinfer_disk_start(queue, written, &write, 1) != HEADINFER_OK) return false;
    if (headinfer_disk_ask(queue, wanted, 1, 1, &fault) != 1 || fault.code != 0) return false;
    if (headinfer_disk_ask(queue, written, 1, 1, &fault) != 1 || fault.code != 0) return false;
    if (std::memcmp(data, found, static_cast<size_t>(nbytes)) != 0) return false;
  }
  return true;
}

bool disk_holds(int64_t alignment) {
  std::FILE *file = std::tmpfile();
  if (file == nullptr || ftruncate(fileno(file), 1 << 20) != 0) return false;
  void *queue = headinfer_disk_open(fileno(file), alignment, 4096, 4);
  if (queue == nullptr) return false;
  bool held[4] = {};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)  // neighbours share blocks of the file
    callers.emplace_back([&held, queue, i] {
      held[i] = disk_caller_holds(queue, 7000 * i, static_cast<unsigned char>(50 * i));
    });
  for (std::thread &caller : callers) caller.join();
  // The end of the file is a fault, and what could not be written cannot be read.
  char byte = 0;
  const headinfer_disk_op beyond = {int64_t{1} << 21, &byte, 1}, lost = {8192, &byte, 1};
  headinfer_disk_fault fault = {};
  int64_t job = headinfer_disk_job(queue, 0, 0);
  bool good = headinfer_disk_start(queue, job, &beyond, 1) == HEADINFER_OK &&
              headinfer_disk_ask(queue, job, 1, 1, &fault) == 1 &&
              fault.code == HEADINFER_DISK_SHORT;
  job = headinfer_disk_job(queue, 1, 0);
  good = good && headinfer_disk_fail(queue, job, 5, &lost, 1) == HEADINFER_OK;
  job = headinfer_disk_job(queue, 0, 0);
  good = good && headinfer_disk_start(queue, job, &lost, 1) == HEADINFER_OK &&
         headinfer_disk_ask(queue, job, 1, 1, &fault) == 1 && fault.code == 5 &&
         headinfer_disk_lost(queue, 0, &fault) == 1 && fault.offset == 8192 && fault.nbytes == 1 &&
         headinfer_disk_lost(queue, 1, &fault) == 0;
  headinfer_disk_drain(queue);
  headinfer_disk_close(queue);
  std::fclose(file);
  return good && held[0] && held[1] && held[2] && held[3] &&
         headinfer_disk_open(-1, 0, 4096, 1) == nullptr;
}

bool child_holds() {
  const pid_t child = fork();
  if (child == 0) _exit(all_hold(7) ? 0 : 1);
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

int main(int count, char **) {
  bool held[3] = {};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i)
    callers.emplace_back([&held, i] { held[i] = all_hold(static_cast<uint32_t>(i) + 1); });
  for (std::thread &caller : callers) caller.join();
  // ThreadSanitizer does not follow a fork of a process with threads: any argument leaves it out.
  const bool forked = count > 1 || child_holds();
  const bool good = held[0] && held[1] && held[2] && memory_holds() && disk_holds(0) &&
                    disk_holds(4096) && forked;
  std::puts(good ? "ok" : "failed");
  return good ? 0 : 1;
}
