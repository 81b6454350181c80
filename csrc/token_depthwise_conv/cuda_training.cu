// fastvit::token_depthwise_conv_training on CUDA. The kernels are in cuda_channels.h.
#include "token_depthwise_conv/cuda_device.cuh"
#include "token_depthwise_conv/op_training.h"

namespace fastvit {
namespace {

void run(TokenDepthwiseConvTraining& op, const Tensor& x) {
  TokenDevice device(x, "token_depthwise_conv_training");
  tokens::with_element(op.element, [&]<class T>() { tokens::train<T>(op, device); });
}

FASTVIT_REGISTER(token_depthwise_conv_training, "CUDA", token_depthwise_conv_training_entry<run>);

}  // namespace
}  // namespace fastvit
