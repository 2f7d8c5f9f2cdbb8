// From a logit to what its power of two is made of.
#pragma once

#include "surrogates.h"

namespace grpo {

constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2e = 1.44269504088896340736;

// z = softcap(logit * scale) / temperature, in powers of two: z * log2(e) = value * slope, where value is the logit, or
// cap * tanh(logit * inner) with a softcap.
template <class real>
struct LogitMap {
  real inner, cap;    // softcap only
  real slope;         // log2(e) / temperature, times the scale when there is no softcap
  double derivative;  // dz / d(value): slope / log2(e)
  bool softcap;
};

// A row's temperature may be its own.
template <class real>
GRPO_FN LogitMap<real> logit_map(const real* numbers, double temperature) {
  const double scale = numbers[kLogitScale], cap = numbers[kLogitSoftcap];
  LogitMap<real> map;
  map.softcap = cap > 0;
  map.inner = map.softcap ? real(scale / cap) : 0;
  map.cap = real(cap);
  map.derivative = (map.softcap ? 1.0 : scale) / temperature;
  map.slope = real(map.derivative * kLog2e);
  return map;
}

template <class real>
GRPO_FN LogitMap<real> logit_map(const real* numbers) {
  return logit_map(numbers, numbers[kTemperature]);
}

GRPO_FN float tanh_of(float x) { return tanhf(x); }
GRPO_FN double tanh_of(double x) { return tanh(x); }

// The value of a logit under a softcap, and its derivative, which keeps its precision where tanh is nearly 1.
template <class real>
GRPO_FN real softcapped(real logit, const LogitMap<real>& map) {
  return map.cap * tanh_of(logit * map.inner);
}
template <class real>
GRPO_FN real softcap_slope(real logit, const LogitMap<real>& map) {
  const real y = logit * map.inner, q = exp_of(-2 * (y < 0 ? -y : y));
  return 4 * q / ((1 + q) * (1 + q)) * map.inner * map.cap;
}

}  // namespace grpo
