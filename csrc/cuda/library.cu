// The library's entry points: calls in, launches on the caller's stream out.
#include "token_kernels.h"

namespace {

using namespace grpo;

port::Stream stream_of(const GrpoCudaParams& p) { return static_cast<port::Stream>(p.stream); }

template <class T, Mode kMode>
int launch_rows(const GrpoCudaParams& p) {
  const int error = port::launch(order_kernel<real_of<T>, kMode>, 1, 1, kOrderThreads, kOrderWarps * int(sizeof(int)),
                                 stream_of(p), p);
  if (error) return error;
  const int64_t wanted = p.rows < p.clusters ? p.rows : p.clusters;
  GrpoCudaParams mine = p;
  mine.clusters = int32_t(wanted);
  return port::launch(row_kernel<T, kMode>, mine.clusters * p.cluster, kMode == kFusedLoss ? p.cluster : 1, kThreads,
                      shared_bytes(p.tiles), stream_of(p), mine);
}

template <class T>
int log_probs(const GrpoCudaParams& p) {
  if (const int error = launch_rows<T, kLogProbs>(p)) return error;
  const int blocks = int((p.rows + kConsumers - 1) / kConsumers);
  return port::launch(finish_kernel<T>, blocks, 1, kConsumers, 0, stream_of(p), p);
}
template <class T>
int log_probs_backward(const GrpoCudaParams& p) {
  return launch_rows<T, kLogProbsBackward>(p);
}
template <class T>
int fused_loss(const GrpoCudaParams& p) {
  return launch_rows<T, kFusedLoss>(p);
}

int element_bytes(int32_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

}  // namespace

#define GRPO_DISPATCH(function)                          \
  if (p->rows == 0) return 0;                            \
  if (const int error = port::use_device(p->device)) {   \
    return error;                                        \
  }                                                      \
  switch (p->dtype) {                                    \
    case kFloat32: return function<float>(*p);           \
    case kFloat64: return function<double>(*p);          \
    case kBFloat16: return function<grpo::BFloat16>(*p); \
    default: return function<grpo::Float16>(*p);         \
  }

extern "C" {

int64_t grpo_cuda_abi(void) {
  return (int64_t(GRPO_CUDA_ABI_VERSION) << 48) | (int64_t(sizeof(GrpoCudaParams)) << 32) |
         (int64_t(sizeof(GrpoCudaDevice)) << 16) | int64_t(sizeof(GrpoCudaPlan));
}
int32_t grpo_cuda_emulated(void) { return port::kEmulated; }
const char* grpo_cuda_error(int32_t error) { return port::error_text(error); }

int32_t grpo_cuda_device(int32_t index, GrpoCudaDevice* device) {
  if (const int error = port::describe(index, *device)) return error;
  if (device->major < 9) return 0;  // it has no clusters, and the library no code for it
  if (const int error = port::use_device(index)) return error;
  const GrpoCudaPlan plan = plan_of(*device, 2, 1);  // the ring is as large for every row
  for (int i = 0; i < 5; ++i) {
    const int cluster = 1 << i;
    device->clusters[i] =
        port::clusters_at_once(row_kernel<grpo::BFloat16, kFusedLoss>, cluster, kThreads, shared_bytes(plan.tiles));
  }
  return 0;
}

void grpo_cuda_plan(const GrpoCudaDevice* device, int32_t dtype, int64_t vocab, GrpoCudaPlan* plan) {
  *plan = plan_of(*device, element_bytes(dtype), vocab);
}

int32_t grpo_cuda_log_probs(const GrpoCudaParams* p){GRPO_DISPATCH(log_probs)} int32_t
    grpo_cuda_log_probs_backward(const GrpoCudaParams* p){GRPO_DISPATCH(log_probs_backward)} int32_t
    grpo_cuda_fused_loss(const GrpoCudaParams* p) {
  GRPO_DISPATCH(fused_loss)
}
}
