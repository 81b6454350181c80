// The small parameters of head-mixed attention, read and folded in double.
#pragma once

#include <tuple>
#include <vector>

#include "attention/op.h"
#include "head_mixed_attention/args.h"

namespace fastvit {

// Arguments that the operator and its backward share, in the schema's order; norm_mean and norm_var come in between.
struct MixArguments {
  using Schema = std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                            OptionalTensor, OptionalTensor>;
  Tensor q, k, v;
  OptionalTensor pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias;
};
struct MixOptions {
  using Schema = std::tuple<double, bool, double, bool, OptionalTensor, double>;
  double norm_eps;
  bool layer_norm;
  double output_scale;
  bool centred;
  OptionalTensor mask;
  double scale;

  float centre(int64_t keys) const { return centred && keys > 0 ? 1.0f / static_cast<float>(keys) : 0.0f; }
};

// A linear map over heads: an (H, H) matrix row by row, or empty for the identity, and an offset (H,).
struct HeadMix {
  std::vector<double> matrix, offset;

  HeadMix(const char* op, const OptionalTensor& weight, const char* weight_name, const OptionalTensor& bias,
          const char* bias_name, int64_t heads);

  // Appends y[h] = factor[h] * x[h] + shift[h] to the map.
  void scale(const std::vector<double>& factor, const std::vector<double>& shift);
  void fill_in_identity();
};

// The vector, float32 or bfloat16, or `otherwise` for every head.
std::vector<double> head_vector(const char* op, const OptionalTensor& tensor, const char* name, int64_t heads,
                                double otherwise);

// The (H, H) matrix row by row; float32 or bfloat16.
std::vector<double> head_matrix(const char* op, const Tensor& tensor, const char* name, int64_t heads);

std::vector<float> to_floats(const std::vector<double>& values);
// The transpose: from [head written][head read] to [head read][head written].
std::vector<float> transposed_floats(const std::vector<double>& matrix);

// The mix before the softmax: sets the pointers in p, to memory of this object.
struct PreMix {
  std::vector<float> weight, back, bias;

  PreMix(const char* op, const OptionalTensor& weight, const OptionalTensor& bias, HeadMapParams& p);
};

// Throws if there are more heads than the kernels support.
void check_heads(const char* op, const AttentionParams& p);

// A float32 tensor of `sizes`, or of size 0 where the parameter it is the gradient of is absent.
Tensor small_result(const std::vector<double>& values, const std::vector<int64_t>& sizes, bool present,
                    const Tensor& like);

}  // namespace fastvit
