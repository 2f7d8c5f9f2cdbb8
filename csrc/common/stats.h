// A vocabulary row's statistics from its sums, and the terms of its gradient: once a row, in double precision.
#pragma once

#include "logit_map.h"

namespace grpo {

// Nats, but for the anchor: the value that powers are relative to, one of the row's own, near its largest; -inf where
// no column is possible, never where one is NaN. The log-sum-exp stays in two parts, since z_j - (z_anchor + log_sum)
// in fp32 loses the digits that a common offset of the logits costs, where (z_j - z_anchor) - log_sum loses none.
struct RowStats {
  double log_prob, entropy;
  double anchor, log_sum;  // log_sum: of exp(z_j - z_anchor)
  double sum;              // its exponential
};

// From the sums without the sampled column, and that column's power, all relative to the anchor: the largest value, or
// the sampled one, if nothing overflows so.
GRPO_FN RowStats finish_stats(double rest, double entropy_rest, double anchor, double target_power, bool any_possible) {
  if (entropy_rest != entropy_rest) return {NAN, NAN, 0, NAN, NAN};
  if (!any_possible) return {NAN, NAN, -INFINITY, NAN, NAN};
  const double target = exp2(target_power), sum = rest + target;
  const double log_sum = target_power == 0 ? log1p(rest) : log(sum);
  const double weighted = entropy_rest + (target == 0 ? 0 : target * target_power);
  const double entropy = log_sum - kLn2 * weighted / sum;
  RowStats out;
  out.log_prob = target_power * kLn2 - log_sum;
  out.entropy = entropy < 0 ? 0 : entropy;  // rounding of a row that is certain
  out.anchor = anchor;
  out.log_sum = log_sum;
  out.sum = sum;
  return out;
}

// g * (1 - p_target), relative precision kept where p_target is nearly 1.
GRPO_FN double target_slope(double g, double log_prob) { return -g * expm1(log_prob); }

// d loss / d value_j = 2^power_j * (constant + linear * power_j), power_j = (value_j - anchor) * slope + shift; in the
// sampled column it is `target`.
template <class real>
struct GradientTerms {
  real anchor, shift, constant, linear, target;
};

// From what log_probs gave and the slopes g in the log-prob, h in the entropy.
template <class real>
GRPO_FN GradientTerms<real> gradient_terms(double log_prob, double entropy, double anchor, double log_sum, double g,
                                           double h, double derivative) {
  double target = target_slope(g, log_prob);
  if (h != 0 && log_prob > -INFINITY) target -= h * exp(log_prob) * (log_prob + entropy);
  return {real(anchor), real(-log_sum * kLog2e), real(-(g + h * entropy) * derivative), real(-h * kLn2 * derivative),
          real(target * derivative)};
}

}  // namespace grpo
