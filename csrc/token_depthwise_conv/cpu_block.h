// What the passes of token_depthwise_conv share, compiled once per instruction set: a block of channels with its
// parameters, the rows of its input, and the convolution of them.
#pragma once

#include "common/vec.h"
#include "common/vec_activation.h"
#include "token_depthwise_conv/cpu.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// Output rows that a call of a convolution makes at most.
constexpr int64_t kRows = kLanes == 16 ? kMaxRows : 1;

// f(c, n) for the channels of a block: vectors of n = kLanes, and one of fewer where the block ends in between.
template <class F>
FASTVIT_INLINE void for_each_vector(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, kLanes);
  if (c < channels) f(c, channels - c);
}

// streams: past the caches, of a whole vector.
template <class T>
FASTVIT_INLINE void store(Vec v, T* p, int64_t n, bool streams) {
  if (kStreams && streams) {
    stream(v, p);
  } else {
    store(v, p, n);
  }
}

Vec read(ChannelParameter parameter, int64_t at, int64_t n, float absent) {
  if (parameter.data == nullptr) return Vec::fill(absent);
  return parameter.element == Element::bfloat16 ? load(static_cast<const bf16*>(parameter.data) + at, n)
                                                : load(static_cast<const float*>(parameter.data) + at, n);
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
  float *zeros, *ring;
  float* end;                       // of what it takes of the scratch
  const void* out = nullptr;        // the image of the result whose tokens are fetched as those of x are taken; or null
  const void* following = nullptr;  // the block's channels of the first grid token that is taken next; or null

  Block(const TokenDepthwiseConvWork& operation, float* scratch) : op(operation), parameters_(scratch) {
    const int64_t line = op.padded_width * op.channel_block;
    zeros = parameters_ + op.channel_blocks * parameter_floats();
    ring = zeros + line;
    end = ring + op.ring_rows * line;
    // Nothing packed yet; padding columns and rows are zero, as are the lanes behind the last channel.
    for (int64_t i = 0; i < op.channel_blocks; ++i) is_packed(i) = 0.0f;
    memset(zeros, 0, static_cast<size_t>((op.ring_rows + 1) * line) * sizeof(float));
  }

  // Makes a channel block the one at hand, without its parameters.
  void enter_unpacked(int64_t index) {
    first = index * op.channel_block;
    channels = op.channels - first < op.channel_block ? op.channels - first : op.channel_block;
  }
  // Makes a channel block the one at hand; whether it is for the first time.
  bool enter(int64_t index) {
    enter_unpacked(index);
    taps = parameters_ + index * parameter_floats();
    shift = taps + op.kernel * op.kernel * op.channel_block;
    pre_scale = shift + op.channel_block;
    pre_shift = pre_scale + op.channel_block;
    if (is_packed(index) != 0.0f) return false;
    pack();
    is_packed(index) = 1.0f;
    return true;
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

// Vectors that are activated at once. As many as the registers hold: one after the other they would wait for
// themselves.
constexpr int kTogether = kLanes == 16 ? 4 : 1;

// Input row y into the ring: widened, normalised, activated.
template <class T, Activation activation, bool normalise>
void take_row(Block& block, const T* x, int64_t y) {
  const TokenDepthwiseConvWork& op = block.op;
  // Kept apart from what is stored to, for all the compiler knows.
  const int64_t channels = block.channels, width = op.width, step = op.x_token_stride, block_width = op.channel_block;
  const float *const scale = block.pre_scale, *const shift = block.pre_shift;
  const int64_t op_channels = op.channels, token = op.prefix_tokens + y * width;
  const T* out = block.out == nullptr ? nullptr : static_cast<const T*>(block.out) + token * op_channels + block.first;
  float* to = block.ring_row(y);
  const T* from = x + token * step + block.first;
  const T* below = y + 1 < op.height ? from + width * step : static_cast<const T*>(block.following);
  for (int64_t column = 0; column < width; ++column) {
    const auto take = [&]<int count>(int64_t c, int64_t n) __attribute__((always_inline)) {
      Vec v[count];
#pragma GCC unroll 4
      for (int k = 0; k < count; ++k) {
        const int64_t at = c + k * kLanes;
        v[k] = load(from + at, n);
        if constexpr (normalise) v[k] = fma(v[k], Vec::load(scale + at), Vec::load(shift + at));
      }
      activate<activation, T>(v);
#pragma GCC unroll 4
      for (int k = 0; k < count; ++k) v[k].store(to + c + k * kLanes);
    };
    int64_t c = 0;
    for (; c + kTogether * kLanes <= channels; c += kTogether * kLanes) take.template operator()<kTogether>(c, kLanes);
    for_each_vector(channels - c, [&](int64_t rest, int64_t n) { take.template operator()<1>(c + rest, n); });
    if (below != nullptr) prefetch<0>(below + column * step, channels);
    if (out != nullptr) prefetch<1>(out + column * op_channels, channels);
    from += step;
    to += block_width;
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

// Takes the input rows that `rows` output rows from y on need and that are not in the ring yet; `next` is the first of
// those.
template <class T>
void take_rows(Block& block, TakeRow<T> take, const T* x, int64_t y, int64_t rows, int64_t& next) {
  const TokenDepthwiseConvWork& op = block.op;
  const int64_t top = y * op.stride - op.padding, end = top + (rows - 1) * op.stride + op.kernel;
  const int64_t bottom = end < op.height ? end : op.height;
  if (next < top) next = top;
  for (; next < bottom; ++next) take(block, x, next);
}

// Up to kRows neighbouring output rows of a block of channels: where they go, and what is added to them.
template <class T>
struct Target {
  int64_t rows;
  T* to;                   // the first row's first token
  int64_t step, row_step;  // to the next token, and row
  const T* add;            // null where there is nothing to add
  int64_t add_step, add_row_step;
  bool streams;

  // The rows from one of them on.
  FASTVIT_INLINE Target from(int64_t row) const {
    Target rest = *this;
    rest.rows -= row;
    rest.to += row * row_step;
    if (add != nullptr) rest.add += row * add_row_step;
    return rest;
  }
  // Moves on to the next column.
  FASTVIT_INLINE void advance() {
    to += step;
    if (add != nullptr) add += add_step;
  }
  // The channels from c on of the column it is at.
  FASTVIT_INLINE void give(Vec value, int64_t row, int64_t c, int64_t n) const {
    if (add != nullptr) value += load(add + row * add_row_step + c, n);
    store(value, to + row * row_step + c, n, streams);
  }
};

// Up to `together` output rows of a 3x3 convolution with padding 1 whose first input row is `top`. A vector of channels
// walks along the input rows with the nine taps in registers, and each input it meets is added to every output that
// needs it.
template <int64_t together, int64_t stride, Activation activation, class T>
FASTVIT_INLINE void convolve_rows_3x3(const Block& block, int64_t top, const Target<T>& target) {
  constexpr int64_t in_rows = (together - 1) * stride + 3;
  // Kept apart from what is stored to, for all the compiler knows.
  const int64_t channels = block.channels, width = block.op.channel_block, columns = block.op.out_width;
  const float *const block_taps = block.taps, *const block_shift = block.shift;
  const float* rows[in_rows];
  for (int64_t i = 0; i < in_rows; ++i) rows[i] = block.input_row(top + i);
  // A vector of the channels from c on; with less than a whole one, the code is another.
  const auto walk = [&]<bool whole>(int64_t c) __attribute__((always_inline)) {
    const int64_t n = whole ? kLanes : channels - c;
    Vec taps[3][3];
    for (int64_t tap = 0; tap < 9; ++tap) taps[tap / 3][tap % 3] = Vec::load(block_taps + tap * width + c);
    const Vec shift = Vec::load(block_shift + c);
    // The outputs of the column before, of this one and of the one behind, as far as they are. A shift beside which
    // they are small comes last, so that it takes no digits from them but once.
    Vec before[together], here[together], behind[together];
    for (int64_t row = 0; row < together; ++row) here[row] = behind[row] = Vec::fill(0.0f);
    const float* at[in_rows];
    for (int64_t i = 0; i < in_rows; ++i) at[i] = rows[i] + c;
    Target<T> to = target;
    Vec inputs[in_rows];
    const auto read = [&] {
      for (int64_t i = 0; i < in_rows; ++i) {
        inputs[i] = Vec::load(at[i]);
        at[i] += width;
      }
    };
    const auto add = [&](Vec(&sums)[together], int64_t dx) {
      for (int64_t i = 0; i < in_rows; ++i) {
        for (int64_t row = 0; row < together; ++row) {
          const int64_t dy = i - row * stride;
          if (dy >= 0 && dy < 3) sums[row] = fma(inputs[i], taps[dy][dx], sums[row]);
        }
      }
    };
    const auto give = [&](const Vec(&sums)[together]) {
      Vec values[together];
      for (int64_t row = 0; row < together; ++row) values[row] = sums[row] + shift;
      activate<activation, T>(values);
      for (int64_t row = 0; row < together; ++row) {
        if (row == 0 || row < to.rows) to.give(values[row], row, c, n);
      }
      to.advance();
    };
    const auto move_on = [&] {
      for (int64_t row = 0; row < together; ++row) {
        before[row] = here[row];
        here[row] = behind[row];
        behind[row] = Vec::fill(0.0f);
      }
    };
    if constexpr (stride == 1) {
      read();
      add(here, 1);
      add(behind, 0);
      move_on();
      for (int64_t i = 1; i < columns; ++i) {
        read();
        add(before, 2);
        add(here, 1);
        add(behind, 0);
        give(before);
        move_on();
      }
      give(before);
    } else {
      for (int64_t i = 0; i < columns; ++i) {
        read();
        add(here, 1);
        read();
        add(here, 2);
        add(behind, 0);
        give(here);
        move_on();
      }
    }
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) walk.template operator()<true>(c);
  if (c < channels) walk.template operator()<false>(c);
}

// Output rows of a 3x3 convolution. With stride 2 neighbours share one input row alone, too little to work them out
// together.
template <int64_t stride, Activation activation, class T>
void convolve_3x3(const Block& block, int64_t top, const Target<T>& target) {
  constexpr int64_t together = stride == 1 ? kRows : 1;
  for (int64_t row = 0; row < target.rows; row += together) {
    convolve_rows_3x3<together, stride, activation>(block, top + row * stride, target.from(row));
  }
}

// `count` neighbouring outputs of any kernel and stride: each tap is loaded once for all of them.
template <int64_t count, Activation activation, class T>
FASTVIT_INLINE void convolve_columns(const Block& block, int64_t top, int64_t column, int64_t c, Target<T>& to) {
  const TokenDepthwiseConvWork& op = block.op;
  const int64_t width = op.channel_block, step = op.stride * width;
  const int64_t n = block.channels - c < kLanes ? block.channels - c : kLanes;
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
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; ++i) {
    to.give(activate<activation, T>(sum[i]), 0, c, n);
    to.advance();
  }
}

// Output rows of any convolution.
template <Activation activation, class T>
void convolve_any(const Block& block, int64_t top, const Target<T>& target) {
  const TokenDepthwiseConvWork& op = block.op;
  for (int64_t row = 0; row < target.rows; ++row, top += op.stride) {
    for (int64_t c = 0; c < block.channels; c += kLanes) {
      Target<T> to = target.from(row);
      int64_t column = 0;
      for (; column + 4 <= op.out_width; column += 4) convolve_columns<4, activation>(block, top, column, c, to);
      for (; column < op.out_width; ++column) convolve_columns<1, activation>(block, top, column, c, to);
    }
  }
}

template <class T>
using Convolve = void (*)(const Block&, int64_t top, const Target<T>&);

// The convolution of what is in the ring.
template <class T>
Convolve<T> choose_convolve(const TokenDepthwiseConvWork& op, Activation activation) {
  Convolve<T> chosen = nullptr;
  with_activation(activation, [&]<Activation known>() {
    chosen = !is_3x3(op)      ? convolve_any<known, T>
             : op.stride == 1 ? convolve_3x3<1, known, T>
                              : convolve_3x3<2, known, T>;
  });
  return chosen;
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
