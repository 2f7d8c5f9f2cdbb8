// One vocabulary row: its log-prob, entropy and log-sum-exp, and the gradient in its logits.
//
// A row is cut into segments of kSegment columns, whatever the batch or the kernel: a segment's maximum and
// sums are always computed the same way and added left to right, lane by lane, so the log-prob of a row has the
// same bits wherever and however often it is computed.
#pragma once

#include "../common/stats.h"
#include "math.h"

#define GRPO_INLINE inline __attribute__((always_inline))
#define GRPO_LAMBDA __attribute__((always_inline))

namespace {

constexpr int64_t kSegment = 4096;
constexpr int64_t kPrefetchBytes = 2048;  // how far past the next segment's same place: measured

inline int64_t segments_of(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }
inline int64_t room_for_largest(int64_t vocab) { return (segments_of(vocab) + 15) / 16 * 16; }  // one a segment
inline int64_t room_for_exps(int64_t vocab) { return (vocab + 31) / 16 * 16; }                  // whole blocks

// The lanes of a pair of vectors one by one.
template <class V>
struct Lanes {
  typename V::scalar at[2 * V::lanes];

  Lanes(V first, V second) {
    first.store(at);
    second.store(at + V::lanes);
  }
  void load(V& first, V& second) const {
    first = V::load(at);
    second = V::load(at + V::lanes);
  }
};

template <class V>
using LogitMap = grpo::LogitMap<typename V::scalar>;
using grpo::RowStats;

// A block as the first sweep sees it, -inf past the row's end (tanh(-inf) is not -inf).
template <class V, bool kSoftcap, class T>
GRPO_INLINE void load_block(const T* p, int64_t count, const LogitMap<V>& map, V& first, V& second) {
  load_pair(p, first, second);
  if (kSoftcap) {
    V derivative;
    tanh_of(first * V::broadcast(map.inner), first, derivative);
    tanh_of(second * V::broadcast(map.inner), second, derivative);
    first = first * V::broadcast(map.cap);
    second = second * V::broadcast(map.cap);
    if (count < 2 * V::lanes) {
      Lanes<V> lanes(first, second);
      for (int64_t i = count; i < 2 * V::lanes; ++i) lanes.at[lane_in_pair(i, p)] = -INFINITY;
      lanes.load(first, second);
    }
  }
}

// The last, partial block of a row, padded with -inf.
template <int64_t block, class T>
inline void pad_block(const T* p, int64_t count, T (&whole)[block]) {
  for (int64_t i = 0; i < block; ++i) whole[i] = i < count ? p[i] : minus_infinity(p);
}

// Calls body(block, offset, count) on blocks of 2 vectors; the last, partial one is a padded copy.
template <class V, class T, class Body>
GRPO_INLINE void for_blocks(const T* row, int64_t n, Body&& body) {
  constexpr int64_t block = 2 * V::lanes;
  int64_t i = 0;
  for (; i + block <= n; i += block) body(row + i, i, block);
  if (i < n) {
    T padded[block];
    pad_block(row + i, n - i, padded);
    body(static_cast<const T*>(padded), i, n - i);
  }
}

// A whole block goes straight to its place, a partial one through a copy.
template <class V, class T>
inline void store_block(T* row, int64_t offset, int64_t count, V first, V second) {
  if (count == 2 * V::lanes) {
    store_pair(row + offset, first, second);
  } else {
    T whole[2 * V::lanes];
    store_pair(whole, first, second);
    memcpy(row + offset, whole, count * sizeof(T));
  }
}

template <class V, class T>
inline void store_one(T* p, typename V::scalar x) {
  T block[2 * V::lanes];
  store_pair(block, V::broadcast(x), V::broadcast(x));
  *p = block[0];
}

// Lane by lane sums of 2^power and 2^power * power, relative to one largest value.
template <class V>
struct Sums {
  V sum = V::broadcast(0), entropy = V::broadcast(0);

  GRPO_INLINE void add(V power0, V power1, V exp0, V exp1) {
    sum = sum + (exp0 + exp1);
    entropy = fma(exp1, power1, fma(exp0, power0, entropy));
  }
  void add(const Sums& other) {
    sum = sum + other.sum;
    entropy = entropy + other.entropy;
  }
  // To a larger value: every power falls by `fall`.
  void rescale(double fall) {
    const typename V::scalar scale = typename V::scalar(::exp2(-fall));
    if (scale == 0) {  // fall may be past the largest float; a NaN stays
      entropy = entropy * V::broadcast(0);
      sum = sum * V::broadcast(0);
      return;
    }
    const V factor = V::broadcast(scale);
    entropy = fma(sum, V::broadcast(typename V::scalar(-fall)), entropy) * factor;
    sum = sum * factor;
  }
};

template <class V, bool kSoftcap, class T>
inline typename V::scalar segment_max(const T* segment, int64_t n, const LogitMap<V>& map) {
  V max[2] = {V::broadcast(-INFINITY), V::broadcast(-INFINITY)};
  for_blocks<V>(segment, n, [&](const T* p, int64_t, int64_t count) GRPO_LAMBDA {
    V first, second;
    load_block<V, kSoftcap>(p, count, map, first, second);
    max[0] = max_or_second(first, max[0]);
    max[1] = max_or_second(second, max[1]);
  });
  return horizontal_max(max_or_second(max[0], max[1]));
}

// The first of some columns that has their largest value.
template <class V, bool kSoftcap, class T>
inline int64_t place_of(const T* logits, int64_t n, const LogitMap<V>& map, typename V::scalar largest) {
  constexpr int64_t part = 256;
  int64_t start = 0;
  while (start + part < n && segment_max<V, kSoftcap>(logits + start, part, map) != largest) start += part;
  int64_t found = -1;
  for_blocks<V>(logits + start, n - start < part ? n - start : part, [&](const T* p, int64_t offset, int64_t count) {
    V first, second;
    load_block<V, kSoftcap>(p, count, map, first, second);
    const Lanes<V> lanes(first, second);
    for (int64_t i = 0; found < 0 && i < count; ++i)
      if (lanes.at[lane_in_pair(i, p)] == largest) found = start + offset + i;
  });
  return found < 0 ? 0 : found;
}

// Exponentials wait for the second sweep in the lanes' order: in place of a gradient of their own type, where a
// partial block must not spill over, or in scratch, which has room for it (T: the logits' type).
template <class T, class V>
GRPO_INLINE void keep_block(typename V::scalar* exps, int64_t count, V first, V second) {
  if (sizeof(T) == sizeof(*exps)) {
    store_block(exps, 0, count, first, second);
  } else {
    store_pair(exps, first, second);
  }
}
template <class T, class V>
GRPO_INLINE void load_kept(const typename V::scalar* exps, int64_t count, V& first, V& second) {
  if (sizeof(T) == sizeof(*exps) && count < 2 * V::lanes) {
    typename V::scalar block[2 * V::lanes] = {};
    memcpy(block, exps, count * sizeof(block[0]));
    load_pair(block, first, second);
  } else {
    load_pair(exps, first, second);
  }
}

// Adds columns [from, to) of a segment to its sums, `from` at the start of a block. Column `left_out` of the
// first block stays out of them (-1: none) and its value goes to `left_out_value`. With kKeep, exps[j] gets 2^power.
// Values are compared with the largest before they are scaled: finite logits of any size are legal.
template <class V, bool kSoftcap, bool kKeep, class T>
GRPO_INLINE void add_columns(const T* segment, int64_t from, int64_t to, const LogitMap<V>& map,
                             typename V::scalar largest, typename V::scalar* exps, Sums<V>& sums, int64_t left_out = -1,
                             typename V::scalar* left_out_value = nullptr) {
  constexpr int64_t block = 2 * V::lanes;
  const V slope = V::broadcast(map.slope), shift = V::broadcast(largest);
  for_blocks<V>(segment + from, to - from, [&](const T* p, int64_t offset, int64_t count) GRPO_LAMBDA {
    const char* ahead = reinterpret_cast<const char*>(segment + kSegment + from + offset) + kPrefetchBytes;
    __builtin_prefetch(ahead);
    if (sizeof(T) * block > 64) __builtin_prefetch(ahead + 64);
    V value0, value1;
    load_block<V, kSoftcap>(p, count, map, value0, value1);
    const V power0 = clamp_power((value0 - shift) * slope), power1 = clamp_power((value1 - shift) * slope);
    V exp0 = exp2_of_clamped(power0), exp1 = exp2_of_clamped(power1);
    if (kKeep) keep_block<T>(exps + from + offset, count, exp0, exp1);
    if (left_out >= 0) {
      const int64_t lane = lane_in_pair(left_out, p);
      *left_out_value = Lanes<V>(value0, value1).at[lane];
      Lanes<V> lanes(exp0, exp1);
      lanes.at[lane] = 0;
      lanes.load(exp0, exp1);
    }
    sums.add(power0, power1, exp0, exp1);
  });
}

// What goes over some columns at a time while they are in the nearest cache: nothing.
struct Alone {
  static constexpr int64_t columns = kSegment;
  template <class scalar>
  void start(int64_t, int64_t, scalar) const {}
  void add(int64_t, int64_t) const {}
};

// First sweep. With kKeep, exps[j] = 2^((value j - largest[its segment]) * slope) for the second. `beside` hears where
// a segment starts, of how many columns, and the largest value so far; then of each part of it that is done.
//
// The largest value is that so far, so powers are never positive and only a new maximum rescales. The sampled column
// is left out of the sums until the end, so that a confident token keeps its precision.
template <class V, bool kSoftcap, bool kKeep, class T, class Beside = Alone>
inline RowStats row_stats(const T* row, int64_t vocab, int64_t target, const LogitMap<V>& map, typename V::scalar* exps,
                          typename V::scalar* largest, Beside&& beside = Alone()) {
  using scalar = typename V::scalar;
  constexpr int64_t block = 2 * V::lanes;
  Sums<V> totals;
  scalar row_max = -INFINITY, target_value = 0;

  for (int64_t start = 0; start < vocab; start += kSegment) {
    const int64_t n = vocab - start < kSegment ? vocab - start : kSegment;
    const T* segment = row + start;
    scalar* kept = kKeep ? exps + start : nullptr;
    const scalar max = segment_max<V, kSoftcap>(segment, n, map);
    if (max > row_max) {
      if (row_max > -INFINITY) totals.rescale((double(max) - double(row_max)) * map.slope);
      row_max = max;
    }
    if (kKeep) largest[start / kSegment] = row_max;
    const scalar shift = row_max > -INFINITY ? row_max : 0;

    beside.start(start, n, row_max);
    Sums<V> sums;
    const int64_t left_out = target - start;
    for (int64_t from = 0; from < n; from += beside.columns) {
      const int64_t to = n - from < beside.columns ? n : from + beside.columns;
      if (left_out < from || left_out >= to) {
        add_columns<V, kSoftcap, kKeep>(segment, from, to, map, shift, kept, sums);
      } else {
        const int64_t before = left_out / block * block, after = before + block < to ? before + block : to;
        add_columns<V, kSoftcap, kKeep>(segment, from, before, map, shift, kept, sums);
        add_columns<V, kSoftcap, kKeep>(segment, before, after, map, shift, kept, sums, left_out - before,
                                        &target_value);
        add_columns<V, kSoftcap, kKeep>(segment, after, to, map, shift, kept, sums);
      }
      beside.add(start + from, to - from);
    }
    totals.add(sums);
  }
  const double target_power = (double(target_value) - double(row_max)) * map.slope;
  return grpo::finish_stats(horizontal_sum(totals.sum), horizontal_sum(totals.entropy), row_max, target_power,
                            row_max > -INFINITY);
}

// Second sweep of one pass, from the kept exponentials: -g p_j and, in the sampled column, g (1 - p).
// Segments run backwards: the last one is still in the nearest cache.
template <class V, class T>
inline void gradient_from_exps(const typename V::scalar* exps, const typename V::scalar* largest, const RowStats& stats,
                               int64_t vocab, int64_t target, const LogitMap<V>& map, double g, T* out) {
  using scalar = typename V::scalar;
  constexpr int64_t block = 2 * V::lanes;
  const double factor = -g * map.derivative / stats.sum;
  for (int64_t k = segments_of(vocab) - 1; k >= 0; --k) {
    const int64_t start = k * kSegment, n = vocab - start < kSegment ? vocab - start : kSegment;
    const bool last = largest[k] == stats.anchor;  // as for most segments
    const scalar segment_factor = scalar(last ? factor : factor * ::exp2((largest[k] - stats.anchor) * map.slope));
    const V f = V::broadcast(segment_factor);
    for (int64_t i = 0; i < n; i += block) {
      const int64_t count = n - i < block ? n - i : block;
      V first, second;
      load_kept<T>(exps + start + i, count, first, second);
      store_block(out + start, i, count, first * f, second * f);
    }
  }
  store_one<V>(out + target, scalar(grpo::target_slope(g, stats.log_prob) * map.derivative));
}

// Gradient from the logits themselves: p_j is computed again. Serves the two-pass route, the entropy term
// -h p_j (log p_j + H) and softcap. out may be the logits.
template <class V, bool kSoftcap, class T>
inline void gradient_from_logits(const T* row, int64_t vocab, int64_t target, const LogitMap<V>& map,
                                 const RowStats& stats, double g, double h, T* out) {
  using scalar = typename V::scalar;
  const auto terms =
      grpo::gradient_terms<scalar>(stats.log_prob, stats.entropy, stats.anchor, stats.log_sum, g, h, map.derivative);
  const V slope = V::broadcast(map.slope), shift = V::broadcast(terms.shift), anchor = V::broadcast(terms.anchor);
  const V constant = V::broadcast(terms.constant), linear = V::broadcast(terms.linear);
  const auto column = [&](V x, V& derivative) GRPO_LAMBDA {
    if (kSoftcap) {
      V tanh;
      tanh_of(x * V::broadcast(map.inner), tanh, derivative);
      x = tanh * V::broadcast(map.cap);
    }
    const V power = clamp_probability_power(fma(x - anchor, slope, shift));
    const V d = exp2_of_clamped(power) * fma(power, linear, constant);
    return kSoftcap ? d * derivative * V::broadcast(map.inner * map.cap) : d;
  };
  T target_block[2 * V::lanes];
  for (T& element : target_block) element = row[target];

  V derivative;
  for_blocks<V>(row, vocab, [&](const T* p, int64_t offset, int64_t count) GRPO_LAMBDA {
    V first, second;
    load_pair(p, first, second);
    first = column(first, derivative);
    second = column(second, derivative);
    store_block(out, offset, count, first, second);
  });

  double d = terms.target;
  if (kSoftcap) {
    V first, second;
    load_pair(target_block, first, second);
    column(first, derivative);
    d *= double(Lanes<V>(derivative, derivative).at[0]) * map.inner * map.cap;
  }
  store_one<V>(out + target, scalar(d));
}

}  // namespace
