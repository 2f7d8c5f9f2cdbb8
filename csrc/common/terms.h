// A row's terms of the loss, from and to the parameters of a call.
#pragma once

#include "call.h"
#include "surrogates.h"

namespace grpo {

// All that is known of a row's token before its log-prob and entropy.
template <class real>
GRPO_FN Token<real> token_of(const GrpoCall& call, int64_t r) {
  Token<real> token;
  token.log_prob = token.entropy = 0;
  token.on_policy = !call.old;
  token.old = call.old ? static_cast<const real*>(call.old)[r] : real(0);
  token.ref = call.ref ? static_cast<const real*>(call.ref)[r] : real(0);
  token.rollout = call.rollout ? static_cast<const real*>(call.rollout)[r] : token.old;
  token.advantage = static_cast<const real*>(call.advantage)[r];
  token.policy_weight = static_cast<const real*>(call.policy_weight)[r];
  token.kl_weight = call.kl_weight ? static_cast<const real*>(call.kl_weight)[r] : real(0);
  token.rollout_kl_weight = call.rollout_kl_weight ? static_cast<const real*>(call.rollout_kl_weight)[r] : real(0);
  return token;
}

template <class real>
GRPO_FN TokenTerms<real> terms_of(const GrpoCall& call, const real* numbers, const Token<real>& token) {
  const ObjectiveSpec spec{
      call.surrogate,      call.kl_estimator,         call.kl_gradient,         call.kl_ratio_weighted,
      call.rollout_scheme, call.rollout_kl_estimator, call.rollout_kl_gradient, call.rollout_kl_ratio_weighted};
  return token_terms(spec, numbers, token);
}

// The same from the log-prob and entropy that are already in the call's tensors.
template <class real>
GRPO_FN TokenTerms<real> terms_at(const GrpoCall& call, int64_t r) {
  Token<real> token = token_of<real>(call, r);
  token.log_prob = static_cast<const real*>(call.log_prob)[r];
  token.entropy = static_cast<const real*>(call.entropy)[r];
  return terms_of(call, static_cast<const real*>(call.numbers), token);
}

template <class real>
GRPO_FN void put_terms(const GrpoCall& call, int64_t r, const TokenTerms<real>& terms) {
  static_cast<real*>(call.policy)[r] = terms.policy;
  static_cast<real*>(call.kl)[r] = terms.kl;
  call.flags[r] = uint8_t(terms.flags);
  if (call.rollout_scheme) static_cast<real*>(call.rollout_weight)[r] = terms.rollout_weight;
  if (call.rollout_kl_estimator) static_cast<real*>(call.rollout_kl)[r] = terms.rollout_kl;
}

}  // namespace grpo
