// What the CUDA files of token_depthwise_conv share.
#pragma once

#include "common/cuda_launch.cuh"
#include "token_depthwise_conv/cuda_passes.h"

namespace fastvit {

// The forward pass at inference; conv: where to store the convolution's result as well, or null.
void convolve_tokens(const TokenDepthwiseConv& op, void* conv, blocks::CudaDevice& device);

// A device whose convolution is compiled in cuda_forward.cu only.
struct TokenDevice : blocks::CudaDevice {
  using CudaDevice::CudaDevice;

  template <class T>
  void convolve(const TokenDepthwiseConv& op, void* conv) {
    convolve_tokens(op, conv, *this);
  }
};

}  // namespace fastvit
