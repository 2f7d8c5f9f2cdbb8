// The kernel: a cluster takes a row, each of its blocks a slice that stays in shared memory from its one read to its
// one write. Warps have roles, and meet at barriers:
//
//   loader    global memory -> ring, as far ahead as there is room             filled
//   consumers sums of a slice (swept); later its gradient, in place            written
//   settlers  sums -> all blocks of the cluster (arrived) -> loss and slope    settled
//   storer    ring -> global memory                                            emptied
//
// Consumers sum one row before they write the gradient of the row before it: the exchange costs no time. A row beside
// its teacher's is swept once more between the two, by what has been settled of both: its divergence. So it is settled
// twice, each time while the consumers are at another row.
#pragma once

#include "consumer.h"
#include "loading.h"
#include "settler.h"

namespace grpo {

template <class T, Mode kMode>
GRPO_DEVICE void prepare(const Job<T, kMode>& job, Shared& shared) {
  using real = real_of<T>;
  const int thread = port::thread_index();
  for (int i = thread; i < kZeroBytes; i += kThreads) shared.zeros[i] = 0;
  if (thread < kNumbers) reinterpret_cast<real*>(shared.numbers)[thread] = job.at(job.p.numbers, thread);
  if (thread == 0) {
    for (int i = 0; i < job.p.tiles; ++i) {
      shared.filled[i].init(1);
      shared.written[i].init(kConsumerWarps);
      shared.emptied[i].init(job.kGradient ? 1 : kConsumerWarps);
    }
    for (int i = 0; i < kRowsAhead; ++i) {
      shared.swept[i].init(kConsumerWarps);
      shared.arrived[i].init(1);
      shared.drained[i].init(job.p.cluster);
      shared.settled[i].init(1);
    }
    port::fence_barriers();
  }
  port::fence_for_bulk();
  port::sync_block();
}

template <class T, Mode kMode>
GRPO_KERNEL GRPO_BOUNDS(kThreads) row_kernel(GRPO_PARAMETERS GrpoCudaParams params) {
  Shared& shared = port::shared<Shared>();
  const Job<T, kMode> job(params);
  prepare(job, shared);
  if (job.kFused) port::sync_cluster();  // nobody sends to barriers that are not there yet

  const int warp = port::thread_index() / 32;
  if (warp < kConsumerWarps) {
    Consumer<T, kMode>(job, shared).run();
  } else if (warp == kLoader) {
    load_rows(job, shared);
  } else if (warp == kStorer) {
    if constexpr (job.kGradient) store_rows(job, shared);
  } else {
    if constexpr (!job.kGradient) keep_sums(job, shared, warp - kSettler);
    if constexpr (job.kFused)
      if (job.count() > 0) Settler<T, kMode>(job, shared, warp - kSettler).run();
  }
  if (job.kFused) port::sync_cluster();  // nor to blocks that are gone
}

}  // namespace grpo
