// 16 fp32 lanes for any processor.
#pragma once

#include "parts.h"

namespace {

using Float = Parts<float>;

using Floats = Float::Vector;
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

// A conversion between these is of the bits, as the operators mean it.
inline Words words_of(Floats x) { return Words(x); }
inline Floats floats_of(Words bits) { return Floats(bits); }
inline Words chosen(Ints mask, Words one, Words other) { return (Words(mask) & one) | (~Words(mask) & other); }

inline Floats from_half(Words half) {
  const Words magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
  const Words exponent = chosen(Ints(magnitude) >= 0x7c00, Words{} + 224, Words{} + 112) << 23;
  const Floats subnormal = __builtin_convertvector(Ints(magnitude), Floats) * 5.9604644775390625e-8f;  // 2^-24
  return floats_of(chosen(Ints(magnitude) < 0x400, words_of(subnormal), (magnitude << 13) + exponent) | sign);
}
inline Words to_half(Floats value) {
  const Words sign = (words_of(value) >> 16) & 0x8000, bits = words_of(value) & 0x7fffffff;
  // An addition does the rounding of a subnormal.
  const Words subnormal = words_of(floats_of(bits) + 0.5f) - 0x3f000000;
  const Words normal = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13;
  Words half = chosen(Ints(bits) < 0x38800000, subnormal, normal);
  half = chosen(Ints(bits) >= 0x477ff000, Words{} + 0x7c00, half);  // it rounds past the largest
  half = chosen(Ints(bits) > 0x7f800000, Words{} + 0x7e00, half);   // NaN
  return half | sign;
}
inline Float load_halves(const Float16* p) {
  return Float::each([&](int i) {
    Halves halves;
    memcpy(&halves, p + 4 * i, sizeof(halves));
    return from_half(__builtin_convertvector(halves, Words));
  });
}
inline void store_halves(Float16* p, Float x) {
  for (int i = 0; i < Float::parts; ++i) {
    const Halves halves = __builtin_convertvector(to_half(x.part[i]), Halves);
    memcpy(p + 4 * i, &halves, sizeof(halves));
  }
}
inline void load_pair(const Float16* p, Float& first, Float& second) {
  first = load_halves(p);
  second = load_halves(p + 16);
}
inline void store_pair(Float16* p, Float first, Float second) {
  store_halves(p, first);
  store_halves(p + 16, second);
}

// Even elements in the first vector, odd ones in the second: the halves of words, the lower one first in memory unless
// the processor has the upper one there.
constexpr bool kLowerFirst = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
inline void load_pair(const BFloat16* p, Float& first, Float& second) {
  Words words[Float::parts];
  memcpy(words, p, sizeof(words));
  const Float lower = Float::each([&](int i) { return floats_of(words[i] << 16); });
  const Float upper = Float::each([&](int i) { return floats_of(words[i] & 0xffff0000); });
  first = kLowerFirst ? lower : upper;
  second = kLowerFirst ? upper : lower;
}
// To nearest even, by a carry into the upper half. A NaN stays one: ours have a zero lower half.
inline Words carry_to_upper_half(Floats x) {
  const Words u = words_of(x);
  return u + 0x7fff + ((u >> 16) & 1);
}
inline void store_pair(BFloat16* p, Float first, Float second) {
  const Float &lower = kLowerFirst ? first : second, &upper = kLowerFirst ? second : first;
  for (int i = 0; i < Float::parts; ++i) {
    const Words words = carry_to_upper_half(lower.part[i]) >> 16 | (carry_to_upper_half(upper.part[i]) & 0xffff0000);
    memcpy(p + 8 * i, &words, sizeof(words));
  }
}

inline Float fma(Float a, Float b, Float c) {
#ifdef __FP_FAST_FMAF
  return Float::each([&](int i) {
    Floats out;
    for (int j = 0; j < 4; ++j) out[j] = __builtin_fmaf(a.part[i][j], b.part[i][j], c.part[i][j]);
    return out;
  });
#else
  return a * b + c;
#endif
}

inline Float abs(Float a) {
  return Float::each([&](int i) { return floats_of(words_of(a.part[i]) & 0x7fffffff); });
}
// |magnitude| with the sign of a.
inline Float copy_sign(Float magnitude, Float a) {
  return Float::each([&](int i) {
    return floats_of((words_of(magnitude.part[i]) & 0x7fffffff) | (words_of(a.part[i]) & 0x80000000));
  });
}

// 2^(m/8), where m sits in the low bits of t (t = m/8 + 1.5 * 2^20).
inline Float power_of_eighths(Float t) {
  return Float::each([&](int i) {
    const Words m = words_of(t.part[i]), k = m & 7;
    const Ints eighths = {kEighths[k[0]], kEighths[k[1]], kEighths[k[2]], kEighths[k[3]]};
    return floats_of(Words(eighths) + (m << 20));
  });
}

// x = fraction * 2^exponent, fraction in [sqrt(1/2), sqrt(2)); x > 0 and normal.
inline void split_power(Float x, Float& fraction, Float& exponent) {
  for (int i = 0; i < Float::parts; ++i) {
    const Words bits = words_of(x.part[i]);
    const Ints k = Ints(bits - 0x3f3504f3) >> 23;
    fraction.part[i] = floats_of(bits - (Words(k) << 23));
    exponent.part[i] = __builtin_convertvector(k, Floats);
  }
}

class FlushDenormals {  // no portable switch
 public:
  FlushDenormals() {}
};

}  // namespace
