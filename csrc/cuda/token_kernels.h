// The kernels with a thread for each row: which rows are live, and log-probs from the sums of slices.
#pragma once

#include "row_kernel.h"

namespace grpo {

constexpr int kOrderThreads = 1024, kOrderWarps = kOrderThreads / 32, kRowsPerThread = 8;

// Whether a row has to be read: it is live, and its gradient is not known to be 0.
template <class real, Mode kMode>
GRPO_DEVICE bool has_work(const GrpoCudaParams& p, int64_t r) {
  if (p.live && !p.live[r]) return false;
  if (kMode != kLogProbsBackward && kMode != kDivergenceBackward) return true;
  if (kMode == kDivergenceBackward && static_cast<const real*>(p.grad_divergence)[r] != 0) return true;
  const real g = p.grad_log_prob ? static_cast<const real*>(p.grad_log_prob)[r] : 0;
  const real h = p.grad_entropy ? static_cast<const real*>(p.grad_entropy)[r] : 0;
  return !(g == 0 && h == 0);
}

// Live rows from the front of `order`, the others from its back, both in the order of rows. One block.
template <class real, Mode kMode>
GRPO_KERNEL GRPO_BOUNDS(kOrderThreads) order_kernel(GRPO_PARAMETERS GrpoCudaParams p) {
  struct Counts {
    int warp[kOrderWarps];
  };
  Counts& counts = port::shared<Counts>();
  const int thread = port::thread_index(), lane = thread % 32, warp = thread / 32, rows = int(p.rows);
  int live_before = 0;  // rows of earlier rounds
  for (int start = 0; start < rows; start += kOrderThreads * kRowsPerThread) {
    const int first = start + thread * kRowsPerThread;
    unsigned mine = 0;
    int upto = 0;  // live rows of this thread, then of this lane and those before it
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {  // all reads at once
      const int r = first + i < rows ? first + i : rows - 1;
      const bool work = has_work<real, kMode>(p, r) && first + i < rows;
      mine |= unsigned(work) << i;
      upto += work;
    }
    const int own = upto;
    for (int step = 1; step < 32; step *= 2) {
      const int below = port::shuffle(upto, lane >= step ? lane - step : lane);
      if (lane >= step) upto += below;
    }
    if (lane == 31) counts.warp[warp] = upto;
    port::sync_block();
    int place = live_before + upto - own;
    for (int i = 0; i < kOrderWarps; ++i) {
      if (i < warp) place += counts.warp[i];
      live_before += counts.warp[i];
    }
    port::sync_block();
    for (int i = 0; i < kRowsPerThread && first + i < rows; ++i) {
      const int r = first + i;
      if (mine >> i & 1) {
        p.order[place++] = r;
        continue;
      }
      p.order[rows - 1 - (r - place)] = r;
      if (kMode == kFusedLoss || kMode == kFusedDivergence) {
        put_stats<real>(p, r, {0, 0, 0, 0});
        put_terms<real>(p, r, {});
      }
      if (kMode == kFusedDivergence) {
        put_teacher_stats<real>(p, r, {0, 0, 0, 0});
        put_divergence<real>(p, r, {0, 0, 0, 0});
      }
    }
  }
  if (thread == 0) p.order[rows] = live_before;
}

// From what slices have to say.
template <class T>
GRPO_DEVICE void finish_row(const GrpoCudaParams& p, int64_t r, const Job<T, kLogProbs>& job) {
  using real = real_of<T>;
  if (p.live && !p.live[r]) return put_stats<real>(p, r, {0, 0, 0, 0});
  const Partial<real>* slices = static_cast<const Partial<real>*>(p.partials) + r * p.cluster;
  const double slope = job.map_of(int(r)).slope, value = job.value_of(job.sampled_logit(int(r)));
  put_stats(p, r, rounded<real>(row_stats(merged<double>(slices, p.cluster, slope), value, slope)));
}
template <class T>
GRPO_DEVICE void finish_row(const GrpoCudaParams& p, int64_t r, const Job<T, kDivergence>& job) {
  using real = real_of<T>;
  if (p.live && !p.live[r]) return put_divergence<real>(p, r, {0, 0, 0, 0});
  const DivergenceSums<real>* slices = static_cast<const DivergenceSums<real>*>(p.partials) + r * p.cluster;
  const PairMap<real> map = job.pair_map(job.map_of(int(r)), job.teacher_map_of(int(r)));
  put_divergence<real>(p, r, finish_divergence(merged(slices, p.cluster), job.known_odds(int(r), map), map));
}

template <class T, Mode kMode>
GRPO_KERNEL GRPO_BOUNDS(kConsumers) finish_kernel(GRPO_PARAMETERS GrpoCudaParams p) {
  const int64_t r = int64_t(port::block_index()) * kConsumers + port::thread_index();
  if (r < p.rows) finish_row(p, r, Job<T, kMode>(p));
}

}  // namespace grpo
