// The C ABI of the CPU backend: one struct in, one status out (grpo_kernels/backends/cpu.py mirrors it).
// Tensors belong to the caller; nothing is allocated or kept here but the blocks below.
// A call that the struct itself shows to be none (checks.h) is answered by its status, and nothing is read or written.
// How much memory is behind a pointer, and that strides stay inside of it, is the caller's word.
#pragma once

#include "../common/call.h"

extern "C" {

#define GRPO_CPU_ABI_VERSION 10

typedef enum { kGeneric, kAVX2, kAVX512, kInstructionSets } GrpoInstructionSet;
typedef enum { kOk, kTokenIdOutOfRange, kUnsupportedInstructionSet, kUnknownDtype, kBadCall } GrpoStatus;

struct GrpoCpuParams : GrpoCall {
  int32_t instruction_set;
  int32_t threads;
  void* scratch;  // real[threads][scratch_stride]
  int64_t scratch_stride;
  int64_t bad_row;  // out: a row whose token id is out of range
};

// The records of tokens and what they are weighted and compared with.
struct GrpoCpuTokenSums : GrpoTokenInputs, GrpoTokenRecords {
  const void *log_prob, *entropy;  // real[rows]
  const uint8_t *live, *masked_in;
  double* partials;  // [grpo_cpu_partial_sums(rows)]
  double* sums;      // the fields of grpo_kernels/objectives/metrics.py
  void* loss;        // real
  int64_t rows, sequences;
  int32_t dtype, threads, kl_estimator, reserved;
};

// DLManagedTensor of DLPack's ABI (github.com/dmlc/dlpack, dlpack.h, version 0): fields and order are its own.
struct GrpoBytes {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
  void* context;
  void (*deleter)(GrpoBytes*);
};

// Of each kind one block is kept.
typedef enum { kLogitsBlock, kWeightBlock, kBlockKinds } GrpoBlockKind;

struct GrpoBlockBytes {
  int64_t kept, used;
};

#define GRPO_EXPORT __attribute__((visibility("default")))

// (version << 32) | (sizeof(GrpoCpuParams) << 16) | sizeof(GrpoCpuTokenSums)
GRPO_EXPORT int64_t grpo_cpu_abi(void);
// Bit i: instruction set i can run here.
GRPO_EXPORT int32_t grpo_cpu_instruction_sets(void);
// How many reals of scratch a thread needs for one row or a pair of rows, with and without room for their exponentials
// (the fused loss of half precision logits keeps them there, and fused_divergence and divergence those of a pair);
// 0 for what are no such rows.
GRPO_EXPORT int64_t grpo_cpu_scratch(int64_t vocab, int32_t rows, int32_t exponentials);

// How many numbers of scratch token_sums needs; 0 for a count that no call has.
GRPO_EXPORT int64_t grpo_cpu_partial_sums(int64_t rows);

GRPO_EXPORT int32_t grpo_cpu_log_probs(GrpoCpuParams*);
GRPO_EXPORT int32_t grpo_cpu_log_probs_backward(GrpoCpuParams*);
GRPO_EXPORT int32_t grpo_cpu_fused_loss(GrpoCpuParams*);
// Of a row beside its teacher's: both are fp64, or neither.
GRPO_EXPORT int32_t grpo_cpu_divergence(GrpoCpuParams*);
GRPO_EXPORT int32_t grpo_cpu_divergence_backward(GrpoCpuParams*);
GRPO_EXPORT int32_t grpo_cpu_fused_divergence(GrpoCpuParams*);
// The per-token maths alone: log_prob and the inputs of fused_loss in; policy, kl, flags and grad_log_prob out.
GRPO_EXPORT int32_t grpo_cpu_token_terms(GrpoCpuParams*);
GRPO_EXPORT int32_t grpo_cpu_token_sums(const GrpoCpuTokenSums*);

// A tensor of so many bytes, uninitialised, whose deleter gives them back, filled with 0xff if they are to be poisoned;
// null where the system has none, or that is no size or kind. It is put into *place: what a function returns is lost
// where a signal's handler raises when the call has ended.
GRPO_EXPORT void grpo_cpu_new_block(int64_t bytes, int32_t kind, int32_t poisoned, GrpoBytes** place);
// What its deleter does, for a tensor that reached nobody.
GRPO_EXPORT void grpo_cpu_give_back(GrpoBytes*);
// Gives what is kept to the system; returns its bytes.
GRPO_EXPORT int64_t grpo_cpu_drop_kept(void);
GRPO_EXPORT GrpoBlockBytes grpo_cpu_block_bytes(void);
}

// One instruction set's kernels.
struct GrpoCpuKernels {
  int32_t (*log_probs)(GrpoCpuParams*);
  int32_t (*log_probs_backward)(GrpoCpuParams*);
  int32_t (*fused_loss)(GrpoCpuParams*);
  int32_t (*divergence)(GrpoCpuParams*);
  int32_t (*divergence_backward)(GrpoCpuParams*);
  int32_t (*fused_divergence)(GrpoCpuParams*);
};
