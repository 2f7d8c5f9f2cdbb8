// The consumers of row_kernel.h: sums of a slice, its divergence from the teacher's, its gradient.
#pragma once

#include "messages.h"

namespace grpo {

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

}  // namespace grpo
