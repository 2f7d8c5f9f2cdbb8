// 16 fp32 lanes in plain C++, for the compiler to vectorise: any processor.
#pragma once

#include "../types.h"

namespace {

inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float from_half(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude < 0x400) {  // zero or subnormal: a multiple of 2^-24
    const float value = float(magnitude) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  return from_bits(((magnitude << 13) + ((magnitude >= 0x7c00 ? 224u : 112u) << 23)) | sign);
}

inline Float16 to_half(float value) {
  uint32_t bits = to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};   // NaN
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds past the largest half
  if (bits < 0x38800000)                                     // subnormal: let an addition do the rounding
    return {uint16_t(sign | (to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f)))};
  bits += 0xfff + ((bits >> 13) & 1);
  return {uint16_t(sign | ((bits - 0x38000000) >> 13))};
}

struct Float {
  using scalar = float;
  static constexpr int lanes = 16;
  alignas(64) float v[lanes];

  template <class F>
  static Float each(F&& f) {
    Float out;
    for (int i = 0; i < lanes; ++i) out.v[i] = f(i);
    return out;
  }

  static Float broadcast(float x) {
    return each([&](int) { return x; });
  }
  static Float load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  void store(float* p) const {
    for (int i = 0; i < lanes; ++i) p[i] = v[i];
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
  first = Float::each([&](int i) { return from_half(p[i]); });
  second = Float::each([&](int i) { return from_half(p[16 + i]); });
}
inline void store_pair(Float16* p, Float first, Float second) {
  for (int i = 0; i < 16; ++i) p[i] = to_half(first.v[i]);
  for (int i = 0; i < 16; ++i) p[16 + i] = to_half(second.v[i]);
}

// Even elements in the first vector, odd ones in the second.
inline void load_pair(const BFloat16* p, Float& first, Float& second) {
  first = Float::each([&](int i) { return from_bits(uint32_t(p[2 * i].bits) << 16); });
  second = Float::each([&](int i) { return from_bits(uint32_t(p[2 * i + 1].bits) << 16); });
}
// To nearest even, by a carry into the upper half. A NaN stays one: ours have a zero lower half.
inline uint16_t to_bfloat16(float x) {
  const uint32_t u = to_bits(x);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void store_pair(BFloat16* p, Float first, Float second) {
  for (int i = 0; i < 16; ++i) {
    p[2 * i].bits = to_bfloat16(first.v[i]);
    p[2 * i + 1].bits = to_bfloat16(second.v[i]);
  }
}

inline Float operator+(Float a, Float b) {
  return Float::each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Float operator-(Float a, Float b) {
  return Float::each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Float operator*(Float a, Float b) {
  return Float::each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Float operator/(Float a, Float b) {
  return Float::each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Float fma(Float a, Float b, Float c) {
#ifdef __FP_FAST_FMAF
  return Float::each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
#else
  return Float::each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
#endif
}

// The larger of the two; where either is NaN, b.
inline Float max_or_second(Float a, Float b) {
  return Float::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}

inline Float abs(Float a) {
  return Float::each([&](int i) { return fabsf(a.v[i]); });
}
// |magnitude| with the sign of a.
inline Float copy_sign(Float magnitude, Float a) {
  return Float::each([&](int i) { return copysignf(magnitude.v[i], a.v[i]); });
}
// Whether a < b in every lane.
inline bool all_less(Float a, Float b) {
  bool all = true;
  for (int i = 0; i < Float::lanes; ++i) all = all && a.v[i] < b.v[i];
  return all;
}
// a < b ? x : y
inline Float select_less(Float a, Float b, Float x, Float y) {
  return Float::each([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}

// 2^(m/8), where m sits in the low bits of t (t = m/8 + 1.5 * 2^20).
inline Float power_of_eighths(Float t) {
  return Float::each([&](int i) {
    const uint32_t m = to_bits(t.v[i]);
    return from_bits(uint32_t(kEighths[m & 7]) + (m << 20));
  });
}

// x = fraction * 2^exponent, fraction in [sqrt(1/2), sqrt(2)); x > 0 and normal.
inline void split_power(Float x, Float& fraction, Float& exponent) {
  for (int i = 0; i < Float::lanes; ++i) {
    const uint32_t bits = to_bits(x.v[i]);
    const int32_t k = int32_t(bits - 0x3f3504f3) >> 23;
    fraction.v[i] = from_bits(bits - (uint32_t(k) << 23));
    exponent.v[i] = float(k);
  }
}

class FlushDenormals {  // no portable switch
 public:
  FlushDenormals() {}
};

}  // namespace
