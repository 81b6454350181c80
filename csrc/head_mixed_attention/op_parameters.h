// The small parameters of head-mixed attention: read, folded in double, and handed to the kernels.
#pragma once

#include <optional>
#include <vector>

#include "attention/op.h"
#include "head_mixed_attention/args.h"

namespace fastvit {

// (H, H) row by row, and (H,): a linear map over heads. An empty matrix is the identity.
struct HeadMix {
  std::vector<double> matrix, offset;

  HeadMix(const char* op, const std::optional<Tensor>& weight, const char* weight_name,
          const std::optional<Tensor>& bias, const char* bias_name, int64_t heads);

  // The map becomes factor[h] * it[h] + shift[h].
  void scale(const std::vector<double>& factor, const std::vector<double>& shift);
  // Takes the mean over the heads it writes off; the matrix is there afterwards.
  void centre();
  void fill_in_identity();
};

// The vector, or `heads` times `otherwise`; float32 or bfloat16.
std::vector<double> head_vector(const char* op, const std::optional<Tensor>& tensor, const char* name, int64_t heads,
                                double otherwise);

// The (H, H) matrix row by row; float32 or bfloat16.
std::vector<double> head_matrix(const char* op, const Tensor& tensor, const char* name, int64_t heads);

// Takes the mean over rows off each column of an (H, H) matrix, or of one column.
void centre_columns(std::vector<double>& matrix, size_t heads);

std::vector<float> to_floats(const std::vector<double>& values);
// Columns become rows: from the order of (written, read) heads to that of (read, written).
std::vector<float> transposed_floats(const std::vector<double>& matrix);

// The parameters of the maps of q and k; `pre` keeps what they point to.
struct PreMix {
  std::vector<float> weight, back, bias;

  PreMix(const char* op, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, HeadMapParams& p);
};

// Throws if these are more heads than the kernels take.
void check_heads(const char* op, const AttentionParams& p);

// A float32 tensor of `sizes`, or of size 0 where the parameter it is the gradient of is absent.
Tensor small_result(const std::vector<double>& values, const std::vector<int64_t>& sizes, bool present,
                    const Tensor& like);

}  // namespace fastvit
