// The second sweep: the gradient of a slice, in place of its logits in shared memory.
#pragma once

#include "layout.h"
#include "sums.h"
#include "vectors.h"

namespace grpo {

// GradientTerms in shared memory, where the reader knows their precision.
template <class real>
GRPO_DEVICE void keep_terms(double* kept, const GradientTerms<real>& terms) {
  kept[0] = terms.anchor, kept[1] = terms.shift, kept[2] = terms.constant, kept[3] = terms.linear;
  kept[4] = terms.target;
}
template <class real>
GRPO_DEVICE GradientTerms<real> kept_terms(const double* kept) {
  return {real(kept[0]), real(kept[1]), real(kept[2]), real(kept[3]), real(kept[4])};
}

template <bool kEntropy, class real>
GRPO_DEVICE real gradient_of(real value, real slope, const GradientTerms<real>& terms) {
  real power = port::fma_of(value - terms.anchor, slope, terms.shift);
  power = power > 0 ? real(0) : power;  // of a probability
  if (!kEntropy) return port::exp2_of(power) * terms.constant;
  const real kept = power > real(kLowestPower) ? power : real(kLowestPower);
  return port::exp2_of(power) * port::fma_of(kept, terms.linear, terms.constant);
}

template <bool kEntropy, class T>
GRPO_DEVICE void plain_gradient(const Piece<T>& piece, const LogitMap<real_of<T>>& map,
                                const GradientTerms<real_of<T>>& terms) {
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    const int v = port::thread_index() + k * kConsumers;
    real_of<T> x[kWidth<T>];
    load_plain(piece, v, x);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) x[i] = gradient_of<kEntropy>(x[i], map.slope, terms);
    port::store_words(piece.start + v * kWidth<T>, pack(x, piece.start));
  }
}

template <bool kEntropy, class T>
GRPO_DEVICE void any_gradient(const Piece<T>& piece, const LogitMap<real_of<T>>& map,
                              const GradientTerms<real_of<T>>& terms) {
  constexpr int width = kWidth<T>;
#pragma unroll 1
  for (int v = port::thread_index(); v * width < piece.columns; v += kConsumers) {
    real_of<T> x[width];
    load_vector(piece, v, x);
    if (map.softcap) {
#pragma unroll
      for (int i = 0; i < width; ++i)
        x[i] = gradient_of<kEntropy>(softcapped(x[i], map), map.slope, terms) * softcap_slope(x[i], map);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) x[i] = gradient_of<kEntropy>(x[i], map.slope, terms);
    }
    if (unsigned(piece.target - v * width) < unsigned(width)) {
#pragma unroll
      for (int i = 0; i < width; ++i) x[i] = v * width + i == piece.target ? terms.target : x[i];
    }
    store_vector(piece, v, x);
  }
}

template <class T>
GRPO_DEVICE void zero_gradient(const Piece<T>& piece) {
  const real_of<T> zeros[kWidth<T>] = {};
#pragma unroll 1
  for (int v = port::thread_index(); v * kWidth<T> < piece.columns; v += kConsumers) store_vector(piece, v, zeros);
}

// Columns of a piece, as sweep_sums shares them out; the sampled one gets what is known of it.
template <class T>
GRPO_DEVICE void sweep_gradient(const Piece<T>& piece, const LogitMap<real_of<T>>& map,
                                const GradientTerms<real_of<T>>& terms) {
  const bool plain = is_plain(piece, map.softcap);
  if (terms.constant == 0 && terms.linear == 0 && terms.target == 0) return zero_gradient(piece);
  if (terms.linear != 0) return plain ? plain_gradient<true>(piece, map, terms) : any_gradient<true>(piece, map, terms);
  return plain ? plain_gradient<false>(piece, map, terms) : any_gradient<false>(piece, map, terms);
}

// d loss / d (the row's values) from its statistics and slopes. All 0 where both slopes are; NaN everywhere where
// something is NaN.
template <class real>
GRPO_DEVICE GradientTerms<real> row_gradient(double log_prob, double entropy, double anchor, double log_sum, double g,
                                             double h, double target_logit, const LogitMap<real>& map) {
  if (g == 0 && h == 0) return {0, 0, 0, 0, 0};
  GradientTerms<real> terms = gradient_terms<real>(log_prob, entropy, anchor, log_sum, g, h, map.derivative);
  if (map.softcap) terms.target *= softcap_slope(real(target_logit), map);
  if (log_sum != log_sum) terms.constant = terms.target = NAN;
  return terms;
}

}  // namespace grpo
