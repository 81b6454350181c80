// The operator fastvit::token_depthwise_conv as torch calls it: every check, then a device's own function.
#pragma once

#include <tuple>
#include <type_traits>

#include "common/arguments.h"
#include "token_depthwise_conv/args.h"

namespace fastvit {

// --- Arguments, in the order of the schemas --------------------------------------------------------------------------

// What the operator and those of training have in common, from the weight on.
template <class Norm>
struct ConvolutionArguments {
  using Schema = std::tuple<Tensor, OptionalTensor, Norm, int64_t, Norm, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, bool>;
  Tensor weight;
  OptionalTensor bias;
  Norm pre_norm;
  int64_t pre_activation;
  Norm norm;
  int64_t activation;
  int64_t height, width, stride, padding, prefix_tokens;
  bool residual;

  void make_parameters(const Tensor& x) {
    make_parameter(weight, x);
    make_parameter(bias, x);
    pre_norm.make_parameters(x);
    norm.make_parameters(x);
  }
};

// --- Checks ----------------------------------------------------------------------------------------------------------

// Reads and checks the arguments of a call. Messages begin with the operator that was called and name an argument as
// its schema does: `prefix` and then the name given here.
class TokenArguments {
 public:
  TokenArguments(const char* op, const Tensor& x, const char* prefix = "", bool trains = false)
      : op_(op), prefix_(prefix), x_(x) {
    check(x.dim() == 3, op, ": x must be (B, P + h*w, C), got shape ", shape_of(x));
    if (x.is_cpu()) check_cpu_dtype(op, x, "x", !trains);
  }

  Element element() const { return element_of(x_, "", "x"); }

  ChannelParameter parameter(const Tensor& tensor, const char* name, int64_t numel, const char* group = "") const {
    require(tensor.device_type() == x_.device_type() && tensor.device_index() == x_.device_index(), group, name,
            " must be on x's device");
    require(tensor.is_contiguous() && tensor.numel() == numel, group, name, " must be contiguous with ", numel,
            " elements, got shape ", shape_of(tensor));
    require(tensor.dtype() == Dtype::float32 || tensor.dtype() == x_.dtype(), group, name,
            " must be float32 or of x's dtype ", x_.dtype(), ", got ", tensor.dtype());
    return {tensor.data<void>(), element_of(tensor, group, name)};
  }

  ChannelParameter parameter(const OptionalTensor& tensor, const char* name, const char* group = "") const {
    if (!tensor) return {};
    require(tensor->dim() == 1, group, name, " must have one axis, got shape ", shape_of(*tensor));
    return parameter(*tensor, name, x_.size(2), group);
  }

  // group: what the schema puts in front of the names of a norm's arguments.
  ChannelNorm norm(const NormArguments& from, const char* group) const {
    require(from.mean.has_value() == from.var.has_value(), group, "mean and ", prefix_, group,
            "var must be given together");
    return {parameter(from.weight, "weight", group), parameter(from.bias, "bias", group),
            parameter(from.mean, "mean", group), parameter(from.var, "var", group), static_cast<float>(from.eps)};
  }

  // Fills in sizes and strides; height, width, stride, padding, prefix_tokens and residual must be set.
  void set_geometry(TokenDepthwiseConv& op, const Tensor& weight) const {
    require(weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) == weight.size(3) && weight.size(2) > 0 &&
                weight.size(0) == x_.size(2),
            "weight must be (C, 1, k, k) beside x ", shape_of(x_), ", got shape ", shape_of(weight));
    op.batch = x_.size(0);
    op.channels = x_.size(2);
    op.kernel = weight.size(2);
    op.x_batch_stride = x_.stride(0);
    op.x_token_stride = x_.stride(1);
    check(x_.stride(2) == 1 || op.channels <= 1 || x_.numel() == 0, op_, ": x must have adjacent channels, got stride ",
          x_.stride(2));
    check(op.height > 0 && op.width > 0 && op.prefix_tokens >= 0 &&
              x_.size(1) - op.prefix_tokens == checked_product(op_, {op.height, op.width}),
          op_, ": x has ", x_.size(1), " tokens, expected ", op.prefix_tokens, " + ", op.height, " * ", op.width);
    require(op.stride >= 1, "stride must be at least 1, got ", op.stride);
    require(op.padding >= 0, "padding must be at least 0, got ", op.padding);
    checked_product(op_, {8, larger(op.padding, larger(op.height, larger(op.width, op.kernel)))});  // sums of them fit
    // What the kernels count, and the memory they take, are smaller than these.
    const int64_t longest = larger(op.height, op.width), edges = 2 * op.padding;
    checked_product(op_, {64, op.batch, op.channels + 32, op.height + edges + op.kernel, op.width + edges + op.kernel});
    checked_product(op_, {64, op.batch, op.channels + 32, op.kernel, op.kernel});
    op.stride = smaller(op.stride, longest + edges);  // beyond, there is one output whatever the stride
    const int64_t room = smaller(op.height, op.width) + edges - op.kernel;
    require(room >= 0, "weight: a kernel of ", op.kernel, " does not fit into the padded grid (", op.height, ", ",
            op.width, ")");
    op.out_height = (op.height + edges - op.kernel) / op.stride + 1;
    op.out_width = (op.width + edges - op.kernel) / op.stride + 1;
    require(!op.residual || (op.out_height == op.height && op.out_width == op.width),
            "residual needs a convolution that keeps the grid (", op.height, ", ", op.width, "), this one gives (",
            op.out_height, ", ", op.out_width, ")");
  }

 private:
  template <class... Parts>
  void require(bool condition, const Parts&... message) const {
    check(condition, op_, ": ", prefix_, message...);
  }

  Element element_of(const Tensor& tensor, const char* group, const char* name) const {
    switch (const Dtype dtype = tensor.dtype()) {
      case Dtype::float32: return Element::float32;
      case Dtype::bfloat16: return Element::bfloat16;
      case Dtype::float16: return Element::float16;
      default: check(false, op_, ": ", group, name, " must be float32, bfloat16 or float16, got ", dtype);
    }
    return {};
  }

  const char *op_, *prefix_;
  const Tensor& x_;
};

// Everything but x and out.
template <class Norm>
TokenDepthwiseConv describe(const char* name, const Tensor& x, const ConvolutionArguments<Norm>& from) {
  const TokenArguments arguments(name, x, "", !std::is_same_v<Norm, NormArguments>);
  TokenDepthwiseConv op{};
  op.element = arguments.element();
  op.height = from.height;
  op.width = from.width;
  op.stride = from.stride;
  op.padding = from.padding;
  op.prefix_tokens = from.prefix_tokens;
  op.residual = from.residual;
  arguments.set_geometry(op, from.weight);
  op.weight = arguments.parameter(from.weight, "weight", op.channels * op.kernel * op.kernel);
  op.bias = arguments.parameter(from.bias, "bias");
  op.pre_norm = arguments.norm(from.pre_norm, "pre_norm_");
  op.norm = arguments.norm(from.norm, "norm_");
  op.pre_activation = activation_of(name, from.pre_activation, "pre_activation");
  op.activation = activation_of(name, from.activation, "activation");
  return op;
}

inline Tensor empty_result(const TokenDepthwiseConv& op, const Tensor& x) {
  return empty({op.batch, op.prefix_tokens + op.out_height * op.out_width, op.channels}, x);
}

// --- The operator ----------------------------------------------------------------------------------------------------

// At inference. `run` computes op on the device of x; it is not called for an empty result.
template <void (*run)(const TokenDepthwiseConv& op, const Tensor& x)>
Tensor token_depthwise_conv_entry(Tensor x, ConvolutionArguments<NormArguments> arguments) {
  make_last_axis_contiguous(x);
  arguments.make_parameters(x);
  TokenDepthwiseConv op = describe("token_depthwise_conv", x, arguments);
  Tensor out = empty_result(op, x);
  if (out.numel() == 0) return out;
  op.x = x.data<void>();
  op.out = out.mutable_data<void>();
  run(op, x);
  return out;
}

}  // namespace fastvit
