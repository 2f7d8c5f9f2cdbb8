// Element types of the logits as storage.
#pragma once

#include <stdint.h>

namespace grpo {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace grpo
