// What all passes of token_depthwise_conv share, compiled once per instruction set: a block of channels with its
// parameters and input rows, and their convolution.
#pragma once

#include "common/vec.h"
#include "common/vec_activation.h"
#include "token_depthwise_conv/cpu.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// Most output rows per call of a Convolve.
constexpr int64_t kRows = kLanes == 16 ? kMaxRows : 1;

// f(c, n) for every vector of a block's channels: n is kLanes, except in a shorter last vector.
template <class F>
FASTVIT_INLINE void for_each_vector(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, kLanes);
  if (c < channels) f(c, channels - c);
}

// streams: a non-temporal store, of a whole vector.
template <class T>
FASTVIT_INLINE void store(Vec v, T* p, int64_t n, bool streams) {
  if (kStreams && streams) {
    stream(v, p);
  } else {
    store(v, p, n);
  }
}

// f(values) of the parameter's type, which may be another than that of x.
template <class F>
FASTVIT_INLINE auto with_parameter(const ChannelParameter& parameter, const F& f) {
  switch (parameter.element) {
    case Element::bfloat16: return f(static_cast<const bf16*>(parameter.data));
    case Element::float16: return f(static_cast<const f16*>(parameter.data));
    default: return f(static_cast<const float*>(parameter.data));
  }
}

Vec read(ChannelParameter parameter, int64_t at, int64_t n, float absent) {
  if (parameter.data == nullptr) return Vec::fill(absent);
  return with_parameter(parameter, [&](const auto* values) { return load(values + at, n); });
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

// A thread's working set, in its scratch memory: the parameters of every channel block, packed on first use, and the
// input rows of the current one. The ring buffer holds the last op.ring_rows input rows: those under the kernel, or the
// whole map.
struct Block {
  const TokenDepthwiseConvWork& op;
  int64_t first = 0;     // channel
  int64_t channels = 0;  // fewer in the last block
  float *taps, *shift, *pre_scale, *pre_shift;
  float *zeros, *ring;
  float* end;                       // of the scratch memory that is used
  const void* out = nullptr;        // the image of the result to prefetch while x is loaded; or null
  const void* following = nullptr;  // the next item's first grid token, at its first channel; or null

  Block(const TokenDepthwiseConvWork& operation, float* scratch) : op(operation), parameters_(scratch) {
    const int64_t line = op.padded_width * op.channel_block;
    zeros = parameters_ + op.channel_blocks * parameter_floats();
    ring = zeros + line;
    end = ring + op.ring_rows * line;
    // Nothing is packed yet. Padding columns and rows and the lanes beyond the last channel stay zero.
    for (int64_t i = 0; i < op.channel_blocks; ++i) is_packed(i) = 0.0f;
    memset(zeros, 0, static_cast<size_t>((op.ring_rows + 1) * line) * sizeof(float));
  }

  // Makes a channel block the current one, without its parameters.
  void enter_unpacked(int64_t index) {
    first = index * op.channel_block;
    channels = op.channels - first < op.channel_block ? op.channels - first : op.channel_block;
  }
  // Makes a channel block the current one; returns whether it is for the first time.
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

  // Takes the channels of another block and its taps, flipped, with a shift of zero.
  void flip(const Block& other) {
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

  // Input row y in the ring buffer, after its left padding.
  float* ring_row(int64_t y) const {
    return ring + ((y % op.ring_rows) * op.padded_width + op.padding) * op.channel_block;
  }
  // The same for reading; rows outside of the map are zeros.
  const float* input_row(int64_t y) const {
    return y < 0 || y >= op.height ? zeros + op.padding * op.channel_block : ring_row(y);
  }

 private:
  // Taps, three vectors, and a vector whose first element is 1 once the rest is packed.
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

// Packs the taps, tap by tap, with the norm folded in.
void Block::pack() {
  const int64_t width = op.channel_block, area = op.kernel * op.kernel;
  if (channels < width) memset(taps, 0, static_cast<size_t>((area + 3) * width) * sizeof(float));
  with_parameter(op.weight, [&](const auto* weight) { transpose(weight + first * area, channels, area, width, taps); });
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

// Vectors that are activated together, as many as the registers hold: each is a chain of dependent instructions.
constexpr int kInterleaved = kLanes == 16 ? 4 : 1;

// Loads input row y into the ring buffer: widened, normalised, activated. Software-prefetches the row below, and the
// row of the result, as the hardware prefetcher does not follow a few lines of each token.
template <class T, Activation activation, bool normalise>
void load_input_row(Block& block, const T* x, int64_t y) {
  const TokenDepthwiseConvWork& op = block.op;
  // Local copies, since the stores below may alias the members.
  const int64_t channels = block.channels, width = op.width, step = op.x_token_stride, block_width = op.channel_block;
  const float *const scale = block.pre_scale, *const shift = block.pre_shift;
  const int64_t op_channels = op.channels, token = op.prefix_tokens + y * width;
  const T* out = block.out == nullptr ? nullptr : static_cast<const T*>(block.out) + token * op_channels + block.first;
  float* to = block.ring_row(y);
  const T* from = x + token * step + block.first;
  const T* below = y + 1 < op.height ? from + width * step : static_cast<const T*>(block.following);
  for (int64_t column = 0; column < width; ++column) {
    const auto load_vectors = [&]<int count>(int64_t c, int64_t n) __attribute__((always_inline)) {
      Vec v[count];
#pragma GCC unroll 4
      for (int k = 0; k < count; ++k) {
        const int64_t at = c + k * kLanes;
        v[k] = load(from + at, n);
        if constexpr (normalise) v[k] = fma(v[k], Vec::load(scale + at), Vec::load(shift + at));
      }
      activate<activation, T>(op.pre_activation, v);
#pragma GCC unroll 4
      for (int k = 0; k < count; ++k) v[k].store(to + c + k * kLanes);
    };
    int64_t c = 0;
    for (; c + kInterleaved * kLanes <= channels; c += kInterleaved * kLanes)
      load_vectors.template operator()<kInterleaved>(c, kLanes);
    for_each_vector(channels - c, [&](int64_t rest, int64_t n) { load_vectors.template operator()<1>(c + rest, n); });
    if (below != nullptr) prefetch<0>(below + column * step, channels);
    if (out != nullptr) prefetch<1>(out + column * op_channels, channels);
    from += step;
    to += block_width;
  }
}

template <class T>
using LoadInputRow = void (*)(Block&, const T*, int64_t);
template <class T>
LoadInputRow<T> choose_load_input_row(const TokenDepthwiseConvWork& op) {
  return with_activation(op.pre_activation, [&]<Activation activation>() {
    return op.pre_norm.mean.data != nullptr ? load_input_row<T, activation, true>
                                            : load_input_row<T, activation, false>;
  });
}

// Loads the input rows that `rows` output rows from y on need and that are not in the ring buffer yet; `next` is the
// first of those.
template <class T>
void load_input_rows(Block& block, LoadInputRow<T> load_row, const T* x, int64_t y, int64_t rows, int64_t& next) {
  const TokenDepthwiseConvWork& op = block.op;
  const int64_t top = y * op.stride - op.padding, end = top + (rows - 1) * op.stride + op.kernel;
  const int64_t bottom = end < op.height ? end : op.height;
  if (next < top) next = top;
  for (; next < bottom; ++next) load_row(block, x, next);
}

// Where up to kRows neighbouring output rows of a channel block are stored, and what is added to them.
template <class T>
struct Target {
  int64_t rows;
  T* to;                   // the first row's first token
  int64_t step, row_step;  // to the next token, and row
  const T* add;            // null if nothing is added
  int64_t add_step, add_row_step;
  bool streams;

  // The rows from `row` on.
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
  // Stores n channels from c on, in the current column.
  FASTVIT_INLINE void put(Vec value, int64_t row, int64_t c, int64_t n) const {
    if (add != nullptr) value += load(add + row * add_row_step + c, n);
    store(value, to + row * row_step + c, n, streams);
  }
};

// Up to `together` output rows of a 3x3 convolution with padding 1, whose first input row is `top`. For a vector of
// channels the nine taps stay in registers along the rows, and every input is added to each output that needs it.
template <int64_t together, int64_t stride, Activation activation, class T>
FASTVIT_INLINE void convolve_rows_3x3(const Block& block, int64_t top, const Target<T>& target) {
  constexpr int64_t in_rows = (together - 1) * stride + 3;
  // Local copies, since the stores below may alias the members.
  const int64_t channels = block.channels, width = block.op.channel_block, columns = block.op.out_width;
  const Activation given = block.op.activation;
  const float *const block_taps = block.taps, *const block_shift = block.shift;
  const float* rows[in_rows];
  for (int64_t i = 0; i < in_rows; ++i) rows[i] = block.input_row(top + i);
  // The vector of channels from c on. A partial one is a separate instance.
  const auto walk = [&]<bool whole>(int64_t c) __attribute__((always_inline)) {
    const int64_t n = whole ? kLanes : channels - c;
    Vec taps[3][3];
    for (int64_t tap = 0; tap < 9; ++tap) taps[tap / 3][tap % 3] = Vec::load(block_taps + tap * width + c);
    const Vec shift = Vec::load(block_shift + c);
    // Partial sums of the outputs in the previous, this and the next column. The shift is added last, so that a large
    // one costs them digits only once.
    Vec before[together], here[together], after[together];
    for (int64_t row = 0; row < together; ++row) here[row] = after[row] = Vec::fill(0.0f);
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
    const auto finish = [&](const Vec(&sums)[together]) {
      Vec values[together];
      for (int64_t row = 0; row < together; ++row) values[row] = sums[row] + shift;
      activate<activation, T>(given, values);
      for (int64_t row = 0; row < together; ++row) {
        if (row == 0 || row < to.rows) to.put(values[row], row, c, n);
      }
      to.advance();
    };
    const auto shift_sums = [&] {
      for (int64_t row = 0; row < together; ++row) {
        before[row] = here[row];
        here[row] = after[row];
        after[row] = Vec::fill(0.0f);
      }
    };
    if constexpr (stride == 1) {
      read();
      add(here, 1);
      add(after, 0);
      shift_sums();
      for (int64_t i = 1; i < columns; ++i) {
        read();
        add(before, 2);
        add(here, 1);
        add(after, 0);
        finish(before);
        shift_sums();
      }
      finish(before);
    } else {
      for (int64_t i = 0; i < columns; ++i) {
        read();
        add(here, 1);
        read();
        add(here, 2);
        add(after, 0);
        finish(here);
        shift_sums();
      }
    }
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) walk.template operator()<true>(c);
  if (c < channels) walk.template operator()<false>(c);
}

// Output rows of a 3x3 convolution. With stride 2 neighbouring rows share only one input row, too little to gain from.
template <int64_t stride, Activation activation, class T>
void convolve_3x3(const Block& block, int64_t top, const Target<T>& target) {
  constexpr int64_t together = stride == 1 ? kRows : 1;
  for (int64_t row = 0; row < target.rows; row += together) {
    convolve_rows_3x3<together, stride, activation>(block, top + row * stride, target.from(row));
  }
}

// `count` neighbouring outputs of any kernel and stride, or, with `kernel`, of that kernel and stride 1: each tap is
// loaded once for all of them, and so is then each input of a row of taps.
template <int64_t count, int64_t kernel, Activation activation, class T>
FASTVIT_INLINE void convolve_columns(const Block& block, int64_t top, int64_t column, int64_t c, Target<T>& to) {
  const TokenDepthwiseConvWork& op = block.op;
  const int64_t width = op.channel_block, step = op.stride * width;
  const int64_t n = block.channels - c < kLanes ? block.channels - c : kLanes;
  const float* tap = block.taps + c;
  Vec sum[count];
  for (int64_t i = 0; i < count; ++i) sum[i] = Vec::fill(0.0f);
  const int64_t rows = kernel != 0 ? kernel : op.kernel;
#pragma GCC unroll 1
  for (int64_t dy = 0; dy < rows; ++dy) {
    const float* p = block.input_row(top + dy) + (column * op.stride - op.padding) * width + c;
    if constexpr (kernel != 0) {
      Vec inputs[count + kernel - 1];
#pragma GCC unroll 16
      for (int64_t i = 0; i < count + kernel - 1; ++i) inputs[i] = Vec::load(p + i * width);
#pragma GCC unroll 8
      for (int64_t dx = 0; dx < kernel; ++dx, tap += width) {
        const Vec weight = Vec::load(tap);
#pragma GCC unroll 8
        for (int64_t i = 0; i < count; ++i) sum[i] = fma(inputs[i + dx], weight, sum[i]);
      }
    } else {
      for (int64_t dx = 0; dx < op.kernel; ++dx, tap += width, p += width) {
        const Vec weight = Vec::load(tap);
        for (int64_t i = 0; i < count; ++i) sum[i] = fma(Vec::load(p + i * step), weight, sum[i]);
      }
    }
  }
  const Vec shift = Vec::load(block.shift + c);  // last, as in convolve_rows_3x3
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; ++i) {
    to.put(activate<activation, T>(op.activation, sum[i] + shift), 0, c, n);
    to.advance();
  }
}

// Output rows of any convolution, or of one with that kernel and stride 1.
template <int64_t kernel, Activation activation, class T>
void convolve_any(const Block& block, int64_t top, const Target<T>& target) {
  constexpr int64_t most = kernel != 0 && kLanes == 16 ? 7 : 4;
  const TokenDepthwiseConvWork& op = block.op;
  for (int64_t row = 0; row < target.rows; ++row, top += op.stride) {
    for (int64_t c = 0; c < block.channels; c += kLanes) {
      Target<T> to = target.from(row);
      int64_t column = 0;
      for (; column + most <= op.out_width; column += most)
        convolve_columns<most, kernel, activation>(block, top, column, c, to);
      for (; column < op.out_width; ++column) convolve_columns<1, kernel, activation>(block, top, column, c, to);
    }
  }
}

template <class T>
using Convolve = void (*)(const Block&, int64_t top, const Target<T>&);

// The convolution of the rows in the ring buffer, without or with the activation after it.
template <class T, Activation activation = Activation::none>
Convolve<T> choose_plain_convolve(const TokenDepthwiseConvWork& op) {
  return op.kernel == 5 && op.stride == 1 ? convolve_any<5, activation, T>
         : !is_3x3(op)                    ? convolve_any<0, activation, T>
         : op.stride == 1                 ? convolve_3x3<1, activation, T>
                                          : convolve_3x3<2, activation, T>;
}

template <class T>
Convolve<T> choose_convolve(const TokenDepthwiseConvWork& op) {
  return with_activation(op.activation,
                         [&]<Activation activation>() { return choose_plain_convolve<T, activation>(op); });
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
