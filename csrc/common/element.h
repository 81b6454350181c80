// The types of a tensor's elements that kernels compute on.
#pragma once

#include <cstdint>

namespace fastvit {

enum class Element : int32_t { float32, bfloat16, float16 };

}  // namespace fastvit
