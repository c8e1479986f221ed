// SPDX-License-Identifier: Apache-2.0
// A job of near-data attention: several attention calls over runs of one context, merged into one
// result. Shaped as a host function of a CUDA stream, which calls it when the queries have arrived
// and goes on when it returns.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "headinfer_native.h"
#include "tile.h"

namespace headinfer {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

double now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

// out becomes the mean of the calls' results weighted by exp(lse); returns the log of the sum.
// A row that met a NaN or +inf score has that as its log-sum-exp, as in a single call.
float merge_row(const headinfer_near_job &job, int64_t row, int64_t dim, float *out) {
  float most = -kInfinity;
  for (int32_t i = 0; i < job.count && !std::isnan(most); ++i) {
    const float mine = job.calls[i].lse[row];
    if (mine > most || std::isnan(mine)) most = mine;
  }
  const bool counts = most > -kInfinity && most < kInfinity;
  double total = 0;
  std::fill(out, out + dim, 0.0f);
  for (int32_t i = 0; i < job.count; ++i) {
    const double share = counts ? std::exp(double{job.calls[i].lse[row]} - most) : 0.0;
    total += share;
    // Added even where the share is 0: values that are NaN or infinite have to show.
    const float factor = static_cast<float>(share);
    const float *from = job.calls[i].out + row * dim;
    for (int64_t column = 0; column < dim; ++column) out[column] += factor * from[column];
  }
  if (!counts) return most;
  for (int64_t column = 0; column < dim; ++column)
    out[column] = static_cast<float>(out[column] / total);
  return static_cast<float>(most + std::log(total));
}

}  // namespace
}  // namespace headinfer

void headinfer_near_run(void *given) {
  using namespace headinfer;
  headinfer_near_job &job = *static_cast<headinfer_near_job *>(given);
  job.started = now();
  const headinfer_attend_args &first = job.calls[0];
  const int64_t rows = first.batch * first.kv_heads * first.q_per_kv * first.rows;
  const int64_t dim = first.value_dim;
  job.status = attend_runs(job.calls, job.packed, job.count);
  if (job.status != HEADINFER_OK) {
    // Nobody can be told here, and the stream goes on: what it reads must not look like a result.
    std::fill(job.out, job.out + rows * dim, std::numeric_limits<float>::quiet_NaN());
    std::fill(job.lse, job.lse + rows, std::numeric_limits<float>::quiet_NaN());
  } else if (job.count > 1) {
    for (int64_t row = 0; row < rows; ++row)
      job.lse[row] = merge_row(job, row, dim, job.out + row * dim);
  }
  job.ended = now();
}
