// Whether a struct can be a call at all: sizes that some memory holds, and a pointer to everything that is read or
// written. Once a call, before anything is.
#pragma once

#include "../common/surrogates.h"
#include "api.h"
#include "row.h"

namespace {

constexpr int64_t kMost = int64_t(1) << 47;  // of rows, columns or bytes: no address space holds more

inline bool is_count(int64_t n) { return n >= 0 && n <= kMost; }

template <class... Pointers>
inline bool all_given(Pointers... pointers) {
  return (... && (pointers != nullptr));
}

inline bool known_dtype(int32_t dtype) { return dtype >= kFloat32 && dtype <= kFloat16; }

// The largest value of each segment, then the exponentials; threads stay a cache line apart.
inline int64_t scratch_of(int64_t vocab, int32_t rows, bool exponentials) {
  if (vocab <= 0 || vocab > kMost || rows < 1 || rows > 2) return 0;
  return rows * (room_for_largest(vocab) + (exponentials ? room_for_exps(vocab) : 16));
}

// Of every kernel over rows: the rows, what a thread needs, and where statistics lie. Without rows nothing is asked.
inline bool has_rows(const GrpoCpuParams& p, int32_t rows, bool exponentials) {
  if (!is_count(p.rows) || p.length <= 0 || p.vocab <= 0 || p.vocab > kMost || p.threads <= 0) return false;
  if (!all_given(p.logits, p.token_ids, p.numbers, p.scratch)) return false;
  return p.scratch_stride >= scratch_of(p.vocab, rows, exponentials) && p.scratch_stride <= kMost;
}
inline bool has_stats(const GrpoCpuParams& p) { return all_given(p.log_prob, p.entropy, p.anchor, p.log_sum); }

inline bool has_tokens(const GrpoCpuParams& p) {
  if (!all_given(p.advantage, p.policy_weight, p.policy, p.kl, p.flags)) return false;
  return (!p.rollout_scheme || p.rollout_weight) && (!p.rollout_kl_estimator || p.rollout_kl);
}

inline bool has_teacher(const GrpoCpuParams& p) {
  const bool of_rows = all_given(p.teacher_logits, p.teacher_numbers, p.teacher_anchor, p.teacher_log_sum);
  return of_rows && known_dtype(p.teacher_dtype) && all_given(p.divergence, p.shift, p.centre, p.mean);
}

inline bool is_log_probs(const GrpoCpuParams& p) { return has_rows(p, 1, false) && has_stats(p); }
inline bool is_log_probs_backward(const GrpoCpuParams& p) { return is_log_probs(p) && p.out; }
inline bool is_fused_loss(const GrpoCpuParams& p) {
  return has_rows(p, 1, p.dtype == kBFloat16 || p.dtype == kFloat16) && has_stats(p) && has_tokens(p);
}
inline bool is_divergence(const GrpoCpuParams& p) { return has_rows(p, 2, true) && has_stats(p) && has_teacher(p); }
inline bool is_divergence_backward(const GrpoCpuParams& p) {
  return has_rows(p, 2, false) && has_stats(p) && has_teacher(p) && p.grad_divergence && p.out;
}
inline bool is_fused_divergence(const GrpoCpuParams& p) {
  return is_divergence(p) && has_tokens(p) && all_given(p.teacher_log_prob, p.teacher_entropy, p.grad_divergence);
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
