// fastvit::conv_projection on the CPU: the three depthwise convolutions and norms of one x (their linear layers are
// products of their own). They are made image by image, so that x comes from memory once.
#include <algorithm>
#include <array>

#include "common/workspace.h"
#include "token_depthwise_conv/cpu.h"
#include "token_depthwise_conv/op.h"

namespace fastvit {
namespace {

using Works = std::array<TokenDepthwiseConvWork, 3>;

// Part `part` of `parts` of each convolution. Items are ordered by image first, so equal parts read the same of x.
void run_part(const Works& works, int64_t part, int64_t parts, float* scratch) {
  const auto kernel = FASTVIT_PER_ISA(token_depthwise_conv);
  for (const TokenDepthwiseConvWork& work : works) {
    const int64_t begin = work.items * part / parts, end = work.items * (part + 1) / parts;
    if (begin < end) kernel(work, begin, end, scratch);
  }
}

void run(const Works& works) {
  const int64_t threads = num_threads(), batch = works[0].batch;
  const int64_t parts = batch >= threads ? batch : batch * threads;
  int64_t floats = 0;
  for (const TokenDepthwiseConvWork& work : works) floats = std::max(floats, work.scratch_floats);
  parallel_for(0, parts, (parts + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    float* scratch = Workspace::of_thread().take(floats);
    for (int64_t part = begin; part < end; ++part) run_part(works, part, parts, scratch);
    Workspace::of_thread().give_back();
  });
}

using Parameter = std::optional<Tensor>;

// One of the convolutions as the schema has it (fastvit/ops/conv_projection.py).
struct Part {
  const Tensor& weight;
  const Parameter &bias, &norm_weight, &norm_bias, &norm_mean, &norm_var;
  double norm_eps;
  int64_t stride, padding;
};

Tensor prepare(const Tensor& x, const Part& part, int64_t height, int64_t width, int64_t prefix_tokens,
               TokenDepthwiseConv& op) {
  op.element = element_of(x, "x");
  op.height = height;
  op.width = width;
  op.stride = part.stride;
  op.padding = part.padding;
  op.prefix_tokens = prefix_tokens;
  set_geometry(op, x, part.weight);
  check(part.norm_mean.has_value() == part.norm_var.has_value(),
        "conv_projection: a norm needs both its mean and its variance");
  op.weight = parameter_of(part.weight, "weight", op.channels * op.kernel * op.kernel, x);
  op.bias = parameter_of(part.bias, "bias", x);
  op.norm = {parameter_of(part.norm_weight, "norm_weight", x), parameter_of(part.norm_bias, "norm_bias", x),
             parameter_of(part.norm_mean, "norm_mean", x), parameter_of(part.norm_var, "norm_var", x),
             static_cast<float>(part.norm_eps)};
  Tensor out = empty({op.batch, prefix_tokens + op.out_height * op.out_width, op.channels}, x);
  op.x = x.data<void>();
  op.out = out.mutable_data<void>();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> conv_projection(
    const Tensor& x, const Tensor& q_weight, const Parameter& q_bias, const Parameter& q_norm_weight,
    const Parameter& q_norm_bias, const Parameter& q_norm_mean, const Parameter& q_norm_var, double q_norm_eps,
    int64_t q_stride, int64_t q_padding, const Tensor& k_weight, const Parameter& k_bias,
    const Parameter& k_norm_weight, const Parameter& k_norm_bias, const Parameter& k_norm_mean,
    const Parameter& k_norm_var, double k_norm_eps, int64_t k_stride, int64_t k_padding, const Tensor& v_weight,
    const Parameter& v_bias, const Parameter& v_norm_weight, const Parameter& v_norm_bias, const Parameter& v_norm_mean,
    const Parameter& v_norm_var, double v_norm_eps, int64_t v_stride, int64_t v_padding, int64_t height, int64_t width,
    int64_t prefix_tokens) {
  const Part q{q_weight, q_bias, q_norm_weight, q_norm_bias, q_norm_mean, q_norm_var, q_norm_eps, q_stride, q_padding};
  const Part k{k_weight, k_bias, k_norm_weight, k_norm_bias, k_norm_mean, k_norm_var, k_norm_eps, k_stride, k_padding};
  const Part v{v_weight, v_bias, v_norm_weight, v_norm_bias, v_norm_mean, v_norm_var, v_norm_eps, v_stride, v_padding};
  std::array<TokenDepthwiseConv, 3> ops{};
  std::tuple<Tensor, Tensor, Tensor> out{prepare(x, q, height, width, prefix_tokens, ops[0]),
                                         prepare(x, k, height, width, prefix_tokens, ops[1]),
                                         prepare(x, v, height, width, prefix_tokens, ops[2])};
  if (x.numel() > 0) run({divide(ops[0]), divide(ops[1]), divide(ops[2])});
  return out;
}

FASTVIT_REGISTER(conv_projection, "CPU", conv_projection);

}  // namespace
}  // namespace fastvit
