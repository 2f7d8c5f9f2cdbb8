// 16 fp32 lanes on AVX2 + FMA + F16C: two 256-bit registers.
#pragma once

#include <immintrin.h>

#include "../types.h"

namespace {

struct Float {
  using scalar = float;
  static constexpr int lanes = 16;
  __m256 lo, hi;

  static Float broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

  static Float load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
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
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  first = {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  second = {_mm256_cvtph_ps(_mm_loadu_si128(q + 2)), _mm256_cvtph_ps(_mm_loadu_si128(q + 3))};
}
inline void store_pair(Float16* p, Float first, Float second) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(first.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(first.hi, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 2, _mm256_cvtps_ph(second.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 3, _mm256_cvtps_ph(second.hi, _MM_FROUND_TO_NEAREST_INT));
}

// Even elements are the lower halves of 32-bit words, odd ones the upper halves.
inline void load_pair(const BFloat16* p, Float& first, Float& second) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  const __m256i lo = _mm256_loadu_si256(q), hi = _mm256_loadu_si256(q + 1), upper = _mm256_set1_epi32(-65536);
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(lo, upper)), _mm256_castsi256_ps(_mm256_and_si256(hi, upper))};
}
// To nearest even, by a carry into the upper half. A NaN stays one: ours have a zero lower half.
inline __m256i carry_to_upper_half(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
}
inline void store_pair(BFloat16* p, Float first, Float second) {
  const auto join = [](__m256 even, __m256 odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(carry_to_upper_half(even), 16), carry_to_upper_half(odd), 0xaa);
  };
  __m256i* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, join(first.lo, second.lo));
  _mm256_storeu_si256(q + 1, join(first.hi, second.hi));
}

inline Float operator+(Float a, Float b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Float operator-(Float a, Float b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Float operator*(Float a, Float b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Float operator/(Float a, Float b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Float fma(Float a, Float b, Float c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

// The larger of the two; where either is NaN, b.
inline Float max_or_second(Float a, Float b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }

inline Float abs(Float a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
// |magnitude| with the sign of a.
inline Float copy_sign(Float magnitude, Float a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(magnitude.lo, _mm256_and_ps(sign, a.lo)), _mm256_or_ps(magnitude.hi, _mm256_and_ps(sign, a.hi))};
}
// Whether a < b in every lane.
inline bool all_less(Float a, Float b) {
  const __m256 both = _mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ));
  return _mm256_movemask_ps(both) == 0xff;
}
// a < b ? x : y
inline Float select_less(Float a, Float b, Float x, Float y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}

// 2^(m/8), where m sits in the low bits of t (t = m/8 + 1.5 * 2^20).
inline Float power_of_eighths(Float t) {
  const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kEighths));
  auto power = [table](__m256 x) {
    const __m256i m = _mm256_castps_si256(x);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_permutevar8x32_epi32(table, m), _mm256_slli_epi32(m, 20)));
  };
  return {power(t.lo), power(t.hi)};
}

// x = fraction * 2^exponent, fraction in [sqrt(1/2), sqrt(2)); x > 0 and normal.
inline void split_power(__m256 x, __m256& fraction, __m256& exponent) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i k = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  fraction = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(k, 23)));
  exponent = _mm256_cvtepi32_ps(k);
}
inline void split_power(Float x, Float& fraction, Float& exponent) {
  split_power(x.lo, fraction.lo, exponent.lo);
  split_power(x.hi, fraction.hi, exponent.hi);
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
