// The operator fastvit::token_depthwise_conv as torch calls it: every check, then a device's own function.
#pragma once

#include <optional>

#include "common/torch_abi.h"
#include "token_depthwise_conv/args.h"

namespace fastvit {

inline Element element_of(const Tensor& tensor, const char* name) {
  const Dtype dtype = tensor.dtype();
  check(dtype == Dtype::float32 || dtype == Dtype::bfloat16 || dtype == Dtype::float16, "token_depthwise_conv: ", name,
        " must be float32, bfloat16 or float16, got ", dtype);
  return dtype == Dtype::float32 ? Element::float32 : dtype == Dtype::bfloat16 ? Element::bfloat16 : Element::float16;
}

inline ChannelParameter parameter_of(const Tensor& tensor, const char* name, int64_t numel, const Tensor& x) {
  check(tensor.device_type() == x.device_type() && tensor.device_index() == x.device_index(),
        "token_depthwise_conv: ", name, " must be on x's device");
  check(tensor.is_contiguous() && tensor.numel() == numel, "token_depthwise_conv: ", name, " must be contiguous with ",
        numel, " elements, got shape ", shape_of(tensor));
  check(tensor.dtype() == Dtype::float32 || tensor.dtype() == x.dtype(), "token_depthwise_conv: ", name,
        " must be float32 or of x's dtype ", x.dtype(), ", got ", tensor.dtype());
  return {tensor.data<void>(), element_of(tensor, name)};
}

inline ChannelParameter parameter_of(const std::optional<Tensor>& tensor, const char* name, const Tensor& x) {
  if (!tensor) return {};
  check(tensor->dim() == 1, "token_depthwise_conv: ", name, " must have one axis, got shape ", shape_of(*tensor));
  return parameter_of(*tensor, name, x.size(2), x);
}

// Fills in the geometry; throws unless it is one.
inline void set_geometry(TokenDepthwiseConv& op, const Tensor& x, const Tensor& weight) {
  check(x.dim() == 3, "token_depthwise_conv: x must be (B, P + h*w, C), got shape ", shape_of(x));
  check(weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) == weight.size(3) && weight.size(2) > 0 &&
            weight.size(0) == x.size(2),
        "token_depthwise_conv: weight must be (C, 1, k, k) beside x ", shape_of(x), ", got shape ", shape_of(weight));
  op.batch = x.size(0);
  op.channels = x.size(2);
  op.kernel = weight.size(2);
  op.x_batch_stride = x.stride(0);
  op.x_token_stride = x.stride(1);
  check(x.stride(2) == 1 || op.channels <= 1, "token_depthwise_conv: x must have adjacent channels, got stride ",
        x.stride(2));
  check(op.height > 0 && op.width > 0 && op.prefix_tokens >= 0 && x.size(1) == op.prefix_tokens + op.height * op.width,
        "token_depthwise_conv: x has ", x.size(1), " tokens, expected are ", op.prefix_tokens, " + ", op.height, " * ",
        op.width);
  check(op.stride >= 1 && op.padding >= 0, "token_depthwise_conv: stride ", op.stride, " and padding ", op.padding,
        " must be at least 1 and 0");
  const int64_t room = (op.height < op.width ? op.height : op.width) + 2 * op.padding - op.kernel;
  check(room >= 0, "token_depthwise_conv: a kernel of ", op.kernel, " does not fit into the padded grid (", op.height,
        ", ", op.width, ")");
  op.out_height = (op.height + 2 * op.padding - op.kernel) / op.stride + 1;
  op.out_width = (op.width + 2 * op.padding - op.kernel) / op.stride + 1;
  check(!op.residual || (op.out_height == op.height && op.out_width == op.width),
        "token_depthwise_conv: residual needs a convolution that keeps the grid (", op.height, ", ", op.width,
        "), this gives (", op.out_height, ", ", op.out_width, ")");
}

inline Activation activation_of(int64_t code, const char* name) {
  check(code >= 0 && code <= static_cast<int64_t>(Activation::relu), "token_depthwise_conv: ", name,
        " has codes 0 to 4, got ", code);
  return static_cast<Activation>(code);
}

// What the operator's schema says of one norm, and of the geometry.
struct NormArguments {
  const std::optional<Tensor>&weight, &bias, &mean, &var;
  double eps;
};
struct GeometryArguments {
  int64_t height, width, stride, padding, prefix_tokens;
  bool residual;
};

// Reads and checks the arguments of a schema (fastvit/ops/_token_depthwise_conv_native.py); x and out are yet to be
// set.
inline TokenDepthwiseConv describe(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const NormArguments& pre_norm, int64_t pre_activation, const NormArguments& norm,
                                   int64_t activation, const GeometryArguments& geometry) {
  TokenDepthwiseConv op{};
  op.element = element_of(x, "x");
  op.height = geometry.height;
  op.width = geometry.width;
  op.stride = geometry.stride;
  op.padding = geometry.padding;
  op.prefix_tokens = geometry.prefix_tokens;
  op.residual = geometry.residual;
  set_geometry(op, x, weight);
  check(pre_norm.mean.has_value() == pre_norm.var.has_value() && norm.mean.has_value() == norm.var.has_value(),
        "token_depthwise_conv: a norm needs both its mean and its variance");
  op.weight = parameter_of(weight, "weight", op.channels * op.kernel * op.kernel, x);
  op.bias = parameter_of(bias, "bias", x);
  op.pre_norm = {parameter_of(pre_norm.weight, "pre_norm_weight", x), parameter_of(pre_norm.bias, "pre_norm_bias", x),
                 parameter_of(pre_norm.mean, "pre_norm_mean", x), parameter_of(pre_norm.var, "pre_norm_var", x),
                 static_cast<float>(pre_norm.eps)};
  op.norm = {parameter_of(norm.weight, "norm_weight", x), parameter_of(norm.bias, "norm_bias", x),
             parameter_of(norm.mean, "norm_mean", x), parameter_of(norm.var, "norm_var", x),
             static_cast<float>(norm.eps)};
  op.pre_activation = activation_of(pre_activation, "pre_activation");
  op.activation = activation_of(activation, "activation");
  return op;
}

inline Tensor empty_result(const TokenDepthwiseConv& op, const Tensor& x) {
  return empty({op.batch, op.prefix_tokens + op.out_height * op.out_width, op.channels}, x);
}

// The operator for inference. `run` computes what is described, on the device of x; it is called only where there is
// something to compute.
template <void (*run)(const TokenDepthwiseConv& op, const Tensor& x)>
Tensor token_depthwise_conv_entry(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& pre_norm_weight,
                                  const std::optional<Tensor>& pre_norm_bias,
                                  const std::optional<Tensor>& pre_norm_mean, const std::optional<Tensor>& pre_norm_var,
                                  double pre_norm_eps, int64_t pre_activation, const std::optional<Tensor>& norm_weight,
                                  const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& norm_mean,
                                  const std::optional<Tensor>& norm_var, double norm_eps, int64_t activation,
                                  int64_t height, int64_t width, int64_t stride, int64_t padding, int64_t prefix_tokens,
                                  bool residual) {
  TokenDepthwiseConv op =
      describe(x, weight, bias, {pre_norm_weight, pre_norm_bias, pre_norm_mean, pre_norm_var, pre_norm_eps},
               pre_activation, {norm_weight, norm_bias, norm_mean, norm_var, norm_eps}, activation,
               {height, width, stride, padding, prefix_tokens, residual});
  Tensor out = empty_result(op, x);
  if (out.numel() == 0) return out;
  op.x = x.data<void>();
  op.out = out.mutable_data<void>();
  run(op, x);
  return out;
}

}  // namespace fastvit
