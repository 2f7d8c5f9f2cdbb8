// The reverse KL of a row from its teacher's while the row's statistics are made, and its gradient: two sweeps over
// both rows, one exponential a column, none of the teacher's.
//
// Let d_j be log(p_j/q_j) but for a constant of the row: a difference of two logits, which no sum has a part in. With
// W = sum e_j, m = sum e_j d_j / W and F = sum e_j phi(d_j) / W, phi(d) = exp(-d) - 1 + d, over powers e_j of the
// policy,
//
//   u = F - m,   log(p_j/q_j) = d_j + log(1 + u),   KL = m + log(1 + u) = F - (u - log(1 + u)).
//
// F is a sum of terms that are not negative, and u the square of what is left of the constant where all is small: no
// digit of F is lost while the constant is the mean so far. Where it is none, and where a column is impossible for the
// teacher alone, a row takes three sweeps (row_pair.h).
#pragma once

#include "row_pair.h"

namespace {

// A block of logits, -inf past the row's end.
template <class V, class T>
GRPO_INLINE void load_padded(const T* p, int64_t count, V& first, V& second) {
  constexpr int64_t block = 2 * V::lanes;
  if (count == block) return load_pair(p, first, second);
  T whole[block];
  pad_block(p, count, whole);
  load_pair(whole, first, second);
}

// A larger |d| is infinite once it is multiplied by a slope of 2^64: probabilities of 0 would make it NaN.
constexpr float kLargestD = 0x1p64f;

// Of a column: e d, e phi(d), e exp(-d), and the power of two that the last is.
template <class V>
struct ReverseTerms {
  V weighted, value, q, power;
};

template <class V>
GRPO_INLINE ReverseTerms<V> near_terms(V exp, V d, V teacher_power) {
  const V weighted = exp * d, value = grpo::near_kl_term(weighted, d);
  return {weighted, value, (exp - weighted) + value, teacher_power};
}
// Where some |d| >= 1 or a column is impossible, or as good as, which is said.
template <class V>
GRPO_INLINE ReverseTerms<V> far_terms(V exp, V d, V teacher_power, bool* impossible) {
  const V power = clamp_power(teacher_power), largest = V::broadcast(100), infinity = V::broadcast(INFINITY);
  if (!all_less(abs(d), V::broadcast(kLargestD))) *impossible = true;
  const V q = select_less(largest, power, infinity, exp2_of_clamped(power));
  const grpo::KLTerm<V> term = grpo::kl_term(exp, d, q);
  return {exp * term.log_odds, term.value, q, power};
}

// What the reverse KL and the teacher's statistics are made of. Goes beside a first sweep over the policy's row that
// keeps its powers. Both rows are of one type, without a softcap.
template <class V, class T>
class ReverseSums {
 public:
  using scalar = typename V::scalar;
  static constexpr int64_t columns = kTile;

  ReverseSums(const PairRow<V>& policy, const PairRow<V>& teacher, const scalar* exps)
      : x_(static_cast<const T*>(policy.logits)),
        y_(static_cast<const T*>(teacher.logits)),
        exps_(exps),
        policy_(policy.map),
        teacher_(teacher.map),
        ratio_(minus_ratio(policy, teacher)) {}

  void start(int64_t start, int64_t n, scalar largest) {
    take_sums();
    if (largest > largest_) {
      const int64_t column = start + place_of<V, false>(x_ + start, n, policy_, largest);
      move_by(0, largest);
      beside_ = value_of(y_, column);
      distance_ = distance_of(largest, beside_);
    }
    if (largest == -INFINITY) value_ = NAN;  // nothing that the others could be relative to
    // The mean, but a confident column's own d, whose digits are its gradient's.
    const scalar constant =
        weight_ > 4 ? scalar(constant_ - mean()) : scalar(-double(distance_) * scalar(policy_.derivative));
    move_by(double(constant) - constant_, largest);
    constant_ = constant;
  }

  // Columns whose powers are there.
  GRPO_NOINLINE void add(int64_t start, int64_t n) {
    const T *x_from = x_ + start, *y_from = y_ + start;
    const scalar* exps = exps_ + start;
    const V ratio = V::broadcast(ratio_), factor = V::broadcast(scalar(policy_.derivative));
    const V constant = V::broadcast(constant_), beside = V::broadcast(beside_);
    const V slope = V::broadcast(teacher_.slope), power = V::broadcast(scalar(-kLog2e * at_largest()));
    const V one = V::broadcast(1);
    const bool plain = ratio_ == -1 && policy_.derivative == 1;  // as most rows: the same bits by cheaper steps
    Sums sums[2] = {sums_[0], sums_[1]};
    for_blocks<V>(x_from, n, [&](const T* p, int64_t offset, int64_t count) GRPO_LAMBDA {
      const char* ahead = reinterpret_cast<const char*>(y_from + offset) + kSegment * sizeof(T);
      __builtin_prefetch(ahead);
      if (sizeof(T) * 2 * V::lanes > 64) __builtin_prefetch(ahead + 64);
      V x[2], y[2], d[2], exp[2], teacher_power[2];
      load_pair(p, x[0], x[1]);
      load_padded<V>(y_from + offset, count, y[0], y[1]);
      load_kept<T>(exps + offset, count, exp[0], exp[1]);
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        d[k] = plain ? (x[k] - y[k]) + constant : fma(fma(ratio, y[k], x[k]), factor, constant);
        teacher_power[k] = fma(y[k] - beside, slope, power);
      }
      if (all_less(abs(d[0]), one) && all_less(abs(d[1]), one)) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) sums[k].add(exp[k], near_terms(exp[k], d[k], teacher_power[k]));
      } else {
        bool past_the_end, *impossible = count == 2 * V::lanes ? &impossible_ : &past_the_end;
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) sums[k].add(exp[k], far_terms(exp[k], d[k], teacher_power[k], impossible));
      }
    });
    sums_[0] = sums[0];
    sums_[1] = sums[1];
  }

  // Of the whole row, as the contract has it: the shift beside the two anchors, which are known by now, the rest beside
  // the policy's largest column, whose d has the bits of the gradient's there.
  DivergenceStats divergence(const PairRow<V>& policy, const PairRow<V>& teacher) {
    take_sums();
    const double mean = this->mean(), value = value_ / weight_, u = value - mean, less = ::log1p(u);
    const double shift = less + d_of(distance_of(policy.anchor, teacher.anchor));
    const scalar centre = LogOdds<V>(policy, teacher, scalar(shift)).at(largest_, beside_);
    return {u < 1 ? value - (u - less) : mean + less, shift, centre, mean - at_largest(), 0};
  }
  // Whether that is exact: the roundings of F and m make four of its own at most. This and what follows: once it is
  // known.
  bool is_exact(double divergence) const {
    const double mean = this->mean(), u = value_ / weight_ - mean;
    return rounded_ / weight_ + ::fabs(mean * u) <= 4 * (1 + u) * divergence && ::fabs(power_) < INFINITY;
  }
  RowStats teacher(const RowStats& policy, double shift, int64_t target) const {
    RowStats out;
    out.anchor = beside_;
    out.log_sum = policy.log_sum + shift;
    out.log_prob = (double(value_of(y_, target)) - beside_) * teacher_.derivative - out.log_sum;
    const double entropy = out.log_sum - at_largest() - kLn2 * power_ / (weight_ - weighted_ + value_);
    out.entropy = entropy < 0 ? 0 : entropy;
    return out;
  }
  // The mean of d, and d itself, but for the same constant.
  double mean() const { return weighted_ / weight_; }
  double d_at(int64_t column) const { return d_of(distance_of(value_of(x_, column), value_of(y_, column))); }
  scalar constant() const { return constant_; }
  scalar anchor() const { return beside_; }  // the teacher's, beside the policy's largest
  bool impossible() const { return impossible_; }

 private:
  struct Sums {
    V weight = V::broadcast(0), weighted = V::broadcast(0), value = V::broadcast(0), power = V::broadcast(0);

    GRPO_INLINE void add(V exp, const ReverseTerms<V>& terms) {
      weight = weight + exp;
      weighted = weighted + terms.weighted;
      value = value + terms.value;
      power = fma(terms.q, terms.power, power);
    }
  };
  void take_sums() {
    weight_ += horizontal_sum(sums_[0].weight + sums_[1].weight);
    weighted_ += horizontal_sum(sums_[0].weighted + sums_[1].weighted);
    const double value = horizontal_sum(sums_[0].value + sums_[1].value);
    value_ += value;
    rounded_ += value;
    power_ += horizontal_sum(sums_[0].power + sums_[1].power);
    sums_[0] = sums_[1] = Sums();
  }

  static scalar value_of(const T* logits, int64_t column) {
    T block[2 * V::lanes];
    for (T& element : block) element = logits[column];
    V first, second;
    load_pair(block, first, second);
    return Lanes<V>(first, second).at[0];
  }
  scalar distance_of(scalar x, scalar y) const {
    const V found = fma(V::broadcast(ratio_), V::broadcast(y), V::broadcast(x));
    return Lanes<V>(found, found).at[0];
  }
  double d_of(scalar distance) const { return double(distance) * scalar(policy_.derivative) + constant_; }
  double at_largest() const { return d_of(distance_); }
  // Every d rises by `rise`, and powers are relative to another largest value.
  void move_by(double rise, scalar largest) {
    if (weight_ > 0) {
      const double fall = (double(largest) - largest_) * policy_.slope, scale = ::exp2(-fall);
      if (!(fall < 1000)) value_ = NAN;  // nothing would be left of what the teacher has there
      const double teacher_fall = fall + rise * kLog2e, q = weight_ - weighted_ + value_, less = ::expm1(-rise);
      power_ = (power_ - teacher_fall * q) * ::exp2(-teacher_fall);
      rounded_ = (rounded_ * (1 + less) + ::fabs(less * weighted_)) * scale;
      value_ = (value_ + less * (value_ - weighted_) + (less + rise) * weight_) * scale;
      weighted_ = (weighted_ + rise * weight_) * scale;
      weight_ *= scale;
    }
    largest_ = largest;
  }

  const T *x_, *y_;
  const scalar* exps_;
  const LogitMap<V> policy_, teacher_;
  const scalar ratio_;
  scalar largest_ = -INFINITY, distance_ = 0, beside_ = 0;  // the value so far, with the teacher's logit beside it
  scalar constant_ = 0;
  Sums sums_[2];             // of this segment
  bool impossible_ = false;  // some whole block has such columns
  double weight_ = 0, weighted_ = 0, value_ = 0, power_ = 0;
  double rounded_ = 0;  // what the roundings of value_ are relative to
};

// d loss / d logit_j = p_j * (of_relative * d_j + constant + linear * power_j), the last as PairGradient has it, from
// the powers of the first sweep. With kAny there may be a linear part and columns that are impossible. Segments run
// backwards: the last one is still in the nearest cache. out may be the policy's logits.
template <class V, bool kAny, class T>
GRPO_NOINLINE void reverse_gradient(const PairRow<V>& policy, const PairRow<V>& teacher, int64_t vocab,
                                    const RowStats& stats, typename V::scalar constant, const PairGradient<V>& g,
                                    T* out) {
  using scalar = typename V::scalar;
  const V ratio = V::broadcast(minus_ratio(policy, teacher));
  const V factor = V::broadcast(scalar(policy.map.derivative)), shift_of_d = V::broadcast(constant);
  const V none = V::broadcast(0);
  const V anchor = V::broadcast(g.anchor), slope = V::broadcast(g.slope), shift = V::broadcast(g.shift);
  for (int64_t k = segments_of(vocab) - 1; k >= 0; --k) {
    const int64_t start = k * kSegment, n = vocab - start < kSegment ? vocab - start : kSegment;
    const T* x_from = static_cast<const T*>(policy.logits) + start;
    const T* y_from = static_cast<const T*>(teacher.logits) + start;
    const scalar* exps = policy.exps + start;
    const double whole = ::exp2((policy.largest[k] - stats.anchor) * policy.map.slope) / stats.sum;
    const V of_relative = V::broadcast(scalar(g.of_relative * whole));
    const V of_p = V::broadcast(scalar(g.constant * whole)), linear = V::broadcast(scalar(g.linear * whole));
    for_blocks<V>(x_from, n, [&](const T* p, int64_t offset, int64_t count) GRPO_LAMBDA {
      V x[2], y[2], kept[2], gradient[2];
      load_pair(p, x[0], x[1]);
      load_kept<T>(exps + offset, count, kept[0], kept[1]);
      load_padded<V>(y_from + offset, count, y[0], y[1]);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const V exp = kept[i];
        V d = fma(fma(ratio, y[i], x[i]), factor, shift_of_d), rest = of_p;
        if (kAny || count < 2 * V::lanes) d = select_less(none, exp, d, none);
        if (kAny) rest = fma(clamp_probability_power(fma(x[i] - anchor, slope, shift)), linear, of_p);
        gradient[i] = exp * fma(of_relative, d, rest);
      }
      store_block(out + start, offset, count, gradient[0], gradient[1]);
    });
  }
}

}  // namespace
