// From the records of rows to the loss and the sums behind its metrics: fp64, in an order that does not depend on the
// number of threads. backends/eager.py holds the same sums in PyTorch; objectives/metrics.py names the fields.
#pragma once

#include "../common/surrogates.h"
#include "api.h"

namespace {

enum SumField {
  kPolicyLoss,
  kKLLoss,
  kEntropyLoss,
  kRolloutKLLoss,
  kTokens,
  kSkippedTokens,
  kImpossibleTokens,
  kEntropySum,
  kKLSum,
  kKLCount,
  kK1OldSum,
  kK3OldSum,
  kK1RolloutSum,
  kK3RolloutSum,
  kRolloutCount,
  kRolloutUnknown,
  kRolloutRatioSum,
  kRolloutRatioSquareSum,
  kRolloutWeightSum,
  kRolloutWeightSquareSum,
  kRolloutRejectedCount,
  kSequences,
  kRatioSum,
  kRatioCount,
  kClippedLowCount,
  kClippedHighCount,
  kClippedDualCount,
  kSumFields,
  kRatioMin = kSumFields,
  kRatioMax,
  kRolloutRatioMax,
  kRolloutWeightMax,
  kFields
};

constexpr int64_t kTokensPerChunk = 512;

template <class real>
inline double weighted(const void* weight, const void* value, int64_t r) {
  if (!weight) return 0;
  return grpo::weighed(static_cast<const real*>(weight)[r], static_cast<const real*>(value)[r]);
}

// A NaN is an extreme, as in torch.
inline void add_smallest(double x, double* smallest) {
  if (*smallest == *smallest && !(x >= *smallest)) *smallest = x;
}
inline void add_largest(double x, double* largest) {
  if (*largest == *largest && !(x <= *largest)) *largest = x;
}

template <class real>
void add_token(const GrpoCpuTokenSums& p, int64_t r, double* s) {
  const auto at = [r](const void* values) { return static_cast<const real*>(values)[r]; };
  const bool counts = p.masked_in[r] != 0;  // the bytes of a mask may be any: numpy's views have 255
  s[kTokens] += counts;
  if (!p.live[r]) {
    s[kSkippedTokens] += counts;
    return;
  }
  const real log_prob = at(p.log_prob);
  s[kPolicyLoss] += weighted<real>(p.policy_weight, p.policy, r);
  s[kKLLoss] += weighted<real>(p.kl_weight, p.kl, r);
  s[kEntropyLoss] -= weighted<real>(p.entropy_weight, p.entropy, r);
  s[kRolloutKLLoss] += weighted<real>(p.rollout_kl_weight, p.rollout_kl, r);
  s[kImpossibleTokens] += log_prob == -real(INFINITY);
  s[kEntropySum] += at(p.entropy);

  const double to_ref = p.ref ? grpo::log_ratio_of(log_prob, at(p.ref)) : 0;
  const double to_old = p.old ? grpo::log_ratio_of(log_prob, at(p.old)) : 0;
  const auto k3 = [](double difference) {
    return difference == -INFINITY ? INFINITY : ::expm1(-difference) + difference;
  };
  if (p.ref) {
    switch (p.kl_estimator) {
      case grpo::kK1: s[kKLSum] += to_ref; break;
      case grpo::kK2: s[kKLSum] += to_ref * to_ref / 2; break;
      case grpo::kAbs: s[kKLSum] += ::fabs(to_ref); break;
      default: s[kKLSum] += k3(to_ref);
    }
    s[kKLCount] += 1;
  }
  if (p.old) {
    s[kK1OldSum] += to_old;
    s[kK3OldSum] += k3(to_old);
  }
  if (p.rollout && at(p.rollout) != at(p.rollout)) s[kRolloutUnknown] += 1;
  if (p.rollout && at(p.rollout) == at(p.rollout)) {
    const real rollout = at(p.rollout);
    const double to_rollout = grpo::log_ratio_of(log_prob, rollout);
    const double ratio = ::exp(p.old ? grpo::log_ratio_of(at(p.old), rollout) : to_rollout);
    const double weight = p.rollout_weight ? at(p.rollout_weight) : 1;
    s[kK1RolloutSum] += to_rollout;
    s[kK3RolloutSum] += k3(to_rollout);
    s[kRolloutCount] += 1;
    s[kRolloutRatioSum] += ratio;
    s[kRolloutRatioSquareSum] += ratio * ratio;
    s[kRolloutWeightSum] += weight;
    s[kRolloutWeightSquareSum] += weight * weight;
    s[kRolloutRejectedCount] += weight == 0;
    add_largest(ratio, s + kRolloutRatioMax);
    add_largest(weight, s + kRolloutWeightMax);
  }
  const double ratio = p.old ? ::exp(to_old) : 1;
  s[kRatioSum] += ratio;
  s[kRatioCount] += 1;
  s[kClippedLowCount] += (p.flags[r] & grpo::kClippedLow) != 0;
  s[kClippedHighCount] += (p.flags[r] & grpo::kClippedHigh) != 0;
  s[kClippedDualCount] += (p.flags[r] & grpo::kClippedDual) != 0;
  add_smallest(ratio, s + kRatioMin);
  add_largest(ratio, s + kRatioMax);
}

inline void clear(double* sums) {
  for (int i = 0; i < kSumFields; ++i) sums[i] = 0;
  sums[kRatioMin] = INFINITY;
  for (int i = kRatioMax; i < kFields; ++i) sums[i] = -INFINITY;
}

inline int64_t chunks_of(int64_t rows) { return (rows + kTokensPerChunk - 1) / kTokensPerChunk; }

template <class real>
void token_sums(const GrpoCpuTokenSums& p) {
  const int64_t chunks = chunks_of(p.rows);
#ifdef _OPENMP
#pragma omp parallel for num_threads(p.threads) if (chunks > 1)
#endif
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    double* sums = p.partials + chunk * kFields;
    clear(sums);
    const int64_t start = chunk * kTokensPerChunk;
    const int64_t end = start + kTokensPerChunk < p.rows ? start + kTokensPerChunk : p.rows;
    for (int64_t r = start; r < end; ++r) add_token<real>(p, r, sums);
  }
  clear(p.sums);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const double* sums = p.partials + chunk * kFields;
    for (int i = 0; i < kSumFields; ++i) p.sums[i] += sums[i];
    add_smallest(sums[kRatioMin], p.sums + kRatioMin);
    for (int i = kRatioMax; i < kFields; ++i) add_largest(sums[i], p.sums + i);
  }
  p.sums[kSequences] = double(p.sequences);
  *static_cast<real*>(p.loss) =
      real(p.sums[kPolicyLoss] + p.sums[kKLLoss] + p.sums[kEntropyLoss] + p.sums[kRolloutKLLoss]);
}

}  // namespace
