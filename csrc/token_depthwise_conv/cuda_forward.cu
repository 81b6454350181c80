// fastvit::token_depthwise_conv on CUDA. The kernel is in cuda_forward.h.
#include "token_depthwise_conv/cuda_device.cuh"

#include "token_depthwise_conv/op.h"

namespace fastvit {

void convolve_tokens(const TokenDepthwiseConv& op, void* conv, blocks::CudaDevice& device) {
  tokens::with_element(op.element, [&]<class T>() { tokens::convolve_tokens<T>(op, conv, device); });
}

namespace {

void run(const TokenDepthwiseConv& op, const Tensor& x) {
  blocks::CudaDevice device(x, "token_depthwise_conv");
  convolve_tokens(op, nullptr, device);
}

FASTVIT_REGISTER(token_depthwise_conv, "CUDA", token_depthwise_conv_entry<run>);

}  // namespace
}  // namespace fastvit
