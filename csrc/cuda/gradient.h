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

// Of 16 bytes of logits. `target`: which of them is the sampled one, if any.
template <bool kEntropy, bool kSoftcap, class T>
GRPO_DEVICE Words vector_gradient(const Words& words, const T* type, int target, const LogitMap<real_of<T>>& map,
                                  const GradientTerms<real_of<T>>& terms) {
  real_of<T> x[kWidth<T>];
  unpack(words, type, x);
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {
    const real_of<T> value = kSoftcap ? softcapped(x[i], map) : x[i];
    const real_of<T> gradient = gradient_of<kEntropy>(value, map.slope, terms);
    x[i] = kSoftcap ? gradient * softcap_slope(x[i], map) : gradient;
  }
  if (unsigned(target) < unsigned(kWidth<T>)) {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) x[i] = i == target ? terms.target : x[i];
  }
  return pack(x, type);
}

// In place, by the 16-byte vectors that the piece lies in: what they hold before its first column and after its last
// nobody looks at. All are loaded before the first is used.
template <bool kEntropy, bool kPlain, class T>
GRPO_DEVICE void write_gradient(const Piece<T>& piece, const LogitMap<real_of<T>>& map,
                                const GradientTerms<real_of<T>>& terms) {
  constexpr int count = kVectorsPerThread + (kPlain ? 0 : 1);  // a tile that is not aligned lies in one vector more
  const int before = kPlain ? 0 : piece.skew / int(sizeof(T));
  const auto first_of = [&](int k) { return (port::thread_index() + k * kConsumers) * kWidth<T> - before; };
  Words words[count];
#pragma unroll
  for (int k = 0; k < count; ++k)
    if (kPlain || first_of(k) < piece.columns) words[k] = port::load_words(piece.start + first_of(k));
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if (!kPlain && first_of(k) >= piece.columns) break;
    T* p = piece.start + first_of(k);
    const int target = kPlain ? kElsewhere : piece.target - first_of(k);
    port::store_words(p, vector_gradient<kEntropy, false>(words[k], p, target, map, terms));
  }
}

// The rare ways, a vector at a time: words(place, its first column) for each of this thread's.
template <class T, class Make>
GRPO_DEVICE void write_slowly(const Piece<T>& piece, Make words) {
  const int before = piece.skew / int(sizeof(T));
#pragma unroll 1
  for (int first = port::thread_index() * kWidth<T> - before; first < piece.columns; first += kConsumers * kWidth<T>)
    port::store_words(piece.start + first, words(piece.start + first, first));
}

template <bool kEntropy, class T>
GRPO_DEVICE void nonzero_gradient(const Piece<T>& piece, const LogitMap<real_of<T>>& map,
                                  const GradientTerms<real_of<T>>& terms) {
  if (map.softcap) {
    return write_slowly(piece, [&](const T* p, int first) {
      return vector_gradient<kEntropy, true>(port::load_words(p), p, piece.target - first, map, terms);
    });
  }
  if (is_plain(piece, false)) return write_gradient<kEntropy, true>(piece, map, terms);
  write_gradient<kEntropy, false>(piece, map, terms);
}

// A piece's columns; the sampled one gets what is known of it.
template <class T>
GRPO_DEVICE void sweep_gradient(const Piece<T>& piece, const LogitMap<real_of<T>>& map,
                                const GradientTerms<real_of<T>>& terms) {
  if (piece.columns == 0) return;
  if (terms.constant == 0 && terms.linear == 0 && terms.target == 0)
    return write_slowly(piece, [](const T*, int) { return Words{}; });
  if (terms.linear != 0) return nonzero_gradient<true>(piece, map, terms);
  nonzero_gradient<false>(piece, map, terms);
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
