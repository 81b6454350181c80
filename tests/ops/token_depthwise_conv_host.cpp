// Runs the CUDA kernel's per-thread functions on the host: for every block, each step for every thread in turn.
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "token_depthwise_conv_math.h"

using namespace fastvit;

namespace {

template <class T, int V, int K>
int run(const TokenDepthwiseConv& op, int lanes) {
  const tokens::Plan plan = tokens::make_plan(op, lanes, V);
  if (plan.tile_height == 0) return 1;
  const auto floats = static_cast<size_t>(plan.shared_floats(op.kernel));
  if (floats * sizeof(float) > tokens::kSharedBytes) return 2;
  auto* shared = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
  for (int64_t index = 0; index < plan.blocks(op.batch); ++index) {
    // What the block does not write itself must not be read.
    for (size_t i = 0; i < floats; ++i) shared[i] = std::numeric_limits<float>::quiet_NaN();
    const tokens::Block block(op, plan, index, shared);
    for (int thread = 0; thread < tokens::kThreads; ++thread) tokens::load_parameters(op, plan, block, thread);
    for (int thread = 0; thread < tokens::kThreads; ++thread) tokens::load_tile<T, V>(op, plan, block, thread);
    for (int thread = 0; thread < tokens::kThreads; ++thread) tokens::make_outputs<T, V, K>(op, plan, block, thread);
  }
  std::free(shared);
  return 0;
}

template <class T>
int run_for(const TokenDepthwiseConv& op, bool vectors) {
  constexpr int V = 16 / sizeof(T);
  if (!vectors) return run<T, 1, 0>(op, 32);
  switch (op.kernel) {
    case 3: return run<T, V, 3>(op, 8);
    case 5: return run<T, V, 5>(op, 8);
    case 7: return run<T, V, 7>(op, 8);
    default: return 3;
  }
}

}  // namespace

// numbers: batch, channels, prefix, height, width, out_height, out_width, kernel, stride, padding, x_batch_stride,
// x_token_stride, pre_activation, activation, residual. parameters: weight, bias, then weight, bias, mean, var of
// pre_norm and of norm, all in x's dtype or null. Gives 0, or why it did not run.
extern "C" int token_depthwise_conv_host(const void* x, void* out, int element, const int64_t* numbers,
                                         const void* const* parameters, float eps, int vectors) {
  TokenDepthwiseConv op{};
  op.x = x;
  op.out = out;
  op.element = static_cast<Element>(element);
  int64_t* const fields[] = {&op.batch,  &op.channels,   &op.prefix_tokens,  &op.height,
                             &op.width,  &op.out_height, &op.out_width,      &op.kernel,
                             &op.stride, &op.padding,    &op.x_batch_stride, &op.x_token_stride};
  for (int64_t* field : fields) *field = *numbers++;
  op.pre_activation = static_cast<Activation>(*numbers++);
  op.activation = static_cast<Activation>(*numbers++);
  op.residual = *numbers++ != 0;
  ChannelParameter* const tensors[] = {&op.weight,        &op.bias,         &op.pre_norm.weight, &op.pre_norm.bias,
                                       &op.pre_norm.mean, &op.pre_norm.var, &op.norm.weight,     &op.norm.bias,
                                       &op.norm.mean,     &op.norm.var};
  for (ChannelParameter* tensor : tensors) *tensor = {*parameters++, op.element};
  op.pre_norm.eps = op.norm.eps = eps;
  switch (op.element) {
    case Element::float32: return run_for<float>(op, vectors != 0);
    case Element::bfloat16: return run_for<tokens::BFloat16>(op, vectors != 0);
    case Element::float16: return run_for<tokens::Half>(op, vectors != 0);
  }
  return 4;
}
