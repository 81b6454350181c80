// float16 (IEEE 754 binary16) as its bits, for instruction sets without conversions of it.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace fastvit {

// Exact. Not by arithmetic on subnormal float32, which may be flushed to zero.
FASTVIT_INLINE float float_of_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  uint32_t wide;
  if (magnitude < 0x400) {  // subnormal: units of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    __builtin_memcpy(&wide, &value, sizeof wide);
  } else {  // another exponent bias; infinity and NaN have all bits of it
    wide = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000 : 0x38000000);
  }
  wide |= sign;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// Rounded to nearest, ties to even; infinity from 65520 on.
FASTVIT_INLINE uint16_t float16_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t narrow;
  if (magnitude > 0x7f800000) {
    narrow = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    narrow = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the unit of numbers from 0.5 to 1 is 2^-24 as well
    float sum;
    __builtin_memcpy(&sum, &magnitude, sizeof sum);
    sum += 0.5f;
    __builtin_memcpy(&narrow, &sum, sizeof narrow);
    narrow -= 0x3f000000;
  } else {
    narrow = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | narrow);
}

}  // namespace fastvit
