// A linear layer with what stands before and behind it: the arguments of the kernels.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/element.h"
#include "common/isa.h"

namespace fastvit {

constexpr int64_t kBlockFloats = 64 << 10;  // of a block of rows at most, half of a small L2 cache

// Rows of a product that are the windows of a convolution over maps, with zeros around them. A window is `planes` times
// `kernel_height` runs of adjacent elements: of a channel's row where the rows of each channel are contiguous, and of
// all channels of a map's row where its pixels are.
struct Windows {
  int64_t height, width, rows, columns;  // of a map, and of its grid of windows
  int64_t kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
  int64_t planes, pixel;                         // channels apart, or `pixel` of them adjacent
  int64_t map_stride, plane_stride, row_stride;  // in elements; columns are `pixel` apart
};

// out = residual + scale * activation(column_factor * (norm(x) weight^T + bias) + column_shift), of which all but the
// product may be absent. Strides in elements.
struct LinearParams {
  int64_t rows, columns, depth;
  const void* x;  // one of its strides is 1
  int64_t x_stride, x_depth_stride = 1;
  const Windows* windows;                // in x, or null: rows
  int64_t first;                         // element of the windows that is the depth's first
  bool has_norm;                         // a layer norm of each row of x
  const float *norm_weight, *norm_bias;  // (depth,), may be null
  float norm_eps;
  const void* weight;  // one of its strides is 1
  int64_t weight_column_stride, weight_depth_stride;
  int64_t panel_stride;                       // floats between packed panels
  const float* bias;                          // (columns,)
  const float *column_factor, *column_shift;  // (columns,), or both null
  Activation activation;
  const float* scale;    // (columns,), or null
  const void* residual;  // rows contiguous, or null
  int64_t residual_stride;
  void* out;        // contiguous
  Element element;  // of x, weight, residual and out
  bool accumulate;  // float32: starts from out instead of the bias
};

// `rows` rows of a product's input, as its kernel reads them, in a block of `block_rows`.
struct RowBlock {
  float* data;
  int64_t rows, block_rows;
};

// The steps of the computation. The columns are divided into panels of the packed weight, the rows into blocks that
// stay in the L2 cache.
struct LinearKernel {
  int64_t panel_columns, row_tile;
  int64_t panel_floats;  // of a packed panel
  int64_t row_floats;    // of a row in a block
  int64_t row_stride;    // floats between rows of a block
  bool pairs;            // a word of the depth is a pair of bfloat16, and a float otherwise
  // Packs panels [begin, end).
  void (*pack)(const LinearParams&, int64_t begin, int64_t end, float* packed);
  // Copies rows of x, from `row` on, to a block, normalised if they are contiguous.
  void (*load)(const LinearParams&, int64_t row, const RowBlock&);
  // Computes panels [begin, end) of the rows in a block, which are rows from `row` on of out; `packed` is panel begin.
  void (*multiply)(const LinearParams&, int64_t row, const RowBlock&, int64_t begin, int64_t end, const float* packed);
  // Likewise, to a block of the product that follows; without scale and residual.
  void (*multiply_to_block)(const LinearParams&, const RowBlock&, int64_t begin, int64_t end, const float* packed,
                            const RowBlock& next);
  // Likewise, times activation(gate), a product of the same block by another weight. `gates` holds a panel of them.
  void (*multiply_gated_to_block)(const LinearParams& gate, const LinearParams&, const RowBlock&, int64_t begin,
                                  int64_t end, const float* gate_packed, const float* packed, float* gates,
                                  const RowBlock& next);
  // Normalises rows in a block in place.
  void (*normalize)(const LinearParams&, const RowBlock&);
};

FASTVIT_DECLARE_PER_ISA(LinearKernel linear_kernel(const LinearParams& p);)

}  // namespace fastvit
