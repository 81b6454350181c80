// The operator fastvit::conv_projection as torch calls it: every check, then a device's own function.
#pragma once

#include <tuple>

#include "conv_projection/args.h"
#include "token_depthwise_conv/op.h"

namespace fastvit {

// One of the convolutions, in the schema's order (fastvit/ops/conv_projection.py).
struct ProjectionArguments {
  using Schema = std::tuple<Tensor, OptionalTensor, NormArguments, int64_t, int64_t>;
  Tensor weight;
  OptionalTensor bias;
  NormArguments norm;
  int64_t stride, padding;
};

inline Tensor prepare_projection(const char* prefix, const Tensor& x, ProjectionArguments& from, int64_t height,
                                 int64_t width, int64_t prefix_tokens, TokenDepthwiseConv& op) {
  make_parameter(from.weight, x);
  make_parameter(from.bias, x);
  from.norm.make_parameters(x);
  const TokenArguments arguments("conv_projection", x, prefix);
  op.element = arguments.element();
  op.height = height;
  op.width = width;
  op.stride = from.stride;
  op.padding = from.padding;
  op.prefix_tokens = prefix_tokens;
  arguments.set_geometry(op, from.weight);
  op.weight = arguments.parameter(from.weight, "weight", op.channels * op.kernel * op.kernel);
  op.bias = arguments.parameter(from.bias, "bias");
  op.norm = arguments.norm(from.norm, "norm_");
  Tensor out = empty_result(op, x);
  op.x = x.data<void>();
  op.out = out.mutable_data<void>();
  return out;
}

// `run` computes the three on the device of x; it is not called for an empty x.
template <void (*run)(const Projections& ops, const Tensor& x)>
std::tuple<Tensor, Tensor, Tensor> conv_projection_entry(Tensor x, ProjectionArguments q, ProjectionArguments k,
                                                         ProjectionArguments v, int64_t height, int64_t width,
                                                         int64_t prefix_tokens) {
  make_last_axis_contiguous(x);
  Projections ops{};
  std::tuple<Tensor, Tensor, Tensor> out{prepare_projection("q_", x, q, height, width, prefix_tokens, ops[0]),
                                         prepare_projection("k_", x, k, height, width, prefix_tokens, ops[1]),
                                         prepare_projection("v_", x, v, height, width, prefix_tokens, ops[2])};
  if (x.numel() > 0) run(ops, x);
  return out;
}

}  // namespace fastvit
