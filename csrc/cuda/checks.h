// Whether a struct can be a call of this library: what ../common/checks.h asks, a layout by which the kernels come to
// an end, and places that bulk copies reach. Once a call, before a device is asked for anything.
#pragma once

#include "../common/checks.h"
#include "job.h"

namespace {

using namespace grpo;

constexpr int64_t kMostRows = int64_t(1) << 30;  // kernels count them, and as many more, in 32 bits
constexpr int32_t kMostClusters = 1 << 16;       // so are blocks, several waves of them

inline int element_bytes(int32_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// Whether the largest cluster could hold such a row. In none is a number of its columns or bytes past 32 bits.
inline bool is_row(int64_t vocab, int32_t dtype) {
  constexpr int64_t kMostBytes = int64_t(kMaxCluster) * kMaxTiles * kTileBytes;
  return known_dtype(dtype) && vocab >= 0 && vocab <= kMostBytes / element_bytes(dtype);
}

inline bool is_device(const GrpoCudaDevice& device) {
  for (const int32_t clusters : device.clusters)
    if (clusters < 0 || clusters > kMostClusters) return false;
  return device.shared_bytes >= 0;
}

// Places of the ring without which its warps would wait for one another forever: in one pass a slice stays whole, and
// the gradient's tiles are given back when as many later ones are stored as may be in flight.
template <Mode kMode>
int places_needed(const GrpoCudaParams& p) {
  const int slice = slice_tiles(p.vocab, p.cluster, element_bytes(p.dtype));
  if (kMode == kFusedLoss || kMode == kFusedDivergence) return slice;
  if (kMode == kLogProbs || kMode == kDivergence) return 1;
  return slice < kStoresInFlight + 1 ? slice : kStoresInFlight + 1;
}

template <Mode kMode>
bool has_layout(const GrpoCudaParams& p) {
  if (p.rows > kMostRows || p.length > kMostRows || !is_row(p.vocab, p.dtype) || !p.order) return false;
  if (p.cluster < 1 || p.cluster > kMaxCluster || (p.cluster & (p.cluster - 1))) return false;
  if (p.clusters < 1 || p.clusters > kMostClusters) return false;
  return p.tiles >= places_needed<kMode>(p) && p.tiles <= kMaxTiles;
}

// Whether every row of the gradient begins as far from a multiple of 16 bytes as its logits do.
inline bool same_vectors(const GrpoCudaParams& p) {
  const auto apart = [](uint64_t a, uint64_t b) { return (a - b) % 16 != 0; };
  const uint64_t bytes = uint64_t(element_bytes(p.dtype));
  if (apart(reinterpret_cast<uintptr_t>(p.out), reinterpret_cast<uintptr_t>(p.logits))) return false;
  if (batch_steps(p) && apart(uint64_t(p.out_batch_stride) * bytes, uint64_t(p.batch_stride) * bytes)) return false;
  return !row_steps(p) || !apart(uint64_t(p.out_row_stride) * bytes, uint64_t(p.row_stride) * bytes);
}

// What slices have to say is stored by 16 bytes.
inline bool has_partials(const GrpoCudaParams& p) {
  return p.partials && reinterpret_cast<uintptr_t>(p.partials) % 16 == 0;
}

template <Mode kMode>
bool is_call(const GrpoCudaParams& p) {
  using Rows = Job<float, kMode>;
  if (Rows::kPair && p.teacher_dtype != p.dtype) return false;  // they are read as one type
  bool told = false;
  if constexpr (kMode == kLogProbs || kMode == kLogProbsBackward) told = has_log_probs(p);
  if constexpr (kMode == kFusedLoss) told = has_fused_loss(p);
  if constexpr (kMode == kDivergence) told = has_divergence(p);
  if constexpr (kMode == kDivergenceBackward) told = has_divergence_backward(p);
  if constexpr (kMode == kFusedDivergence) told = has_fused_divergence(p);
  return told && has_layout<kMode>(p) && (Rows::kGradient ? has_out(p) && same_vectors(p) : has_partials(p));
}

}  // namespace
