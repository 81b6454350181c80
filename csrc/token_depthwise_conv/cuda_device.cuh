// token_depthwise_conv on CUDA: what its files share.
#pragma once

#include "common/cuda_launch.cuh"
#include "token_depthwise_conv/cuda_passes.h"

namespace fastvit {

// The convolution, and what stands around it; conv: where its result goes as well, or null.
void convolve_tokens(const TokenDepthwiseConv& op, void* conv, blocks::CudaDevice& device);

// A device whose convolution is compiled in cuda_forward.cu alone.
struct TokenDevice : blocks::CudaDevice {
  using CudaDevice::CudaDevice;

  template <class T>
  void convolve(const TokenDepthwiseConv& op, void* conv) {
    convolve_tokens(op, conv, *this);
  }
};

}  // namespace fastvit
