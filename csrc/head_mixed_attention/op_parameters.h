// The small parameters of head-mixed attention: read, folded in double, and handed to the kernels.
#pragma once

#include <tuple>
#include <vector>

#include "attention/op.h"
#include "head_mixed_attention/args.h"

namespace fastvit {

// What the schemas of the operator and of its backward have in common; norm_mean and norm_var stand between the two.
struct MixArguments {
  using Schema = std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                            OptionalTensor, OptionalTensor>;
  Tensor q, k, v;
  OptionalTensor pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias;
};
struct MixOptions {
  using Schema = std::tuple<double, bool, double, OptionalTensor, double>;
  double norm_eps;
  bool layer_norm;
  double output_scale;
  OptionalTensor mask;
  double scale;
};

// (H, H) row by row, and (H,): a linear map over heads. An empty matrix is the identity.
struct HeadMix {
  std::vector<double> matrix, offset;

  HeadMix(const char* op, const OptionalTensor& weight, const char* weight_name, const OptionalTensor& bias,
          const char* bias_name, int64_t heads);

  // The map becomes factor[h] * it[h] + shift[h].
  void scale(const std::vector<double>& factor, const std::vector<double>& shift);
  // Takes the mean over the heads it writes off; the matrix is there afterwards.
  void centre();
  void fill_in_identity();
};

// The vector, or `heads` times `otherwise`; float32 or bfloat16.
std::vector<double> head_vector(const char* op, const OptionalTensor& tensor, const char* name, int64_t heads,
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

  PreMix(const char* op, const OptionalTensor& weight, const OptionalTensor& bias, HeadMapParams& p);
};

// Throws if these are more heads than the kernels take.
void check_heads(const char* op, const AttentionParams& p);

// A float32 tensor of `sizes`, or of size 0 where the parameter it is the gradient of is absent.
Tensor small_result(const std::vector<double>& values, const std::vector<int64_t>& sizes, bool present,
                    const Tensor& like);

}  // namespace fastvit
