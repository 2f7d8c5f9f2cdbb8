// From the records of rows to the loss and the sums behind its metrics: fp64, in an order that does not depend on the
// number of threads. backends/torch.py holds the same sums in PyTorch; grpo_kernels/metrics.py names the fields.
#pragma once

#include "../common/surrogates.h"
#include "api.h"

namespace {

enum SumField {
  kPolicyLoss,
  kKLLoss,
  kEntropyLoss,
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
  kRolloutWeightSum,
  kRolloutWeightSquareSum,
  kSequences,
  kRatioSum,
  kRatioCount,
  kClippedLowCount,
  kClippedHighCount,
  kClippedDualCount,
  kSumFields,
  kRatioMin = kSumFields,
  kRatioMax,
  kFields
};

constexpr int64_t kTokensPerChunk = 512;

// A token of weight 0 has no part in the loss, whatever its value.
template <class real>
inline double weighted(const void* weight, const void* value, int64_t r) {
  if (!weight) return 0;
  const real w = static_cast<const real*>(weight)[r];
  return w == 0 ? 0 : double(w * static_cast<const real*>(value)[r]);
}

// A NaN ratio is both extremes, as in torch.
inline void add_extremes(double smallest, double largest, double* s) {
  if (s[kRatioMin] == s[kRatioMin] && !(smallest >= s[kRatioMin])) s[kRatioMin] = smallest;
  if (s[kRatioMax] == s[kRatioMax] && !(largest <= s[kRatioMax])) s[kRatioMax] = largest;
}

template <class real>
void add_token(const GrpoCpuTokenSums& p, int64_t r, double* s) {
  const auto at = [r](const void* values) { return static_cast<const real*>(values)[r]; };
  s[kTokens] += p.masked_in[r];
  if (!p.live[r]) {
    s[kSkippedTokens] += p.masked_in[r];
    return;
  }
  const real log_prob = at(p.log_prob);
  s[kPolicyLoss] += weighted<real>(p.policy_weight, p.policy, r);
  s[kKLLoss] += weighted<real>(p.kl_weight, p.kl, r);
  s[kEntropyLoss] -= weighted<real>(p.entropy_weight, p.entropy, r);
  s[kImpossibleTokens] += log_prob == -real(INFINITY);
  s[kEntropySum] += at(p.entropy);

  const double to_ref = p.ref ? grpo::log_ratio_of(log_prob, at(p.ref)) : 0;
  const double to_old = p.old ? grpo::log_ratio_of(log_prob, at(p.old)) : 0;
  const auto k3 = [](double difference) {
    return difference == -INFINITY ? INFINITY : ::expm1(-difference) + difference;
  };
  if (p.ref) {
    s[kKLSum] += p.kl_estimator == grpo::kK1 ? to_ref : p.kl_estimator == grpo::kK2 ? to_ref * to_ref / 2 : k3(to_ref);
    s[kKLCount] += 1;
  }
  if (p.old) {
    s[kK1OldSum] += to_old;
    s[kK3OldSum] += k3(to_old);
  }
  if (p.rollout && at(p.rollout) == at(p.rollout)) {
    const real rollout = at(p.rollout);
    const double to_rollout = grpo::log_ratio_of(log_prob, rollout);
    const double weight = ::exp(p.old ? grpo::log_ratio_of(at(p.old), rollout) : to_rollout);
    s[kK1RolloutSum] += to_rollout;
    s[kK3RolloutSum] += k3(to_rollout);
    s[kRolloutCount] += 1;
    s[kRolloutWeightSum] += weight;
    s[kRolloutWeightSquareSum] += weight * weight;
  }
  const double ratio = p.old ? ::exp(to_old) : 1;
  s[kRatioSum] += ratio;
  s[kRatioCount] += 1;
  s[kClippedLowCount] += (p.flags[r] & grpo::kClippedLow) != 0;
  s[kClippedHighCount] += (p.flags[r] & grpo::kClippedHigh) != 0;
  s[kClippedDualCount] += (p.flags[r] & grpo::kClippedDual) != 0;
  add_extremes(ratio, ratio, s);
}

inline void clear(double* sums) {
  for (int i = 0; i < kSumFields; ++i) sums[i] = 0;
  sums[kRatioMin] = INFINITY;
  sums[kRatioMax] = -INFINITY;
}

template <class real>
void token_sums(const GrpoCpuTokenSums& p) {
  const int64_t chunks = (p.rows + kTokensPerChunk - 1) / kTokensPerChunk;
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
    add_extremes(sums[kRatioMin], sums[kRatioMax], p.sums);
  }
  p.sums[kSequences] = double(p.sequences);
  *static_cast<real*>(p.loss) = real(p.sums[kPolicyLoss] + p.sums[kKLLoss] + p.sums[kEntropyLoss]);
}

}  // namespace
