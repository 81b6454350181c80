// The arithmetic of token_depthwise_conv, compiled once per instruction set.
//
// One item (a channel block of a block of output rows) slides a ring of `kernel` input rows over the map. Each input
// element is read once: widened to float32, normalised and activated on its way into the ring, whose padding columns
// are zero. An output row is convolved from the ring into a row buffer, then finished (activation, residual, rounding)
// on its way out. The norm behind the convolution is folded into taps and shift. All of it stays in the L1 cache, and
// memory is touched in runs of whole channel blocks.
#include "token_depthwise_conv.h"

#include "vec.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t kLanes = Vec::lanes;

template <Activation activation>
FASTVIT_INLINE Vec activate(Vec x) {
  if constexpr (activation == Activation::gelu) {
    const Vec half = x * Vec::fill(0.5f);
    return fma(half, erf(x * Vec::fill(0.70710678f)), half);
  } else if constexpr (activation == Activation::quick_gelu) {
    return x * sigmoid(x * Vec::fill(1.702f));
  } else if constexpr (activation == Activation::silu) {
    return x * sigmoid(x);
  } else if constexpr (activation == Activation::relu) {
    return max(Vec::fill(0.0f), x);
  } else {
    return x;
  }
}

// Calls f.template operator()<activation>() for the activation known at run time.
template <class F>
FASTVIT_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::quick_gelu: return f.template operator()<Activation::quick_gelu>();
    case Activation::silu: return f.template operator()<Activation::silu>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::none: return f.template operator()<Activation::none>();
  }
}

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
  return parameter.is_bf16 ? load(static_cast<const bf16*>(parameter.data) + at, n)
                           : load(static_cast<const float*>(parameter.data) + at, n);
}

float read(ChannelParameter parameter, int64_t at) {
  if (!parameter.is_bf16) return static_cast<const float*>(parameter.data)[at];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const bf16*>(parameter.data)[at].bits) << 16;
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
// of the one at hand. It lies in the scratch the thread was given.
struct Block {
  const TokenDepthwiseConv& op;
  int64_t first = 0;     // channel
  int64_t channels = 0;  // the last block may be short
  float *taps, *shift, *pre_scale, *pre_shift;
  float *zeros, *ring, *row;

  Block(const TokenDepthwiseConv& operation, float* scratch) : op(operation), parameters_(scratch) {
    const int64_t line = op.padded_width * op.channel_block;
    zeros = parameters_ + op.channel_blocks * parameter_floats();
    ring = zeros + line;
    row = ring + op.kernel * line;
    memset(scratch, 0, static_cast<size_t>(op.scratch_floats) * sizeof(float));
  }

  // Makes a channel block the one at hand.
  void enter(int64_t index) {
    first = index * op.channel_block;
    channels = op.channels - first < op.channel_block ? op.channels - first : op.channel_block;
    taps = parameters_ + index * parameter_floats();
    shift = taps + op.kernel * op.kernel * op.channel_block;
    pre_scale = shift + op.channel_block;
    pre_shift = pre_scale + op.channel_block;
    float* packed = pre_shift + op.channel_block;
    if (*packed == 0.0f) pack();
    *packed = 1.0f;
  }

  // Row y of the padded input (zeros above and below the map); the column -padding is its first.
  const float* input_row(int64_t y) const {
    return y < 0 || y >= op.height ? zeros : ring + (y % op.kernel) * op.padded_width * op.channel_block;
  }
  float* ring_row(int64_t y) {
    return ring + ((y % op.kernel) * op.padded_width + op.padding) * op.channel_block;
  }

 private:
  // Taps, three vectors, and a vector whose first element says that the rest is filled in.
  int64_t parameter_floats() const { return op.channel_block * (op.kernel * op.kernel + 4); }
  void pack();

  float* parameters_;
};

// Packs taps tap by tap, the norm folded in; lanes beyond the block's channels stay zero.
void Block::pack() {
  const int64_t width = op.channel_block, area = op.kernel * op.kernel;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < area; ++tap) taps[tap * width + c] = read(op.weight, (first + c) * area + tap);
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

// Input row y into the ring: widened, normalised, activated.
template <class T, Activation activation, bool normalise>
void take_row(Block& block, const T* x, int64_t y) {
  const TokenDepthwiseConv& op = block.op;
  float* to = block.ring_row(y);
  const T* from = x + (op.prefix_tokens + y * op.width) * op.x_token_stride + block.first;
  for (int64_t column = 0; column < op.width; ++column) {
    for_each_vector(block.channels, [&](int64_t c, int64_t n) {
      Vec v = load(from + c, n);
      if constexpr (normalise) v = fma(v, Vec::load(block.pre_scale + c), Vec::load(block.pre_shift + c));
      activate<activation>(v).store(to + c);
    });
    from += op.x_token_stride;
    to += op.channel_block;
  }
}

// An output row from three input rows. Taps stay in registers while a vector of channels walks along the row.
template <int64_t stride>
void convolve_3x3(const Block& block, int64_t top, float* out, int64_t out_step) {
  const int64_t width = block.op.channel_block, columns = block.op.out_width;
  const float *above = block.input_row(top), *here = block.input_row(top + 1), *below = block.input_row(top + 2);
  for (int64_t c = 0; c < width; c += kLanes) {
    const float* tap = block.taps + c;
    const Vec shift = Vec::load(block.shift + c);
    const Vec w0 = Vec::load(tap), w1 = Vec::load(tap + width), w2 = Vec::load(tap + 2 * width);
    const Vec w3 = Vec::load(tap + 3 * width), w4 = Vec::load(tap + 4 * width), w5 = Vec::load(tap + 5 * width);
    const Vec w6 = Vec::load(tap + 6 * width), w7 = Vec::load(tap + 7 * width), w8 = Vec::load(tap + 8 * width);
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t at = column * stride * width + c;
      const float *p = above + at, *q = here + at, *r = below + at;
      Vec sum = fma(Vec::load(p), w0, shift);
      sum = fma(Vec::load(p + width), w1, sum);
      sum = fma(Vec::load(p + 2 * width), w2, sum);
      sum = fma(Vec::load(q), w3, sum);
      sum = fma(Vec::load(q + width), w4, sum);
      sum = fma(Vec::load(q + 2 * width), w5, sum);
      sum = fma(Vec::load(r), w6, sum);
      sum = fma(Vec::load(r + width), w7, sum);
      sum = fma(Vec::load(r + 2 * width), w8, sum);
      sum.store(out + column * out_step + c);
    }
  }
}

// `count` neighbouring outputs of any kernel and stride: each tap is loaded once for all of them.
template <int64_t count>
FASTVIT_INLINE void convolve_columns(const Block& block, int64_t top, int64_t column, int64_t c, float* out,
                                     int64_t out_step) {
  const TokenDepthwiseConv& op = block.op;
  const int64_t width = op.channel_block, step = op.stride * width;
  const float* tap = block.taps + c;
  Vec sum[count];
  for (int64_t i = 0; i < count; ++i) sum[i] = Vec::load(block.shift + c);
  for (int64_t dy = 0; dy < op.kernel; ++dy) {
    const float* p = block.input_row(top + dy) + column * step + c;
    for (int64_t dx = 0; dx < op.kernel; ++dx, tap += width, p += width) {
      const Vec weight = Vec::load(tap);
      for (int64_t i = 0; i < count; ++i) sum[i] = fma(Vec::load(p + i * step), weight, sum[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) sum[i].store(out + (column + i) * out_step + c);
}

void convolve_any(const Block& block, int64_t top, float* out, int64_t out_step) {
  for (int64_t c = 0; c < block.op.channel_block; c += kLanes) {
    int64_t column = 0;
    for (; column + 4 <= block.op.out_width; column += 4) convolve_columns<4>(block, top, column, c, out, out_step);
    for (; column < block.op.out_width; ++column) convolve_columns<1>(block, top, column, c, out, out_step);
  }
}

void convolve(const Block& block, int64_t top, float* out, int64_t out_step) {
  const TokenDepthwiseConv& op = block.op;
  if (op.kernel == 3 && op.stride == 1) return convolve_3x3<1>(block, top, out, out_step);
  if (op.kernel == 3 && op.stride == 2) return convolve_3x3<2>(block, top, out, out_step);
  convolve_any(block, top, out, out_step);
}

// The row buffer to its place: activated, the input added, rounded.
template <class T, Activation activation, bool residual>
void give_row(const Block& block, const T* x, T* out, int64_t y) {
  const TokenDepthwiseConv& op = block.op;
  const int64_t token = op.prefix_tokens + y * op.out_width;
  const float* from = block.row;
  const T* add = x + token * op.x_token_stride + block.first;
  T* to = out + token * op.channels + block.first;
  for (int64_t column = 0; column < op.out_width; ++column) {
    for_each_vector(block.channels, [&](int64_t c, int64_t n) {
      Vec v = activate<activation>(Vec::load(from + c));
      if constexpr (residual) v += load(add + c, n);
      store(v, to + c, n);
    });
    from += op.channel_block;
    add += op.x_token_stride;
    to += op.channels;
  }
}

template <class T>
using TakeRow = void (*)(Block&, const T*, int64_t);
template <class T>
using GiveRow = void (*)(const Block&, const T*, T*, int64_t);

template <class T>
TakeRow<T> choose_take_row(const TokenDepthwiseConv& op) {
  TakeRow<T> chosen = nullptr;
  with_activation(op.pre_activation, [&]<Activation activation>() {
    chosen = op.pre_norm.mean.data != nullptr ? take_row<T, activation, true> : take_row<T, activation, false>;
  });
  return chosen;
}

template <class T>
GiveRow<T> choose_give_row(const TokenDepthwiseConv& op) {
  GiveRow<T> chosen = nullptr;
  with_activation(op.activation, [&]<Activation activation>() {
    chosen = op.residual ? give_row<T, activation, true> : give_row<T, activation, false>;
  });
  return chosen;
}

template <class T>
void run(const TokenDepthwiseConv& op, int64_t begin, int64_t end, float* scratch) {
  const TakeRow<T> take = choose_take_row<T>(op);
  const GiveRow<T> give = choose_give_row<T>(op);
  const int64_t out_tokens = op.prefix_tokens + op.out_height * op.out_width;
  Block block(op, scratch);
  for (int64_t item = begin; item < end; ++item) {
    // Images outermost: what lies in the same pages is worked on together.
    const int64_t rows = item % op.row_blocks, image = item / op.row_blocks / op.channel_blocks;
    block.enter(item / op.row_blocks % op.channel_blocks);
    const T* x = static_cast<const T*>(op.x) + image * op.x_batch_stride;
    T* out = static_cast<T*>(op.out) + image * out_tokens * op.channels;
    if (rows == 0) {
      for (int64_t token = 0; token < op.prefix_tokens; ++token) {
        memcpy(out + token * op.channels + block.first, x + token * op.x_token_stride + block.first,
               static_cast<size_t>(block.channels) * sizeof(T));
      }
    }
    const int64_t first_row = rows * op.row_block;
    const int64_t end_row = first_row + op.row_block < op.out_height ? first_row + op.row_block : op.out_height;
    int64_t next = 0;  // the first input row not in the ring yet
    for (int64_t y = first_row; y < end_row; ++y) {
      const int64_t top = y * op.stride - op.padding;
      const int64_t bottom = top + op.kernel < op.height ? top + op.kernel : op.height;
      if (next < top) next = top;
      for (; next < bottom; ++next) take(block, x, next);
      convolve(block, top, block.row, op.channel_block);
      give(block, x, out, y);
    }
  }
}

}  // namespace

void token_depthwise_conv(const TokenDepthwiseConv& op, int64_t begin, int64_t end, float* scratch) {
  op.is_bf16 ? run<bf16>(op, begin, end, scratch) : run<float>(op, begin, end, scratch);
}

}  // namespace fastvit::FASTVIT_ISA
