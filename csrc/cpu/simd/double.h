// 8 fp64 lanes in plain C++ on libm: the exact route for gradcheck and verification, not for speed.
#pragma once

#include "../types.h"

namespace {

struct Double {
  using scalar = double;
  static constexpr int lanes = 8;
  alignas(64) double v[lanes];

  template <class F>
  static Double each(F&& f) {
    Double out;
    for (int i = 0; i < lanes; ++i) out.v[i] = f(i);
    return out;
  }
  static Double broadcast(double x) {
    return each([&](int) { return x; });
  }
  static Double load(const double* p) {
    return each([&](int i) { return p[i]; });
  }
  void store(double* p) const {
    for (int i = 0; i < lanes; ++i) p[i] = v[i];
  }
};

inline void load_pair(const double* p, Double& first, Double& second) {
  first = Double::load(p);
  second = Double::load(p + 8);
}
inline void store_pair(double* p, Double first, Double second) {
  first.store(p);
  second.store(p + 8);
}

inline Double operator+(Double a, Double b) {
  return Double::each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Double operator-(Double a, Double b) {
  return Double::each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Double operator*(Double a, Double b) {
  return Double::each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Double fma(Double a, Double b, Double c) {
  return Double::each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}

// The larger of the two; where either is NaN, b.
inline Double max_or_second(Double a, Double b) {
  return Double::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
// Whether a < b in every lane.
inline bool all_less(Double a, Double b) {
  bool all = true;
  for (int i = 0; i < Double::lanes; ++i) all = all && a.v[i] < b.v[i];
  return all;
}
// a < b ? x : y
inline Double select_less(Double a, Double b, Double x, Double y) {
  return Double::each([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}

inline Double abs(Double a) {
  return Double::each([&](int i) { return ::fabs(a.v[i]); });
}

}  // namespace
