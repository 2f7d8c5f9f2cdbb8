// 16 fp32 lanes on AVX-512 (F, BW, DQ, VL): one register. Same operations in the same order as avx2.h,
// hence the same bits.
#pragma once

#include <immintrin.h>

#include "../types.h"

namespace {

struct Float {
  using scalar = float;
  static constexpr int lanes = 16;
  __m512 v;

  static Float broadcast(float x) { return {_mm512_set1_ps(x)}; }

  static Float load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};

// 32 neighbouring elements as two vectors and back; lane_in_pair (types.h) tells where each goes.
inline void load_pair(const float* p, Float& first, Float& second) {
  first = Float::load(p);
  second = Float::load(p + 16);
}
inline void store_pair(float* p, Float first, Float second) {
  first.store(p);
  second.store(p + 16);
}

inline void load_pair(const Float16* p, Float& first, Float& second) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  first = {_mm512_cvtph_ps(_mm256_loadu_si256(q))};
  second = {_mm512_cvtph_ps(_mm256_loadu_si256(q + 1))};
}
inline void store_pair(Float16* p, Float first, Float second) {
  __m256i* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, _mm512_cvtps_ph(first.v, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(q + 1, _mm512_cvtps_ph(second.v, _MM_FROUND_TO_NEAREST_INT));
}

// Even elements are the lower halves of 32-bit words, odd ones the upper halves.
inline void load_pair(const BFloat16* p, Float& first, Float& second) {
  const __m512i u = _mm512_loadu_si512(p);
  first = {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
  second = {_mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(-65536)))};
}
// To nearest even, by a carry into the upper half. A NaN stays one: ours have a zero lower half.
inline __m512i carry_to_upper_half(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
}
inline void store_pair(BFloat16* p, Float first, Float second) {
  const __m512i even = _mm512_srli_epi32(carry_to_upper_half(first.v), 16), odd = carry_to_upper_half(second.v);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, odd));
}

inline Float operator+(Float a, Float b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Float operator-(Float a, Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Float operator*(Float a, Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Float operator/(Float a, Float b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Float fma(Float a, Float b, Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// The larger of the two; where either is NaN, b.
inline Float max_or_second(Float a, Float b) { return {_mm512_max_ps(a.v, b.v)}; }

inline Float abs(Float a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
// |magnitude| with the sign of a.
inline Float copy_sign(Float magnitude, Float a) {
  return {_mm512_or_ps(magnitude.v, _mm512_and_ps(_mm512_set1_ps(-0.0f), a.v))};
}
// Whether a < b in every lane.
inline bool all_less(Float a, Float b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) == 0xffff; }
// a < b ? x : y
inline Float select_less(Float a, Float b, Float x, Float y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

// 2^(m/8), where m sits in the low bits of t (t = m/8 + 1.5 * 2^20).
inline Float power_of_eighths(Float t) {
  const __m512i m = _mm512_castps_si512(t.v), table = _mm512_load_si512(kEighths);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutexvar_epi32(m, table), _mm512_slli_epi32(m, 20)))};
}

// x = fraction * 2^exponent, fraction in [sqrt(1/2), sqrt(2)); x > 0 and normal.
inline void split_power(Float x, Float& fraction, Float& exponent) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i k = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  fraction = {_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(k, 23)))};
  exponent = {_mm512_cvtepi32_ps(k)};
}

// While one lives, denormal numbers count as zero: a peaked row would otherwise cost hundreds of cycles an element.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

}  // namespace
