// The C ABI of the CUDA backend: one struct in, one CUDA error out (grpo_kernels/backends/cuda.py mirrors it).
// Scratch belongs to the caller too; nothing is allocated or kept here, and nothing waits for the device.
// A call that the struct itself shows to be none (checks.h) is answered by kBadCall, and nothing is launched.
// How much memory is behind a pointer, and that strides stay inside of it, is the caller's word; rows are read by whole
// vectors of 16 bytes, up to 15 bytes at either end beside them.
#pragma once

#include "../common/call.h"

extern "C" {

#define GRPO_CUDA_ABI_VERSION 7

// Beside the runtime's own, which are not negative.
typedef enum { kBadCall = -1 } GrpoCudaError;

// The gradient is always written: a row of it begins as far from a multiple of 16 bytes as its logits do. A teacher's
// logits have the dtype of the policy's.
struct GrpoCudaParams : GrpoCall {
  int32_t device;
  int32_t cluster;   // blocks that share a row: a power of two
  int32_t clusters;  // that run at once
  int32_t tiles;     // places of a block's ring, each of a tile, or of two for a pair of rows
  void* stream;
  int32_t* order;  // [rows + 1] scratch: live rows from the front, dead ones from the back, how many are live
  void* partials;  // scratch, at a multiple of 16 bytes: real[rows][cluster][4] of log_probs, [12] of divergence
};

// What a device offers, asked of the driver.
struct GrpoCudaDevice {
  int32_t major, minor;
  int32_t driver, runtime;  // versions, 1000 * major + 10 * minor
  int32_t shared_bytes;     // a block may use
  int32_t local_bytes;      // of a thread, the most of any kernel: 0 unless registers spilled
  int32_t clusters[5];      // of 1, 2, 4, 8 and 16 blocks that run at once; 0: the device takes no such cluster
};

// How a row of so many columns, or a pair of them (rows = 2), is laid out there; cluster is 0 if it does not fit, or if
// that is no row.
struct GrpoCudaPlan {
  int32_t cluster, clusters, tiles;
};

#define GRPO_EXPORT __attribute__((visibility("default")))

// (version << 48) | sizes of params, device and plan, 16 bits each
GRPO_EXPORT int64_t grpo_cuda_abi(void);
// 1 if this library runs on the CPU instead (tests/cuda_emulator).
GRPO_EXPORT int32_t grpo_cuda_emulated(void);
GRPO_EXPORT const char* grpo_cuda_error(int32_t error);
GRPO_EXPORT int32_t grpo_cuda_device(int32_t index, GrpoCudaDevice*);
GRPO_EXPORT void grpo_cuda_plan(const GrpoCudaDevice*, int32_t dtype, int64_t vocab, int32_t rows, GrpoCudaPlan*);

GRPO_EXPORT int32_t grpo_cuda_log_probs(const GrpoCudaParams*);
GRPO_EXPORT int32_t grpo_cuda_log_probs_backward(const GrpoCudaParams*);
GRPO_EXPORT int32_t grpo_cuda_fused_loss(const GrpoCudaParams*);
GRPO_EXPORT int32_t grpo_cuda_divergence(const GrpoCudaParams*);
GRPO_EXPORT int32_t grpo_cuda_divergence_backward(const GrpoCudaParams*);
GRPO_EXPORT int32_t grpo_cuda_fused_divergence(const GrpoCudaParams*);
}
