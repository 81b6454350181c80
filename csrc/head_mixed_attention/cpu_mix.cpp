#include "head_mixed_attention/cpu_mix.h"

#include "head_mixed_attention/args.h"

#if !defined(__AVX512BF16__)
namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int kPairRows = kLanes == 16 ? 4 : 3, kPairColumns = kLanes == 16 ? 6 : 4;

constexpr int kCopied = 4;  // vectors of every head that are copied for several blocks of heads

template <int kR>
FASTVIT_INLINE void mix_and_store(int64_t heads, const float* weight, const float* bias, const float* x,
                                  int64_t x_stride, float* y, int64_t y_stride) {
  Vec sums[kR][kMixColumns<kR>];
  mix_columns<kR>(
      heads, weight, bias, [&](int64_t g, int c) { return Vec::load(x + g * x_stride + c * kLanes); }, sums);
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kMixColumns<kR>; ++c) sums[r][c].store(y + r * y_stride + c * kLanes);
  }
}

// For kR heads, which are all of them.
template <int kR>
FASTVIT_NOINLINE void mix_all(int64_t count, const float* weight, const float* bias, const float* x, int64_t x_stride,
                              float* y, int64_t y_stride) {
  for (int64_t i = 0; i < count; i += kMixColumns<kR>) {
    mix_and_store<kR>(kR, weight, bias, x + i * kLanes, x_stride, y + i * kLanes, y_stride);
  }
}

// For kR of them, of the vectors copied.
template <int kR>
FASTVIT_NOINLINE void mix_copied(int64_t heads, const float* weight, const float* bias, const float* copy, float* y,
                                 int64_t y_stride) {
  for (int c = 0; c < kCopied; c += kMixColumns<kR>) {
    mix_and_store<kR>(heads, weight, bias, copy + c * kLanes, kCopied * kLanes, y + c * kLanes, y_stride);
  }
}

}  // namespace

void mix_heads(int64_t heads, int64_t count, const float* weight, const float* bias, const float* x, int64_t x_stride,
               float* y, int64_t y_stride) {
  if (heads <= kRows) {
    with_constant<kRows>(heads, [&](auto rows) { mix_all<rows.value>(count, weight, bias, x, x_stride, y, y_stride); });
    return;
  }
  float copy[kHeadMixMaxHeads * kCopied * kLanes];
  const Split blocks(heads, kRows);
  for (int64_t i = 0; i < count; i += kCopied) {
    for (int64_t g = 0; g < heads; ++g) {
      __builtin_memcpy(copy + g * kCopied * kLanes, x + g * x_stride + i * kLanes, kCopied * kLanes * sizeof(float));
    }
    for (int64_t block = 0; block < blocks.blocks; ++block) {
      const int64_t h = blocks.begin(block);
      with_constant<kRows>(blocks.size(block), [&](auto rows) {
        mix_copied<rows.value>(heads, weight + h, bias + h, copy, y + h * y_stride + i * kLanes, y_stride);
      });
    }
  }
}

void add_products_of_heads(int64_t heads, int64_t depth, const float* x, int64_t x_stride, const float* y,
                           int64_t y_stride, bool symmetric, float* out) {
  const Split rows(heads, kPairRows), columns(heads, kPairColumns);
  for (int64_t r = 0; r < rows.blocks; ++r) {
    for (int64_t c = 0; c < columns.blocks; ++c) {
      const int64_t h = rows.begin(r), g = columns.begin(c);
      if (symmetric && g + columns.size(c) <= h) continue;
      with_constant<kPairRows>(rows.size(r), [&](auto row_count) {
        with_constant<kPairColumns>(columns.size(c), [&](auto column_count) {
          constexpr int kR = row_count.value, kC = column_count.value;
          Vec sums[kR][kC];
#pragma GCC unroll 8
          for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
            for (int k = 0; k < kC; ++k) sums[i][k] = Vec::fill(0.0f);
          }
          for (int64_t at = 0; at < depth * kLanes; at += kLanes) {
            Vec left[kR];
#pragma GCC unroll 8
            for (int i = 0; i < kR; ++i) left[i] = Vec::load(x + (h + i) * x_stride + at);
#pragma GCC unroll 8
            for (int k = 0; k < kC; ++k) {
              const Vec right = Vec::load(y + (g + k) * y_stride + at);
#pragma GCC unroll 8
              for (int i = 0; i < kR; ++i) sums[i][k] = fma(left[i], right, sums[i][k]);
            }
          }
#pragma GCC unroll 8
          for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
            for (int k = 0; k < kC; ++k) {
              float* to = out + ((h + i) * heads + g + k) * kLanes;
              (Vec::load(to) + sums[i][k]).store(to);
            }
          }
        });
      });
    }
  }
}

}  // namespace fastvit::FASTVIT_ISA
#endif
