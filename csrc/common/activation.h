// The activations of operators; the codes are those of the schemas.
#pragma once

#include <cstdint>

namespace fastvit {

// gelu: the erf form. sigmoid: of the gate of an MLP alone.
enum class Activation : int64_t { none, gelu, quick_gelu, silu, relu, gelu_tanh, sigmoid };

}  // namespace fastvit
