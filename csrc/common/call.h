// What every kernel of a call is told, whichever library it is in (grpo_kernels/backends/native.py mirrors it).
// Tensors belong to the caller.
#pragma once

#include <stdint.h>

typedef enum { kFloat32, kFloat64, kBFloat16, kFloat16 } GrpoDtype;

// Row r is logits + (r / length) * batch_stride + (r % length) * row_stride, in elements; out likewise.
// [rows] tensors are contiguous, fp32, or fp64 when the logits are ("real" below).
struct GrpoCall {
  int32_t dtype;
  int32_t surrogate, kl_estimator, kl_gradient, kl_ratio_weighted, rollout_scheme;  // fused_loss, token_terms
  int64_t rows, length, vocab;
  const void* logits;
  int64_t batch_stride, row_stride;
  const int64_t* token_ids;
  const uint8_t* live;  // null: every row
  const void* numbers;  // real[kNumbers], surrogates.h
  // Gradient: written to out (which may be the logits), unless null.
  void* out;
  int64_t out_batch_stride, out_row_stride;
  // real[rows]: outputs of log_probs and fused_loss, inputs of log_probs_backward (stats.h)
  void *log_prob, *entropy, *anchor, *log_sum;
  // real[rows]: d loss / d log_prob (an output of token_terms) and d loss / d entropy, inputs of log_probs_backward
  void* grad_log_prob;
  const void* grad_entropy;
  // real[rows]: inputs of fused_loss and token_terms; old, ref and the last three may be null
  const void *advantage, *policy_weight, *old, *ref, *kl_weight, *entropy_weight, *rollout;
  // their outputs: real[rows] twice, flags, and real[rows] with a rollout scheme
  void *policy, *kl;
  uint8_t* flags;
  void* rollout_weight;
};
