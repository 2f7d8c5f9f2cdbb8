// What the warps and the blocks of a row say to each other, and in which turn at the barriers.
#pragma once

#include "job.h"

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

}  // namespace grpo
