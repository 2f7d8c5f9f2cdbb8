// A policy's row beside its teacher's: their divergence, and the gradient in the policy's logits.
#pragma once

#include "pair_tiles.h"

namespace {

// What a teacher's value is multiplied by, so that it falls on the policy's.
template <class V>
inline typename V::scalar minus_ratio(const PairRow<V>& policy, const PairRow<V>& teacher) {
  return typename V::scalar(-teacher.map.derivative / policy.map.derivative);
}

// From values x, y of a column to d = log(p/q), as contract.py has it.
template <class V>
struct LogOdds {
  using scalar = typename V::scalar;
  scalar ratio, offset, factor, shift;

  LogOdds(const PairRow<V>& policy, const PairRow<V>& teacher, scalar shift) : offset(0), shift(shift) {
    ratio = minus_ratio(policy, teacher);
    factor = scalar(policy.map.derivative);
    offset = Lanes<V>(distance(V::broadcast(policy.anchor), V::broadcast(teacher.anchor)), V::broadcast(0)).at[0];
  }
  GRPO_INLINE V distance(V x, V y) const { return fma(V::broadcast(ratio), y, x) - V::broadcast(offset); }
  GRPO_INLINE V operator()(V x, V y) const { return fma(distance(x, y), V::broadcast(factor), V::broadcast(shift)); }
  scalar at(scalar x, scalar y) const {
    return Lanes<V>((*this)(V::broadcast(x), V::broadcast(y)), V::broadcast(0)).at[0];
  }
};

// A divergence's mixture, and the slope that those of the columns are relative to.
template <class V>
struct Reference {
  typename V::scalar mix, slope;
};

template <class V>
struct PairSums {
  V term = V::broadcast(0), excess = V::broadcast(0), slope = V::broadcast(0);

  void add(const PairSums& other) {
    term = term + other.term;
    excess = excess + other.excess;
    slope = slope + other.slope;
  }
};

GRPO_INLINE void load_values(const Tile<Float>& tile, int64_t i, bool of_halves, Float x[2], Float y[2]) {
  if (of_halves) {
    load_pair(tile.policy_logits + i, x[0], x[1]);
    load_pair(tile.teacher_logits + i, y[0], y[1]);
  } else {
    load_pair(tile.policy + i, x[0], x[1]);
    load_pair(tile.teacher + i, y[0], y[1]);
  }
}
GRPO_INLINE void load_values(const Tile<Double>& tile, int64_t i, bool, Double x[2], Double y[2]) {
  load_pair(tile.policy + i, x[0], x[1]);
  load_pair(tile.teacher + i, y[0], y[1]);
}

// Writes a tile's parts and adds its sums, if anybody wants them: of terms, of p - q where that is a part of the
// gradient (elsewhere the shift cancels, or would turn the signs of columns that are equal), of p * (slope - slope at
// centre).
template <class V, int kind, bool kSums, bool kHalves>
GRPO_NOINLINE void tile_parts(Tile<V> tile, LogOdds<V> log_odds, Reference<V> to, PairSums<V>& totals) {
  constexpr bool has_own = kind == grpo::kForwardKL || kind == grpo::kMixedKL;
  const int64_t whole = tile.whole();
  const V mix = V::broadcast(to.mix), reference = V::broadcast(to.slope);
  const V policy_factor = V::broadcast(tile.policy_factor), teacher_factor = V::broadcast(tile.teacher_factor);
  PairSums<V> sums;
  for (int64_t i = 0; i < whole; i += 2 * V::lanes) {
    V x[2], y[2];
    load_values(tile, i, kHalves, x, y);
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * V::lanes;
      const V p = V::load(tile.policy_exps + at) * policy_factor;
      const V q = V::load(tile.teacher_exps + at) * teacher_factor;
      const grpo::Columns<V> columns = grpo::columns_of<kind>(p, q, log_odds(x[k], y[k]), mix);
      const V leaning = kind == grpo::kForwardKL ? V::broadcast(0) : p * (columns.slope - reference);
      p.store(tile.p + at);
      (kind == grpo::kForwardKL ? columns.own : has_own ? columns.own + leaning : leaning).store(tile.relative + at);
      if (!kSums) continue;
      sums.term = sums.term + columns.term;
      if (has_own) sums.excess = sums.excess + columns.excess;
      if (kind != grpo::kForwardKL) sums.slope = sums.slope + leaning;
    }
  }
  if (kSums) totals.add(sums);
}

// What is made once for each kind of divergence.
template <class V>
struct Kind {
  using scalar = typename V::scalar;
  void (*parts_and_sums[2])(Tile<V>, LogOdds<V>, Reference<V>, PairSums<V>&);  // of values, of halves
  void (*parts)(Tile<V>, LogOdds<V>, Reference<V>, PairSums<V>&);
  scalar (*slope)(scalar d, scalar mix);  // at d, which no probability has a part in
};

template <class V, int kind>
GRPO_NOINLINE typename V::scalar slope_at(typename V::scalar d, typename V::scalar mix) {
  const V one = V::broadcast(1);
  const V slope = grpo::columns_of<kind>(one, one, V::broadcast(d), V::broadcast(mix)).slope;
  return Lanes<V>(slope, slope).at[0];
}

template <class V, int kind>
constexpr Kind<V> make_kind() {
  return {{tile_parts<V, kind, true, false>, tile_parts<V, kind, true, V::lanes == Float::lanes>},
          tile_parts<V, kind, false, false>,
          slope_at<V, kind>};
}
template <class V>
inline Kind<V> kind_of(int32_t kind) {
  switch (kind) {
    case grpo::kForwardKL: return make_kind<V, grpo::kForwardKL>();
    case grpo::kReverseKL: return make_kind<V, grpo::kReverseKL>();
    case grpo::kMixedKL: return make_kind<V, grpo::kMixedKL>();
    case grpo::kJSD: return make_kind<V, grpo::kJSD>();
    case grpo::kSkewForwardKL: return make_kind<V, grpo::kSkewForwardKL>();
    case grpo::kSkewReverseKL: return make_kind<V, grpo::kSkewReverseKL>();
    default: return make_kind<V, grpo::kTVD>();
  }
}

// d loss / d value_j = of_relative * relative_j + p_j * (constant + linear * power_j); the last is of the entropy, with
// the power of grpo::GradientTerms.
template <class V>
struct PairGradient {
  typename V::scalar of_relative, constant, linear, anchor, slope, shift;
};

// The slopes of the loss in a row's divergence, and what common/stats.h makes of those in its log-prob and entropy.
template <class V>
struct PairSlopes {
  double w;
  grpo::GradientTerms<typename V::scalar> terms;
};

template <class V>
inline PairGradient<V> pair_gradient_of(const PairRow<V>& policy, const PairSlopes<V>& slopes, double of_p) {
  using scalar = typename V::scalar;
  return {scalar(slopes.w * policy.map.derivative),
          scalar(slopes.terms.constant + of_p),
          slopes.terms.linear,
          slopes.terms.anchor,
          policy.map.slope,
          slopes.terms.shift};
}

// out may be the policy's logits.
template <class V, class T>
GRPO_NOINLINE void tile_gradient(Tile<V> tile, PairGradient<V> g, T* out) {
  constexpr int64_t block = 2 * V::lanes;
  const V of_relative = V::broadcast(g.of_relative), constant = V::broadcast(g.constant);
  const V linear = V::broadcast(g.linear), anchor = V::broadcast(g.anchor);
  const V slope = V::broadcast(g.slope), shift = V::broadcast(g.shift);
  const auto column = [&](int64_t i, V of_p) GRPO_LAMBDA {
    return fma(of_relative, V::load(tile.relative + i), V::load(tile.p + i) * of_p);
  };
  const auto of_p = [&](int64_t i) GRPO_LAMBDA {
    return fma(clamp_probability_power(fma(V::load(tile.policy + i) - anchor, slope, shift)), linear, constant);
  };
  for (int64_t i = 0; i < tile.columns; i += block) {
    const int64_t count = tile.columns - i < block ? tile.columns - i : block, second = i + V::lanes;
    if (g.linear == 0) {
      store_block(out, i, count, column(i, constant), column(second, constant));
    } else {
      store_block(out, i, count, column(i, of_p(i)), column(second, of_p(second)));
    }
  }
}

// What the powers of each segment are relative to in the first sweep.
template <class V>
GRPO_NOINLINE void find_largest(const PairRow<V>& row, int64_t vocab, typename V::scalar* largest) {
  typename V::scalar row_max = -INFINITY;
  for (int64_t start = 0; start < vocab; start += kSegment) {
    const int64_t n = vocab - start < kSegment ? vocab - start : kSegment;
    with_logits(row, start, [&](const auto* segment) GRPO_LAMBDA {
      const auto max =
          row.map.softcap ? segment_max<V, true>(segment, n, row.map) : segment_max<V, false>(segment, n, row.map);
      if (max > row_max) row_max = max;
    });
    largest[start / kSegment] = row_max;
  }
}

// The value of one column.
template <class V>
GRPO_NOINLINE typename V::scalar value_at(const PairRow<V>& row, int64_t column) {
  typename V::scalar value[2 * V::lanes];
  if (row.map.softcap) {
    tile_values<V, true>(row, column, 1, value);
  } else {
    tile_values<V, false>(row, column, 1, value);
  }
  return value[0];
}

// The first column of the row's largest value.
template <class V>
GRPO_NOINLINE int64_t largest_column(const PairRow<V>& row, int64_t vocab) {
  int64_t start = 0;
  while (start + kSegment < vocab && row.largest[start / kSegment] != row.anchor) start += kSegment;
  const int64_t n = vocab - start < kSegment ? vocab - start : kSegment;
  with_logits(row, start, [&](const auto* p) GRPO_LAMBDA {
    start +=
        row.map.softcap ? place_of<V, true>(p, n, row.map, row.anchor) : place_of<V, false>(p, n, row.map, row.anchor);
  });
  return start;
}

// The first sweep over one of the two rows; keeps what the others need.
template <class V>
GRPO_NOINLINE RowStats kept_stats(PairRow<V>& row, int64_t vocab, int64_t target, typename V::scalar* largest,
                                  typename V::scalar* exps) {
  using scalar = typename V::scalar;
  RowStats stats;
  row.largest = largest;
  with_logits(row, 0, [&](const auto* logits) GRPO_LAMBDA {
    if (row.map.softcap) {
      stats = row_stats<V, true, false>(logits, vocab, target, row.map, nullptr, nullptr);
      find_largest(row, vocab, largest);
    } else {
      stats = row_stats<V, false, true>(logits, vocab, target, row.map, exps, largest);
      if (sizeof(*logits) == sizeof(scalar))
        for (int64_t j = vocab; j % (2 * V::lanes) != 0; ++j) exps[j] = 0;
      row.exps = exps;
    }
  });
  return stats;
}

struct DivergenceStats {
  double divergence, shift, centre, mean;
  double correction;  // what of the shift is not in the parts
};

// From both rows, whose first sweeps are over. Leaves the parts of the gradient, but for the correction.
template <class V>
inline DivergenceStats divergence_of(const PairRow<V>& policy, const PairRow<V>& teacher, int64_t vocab, int32_t kind,
                                     typename V::scalar mix, const PairParts<V>& parts) {
  using scalar = typename V::scalar;
  if (policy.log_sum != policy.log_sum || teacher.log_sum != teacher.log_sum) return {NAN, NAN, NAN, NAN, NAN};
  const Kind<V> functions = kind_of<V>(kind);
  LogOdds<V> log_odds(policy, teacher, scalar(double(teacher.log_sum) - double(policy.log_sum)));
  const int64_t column = largest_column(policy, vocab);
  const scalar x = value_at(policy, column), y = value_at(teacher, column);
  const Reference<V> to{mix, functions.slope(log_odds.at(x, y), mix)};

  PairSums<V> totals, segment;
  for_tiles(policy, teacher, 0, vocab, parts, [&](const Tile<V>& tile) {
    if (tile.start % kSegment == 0) {
      totals.add(segment);
      segment = PairSums<V>();
    }
    functions.parts_and_sums[tile.policy_logits != nullptr](tile, log_odds, to, segment);
  });
  totals.add(segment);

  DivergenceStats out;
  out.divergence = horizontal_sum(totals.term);
  out.correction = -::log1p(horizontal_sum(totals.excess));
  log_odds.shift = scalar(log_odds.shift + out.correction);
  out.shift = log_odds.shift;
  out.centre = log_odds.at(x, y);
  const bool none = scalar(out.divergence) == INFINITY && kind != grpo::kForwardKL;
  out.mean = none ? NAN : horizontal_sum(totals.slope);
  return out;
}

// `parts`: as divergence_of left them; null: they are made again. out may be the policy's logits.
template <class V, class T>
inline void pair_gradient(const PairRow<V>& policy, const PairRow<V>& teacher, int64_t vocab, int32_t kind,
                          typename V::scalar mix, const DivergenceStats& stats, const PairSlopes<V>& slopes,
                          int64_t target, const PairParts<V>& parts, T* out) {
  using scalar = typename V::scalar;
  const Kind<V> functions = kind_of<V>(kind);
  const LogOdds<V> log_odds(policy, teacher, scalar(stats.shift));
  const Reference<V> to{mix, functions.slope(scalar(stats.centre), mix)};
  const double own_share = kind == grpo::kForwardKL ? 1 : kind == grpo::kMixedKL ? mix : 0;
  const double of_relative = slopes.w * policy.map.derivative;
  const bool kept = parts.p && slopes.terms.linear == 0;
  const double of_p = of_relative * ((kept ? stats.correction * own_share : 0) - stats.mean);
  const PairGradient<V> g = pair_gradient_of(policy, slopes, of_p);

  alignas(64) scalar gradient[kTile], cap[kTile];
  PairSums<V> unused;
  double at_target = slopes.terms.target;
  // Its log-prob's part keeps its precision.
  PairRow<V> plain = policy, plain_teacher = teacher;
  plain.largest = plain.exps = plain_teacher.largest = plain_teacher.exps = nullptr;
  for_tiles(plain, plain_teacher, target, target + 1, PairParts<V>(), [&](const Tile<V>& tile) {
    functions.parts(tile, log_odds, to, unused);
    at_target += of_relative * tile.relative[0] - of_relative * stats.mean * tile.p[0];
  });
  if (policy.map.softcap) {
    tile_cap_slopes(policy, target, 1, cap);
    at_target *= cap[0];
  }

  const auto put = [&](const Tile<V>& tile) {
    T* place = out + tile.start;
    if (!policy.map.softcap) return tile_gradient(tile, g, place);
    Tile<V> lanes = tile;  // whole blocks, in the lanes' order
    lanes.columns = tile.whole();
    tile_gradient(lanes, g, gradient);
    tile_cap_slopes(policy, tile.start, tile.columns, cap);
    for (int64_t i = 0; i < tile.columns; i += 2 * V::lanes) {
      const int64_t count = tile.columns - i < 2 * V::lanes ? tile.columns - i : 2 * V::lanes, second = i + V::lanes;
      store_block(place, i, count, V::load(gradient + i) * V::load(cap + i),
                  V::load(gradient + second) * V::load(cap + second));
    }
  };
  if (kept) {
    for_parts(parts, vocab, put);
  } else {
    for_tiles(plain, plain_teacher, 0, vocab, PairParts<V>(), [&](const Tile<V>& tile) {
      functions.parts(tile, log_odds, to, unused);
      put(tile);
    });
  }
  store_one<V>(out + target, scalar(at_target));
}

}  // namespace
