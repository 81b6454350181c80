// What the passes of token_depthwise_conv's training share, compiled once per instruction set: sums over tokens, and
// gradients on their way back through a norm and an activation.
#pragma once

#include "token_depthwise_conv/cpu_block.h"
#include "token_depthwise_conv/cpu_training.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t kSumTerms = 64;  // of a float32 sum, before it is added to the others
constexpr int64_t kGroup = 16;     // tokens that are summed up in registers

// Sums of several kinds of values, channel by channel; what is added may itself be a sum of kSumTerms.
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
  // The sums that are added to, kind by kind.
  float* partial() { return partial_; }
  // To be called once something was added to every sum.
  void end_term() {
    if (++terms_ == kSumTerms) fold();
  }
  // The sums of a kind, to be read once no more is added.
  const float* get(int64_t kind) {
    fold();
    return total_ + kind * width_;
  }
  void give(int64_t kind, int64_t channels, float* to) {
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

// Of what is laid out as the result.
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

// Where the sums of a kind of an image belong, from the block's first channel on.
inline float* place(float* sums, int64_t kinds, int64_t image, int64_t kind, const Block& block) {
  return sums + (image * kinds + kind) * block.op.channels + block.first;
}

// The sums of a norm's gradient (dn, dn (c - mean)) to their place, if they are wanted.
inline void give_sums(SplitSums& sums, float* to, int64_t image, const Block& block) {
  for (int64_t kind = 0; to != nullptr && kind < 2; ++kind) {
    sums.give(kind, block.channels, place(to, 2, image, kind, block));
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

// f(image) for every item, the block entered.
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

// The channels of a row of tokens, `step` apart; p is null, and step 0, where there are none.
template <class T>
struct Tokens {
  T* p = nullptr;
  int64_t step = 0;

  FASTVIT_INLINE Tokens from(int64_t token) const { return {p + token * step, step}; }
};

// A row on its way back through an activation and the norm in front of it.
template <class Value, class Grad, class Out>
struct BackwardRow {
  int64_t columns;
  Tokens<const Value> value;  // in front of the norm; null where neither of the two is there
  Tokens<const Grad> grad;    // behind the activation
  Tokens<Out> out;            // in front of the norm; null where not wanted
  Tokens<const Out> add;      // to out
  bool unnormed = false;      // out is to be the gradient behind the norm
  // How far behind a token of each lies that which comes in its place later; it is fetched ahead.
  int64_t value_ahead = 0, grad_ahead = 0, out_ahead = 0;
};

// Fetches channel c, and what shares a line with it, of tokens that lie `ahead` behind; ahead is 0 where nothing does.
template <int for_writing, class T>
FASTVIT_INLINE void fetch_row(Tokens<T> tokens, int64_t ahead, int64_t count, int64_t c) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  if (ahead == 0 || (kLanes < line && c % line != 0)) return;
  const T* p = tokens.p + ahead + c;
  for (int64_t token = 0; token < count; ++token, p += tokens.step) __builtin_prefetch(p, for_writing);
}

// Of a tensor of T, for a block of channels. Adds dn and dn (value - mean) to the sums, the latter where there is a
// norm.
template <class T, Activation activation, bool normed, class Value, class Grad, class Out>
void pass_back(const NormCoefficients& norm, const Block& block, const BackwardRow<Value, Grad, Out>& row,
               SplitSums& sums) {
  constexpr bool valued = normed || activation != Activation::none;
  const int64_t first = block.first;
  const bool goes = row.out.p != nullptr, adds = row.add.p != nullptr, through = normed && !row.unnormed;
  const Vec zero = Vec::fill(0.0f);
  for (int64_t begin = 0; begin < row.columns; begin += kGroup) {
    const int64_t count = begin + kGroup < row.columns ? kGroup : row.columns - begin;
    const auto values = row.value.from(begin);
    const auto grads = row.grad.from(begin);
    const auto outs = row.out.from(begin);
    const auto added = row.add.from(begin);
    for_each_vector(block.channels, [&](int64_t c, int64_t n) {
      fetch_row<0>(values, row.value_ahead, count, c);
      fetch_row<0>(grads, row.grad_ahead, count, c);
      fetch_row<1>(outs, row.out_ahead, count, c);
      const auto read = [&](const float* of) { return normed ? load(of + first + c, n) : zero; };
      const Vec mean = read(norm.mean), scale = read(norm.scale), bias = read(norm.bias);
      const Vec slope = read(norm.slope), offset = read(norm.offset);
      const Value* value = values.p + c;
      const Grad* grad = grads.p + c;
      Out* out = outs.p + c;
      const Out* add = added.p + c;
      Vec sum = zero, product = zero;
      for (int64_t column = 0; column < count; ++column) {
        Vec centred = zero, dn = load(grad, n);
        if constexpr (valued) {
          centred = load(value, n) - mean;
          dn *= derivative<activation, T>(normed ? fma(centred, scale, bias) : centred);
          value += values.step;
        }
        grad += grads.step;
        sum += dn;
        if constexpr (normed) product = fma(dn, centred, product);
        if (!goes) continue;
        Vec result = through ? fma(dn, scale, fma(centred, slope, offset)) : dn;
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

// Input row y of x as it is behind the norm and activation in front of the convolution, backwards: from the gradient at
// the convolution's input to dx.
template <class T>
BackwardRow<T, float, T> input_row(const TokenDepthwiseConvPass& op, const Block& block, int64_t image, int64_t y,
                                   const float* grad) {
  const int64_t token = op.prefix_tokens + y * op.width;
  BackwardRow<T, float, T> row{op.width,
                               {image_of<T>(op, image) + token * op.x_token_stride + block.first, op.x_token_stride},
                               {grad, op.channel_block},
                               {},
                               {}};
  if (op.dx != nullptr) row.out = {dx_of<T>(op, image, block.first) + token * op.channels, op.channels};
  if (op.residual && !op.dx_is_unnormed) {
    row.add = {grad_of<T>(op, image, block.first) + token * op.grad_token_stride, op.grad_token_stride};
  }
  row.unnormed = op.dx_is_unnormed;
  row.out_ahead = op.width * op.channels;
  return row;
}

// Outputs from row y on, backwards: from the result's gradient to that of the convolution.
template <class T>
BackwardRow<T, T, float> output_row(const TokenDepthwiseConvPass& op, const Block& block, int64_t image, int64_t y) {
  const int64_t token = op.prefix_tokens + y * op.out_width;
  const T* grad = grad_of<T>(op, image, block.first) + token * op.grad_token_stride;
  BackwardRow<T, T, float> row{op.out_width, {}, {grad, op.grad_token_stride}, {}, {}};
  if (op.conv != nullptr) row.value = {conv_of<T>(op, image, block.first) + token * op.channels, op.channels};
  row.grad_ahead = op.out_width * op.grad_token_stride;
  row.value_ahead = op.conv == nullptr ? 0 : op.out_width * op.channels;
  return row;
}

template <class T>
using PassOutputBack = void (*)(const NormCoefficients&, const Block&, const BackwardRow<T, T, float>&, SplitSums&);
template <class T>
using PassInputBack = void (*)(const NormCoefficients&, const Block&, const BackwardRow<T, float, T>&, SplitSums&);

template <class T>
PassOutputBack<T> choose_output_back(Activation activation, bool normed) {
  PassOutputBack<T> chosen = nullptr;
  with_activation(activation, [&]<Activation known>() {
    chosen = normed ? pass_back<T, known, true, T, T, float> : pass_back<T, known, false, T, T, float>;
  });
  return chosen;
}

template <class T>
PassInputBack<T> choose_input_back(Activation activation, bool normed) {
  PassInputBack<T> chosen = nullptr;
  with_activation(activation, [&]<Activation known>() {
    chosen = normed ? pass_back<T, known, true, T, float, T> : pass_back<T, known, false, T, float, T>;
  });
  return chosen;
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
