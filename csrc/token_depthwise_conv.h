// What token_depthwise_conv computes, for every device: a description in plain data.
//
// t = pre_activation(pre_norm(x)) on the grid tokens of x (B, P + h*w, C); y = activation(norm(conv(t) + bias));
// y += x with `residual`. The P prefix tokens pass through.
#pragma once

#include <cstdint>

#include "activation.h"

namespace fastvit {

enum class Element : int32_t { float32, bfloat16, float16 };

// A per-channel parameter; data is null where there is none.
struct ChannelParameter {
  const void* data = nullptr;
  Element element = Element::float32;
};

// BatchNorm with given statistics; absent where mean.data is null.
struct ChannelNorm {
  ChannelParameter weight, bias, mean, var;
  float eps = 0.0f;
};

// No functions in here: inline ones would be shared between the files compiled per instruction set.
struct TokenDepthwiseConv {
  const void* x;
  void* out;  // contiguous
  Element element;
  int64_t x_batch_stride, x_token_stride;  // in elements; channels are adjacent
  int64_t batch, channels, prefix_tokens;
  int64_t height, width, out_height, out_width;
  int64_t kernel, stride, padding;
  ChannelParameter weight;  // (C, kernel, kernel)
  ChannelParameter bias;
  ChannelNorm pre_norm, norm;
  Activation pre_activation, activation;
  bool residual;
};

}  // namespace fastvit
