// The library's entry points: calls in, launches on the caller's stream out.
#include "checks.h"
#include "token_kernels.h"

namespace {

port::Stream stream_of(const GrpoCudaParams& p) { return static_cast<port::Stream>(p.stream); }

// Clusters to launch. More than are meant to run at once, where rows are many: how many do, a device does not promise,
// and whichever comes late would double the time if each had its share of the rows from the start.
int32_t clusters_of(const GrpoCudaParams& p) {
  constexpr int64_t kWaves = 4, kRowsEach = 16;  // a cluster's first row has nothing to overlap with
  const int64_t waves = p.rows / (p.clusters * kRowsEach);
  const int64_t wanted = p.clusters * (waves < 1 ? 1 : waves < kWaves ? waves : kWaves);
  return int32_t(p.rows < wanted ? p.rows : wanted);
}

template <class T, Mode kMode>
int launch_rows(const GrpoCudaParams& p) {
  using Rows = Job<T, kMode>;
  const int error = port::launch(order_kernel<real_of<T>, kMode>, 1, 1, kOrderThreads, kOrderWarps * int(sizeof(int)),
                                 stream_of(p), p);
  if (error) return error;
  GrpoCudaParams mine = p;
  mine.clusters = clusters_of(p);
  return port::launch(row_kernel<T, kMode>, mine.clusters * p.cluster, Rows::kFused ? p.cluster : 1, kThreads,
                      shared_bytes(p.tiles, Rows::kRows), stream_of(p), mine);
}

// What slices have to say goes through scratch.
template <class T, Mode kMode>
int launch_sums(const GrpoCudaParams& p) {
  if (const int error = launch_rows<T, kMode>(p)) return error;
  const int blocks = int((p.rows + kConsumers - 1) / kConsumers);
  return port::launch(finish_kernel<T, kMode>, blocks, 1, kConsumers, 0, stream_of(p), p);
}

// Before the first launch, which may be inside a CUDA graph's capture: a kernel is not loaded there.
template <class T>
int load_kernels(int ring, GrpoCudaDevice& device) {
  using real = real_of<T>;
  using Kernel = void (*)(GrpoCudaParams);
  const struct {
    Kernel kernel;
    int shared_bytes;
  } all[] = {{row_kernel<T, kLogProbs>, ring},
             {row_kernel<T, kLogProbsBackward>, ring},
             {row_kernel<T, kFusedLoss>, ring},
             {row_kernel<T, kDivergence>, ring},
             {row_kernel<T, kDivergenceBackward>, ring},
             {row_kernel<T, kFusedDivergence>, ring},
             {order_kernel<real, kLogProbs>, 1024},
             {order_kernel<real, kLogProbsBackward>, 1024},
             {order_kernel<real, kFusedLoss>, 1024},
             {order_kernel<real, kDivergence>, 1024},
             {order_kernel<real, kDivergenceBackward>, 1024},
             {order_kernel<real, kFusedDivergence>, 1024},
             {finish_kernel<T, kLogProbs>, 1024},
             {finish_kernel<T, kDivergence>, 1024}};
  for (const auto& one : all) {
    int32_t local_bytes = 0;
    if (const int error = port::load(reinterpret_cast<const void*>(one.kernel), one.shared_bytes, local_bytes))
      return error;
    if (local_bytes > device.local_bytes) device.local_bytes = local_bytes;
  }
  return 0;
}

template <class T, Mode kMode>
int launch(const GrpoCudaParams& p) {
  if constexpr (Job<T, kMode>::kGradient) {
    return launch_rows<T, kMode>(p);
  } else {
    return launch_sums<T, kMode>(p);
  }
}

// A struct in, an error out. Without rows nothing more is asked, and nothing launched.
template <Mode kMode>
int answer(const GrpoCudaParams* p) {
  if (!p || !known_dtype(p->dtype)) return kBadCall;
  if (p->rows == 0) return 0;
  if (!is_call<kMode>(*p)) return kBadCall;
  if (const int error = port::use_device(p->device)) return error;
  switch (p->dtype) {
    case kFloat32: return launch<float, kMode>(*p);
    case kFloat64: return launch<double, kMode>(*p);
    case kBFloat16: return launch<grpo::BFloat16, kMode>(*p);
    default: return launch<grpo::Float16, kMode>(*p);
  }
}

}  // namespace

extern "C" {

int64_t grpo_cuda_abi(void) {
  return (int64_t(GRPO_CUDA_ABI_VERSION) << 48) | (int64_t(sizeof(GrpoCudaParams)) << 32) |
         (int64_t(sizeof(GrpoCudaDevice)) << 16) | int64_t(sizeof(GrpoCudaPlan));
}
int32_t grpo_cuda_emulated(void) { return port::kEmulated; }
const char* grpo_cuda_error(int32_t error) {
  if (error == kBadCall) return "a size, stride, layout or pointer of the call is none that a call has";
  return port::error_text(error);
}

int32_t grpo_cuda_device(int32_t index, GrpoCudaDevice* device) {
  if (!device) return kBadCall;
  if (const int error = port::describe(index, *device)) return error;
  if (device->major < 9) return 0;  // it has no clusters, and the library no code for it
  if (const int error = port::use_device(index)) return error;
  const int ring = shared_bytes(plan_of(*device, 2, 1, 1).tiles, 1);  // as large for every row, or larger
  if (const int error = load_kernels<float>(ring, *device)) return error;
  if (const int error = load_kernels<double>(ring, *device)) return error;
  if (const int error = load_kernels<grpo::BFloat16>(ring, *device)) return error;
  if (const int error = load_kernels<grpo::Float16>(ring, *device)) return error;
  for (int i = 0; i < 5; ++i) {
    const int cluster = 1 << i;
    const int error =
        port::clusters_at_once(row_kernel<grpo::BFloat16, kFusedLoss>, cluster, kThreads, ring, device->clusters[i]);
    if (error && cluster == 1) return error;  // larger ones it need not take
  }
  return 0;
}

void grpo_cuda_plan(const GrpoCudaDevice* device, int32_t dtype, int64_t vocab, int32_t rows, GrpoCudaPlan* plan) {
  if (!plan) return;
  const bool known = device && is_device(*device) && is_row(vocab, dtype) && (rows == 1 || rows == 2);
  *plan = known ? plan_of(*device, element_bytes(dtype), vocab, rows) : GrpoCudaPlan{};
}

int32_t grpo_cuda_log_probs(const GrpoCudaParams* p) { return answer<kLogProbs>(p); }
int32_t grpo_cuda_log_probs_backward(const GrpoCudaParams* p) { return answer<kLogProbsBackward>(p); }
int32_t grpo_cuda_fused_loss(const GrpoCudaParams* p) { return answer<kFusedLoss>(p); }
int32_t grpo_cuda_divergence(const GrpoCudaParams* p) { return answer<kDivergence>(p); }
int32_t grpo_cuda_divergence_backward(const GrpoCudaParams* p) { return answer<kDivergenceBackward>(p); }
int32_t grpo_cuda_fused_divergence(const GrpoCudaParams* p) { return answer<kFusedDivergence>(p); }
}
