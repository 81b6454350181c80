// A linear layer as operators call it: its arguments, in the order of the schemas, and the call.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "linear/args.h"

namespace fastvit {

// A layer norm of x, if `exists`.
struct NormOfRows {
  using Schema = std::tuple<bool, OptionalTensor, OptionalTensor, double>;
  bool exists;
  OptionalTensor weight, bias;
  double eps;
};

struct Layer {
  using Schema = std::tuple<Tensor, OptionalTensor, OptionalTensor>;
  Tensor weight;
  OptionalTensor bias, packed;
};

// What is added behind a product: out = residual + scale * product.
struct Addition {
  using Schema = std::tuple<OptionalTensor, OptionalTensor>;
  OptionalTensor scale, residual;
};

// A vector in float32: the tensor's own memory, or a copy.
class Floats {
 public:
  Floats(const char* op, const OptionalTensor& tensor, const char* name, int64_t size) {
    if (!tensor) return;
    check_cpu_shape(op, *tensor, name, {size});
    if (tensor->dtype() == Dtype::float32 && (tensor->stride(0) == 1 || size <= 1)) {
      data_ = tensor->data<float>();
    } else {
      copy_ = small_values(op, *tensor, name);
      data_ = copy_.data();
    }
  }
  const float* data() const { return data_; }
  const float* data_or_zeros(int64_t size) {
    if (data_ == nullptr) copy_.assign(static_cast<size_t>(size), 0.0f), data_ = copy_.data();
    return data_;
  }

 private:
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

// A norm of the columns of a product, folded: factor * product + shift; null without one.
struct NormOfColumns {
  const float *factor, *shift;  // (N,)
};

// A BatchNorm by given statistics, folded.
class FoldedNorm {
 public:
  // prefix: what the schema puts in front of the names of its arguments.
  FoldedNorm(const char* op, const std::string& prefix, const NormArguments& norm, int64_t columns) {
    if (!norm.mean && !norm.var) return;
    check(norm.mean && norm.var, op, ": ", prefix, "mean and ", prefix, "var must be given together");
    const auto floats = [&](const OptionalTensor& tensor, const char* name) {
      return Floats(op, tensor, (prefix + name).c_str(), columns);
    };
    const Floats mean = floats(norm.mean, "mean"), var = floats(norm.var, "var");
    const Floats weight = floats(norm.weight, "weight"), bias = floats(norm.bias, "bias");
    for (int64_t c = 0; c < columns; ++c) {
      const float scale = weight.data() == nullptr ? 1.0f : weight.data()[c];
      factor_.push_back(scale / std::sqrt(var.data()[c] + static_cast<float>(norm.eps)));
      shift_.push_back((bias.data() == nullptr ? 0.0f : bias.data()[c]) - mean.data()[c] * factor_.back());
    }
  }
  NormOfColumns columns() const {
    return factor_.empty() ? NormOfColumns{} : NormOfColumns{factor_.data(), shift_.data()};
  }

 private:
  std::vector<float> factor_, shift_;
};

// The weight (N, K) in the layout in which kernels of this CPU read it.
Tensor pack_weight(Tensor weight);

// residual + scale * activation(behind(norm(x) weight^T + bias)). Checks its arguments, with messages that begin with
// `op`, and replaces those that it cannot read as they lie by copies.
Tensor linear(const char* op, Tensor& x, Layer& layer, const NormOfRows& norm, const NormOfColumns& behind,
              Activation activation, Addition& addition);

// activation(behind(the windows of maps x (B, C, H, W), as rows, times weight^T + bias)), (B, O, rows, columns) in
// channels-last layout; x and the windows fit each other. Checks the layer.
Tensor convolve(const char* op, const Tensor& x, Layer& layer, const Windows& windows, const NormOfColumns& behind,
                Activation activation);

}  // namespace fastvit
