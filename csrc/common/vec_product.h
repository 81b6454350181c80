// What matrix products on vectors share, for the kernels that are compiled once per instruction set.
//
// A word is 32 bits of an operand: a float32, or, with the bfloat16 dot product (kPairs), a pair of neighbouring
// bfloat16. Kernels of an instruction set that has it are for bfloat16 alone.
#pragma once

#include "common/vec.h"

namespace fastvit::FASTVIT_ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

constexpr int64_t words_of(int64_t elements) { return kPairs ? divide_up(elements, 2) : elements; }

// A word that vectors are multiplied by.
#if defined(FASTVIT_NEON)
// Alone in its register, since a multiply-add takes one lane for all. Compilers would load it to all lanes (LD1R),
// which takes a turn of a multiplier.
struct Broadcast {
  float word;
};
FASTVIT_INLINE Broadcast broadcast(float word) { return {word}; }
#else
using Broadcast = Vec;
FASTVIT_INLINE Broadcast broadcast(float word) { return Vec::fill(word); }
#endif

// a * b + c on floats, or c + the dot product of two pairs.
template <bool pairs = kPairs>
FASTVIT_INLINE Vec multiply_add(Broadcast a, Vec b, Vec c) {
#if defined(FASTVIT_NEON)
  asm("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(c.low) : "w"(b.low), "w"(a.word));
  asm("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(c.high) : "w"(b.high), "w"(a.word));
  return c;
#else
#if defined(__AVX512BF16__)
  if constexpr (pairs) return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
#endif
  return fma(a, b, c);
#endif
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

// sums[r][c] += sum_k a[k * a_stride + r] * column(k, c): rows r are broadcast, columns c are vectors.
template <bool pairs = kPairs, int kR, int kC, class F>
FASTVIT_INLINE void product(int64_t depth, const float* a, int64_t a_stride, const F& column, Vec (&sums)[kR][kC]) {
  for (int64_t k = 0; k < depth; ++k, a += a_stride) {
    Vec columns[kC];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) columns[c] = column(k, c);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const Broadcast row = broadcast(a[r]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sums[r][c] = multiply_add<pairs>(row, columns[c], sums[r][c]);
    }
  }
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
