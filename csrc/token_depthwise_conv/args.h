// What token_depthwise_conv computes, as plain data for kernels on every device.
//
// t = pre_activation(pre_norm(x)) on the grid tokens of x (B, P + h*w, C); y = activation(norm(conv(t) + bias));
// y += x with `residual`. The P prefix tokens pass through.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/element.h"

namespace fastvit {

// A per-channel parameter; data is null if there is none.
struct ChannelParameter {
  const void* data = nullptr;
  Element element = Element::float32;
};

// BatchNorm with given statistics; absent if mean.data is null.
struct ChannelNorm {
  ChannelParameter weight, bias, mean, var;
  float eps = 0.0f;
};

// Without functions, which would be shared between the files compiled per instruction set.
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

// The forward pass in training. Statistics are per channel, over the grid tokens of all images: the mean and the biased
// variance. Where their pointers are not null they are computed, stored, and used by the norm.
struct TokenDepthwiseConvTraining : TokenDepthwiseConv {
  bool has_pre_norm, has_norm;
  float *pre_mean, *pre_var;  // of x; to be computed
  // Of the convolution's result without the bias, which such a norm takes away again (NaN or infinite, it makes the
  // variance NaN); to be computed.
  float *mean, *var;
  void* conv;  // the convolution's result, without the bias if `mean` is to be computed, laid out as out; or null
};

// The backward pass. pre_norm and norm hold the statistics of the forward pass, given ones or the batch's.
struct TokenDepthwiseConvBackward : TokenDepthwiseConv {  // out is unused
  bool has_pre_norm, has_norm;
  // Whether the statistics are the batch's, and so carry gradients to every token.
  bool pre_batch_statistics, batch_statistics;
  const void* grad;  // of x's element type; channels are adjacent
  int64_t grad_batch_stride, grad_token_stride;
  const void* conv;  // as the forward pass returned it, or null
  void* dx;          // contiguous; null if not wanted
  // Gradients of parameters in float32; null if not wanted or if there is no such parameter.
  float *dweight, *dbias, *dpre_norm_weight, *dpre_norm_bias, *dnorm_weight, *dnorm_bias;
};

}  // namespace fastvit
