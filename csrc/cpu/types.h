// Where elements of the logits sit in the vectors of simd/.
#pragma once

#include <math.h>
#include <string.h>

#include "../common/elements.h"

namespace {

using grpo::BFloat16;
using grpo::Float16;

inline BFloat16 minus_infinity(const BFloat16*) { return {0xff80}; }
inline Float16 minus_infinity(const Float16*) { return {0xfc00}; }
inline float minus_infinity(const float*) { return -INFINITY; }
inline double minus_infinity(const double*) { return -INFINITY; }

// Where element i of a pair of vectors sits among their lanes, first vector first. bfloat16 is split into even and
// odd elements, which is how it unpacks in one instruction.
inline int64_t lane_in_pair(int64_t i, const BFloat16*) { return i % 2 * 16 + i / 2; }
template <class T>
inline int64_t lane_in_pair(int64_t i, const T*) {
  return i;
}

// Bits of 2^(k/8) less k << 20, for k = 0..7: adding a multiple m of 1/8, shifted by 20, gives the bits of 2^(m/8).
alignas(64) constexpr int32_t kEighths[16] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a,
                                              0x3f7744fd, 0x3f7ac0c7, 0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                              0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};

}  // namespace
