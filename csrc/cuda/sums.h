// The first sweep: a slice's sums, thread by thread, then over the warp, the block and the cluster, always in the same
// order.
//
// Powers are relative to the sampled token, so that nothing has to be found first, sums add up as they are, and a
// confident token is exact: log_prob = -log1p(sum over the others of 2^power). A thread that meets a much larger value
// goes on relative to its own largest one.
#pragma once

#include "layout.h"
#include "vectors.h"

namespace grpo {

// What every thread needs of a row's sampled value: power_j = value_j * slope + origin.
template <class real>
struct Anchor {
  real value, origin;
  real residual;  // by which the rounded origin shifts every power, exactly
  bool holds;     // there are such powers at all

  GRPO_DEVICE Anchor(double sampled, real slope) : value(real(sampled)) {
    origin = -(value * slope);
    residual = port::fma_of(value, slope, origin);
    // Past 2^23 the residual alone would let powers underflow or overflow; NaN and infinite values have none.
    holds = residual <= 1 && residual >= -1;
  }
};

constexpr double kLowestPower = -1200;  // 2 to this is 0, and 0 times it is 0: powers of -inf count as it

template <class real>
constexpr real kLargestSum = real(1.2676506002282294e30);  // 2^100: the sums of all threads together stay finite

template <class real>
struct Sums {
  real reference, sum = 0, weighted = 0;
  bool near;  // relative to the anchor, and not yet corrected for its rounding

  GRPO_DEVICE explicit Sums(const Anchor<real>& anchor)
      : reference(anchor.holds ? anchor.value : -real(INFINITY)), near(anchor.holds) {}
  GRPO_DEVICE explicit Sums(const Partial<real>& partial)
      : reference(partial.reference), sum(partial.sum), weighted(partial.weighted), near(false) {}

  // The sums as if the anchor's origin were not rounded.
  GRPO_DEVICE void leave(const Anchor<real>& anchor) {
    if (!near) return;
    constexpr real near_0 = sizeof(real) == 4 ? real(1e-3) : real(1e-8);  // exp2 rounds more than the series leaves out
    const bool small = anchor.residual < near_0 && anchor.residual > -near_0;
    const real factor = small ? port::fma_of(-anchor.residual, real(kLn2), real(1)) : port::exp2_of(-anchor.residual);
    weighted = port::fma_of(-anchor.residual, sum, weighted) * factor;
    sum = sum * factor;
    near = false;
  }

  GRPO_DEVICE void merge(real other_reference, real other_sum, real other_weighted, real slope) {
    if (other_reference > reference) {
      rescale(other_reference, slope);
    } else if (other_reference < reference) {
      Sums other(*this);
      other.reference = other_reference;
      other.sum = other_sum;
      other.weighted = other_weighted;
      other.rescale(reference, slope);
      other_sum = other.sum;
      other_weighted = other.weighted;
    }
    sum = sum + other_sum;
    weighted = weighted + other_weighted;
  }

  // More columns relative to the anchor, in the sums given, which are kept if they hold.
  template <int n>
  GRPO_DEVICE static void add_near(const real (&value)[n], const Anchor<real>& anchor, real slope, real& sum,
                                   real& weighted) {
    real power[n];
#pragma unroll
    for (int i = 0; i < n; ++i) power[i] = port::fma_of(value[i], slope, anchor.origin);
    accumulate(power, sum, weighted);
  }

  // Relative to the largest value so far: subtracted before it is scaled, so that finite values of any size are legal.
  template <int n>
  GRPO_DEVICE void add_far(const real (&value)[n], real slope) {
    real largest = value[0];
#pragma unroll
    for (int i = 1; i < n; ++i) largest = value[i] > largest || largest != largest ? value[i] : largest;
    if (largest > reference) rescale(largest, slope);
    const real shift = reference > -real(INFINITY) ? reference : 0;
    real power[n];
#pragma unroll
    for (int i = 0; i < n; ++i) power[i] = (value[i] - shift) * slope;
    accumulate(power, sum, weighted);
  }

 private:
  template <int n>
  GRPO_DEVICE static void accumulate(const real (&power)[n], real& sum, real& weighted) {
    real exps[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      exps[i] = port::exp2_of(power[i]);
      weighted = port::fma_of(exps[i], power[i] > real(kLowestPower) ? power[i] : real(kLowestPower), weighted);
    }
#pragma unroll
    for (int step = 1; step < n; step *= 2) {
#pragma unroll
      for (int i = 0; i + step < n; i += 2 * step) exps[i] = exps[i] + exps[i + step];
    }
    sum = sum + exps[0];
  }

  // To a larger reference: every power falls. From -inf, when nothing was possible, nothing is kept.
  GRPO_DEVICE void rescale(real larger, real slope) {
    const real fall = (larger - reference) * slope, factor = port::exp2_of(-fall);
    reference = larger;
    if (sum == sum && factor == 0) {
      sum = weighted = 0;
      return;
    }
    weighted = port::fma_of(sum, -fall, weighted) * factor;
    sum = sum * factor;
  }
};

// What does not count of a vector: the sampled column, and whatever follows the last one, become -inf.
template <class T>
GRPO_DEVICE void drop_others(const Piece<T>& piece, int vector, real_of<T> (&x)[kWidth<T>]) {
  const int first = vector * kWidth<T>;
  if (first + kWidth<T> <= piece.columns && unsigned(piece.target - first) >= unsigned(kWidth<T>)) return;
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {
    const bool counts = first + i < piece.columns && first + i != piece.target;
    x[i] = counts ? x[i] : -real_of<T>(INFINITY);
  }
}

// Whether all columns of a whole tile count, as they are: no branch inside.
template <class T>
GRPO_DEVICE bool is_plain(const Piece<T>& piece, bool softcap) {
  const bool target_here = unsigned(piece.target) < unsigned(piece.columns);
  return piece.columns == kTileColumns<T> && piece.skew == 0 && !target_here && !softcap;
}

// Relative to the anchor, without a softcap. All vectors are loaded before the first is used: eight warps hide little
// latency.
template <bool kPlain, class T>
GRPO_DEVICE void sweep_near(const Piece<T>& piece, const LogitMap<real_of<T>>& map, const Anchor<real_of<T>>& anchor,
                            real_of<T>& sum, real_of<T>& weighted) {
  const auto is_here = [&](int v) { return kPlain || v * kWidth<T> < piece.columns; };
  Words words[kVectorsPerThread];
  const auto load_all = [&](auto load) {
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      const int v = port::thread_index() + k * kConsumers;
      if (is_here(v)) words[k] = load(v);
    }
  };
  if constexpr (kPlain) {
    load_all([&](int v) { return port::load_words(piece.start + v * kWidth<T>); });
  } else {
    with_loads(piece, load_all);
  }
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    const int v = port::thread_index() + k * kConsumers;
    if (!is_here(v)) break;
    real_of<T> x[kWidth<T>];
    unpack(words[k], piece.start, x);
    if (!kPlain) drop_others(piece, v, x);
    Sums<real_of<T>>::add_near(x, anchor, map.slope, sum, weighted);
  }
}

// The rare ways, a vector at a time: add(values) for each of this thread's.
template <class T, class Add>
GRPO_DEVICE void sweep_slowly(const Piece<T>& piece, const LogitMap<real_of<T>>& map, Add add) {
#pragma unroll 1
  for (int v = port::thread_index(); v * kWidth<T> < piece.columns; v += kConsumers) {
    Words words;
    with_loads(piece, [&](auto load) { words = load(v); });
    real_of<T> x[kWidth<T>];
    unpack(words, piece.start, x);
    if (map.softcap) {
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) x[i] = softcapped(x[i], map);
    }
    drop_others(piece, v, x);
    add(x);
  }
}

// This thread's columns of a piece: every kConsumers-th vector. All relative to the anchor; if that does not hold, once
// more, relative to the largest. One vector after the other, if registers are needed elsewhere: the same sums.
template <bool kOneByOne, class T>
GRPO_DEVICE void sweep_sums(const Piece<T>& piece, const LogitMap<real_of<T>>& map, const Anchor<real_of<T>>& anchor,
                            Sums<real_of<T>>& sums) {
  using real = real_of<T>;
  if (sums.near) {
    real sum = sums.sum, weighted = sums.weighted;
    if (kOneByOne || map.softcap) {
      sweep_slowly(piece, map, [&](auto& x) { Sums<real>::add_near(x, anchor, map.slope, sum, weighted); });
    } else if (is_plain(piece, false)) {
      sweep_near<true>(piece, map, anchor, sum, weighted);
    } else {
      sweep_near<false>(piece, map, anchor, sum, weighted);
    }
    if (sum < kLargestSum<real>) {
      sums.sum = sum;
      sums.weighted = weighted;
      return;
    }
    sums.leave(anchor);
  }
  sweep_slowly(piece, map, [&](auto& x) { sums.add_far(x, map.slope); });
}

// Of each kLanes neighbours in every one of them. The order is the same for all: a + b is b + a.
template <int kLanes, class real>
GRPO_DEVICE void merge_lanes(Sums<real>& sums, real slope) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const real reference = port::shuffle_xor(sums.reference, mask), sum = port::shuffle_xor(sums.sum, mask);
    sums.merge(reference, sum, port::shuffle_xor(sums.weighted, mask), slope);
  }
}

// The warp's sums, in every lane.
template <class real>
GRPO_DEVICE Partial<real> warp_sums(Sums<real> sums, const Anchor<real>& anchor, real slope) {
  sums.leave(anchor);
  merge_lanes<32>(sums, slope);
  return {sums.reference, sums.sum, sums.weighted, 0};
}

// Slices' sums, left to right.
template <class real, class Stored>
GRPO_DEVICE Partial<real> merged(const Partial<Stored>* partials, int count, real slope) {
  Sums<real> total(Partial<real>{partials[0].reference, partials[0].sum, partials[0].weighted, 0});
  for (int i = 1; i < count; ++i) total.merge(partials[i].reference, partials[i].sum, partials[i].weighted, slope);
  return {total.reference, total.sum, total.weighted, 0};
}

// A row's statistics from the sums of its slices and its sampled value.
GRPO_DEVICE RowStats row_stats(const Partial<double>& total, double value, double slope) {
  double reference = total.reference, rest = total.sum, weighted = total.weighted;
  if (value != value || value == INFINITY || rest != rest) return {NAN, NAN, 0, NAN, NAN};
  if (value > reference) {
    Sums<double> sums(total);
    sums.merge(value, 0, 0, slope);
    reference = sums.reference;
    rest = sums.sum;
    weighted = sums.weighted;
  }
  return finish_stats(rest, weighted, reference, (value - reference) * slope, reference > -INFINITY);
}

}  // namespace grpo
