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

// Before the first launch, which may be inside a CUDA graph's capture.
template <class T>
int load_kernels(int ring) {
  using real = real_of<T>;
  void (*const rows[])(GrpoCudaParams) = {row_kernel<T, kLogProbs>, row_kernel<T, kLogProbsBackward>,
                                          row_kernel<T, kFusedLoss>};
  void (*const others[])(GrpoCudaParams) = {order_kernel<real, kLogProbs>, order_kernel<real, kLogProbsBackward>,
                                            order_kernel<real, kFusedLoss>, finish_kernel<T>};
  for (const auto kernel : rows)
    if (const int error = port::allow(reinterpret_cast<const void*>(kernel), 1, ring)) return error;
  for (const auto kernel : others)
    if (const int error = port::allow(reinterpret_cast<const void*>(kernel), 1, 1024)) return error;
  return 0;
}

// Calls run(element of the logits).
template <class Run>
int dispatch(const GrpoCudaParams* p, Run run) {
  if (p->rows == 0) return 0;
  if (const int error = port::use_device(p->device)) return error;
  switch (p->dtype) {
    case kFloat32: return run(float());
    case kFloat64: return run(double());
    case kBFloat16: return run(grpo::BFloat16());
    default: return run(grpo::Float16());
  }
}

int element_bytes(int32_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

}  // namespace

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
  const int ring = shared_bytes(plan_of(*device, 2, 1).tiles);  // as large for every row
  if (const int error = load_kernels<float>(ring)) return error;
  if (const int error = load_kernels<double>(ring)) return error;
  if (const int error = load_kernels<grpo::BFloat16>(ring)) return error;
  if (const int error = load_kernels<grpo::Float16>(ring)) return error;
  for (int i = 0; i < 5; ++i) {
    const int cluster = 1 << i;
    const int error =
        port::clusters_at_once(row_kernel<grpo::BFloat16, kFusedLoss>, cluster, kThreads, ring, device->clusters[i]);
    if (error && cluster == 1) return error;  // larger ones it need not take
  }
  return 0;
}

void grpo_cuda_plan(const GrpoCudaDevice* device, int32_t dtype, int64_t vocab, GrpoCudaPlan* plan) {
  *plan = plan_of(*device, element_bytes(dtype), vocab);
}

int32_t grpo_cuda_log_probs(const GrpoCudaParams* p) {
  return dispatch(p, [p](auto element) { return log_probs<decltype(element)>(*p); });
}
int32_t grpo_cuda_log_probs_backward(const GrpoCudaParams* p) {
  return dispatch(p, [p](auto element) { return log_probs_backward<decltype(element)>(*p); });
}
int32_t grpo_cuda_fused_loss(const GrpoCudaParams* p) {
  return dispatch(p, [p](auto element) { return fused_loss<decltype(element)>(*p); });
}
}
