// fastvit::token_depthwise_conv_backward on CUDA. The kernels are in cuda_gradient.h and cuda_channels.h.
#include "token_depthwise_conv/cuda_device.cuh"
#include "token_depthwise_conv/op_training.h"

namespace fastvit {
namespace {

void run(TokenDepthwiseConvBackward& op, const Tensor& x) {
  TokenDevice device(x, "token_depthwise_conv_backward");
  tokens::with_element(op.element, [&]<class T>() { tokens::backward<T>(op, device); });
}

FASTVIT_REGISTER(token_depthwise_conv_backward, "CUDA", token_depthwise_conv_backward_entry<run>);

}  // namespace
}  // namespace fastvit
