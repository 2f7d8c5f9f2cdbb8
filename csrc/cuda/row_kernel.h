// The kernel: a cluster takes a row, each of its blocks a slice that stays in shared memory from its one read to its
// one write. Warps have roles, and meet at barriers:
//
//   loader    global memory -> ring, as far ahead as there is room             filled
//   consumers sums of a slice (swept); later its gradient, in place            written
//   settler   sums -> all blocks of the cluster (arrived) -> loss and slope    settled
//   storer    ring -> global memory                                            emptied
//
// Consumers sum one row before they write the gradient of the row before it: the exchange costs no time.
#pragma once

#include "loading.h"

namespace grpo {

template <class T, Mode kMode>
class Consumer {
 public:
  using real = real_of<T>;

  GRPO_DEVICE Consumer(const Job<T, kMode>& job, Shared& shared)
      : job_(job), shared_(shared), warp_(port::thread_index() / 32), first_lane_(port::thread_index() % 32 == 0) {}

  GRPO_DEVICE void run() {
    const int count = job_.count(), lag = kMode == kFusedLoss && job_.ahead ? 1 : 0;
    for (int i = 0; i < count + lag; ++i) {
      if (job_.kSums && i < count) sum(i);
      if (job_.kGradient && i >= lag) write(i - lag);
    }
  }

 private:
  // The sums of the index-th row's slice.
  GRPO_DEVICE void sum(int index) {
    shared_.filled[summed_.place].wait(summed_.lap);
    const RowInfo& info = shared_.info[summed_.place];
    const int target = info.target;
    const Anchor<real> anchor(info.value, job_.map.slope);
    const T* slice = job_.slice(info.row);
    Sums<real> sums(anchor);
    for (int tile = 0; tile < job_.tiles; ++tile, summed_.next(job_.p.tiles)) {
      shared_.filled[summed_.place].wait(summed_.lap);
      sweep_sums(job_.piece(shared_, summed_.place, slice, tile, target), job_.map, anchor, sums);
      if (kMode == kLogProbs) signal(shared_.emptied[summed_.place]);
    }
    const Partial<real> partial = warp_sums(sums, anchor, job_.map.slope);
    const int turn = index % kRowsAhead;
    if (index >= kRowsAhead) shared_.settled[turn].wait(index / kRowsAhead - 1 & 1);  // its place is free
    if (first_lane_) {
      shared_.warps[turn][warp_] = {partial.reference, partial.sum, partial.weighted, 0};
      shared_.swept[turn].arrive();
    }
  }

  // The gradient of the index-th row's slice.
  GRPO_DEVICE void write(int index) {
    shared_.filled[written_.place].wait(written_.lap);
    const RowInfo& info = shared_.info[written_.place];
    const int target = info.target;
    const T* slice = job_.slice(info.row);
    const int turn = index % kRowsAhead;
    if (kMode == kFusedLoss) shared_.settled[turn].wait(index / kRowsAhead & 1);
    const GradientTerms<real> terms = kept_terms<real>(kMode == kFusedLoss ? shared_.terms[turn] : info.terms);
    for (int tile = 0; tile < job_.tiles; ++tile, written_.next(job_.p.tiles)) {
      if (kMode == kLogProbsBackward) shared_.filled[written_.place].wait(written_.lap);
      sweep_gradient(job_.piece(shared_, written_.place, slice, tile, target), job_.map, terms);
      port::fence_for_bulk();
      signal(shared_.written[written_.place]);
    }
  }

  // Once for each warp, when all its lanes are there.
  GRPO_DEVICE void signal(port::Barrier& barrier) {
    port::sync_warp();
    if (first_lane_) barrier.arrive();
  }

  const Job<T, kMode>& job_;
  Shared& shared_;
  const int warp_;
  const bool first_lane_;
  Cursor summed_, written_;
};

// Sums of a block's slice -> scratch, from which finish_kernel takes them.
template <class T>
GRPO_DEVICE void keep_sums(const Job<T, kLogProbs>& job, Shared& shared) {
  using real = real_of<T>;
  const int count = job.count();
  for (int index = 0; index < count; ++index) {
    const int turn = index % kRowsAhead;
    const int64_t row = job.row_of(index);
    shared.swept[turn].wait(index / kRowsAhead & 1);
    const Partial<real> mine = merged(shared.warps[turn], kConsumerWarps, job.map.slope);
    port::sync_warp();
    if (port::thread_index() % 32 != 0) continue;
    static_cast<Partial<real>*>(job.p.partials)[row * job.p.cluster + job.rank] = mine;
    shared.settled[turn].arrive();
  }
}

template <class real>
GRPO_DEVICE void put_stats(const GrpoCall& call, int64_t row, const RowStats& stats) {
  static_cast<real*>(call.log_prob)[row] = real(stats.log_prob);
  static_cast<real*>(call.entropy)[row] = real(stats.entropy);
  static_cast<real*>(call.anchor)[row] = real(stats.anchor);
  static_cast<real*>(call.log_sum)[row] = real(stats.log_sum);
}

// Sums of all slices -> log-prob, terms of the loss and slopes, the same in each block; one writes them down.
template <class T>
GRPO_DEVICE void settle_rows(const Job<T, kFusedLoss>& job, Shared& shared) {
  using real = real_of<T>;
  constexpr int pieces = int(sizeof(Partial<real>)) / 16;
  const int lane = port::thread_index() % 32, count = job.count();
  const double grad_scale = job.at(job.p.numbers, kGradScale);
  Cursor first;
  int row = count > 0 ? job.row_of(0) : 0;
  Token<real> token{};
  real entropy_weight = 0;
  const auto read_token = [&] {
    token = token_of<real>(job.p, row);
    entropy_weight = job.p.entropy_weight ? job.at(job.p.entropy_weight, row) : real(0);
  };
  if (count > 0) read_token();
  for (int index = 0; index < count; ++index) {
    const int turn = index % kRowsAhead, settled_row = row;
    Token<real> settled = token;
    const double h = -grad_scale * entropy_weight;

    shared.swept[turn].wait(index / kRowsAhead & 1);
    const RowInfo& info = shared.info[first.place];
    const double value = info.value, logit = info.logit;
    union {
      Partial<real> sums;
      uint32_t words[pieces][4];
    } mine;
    mine.sums = merged(shared.warps[turn], kConsumerWarps, job.map.slope);
    if (lane == 0) {
      shared.arrived[turn].expect(job.p.cluster * int(sizeof(mine)));
      shared.arrived[turn].arrive();
    }
    port::sync_warp();
    Partial<real>* slices = reinterpret_cast<Partial<real>*>(shared.slices[turn]);
    if (lane < job.p.cluster) {
      for (int i = 0; i < pieces; ++i) {
        void* slot = reinterpret_cast<unsigned char*>(slices + job.rank) + 16 * i;
        port::send(lane, slot, mine.words[i], shared.arrived[turn]);
      }
    }
    if (index + 1 < count) {  // while the sums are on their way
      row = job.row_of(index + 1);
      read_token();
    }
    shared.arrived[turn].wait_for_cluster(index / kRowsAhead & 1);

    const double slope = job.map.slope;
    const RowStats stats = row_stats(merged(slices, job.p.cluster, slope), value, slope);
    settled.log_prob = real(stats.log_prob);
    settled.entropy = real(stats.entropy);
    const TokenTerms<real> terms = terms_of(job.p, settled);
    // From the rounded outputs, so that one pass and two passes write the same bits.
    const GradientTerms<real> gradient =
        row_gradient<real>(settled.log_prob, settled.entropy, real(stats.anchor), real(stats.log_sum),
                           grad_scale * terms.slope, h, logit, job.map);
    port::sync_warp();
    for (int tile = 0; tile < job.tiles; ++tile) first.next(job.p.tiles);
    if (lane != 0) continue;
    keep_terms(shared.terms[turn], gradient);
    shared.settled[turn].arrive();
    if (job.rank == 0) {
      put_stats<real>(job.p, settled_row, stats);
      put_terms(job.p, settled_row, terms);
    }
  }
}

template <Mode kMode>
GRPO_DEVICE void prepare(Shared& shared, int tiles) {
  const int thread = port::thread_index();
  for (int i = thread; i < kZeroBytes; i += kThreads) shared.zeros[i] = 0;
  if (thread == 0) {
    for (int i = 0; i < tiles; ++i) {
      shared.filled[i].init(1);
      shared.written[i].init(kConsumerWarps);
      shared.emptied[i].init(kMode == kLogProbs ? kConsumerWarps : 1);
    }
    for (int i = 0; i < kRowsAhead; ++i) {
      shared.swept[i].init(kConsumerWarps);
      shared.arrived[i].init(1);
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
  prepare<kMode>(shared, params.tiles);
  if (kMode == kFusedLoss) port::sync_cluster();  // nobody sends to barriers that are not there yet

  const int warp = port::thread_index() / 32;
  if (warp < kConsumerWarps) {
    Consumer<T, kMode>(job, shared).run();
  } else if (warp == kLoader) {
    load_rows(job, shared);
  } else if (warp == kStorer) {
    if constexpr (kMode != kLogProbs) store_rows(job, shared);
  } else {
    if constexpr (kMode == kLogProbs) keep_sums(job, shared);
    if constexpr (kMode == kFusedLoss) settle_rows(job, shared);
  }
  if (kMode == kFusedLoss) port::sync_cluster();  // nor to blocks that are gone
}

}  // namespace grpo
