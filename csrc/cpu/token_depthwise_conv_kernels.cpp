// The arithmetic of token_depthwise_conv, compiled once per instruction set.
//
// One item (a channel block of a block of output rows) slides a ring of `kernel` input rows over the map. Each input
// element is read once: widened to float32, normalised and activated on its way into the ring. An output row is
// convolved from the ring into a row buffer, then finished (activation, residual, rounding) on its way out. The norm
// behind the convolution is folded into taps and shift. All of it stays in the L1 cache, and memory is touched in runs
// of whole channel blocks. Where the convolution is all there is to do, it goes from x to the output directly.
#include "token_depthwise_conv_block.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t kDirectPrefetchBytes = 6 << 20;  // as kRingPrefetchBytes, without a ring

// The row buffer to its place: activated, the input added, rounded.
template <class T, Activation activation, bool residual>
void give_row(const Block& block, const T* x, T* out, int64_t y) {
  const TokenDepthwiseConvWork& op = block.op;
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
    if (op.bytes > kRingPrefetchBytes) prefetch<1>(to + op.out_width * op.channels, block.channels);
    from += op.channel_block;
    add += op.x_token_stride;
    to += op.channels;
  }
}

template <class T>
using GiveRow = void (*)(const Block&, const T*, T*, int64_t);

template <class T>
GiveRow<T> choose_give_row(const TokenDepthwiseConvWork& op) {
  GiveRow<T> chosen = nullptr;
  with_activation(op.activation, [&]<Activation activation>() {
    chosen = op.residual ? give_row<T, activation, true> : give_row<T, activation, false>;
  });
  return chosen;
}

template <class T>
void copy_prefix(const Block& block, const T* x, T* out) {
  const TokenDepthwiseConvWork& op = block.op;
  for (int64_t token = 0; token < op.prefix_tokens; ++token) {
    memcpy(out + token * op.channels + block.first, x + token * op.x_token_stride + block.first,
           static_cast<size_t>(block.channels) * sizeof(T));
  }
}

// The rows of one item by way of the ring and the row buffer.
template <class T>
class ByRing {
 public:
  explicit ByRing(const TokenDepthwiseConvWork& op)
      : take_(choose_take_row<T>(op)), give_(choose_give_row<T>(op)), convolve_(choose_convolve_ring(op)) {}

  void operator()(Block& block, const T* x, T* out, int64_t first_row, int64_t end_row) const {
    const TokenDepthwiseConvWork& op = block.op;
    int64_t next = 0;  // the first input row that is not in the ring yet
    for (int64_t y = first_row; y < end_row; ++y) {
      const int64_t top = y * op.stride - op.padding;
      const int64_t bottom = top + op.kernel < op.height ? top + op.kernel : op.height;
      if (next < top) next = top;
      for (; next < bottom; ++next) take_(block, x, next);
      convolve_(block, top);
      give_(block, x, out, y);
    }
  }

 private:
  TakeRow<T> take_;
  GiveRow<T> give_;
  ConvolveRing convolve_;
};

// The rows of one item from x to out directly, where the convolution is all there is (a norm folded in, a residual).
template <class T>
class Directly {
 public:
  explicit Directly(const TokenDepthwiseConvWork& op)
      : convolve_(op.stride == 2 ? convolve_3x3<2, false, T, T>
                  : op.residual  ? convolve_3x3<1, true, T, T>
                                 : convolve_3x3<1, false, T, T>) {}

  static bool can(const TokenDepthwiseConvWork& op) {
    const bool plain = op.pre_norm.mean.data == nullptr && op.pre_activation == Activation::none &&
                       op.activation == Activation::none && (!op.residual || op.stride == 1);
    const bool is_3x3 = op.kernel == 3 && op.padding == 1 && op.stride <= 2;
    return plain && is_3x3 && op.channels % kLanes == 0 && is_spread_out(op);
  }

  // Whether neighbouring tokens lie in different sets of the L1 cache (64 sets of 64 bytes). Where they do not, as with
  // 1536 channels of float32, three rows do not stay in the cache, and a ring is faster.
  static bool is_spread_out(const TokenDepthwiseConvWork& op) {
    const int64_t lines = op.x_token_stride * static_cast<int64_t>(sizeof(T)) / 64;
    return lines % 32 != 0;
  }

  void operator()(Block& block, const T* x, T* out, int64_t first_row, int64_t end_row) const {
    const TokenDepthwiseConvWork& op = block.op;
    const auto x_token = [&](int64_t y) {
      return x + (op.prefix_tokens + y * op.width) * op.x_token_stride + block.first;
    };
    const auto row = [&](int64_t y) {
      if (y < 0 || y >= op.height) return Row<T>{reinterpret_cast<const T*>(block.zeros), 0};
      return Row<T>{x_token(y), op.x_token_stride};
    };
    for (int64_t y = first_row; y < end_row; ++y) {
      const int64_t top = y * op.stride - op.padding;
      T* to = out + (op.prefix_tokens + y * op.out_width) * op.channels + block.first;
      if (op.bytes > kDirectPrefetchBytes) {
        for (int64_t next = top + 3; next < top + 3 + op.stride && next < op.height; ++next) {
          for (int64_t i = 0; i < op.width; ++i) prefetch<0>(x_token(next) + i * op.x_token_stride, block.channels);
        }
        for (int64_t i = 0; i < op.out_width; ++i) prefetch<1>(to + (op.out_width + i) * op.channels, block.channels);
      }
      convolve_(block, row(top), row(top + 1), row(top + 2), to, op.channels);
    }
  }

 private:
  void (*convolve_)(const Block&, Row<T>, Row<T>, Row<T>, T*, int64_t);
};

template <class T, class Way>
void run(const Way& way, const TokenDepthwiseConvWork& op, int64_t begin, int64_t end, float* scratch) {
  const int64_t out_image = (op.prefix_tokens + op.out_height * op.out_width) * op.channels;
  Block block(op, scratch);
  for (int64_t item = begin; item < end; ++item) {
    // Images outermost: what lies in the same pages is worked on together.
    const int64_t rows = item % op.row_blocks, image = item / op.row_blocks / op.channel_blocks;
    block.enter(item / op.row_blocks % op.channel_blocks);
    const T* x = static_cast<const T*>(op.x) + image * op.x_batch_stride;
    T* out = static_cast<T*>(op.out) + image * out_image;
    if (rows == 0) copy_prefix(block, x, out);
    const int64_t first_row = rows * op.row_block;
    const int64_t end_row = first_row + op.row_block < op.out_height ? first_row + op.row_block : op.out_height;
    way(block, x, out, first_row, end_row);
  }
}

template <class T>
void run(const TokenDepthwiseConvWork& op, int64_t begin, int64_t end, float* scratch) {
  Directly<T>::can(op) ? run<T>(Directly<T>(op), op, begin, end, scratch)
                       : run<T>(ByRing<T>(op), op, begin, end, scratch);
}

}  // namespace

void token_depthwise_conv(const TokenDepthwiseConvWork& op, int64_t begin, int64_t end, float* scratch) {
  op.element == Element::bfloat16 ? run<bf16>(op, begin, end, scratch) : run<float>(op, begin, end, scratch);
}

}  // namespace fastvit::FASTVIT_ISA
