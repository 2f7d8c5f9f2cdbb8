// What every kernel of a call is told, whichever library it is in. Tensors belong to the caller.
// The structs are the named tuples of grpo_kernels/backends/contract.py, field by field; backends/native.py makes the
// whole of them, and tests/test_contract.py reads both.
#pragma once

#include <stdint.h>

typedef enum { kFloat32, kFloat64, kBFloat16, kFloat16 } GrpoDtype;

// [rows] tensors are contiguous, fp32, or fp64 when the logits are ("real" below).

// real[rows]: outputs of log_probs and fused_loss, inputs of log_probs_backward (stats.h)
struct GrpoRowStats {
  void* log_prob;
  void* entropy;
  void* anchor;
  void* log_sum;
};

// real[rows]: inputs of log_probs_backward, null for 0; the first is an output of token_terms
struct GrpoRowGradients {
  void* grad_log_prob;
  const void* grad_entropy;
};

// real[rows]: inputs of fused_loss, token_terms and token_sums; from old on each may be null
struct GrpoTokenInputs {
  const void* advantage;
  const void* policy_weight;
  const void* old;
  const void* ref;
  const void* rollout;
  const void* kl_weight;
  const void* entropy_weight;
  const void* rollout_kl_weight;
};

// real[rows], but for the flags: outputs of fused_loss and token_terms, inputs of token_sums; the last two are null
// without a rollout scheme, and without a KL to the sampler
struct GrpoTokenRecords {
  void* policy;
  void* kl;
  uint8_t* flags;
  void* rollout_weight;
  void* rollout_kl;
};

// real[rows]: outputs of divergence and fused_divergence, inputs of divergence_backward (contract.py has the maths)
struct GrpoDivergenceStats {
  void* divergence;
  void* shift;
  void* centre;
  void* mean;
};

// The teacher's rows beside the policy's: of one vocabulary, for the same tokens. Null outside of divergences.
struct GrpoTeacher {
  void* teacher_log_prob;  // real[rows], as GrpoRowStats
  void* teacher_entropy;
  void* teacher_anchor;
  void* teacher_log_sum;
  const void* teacher_logits;
  int64_t teacher_batch_stride, teacher_row_stride;
  const void* teacher_numbers;
  const void* teacher_temperature;
  const void* grad_divergence;  // real[rows]: the slope of the loss in D; of fused_divergence the weight of D
  int32_t teacher_dtype, divergence_kind;
};

// Row r is logits + (r / length) * batch_stride + (r % length) * row_stride, in elements; out likewise.
struct GrpoCall : GrpoRowStats, GrpoRowGradients, GrpoTokenInputs, GrpoTokenRecords, GrpoDivergenceStats, GrpoTeacher {
  int32_t dtype;
  int32_t surrogate, kl_estimator, kl_gradient, kl_ratio_weighted, rollout_scheme;         // fused_loss, token_terms
  int32_t rollout_kl_estimator, rollout_kl_gradient, rollout_kl_ratio_weighted, reserved;  // likewise
  int64_t rows, length, vocab;
  const void* logits;
  int64_t batch_stride, row_stride;
  const int64_t* token_ids;
  const uint8_t* live;  // null: every row
  const void* numbers;  // real[kNumbers], surrogates.h
  // Gradient: written to out (which may be the logits), unless null.
  void* out;
  int64_t out_batch_stride, out_row_stride;
  const void* temperature;  // real[rows], in the place of the number; null: the number is every row's
};
