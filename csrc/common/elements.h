// Element types of the logits as storage.
#pragma once

#include <math.h>
#include <stdint.h>

#include "surrogates.h"

namespace grpo {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

GRPO_FN BFloat16 minus_infinity(const BFloat16*) { return {0xff80}; }
GRPO_FN Float16 minus_infinity(const Float16*) { return {0xfc00}; }
GRPO_FN float minus_infinity(const float*) { return -INFINITY; }
GRPO_FN double minus_infinity(const double*) { return -INFINITY; }

}  // namespace grpo
