// Divergences of the policy p from a teacher q, column by column. objectives/divergence.py is the same maths in Python,
// with the same names in the same order.
//
// Everything is written once for plain numbers and for the vectors of csrc/cpu/simd, which bring the functions of the
// first section with them. Selected, never branched: a vector has columns of both kinds.
#pragma once

#include "surrogates.h"

namespace grpo {

// The place in objectives/divergence.KINDS.
enum DivergenceKind { kForwardKL, kReverseKL, kMixedKL, kJSD, kSkewForwardKL, kSkewReverseKL, kTVD };

template <class V>
struct ScalarOf {
  using type = typename V::scalar;
};
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};

GRPO_FN float mul_add(float a, float b, float c) { return fmaf(a, b, c); }
GRPO_FN double mul_add(double a, double b, double c) { return ::fma(a, b, c); }
GRPO_FN float log1p_of(float x) { return log1pf(x); }
GRPO_FN double log1p_of(double x) { return log1p(x); }
// a < b ? x : y
GRPO_FN float select_less(float a, float b, float x, float y) { return a < b ? x : y; }
GRPO_FN double select_less(double a, double b, double x, double y) { return a < b ? x : y; }
GRPO_FN float magnitude(float x) { return fabsf(x); }
GRPO_FN double magnitude(double x) { return fabs(x); }
GRPO_FN void set_all(float& x, float value) { x = value; }
GRPO_FN void set_all(double& x, double value) { x = value; }

template <class V>
GRPO_FN V constant(double value) {
  V x;
  set_all(x, typename ScalarOf<V>::type(value));
  return x;
}

// phi(x) / x^2 = (exp(-x) - 1 + x) / x^2 where |x| < 1: k3 of -x. For fp32 a polynomial of the smallest largest error,
// with which phi is right to 4.1 * 2^-24, rms 1.3 * 2^-24; for fp64 the series.
template <class V>
GRPO_FN V phi_over_square(V x, float) {
  V sum = constant<V>(2.4960811060736887e-05);
  sum = mul_add(sum, x, constant<V>(-0.00020325483637861907));
  sum = mul_add(sum, x, constant<V>(0.0013891335111111403));
  sum = mul_add(sum, x, constant<V>(-0.008330930024385452));
  sum = mul_add(sum, x, constant<V>(0.04166651517152786));
  sum = mul_add(sum, x, constant<V>(-0.16666695475578308));
  return mul_add(sum, x, constant<V>(0.5));
}
template <class V>
GRPO_FN V phi_over_square(V x, double) {
  const V one = constant<V>(1);
  V sum = one;
#pragma unroll
  for (int k = 20; k > 2; --k) sum = mul_add(x * constant<V>(-1.0 / k), sum, one);
  return sum * constant<V>(0.5);
}

// A term >= 0 of KL(w‖m) at a column, w·x - w + m with x = log(w/m), by phi near x = 0, where its digits would cancel;
// m where w is 0, whatever x is.
template <class V>
struct KLTerm {
  V value;
  V log_odds;  // x, finite where w is 0
  V size;      // |x|
};
template <class V>
GRPO_FN V near_kl_term(V weighted, V x) {  // |x| < 1, weighted = w·x
  return weighted * (x * phi_over_square(x, typename ScalarOf<V>::type()));
}
template <class V>
GRPO_FN KLTerm<V> kl_term(V weight, V x, V other) {
  const V none = constant<V>(0), one = constant<V>(1);
  KLTerm<V> term;
  term.log_odds = select_less(none, weight, x, constant<V>(2));
  term.size = magnitude(term.log_odds);
  const V weighted = weight * term.log_odds, far = mul_add(weight, term.log_odds, other - weight);
  term.value = select_less(term.size, one, near_kl_term(weighted, term.log_odds), far);
  return term;
}

// log(p/m) and log(q/m), m = share·p + (1 - share)·q, of d = log(p/q); nothing overflows. With a = |d|, the larger of
// the two less log m is -log1p(weight of the smaller · (e^-a - 1)).
template <class V>
struct OverMixture {
  V log_p, log_q;
};
template <class V>
GRPO_FN OverMixture<V> over_mixture(V p, V q, V d, V share) {
  const V none = constant<V>(0), one = constant<V>(1);
  d = select_less(none, p + q, d, none);
  const V smaller = select_less(none, d, one - share, share);
  const V larger = none - log1p_of(smaller * expm1_of(none - magnitude(d)));
  return {larger + select_less(d, none, d, none), larger - select_less(none, d, d, none)};
}

// p - q, with all its digits where they are close.
template <class V>
GRPO_FN V minus(V p, V q, V d) {
  const V shape = phi_over_square(constant<V>(0) - d, typename ScalarOf<V>::type());
  const V near = q * mul_add(d * d, shape, d);
  return select_less(magnitude(d), constant<V>(1), near, p - q);
}

// dD/dz_j * temperature = own_j + p_j * (slope_j - sum_i p_i * slope_i)
template <class V>
struct Columns {
  V term;    // q * f(p/q) >= 0, nats; their sum is D
  V own;     // the part of the gradient that sums to 0 by itself: p - q, times its share; 0 where there is none
  V slope;   // the rest of a = f'(p/q), 0 where p = q; finite where p is 0
  V excess;  // p - q, its digits kept where p and q are close
};

// A divergence at a column, d = log(p/q): anything where p and q are 0.
template <int kind, class V>
GRPO_FN Columns<V> columns_of(V p, V q, V d, V mix) {
  const V none = constant<V>(0), one = constant<V>(1);
  if (kind == kForwardKL || kind == kMixedKL) {
    const KLTerm<V> forward = kl_term(q, none - d, p);
    // q·(x - phi(x)) = q - p: what the term is made of.
    const V excess = select_less(forward.size, one, forward.value - q * forward.log_odds, p - q);
    if (kind == kForwardKL) return {forward.value, excess, none, excess};
    const KLTerm<V> reverse = kl_term(p, d, q);
    const V rest = one - mix;
    return {mix * forward.value + rest * reverse.value, mix * excess, rest * reverse.log_odds, excess};
  }
  if (kind == kReverseKL) {
    const KLTerm<V> reverse = kl_term(p, d, q);
    return {reverse.value, none, reverse.log_odds, mul_add(p, reverse.log_odds, none - reverse.value)};
  }
  const V excess = minus(p, q, d);
  if (kind == kTVD) {
    const V half = constant<V>(0.5);
    const V sign = select_less(none, d, half, select_less(d, none, none - half, none));
    return {half * magnitude(excess), none, sign, excess};
  }
  const V rest = one - mix;
  if (kind == kJSD) {
    const OverMixture<V> over = over_mixture(p, q, d, rest);
    const V m = mul_add(rest, p, mix * q);
    const KLTerm<V> of_q = kl_term(q, over.log_q, m), of_p = kl_term(p, over.log_p, m);
    return {mix * of_q.value + rest * of_p.value, none, rest * of_p.log_odds, excess};
  }
  if (kind == kSkewForwardKL) {
    const OverMixture<V> over = over_mixture(p, q, d, rest);
    const KLTerm<V> of_q = kl_term(q, over.log_q, mul_add(mix, q, rest * p));
    return {of_q.value, none, none - rest * expm1_of(over.log_q), excess};
  }
  const OverMixture<V> over = over_mixture(p, q, d, mix);
  const KLTerm<V> of_p = kl_term(p, over.log_p, mul_add(mix, p, rest * q));
  const V slope = of_p.log_odds - mix * expm1_of(of_p.log_odds);
  return {of_p.value, none, slope, excess};
}

// What a small error in d of many columns makes of their terms, per unit: f''(1) * sum of p - q, or where f has a
// corner, the sum of p * slope. `excess`: the mean of the erring columns' and the right ones'.
GRPO_FN double of_error(int kind, double excess, double slopes, double mix) {
  const double rest = 1 - mix;
  switch (kind) {
    case kTVD: return slopes;
    case kJSD: return mix * rest * excess;
    case kSkewForwardKL:
    case kSkewReverseKL: return rest * rest * excess;
    default: return excess;
  }
}

}  // namespace grpo
