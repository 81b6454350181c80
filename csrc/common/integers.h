// Small functions of sizes, for every file: host, device, and each instruction set.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace fastvit {

FASTVIT_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTVIT_INLINE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTVIT_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTVIT_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }

}  // namespace fastvit
