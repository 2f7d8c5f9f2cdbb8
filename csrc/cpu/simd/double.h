// 8 fp64 lanes, and libm: the exact route for gradcheck and verification, not for speed.
#pragma once

#include "parts.h"

namespace {

using Double = Parts<double>;

// f of every lane.
template <class F>
inline Double mapped(Double x, F&& f) {
  double lane[Double::lanes];
  x.store(lane);
  for (double& value : lane) value = f(value);
  return Double::load(lane);
}

inline Double fma(Double a, Double b, Double c) { return a * b + c; }

inline Double abs(Double a) {
  return mapped(a, [](double x) { return ::fabs(x); });
}

}  // namespace
