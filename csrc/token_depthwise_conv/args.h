// What token_depthwise_conv computes, for every device: a description in plain data.
//
// t = pre_activation(pre_norm(x)) on the grid tokens of x (B, P + h*w, C); y = activation(norm(conv(t) + bias));
// y += x with `residual`. The P prefix tokens pass through.
#pragma once

#include <cstdint>

#include "common/activation.h"

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

// A forward pass in training. Statistics are those of a channel over the grid tokens of every image: the mean and the
// biased variance. They are found, and then normalised with, where the pointer is not null.
struct TokenDepthwiseConvTraining : TokenDepthwiseConv {
  bool has_pre_norm, has_norm;
  float *pre_mean, *pre_var;  // of x; to be filled in
  float *mean, *var;          // of the convolution's result; to be filled in
  void* conv;                 // that result, laid out as out; null where it is not kept
};

// Its backward pass. pre_norm and norm hold the statistics of the forward pass, be they given or the batch's.
struct TokenDepthwiseConvBackward : TokenDepthwiseConv {  // out is unused
  bool has_pre_norm, has_norm;
  bool pre_batch_statistics,
      batch_statistics;  // whether those statistics are the batch's, and so carry gradients to every token
  const void* grad;      // of x's element type; channels are adjacent
  int64_t grad_batch_stride, grad_token_stride;
  const void* conv;  // as the forward pass left it, or null
  void* dx;          // contiguous; null where it is not wanted
  // Gradients of parameters in float32; null where they are not wanted or there is no such parameter.
  float *dweight, *dbias, *dpre_norm_weight, *dpre_norm_bias, *dnorm_weight, *dnorm_bias;
};

}  // namespace fastvit
