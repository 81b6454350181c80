// A linear layer and its activation: the arguments of the kernels.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/isa.h"

namespace fastvit {

// out[m][n] = activation(sum_k x[m][k] weight[n][k] + bias[n]). Strides in elements.
struct LinearParams {
  int64_t rows, columns, depth;
  const void* x;  // rows contiguous
  int64_t x_stride;
  const void* weight;  // one of its strides is 1
  int64_t weight_column_stride, weight_depth_stride;
  const float* bias;  // (columns,)
  void* out;          // contiguous
  bool bfloat16;      // x, weight and out; float32 otherwise
  Activation activation;
  bool accumulate;  // float32: adds to out instead of the bias
};

// The steps of the computation. Columns are divided into panels, and panels into groups that share a packed weight.
struct LinearKernel {
  int64_t panel_columns, row_tile;
  int64_t packed_floats_of_panel, scratch_floats_of_panel, scratch_floats;
  // Packs panels [begin, end).
  void (*pack)(const LinearParams&, int64_t begin, int64_t end, float* packed);
  // Computes rows [row_begin, row_end) of panels [begin, end), packed as pack does.
  void (*multiply)(const LinearParams&, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                   const float* packed, float* scratch);
};

FASTVIT_DECLARE_PER_ISA(LinearKernel linear_kernel(const LinearParams& p);)

}  // namespace fastvit
