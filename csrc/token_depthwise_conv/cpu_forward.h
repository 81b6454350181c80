// token_depthwise_conv at inference, compiled once per instruction set.
//
// An item (a channel block of a block of output rows) moves a ring buffer of input rows over the map. Each input
// element is read once: widened to float32, normalised and activated on its way into the ring buffer. Output rows are
// convolved from there and finished (activation, residual, rounding) in registers. The norm after the convolution is
// folded into taps and shift. The ring buffer stays in the L1 cache, and x is read in runs of whole channel blocks.
// With at most a norm after the convolution and the residual, the direct kernel needs no ring buffer.
#pragma once

#include "token_depthwise_conv/cpu_direct.h"

namespace fastvit::FASTVIT_ISA {
namespace {

template <class T>
void copy_prefix(const Block& block, const T* x, T* out) {
  const TokenDepthwiseConvWork& op = block.op;
  for (int64_t token = 0; token < op.prefix_tokens; ++token) {
    memcpy(out + token * op.channels + block.first, x + token * op.x_token_stride + block.first,
           static_cast<size_t>(block.channels) * sizeof(T));
  }
}

// The first grid token of an item's image, at the item's first channel.
template <class T>
const T* item_image(const TokenDepthwiseConvWork& op, int64_t item) {
  const int64_t channel_block = item / op.row_blocks % op.channel_blocks;
  const T* x = static_cast<const T*>(op.x) + item / op.row_blocks / op.channel_blocks * op.x_batch_stride;
  return x + op.prefix_tokens * op.x_token_stride + channel_block * op.channel_block;
}

// The output rows of an item.
template <class T>
void convolve_rows(Block& block, LoadInputRow<T> load_row, Convolve<T> convolve, const T* x, T* out, int64_t first_row,
                   int64_t end_row) {
  const TokenDepthwiseConvWork& op = block.op;
  int64_t next = 0;  // the first input row that is not in the ring buffer yet
  for (int64_t y = first_row; y < end_row; y += kRows) {
    const int64_t rows = end_row - y < kRows ? end_row - y : kRows, top = y * op.stride - op.padding;
    const int64_t token = op.prefix_tokens + y * op.out_width;
    const Target<T> target{rows,
                           out + token * op.channels + block.first,
                           op.channels,
                           op.out_width * op.channels,
                           op.residual ? x + token * op.x_token_stride + block.first : nullptr,
                           op.x_token_stride,
                           op.out_width * op.x_token_stride,
                           op.streams};
    load_input_rows(block, load_row, x, y, rows, next);
    convolve(block, top, target);
  }
}

template <class T>
void run(const TokenDepthwiseConvWork& op, int64_t begin, int64_t end, float* scratch) {
  const int64_t out_image = (op.prefix_tokens + op.out_height * op.out_width) * op.channels;
  const LoadInputRow<T> load_row = choose_load_input_row<T>(op);
  const Convolve<T> convolve = choose_convolve<T>(op);
  const ConvolveDirectly<T> convolve_directly = choose_convolve_directly<T>(op);
  Block block(op, scratch);
  for (int64_t item = begin; item < end; ++item) {
    // Images in the outer loop, so that the same pages are accessed together.
    const int64_t rows = item % op.row_blocks, image = item / op.row_blocks / op.channel_blocks;
    const int64_t channel_block = item / op.row_blocks % op.channel_blocks;
    const bool is_new = block.enter(channel_block);
    const T* x = static_cast<const T*>(op.x) + image * op.x_batch_stride;
    T* out = static_cast<T*>(op.out) + image * out_image;
    if (rows == 0) copy_prefix(block, x, out);
    const T* following = item + 1 < end ? item_image<T>(op, item + 1) : nullptr;
    const int64_t first_row = rows * op.row_block;
    const int64_t end_row = first_row + op.row_block < op.out_height ? first_row + op.row_block : op.out_height;
    if (op.direct) {
      float* packed = block.end + channel_block * op.direct_floats;
      const TapVectors vectors{packed, block.channels};
      if (is_new) pack_taps(block, vectors, packed);
      convolve_directly(
          op, vectors,
          {item_image<T>(op, item), out + op.prefix_tokens * op.channels + block.first, following, first_row, end_row});
    } else {
      block.out = op.stride == 1 && op.out_width == op.width && !(kStreams && op.streams) ? out : nullptr;
      block.following = following;
      convolve_rows(block, load_row, convolve, x, out, first_row, end_row);
    }
  }
  if (kStreams && op.streams) end_streams();
}

}  // namespace

void token_depthwise_conv(const TokenDepthwiseConvWork& op, int64_t begin, int64_t end, float* scratch) {
  with_element<true>(op.element, [&]<class T>() { run<T>(op, begin, end, scratch); });
}

}  // namespace fastvit::FASTVIT_ISA
