// A row's terms of the loss, from and to the parameters of a call.
#pragma once

#include "../common/surrogates.h"
#include "api.h"

namespace {

template <class real>
inline grpo::TokenTerms<real> row_terms(const GrpoCpuParams& p, int64_t r) {
  const auto at = [r](const void* values) { return static_cast<const real*>(values)[r]; };
  const auto place = [r](const void* values) { return values ? static_cast<const real*>(values) + r : nullptr; };
  const grpo::Token<real> token{
      at(p.log_prob),   at(p.entropy),   place(p.old),        place(p.ref),
      place(p.rollout), at(p.advantage), at(p.policy_weight), p.kl_weight ? at(p.kl_weight) : real(0)};
  const grpo::ObjectiveSpec spec{p.surrogate, p.kl_estimator, p.kl_gradient, p.kl_ratio_weighted, p.rollout_scheme};
  return grpo::token_terms(spec, static_cast<const real*>(p.numbers), token);
}

template <class real>
inline void put_terms(const GrpoCpuParams& p, int64_t r, const grpo::TokenTerms<real>& terms) {
  static_cast<real*>(p.policy)[r] = terms.policy;
  static_cast<real*>(p.kl)[r] = terms.kl;
  p.flags[r] = uint8_t(terms.flags);
  if (p.rollout_scheme) static_cast<real*>(p.rollout_weight)[r] = terms.rollout_weight;
}

}  // namespace
