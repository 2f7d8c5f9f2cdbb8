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

#include "loading.h"

namespace grpo {

// A row has as many turns at the barriers of its place as it is settled times.
template <Mode kMode>
constexpr int kStages = kMode == kFusedDivergence ? 2 : 1;
template <Mode kMode>
GRPO_DEVICE int turn_at(int index, int stage) {
  return kStages<kMode> * (index / kRowsAhead) + stage;
}

// What a fused pair's slice has to say first.
template <class real>
struct alignas(16) PartialPair {
  Partial<real> policy, teacher;
};

template <class real>
GRPO_DEVICE Partial<double> widened(const Partial<real>& partial) {
  return {partial.reference, partial.sum, partial.weighted, 0};
}
template <class real>
GRPO_DEVICE PartialPair<double> merged_pairs(const PartialPair<real>* slices, int count, real slope,
                                             real teacher_slope) {
  Sums<double> policy(widened(slices[0].policy)), teacher(widened(slices[0].teacher));
  for (int i = 1; i < count; ++i) {
    const Partial<real>&p = slices[i].policy, &q = slices[i].teacher;
    policy.merge(p.reference, p.sum, p.weighted, slope);
    teacher.merge(q.reference, q.sum, q.weighted, teacher_slope);
  }
  return {{policy.reference, policy.sum, policy.weighted, 0}, {teacher.reference, teacher.sum, teacher.weighted, 0}};
}

template <class T, Mode kMode>
class Consumer {
 public:
  using real = real_of<T>;

  GRPO_DEVICE Consumer(const Job<T, kMode>& job, Shared& shared)
      : job_(job), shared_(shared), warp_(port::thread_index() / 32), first_lane_(port::thread_index() % 32 == 0) {}

  GRPO_DEVICE void run() {
    const int count = job_.count();
    if constexpr (job_.kFused) {
      const bool ahead = job_.ahead;
      if (ahead && count > 0) sum(0);
      for (int i = 0; i < count; ++i) {
        if (!ahead) sum(i);
        if constexpr (job_.kPair) diverge(i);
        if (ahead && i + 1 < count) sum(i + 1);
        write(i);
      }
    } else {
      for (int i = 0; i < count; ++i) {
        if constexpr (kMode == kLogProbs) sum(i);
        if constexpr (kMode == kDivergence) diverge(i);
        if constexpr (job_.kBackward) write(i);
      }
    }
  }

 private:
  // The sums of the index-th row's slice, then of its teacher's.
  GRPO_DEVICE void sum(int index) {
    shared_.filled[summed_.place].wait(summed_.lap);
    const RowInfo& info = shared_.info[summed_.place];
    const int target = info.target;
    if constexpr (job_.kPair) {
      const PairInfo& pair = shared_.pairs[summed_.place];
      const T* slice = job_.slice(info.row);
      Cursor again = summed_;
      PartialPair<real> sums;
      sums.policy = sums_of(again, job_.map_of(info), info.value,
                            [&](int place, int tile) { return job_.piece(shared_, place, slice, tile, target); });
      slice = job_.teacher_slice(info.row);
      sums.teacher = sums_of(summed_, job_.map_of(job_.teacher_map, pair), pair.value, [&](int place, int tile) {
        return job_.teacher_piece(shared_, place, slice, tile, target);
      });
      publish(sums, index, 0);
    } else {
      const T* slice = job_.slice(info.row);
      publish(sums_of(summed_, job_.map_of(info), info.value,
                      [&](int place, int tile) { return job_.piece(shared_, place, slice, tile, target); }),
              index, 0);
    }
  }

  // This warp's, of the pieces of a slice, relative to the sampled value.
  template <class PieceAt>
  GRPO_DEVICE Partial<real> sums_of(Cursor& at, const LogitMap<real>& map, double value, PieceAt piece) {
    const Anchor<real> anchor(value, map.slope);
    Sums<real> sums(anchor);
    for (int tile = 0; tile < job_.tiles; ++tile, at.next(job_.p.tiles)) {
      shared_.filled[at.place].wait(at.lap);
      sweep_sums<Job<T, kMode>::kPair>(piece(at.place, tile), map, anchor, sums);
      if (kMode == kLogProbs) signal(shared_.emptied[at.place]);
    }
    return warp_sums(sums, anchor, map.slope);
  }

  // The divergence of the index-th row's slice, whose gradient is next.
  GRPO_DEVICE void diverge(int index) {
    Cursor at = written_;
    shared_.filled[at.place].wait(at.lap);
    if (job_.kFused) shared_.settled[index % kRowsAhead].wait(turn_at<kMode>(index, 0) & 1);
    const RowInfo& info = shared_.info[at.place];
    const PairInfo& pair = shared_.pairs[at.place];
    const PairMap<real> map = job_.map_of(info, pair);
    const Odds<real> odds = kept_odds<real>(pair.odds);
    const T *slice = job_.slice(info.row), *teacher = job_.teacher_slice(info.row);
    DivergenceSums<real> sums;
    for (int tile = 0; tile < job_.tiles; ++tile, at.next(job_.p.tiles)) {
      shared_.filled[at.place].wait(at.lap);
      sweep_divergence(pieces(at.place, slice, teacher, tile, kElsewhere), map, odds, sums);
      if (kMode == kDivergence) signal(shared_.emptied[at.place]);
    }
    if (kMode == kDivergence) written_ = at;
    warp_sums(sums, map, odds);
    publish(sums, index, kStages<kMode> - 1);
  }

  // The gradient of the index-th row's slice.
  GRPO_DEVICE void write(int index) {
    shared_.filled[written_.place].wait(written_.lap);
    if (job_.kFused) shared_.settled[index % kRowsAhead].wait(turn_at<kMode>(index, kStages<kMode> - 1) & 1);
    const RowInfo& info = shared_.info[written_.place];
    const int target = info.target;
    const LogitMap<real> map = job_.map_of(info);
    const GradientTerms<real> terms = kept_terms<real>(info.terms);
    const T* slice = job_.slice(info.row);
    if constexpr (job_.kPair) {
      const PairInfo& pair = shared_.pairs[written_.place];
      const PairMap<real> maps = job_.map_of(info, pair);
      const Odds<real> odds = kept_odds<real>(pair.odds);
      const DivergenceSlopes<real> slopes = kept_slopes<real>(pair.slopes);
      const T* teacher = job_.teacher_slice(info.row);
      write_tiles([&](int place, int tile) {
        sweep_pair_gradient(pieces(place, slice, teacher, tile, target), maps, odds, terms, slopes);
      });
    } else {
      write_tiles(
          [&](int place, int tile) { sweep_gradient(job_.piece(shared_, place, slice, tile, target), map, terms); });
    }
  }

  template <class Sweep>
  GRPO_DEVICE void write_tiles(Sweep sweep) {
    for (int tile = 0; tile < job_.tiles; ++tile, written_.next(job_.p.tiles)) {
      if (job_.kBackward) shared_.filled[written_.place].wait(written_.lap);
      sweep(written_.place, tile);
      port::fence_for_bulk();
      signal(shared_.written[written_.place]);
    }
  }

  GRPO_DEVICE PiecePair<T> pieces(int place, const T* slice, const T* teacher, int tile, int target) const {
    return {job_.piece(shared_, place, slice, tile, target),
            job_.teacher_piece(shared_, place, teacher, tile, kElsewhere)};
  }

  // What this warp has to say of its row, to the settler.
  template <class Message>
  GRPO_DEVICE void publish(const Message& message, int index, int stage) {
    const int place = index % kRowsAhead, turn = turn_at<kMode>(index, stage);
    if (turn > 0) shared_.settled[place].wait(turn - 1 & 1);  // what it said before has been read
    port::sync_warp();  // what its lanes have read may be overwritten after this, by whoever has those columns then
    if (first_lane_) {
      messages<Message>(shared_.warps[place])[warp_] = message;
      shared_.swept[place].arrive();
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

// What the warps said of a row's slice, as one, in every lane.
template <class real>
GRPO_DEVICE Partial<real> of_warps(const Partial<real>* warps, real slope) {
  Sums<real> sums(warps[port::thread_index() % kConsumerWarps]);
  merge_lanes<kConsumerWarps>(sums, slope);
  return {sums.reference, sums.sum, sums.weighted, 0};
}
template <class real>
GRPO_DEVICE DivergenceSums<real> of_warps(const DivergenceSums<real>* warps) {
  DivergenceSums<real> sums = warps[port::thread_index() % kConsumerWarps];
  merge_lanes<kConsumerWarps>(sums);
  return sums;
}
template <class real>
GRPO_DEVICE PartialPair<real> of_warps(const PartialPair<real>* warps, real slope, real teacher_slope) {
  const PartialPair<real>& mine = warps[port::thread_index() % kConsumerWarps];
  Sums<real> sums(mine.policy), teacher(mine.teacher);
  merge_lanes<kConsumerWarps>(sums, slope);
  merge_lanes<kConsumerWarps>(teacher, teacher_slope);
  return {{sums.reference, sums.sum, sums.weighted, 0}, {teacher.reference, teacher.sum, teacher.weighted, 0}};
}

// What a block's slice has to say of a row -> scratch, from which finish_kernel takes it.
template <class Message, class T, Mode kMode, class Merge>
GRPO_DEVICE void keep(const Job<T, kMode>& job, Shared& shared, int index, int64_t row, Merge merge) {
  const int place = index % kRowsAhead;
  shared.swept[place].wait(index / kRowsAhead & 1);
  const Message mine = merge(messages<Message>(shared.warps[place]));
  port::sync_warp();
  if (port::thread_index() % 32 != 0) return;
  static_cast<Message*>(job.p.partials)[row * job.p.cluster + job.rank] = mine;
  shared.settled[place].arrive();
}

// A settler has every kSettlers-th row.
template <class T, Mode kMode>
GRPO_DEVICE void keep_sums(const Job<T, kMode>& job, Shared& shared, int turn) {
  using real = real_of<T>;
  const int count = job.count();
  for (int index = turn; index < count; index += kSettlers) {
    const int64_t row = job.row_of(index);
    if constexpr (kMode == kLogProbs) {
      const real slope = job.map_of(int(row)).slope;  // not from the ring, whose place the loader may have taken again
      keep<Partial<real>>(job, shared, index, row, [slope](const auto* warps) { return of_warps(warps, slope); });
    } else {
      keep<DivergenceSums<real>>(job, shared, index, row, [](const auto* warps) { return of_warps(warps); });
    }
  }
}

// RowStats as they are written down, and as everything after them takes them.
template <class real>
struct Rounded {
  real log_prob, entropy, anchor, log_sum;
};
template <class real>
GRPO_DEVICE Rounded<real> rounded(const RowStats& stats) {
  return {real(stats.log_prob), real(stats.entropy), real(stats.anchor), real(stats.log_sum)};
}

template <class real>
GRPO_DEVICE void keep_stats(double* kept, const Rounded<real>& stats) {
  kept[0] = stats.log_prob, kept[1] = stats.entropy, kept[2] = stats.anchor, kept[3] = stats.log_sum;
}
template <class real>
GRPO_DEVICE Rounded<real> kept_stats(const double* kept) {
  return {real(kept[0]), real(kept[1]), real(kept[2]), real(kept[3])};
}

template <class real>
GRPO_DEVICE void put_stats(const GrpoCall& call, int64_t row, const Rounded<real>& stats) {
  static_cast<real*>(call.log_prob)[row] = stats.log_prob;
  static_cast<real*>(call.entropy)[row] = stats.entropy;
  static_cast<real*>(call.anchor)[row] = stats.anchor;
  static_cast<real*>(call.log_sum)[row] = stats.log_sum;
}
template <class real>
GRPO_DEVICE void put_teacher_stats(const GrpoCall& call, int64_t row, const Rounded<real>& stats) {
  static_cast<real*>(call.teacher_log_prob)[row] = stats.log_prob;
  static_cast<real*>(call.teacher_entropy)[row] = stats.entropy;
  static_cast<real*>(call.teacher_anchor)[row] = stats.anchor;
  static_cast<real*>(call.teacher_log_sum)[row] = stats.log_sum;
}
template <class real>
GRPO_DEVICE void put_divergence(const GrpoCall& call, int64_t row, const Divergence<real>& found) {
  static_cast<real*>(call.divergence)[row] = found.value;
  static_cast<real*>(call.shift)[row] = found.shift;
  static_cast<real*>(call.centre)[row] = found.centre;
  static_cast<real*>(call.mean)[row] = found.mean;
}

// Sums of all slices -> log-prob, terms of the loss and slopes, the same in each block; one writes them down. Settlers
// take rows in turn, so that one row's chain of dependent operations runs beside another's.
template <class T, Mode kMode>
class Settler {
 public:
  using real = real_of<T>;

  GRPO_DEVICE Settler(const Job<T, kMode>& job, Shared& shared, int place)
      : job_(job),
        shared_(shared),
        numbers_(reinterpret_cast<const real*>(shared.numbers)),
        place_(place),
        lane_(port::thread_index() % 32),
        count_(job.count()) {}

  GRPO_DEVICE void run() {
    // Which row, then what is known of its token: read one row and two rows before they are needed.
    int row = row_of(place_), next = row_of(place_ + kSettlers);
    Known known = job_.kPair ? Known{} : known_of(row);
    Cursor first;
    first.next(job_.p.tiles, place_ * job_.tiles);
    for (int index = place_; index < count_; index += kSettlers) {
      RowInfo& info = shared_.info[first.place];
      PairInfo& pair = shared_.pairs[first.place];
      const int settled_row = row;
      Known settled = known;
      const auto read_ahead = [&] {
        row = next;
        next = row_of(index + 2 * kSettlers);
        if (!job_.kPair) known = known_of(row);
      };
      Rounded<real> stats;
      if constexpr (job_.kPair) {
        settle_pair(index, info, pair, settled_row);
        settle_divergence(index, info, pair, settled_row, read_ahead);
        settled = known_of(settled_row);  // now: neither this nor the statistics take registers before
        stats = kept_stats<real>(info.terms);
      } else {
        stats = settle_row(index, info, read_ahead);
      }
      settled.token.log_prob = stats.log_prob;
      settled.token.entropy = stats.entropy;
      const TokenTerms<real> terms = terms_of(job_.p, numbers_, settled.token);
      // From the rounded outputs, so that one pass and two passes write the same bits.
      const double scale = numbers_[kGradScale];
      const GradientTerms<real> gradient =
          row_gradient<real>(stats.log_prob, stats.entropy, stats.anchor, stats.log_sum, scale * double(terms.slope),
                             -scale * double(settled.entropy_weight), info.logit, job_.map_of(info));
      port::sync_warp();
      first.next(job_.p.tiles, kSettlers * job_.tiles);
      if (lane_ != 0) continue;
      keep_terms(info.terms, gradient);
      shared_.settled[place_].arrive();
      if (job_.rank != 0) continue;
      put_stats(job_.p, settled_row, stats);
      put_terms(job_.p, settled_row, terms);
    }
  }

 private:
  // What a row's token comes with.
  struct Known {
    Token<real> token;
    real entropy_weight;
  };

  // The last row again where there is none: nobody uses what is read of it.
  GRPO_DEVICE int row_of(int index) const { return job_.row_of(index < count_ ? index : count_ - 1); }
  GRPO_DEVICE Known known_of(int row) const {
    return {token_of<real>(job_.p, row), job_.p.entropy_weight ? job_.at(job_.p.entropy_weight, row) : real(0)};
  }

  template <class ReadAhead>
  GRPO_DEVICE Rounded<real> settle_row(int index, const RowInfo& info, ReadAhead read_ahead) {
    const int turn = turn_at<kMode>(index, 0);
    shared_.swept[place_].wait(turn & 1);
    const double value = info.value;
    const real slope = job_.map_of(info).slope;
    const auto mine = of_warps(messages<Partial<real>>(shared_.warps[place_]), slope);
    send_to_all(mine, turn);
    read_ahead();
    const auto merge = [slope](const Partial<real>* slices, int count) { return merged<double>(slices, count, slope); };
    return rounded<real>(row_stats(all_slices(mine, turn, merge), value, slope));
  }

  // Both rows' statistics, by which consumers compare them. The policy's stay where its terms will be.
  GRPO_DEVICE void settle_pair(int index, RowInfo& info, PairInfo& pair, int row) {
    const int turn = turn_at<kMode>(index, 0);
    shared_.swept[place_].wait(turn & 1);
    const PairMap<real> map = job_.map_of(info, pair);
    const real slope = map.policy.slope, teacher_slope = map.teacher.slope;
    const auto mine = of_warps(messages<PartialPair<real>>(shared_.warps[place_]), slope, teacher_slope);
    send_to_all(mine, turn);
    const auto merge = [&](const PartialPair<real>* slices, int count) {
      return merged_pairs(slices, count, slope, teacher_slope);
    };
    const PartialPair<double> total = all_slices(mine, turn, merge);
    const Rounded<real> stats = rounded<real>(row_stats(total.policy, info.value, slope));
    const Rounded<real> teacher = rounded<real>(row_stats(total.teacher, pair.value, teacher_slope));
    const Odds<real> odds = odds_of<real>(stats.anchor, stats.log_sum, teacher.anchor, teacher.log_sum,
                                          map.policy.derivative, map.teacher.derivative);
    port::sync_warp();
    if (lane_ == 0) {
      keep_odds(pair.odds, odds);
      keep_stats(info.terms, stats);
      shared_.settled[place_].arrive();
      if (job_.rank == 0) put_teacher_stats(job_.p, row, teacher);
    }
    port::sync_warp();
  }

  template <class ReadAhead>
  GRPO_DEVICE void settle_divergence(int index, const RowInfo& info, PairInfo& pair, int row, ReadAhead read_ahead) {
    const int turn = turn_at<kMode>(index, 1);
    shared_.swept[place_].wait(turn & 1);
    const auto mine = of_warps(messages<DivergenceSums<real>>(shared_.warps[place_]));
    send_to_all(mine, turn);
    read_ahead();
    const auto merge = [](const DivergenceSums<real>* slices, int count) { return merged(slices, count); };
    const DivergenceSums<double> total = all_slices(mine, turn, merge);
    const PairMap<real> map = job_.map_of(info, pair);
    const Divergence<real> found = finish_divergence(total, kept_odds<real>(pair.odds), map);
    const double weight = numbers_[kGradScale] * double(job_.at(job_.p.grad_divergence, row));
    const DivergenceSlopes<real> slopes = divergence_slopes(found, weight, map);
    port::sync_warp();
    if (lane_ != 0) return;
    keep_slopes(pair.slopes, slopes);
    pair.odds[kOddsShift] = found.shift;
    if (job_.rank == 0) put_divergence(job_.p, row, found);
  }

  // To the slot of this block in every block of the cluster, this one too.
  template <class Message>
  GRPO_DEVICE void send_to_all(const Message& mine, int turn) {
    if (job_.p.cluster == 1) return;  // a block alone may not send, not even to itself
    constexpr int pieces = int(sizeof(mine)) / 16;
    uint32_t words[pieces][4];
    memcpy(words, &mine, sizeof(mine));
    // The others have read what was sent to those slots before.
    if (turn > 0) shared_.drained[place_].wait_for_cluster(turn - 1 & 1);
    if (lane_ == 0) {
      shared_.arrived[place_].expect(job_.p.cluster * int(sizeof(mine)));
      shared_.arrived[place_].arrive();
    }
    port::sync_warp();
    if (lane_ >= job_.p.cluster) return;
    unsigned char* slot = reinterpret_cast<unsigned char*>(messages<Message>(shared_.slices[place_]) + job_.rank);
    for (int i = 0; i < pieces; ++i) port::send(lane_, slot + 16 * i, words[i], shared_.arrived[place_]);
  }

  // merge(what every slice has to say, how many).
  template <class Message, class Merge>
  GRPO_DEVICE auto all_slices(const Message& mine, int turn, Merge merge) {
    if (job_.p.cluster == 1) return merge(&mine, 1);
    shared_.arrived[place_].wait_for_cluster(turn & 1);
    const auto total = merge(messages<Message>(shared_.slices[place_]), job_.p.cluster);
    port::sync_warp();
    if (lane_ < job_.p.cluster) shared_.drained[place_].arrive_at(lane_);
    return total;
  }

  const Job<T, kMode>& job_;
  Shared& shared_;
  const real* numbers_;
  const int place_, lane_, count_;
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
