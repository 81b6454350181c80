// The products of attention kernels, compiled once per instruction set. Not inlined: there are many callers, and many
// sizes of blocks.
#pragma once

#include "common/vec_product.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int kTileVectors = 2;  // of queries, at most, in a tile
// Rows (broadcast scalars) of a product's block: as many sums as the registers hold beside the operands.
constexpr int kRows = Vec::lanes == 16 ? 12 : 6;
// Terms of a partial sum: long sums are made of partial sums, whose rounding errors are smaller.
#if defined(__FMA__) || !defined(__SSE__)
constexpr int64_t kPartialSum = 64;
#else
constexpr int64_t kPartialSum = 8;  // products are rounded, too
#endif

// n things in as few blocks of at most `largest` as possible, evenly.
struct Split {
  int64_t n, blocks;
  Split(int64_t n, int64_t largest) : n(n), blocks(divide_up(n, largest)) {}
  int64_t begin(int64_t block) const { return block * n / blocks; }
  int64_t size(int64_t block) const { return begin(block + 1) - begin(block); }
};

}  // namespace

// out[r] = factor * sum_k a[r][k] b[k] for `rows` rows, whose words k are in panels of up to kRows rows,
// [panel][k][row], `panel_words` apart; rows of b and out are `vectors` vectors, at most kTileVectors. In partial sums
// of `partial` terms; accumulate: adds to out.
void multiply_panels(int64_t rows, int64_t panel_words, int vectors, int64_t depth, const float* a, const float* b,
                     float factor, float* out, int64_t partial = kPartialSum, bool accumulate = false);

// out[r] += sum_k a[r * a_stride + k] * b[k], where rows of b and out are `vectors` vectors.
void add_outer_product(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t a_stride, const float* b,
                       float* out);

}  // namespace fastvit::FASTVIT_ISA
