// The per-token maths of the loss, once for C++ and CUDA: from one token's log-probs and advantage to
// the terms of the loss and their slope with respect to the log-prob. objectives/surrogates/token.py (with kl.py beside
// that folder) is the same maths in Python, with the same names in the same order; a parity test holds them together.
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

// Where each hyper-parameter sits in the vector of numbers (grpo_kernels/backends/spec.py).
enum Number {
  kTemperature,
  kLogitScale,
  kLogitSoftcap,  // 0: none
  kGradScale,
  kLogRatioLimit,  // inf: none
  kKLInputLimit,   // inf: none
  kKLOutputLimit,  // inf: none
  kKLRatioCap,
  kRolloutLow,
  kRolloutHigh,
  kEntropyThreshold,  // -inf: none
  kDivergenceMix,
  kRolloutKLInputLimit,   // inf: none
  kRolloutKLOutputLimit,  // inf: none
  kRolloutKLRatioCap,
  kSurrogateFirst,  // up to eight parameters of the surrogate
  kNumbers = kSurrogateFirst + 8
};

enum SurrogateId { kReinforce, kUnclipped, kClip, kCispo, kSapo, kDppoTV, kDppoKL, kDro };
enum EstimatorId { kNoKL, kK1, kK2, kK3, kAbs };
enum KLGradient { kPathwise, kStraightThroughK2, kWeightedK2, kScoreFunction };
enum RolloutScheme { kNoRollout, kTruncatedIS, kMaskedIS, kRejection };
enum ClipFlag { kClippedLow = 1, kClippedHigh = 2, kClippedDual = 4 };

struct ObjectiveSpec {
  int surrogate;
  int kl_estimator;
  int kl_gradient;
  int kl_ratio_weighted;
  int rollout_scheme;
  int rollout_kl_estimator;
  int rollout_kl_gradient;
  int rollout_kl_ratio_weighted;
};

GRPO_FN float exp_of(float x) { return expf(x); }
GRPO_FN double exp_of(double x) { return exp(x); }
GRPO_FN float expm1_of(float x) { return expm1f(x); }
GRPO_FN double expm1_of(double x) { return expm1(x); }
GRPO_FN float log_of(float x) { return logf(x); }
GRPO_FN double log_of(double x) { return log(x); }
GRPO_FN int series_terms(float) { return 11; }
GRPO_FN int series_terms(double) { return 18; }

// a * b where a factor that is exactly zero wins over an infinite one (NaN stays NaN).
template <class real>
GRPO_FN real times(real a, real b) {
  return (a == 0 || b == 0) && a == a && b == b ? real(0) : a * b;
}

// weight * x where a weight of zero wins over anything, NaN as well: what weighs nothing has no part in a loss. A zero
// of x wins over an infinite weight.
template <class real>
GRPO_FN real weighed(real weight, real x) {
  return weight == 0 || (x == 0 && weight == weight) ? real(0) : weight * x;
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

// exp(u) - u - 1 without cancellation: u^2/2 (1 + u/3 (1 + u/4 (...))) near zero. The reciprocals are constants: a
// division costs a GPU ten multiplications.
template <class real>
GRPO_FN real k3_of(real u) {
  if (u == real(INFINITY)) return u;
  if (!(u < 1 && u > -1)) return expm1_of(u) - u;
  real sum = 1;
#pragma unroll
  for (int k = series_terms(u) + 2; k > 2; --k) sum = 1 + u * (real(1) / k) * sum;
  return u * u / 2 * sum;
}

// What a surrogate is a function of.
template <class real>
struct Point {
  real log_prob;
  real log_ratio;  // to the old policy, saturated
  real ratio;
  real advantage;
  real old_log_prob;  // log_prob on-policy
};

template <class real>
struct Surrogate {
  real value;
  real slope;   // with respect to the log-ratio
  real direct;  // with respect to the log-prob at a fixed ratio
  int flags;
};

// -A * log_prob
template <class real>
GRPO_FN Surrogate<real> reinforce(const Point<real>& t) {
  return {times(-t.advantage, t.log_prob), real(0), -t.advantage, 0};
}

// -r * A
template <class real>
GRPO_FN Surrogate<real> unclipped(const Point<real>& t) {
  const real value = times(-t.advantage, t.ratio);
  return {value, value, real(0), 0};
}

// -min(min(r, dual) * A, clip(r, low, high) * A)
template <class real>
GRPO_FN Surrogate<real> clip(const Point<real>& t, real low, real high, real dual) {
  if (t.advantage > 0 && t.ratio > high) return {-t.advantage * high, real(0), real(0), kClippedHigh};
  if (t.advantage < 0 && t.ratio < low) return {-t.advantage * low, real(0), real(0), kClippedLow};
  if (t.advantage < 0 && t.ratio > dual) return {-t.advantage * dual, real(0), real(0), kClippedDual};
  return unclipped(t);
}

// -sg(clip(r, low, high)) * A * log_prob
template <class real>
GRPO_FN Surrogate<real> cispo(const Point<real>& t, real low, real high) {
  const bool below = t.ratio<low, above = t.ratio> high, acts = t.advantage != 0;
  const real weighted = -(above ? high : below ? low : t.ratio) * t.advantage;
  const int flags = (below && acts ? kClippedLow : 0) | (above && acts ? kClippedHigh : 0);
  return {times(weighted, t.log_prob), real(0), weighted, flags};
}

// -A * sigmoid(tau * (r - 1)) * 4 / tau
template <class real>
GRPO_FN Surrogate<real> sapo(const Point<real>& t, real tau_pos, real tau_neg) {
  const real tau = t.advantage > 0 ? tau_pos : tau_neg;
  const real x = tau * (t.ratio - 1);
  const real e = exp_of(x < 0 ? x : -x);  // of the smaller side: exact where the gate closes
  const real gate = (x < 0 ? e : real(1)) / (1 + e);
  const real slope = times(4 * e / ((1 + e) * (1 + e)), t.ratio);
  return {-t.advantage * gate * 4 / tau, times(-t.advantage, slope), real(0), 0};
}

// A trust region in probabilities: -M * r * A, or -M * sg(min(r, cap)) * A * log_prob.
template <class real>
GRPO_FN Surrogate<real> dppo(const Point<real>& t, bool fallen, bool risen, real cap) {
  if (fallen && t.advantage < 0) return {real(0), real(0), real(0), kClippedLow};
  if (risen && t.advantage > 0) return {real(0), real(0), real(0), kClippedHigh};
  if (cap == real(INFINITY)) return unclipped(t);
  const bool truncated = t.ratio > cap;
  const real direct = -(truncated ? cap : t.ratio) * t.advantage;
  return {times(direct, t.log_prob), real(0), direct, truncated && t.advantage != 0 ? kClippedDual : 0};
}

template <class real>
GRPO_FN Surrogate<real> dppo_tv(const Point<real>& t, real low, real high, real cap) {
  const real rise = exp_of(t.log_prob) - exp_of(t.old_log_prob);
  return dppo(t, rise<-low, rise> high, cap);
}

// 1 - p, with all its digits near p = 1; +0 where p is 1, or above it by a log-softmax's rounding.
template <class real>
GRPO_FN real others_of(real log_prob) {
  return log_prob >= 0 ? real(0) : -expm1_of(log_prob);
}

template <class real>
GRPO_FN Surrogate<real> dppo_kl(const Point<real>& t, real low, real high, real cap) {
  const real fall = log_ratio_of(t.old_log_prob, t.log_prob);
  const real others = others_of(t.log_prob), old_others = others_of(t.old_log_prob);
  const real away = old_others > 0 ? old_others * log_of(old_others / others) : real(0);
  const real divergence = times(exp_of(t.old_log_prob), fall) + away;
  return dppo(t, divergence > low && fall > 0, divergence > high && fall < 0, cap);
}

// -A * log_prob + beta / 2 * log_ratio^2
template <class real>
GRPO_FN Surrogate<real> dro(const Point<real>& t, real beta) {
  const real pull = beta * t.log_ratio;
  return {times(-t.advantage, t.log_prob) + pull * t.log_ratio / 2, pull, -t.advantage, 0};
}

template <class real>
GRPO_FN Surrogate<real> surrogate_terms(int surrogate, const real* p, const Point<real>& t) {
  switch (surrogate) {
    case kReinforce: return reinforce(t);
    case kUnclipped: return unclipped(t);
    case kClip: return clip(t, p[0], p[1], p[2]);
    case kCispo: return cispo(t, p[0], p[1]);
    case kSapo: return sapo(t, p[0], p[1]);
    case kDppoTV: return dppo_tv(t, p[0], p[1], p[2]);
    case kDppoKL: return dppo_kl(t, p[0], p[1], p[2]);
    default: return dro(t, p[0]);
  }
}

template <class real>
struct KL {
  real value;
  real slope;
  real slope_with_ratio;  // of value * exp(log_prob - const), divided by that ratio
};

// One KL estimator of x = log_prob - ref, its input and its value clamped: `limits` are those of input and output, and
// the cap of the ratio.
template <class real>
GRPO_FN KL<real> kl_terms(int estimator, int gradient, const real* limits, real difference, real ratio) {
  const real input_limit = limits[0], output_limit = limits[1];
  const bool inside = within(difference, input_limit);
  const real x = clamp(difference, input_limit);
  KL<real> kl;
  switch (estimator) {
    case kK1: kl = {x, real(1), 1 + x}; break;
    case kK2: kl = {x * x / 2, x, x + x * x / 2}; break;
    case kAbs: {
      const real sign = x > 0 ? real(1) : x < 0 ? real(-1) : x;  // 0, or NaN
      kl = {x < 0 ? -x : x, sign, sign + (x < 0 ? -x : x)};
      break;
    }
    default: kl = {k3_of(-x), -expm1_of(-x), x};  // k3 + its slope is x, exactly
  }
  if (!inside || !within(kl.value, output_limit)) {
    kl.value = clamp(kl.value, output_limit);
    kl.slope = 0;
    kl.slope_with_ratio = kl.value;
  }
  switch (gradient) {
    case kStraightThroughK2: kl.slope = inside ? x : real(0); break;
    case kWeightedK2: {
      const real cap = limits[2];
      kl.slope = inside ? times(ratio > cap ? cap : ratio, x) : real(0);
      break;
    }
    case kScoreFunction: kl.slope = kl.slope_with_ratio; break;
    default: break;
  }
  return kl;
}

// A KL term: the value with the ratio in it, and the slope with respect to the log-prob. `inside`: the ratio does not
// saturate.
template <class real>
GRPO_FN KL<real> kl_part(int estimator, int gradient, bool ratio_weighted, const real* limits, real log_prob,
                         real other, real ratio, bool inside) {
  KL<real> kl = kl_terms(estimator, gradient, limits, log_ratio_of(log_prob, other), ratio);
  if (ratio_weighted) {
    kl.slope = times(ratio, inside ? kl.slope_with_ratio : kl.slope);
    kl.value = times(ratio, kl.value);
  }
  if (log_prob == -real(INFINITY)) kl.slope = 0;
  return kl;
}

// The rollout correction's factor of a token: of rho = exp(log_prob - rollout), 1 where the sampler's is unknown.
template <class real>
GRPO_FN real rollout_weight(int scheme, const real* numbers, real log_prob, real rollout) {
  if (rollout != rollout) return 1;
  const real low = numbers[kRolloutLow], high = numbers[kRolloutHigh];
  const real rho = exp_of(clamp(log_ratio_of(log_prob, rollout), numbers[kLogRatioLimit]));
  if (scheme == kTruncatedIS) return rho > high ? high : rho < low ? low : rho;
  const bool outside = rho < low || rho > high;
  if (scheme == kMaskedIS) return outside ? real(0) : rho;
  return outside ? real(0) : real(1);
}

template <class real>
struct Token {
  real log_prob;
  real entropy;
  bool on_policy;  // ratio exactly 1, `old` unknown
  real old;
  real ref;      // with a KL estimator
  real rollout;  // with a rollout scheme, or a KL to it; `old` where none is given
  real advantage;
  real policy_weight;
  real kl_weight;
  real rollout_kl_weight;
};

template <class real>
struct TokenTerms {
  real policy;  // the surrogate's value times the rollout weight, otherwise unweighted
  real kl;      // the KL term's value, unweighted
  real slope;   // d loss / d log_prob, weighted
  int flags;
  real rollout_weight;
  real rollout_kl;  // the value of the KL to the sampler, unweighted; 0 where that is unknown
};

template <class real>
GRPO_FN TokenTerms<real> token_terms(const ObjectiveSpec& spec, const real* numbers, const Token<real>& token) {
  const real limit = numbers[kLogRatioLimit], log_prob = token.log_prob;
  const real old = token.on_policy ? log_prob : token.old;
  const real raw = log_ratio_of(log_prob, old);  // NaN stays NaN
  // A token of probability 0 has no direction to give: it saturates, whatever it is compared with.
  const bool inside = within(raw, limit) && log_prob != -real(INFINITY);
  const real log_ratio = clamp(raw, limit), ratio = exp_of(log_ratio);

  const Point<real> point{log_prob, log_ratio, ratio, token.advantage, old};
  const Surrogate<real> policy = surrogate_terms(spec.surrogate, numbers + kSurrogateFirst, point);
  TokenTerms<real> out{policy.value, 0, 0, policy.flags, 1, 0};
  real weight = token.policy_weight;
  if (spec.rollout_scheme != kNoRollout) {
    out.rollout_weight = rollout_weight(spec.rollout_scheme, numbers, old, token.rollout);
    weight = weighed(weight, out.rollout_weight);
    out.policy = weighed(out.rollout_weight, out.policy);
  }
  if (token.entropy < numbers[kEntropyThreshold]) weight = out.policy = 0;
  out.slope = weighed(weight, inside ? policy.slope : real(0)) + weighed(weight, policy.direct);

  if (spec.kl_estimator != kNoKL) {
    const KL<real> kl = kl_part(spec.kl_estimator, spec.kl_gradient, spec.kl_ratio_weighted != 0,
                                numbers + kKLInputLimit, log_prob, token.ref, ratio, inside);
    out.kl = kl.value;
    out.slope += weighed(token.kl_weight, kl.slope);
  }
  if (spec.rollout_kl_estimator != kNoKL && token.rollout == token.rollout) {
    const KL<real> kl =
        kl_part(spec.rollout_kl_estimator, spec.rollout_kl_gradient, spec.rollout_kl_ratio_weighted != 0,
                numbers + kRolloutKLInputLimit, log_prob, token.rollout, ratio, inside);
    out.rollout_kl = kl.value;
    out.slope += weighed(token.rollout_kl_weight, kl.slope);
  }
  return out;
}

}  // namespace grpo
