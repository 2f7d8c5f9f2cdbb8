// Lanes as four vectors of 16 bytes, which every processor's vector unit has, in GCC's and Clang's own operators.
#pragma once

#include "../types.h"

namespace {

template <class Scalar>
struct Parts {
  using scalar = Scalar;
  typedef Scalar Vector __attribute__((vector_size(16)));
  static constexpr int lanes = 64 / sizeof(Scalar), parts = 4;
  Vector part[parts];

  // f of every part, one after the other.
  template <class F>
  static Parts each(F&& f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static Parts broadcast(Scalar x) {
    const Vector all = x - Vector{};  // -0 stays one
    return {{all, all, all, all}};
  }
  static Parts load(const Scalar* p) {
    Parts out;
    memcpy(&out, p, sizeof(out));
    return out;
  }
  void store(Scalar* p) const { memcpy(p, this, sizeof(*this)); }

  friend Parts operator+(Parts a, Parts b) {
    return each([&](int i) { return a.part[i] + b.part[i]; });
  }
  friend Parts operator-(Parts a, Parts b) {
    return each([&](int i) { return a.part[i] - b.part[i]; });
  }
  friend Parts operator*(Parts a, Parts b) {
    return each([&](int i) { return a.part[i] * b.part[i]; });
  }
  friend Parts operator/(Parts a, Parts b) {
    return each([&](int i) { return a.part[i] / b.part[i]; });
  }

  // a < b ? x : y
  friend Parts select_less(Parts a, Parts b, Parts x, Parts y) {
    return each([&](int i) -> Vector { return a.part[i] < b.part[i] ? x.part[i] : y.part[i]; });
  }
  // The larger of the two; where either is NaN, b.
  friend Parts max_or_second(Parts a, Parts b) { return select_less(b, a, a, b); }
  // Whether a < b in every lane.
  friend bool all_less(Parts a, Parts b) {
    auto less = a.part[0] < b.part[0];
    for (int i = 1; i < parts; ++i) less &= a.part[i] < b.part[i];
    bool all = true;
    for (int i = 0; i < lanes / parts; ++i) all = all && less[i];
    return all;
  }

  // 2 * lanes neighbouring elements as two vectors and back; lane_in_pair (types.h) tells where each goes.
  friend void load_pair(const Scalar* p, Parts& first, Parts& second) {
    first = load(p);
    second = load(p + lanes);
  }
  friend void store_pair(Scalar* p, Parts first, Parts second) {
    first.store(p);
    second.store(p + lanes);
  }
};

}  // namespace
