// What the passes of token_depthwise_conv in training share, compiled once per instruction set: sums over tokens, and
// the backward pass through a norm and an activation.
#pragma once

#include "token_depthwise_conv/cpu_block.h"
#include "token_depthwise_conv/cpu_training.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t kSumTerms = 64;  // of a partial sum in float32
constexpr int64_t kGroup = 16;     // tokens that are summed in registers

// Sums of several kinds of values per channel, made of partial sums of kSumTerms terms, which may be sums themselves.
class SplitSums {
 public:
  SplitSums(float* scratch, int64_t kinds, int64_t width)
      : partial_(scratch), total_(scratch + kinds * width), size_(kinds * width), width_(width) {
    memset(partial_, 0, static_cast<size_t>(2 * size_) * sizeof(float));
  }
  static int64_t floats(int64_t kinds, int64_t width) { return 2 * kinds * width; }

  FASTVIT_INLINE void add(int64_t kind, int64_t c, Vec value) {
    float* p = partial_ + kind * width_ + c;
    (Vec::load(p) + value).store(p);
  }
  // The partial sums, kind by kind.
  float* partial() { return partial_; }
  // To be called after a term was added to every sum.
  void end_term() {
    if (++terms_ == kSumTerms) fold();
  }
  // The sums of a kind, once all terms are added.
  const float* get(int64_t kind) {
    fold();
    return total_ + kind * width_;
  }
  void store(int64_t kind, int64_t channels, float* to) {
    memcpy(to, get(kind), static_cast<size_t>(channels) * sizeof(float));
  }

 private:
  void fold() {
    for (int64_t i = 0; i < size_; i += kLanes) (Vec::load(total_ + i) + Vec::load(partial_ + i)).store(total_ + i);
    memset(partial_, 0, static_cast<size_t>(size_) * sizeof(float));
    terms_ = 0;
  }

  float *partial_, *total_;
  int64_t size_, width_, terms_ = 0;
};

template <class T>
const T* image_of(const TokenDepthwiseConvPass& op, int64_t image) {
  return static_cast<const T*>(op.x) + image * op.x_batch_stride;
}

template <class T>
const T* grad_of(const TokenDepthwiseConvPass& op, int64_t image, int64_t channel) {
  return static_cast<const T*>(op.grad) + image * op.grad_batch_stride + channel;
}

// Of a tensor laid out as the result.
template <class T>
const T* conv_of(const TokenDepthwiseConvPass& op, int64_t image, int64_t channel) {
  const int64_t tokens = op.prefix_tokens + op.out_height * op.out_width;
  return static_cast<const T*>(op.conv) + image * tokens * op.channels + channel;
}

template <class T>
T* dx_of(const TokenDepthwiseConvPass& op, int64_t image, int64_t channel) {
  const int64_t tokens = op.prefix_tokens + op.height * op.width;
  return op.dx == nullptr ? nullptr : static_cast<T*>(op.dx) + image * tokens * op.channels + channel;
}

// The sums of a kind of an image, at the block's first channel.
inline float* place(float* sums, int64_t kinds, int64_t image, int64_t kind, const Block& block) {
  return sums + (image * kinds + kind) * block.op.channels + block.first;
}

// Stores the sums of a norm's gradient, dn and dn (c - mean), if they are wanted.
inline void store_sums(SplitSums& sums, float* to, int64_t image, const Block& block) {
  for (int64_t kind = 0; to != nullptr && kind < 2; ++kind) {
    sums.store(kind, block.channels, place(to, 2, image, kind, block));
  }
}

// The gradient of the prefix tokens, which pass through.
template <class T>
void copy_prefix_gradient(const TokenDepthwiseConvPass& op, const Block& block, int64_t image) {
  T* to = dx_of<T>(op, image, block.first);
  const T* from = grad_of<T>(op, image, block.first);
  for (int64_t token = 0; to != nullptr && token < op.prefix_tokens; ++token) {
    memcpy(to + token * op.channels, from + token * op.grad_token_stride,
           static_cast<size_t>(block.channels) * sizeof(T));
  }
}

// f(image) for every item, with the block entered.
template <class F>
void for_each_item(const TokenDepthwiseConvPass& op, Block& block, int64_t begin, int64_t end, const F& f) {
  for (int64_t item = begin; item < end; ++item) {
    block.enter(item % op.channel_blocks);
    f(item / op.channel_blocks);
  }
}

// The same without the block's parameters.
template <class F>
void for_each_unpacked(const TokenDepthwiseConvPass& op, Block& block, int64_t begin, int64_t end, const F& f) {
  for (int64_t item = begin; item < end; ++item) {
    block.enter_unpacked(item % op.channel_blocks);
    f(item / op.channel_blocks);
  }
}

// A row of tokens, `step` apart; p is null, and step 0, if there are none.
template <class T>
struct Tokens {
  T* p = nullptr;
  int64_t step = 0;

  FASTVIT_INLINE Tokens from(int64_t token) const { return {p + token * step, step}; }
};

// A row of tokens in the backward pass through a norm and the activation after it.
template <class Value, class Grad, class Out>
struct BackwardRow {
  Activation activation;
  int64_t columns;
  Tokens<const Value> value;     // the norm's input; null with neither norm nor activation
  Tokens<const Grad> grad;       // of the activation's output
  Tokens<Out> out;               // the gradient of the norm's input; null if not wanted
  Tokens<const Out> add;         // added to out
  bool of_norm_output = false;   // out is the gradient of the norm's output instead
  const float* about = nullptr;  // taken off every gradient in the sums; without an activation only
  // The distance from a token to the one to prefetch, in the next row; 0: none.
  int64_t next_value = 0, next_grad = 0, next_out = 0;
};

// Prefetches the line of channel c in the tokens at a distance of `next`, unless that is 0.
template <int for_writing, class T>
FASTVIT_INLINE void prefetch_row(Tokens<T> tokens, int64_t next, int64_t count, int64_t c) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  if (next == 0 || (kLanes < line && c % line != 0)) return;
  const T* p = tokens.p + next + c;
  for (int64_t token = 0; token < count; ++token, p += tokens.step) __builtin_prefetch(p, for_writing);
}

// The backward pass of a row, for a tensor of T and a block of channels. Adds dn, and with a norm dn (value - mean), to
// the sums.
template <class T, Activation activation, bool normed, class Value, class Grad, class Out>
void row_backward(const NormCoefficients& norm, const Block& block, const BackwardRow<Value, Grad, Out>& row,
                  SplitSums& sums) {
  constexpr bool valued = normed || activation != Activation::none;
  const int64_t first = block.first;
  const bool has_out = row.out.p != nullptr, adds = row.add.p != nullptr, through = normed && !row.of_norm_output;
  const bool by_batch = normed && norm.slope != nullptr;
  const Vec zero = Vec::fill(0.0f);
  for (int64_t begin = 0; begin < row.columns; begin += kGroup) {
    const int64_t count = begin + kGroup < row.columns ? kGroup : row.columns - begin;
    const auto values = row.value.from(begin);
    const auto grads = row.grad.from(begin);
    const auto outs = row.out.from(begin);
    const auto added = row.add.from(begin);
    for_each_vector(block.channels, [&](int64_t c, int64_t n) {
      prefetch_row<0>(values, row.next_value, count, c);
      prefetch_row<0>(grads, row.next_grad, count, c);
      prefetch_row<1>(outs, row.next_out, count, c);
      const auto read = [&](const float* of) { return normed && of != nullptr ? load(of + first + c, n) : zero; };
      const Vec mean = read(norm.mean), scale = read(norm.scale), bias = read(norm.bias);
      const Vec slope = read(norm.slope), offset = read(norm.offset);
      const Value* value = values.p + c;
      const Grad* grad = grads.p + c;
      Out* out = outs.p + c;
      const Out* add = added.p + c;
      const Vec about = row.about == nullptr ? zero : load(row.about + c, n);
      Vec sum = zero, product = zero;
      for (int64_t column = 0; column < count; ++column) {
        Vec centred = zero, dn = load(grad, n);
        if constexpr (valued) {
          centred = load(value, n) - mean;
          dn = input_gradient<activation, T>(row.activation, dn, normed ? fma(centred, scale, bias) : centred);
          value += values.step;
        }
        grad += grads.step;
        const Vec apart = activation == Activation::none ? dn - about : dn;
        sum += apart;
        if constexpr (normed) product = fma(apart, centred, product);
        if (!has_out) continue;
        Vec result = dn;
        if (through) result = by_batch ? fma(centred, slope, dn + offset) * scale : dn * scale;
        if (adds) result += load(add, n), add += added.step;
        store(result, out, n);
        out += outs.step;
      }
      sums.add(0, c, sum);
      if constexpr (normed) sums.add(1, c, product);
    });
    sums.end_term();
  }
}

// Input row y: from the gradient of the convolution's input, through pre_activation and pre_norm, to dx.
template <class T>
BackwardRow<T, float, T> input_row(const TokenDepthwiseConvPass& op, const Block& block, int64_t image, int64_t y,
                                   const float* grad) {
  const int64_t token = op.prefix_tokens + y * op.width;
  BackwardRow<T, float, T> row{op.pre_activation,
                               op.width,
                               {image_of<T>(op, image) + token * op.x_token_stride + block.first, op.x_token_stride},
                               {grad, op.channel_block},
                               {},
                               {}};
  if (op.dx != nullptr) row.out = {dx_of<T>(op, image, block.first) + token * op.channels, op.channels};
  if (op.residual && !op.dx_of_norm_output) {
    row.add = {grad_of<T>(op, image, block.first) + token * op.grad_token_stride, op.grad_token_stride};
  }
  row.of_norm_output = op.dx_of_norm_output;
  row.next_out = op.width * op.channels;
  return row;
}

// Output row y: from the gradient of the result, through activation and norm, to that of the convolution.
template <class T>
BackwardRow<T, T, float> output_row(const TokenDepthwiseConvPass& op, const Block& block, int64_t image, int64_t y) {
  const int64_t token = op.prefix_tokens + y * op.out_width;
  const T* grad = grad_of<T>(op, image, block.first) + token * op.grad_token_stride;
  BackwardRow<T, T, float> row{op.activation, op.out_width, {}, {grad, op.grad_token_stride}, {}, {}};
  if (op.conv != nullptr) row.value = {conv_of<T>(op, image, block.first) + token * op.channels, op.channels};
  row.next_grad = op.out_width * op.grad_token_stride;
  row.next_value = op.conv == nullptr ? 0 : op.out_width * op.channels;
  return row;
}

template <class T>
using OutputBackward = void (*)(const NormCoefficients&, const Block&, const BackwardRow<T, T, float>&, SplitSums&);
template <class T>
using InputBackward = void (*)(const NormCoefficients&, const Block&, const BackwardRow<T, float, T>&, SplitSums&);

template <class T>
OutputBackward<T> choose_output_backward(Activation activation, bool normed) {
  return with_activation(activation, [&]<Activation known>() {
    return normed ? row_backward<T, known, true, T, T, float> : row_backward<T, known, false, T, T, float>;
  });
}

template <class T>
InputBackward<T> choose_input_backward(Activation activation, bool normed) {
  return with_activation(activation, [&]<Activation known>() {
    return normed ? row_backward<T, known, true, T, float, T> : row_backward<T, known, false, T, float, T>;
  });
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
