// token_depthwise_conv on the CPU: how the work is divided, and the kernel for a part of it.
#pragma once

#include "common/inline.h"
#include "common/isa.h"
#include "token_depthwise_conv/args.h"

namespace fastvit {

constexpr int64_t kMaxRows = 2;  // output rows that kernels compute together, with any instruction set

// The usual convolution, which has specialised kernels.
FASTVIT_INLINE bool is_3x3(const TokenDepthwiseConv& op) { return op.kernel == 3 && op.padding == 1 && op.stride <= 2; }

// An item of work is a block of channels of a block of output rows of one map.
struct TokenDepthwiseConvWork : TokenDepthwiseConv {
  int64_t channel_block, channel_blocks;  // channel_block is a multiple of 16
  int64_t row_block, row_blocks;
  int64_t padded_width;    // of an input row, with its padding columns
  int64_t ring_rows;       // input rows in a thread's ring buffer
  bool direct;             // from x to the result, without a ring buffer
  int64_t direct_floats;   // of a channel block's taps, as packed for direct
  bool streams;            // non-temporal stores; the result's tokens are whole cache lines
  int64_t scratch_floats;  // scratch memory of one thread
  int64_t items, grain;    // all of them, and the fewest per thread
};

// Divides the work among the threads there are.
TokenDepthwiseConvWork divide(const TokenDepthwiseConv& op);

// Computes items [begin, end); scratch: scratch_floats floats, aligned to 64 bytes.
FASTVIT_DECLARE_PER_ISA(void token_depthwise_conv(const TokenDepthwiseConvWork& op, int64_t begin, int64_t end,
                                                  float* scratch);)

}  // namespace fastvit
