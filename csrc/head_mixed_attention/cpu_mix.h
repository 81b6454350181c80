// Products over heads, compiled once per instruction set. They are of float32: there are no pairs in them, and with the
// bfloat16 dot product they are those of AVX-512.
#pragma once

#include "attention/cpu_products.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// Vectors per step of a mix of kR heads.
template <int kR>
constexpr int kMixColumns = kR <= kRows / 2 ? 4 : 2;

// sums[r][c] = bias[r] + sum_g weight[g * heads + r] column(g, c).
template <int kR, class F>
FASTVIT_INLINE void mix_columns(int64_t heads, const float* weight, const float* bias, const F& column,
                                Vec (&sums)[kR][kMixColumns<kR>]) {
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kMixColumns<kR>; ++c) sums[r][c] = Vec::fill(bias[r]);
  }
  product<false>(heads, weight, heads, column, sums);
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA

namespace fastvit::FASTVIT_FLOAT_ISA {

// y_h[i] = bias[h] + sum_g weight[g][h] x_g[i] for `count` vectors of every head, and up to three more. Strides are of
// heads; x and y may be the same.
void mix_heads(int64_t heads, int64_t count, const float* weight, const float* bias, const float* x, int64_t x_stride,
               float* y, int64_t y_stride);

// out[h][g] += sum_i x_h[i] y_g[i], all of them vectors, for all pairs of heads; symmetric: at least for those on or
// above the diagonal.
void add_products_of_heads(int64_t heads, int64_t depth, const float* x, int64_t x_stride, const float* y,
                           int64_t y_stride, bool symmetric, float* out);

}  // namespace fastvit::FASTVIT_FLOAT_ISA
