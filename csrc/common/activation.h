// The activations of operators; the codes are those of the schemas.
#pragma once

#include <cstdint>

namespace fastvit {

enum class Activation : int64_t { none, gelu, quick_gelu, silu, relu };  // gelu: the erf form

}  // namespace fastvit
