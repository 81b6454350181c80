// bfloat16, the upper half of a float32, as its bits.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace fastvit {

FASTVIT_INLINE float float_of_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// Rounded to nearest, ties to even.
FASTVIT_INLINE uint16_t bfloat16_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace fastvit
