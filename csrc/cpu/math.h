// exp2, tanh and reductions over the vectors of simd/.
#pragma once

#include "../common/divergences.h"
#include "../common/logit_map.h"
#include "simd/double.h"
#if defined(GRPO_ISA_AVX512)
#include "simd/avx512.h"
#elif defined(GRPO_ISA_AVX2)
#include "simd/avx2.h"
#else
#include "simd/generic.h"
#endif

namespace {

using grpo::kLn2;
using grpo::kLog2e;

// The lowest power that exp2_clamped takes: 2^lowest counts as exactly 0.
inline constexpr float lowest_power(Float*) { return -127.0f; }
inline constexpr double lowest_power(Double*) { return -1022.0; }

// 2^x for lowest <= x <= 100, exactly 0 at the lowest. A NaN in x gives garbage here: callers carry x along.
// x = k/8 + r: 2^(k/8) from a table of eight, 2^r - 1 = r q(r) from a minimax polynomial, |r| <= 1/16. Largest relative
// error 1.9 * 2^-24, rms 0.6 * 2^-24; six multiplications where a polynomial alone takes eight (of degree 6, for 1.3).
inline __attribute__((always_inline)) Float exp2_of_clamped(Float x) {
  const Float magic = Float::broadcast(1572864.0f);  // 1.5 * 2^20: adding it rounds to a multiple of 1/8
  const Float t = x + magic;
  const Float r = x - (t - magic);
  Float q = fma(Float::broadcast(0.0554962232708931f), r, Float::broadcast(0.2402576357126236f));
  q = fma(q, r, Float::broadcast(0.6931472420692444f));
  const Float power = power_of_eighths(t);
  return fma(power, r * q, power);
}
inline Double exp2_of_clamped(Double x) {
  return mapped(x, [](double power) { return power <= -1022.0 ? 0.0 : ::exp2(power); });
}

template <class V>
inline V clamp_power(V x) {
  return max_or_second(V::broadcast(lowest_power((V*)nullptr)), x);
}
// Of a probability: 1 at most, however large the logits whose rounded differences these are.
template <class V>
inline V clamp_probability_power(V x) {
  const V zero = V::broadcast(0);
  return clamp_power(select_less(x, zero, x, zero));
}

// tanh(y) and its derivative 1 - tanh(y)^2, both accurate in relative terms.
// Odd polynomial (relative error 5e-9) below 0.625, else (1 - q) / (1 + q) with q = exp(-2|y|).
inline void tanh_of(Float y, Float& tanh, Float& derivative) {
  const Float one = Float::broadcast(1.0f), a = abs(y), s = y * y;
  const Float q = exp2_of_clamped(clamp_power(a * Float::broadcast(float(-2 * kLog2e))));
  const Float reciprocal = one / (one + q);
  Float p = fma(Float::broadcast(-0.005666977260261774f), s, Float::broadcast(0.020606176927685738f));
  p = fma(p, s, Float::broadcast(-0.05373000726103783f));
  p = fma(p, s, Float::broadcast(0.13331331312656403f));
  p = fma(p, s, Float::broadcast(-0.33333277702331543f));
  const Float small = fma(a * s, p, a);
  const Float finite = max_or_second(Float::broadcast(-__FLT_MAX__), Float::broadcast(0.0f) - a);
  tanh =
      copy_sign(select_less(a, Float::broadcast(0.625f), small, (one - q) * reciprocal), y) + (finite - finite);  // NaN
  derivative = (q * Float::broadcast(4.0f)) * reciprocal * reciprocal;
}
inline void tanh_of(Double y, Double& tanh, Double& derivative) {
  tanh = mapped(y, [](double lane) { return ::tanh(lane); });
  derivative = mapped(y, [](double lane) {
    const double c = ::cosh(lane);
    return 1 / (c * c);
  });
}

// What common/divergences.h asks of a vector beside its operators and select_less.
inline void set_all(Float& x, float value) { x = Float::broadcast(value); }
inline void set_all(Double& x, double value) { x = Double::broadcast(value); }
inline Float mul_add(Float a, Float b, Float c) { return fma(a, b, c); }
inline Double mul_add(Double a, Double b, Double c) { return fma(a, b, c); }
inline Float magnitude(Float x) { return abs(x); }
inline Double magnitude(Double x) { return abs(x); }
inline Double expm1_of(Double x) {
  return mapped(x, [](double lane) { return ::expm1(lane); });
}
inline Double log1p_of(Double x) {
  return mapped(x, [](double lane) { return ::log1p(lane); });
}
// x <= 88.
inline Float expm1_of(Float x) {
  const Float one = Float::broadcast(1.0f), back = Float::broadcast(0.0f) - x;
  const Float near = fma(x * x, grpo::phi_over_square(back, float()), x);
  const Float far = exp2_of_clamped(clamp_power(x * Float::broadcast(float(kLog2e)))) - one;
  return select_less(abs(x), one, near, far);
}
// -1 < x. ln(1 + x) = k ln(2) + 2 artanh(s), s = f / (2 + f), 1 + x = (1 + f) 2^k; f is x itself where k is 0.
inline Float log1p_of(Float x) {
  const Float one = Float::broadcast(1.0f), two = Float::broadcast(2.0f);
  Float fraction, exponent;
  split_power(one + x, fraction, exponent);
  const Float f = select_less(abs(exponent), Float::broadcast(0.5f), x, fraction - one);
  const Float s = f / (two + f), square = s * s;
  Float series = fma(square, Float::broadcast(1.0f / 9), Float::broadcast(1.0f / 7));
  series = fma(series, square, Float::broadcast(1.0f / 5));
  series = fma(series, square, Float::broadcast(1.0f / 3));
  const Float twice = s + s;
  return fma(exponent, Float::broadcast(float(kLn2)), fma(twice * square, series, twice));
}

// Halves are folded onto each other: the same order on every instruction set.
template <class V>
inline double horizontal_sum(V x) {
  typename V::scalar lane[V::lanes];
  double sum[V::lanes];
  x.store(lane);
  for (int i = 0; i < V::lanes; ++i) sum[i] = lane[i];
  for (int half = V::lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}
// The lanes hold no NaN (max_or_second passed over them).
template <class V>
inline typename V::scalar horizontal_max(V x) {
  typename V::scalar lane[V::lanes];
  x.store(lane);
  for (int half = V::lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

}  // namespace
