// fastvit::conv_projection on the CPU: the three depthwise convolutions and norms of one x, without the linear layers.
// They are computed image by image, so that x is read from memory once.
#include <algorithm>
#include <array>

#include "common/workspace.h"
#include "token_depthwise_conv/cpu.h"
#include "token_depthwise_conv/op.h"

namespace fastvit {
namespace {

using Works = std::array<TokenDepthwiseConvWork, 3>;

// Part `part` of `parts` of each convolution. Items are ordered by image, so the parts read the same images of x.
void run_part(const Works& works, int64_t part, int64_t parts, float* scratch) {
  const auto kernel = FASTVIT_PER_ISA(token_depthwise_conv, works[0].element);
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

// One of the convolutions, in the schema's order (fastvit/ops/conv_projection.py).
struct Part {
  using Schema = std::tuple<Tensor, OptionalTensor, NormArguments, int64_t, int64_t>;
  Tensor weight;
  OptionalTensor bias;
  NormArguments norm;
  int64_t stride, padding;
};

Tensor prepare(const char* prefix, const Tensor& x, Part& part, int64_t height, int64_t width, int64_t prefix_tokens,
               TokenDepthwiseConv& op) {
  make_parameter(part.weight, x);
  make_parameter(part.bias, x);
  part.norm.make_parameters(x);
  const TokenArguments arguments("conv_projection", x, prefix);
  op.element = arguments.element();
  op.height = height;
  op.width = width;
  op.stride = part.stride;
  op.padding = part.padding;
  op.prefix_tokens = prefix_tokens;
  arguments.set_geometry(op, part.weight);
  op.weight = arguments.parameter(part.weight, "weight", op.channels * op.kernel * op.kernel);
  op.bias = arguments.parameter(part.bias, "bias");
  op.norm = arguments.norm(part.norm, "norm_");
  Tensor out = empty_result(op, x);
  op.x = x.data<void>();
  op.out = out.mutable_data<void>();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> conv_projection(Tensor x, Part q, Part k, Part v, int64_t height, int64_t width,
                                                   int64_t prefix_tokens) {
  make_last_axis_contiguous(x);
  std::array<TokenDepthwiseConv, 3> ops{};
  std::tuple<Tensor, Tensor, Tensor> out{prepare("q_", x, q, height, width, prefix_tokens, ops[0]),
                                         prepare("k_", x, k, height, width, prefix_tokens, ops[1]),
                                         prepare("v_", x, v, height, width, prefix_tokens, ops[2])};
  if (x.numel() > 0) run({divide(ops[0]), divide(ops[1]), divide(ops[2])});
  return out;
}

FASTVIT_REGISTER(conv_projection, "CPU", conv_projection);

}  // namespace
}  // namespace fastvit
