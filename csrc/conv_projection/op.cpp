// fastvit::conv_projection on the CPU: the three depthwise convolutions and norms of one x, without the linear layers.
// They are computed image by image, so that x is read from memory once. fastvit::packed_conv_projection: with a layer
// norm in front and the linear layers behind.
#include "conv_projection/op.h"

#include <algorithm>

#include "common/workspace.h"
#include "linear/op.h"
#include "token_depthwise_conv/cpu.h"

namespace fastvit {
namespace {

using Works = std::array<TokenDepthwiseConvWork, 3>;

// Divides each image of few among the threads; channels are divided already.
void divide_rows(TokenDepthwiseConvWork& work, int64_t threads) {
  work.row_block = divide_up(work.out_height, threads);
  work.row_blocks = divide_up(work.out_height, work.row_block);
  work.items = work.batch * work.channel_blocks * work.row_blocks;
}

// Part `part` of `parts` of each convolution. Items are ordered by image, so the parts read the same images of x.
void run_part(const Works& works, int64_t part, int64_t parts, float* scratch) {
  const auto kernel = FASTVIT_PER_ISA(token_depthwise_conv, works[0].element);
  for (const TokenDepthwiseConvWork& work : works) {
    const int64_t begin = work.items * part / parts, end = work.items * (part + 1) / parts;
    if (begin < end) kernel(work, begin, end, scratch);
  }
}

void run(const Projections& ops, const Tensor&) {
  Works works{divide(ops[0]), divide(ops[1]), divide(ops[2])};
  const int64_t threads = num_threads(), batch = works[0].batch;
  if (batch < threads) {
    for (TokenDepthwiseConvWork& work : works) divide_rows(work, threads);
  }
  const int64_t parts = batch >= threads ? batch : batch * threads;
  int64_t floats = 0;
  for (const TokenDepthwiseConvWork& work : works) floats = std::max(floats, work.scratch_floats);
  parallel_for(0, parts, (parts + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    float* scratch = Workspace::of_thread().take(floats);
    for (int64_t part = begin; part < end; ++part) run_part(works, part, parts, scratch);
    Workspace::of_thread().give_back();
  });
}

FASTVIT_REGISTER(conv_projection, "CPU", conv_projection_entry<run>);

std::tuple<Tensor, Tensor, Tensor> project(Tensor x, const NormOfRows& norm, ProjectionArguments q, Layer q_layer,
                                           ProjectionArguments k, Layer k_layer, ProjectionArguments v, Layer v_layer,
                                           int64_t height, int64_t width, int64_t prefix_tokens) {
  constexpr char kOp[] = "conv_projection";
  check(x.dim() == 3, kOp, ": x must be (B, P + h*w, C), got shape ", shape_of(x));
  auto [of_q, of_k, of_v] = conv_projection_entry<run>(layer_norm(kOp, std::move(x), norm), std::move(q), std::move(k),
                                                       std::move(v), height, width, prefix_tokens);
  std::vector<LayerOf> layers;
  layers.push_back({std::move(of_q), std::move(q_layer), {"q_pw_weight", "q_pw_bias"}});
  layers.push_back({std::move(of_k), std::move(k_layer), {"k_pw_weight", "k_pw_bias"}});
  layers.push_back({std::move(of_v), std::move(v_layer), {"v_pw_weight", "v_pw_bias"}});
  std::vector<Tensor> out = linear_layers(kOp, std::move(layers));
  return {std::move(out[0]), std::move(out[1]), std::move(out[2])};
}

FASTVIT_REGISTER(packed_conv_projection, "CPU", project);

}  // namespace
}  // namespace fastvit
