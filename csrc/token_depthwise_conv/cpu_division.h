// How the passes of token_depthwise_conv divide their work on the CPU.
#pragma once

#include <algorithm>

#include "common/integers.h"
#include "token_depthwise_conv/cpu.h"

namespace fastvit {

// The widest channel block that fits a cache, with `per_channel` floats per channel; blocks are even in size, and have
// at least `narrowest` vectors.
inline void set_channel_block(TokenDepthwiseConvWork& work, int64_t cache_floats, int64_t per_channel,
                              int64_t narrowest = 2) {
  constexpr int64_t lanes = 16;  // channel blocks are whole vectors of the widest instruction set
  const int64_t widest = std::max(cache_floats / per_channel / lanes * lanes, narrowest * lanes);
  const int64_t blocks = divide_up(work.channels, widest);
  work.channel_block = divide_up(divide_up(work.channels, blocks), lanes) * lanes;
  work.channel_blocks = divide_up(work.channels, work.channel_block);
}

// Divides the channels for the direct kernel. Returns whether it applies: with at most a norm after the convolution and
// the residual, and if every block of channels fills a vector.
inline bool divide_directly(TokenDepthwiseConvWork& work) {
  const bool plain = work.pre_norm.mean.data == nullptr && work.pre_activation == Activation::none &&
                     work.activation == Activation::none;
  if (!plain || !is_3x3(work)) return false;
  constexpr int64_t token_bytes = 512;  // rows of these, with their taps, stay in the L1 cache
  set_channel_block(work, token_bytes, work.element == Element::float32 ? 4 : 2, 1);
  if (work.channels - (work.channel_blocks - 1) * work.channel_block < 16) return false;
  work.direct_floats = (work.kernel * work.kernel + 1) * (work.channel_block + 16);
  return true;
}

// Whether to store a result with non-temporal stores. Its lines then need not be read before they are written, but are
// not in the caches afterwards: no loss if it is larger than a core's own caches. A vector of bfloat16 is half a line,
// which gains nothing.
inline bool is_streamed(const TokenDepthwiseConv& op, const void* out, int64_t numel) {
  constexpr int64_t line = 64, floats = line / 4, least = 1 << 19;
  return op.element == Element::float32 && op.channels % floats == 0 && reinterpret_cast<uintptr_t>(out) % line == 0 &&
         numel >= least;
}

// The floats of a Block: parameters, and rows of zeros and of input.
inline int64_t block_floats(const TokenDepthwiseConvWork& work) {
  const int64_t parameters = work.channel_blocks * (work.kernel * work.kernel + 4);
  return work.channel_block * (parameters + (work.ring_rows + 1) * work.padded_width);
}

// Input rows that kMaxRows output rows need, of those there are.
inline int64_t rows_at_once(const TokenDepthwiseConv& op) {
  return std::min(op.height, op.kernel + (kMaxRows - 1) * op.stride);
}

// Runs the forward pass, for inference or training.
void run_token_depthwise_conv(const TokenDepthwiseConv& op);

}  // namespace fastvit
