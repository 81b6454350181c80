#include "attention/cpu_products.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// Blocks of a product with as many rows and vectors as the registers hold.
constexpr int kOuterColumns = kLanes == 16 ? 4 : 2;
constexpr int outer_rows(int columns) { return kLanes == 16 ? (columns < 4 ? 8 : 6) : 6; }

// The panels from `panel` on that have kR rows; returns the first that has not. factor: in memory, since the loop has
// no register for it.
template <int kR, int kC>
FASTVIT_NOINLINE int64_t multiply_panels_of(Split panels, int64_t panel, int64_t panel_words, int64_t depth,
                                            const float* a, const float* b, const float& factor, float* out,
                                            int64_t partial, bool accumulate) {
  a += panel * panel_words;
  int64_t begin = panels.begin(panel);
  do {
    float* const panel_out = out + begin * kC * kLanes;
    for (int64_t first = 0; first < depth || first == 0; first += partial) {
      const float* rows = b + first * kC * kLanes;
      Vec sums[kR][kC];
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < kC; ++c) sums[r][c] = Vec::fill(0.0f);
      }
      product(
          smaller(depth - first, partial), a + first * kRows, kRows,
          [&](int64_t k, int c) { return Vec::load(rows + (k * kC + c) * kLanes); }, sums);
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < kC; ++c) {
          float* to = panel_out + (r * kC + c) * kLanes;
          const Vec before = first == 0 && !accumulate ? Vec::fill(0.0f) : Vec::load(to);
          fma(sums[r][c], Vec::fill(factor), before).store(to);
        }
      }
    }
    ++panel, begin += kR, a += panel_words;
  } while (panel < panels.blocks && panels.begin(panel + 1) == begin + kR);
  return panel;
}

// For kR rows and kC vectors.
template <int kR, int kC>
FASTVIT_NOINLINE void add_outer(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t stride,
                                float* out) {
  Vec sums[kR][kC];
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) sums[r][c] = Vec::fill(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k, b += stride) {
    Vec columns[kC];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) columns[c] = Vec::load(b + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const Broadcast row = broadcast(a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sums[r][c] = multiply_add(row, columns[c], sums[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) {
      float* to = out + r * stride + c * kLanes;
      (Vec::load(to) + sums[r][c]).store(to);
    }
  }
}

}  // namespace

void multiply_panels(int64_t rows, int64_t panel_words, int vectors, int64_t depth, const float* a, const float* b,
                     float factor, float* out, int64_t partial, bool accumulate) {
  const Split panels(rows, kRows);
  with_constant<kTileVectors>(vectors, [&](auto columns) {
    for (int64_t panel = 0; panel < panels.blocks;) {
      with_constant<kRows>(panels.size(panel), [&](auto height) {
        panel = multiply_panels_of<height.value, columns.value>(panels, panel, panel_words, depth, a, b, factor, out,
                                                                partial, accumulate);
      });
    }
  });
}

void add_outer_product(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t a_stride, const float* b,
                       float* out) {
  const int64_t stride = vectors * kLanes;
  const Split columns(vectors, kOuterColumns);
  for (int64_t column = 0; column < columns.blocks; ++column) {
    const int64_t at = columns.begin(column) * kLanes;
    with_constant<kOuterColumns>(columns.size(column), [&](auto width) {
      constexpr int kHeight = outer_rows(width.value);
      const Split blocks(rows, kHeight);
      for (int64_t block = 0; block < blocks.blocks; ++block) {
        const int64_t r = blocks.begin(block);
        with_constant<kHeight>(blocks.size(block), [&](auto height) {
          add_outer<height.value, width.value>(depth, a + r * a_stride, a_stride, b + at, stride,
                                               out + r * stride + at);
        });
      }
    });
  }
}

}  // namespace fastvit::FASTVIT_ISA
