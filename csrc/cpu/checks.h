// Whether a struct can be a call of this library: what ../common/checks.h asks, threads and scratch. Once a call,
// before anything is read or written.
#pragma once

#include "../common/checks.h"
#include "../common/surrogates.h"
#include "api.h"
#include "row.h"

namespace {

// The largest value of each segment, then the exponentials; threads stay a cache line apart.
inline int64_t scratch_of(int64_t vocab, int32_t rows, bool exponentials) {
  if (vocab <= 0 || vocab > kMost || rows < 1 || rows > 2) return 0;
  return rows * (room_for_largest(vocab) + (exponentials ? room_for_exps(vocab) : 16));
}

// Of every kernel over rows, what a thread needs.
inline bool has_scratch(const GrpoCpuParams& p, int32_t rows, bool exponentials) {
  if (p.threads <= 0 || !p.scratch) return false;
  return p.scratch_stride >= scratch_of(p.vocab, rows, exponentials) && p.scratch_stride <= kMost;
}

// A gradient that nobody asks for has no place.
inline bool may_have_out(const GrpoCpuParams& p) { return !p.out || has_out(p); }

inline bool is_log_probs(const GrpoCpuParams& p) { return has_log_probs(p) && has_scratch(p, 1, false); }
inline bool is_log_probs_backward(const GrpoCpuParams& p) { return is_log_probs(p) && has_out(p); }
inline bool is_fused_loss(const GrpoCpuParams& p) {
  const bool exponentials = p.dtype == kBFloat16 || p.dtype == kFloat16;
  return has_fused_loss(p) && may_have_out(p) && has_scratch(p, 1, exponentials);
}
inline bool is_divergence(const GrpoCpuParams& p) { return has_divergence(p) && has_scratch(p, 2, true); }
inline bool is_divergence_backward(const GrpoCpuParams& p) {
  return has_divergence_backward(p) && has_out(p) && has_scratch(p, 2, false);
}
inline bool is_fused_divergence(const GrpoCpuParams& p) {
  return has_fused_divergence(p) && may_have_out(p) && has_scratch(p, 2, true);
}

inline bool is_token_terms(const GrpoCpuParams& p) {
  return is_count(p.rows) && all_given(p.numbers, p.log_prob, p.entropy, p.grad_log_prob) && has_tokens(p);
}

inline bool is_token_sums(const GrpoCpuTokenSums& p) {
  if (!is_count(p.rows) || p.threads <= 0 || !all_given(p.sums, p.loss)) return false;
  if (p.rows == 0) return true;
  if (!all_given(p.log_prob, p.entropy, p.live, p.masked_in, p.partials, p.flags)) return false;
  return (!p.policy_weight || p.policy) && (!p.kl_weight || p.kl) && (!p.rollout_kl_weight || p.rollout_kl);
}

}  // namespace
