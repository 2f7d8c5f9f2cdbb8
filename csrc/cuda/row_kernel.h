// The kernel: a cluster takes a row, each of its blocks a slice that stays in shared memory from its one read to its
// one write. Warps have roles, and meet at barriers:
//
//   loader    global memory -> ring, as far ahead as there is room             filled
//   consumers sums of a slice (swept); later its gradient, in place            written
//   settlers  sums -> all blocks of the cluster (arrived) -> loss and slope    settled
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
    const LogitMap<real> map = job_.map_of(info);
    const Anchor<real> anchor(info.value, map.slope);
    const T* slice = job_.slice(info.row);
    Sums<real> sums(anchor);
    for (int tile = 0; tile < job_.tiles; ++tile, summed_.next(job_.p.tiles)) {
      shared_.filled[summed_.place].wait(summed_.lap);
      sweep_sums(job_.piece(shared_, summed_.place, slice, tile, target), map, anchor, sums);
      if (kMode == kLogProbs) signal(shared_.emptied[summed_.place]);
    }
    const Partial<real> partial = warp_sums(sums, anchor, map.slope);
    const int turn = index % kRowsAhead;
    if (index >= kRowsAhead) shared_.settled[turn].wait(index / kRowsAhead - 1 & 1);  // its place is free
    port::sync_warp();  // what its lanes have read may be overwritten after this, by whoever has those columns then
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
    const LogitMap<real> map = job_.map_of(info);
    const T* slice = job_.slice(info.row);
    const int turn = index % kRowsAhead;
    if (kMode == kFusedLoss) shared_.settled[turn].wait(index / kRowsAhead & 1);
    const GradientTerms<real> terms = kept_terms<real>(kMode == kFusedLoss ? shared_.terms[turn] : info.terms);
    for (int tile = 0; tile < job_.tiles; ++tile, written_.next(job_.p.tiles)) {
      if (kMode == kLogProbsBackward) shared_.filled[written_.place].wait(written_.lap);
      sweep_gradient(job_.piece(shared_, written_.place, slice, tile, target), map, terms);
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

// The warps' sums of a row's slice, in every lane.
template <class real>
GRPO_DEVICE Partial<real> slice_sums(const Shared& shared, int turn, real slope) {
  const Partial<double>& mine = shared.warps[turn][port::thread_index() % kConsumerWarps];
  Sums<real> sums(Partial<real>{real(mine.reference), real(mine.sum), real(mine.weighted), 0});
  merge_lanes<kConsumerWarps>(sums, slope);
  return {sums.reference, sums.sum, sums.weighted, 0};
}

// Sums of a block's slice -> scratch, from which finish_kernel takes them. A settler has every kSettlers-th row.
template <class T>
GRPO_DEVICE void keep_sums(const Job<T, kLogProbs>& job, Shared& shared, int turn) {
  using real = real_of<T>;
  const int count = job.count();
  for (int index = turn; index < count; index += kSettlers) {
    const int64_t row = job.row_of(index);
    const real slope = job.map_of(int(row)).slope;  // not from the ring, whose place the loader may have taken again
    shared.swept[turn].wait(index / kRowsAhead & 1);
    const Partial<real> mine = slice_sums<real>(shared, turn, slope);
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

// Sums of all slices -> log-prob, terms of the loss and slopes, the same in each block; one writes them down. A settler
// has every kSettlers-th row, so that one row's chain of dependent operations runs beside another's.
template <class T>
class Settler {
 public:
  using real = real_of<T>;

  GRPO_DEVICE Settler(const Job<T, kFusedLoss>& job, Shared& shared, int turn)
      : job_(job),
        shared_(shared),
        numbers_(reinterpret_cast<const real*>(shared.numbers)),
        turn_(turn),
        lane_(port::thread_index() % 32),
        count_(job.count()) {}

  GRPO_DEVICE void run() {
    // Which row, then what is known of its token: read one row and two rows before they are needed.
    int row = row_of(turn_), next = row_of(turn_ + kSettlers);
    Token<real> token = token_of<real>(job_.p, row);
    real entropy_weight = entropy_weight_of(row);
    Cursor first;
    first.next(job_.p.tiles, turn_ * job_.tiles);
    for (int index = turn_; index < count_; index += kSettlers) {
      const unsigned phase = index / kRowsAhead & 1;
      shared_.swept[turn_].wait(phase);
      const RowInfo& info = shared_.info[first.place];
      const double value = info.value, logit = info.logit;
      const LogitMap<real> map = job_.map_of(info);
      const Partial<real> mine = slice_sums<real>(shared_, turn_, map.slope);
      if (job_.p.cluster > 1) send_to_all(mine, index);

      const int settled_row = row;
      Token<real> settled = token;
      const double h = -numbers_[kGradScale] * double(entropy_weight);
      row = next;
      next = row_of(index + 2 * kSettlers);
      token = token_of<real>(job_.p, row);
      entropy_weight = entropy_weight_of(row);

      const RowStats stats = row_stats(all_slices(mine, phase, map.slope), value, map.slope);
      settled.log_prob = real(stats.log_prob);
      settled.entropy = real(stats.entropy);
      const TokenTerms<real> terms = terms_of(job_.p, numbers_, settled);
      // From the rounded outputs, so that one pass and two passes write the same bits.
      const GradientTerms<real> gradient =
          row_gradient<real>(settled.log_prob, settled.entropy, real(stats.anchor), real(stats.log_sum),
                             numbers_[kGradScale] * double(terms.slope), h, logit, map);
      port::sync_warp();
      first.next(job_.p.tiles, kSettlers * job_.tiles);
      if (lane_ != 0) continue;
      keep_terms(shared_.terms[turn_], gradient);
      shared_.settled[turn_].arrive();
      if (job_.rank == 0) {
        put_stats<real>(job_.p, settled_row, stats);
        put_terms(job_.p, settled_row, terms);
      }
    }
  }

 private:
  // The last row again where there is none: nobody uses what is read of it.
  GRPO_DEVICE int row_of(int index) const { return job_.row_of(index < count_ ? index : count_ - 1); }
  GRPO_DEVICE real entropy_weight_of(int row) const {
    return job_.p.entropy_weight ? job_.at(job_.p.entropy_weight, row) : real(0);
  }

  // To the slot of this block in every block of the cluster, this one too.
  GRPO_DEVICE void send_to_all(const Partial<real>& mine, int index) {
    constexpr int pieces = int(sizeof(mine)) / 16;
    uint32_t words[pieces][4];
    memcpy(words, &mine, sizeof(mine));
    // The others have read what was sent to those slots before.
    if (index >= kRowsAhead) shared_.drained[turn_].wait_for_cluster(index / kRowsAhead - 1 & 1);
    if (lane_ == 0) {
      shared_.arrived[turn_].expect(job_.p.cluster * int(sizeof(mine)));
      shared_.arrived[turn_].arrive();
    }
    port::sync_warp();
    if (lane_ >= job_.p.cluster) return;
    unsigned char* slot = reinterpret_cast<unsigned char*>(slices() + job_.rank);
    for (int i = 0; i < pieces; ++i) port::send(lane_, slot + 16 * i, words[i], shared_.arrived[turn_]);
  }

  // The row's sums. A block alone has them; it may not send, not even to itself.
  GRPO_DEVICE Partial<double> all_slices(const Partial<real>& mine, unsigned phase, real slope) {
    if (job_.p.cluster == 1) return {mine.reference, mine.sum, mine.weighted, 0};
    shared_.arrived[turn_].wait_for_cluster(phase);
    const Partial<double> total = merged<double>(slices(), job_.p.cluster, slope);
    port::sync_warp();
    if (lane_ < job_.p.cluster) shared_.drained[turn_].arrive_at(lane_);
    return total;
  }

  GRPO_DEVICE Partial<real>* slices() { return reinterpret_cast<Partial<real>*>(shared_.slices[turn_]); }

  const Job<T, kFusedLoss>& job_;
  Shared& shared_;
  const real* numbers_;
  const int turn_, lane_, count_;
};

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
      shared.emptied[i].init(kMode == kLogProbs ? kConsumerWarps : 1);
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
  if (kMode == kFusedLoss) port::sync_cluster();  // nobody sends to barriers that are not there yet

  const int warp = port::thread_index() / 32;
  if (warp < kConsumerWarps) {
    Consumer<T, kMode>(job, shared).run();
  } else if (warp == kLoader) {
    load_rows(job, shared);
  } else if (warp == kStorer) {
    if constexpr (kMode != kLogProbs) store_rows(job, shared);
  } else {
    if constexpr (kMode == kLogProbs) keep_sums(job, shared, warp - kSettler);
    if constexpr (kMode == kFusedLoss)
      if (job.count() > 0) Settler<T>(job, shared, warp - kSettler).run();
  }
  if (kMode == kFusedLoss) port::sync_cluster();  // nor to blocks that are gone
}

}  // namespace grpo
