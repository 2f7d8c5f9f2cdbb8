// The C ABI of the CPU backend: one struct in, one status out (grpo_kernels/backends/cpu.py mirrors it).
// Tensors belong to the caller; nothing is allocated or kept here.
#pragma once

#include "../common/call.h"

extern "C" {

#define GRPO_CPU_ABI_VERSION 4

typedef enum { kGeneric, kAVX2, kAVX512, kInstructionSets } GrpoInstructionSet;
typedef enum { kOk, kTokenIdOutOfRange, kUnsupportedInstructionSet, kUnknownDtype } GrpoStatus;

struct GrpoCpuParams : GrpoCall {
  int32_t instruction_set;
  int32_t threads;
  void* scratch;  // real[threads][scratch_stride]
  int64_t scratch_stride;
  int64_t bad_row;  // out: a row whose token id is out of range
};

// The records of rows and the tensors that they are weighted and compared with, real[rows]; ref, old, rollout,
// rollout_weight, kl_weight and entropy_weight may be null.
typedef struct {
  int32_t dtype, threads, kl_estimator, reserved;
  int64_t rows, sequences;
  const uint8_t *live, *masked_in, *flags;
  const void *log_prob, *entropy, *policy, *kl;
  const void *policy_weight, *kl_weight, *entropy_weight, *old, *ref, *rollout, *rollout_weight;
  double* partials;  // [ceil(rows / 512)][29]
  double* sums;      // [29], the fields of grpo_kernels/metrics.py
  void* loss;        // real
} GrpoCpuTokenSums;

#define GRPO_EXPORT __attribute__((visibility("default")))

// (version << 32) | (sizeof(GrpoCpuParams) << 16) | sizeof(GrpoCpuTokenSums)
GRPO_EXPORT int64_t grpo_cpu_abi(void);
// Bit i: instruction set i can run here.
GRPO_EXPORT int32_t grpo_cpu_instruction_sets(void);
// How many reals of scratch a thread needs, with and without room for a row's exponentials (the fused loss of half
// precision logits keeps them there).
GRPO_EXPORT int64_t grpo_cpu_scratch(int64_t vocab, int32_t exponentials);

GRPO_EXPORT int32_t grpo_cpu_log_probs(GrpoCpuParams*);
GRPO_EXPORT int32_t grpo_cpu_log_probs_backward(GrpoCpuParams*);
GRPO_EXPORT int32_t grpo_cpu_fused_loss(GrpoCpuParams*);
// The per-token maths alone: log_prob and the inputs of fused_loss in; policy, kl, flags and grad_log_prob out.
GRPO_EXPORT int32_t grpo_cpu_token_terms(GrpoCpuParams*);
GRPO_EXPORT int32_t grpo_cpu_token_sums(const GrpoCpuTokenSums*);
}

// One instruction set's kernels.
struct GrpoCpuKernels {
  int32_t (*log_probs)(GrpoCpuParams*);
  int32_t (*log_probs_backward)(GrpoCpuParams*);
  int32_t (*fused_loss)(GrpoCpuParams*);
};
