// token_depthwise_conv on the CPU: how the work is divided, and the kernels that do a part of it.
#pragma once

#include "common/inline.h"
#include "common/isa.h"
#include "token_depthwise_conv/args.h"

namespace fastvit {

constexpr int64_t kMaxRows = 2;  // output rows that kernels work out together, whatever the instruction set

// The usual convolution, which has kernels of its own.
FASTVIT_INLINE bool is_3x3(const TokenDepthwiseConv& op) { return op.kernel == 3 && op.padding == 1 && op.stride <= 2; }

// An item of work is a block of channels of a block of output rows of one map.
struct TokenDepthwiseConvWork : TokenDepthwiseConv {
  int64_t channel_block, channel_blocks;  // the first is a multiple of 16
  int64_t row_block, row_blocks;
  int64_t padded_width;    // of an input row with its padding columns
  int64_t ring_rows;       // input rows a thread holds at a time
  bool direct;             // from x to the result, without a ring
  int64_t direct_floats;   // of the taps of a channel block, as that way wants them
  bool streams;            // the result's tokens are whole cache lines, and go past the caches
  int64_t scratch_floats;  // working memory of one thread
  int64_t items, grain;    // all there are, and as many as a thread should take at least
};

// Divides the work among the threads there are.
TokenDepthwiseConvWork divide(const TokenDepthwiseConv& op);

// Does items [begin, end); scratch: 64-byte aligned, scratch_floats long.
FASTVIT_DECLARE_PER_ISA(void token_depthwise_conv(const TokenDepthwiseConvWork& op, int64_t begin, int64_t end,
                                                  float* scratch);)

}  // namespace fastvit
