// A row beside its teacher's: the sums of a divergence over a slice, and its gradient (contract.py has the maths, as
// DivergenceStats).
#pragma once

#include "../common/divergences.h"
#include "gradient.h"

namespace grpo {

// What p, q and log(p/q) of a column are made of, x and y its two values:
//   p = 2^((x - anchor) * slope + power),  q likewise,  distance = (x - ratio * y) - offset,  d = distance * s + shift.
template <class real>
struct Odds {
  real anchor, power, teacher_anchor, teacher_power;
  real ratio, offset, shift;
};

// Of an anchor and a log_sum of each row.
template <class real>
GRPO_DEVICE Odds<real> odds_of(double anchor, double log_sum, double teacher_anchor, double teacher_log_sum,
                               double derivative, double teacher_derivative) {
  Odds<real> odds{real(anchor), real(-log_sum * kLog2e), real(teacher_anchor), real(-teacher_log_sum * kLog2e)};
  odds.ratio = real(teacher_derivative / derivative);
  odds.offset = real(anchor - double(odds.ratio) * teacher_anchor);  // as rounded as the columns' own
  odds.shift = real(teacher_log_sum - log_sum);
  return odds;
}

constexpr int kOddsShift = 6;  // its place among the numbers kept

template <class real>
GRPO_DEVICE void keep_odds(double* kept, const Odds<real>& odds) {
  kept[0] = odds.anchor, kept[1] = odds.power, kept[2] = odds.teacher_anchor, kept[3] = odds.teacher_power;
  kept[4] = odds.ratio, kept[5] = odds.offset, kept[kOddsShift] = odds.shift;
}
template <class real>
GRPO_DEVICE Odds<real> kept_odds(const double* kept) {
  return {real(kept[0]), real(kept[1]), real(kept[2]),         real(kept[3]),
          real(kept[4]), real(kept[5]), real(kept[kOddsShift])};
}

// The gradient of weight * D in a value: weight * (own + p * ((slope - centre) - mean)), centre the slope there; of a
// likely column by d = likely.
template <class real>
struct DivergenceSlopes {
  real weight, centre, mean, likely;
};

template <class real>
GRPO_DEVICE void keep_slopes(double* kept, const DivergenceSlopes<real>& slopes) {
  kept[0] = slopes.weight, kept[1] = slopes.centre, kept[2] = slopes.mean, kept[3] = slopes.likely;
}
template <class real>
GRPO_DEVICE DivergenceSlopes<real> kept_slopes(const double* kept) {
  return {real(kept[0]), real(kept[1]), real(kept[2]), real(kept[3])};
}

// A divergence, and both maps from a logit to a value.
template <class real>
struct PairMap {
  LogitMap<real> policy, teacher;
  real factor;  // s, of the policy
  real mix;
  int kind;
};

template <int k>
struct Kind {
  static constexpr int value = k;
};

// Calls run(Kind<...>): what follows is compiled for each.
template <class Run>
GRPO_DEVICE void with_kind(int kind, Run run) {
  switch (kind) {
    case kForwardKL: return run(Kind<kForwardKL>());
    case kReverseKL: return run(Kind<kReverseKL>());
    case kMixedKL: return run(Kind<kMixedKL>());
    case kJSD: return run(Kind<kJSD>());
    case kSkewForwardKL: return run(Kind<kSkewForwardKL>());
    case kSkewReverseKL: return run(Kind<kSkewReverseKL>());
    default: return run(Kind<kTVD>());
  }
}

// Whether the gradient is finite where D is infinite.
GRPO_DEVICE bool gradient_at_infinity(int kind) { return kind == kForwardKL || kind == kJSD || kind == kSkewForwardKL; }

// The slope at log-odds d, which no probability has a part in.
template <class real>
GRPO_DEVICE real slope_at(int kind, real d, real mix) {
  real slope = 0;
  with_kind(kind, [&](auto k) { slope = columns_of<decltype(k)::value>(real(1), real(1), d, mix).slope; });
  return slope;
}

// Whether a column's d is the centre's: of one column at most, the largest.
template <class real>
GRPO_DEVICE bool is_likely(real p) {
  return p > real(0.75);
}

// Over some columns, of their terms, of p - q, of p and of p * slope.
template <class real>
struct ColumnSums {
  real term = 0, excess = 0, mass = 0, slopes = 0;

  template <class other_real>
  GRPO_DEVICE void add(const ColumnSums<other_real>& sums) {
    term = term + sums.term;
    excess = excess + sums.excess;
    mass = mass + sums.mass;
    slopes = slopes + sums.slopes;
  }
};

// Of some columns: the policy's largest value, the teacher's beside it, and what that column would add to the sums of
// the others. A likely column's d, of which little may be left in fp32, follows from the others.
template <class real>
struct alignas(16) DivergenceSums {
  real largest = -real(INFINITY), beside = -real(INFINITY);
  ColumnSums<real> left_out, others;
  real unused[2] = {0, 0};

  // The same in either order.
  template <class other_real>
  GRPO_DEVICE void merge(const DivergenceSums<other_real>& sums) {
    others.add(sums.others);
    if (sums.largest > largest || (sums.largest == largest && sums.beside > beside)) {
      others.add(left_out);
      largest = sums.largest;
      beside = sums.beside;
      left_out = {sums.left_out.term, sums.left_out.excess, sums.left_out.mass, sums.left_out.slopes};
    } else {
      others.add(sums.left_out);
    }
  }
};

template <class T>
struct PiecePair {
  Piece<T> policy, teacher;
};

// Columns of a vector that are compared at once: with more of them, registers spill.
template <class T>
constexpr int kAtOnce = kWidth<T> < 4 ? kWidth<T> : 4;

template <int n, class real>
struct PairColumns {
  real x[n], y[n], power[n], p[n], q[n], distance[n], d[n];

  template <int width>
  GRPO_DEVICE PairColumns(const real (&policy)[width], const real (&teacher)[width], int first) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = policy[first + i];
      y[i] = teacher[first + i];
    }
  }

  // The largest value so far stays out, and comes in where there is a larger one.
  GRPO_DEVICE void leave_out(real& largest, real& beside) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const bool larger = x[i] > largest;
      const real less = larger ? largest : x[i], less_beside = larger ? beside : y[i];
      largest = larger ? x[i] : largest;
      beside = larger ? y[i] : beside;
      x[i] = less;
      y[i] = less_beside;
    }
  }

  GRPO_DEVICE void compare(const PairMap<real>& map, const Odds<real>& odds) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      power[i] = probability_power(x[i] - odds.anchor, map.policy.slope, odds.power);
      p[i] = port::exp2_of(power[i]);
      q[i] = port::exp2_of(probability_power(y[i] - odds.teacher_anchor, map.teacher.slope, odds.teacher_power));
      distance[i] = port::fma_of(-odds.ratio, y[i], x[i]) - odds.offset;
      d[i] = port::fma_of(distance[i], map.factor, odds.shift);
    }
  }

  GRPO_DEVICE static real probability_power(real distance, real slope, real shift) {
    const real power = port::fma_of(distance, slope, shift);
    return power > 0 ? real(0) : power;
  }
};

// What logits stand for, in their place.
template <int n, class real>
GRPO_DEVICE void to_values(real (&logits)[n], const LogitMap<real>& map) {
  if (!map.softcap) return;
#pragma unroll
  for (int i = 0; i < n; ++i) logits[i] = softcapped(logits[i], map);
}

template <int kind, int n, class real>
GRPO_DEVICE void add_columns(const PairColumns<n, real>& at, real mix, ColumnSums<real>& sums) {
  ColumnSums<real> mine;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const Columns<real> column = columns_of<kind>(at.p[i], at.q[i], at.d[i], mix);
    mine.term = mine.term + column.term;
    mine.excess = mine.excess + column.excess;
    mine.mass = mine.mass + at.p[i];
    if (kind != kForwardKL) mine.slopes = port::fma_of(at.p[i], column.slope, mine.slopes);
  }
  sums.add(mine);
}

// This thread's columns of a pair of pieces: every kConsumers-th vector, by the number of its column.
template <class T>
GRPO_DEVICE void sweep_divergence(const PiecePair<T>& pair, const PairMap<real_of<T>>& map,
                                  const Odds<real_of<T>>& odds, DivergenceSums<real_of<T>>& sums) {
#pragma unroll 1
  for (int v = port::thread_index(); v * kWidth<T> < pair.policy.columns; v += kConsumers) {
    real_of<T> x[kWidth<T>], y[kWidth<T>];
    unpack(load_from(pair.policy, v * kWidth<T>), pair.policy.start, x);
    unpack(load_from(pair.teacher, v * kWidth<T>), pair.teacher.start, y);
    to_values(x, map.policy);
    to_values(y, map.teacher);
    drop_others(pair.policy, v, x);
    drop_others(pair.teacher, v, y);
#pragma unroll
    for (int i = 0; i < kWidth<T>; i += kAtOnce<T>) {
      PairColumns<kAtOnce<T>, real_of<T>> at(x, y, i);
      at.leave_out(sums.largest, sums.beside);
      at.compare(map, odds);
      with_kind(map.kind, [&](auto kind) { add_columns<decltype(kind)::value>(at, map.mix, sums.others); });
    }
  }
}

// A column by its two values.
template <class real>
GRPO_DEVICE PairColumns<1, real> column_at(real x, real y, const PairMap<real>& map, const Odds<real>& odds) {
  const real policy[1] = {x}, teacher[1] = {y};
  PairColumns<1, real> at(policy, teacher, 0);
  at.compare(map, odds);
  return at;
}

// Of each kLanes neighbours in every one of them.
template <int kLanes, class real>
GRPO_DEVICE void merge_lanes(DivergenceSums<real>& sums) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const auto from = [mask](real mine) { return port::shuffle_xor(mine, mask); };
    const auto from_all = [&](const ColumnSums<real>& mine) {
      return ColumnSums<real>{from(mine.term), from(mine.excess), from(mine.mass), from(mine.slopes)};
    };
    DivergenceSums<real> other;
    other.largest = from(sums.largest);
    other.beside = from(sums.beside);
    other.left_out = from_all(sums.left_out);
    other.others = from_all(sums.others);
    sums.merge(other);
  }
}

// The warp's sums, in every lane, of what its threads have added.
template <class real>
GRPO_DEVICE void warp_sums(DivergenceSums<real>& sums, const PairMap<real>& map, const Odds<real>& odds) {
  const auto at = column_at(sums.largest, sums.beside, map, odds);
  with_kind(map.kind, [&](auto kind) { add_columns<decltype(kind)::value>(at, map.mix, sums.left_out); });
  merge_lanes<32>(sums);
}

// Slices' sums, left to right.
template <class real>
GRPO_DEVICE DivergenceSums<double> merged(const DivergenceSums<real>* slices, int count) {
  DivergenceSums<double> total;
  for (int i = 0; i < count; ++i) total.merge(slices[i]);
  return total;
}

// DivergenceStats of contract.py.
template <class real>
struct Divergence {
  real value, shift, centre, mean;
};

// From the sums of all columns. The log-sums have an error that d has in all columns; the sum of p - q over all of them
// is what it makes of 0, and so what it makes of their terms is known.
template <class real>
GRPO_DEVICE Divergence<real> finish_divergence(const DivergenceSums<double>& sums, const Odds<real>& odds,
                                               const PairMap<real>& map) {
  const real none = odds.power + odds.teacher_power;  // NaN where one of the rows is spoilt
  if (none != none) return {real(NAN), real(NAN), real(NAN), real(NAN)};
  const auto at = column_at(real(sums.largest), real(sums.beside), map, odds);
  const real p = at.p[0], q = at.q[0];
  ColumnSums<double> others = sums.others;
  double excess = others.excess + sums.left_out.excess;
  if (excess != excess) excess = others.excess = 0;  // D is infinite
  const double error = log1p(excess);
  Divergence<real> found;
  found.shift = real(odds.shift - error);
  found.centre = port::fma_of(at.distance[0], map.factor, found.shift);
  if (is_likely(p) && magnitude(found.centre) < 1 && q > 0)
    found.centre = real(log1p((error * others.mass - others.excess) / q));

  real term = 0;
  with_kind(map.kind, [&](auto k) { term = columns_of<decltype(k)::value>(p, q, found.centre, map.mix).term; });
  const double mean_excess = others.excess - error * others.mass / 2;
  const double value = others.term - error * of_error(map.kind, mean_excess, others.slopes, double(map.mix)) + term;
  found.value = real(value < 0 ? 0 : value);  // what was taken out rounds too
  // With the error that the columns beside it have: only the difference counts. A step has none.
  const double at_centre = slope_at(map.kind, map.kind == kTVD ? found.centre : at.d[0], map.mix);
  found.mean = real(others.mass > 0 ? others.slopes - at_centre * others.mass : 0);
  if (value == INFINITY && !gradient_at_infinity(map.kind)) found.mean = real(NAN);
  return found;
}

template <class real>
GRPO_DEVICE DivergenceSlopes<real> divergence_slopes(const Divergence<real>& found, double weight,
                                                     const PairMap<real>& map) {
  if (weight == 0) return {0, 0, 0, 0};
  return {real(weight * map.policy.derivative), slope_at(map.kind, found.centre, map.mix), found.mean, found.centre};
}

// Both gradients of some columns, in place of their logits; `target`: as vector_gradient has it.
template <int kind, int n, class real>
GRPO_DEVICE void columns_gradient(const PairColumns<n, real>& at, real mix, const GradientTerms<real>& terms,
                                  const DivergenceSlopes<real>& slopes, int target, const LogitMap<real>& map,
                                  real* logits) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const real d = is_likely(at.p[i]) ? slopes.likely : at.d[i];
    const Columns<real> column = columns_of<kind>(at.p[i], at.q[i], d, mix);
    const real relative = (column.slope - slopes.centre) - slopes.mean;
    const real part = slopes.weight * port::fma_of(at.p[i], relative, column.own);
    const real kept = at.power[i] > real(kLowestPower) ? at.power[i] : real(kLowestPower);
    const real own = at.p[i] * port::fma_of(kept, terms.linear, terms.constant);
    const real cap = map.softcap ? softcap_slope(logits[i], map) : real(1);
    logits[i] = port::fma_of(part, cap, i == target ? terms.target : own * cap);
  }
}

// The gradient of a row's log-prob, entropy and divergence, in place of the policy's piece.
template <class T>
GRPO_DEVICE void sweep_pair_gradient(const PiecePair<T>& pair, const PairMap<real_of<T>>& map,
                                     const Odds<real_of<T>>& odds, const GradientTerms<real_of<T>>& terms,
                                     const DivergenceSlopes<real_of<T>>& slopes) {
  const Piece<T>& policy = pair.policy;
  if (slopes.weight == 0) return sweep_gradient(policy, map.policy, terms);
  const real_of<T> whole = slopes.mean + odds.shift;
  if (whole != whole) {
    real_of<T> nothing[kWidth<T>];
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) nothing[i] = real_of<T>(NAN);
    return write_slowly(policy, [&](const T* p, int) { return pack(nothing, p); });
  }
  write_slowly(policy, [&](const T* p, int first) {
    real_of<T> logits[kWidth<T>], x[kWidth<T>], y[kWidth<T>];
    unpack(port::load_words(p), p, logits);
    unpack(load_from(pair.teacher, first), p, y);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) x[i] = logits[i];
    to_values(x, map.policy);
    to_values(y, map.teacher);
    const int target = policy.target - first;
#pragma unroll
    for (int i = 0; i < kWidth<T>; i += kAtOnce<T>) {
      PairColumns<kAtOnce<T>, real_of<T>> at(x, y, i);
      at.compare(map, odds);
      with_kind(map.kind, [&](auto kind) {
        columns_gradient<decltype(kind)::value>(at, map.mix, terms, slopes, target - i, map.policy, logits + i);
      });
    }
    return pack(logits, p);
  });
}

}  // namespace grpo
