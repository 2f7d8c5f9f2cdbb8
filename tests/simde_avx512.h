// AVX-512 by SIMDe's portable implementations, and the one intrinsic that it lacks (0.8.2).
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

static inline __m256i grpo_cvtps_ph(simde__m512 x, int) {
  simde__m512_private p = simde__m512_to_private(x);
  const __m128i low = _mm256_cvtps_ph(p.m256[0], _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(p.m256[1], _MM_FROUND_TO_NEAREST_INT);
  return _mm256_set_m128i(high, low);
}
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, mode) grpo_cvtps_ph(x, mode)
