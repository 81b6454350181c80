// How the passes of token_depthwise_conv on the CPU divide their work.
#pragma once

#include <algorithm>

#include "common/integers.h"
#include "token_depthwise_conv/cpu.h"

namespace fastvit {

// The channel block as wide as a cache allows in which a channel takes up `per_channel` floats, evened out over the
// channels; at least `narrowest` vectors.
inline void set_channel_block(TokenDepthwiseConvWork& work, int64_t cache_floats, int64_t per_channel,
                              int64_t narrowest = 2) {
  constexpr int64_t lanes = 16;  // channel blocks are whole vectors of the widest instruction set
  const int64_t widest = std::max(cache_floats / per_channel / lanes * lanes, narrowest * lanes);
  const int64_t blocks = divide_up(work.channels, widest);
  work.channel_block = divide_up(divide_up(work.channels, blocks), lanes) * lanes;
  work.channel_blocks = divide_up(work.channels, work.channel_block);
}

// Divides the channels for the way without a ring; whether it can be taken: where nothing stands in front of the
// convolution or behind it but a norm and the residual, and every block of channels fills a vector.
inline bool divide_directly(TokenDepthwiseConvWork& work) {
  const bool plain = work.pre_norm.mean.data == nullptr && work.pre_activation == Activation::none &&
                     work.activation == Activation::none;
  if (!plain || !is_3x3(work)) return false;
  constexpr int64_t token_bytes = 512;  // with their taps, rows of these stay in the L1 cache
  set_channel_block(work, token_bytes, work.element == Element::float32 ? 4 : 2, 1);
  if (work.channels - (work.channel_blocks - 1) * work.channel_block < 16) return false;
  work.direct_floats = (work.kernel * work.kernel + 1) * (work.channel_block + 16);
  return true;
}

// Whether a result of tokens goes past the caches. Its lines then need not be read before they are written, at the
// price that whoever reads it next finds nothing of it near: nothing lost where it is larger than what cores have of
// their own. bfloat16 comes in half lines, which gain nothing.
inline bool is_streamed(const TokenDepthwiseConv& op, const void* out, int64_t numel) {
  constexpr int64_t line = 64, floats = line / 4, least = 1 << 19;
  return op.element == Element::float32 && op.channels % floats == 0 && reinterpret_cast<uintptr_t>(out) % line == 0 &&
         numel >= least;
}

// Of a kernel's Block: parameters, and rows of zeros and of input.
inline int64_t block_floats(const TokenDepthwiseConvWork& work) {
  const int64_t parameters = work.channel_blocks * (work.kernel * work.kernel + 4);
  return work.channel_block * (parameters + (work.ring_rows + 1) * work.padded_width);
}

// Input rows that kMaxRows output rows need.
inline int64_t rows_at_once(const TokenDepthwiseConv& op) { return op.kernel + (kMaxRows - 1) * op.stride; }

// Forward, whatever calls for it.
void run_token_depthwise_conv(const TokenDepthwiseConv& op);

}  // namespace fastvit
