// What matrix products on vectors share, for the kernels that are compiled once per instruction set.
//
// A word is 32 bits of an operand: a float32, or, for the bfloat16 dot product (kPairs), a pair of neighbouring
// bfloat16.
#pragma once

#include "common/vec.h"

namespace fastvit::FASTVIT_ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

template <bool kPairs>
constexpr int64_t words_of(int64_t elements) {
  return kPairs ? divide_up(elements, 2) : elements;
}

// a * b + c on floats, or c + the dot product of two pairs.
template <bool kPairs>
FASTVIT_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
#endif
  return fma(a, b, c);
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// f(Int<n>) for a run-time n in [1, N].
template <int N, class F>
inline void with_constant(int64_t n, const F& f) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, f);
  }
  f(Int<N>{});
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
