// Depthwise convolution of tokens (B, P + h*w, C) as they lie, with the norms and activations around it.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace fastvit {

enum class Activation : int64_t { none, gelu, quick_gelu, silu, relu };

// A per-channel parameter in float32 or bfloat16; null where there is none.
struct ChannelParameter {
  const void* data = nullptr;
  bool is_bf16 = false;
};

// BatchNorm with given statistics; absent where mean is null.
struct ChannelNorm {
  ChannelParameter weight, bias, mean, var;
  float eps = 0.0f;
};

// Plain data, no functions: inline ones would be shared between the files compiled per instruction set.
struct TokenDepthwiseConv {
  const void* x;
  void* out;  // contiguous
  bool is_bf16;
  int64_t x_batch_stride, x_token_stride;  // in elements; channels are adjacent
  int64_t batch, channels, prefix_tokens;
  int64_t height, width, out_height, out_width;
  int64_t kernel, stride, padding;
  ChannelParameter weight;  // (C, kernel, kernel)
  ChannelParameter bias;
  ChannelNorm pre_norm, norm;
  Activation pre_activation, activation;
  bool residual;

  // How the work is divided: an item is a block of channels of a block of output rows of one map.
  int64_t channel_block, channel_blocks;  // the first is a multiple of 16
  int64_t row_block, row_blocks;
  int64_t padded_width;   // of an input row with its padding columns
  int64_t scratch_floats;  // working memory of one thread
  bool prefetch;           // x and out are too large to be in the caches already
};

// Does items [begin, end); scratch: 64-byte aligned, scratch_floats long.
FASTVIT_DECLARE_PER_ISA(void token_depthwise_conv(const TokenDepthwiseConv& op, int64_t begin, int64_t end,
                                                  float* scratch);)

}  // namespace fastvit
