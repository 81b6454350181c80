// fastvit::token_depthwise_conv_training on CUDA. What the kernels do is in ../token_depthwise_conv_channels.h.
#include "../token_depthwise_conv_training_entry.h"
#include "token_depthwise_conv.cuh"

namespace fastvit {
namespace {

void run(TokenDepthwiseConvTraining& op, const Tensor& x) {
  TokenDevice device(x, "token_depthwise_conv_training");
  tokens::with_element(op.element, [&]<class T>() { tokens::train<T>(op, device); });
}

FASTVIT_REGISTER(token_depthwise_conv_training, "CUDA", token_depthwise_conv_training_entry<run>);

}  // namespace
}  // namespace fastvit
