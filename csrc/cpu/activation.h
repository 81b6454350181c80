// Activations on vectors, for the kernels that are compiled once per instruction set.
#pragma once

#include "../activation.h"
#include "vec.h"

namespace fastvit::FASTVIT_ISA {
namespace {

template <Activation activation>
FASTVIT_INLINE Vec activate(Vec x) {
  if constexpr (activation == Activation::gelu) {
    return gelu(x);
  } else if constexpr (activation == Activation::quick_gelu) {
    return x * sigmoid(x * Vec::fill(1.702f));
  } else if constexpr (activation == Activation::silu) {
    return x * sigmoid(x);
  } else if constexpr (activation == Activation::relu) {
    return max(Vec::fill(0.0f), x);
  } else {
    return x;
  }
}

// Calls f.template operator()<activation>() for the activation known at run time.
template <class F>
FASTVIT_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::quick_gelu: return f.template operator()<Activation::quick_gelu>();
    case Activation::silu: return f.template operator()<Activation::silu>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::none: return f.template operator()<Activation::none>();
  }
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
