// The activations of operators; the codes are those of the schemas.
#pragma once

#include <cstdint>

namespace fastvit {

enum class Activation : int64_t { none, gelu, quick_gelu, silu, relu, gelu_tanh };  // gelu: the erf form
constexpr Activation kLastActivation = Activation::gelu_tanh;

}  // namespace fastvit
