// 8 fp64 lanes as four vectors of 16 bytes, and libm: the exact route for gradcheck and verification, not for speed.
#pragma once

#include "../types.h"

namespace {

typedef double Doubles __attribute__((vector_size(16)));
typedef int64_t Longs __attribute__((vector_size(16)));

struct Double {
  using scalar = double;
  static constexpr int lanes = 8, parts = 4;
  Doubles part[parts];

  // f of every part, one after the other.
  template <class F>
  static Double each(F&& f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static Double broadcast(double x) {
    const Doubles all = {x, x};
    return {{all, all, all, all}};
  }
  static Double load(const double* p) {
    Double out;
    memcpy(&out, p, sizeof(out));
    return out;
  }
  void store(double* p) const { memcpy(p, this, sizeof(*this)); }
  // f of every lane of x.
  template <class F>
  static Double mapped(Double x, F&& f) {
    double lane[lanes];
    x.store(lane);
    for (double& value : lane) value = f(value);
    return load(lane);
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
  return Double::each([&](int i) { return a.part[i] + b.part[i]; });
}
inline Double operator-(Double a, Double b) {
  return Double::each([&](int i) { return a.part[i] - b.part[i]; });
}
inline Double operator*(Double a, Double b) {
  return Double::each([&](int i) { return a.part[i] * b.part[i]; });
}
inline Double fma(Double a, Double b, Double c) { return a * b + c; }

inline Doubles select_less(Doubles a, Doubles b, Doubles x, Doubles y) { return a < b ? x : y; }
// a < b ? x : y
inline Double select_less(Double a, Double b, Double x, Double y) {
  return Double::each([&](int i) { return select_less(a.part[i], b.part[i], x.part[i], y.part[i]); });
}
// The larger of the two; where either is NaN, b.
inline Double max_or_second(Double a, Double b) { return select_less(b, a, a, b); }
// Whether a < b in every lane.
inline bool all_less(Double a, Double b) {
  Longs less = a.part[0] < b.part[0];
  for (int i = 1; i < Double::parts; ++i) less &= a.part[i] < b.part[i];
  return less[0] & less[1];
}

inline Double abs(Double a) {
  return Double::mapped(a, [](double x) { return ::fabs(x); });
}

}  // namespace
