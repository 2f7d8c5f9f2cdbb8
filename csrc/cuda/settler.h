// The settlers of row_kernel.h: what the consumers said -> statistics, loss and slopes.
#pragma once

#include "messages.h"

namespace grpo {

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

}  // namespace grpo
