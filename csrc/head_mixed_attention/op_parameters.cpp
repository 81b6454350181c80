#include "head_mixed_attention/op_parameters.h"

namespace fastvit {
std::vector<double> head_vector(const char* op, const OptionalTensor& tensor, const char* name, int64_t heads,
                                double otherwise) {
  if (!tensor) return std::vector<double>(static_cast<size_t>(heads), otherwise);
  check_cpu_shape(op, *tensor, name, {heads});
  const std::vector<float> values = small_values(op, *tensor, name);
  return {values.begin(), values.end()};
}

std::vector<double> head_matrix(const char* op, const Tensor& tensor, const char* name, int64_t heads) {
  check_cpu_shape(op, tensor, name, {heads, heads});
  const std::vector<float> values = small_values(op, tensor, name);
  return {values.begin(), values.end()};
}

HeadMix::HeadMix(const char* op, const OptionalTensor& weight, const char* weight_name, const OptionalTensor& bias,
                 const char* bias_name, int64_t heads)
    : offset(head_vector(op, bias, bias_name, heads, 0.0)) {
  if (weight) matrix = head_matrix(op, *weight, weight_name, heads);
}

void HeadMix::scale(const std::vector<double>& factor, const std::vector<double>& shift) {
  const size_t heads = offset.size();
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] *= factor[i / heads];
  for (size_t h = 0; h < heads; ++h) offset[h] = factor[h] * offset[h] + shift[h];
}

void HeadMix::fill_in_identity() {
  if (!matrix.empty()) return;
  const size_t heads = offset.size();
  matrix.assign(heads * heads, 0.0);
  for (size_t h = 0; h < heads; ++h) matrix[h * heads + h] = 1.0;
}

std::vector<float> to_floats(const std::vector<double>& values) { return {values.begin(), values.end()}; }

std::vector<float> transposed_floats(const std::vector<double>& matrix) {
  size_t heads = 0;
  while (heads * heads < matrix.size()) ++heads;
  std::vector<float> result;
  result.reserve(matrix.size());
  for (size_t g = 0; g < heads; ++g) {
    for (size_t h = 0; h < heads; ++h) result.push_back(static_cast<float>(matrix[h * heads + g]));
  }
  return result;
}

PreMix::PreMix(const char* op, const OptionalTensor& pre_weight, const OptionalTensor& pre_bias, HeadMapParams& p) {
  if (!pre_weight) return;
  const HeadMix mix(op, pre_weight, "pre_weight", pre_bias, "pre_bias", p.heads);
  weight = transposed_floats(mix.matrix), back = to_floats(mix.matrix), bias = to_floats(mix.offset);
  p.pre_weight = weight.data(), p.pre_bias = bias.data();
}

void check_heads(const char* op, const AttentionParams& p) {
  check(p.heads <= kHeadMixMaxHeads, op, ": expected at most ", kHeadMixMaxHeads, " heads, got ", p.heads);
}

Tensor small_result(const std::vector<double>& values, const std::vector<int64_t>& sizes, bool present,
                    const Tensor& like) {
  Tensor result = empty(present ? sizes : std::vector<int64_t>{0}, like, Dtype::float32);
  float* to = result.mutable_data<float>();
  for (size_t i = 0; present && i < values.size(); ++i) to[i] = static_cast<float>(values[i]);
  return result;
}

}  // namespace fastvit
