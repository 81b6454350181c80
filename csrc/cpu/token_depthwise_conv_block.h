// What the passes of token_depthwise_conv share, compiled once per instruction set: a block of channels with its
// parameters, the rows of its input, and the convolution of them.
#pragma once

#include "activation.h"
#include "token_depthwise_conv.h"
#include "vec.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t kLanes = Vec::lanes;

// Above this size of the result, rows are fetched ahead; below, they come fast enough, and asking costs more.
constexpr int64_t kRingPrefetchBytes = 3 << 20;

// f(c, n) for the channels of a block: vectors of n = kLanes, and one of fewer where the block ends in between.
template <class F>
FASTVIT_INLINE void for_each_vector(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, kLanes);
  if (c < channels) f(c, channels - c);
}

template <class T>
FASTVIT_INLINE Vec load(const T* p, int64_t n) {
  return n == kLanes ? Vec::load(p) : Vec::load(p, n);
}

template <class T>
FASTVIT_INLINE void store(Vec v, T* p, int64_t n) {
  n == kLanes ? v.store(p) : v.store(p, n);
}

Vec read(ChannelParameter parameter, int64_t at, int64_t n, float absent) {
  if (parameter.data == nullptr) return Vec::fill(absent);
  return parameter.element == Element::bfloat16 ? load(static_cast<const bf16*>(parameter.data) + at, n)
                                                : load(static_cast<const float*>(parameter.data) + at, n);
}

FASTVIT_INLINE float widen(float x) { return x; }
FASTVIT_INLINE float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// A norm as scale * x + shift.
struct Affine {
  Vec scale, shift;
};

Affine fold(const ChannelNorm& norm, int64_t at, int64_t n) {
  const Vec deviation = sqrt(read(norm.var, at, n, 1.0f) + Vec::fill(norm.eps));
  const Vec scale = read(norm.weight, at, n, 1.0f) / deviation;
  return {scale, fnma(read(norm.mean, at, n, 0.0f), scale, read(norm.bias, at, n, 0.0f))};
}

// What a thread works with: the parameters of every channel block, packed when the thread first meets it, and the rows
// of the one at hand. It lies in the scratch the thread was given. The ring holds the last op.ring_rows input rows:
// as many as the kernel has to go through a map once, or the whole map.
struct Block {
  const TokenDepthwiseConvWork& op;
  int64_t first = 0;     // channel
  int64_t channels = 0;  // the last block may be short
  float *taps, *shift, *pre_scale, *pre_shift;
  float *zeros, *ring, *row;
  float* end;  // of what it takes of the scratch

  Block(const TokenDepthwiseConvWork& operation, float* scratch) : op(operation), parameters_(scratch) {
    const int64_t line = op.padded_width * op.channel_block;
    zeros = parameters_ + op.channel_blocks * parameter_floats();
    ring = zeros + line;
    row = ring + op.ring_rows * line;
    end = row + op.out_width * op.channel_block;
    // Nothing packed yet; padding columns and rows are zero, as are the lanes behind the last channel.
    for (int64_t i = 0; i < op.channel_blocks; ++i) is_packed(i) = 0.0f;
    memset(zeros, 0, static_cast<size_t>((op.ring_rows + 1) * line) * sizeof(float));
  }

  // Makes a channel block the one at hand.
  void enter(int64_t index) {
    first = index * op.channel_block;
    channels = op.channels - first < op.channel_block ? op.channels - first : op.channel_block;
    taps = parameters_ + index * parameter_floats();
    shift = taps + op.kernel * op.kernel * op.channel_block;
    pre_scale = shift + op.channel_block;
    pre_shift = pre_scale + op.channel_block;
    if (is_packed(index) == 0.0f) pack();
    is_packed(index) = 1.0f;
  }

  // Takes over the other's channels, and its taps turned round, without the shift.
  void turn(const Block& other) {
    const int64_t area = op.kernel * op.kernel, width = op.channel_block;
    first = other.first;
    channels = other.channels;
    taps = parameters_;
    shift = taps + area * width;
    for (int64_t tap = 0; tap < area; ++tap) {
      memcpy(taps + tap * width, other.taps + (area - 1 - tap) * width, static_cast<size_t>(width) * sizeof(float));
    }
    memset(shift, 0, static_cast<size_t>(width) * sizeof(float));
  }

  // Where input row y lies in the ring, behind its padding columns.
  float* ring_row(int64_t y) const {
    return ring + ((y % op.ring_rows) * op.padded_width + op.padding) * op.channel_block;
  }
  // The same for reading; rows above and below the map are zeros.
  const float* input_row(int64_t y) const {
    return y < 0 || y >= op.height ? zeros + op.padding * op.channel_block : ring_row(y);
  }

 private:
  // Taps, three vectors, and a vector whose first element says whether the rest is filled in.
  int64_t parameter_floats() const { return op.channel_block * (op.kernel * op.kernel + 4); }
  float& is_packed(int64_t index) const { return parameters_[(index + 1) * parameter_floats() - op.channel_block]; }
  void pack();

  float* parameters_;
};

// From (channels, taps) to (taps, width).
template <class T>
void transpose(const T* weight, int64_t channels, int64_t area, int64_t width, float* taps) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < area; ++tap) taps[tap * width + c] = widen(*weight++);
  }
}

// Lays out the taps tap by tap, the norm folded in.
void Block::pack() {
  const int64_t width = op.channel_block, area = op.kernel * op.kernel;
  if (channels < width) memset(taps, 0, static_cast<size_t>((area + 3) * width) * sizeof(float));
  if (op.weight.element == Element::bfloat16) {
    transpose(static_cast<const bf16*>(op.weight.data) + first * area, channels, area, width, taps);
  } else {
    transpose(static_cast<const float*>(op.weight.data) + first * area, channels, area, width, taps);
  }
  for_each_vector(channels, [&](int64_t c, int64_t n) {
    Vec offset = read(op.bias, first + c, n, 0.0f);
    if (op.norm.mean.data != nullptr) {
      const Affine norm = fold(op.norm, first + c, n);
      for (int64_t tap = 0; tap < area; ++tap) {
        float* p = taps + tap * width + c;
        store(load(p, n) * norm.scale, p, n);
      }
      offset = fma(offset, norm.scale, norm.shift);
    }
    store(offset, shift + c, n);
    if (op.pre_norm.mean.data != nullptr) {
      const Affine norm = fold(op.pre_norm, first + c, n);
      store(norm.scale, pre_scale + c, n);
      store(norm.shift, pre_shift + c, n);
    }
  });
}

// Brings the channels of a token that will be needed a row later near, for reading (0) or writing (1). The hardware
// does not see the pattern: a few lines of each token in turn. A prefetch beyond the tensor does nothing.
template <int for_writing, class T>
FASTVIT_INLINE void prefetch(const T* token, int64_t channels) {
  for (int64_t c = 0; c < channels; c += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(token + c, for_writing);
}

// Input row y into the ring: widened, normalised, activated.
template <class T, Activation activation, bool normalise>
void take_row(Block& block, const T* x, int64_t y) {
  const TokenDepthwiseConvWork& op = block.op;
  float* to = block.ring_row(y);
  const T* from = x + (op.prefix_tokens + y * op.width) * op.x_token_stride + block.first;
  for (int64_t column = 0; column < op.width; ++column) {
    for_each_vector(block.channels, [&](int64_t c, int64_t n) {
      Vec v = load(from + c, n);
      if constexpr (normalise) v = fma(v, Vec::load(block.pre_scale + c), Vec::load(block.pre_shift + c));
      activate<activation>(v).store(to + c);
    });
    if (op.bytes > kRingPrefetchBytes) prefetch<0>(from + op.width * op.x_token_stride, block.channels);
    from += op.x_token_stride;
    to += op.channel_block;
  }
}

// A row of tokens: the channels of the one in column i begin at p + i * step.
template <class T>
struct Row {
  const T* p;
  int64_t step;
};

// An output row of a 3x3 convolution with padding 1. A vector of channels walks along three input rows with the nine
// taps in registers; columns it has seen stay in registers, too. With add_center the input is added to the output.
template <int64_t stride, bool add_center, class In, class Out>
void convolve_3x3(const Block& block, Row<In> above, Row<In> here, Row<In> below, Out* out, int64_t out_step) {
  const TokenDepthwiseConvWork& op = block.op;
  const int64_t width = op.channel_block;
  const Vec zero = Vec::fill(0.0f);
  for (int64_t c = 0; c < block.channels; c += kLanes) {
    const float* tap = block.taps + c;
    const Vec w0 = Vec::load(tap), w1 = Vec::load(tap + width), w2 = Vec::load(tap + 2 * width);
    const Vec w3 = Vec::load(tap + 3 * width), w4 = Vec::load(tap + 4 * width), w5 = Vec::load(tap + 5 * width);
    const Vec w6 = Vec::load(tap + 6 * width), w7 = Vec::load(tap + 7 * width), w8 = Vec::load(tap + 8 * width);
    const Vec shift = Vec::load(block.shift + c);
    const In *p = above.p + c, *q = here.p + c, *r = below.p + c;
    Out* to = out + c;
    const auto advance = [&] { p += above.step, q += here.step, r += below.step; };
    // Left, middle and right column of each row.
    Vec p0 = zero, q0 = zero, r0 = zero;
    Vec p1 = Vec::load(p), q1 = Vec::load(q), r1 = Vec::load(r);
    const auto give = [&](Vec p2, Vec q2, Vec r2) {
      Vec a = fma(p2, w2, fma(p1, w1, fma(p0, w0, shift)));
      Vec b = fma(q2, w5, fma(q1, w4, q0 * w3));
      b = fma(r2, w8, fma(r1, w7, fma(r0, w6, b)));
      if constexpr (add_center) a += q1;
      (a + b).store(to);
      to += out_step;
    };
    for (int64_t column = 0; column + 1 < op.out_width; ++column) {
      advance();
      const Vec p2 = Vec::load(p), q2 = Vec::load(q), r2 = Vec::load(r);
      give(p2, q2, r2);
      if constexpr (stride == 1) {
        p0 = p1, q0 = q1, r0 = r1;
        p1 = p2, q1 = q2, r1 = r2;
      } else {
        advance();
        p0 = p2, q0 = q2, r0 = r2;
        p1 = Vec::load(p), q1 = Vec::load(q), r1 = Vec::load(r);
      }
    }
    if (stride == 1 || op.width % 2 == 1) {
      give(zero, zero, zero);
    } else {
      advance();
      give(Vec::load(p), Vec::load(q), Vec::load(r));
    }
  }
}

// `count` neighbouring outputs of any kernel and stride: each tap is loaded once for all of them.
template <int64_t count>
FASTVIT_INLINE void convolve_columns(const Block& block, int64_t top, int64_t column, int64_t c) {
  const TokenDepthwiseConvWork& op = block.op;
  const int64_t width = op.channel_block, step = op.stride * width;
  const float* tap = block.taps + c;
  Vec sum[count];
  for (int64_t i = 0; i < count; ++i) sum[i] = Vec::load(block.shift + c);
  for (int64_t dy = 0; dy < op.kernel; ++dy) {
    const float* p = block.input_row(top + dy) + (column * op.stride - op.padding) * width + c;
    for (int64_t dx = 0; dx < op.kernel; ++dx, tap += width, p += width) {
      const Vec weight = Vec::load(tap);
      for (int64_t i = 0; i < count; ++i) sum[i] = fma(Vec::load(p + i * step), weight, sum[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) sum[i].store(block.row + (column + i) * width + c);
}

void convolve_any(const Block& block, int64_t top) {
  for (int64_t c = 0; c < block.op.channel_block; c += kLanes) {
    int64_t column = 0;
    for (; column + 4 <= block.op.out_width; column += 4) convolve_columns<4>(block, top, column, c);
    for (; column < block.op.out_width; ++column) convolve_columns<1>(block, top, column, c);
  }
}

template <class T>
using TakeRow = void (*)(Block&, const T*, int64_t);
template <class T>
TakeRow<T> choose_take_row(const TokenDepthwiseConvWork& op) {
  TakeRow<T> chosen = nullptr;
  with_activation(op.pre_activation, [&]<Activation activation>() {
    chosen = op.pre_norm.mean.data != nullptr ? take_row<T, activation, true> : take_row<T, activation, false>;
  });
  return chosen;
}

// The convolution from the ring to the row buffer.
template <int64_t stride, bool add_center>
void convolve_ring_3x3(const Block& block, int64_t top) {
  const int64_t step = block.op.channel_block;
  const auto row = [&](int64_t y) { return Row<float>{block.input_row(y), step}; };
  convolve_3x3<stride, add_center>(block, row(top), row(top + 1), row(top + 2), block.row, step);
}

using ConvolveRing = void (*)(const Block&, int64_t);

ConvolveRing choose_convolve_ring(const TokenDepthwiseConvWork& op) {
  if (op.kernel != 3 || op.padding != 1 || op.stride > 2) return convolve_any;
  return op.stride == 1 ? convolve_ring_3x3<1, false> : convolve_ring_3x3<2, false>;
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
