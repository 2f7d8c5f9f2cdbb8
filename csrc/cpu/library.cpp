// The library's entry points: which instruction sets run here, and the call handed to the chosen one.
#include "../common/terms.h"
#include "api.h"
#include "blocks.h"
#include "checks.h"
#include "token_sums.h"

extern const GrpoCpuKernels grpo_cpu_kernels_generic;
#ifdef GRPO_HAS_AVX2
extern const GrpoCpuKernels grpo_cpu_kernels_avx2;
#endif
#ifdef GRPO_HAS_AVX512
extern const GrpoCpuKernels grpo_cpu_kernels_avx512;
#endif

namespace {

const GrpoCpuKernels* kernels_of(const GrpoCpuParams* p) {
  if (p->instruction_set < 0 || p->instruction_set >= kInstructionSets) return nullptr;
  if (!(grpo_cpu_instruction_sets() >> p->instruction_set & 1)) return nullptr;
#ifdef GRPO_HAS_AVX2
  if (p->instruction_set == kAVX2) return &grpo_cpu_kernels_avx2;
#endif
#ifdef GRPO_HAS_AVX512
  if (p->instruction_set == kAVX512) return &grpo_cpu_kernels_avx512;
#endif
  return &grpo_cpu_kernels_generic;
}

int32_t run(GrpoCpuParams* p, bool (*is_call)(const GrpoCpuParams&),
            int32_t (*GrpoCpuKernels::*kernel)(GrpoCpuParams*)) {
  if (!p) return kBadCall;
  const GrpoCpuKernels* kernels = kernels_of(p);
  if (!kernels) return kUnsupportedInstructionSet;
  if (!known_dtype(p->dtype)) return kUnknownDtype;
  if (p->rows == 0) return kOk;
  return is_call(*p) ? (kernels->*kernel)(p) : int32_t(kBadCall);
}

template <class real>
void token_terms(const GrpoCpuParams& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const bool live = !p.live || p.live[r];
    const grpo::TokenTerms<real> terms = live ? grpo::terms_at<real>(p, r) : grpo::TokenTerms<real>{};
    grpo::put_terms(p, r, terms);
    static_cast<real*>(p.grad_log_prob)[r] = terms.slope;
  }
}

}  // namespace

extern "C" {

int64_t grpo_cpu_abi(void) {
  return (int64_t(GRPO_CPU_ABI_VERSION) << 32) | int64_t(sizeof(GrpoCpuParams) << 16) |
         int64_t(sizeof(GrpoCpuTokenSums));
}

int32_t grpo_cpu_instruction_sets(void) {
  int32_t sets = 1 << kGeneric;
#if defined(GRPO_HAS_AVX2) || defined(GRPO_HAS_AVX512)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#ifdef GRPO_HAS_AVX2
  if (avx2) sets |= 1 << kAVX2;
#endif
#ifdef GRPO_HAS_AVX512
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets |= 1 << kAVX512;
#endif
  return sets;
}

int64_t grpo_cpu_scratch(int64_t vocab, int32_t rows, int32_t exponentials) {
  return scratch_of(vocab, rows, exponentials != 0);
}

int64_t grpo_cpu_partial_sums(int64_t rows) { return is_count(rows) ? chunks_of(rows) * kFields : 0; }

int32_t grpo_cpu_log_probs(GrpoCpuParams* p) { return run(p, is_log_probs, &GrpoCpuKernels::log_probs); }

int32_t grpo_cpu_log_probs_backward(GrpoCpuParams* p) {
  return run(p, is_log_probs_backward, &GrpoCpuKernels::log_probs_backward);
}

int32_t grpo_cpu_fused_loss(GrpoCpuParams* p) { return run(p, is_fused_loss, &GrpoCpuKernels::fused_loss); }

int32_t grpo_cpu_divergence(GrpoCpuParams* p) { return run(p, is_divergence, &GrpoCpuKernels::divergence); }

int32_t grpo_cpu_divergence_backward(GrpoCpuParams* p) {
  return run(p, is_divergence_backward, &GrpoCpuKernels::divergence_backward);
}

int32_t grpo_cpu_fused_divergence(GrpoCpuParams* p) {
  return run(p, is_fused_divergence, &GrpoCpuKernels::fused_divergence);
}

int32_t grpo_cpu_token_terms(GrpoCpuParams* p) {
  if (!p) return kBadCall;
  if (!known_dtype(p->dtype)) return kUnknownDtype;
  if (p->rows == 0) return kOk;
  if (!is_token_terms(*p)) return kBadCall;
  if (p->dtype == kFloat64) {
    token_terms<double>(*p);
  } else {
    token_terms<float>(*p);
  }
  return kOk;
}

int32_t grpo_cpu_token_sums(const GrpoCpuTokenSums* p) {
  if (!p) return kBadCall;
  if (!known_dtype(p->dtype)) return kUnknownDtype;
  if (!is_token_sums(*p)) return kBadCall;
  if (p->dtype == kFloat64) {
    token_sums<double>(*p);
  } else {
    token_sums<float>(*p);
  }
  return kOk;
}

void grpo_cpu_new_block(int64_t bytes, int32_t kind, int32_t poisoned, GrpoBytes** place) {
  *place = new_block(bytes, kind, poisoned);
}

void grpo_cpu_give_back(GrpoBytes* tensor) {
  if (tensor) tensor->deleter(tensor);
}

int64_t grpo_cpu_drop_kept(void) { return drop_kept(); }

GrpoBlockBytes grpo_cpu_block_bytes(void) { return {kept_bytes.load(), used_bytes.load()}; }
}
