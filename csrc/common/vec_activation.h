// Activations of vectors, compiled once per instruction set.
#pragma once

#include "common/activation.h"
#include "common/vec_gelu.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// Whether a type has too few digits to show the error of the coarse GELU.
template <class T>
constexpr bool is_coarse = false;
template <>
constexpr bool is_coarse<bf16> = true;

// For a kernel with code of its own for none and GELU alone: another activation, which its arguments tell.
constexpr Activation kGiven{-1};

// f.operator()<activation>() for none, GELU or kGiven.
template <class F>
FASTVIT_INLINE auto with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none: return f.template operator()<Activation::none>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    default: return f.template operator()<kGiven>();
  }
}

// f.operator()<known>() for that activation, or for the one given where it is kGiven; kGate: of a gate.
template <Activation activation, bool kGate = false, class F>
FASTVIT_INLINE auto with_given([[maybe_unused]] Activation given, const F& f) {
  if constexpr (activation != kGiven) {
    return f.template operator()<activation>();
  } else {
    switch (given) {
      case Activation::quick_gelu: return f.template operator()<Activation::quick_gelu>();
      case Activation::silu: return f.template operator()<Activation::silu>();
      case Activation::relu: return f.template operator()<Activation::relu>();
      case Activation::sigmoid:
        if constexpr (kGate) return f.template operator()<Activation::sigmoid>();
        [[fallthrough]];
      default: return f.template operator()<Activation::gelu_tanh>();
    }
  }
}

// GELU's tanh form, 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), is x sigmoid(2 u). 2 u from x and
// x^2:
FASTVIT_INLINE Vec twice_tanh_argument(Vec x, Vec square) {
  return x * fma(square, Vec::fill(0.0713548162726f), Vec::fill(1.5957691216057f));
}

// Of each of a few vectors. T: the type that the result will be rounded to.
template <Activation activation, class T = float, int count>
FASTVIT_INLINE void activate(Vec (&x)[count]) {
  if constexpr (activation == Activation::gelu) {
    gelu<is_coarse<T>>(x);
    return;
  }
  for (Vec& value : x) {
    if constexpr (activation == Activation::quick_gelu) {
      value *= sigmoid(value * Vec::fill(1.702f));
    } else if constexpr (activation == Activation::silu) {
      value *= sigmoid(value);
    } else if constexpr (activation == Activation::gelu_tanh) {
      value *= sigmoid(twice_tanh_argument(value, value * value));
    } else if constexpr (activation == Activation::relu) {
      value = max(Vec::fill(0.0f), value);
    } else if constexpr (activation == Activation::sigmoid) {
      value = sigmoid(value);
    }
  }
}

template <Activation activation, class T = float, bool kGate = false, int count>
FASTVIT_INLINE void activate(Activation given, Vec (&x)[count]) {
  with_given<activation, kGate>(given,
                                [&]<Activation known>() __attribute__((always_inline)) { activate<known, T>(x); });
}

template <Activation activation, class T = float>
FASTVIT_INLINE Vec activate(Activation given, Vec x) {
  Vec one[1] = {x};
  activate<activation, T>(given, one);
  return one[0];
}

// At the activation's input x.
template <Activation activation, class T = float>
FASTVIT_INLINE Vec derivative(Vec x) {
  const Vec one = Vec::fill(1.0f);
  if constexpr (activation == Activation::gelu) {
    return gelu_slope<is_coarse<T>>(x);
  } else if constexpr (activation == Activation::quick_gelu) {
    // s + 1.702 x s (1 - s), of which x comes last: 1.702 x may be infinite where x is not.
    const Vec s = sigmoid(x * Vec::fill(1.702f));
    return fma(x, s * (one - s) * Vec::fill(1.702f), s);
  } else if constexpr (activation == Activation::gelu_tanh) {
    // s + x s (1 - s) d(2 u)/dx. As in torch, NaN where x^2 is infinite.
    const Vec square = x * x, s = sigmoid(twice_tanh_argument(x, square));
    return fma(x * (s * (one - s)), fma(square, Vec::fill(0.2140644488178f), Vec::fill(1.5957691216057f)), s);
  } else {
    static_assert(activation == Activation::silu);
    const Vec s = sigmoid(x);
    return s * fma(x, one - s, one);
  }
}

// The gradient of the activation's input x from its output's. ReLU's selects, as torch's does: NaN does not pass a 0.
template <Activation activation, class T = float>
FASTVIT_INLINE Vec input_gradient(Vec grad, Vec x) {
  if constexpr (activation == Activation::none) {
    return grad;
  } else if constexpr (activation == Activation::relu) {
    return keep_positive(x, grad);
  } else {
    return grad * derivative<activation, T>(x);
  }
}

template <Activation activation, class T = float>
FASTVIT_INLINE Vec input_gradient(Activation given, Vec grad, Vec x) {
  return with_given<activation>(
      given, [&]<Activation known>() __attribute__((always_inline)) { return input_gradient<known, T>(grad, x); });
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
