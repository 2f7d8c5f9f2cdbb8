// Whether a call can be one at all: sizes that some memory holds, strides that stay in it, and a pointer to everything
// that is read or written. What every library asks; its own checks.h has the rest. Of a call with rows, before any is
// read.
#pragma once

#include "call.h"

namespace {

constexpr int64_t kMost = int64_t(1) << 47;  // of rows, columns or bytes: more than any machine has

inline bool is_count(int64_t n) { return n >= 0 && n <= kMost; }

template <class... Pointers>
inline bool all_given(Pointers... pointers) {
  return (... && (pointers != nullptr));
}

inline bool known_dtype(int32_t dtype) { return dtype >= kFloat32 && dtype <= kFloat16; }

// Whether so many steps stay in memory. A stride that no step takes may be anything.
inline bool in_reach(int64_t steps, int64_t stride) {
  if (steps == 0 || stride == 0) return true;
  return stride >= -kMost && stride <= kMost && steps <= kMost / (stride < 0 ? -stride : stride);
}

// The steps to a call's last sequence, and to the last row of its longest one.
inline int64_t batch_steps(const GrpoCall& p) { return (p.rows - 1) / p.length; }
inline int64_t row_steps(const GrpoCall& p) { return p.rows < p.length ? p.rows - 1 : p.length - 1; }

inline bool in_reach(const GrpoCall& p, int64_t batch_stride, int64_t row_stride) {
  return in_reach(batch_steps(p), batch_stride) && in_reach(row_steps(p), row_stride);
}

inline bool has_rows(const GrpoCall& p) {
  if (!is_count(p.rows) || p.length <= 0 || p.vocab <= 0 || p.vocab > kMost) return false;
  return all_given(p.logits, p.token_ids, p.numbers) && in_reach(p, p.batch_stride, p.row_stride);
}
inline bool has_stats(const GrpoCall& p) { return all_given(p.log_prob, p.entropy, p.anchor, p.log_sum); }
inline bool has_out(const GrpoCall& p) { return p.out && in_reach(p, p.out_batch_stride, p.out_row_stride); }

inline bool has_tokens(const GrpoCall& p) {
  if (!all_given(p.advantage, p.policy_weight, p.policy, p.kl, p.flags)) return false;
  return (!p.rollout_scheme || p.rollout_weight) && (!p.rollout_kl_estimator || p.rollout_kl);
}

inline bool has_teacher(const GrpoCall& p) {
  if (!all_given(p.teacher_logits, p.teacher_numbers, p.teacher_anchor, p.teacher_log_sum)) return false;
  if (!in_reach(p, p.teacher_batch_stride, p.teacher_row_stride)) return false;
  return known_dtype(p.teacher_dtype) && all_given(p.divergence, p.shift, p.centre, p.mean);
}

// What each function is told, whichever library it is in, but for a gradient's place.
inline bool has_log_probs(const GrpoCall& p) { return has_rows(p) && has_stats(p); }
inline bool has_fused_loss(const GrpoCall& p) { return has_log_probs(p) && has_tokens(p); }
inline bool has_divergence(const GrpoCall& p) { return has_log_probs(p) && has_teacher(p); }
inline bool has_divergence_backward(const GrpoCall& p) { return has_divergence(p) && p.grad_divergence; }
inline bool has_fused_divergence(const GrpoCall& p) {
  return has_divergence(p) && has_tokens(p) && all_given(p.teacher_log_prob, p.teacher_entropy, p.grad_divergence);
}

}  // namespace
