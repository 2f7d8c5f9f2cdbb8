// The per-token maths of the loss, once for C++ and CUDA: from one token's log-probs and advantage to
// the terms of the loss and their slope with respect to the log-prob. `grpo_kernels/surrogates.py` is
// the same maths in Python, with the same names in the same order; a parity test holds them together.
//
// Compile without -ffast-math and without contraction: the clip's comparison must be the same
// everywhere, and a slope is selected branch by branch (0 * inf is NaN).
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define GRPO_FN static __host__ __device__ inline
#else
#define GRPO_FN static inline
#endif

namespace grpo {

// Where each hyper-parameter sits in the vector of numbers (grpo_kernels/spec.py).
enum Number {
  kTemperature,
  kLogitScale,
  kLogitSoftcap,  // 0: none
  kGradScale,
  kLogRatioLimit,   // inf: none
  kKLInputLimit,    // inf: none
  kKLOutputLimit,   // inf: none
  kSurrogateFirst,  // up to eight parameters of the surrogate
  kNumbers = kSurrogateFirst + 8
};

enum SurrogateId { kReinforce, kUnclipped, kClip };
enum EstimatorId { kNoKL, kK1, kK2, kK3 };
enum ClipFlag { kClippedLow = 1, kClippedHigh = 2, kClippedDual = 4 };

struct ObjectiveSpec {
  int surrogate;
  int kl_estimator;
  int kl_straight_through;
  int kl_ratio_weighted;
};

GRPO_FN float exp_of(float x) { return expf(x); }
GRPO_FN double exp_of(double x) { return exp(x); }
GRPO_FN float expm1_of(float x) { return expm1f(x); }
GRPO_FN double expm1_of(double x) { return expm1(x); }
GRPO_FN int series_terms(float) { return 11; }
GRPO_FN int series_terms(double) { return 18; }

// a * b where a factor that is exactly zero wins over an infinite one (NaN stays NaN).
template <class real>
GRPO_FN real times(real a, real b) {
  return (a == 0 || b == 0) && a == a && b == b ? real(0) : a * b;
}

// a - b; equal log-probs differ by exactly zero, also where both are -inf.
template <class real>
GRPO_FN real log_ratio_of(real a, real b) {
  return a == b ? real(0) : a - b;
}

template <class real>
GRPO_FN real clamp(real x, real limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}

template <class real>
GRPO_FN bool within(real x, real limit) {
  return !(x > limit || x < -limit);
}

// exp(u) - u - 1 without cancellation: u^2/2 (1 + u/3 (1 + u/4 (...))) near zero.
template <class real>
GRPO_FN real k3_of(real u) {
  if (u == real(INFINITY)) return u;
  if (!(u < 1 && u > -1)) return expm1_of(u) - u;
  real sum = 1;
  for (int k = series_terms(u) + 2; k > 2; --k) sum = 1 + u / k * sum;
  return u * u / 2 * sum;
}

template <class real>
struct Surrogate {
  real value;
  real slope;  // with respect to the log-prob, or to the (pooled) log-ratio
  int flags;
};

// -A * log_prob
template <class real>
GRPO_FN Surrogate<real> reinforce(real log_prob, real advantage) {
  return {times(-advantage, log_prob), -advantage, 0};
}

// -r * A
template <class real>
GRPO_FN Surrogate<real> unclipped(real ratio, real advantage) {
  real value = times(-advantage, ratio);
  return {value, value, 0};
}

// -min(min(r, dual) * A, clip(r, low, high) * A)
template <class real>
GRPO_FN Surrogate<real> clip(real ratio, real advantage, real low, real high, real dual) {
  if (advantage > 0 && ratio > high) return {-advantage * high, real(0), kClippedHigh};
  if (advantage < 0 && ratio < low) return {-advantage * low, real(0), kClippedLow};
  if (advantage < 0 && ratio > dual) return {-advantage * dual, real(0), kClippedDual};
  return unclipped(ratio, advantage);
}

template <class real>
GRPO_FN Surrogate<real> surrogate_terms(int surrogate, const real* p, real log_prob, real ratio, real advantage) {
  switch (surrogate) {
    case kReinforce: return reinforce(log_prob, advantage);
    case kUnclipped: return unclipped(ratio, advantage);
    default: return clip(ratio, advantage, p[0], p[1], p[2]);
  }
}

template <class real>
struct KL {
  real value;
  real slope;
  real slope_with_ratio;  // of value * exp(log_prob - const), divided by that ratio
};

// One KL estimator of x = log_prob - ref, its input and its value clamped.
template <class real>
GRPO_FN KL<real> kl_terms(const ObjectiveSpec& spec, real difference, real input_limit, real output_limit) {
  const bool inside = within(difference, input_limit);
  const real x = clamp(difference, input_limit);
  KL<real> kl;
  switch (spec.kl_estimator) {
    case kK1: kl = {x, real(1), 1 + x}; break;
    case kK2: kl = {x * x / 2, x, x + x * x / 2}; break;
    default: kl = {k3_of(-x), -expm1_of(-x), x};  // k3 + its slope is x, exactly
  }
  if (!inside || !within(kl.value, output_limit)) {
    kl.value = clamp(kl.value, output_limit);
    kl.slope = 0;
    kl.slope_with_ratio = kl.value;
  }
  if (spec.kl_straight_through) kl.slope = inside ? x : real(0);
  return kl;
}

template <class real>
struct Token {
  real log_prob;
  const real* old;  // null: on-policy, ratio exactly 1
  const real* ref;  // null: no KL
  real advantage;
  real policy_weight;
  real kl_weight;
};

template <class real>
struct TokenTerms {
  real policy;  // the surrogate's value, unweighted
  real kl;      // the KL term's value, unweighted
  real slope;   // d loss / d log_prob, weighted
  int flags;
};

template <class real>
GRPO_FN TokenTerms<real> token_terms(const ObjectiveSpec& spec, const real* numbers, const Token<real>& token) {
  const real limit = numbers[kLogRatioLimit];
  const real raw = log_ratio_of(token.log_prob, token.old ? *token.old : token.log_prob);  // NaN stays NaN
  // A token of probability 0 has no direction to give: it saturates, whatever it is compared with.
  const bool inside = within(raw, limit) && token.log_prob != -real(INFINITY);
  const real ratio = exp_of(clamp(raw, limit));

  Surrogate<real> policy =
      surrogate_terms(spec.surrogate, numbers + kSurrogateFirst, token.log_prob, ratio, token.advantage);
  if (!inside && spec.surrogate != kReinforce) policy.slope = 0;
  TokenTerms<real> out{policy.value, 0, times(token.policy_weight, policy.slope), policy.flags};

  if (token.ref && spec.kl_estimator != kNoKL) {
    KL<real> kl =
        kl_terms(spec, log_ratio_of(token.log_prob, *token.ref), numbers[kKLInputLimit], numbers[kKLOutputLimit]);
    if (spec.kl_ratio_weighted) {
      kl.slope = times(ratio, inside ? kl.slope_with_ratio : kl.slope);
      kl.value = times(ratio, kl.value);
    }
    if (token.log_prob == -real(INFINITY)) kl.slope = 0;
    out.kl = kl.value;
    out.slope += times(token.kl_weight, kl.slope);
  }
  return out;
}

}  // namespace grpo
