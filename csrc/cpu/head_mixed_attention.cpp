// fastvit::head_mixed_attention on CPU: checks, folding of the normalisation, division of the work, registration.
#include "head_mixed_attention.h"

#include <bit>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "attention_entry.h"

namespace fastvit {
namespace {

constexpr char kOp[] = "head_mixed_attention";

// --- Arguments ------------------------------------------------------------------------------------------------------

// A small parameter of one or two axes, as double.
std::vector<double> values(const Tensor& tensor, const char* name) {
  const Dtype dtype = tensor.dtype();
  check(dtype == Dtype::float32 || dtype == Dtype::bfloat16, kOp, ": ", name, " must be float32 or bfloat16, got ",
        dtype);
  const bool matrix = tensor.dim() == 2;
  const int64_t rows = matrix ? tensor.size(0) : 1, columns = tensor.size(matrix ? 1 : 0);
  const int64_t row_stride = matrix ? tensor.stride(0) : 0, column_stride = tensor.stride(matrix ? 1 : 0);
  std::vector<double> result;
  result.reserve(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = i * row_stride + j * column_stride;
      result.push_back(dtype == Dtype::float32
                           ? tensor.data<float>()[at]
                           : std::bit_cast<float>(static_cast<uint32_t>(tensor.data<uint16_t>()[at]) << 16));
    }
  }
  return result;
}

std::vector<double> vector_or(const std::optional<Tensor>& tensor, const char* name, size_t heads, double otherwise) {
  if (!tensor) return std::vector<double>(heads, otherwise);
  check_cpu_shape(kOp, *tensor, name, {static_cast<int64_t>(heads)});
  return values(*tensor, name);
}

// A linear map over heads, as the kernels read it.
struct Mix {
  std::vector<float> weight;  // transposed; empty if there is none
  std::vector<float> bias;

  // factor[h] * (weight x + bias)[h] + shift[h]
  Mix(const std::vector<double>& matrix, const std::vector<double>& offset, const std::vector<double>& factor,
      const std::vector<double>& shift) {
    const size_t heads = factor.size();
    for (size_t g = 0; g < heads && !matrix.empty(); ++g) {
      for (size_t h = 0; h < heads; ++h) weight.push_back(static_cast<float>(factor[h] * matrix[h * heads + g]));
    }
    for (size_t h = 0; h < heads; ++h) bias.push_back(static_cast<float>(factor[h] * offset[h] + shift[h]));
  }
};

// The (H, H) matrix, row by row; empty if there is none.
std::vector<double> matrix_of(const std::optional<Tensor>& tensor, const char* name, size_t heads) {
  if (!tensor) return {};
  check_cpu_shape(kOp, *tensor, name, {static_cast<int64_t>(heads), static_cast<int64_t>(heads)});
  return values(*tensor, name);
}

// Takes the mean over output heads off a mix (the identity, if there is none).
void centre(std::vector<double>& matrix, std::vector<double>& offset) {
  const size_t heads = offset.size();
  if (matrix.empty()) {
    matrix.assign(heads * heads, 0.0);
    for (size_t h = 0; h < heads; ++h) matrix[h * heads + h] = 1.0;
  }
  for (size_t g = 0; g <= heads; ++g) {
    const auto at = [&](size_t h) -> double& { return g < heads ? matrix[h * heads + g] : offset[h]; };
    double mean = 0.0;
    for (size_t h = 0; h < heads; ++h) mean += at(h) / static_cast<double>(heads);
    for (size_t h = 0; h < heads; ++h) at(h) -= mean;
  }
}

// --- The operator ---------------------------------------------------------------------------------------------------

Tensor head_mixed_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                const std::optional<Tensor>& pre_weight, const std::optional<Tensor>& pre_bias,
                                const std::optional<Tensor>& post_weight, const std::optional<Tensor>& post_bias,
                                const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                                const std::optional<Tensor>& norm_mean, const std::optional<Tensor>& norm_var,
                                double norm_eps, bool layer_norm, double output_scale,
                                const std::optional<Tensor>& mask, double scale) {
  HeadMixParams p{attention_params(kOp, q, k, v, scale)};
  check(p.heads <= kHeadMixMaxHeads, kOp, ": at most ", kHeadMixMaxHeads, " heads are accepted, got ", p.heads);
  check(norm_mean.has_value() == norm_var.has_value(), kOp, ": norm_mean and norm_var must be given together");
  check(!layer_norm || !norm_mean, kOp, ": a layer norm takes no norm_mean and norm_var");

  const auto heads = static_cast<size_t>(p.heads);
  const std::vector<double> zeros(heads, 0.0), ones(heads, 1.0);
  std::optional<Mix> pre;
  if (pre_weight) {
    pre.emplace(matrix_of(pre_weight, "pre_weight", heads), vector_or(pre_bias, "pre_bias", heads, 0.0), ones, zeros);
    p.pre_weight = pre->weight.data();
    p.pre_bias = pre->bias.data();
  }
  // norm(x) * output_scale = factor * x + shift, or of a layer norm what follows the division.
  std::vector<double> factor = vector_or(norm_weight, "norm_weight", heads, 1.0);
  std::vector<double> shift = vector_or(norm_bias, "norm_bias", heads, 0.0);
  const std::vector<double> mean = vector_or(norm_mean, "norm_mean", heads, 0.0);
  const std::vector<double> variance = vector_or(norm_var, "norm_var", heads, 1.0);
  for (size_t h = 0; h < heads; ++h) {
    if (norm_mean) factor[h] /= std::sqrt(variance[h] + norm_eps);
    shift[h] = output_scale * (shift[h] - factor[h] * mean[h]);
    factor[h] *= output_scale;
  }
  std::vector<double> post_matrix = matrix_of(post_weight, "post_weight", heads);
  std::vector<double> post_offset = vector_or(post_bias, "post_bias", heads, 0.0);
  if (layer_norm) centre(post_matrix, post_offset);
  const Mix post(post_matrix, post_offset, layer_norm ? ones : factor, layer_norm ? zeros : shift);
  const std::vector<float> last_factor(factor.begin(), factor.end()), last_shift(shift.begin(), shift.end());
  p.post_weight = post_matrix.empty() ? nullptr : post.weight.data();
  p.post_factor = last_factor.data();
  p.post_bias = post.bias.data();
  if (layer_norm) {
    p.norm_factor = last_factor.data();
    p.norm_shift = last_shift.data();
    p.norm_eps = static_cast<float>(norm_eps);
  }

  const bool over_keys = mask && take_mask(kOp, *mask, p);
  Tensor out = attention_output(p, q);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data<void>();
  const KeyLists keys(p.batch, p.keys, over_keys ? &*mask : nullptr);
  run_attention(p, FASTVIT_PER_ISA(head_mix_kernel)(p), p.batch, 2 * p.heads * (p.dim + p.heads) * p.keys,
                [&](int64_t b) { return keys.of(b); });
  return out;
}

FASTVIT_REGISTER(head_mixed_attention, "CPU", head_mixed_attention_cpu);

}  // namespace
}  // namespace fastvit
