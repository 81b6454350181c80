// The passes of token_depthwise_conv's training, compiled once per instruction set.
#include "token_depthwise_conv_block.h"
#include "token_depthwise_conv_training.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t kSumTerms = 64;  // of a float32 sum, before it is added to the others

// Sums over tokens of several kinds of values, channel by channel.
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
  FASTVIT_INLINE void end_token() {
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

// Where the sums of a kind of an image belong, from the block's first channel on.
float* place(float* sums, int64_t kinds, int64_t image, int64_t kind, const Block& block) {
  return sums + (image * kinds + kind) * block.op.channels + block.first;
}

// f(image, block) for every item, the block entered.
template <class F>
void for_each_item(const TokenDepthwiseConvPass& op, Block& block, int64_t begin, int64_t end, const F& f) {
  for (int64_t item = begin; item < end; ++item) {
    block.enter(item % op.channel_blocks);
    f(item / op.channel_blocks);
  }
}

// The moments of `tokens` tokens that lie `step` apart.
template <class T>
void find_moments(const TokenDepthwiseConvPass& op, const Block& block, int64_t image, const T* first, int64_t tokens,
                  int64_t step, float* scratch) {
  const int64_t width = op.channel_block;
  float* center = scratch + SplitSums::floats(2, width);
  SplitSums sums(scratch, 1, width);
  for (int64_t token = 0; token < tokens; ++token) {
    const T* p = first + token * step;
    for_each_vector(block.channels, [&](int64_t c, int64_t n) { sums.add(0, c, load(p + c, n)); });
    sums.end_token();
  }
  const float* sum = sums.get(0);
  const Vec share = Vec::fill(1.0f / static_cast<float>(tokens));
  for (int64_t c = 0; c < width; c += kLanes) (Vec::load(sum + c) * share).store(center + c);
  SplitSums around(scratch, 2, width);
  for (int64_t token = 0; token < tokens; ++token) {
    const T* p = first + token * step;
    for_each_vector(block.channels, [&](int64_t c, int64_t n) {
      const Vec centred = load(p + c, n) - Vec::load(center + c);
      around.add(0, c, centred);
      around.add(1, c, centred * centred);
    });
    around.end_token();
  }
  memcpy(place(op.moments, 3, image, 0, block), center, static_cast<size_t>(block.channels) * sizeof(float));
  for (int64_t kind = 0; kind < 2; ++kind) {
    around.give(kind, block.channels, place(op.moments, 3, image, kind + 1, block));
  }
}

// Takes the input rows that output row y needs and that are not in the ring yet; `next` is the first of those.
template <class T>
void take_rows(Block& block, TakeRow<T> take, const T* x, int64_t y, int64_t& next) {
  const TokenDepthwiseConvWork& op = block.op;
  const int64_t top = y * op.stride - op.padding;
  const int64_t bottom = top + op.kernel < op.height ? top + op.kernel : op.height;
  if (next < top) next = top;
  for (; next < bottom; ++next) take(block, x, next);
}

template <class T>
void token_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  Block block(op, scratch);
  for_each_item(op, block, begin, end, [&](int64_t image) {
    const T* first = image_of<T>(op, image) + op.prefix_tokens * op.x_token_stride + block.first;
    find_moments(op, block, image, first, op.height * op.width, op.x_token_stride, block.end);
  });
}

template <class T>
void conv_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  Block block(op, scratch);
  const TakeRow<T> take = choose_take_row<T>(op);
  const ConvolveRing convolve = choose_convolve_ring(op);
  float* map = block.end;
  const int64_t tokens = op.out_height * op.out_width;
  for_each_item(op, block, begin, end, [&](int64_t image) {
    int64_t next = 0;
    for (int64_t y = 0; y < op.out_height; ++y) {
      take_rows(block, take, image_of<T>(op, image), y, next);
      block.row = map + y * op.out_width * op.channel_block;
      convolve(block, y * op.stride - op.padding);
    }
    find_moments<float>(op, block, image, map, tokens, op.channel_block, map + tokens * op.channel_block);
  });
}

// Of the convolution's result and the gradient behind activation and norm.
struct Normed {
  Vec centred, dn;
};

template <class T, Activation activation>
FASTVIT_INLINE Normed through_norm(const NormCoefficients& norm, Vec value, Vec grad, int64_t channel, int64_t n) {
  if (norm.mean == nullptr) return {value, grad * derivative<activation>(value)};
  const Vec centred = value - load(norm.mean + channel, n);
  const Vec normed = fma(centred, load(norm.scale + channel, n), load(norm.bias + channel, n));
  return {centred, grad * derivative<activation>(normed)};
}

// The gradient in front of the norm.
FASTVIT_INLINE Vec before_norm(const NormCoefficients& norm, Normed at, int64_t channel, int64_t n) {
  if (norm.mean == nullptr) return at.dn;
  const Vec slope = load(norm.slope + channel, n), scale = load(norm.scale + channel, n);
  return fma(at.dn, scale, fma(at.centred, slope, load(norm.offset + channel, n)));
}

// Row y of the convolution's result, which is in the row buffer, into the sums.
template <class T, Activation activation>
void add_row(const TokenDepthwiseConvPass& op, const Block& block, int64_t image, int64_t y, SplitSums& sums) {
  const T* grad = grad_of<T>(op, image, block.first) + (op.prefix_tokens + y * op.out_width) * op.grad_token_stride;
  for (int64_t column = 0; column < op.out_width; ++column, grad += op.grad_token_stride) {
    const float* conv = block.row + column * op.channel_block;
    for_each_vector(block.channels, [&](int64_t c, int64_t n) {
      const Normed at =
          through_norm<T, activation>(op.post, Vec::load(conv + c), load(grad + c, n), block.first + c, n);
      sums.add(0, c, at.dn);
      sums.add(1, c, at.dn * at.centred);
    });
    sums.end_token();
  }
}

template <class T>
void norm_gradient_sums(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  Block block(op, scratch);
  const TakeRow<T> take = choose_take_row<T>(op);
  const ConvolveRing convolve = choose_convolve_ring(op);
  decltype(&add_row<T, Activation::none>) add = nullptr;
  with_activation(op.activation, [&]<Activation activation>() { add = add_row<T, activation>; });
  for_each_item(op, block, begin, end, [&](int64_t image) {
    SplitSums sums(block.end, 2, op.channel_block);
    int64_t next = 0;
    for (int64_t y = 0; y < op.out_height; ++y) {
      take_rows(block, take, image_of<T>(op, image), y, next);
      convolve(block, y * op.stride - op.padding);
      add(op, block, image, y, sums);
    }
    for (int64_t kind = 0; kind < 2; ++kind) sums.give(kind, block.channels, place(op.sums, 2, image, kind, block));
  });
}

// The transposed convolution as one of stride 1 with the taps turned round: the gradient's tokens lie `op.stride` apart
// in a map of zeros, the first of them `offset` beyond its edge.
struct Turned {
  TokenDepthwiseConvWork op;
  int64_t offset;

  explicit Turned(const TokenDepthwiseConvWork& of) : op(of) {
    const int64_t padding = of.kernel - 1 - of.padding;
    op.padding = padding > 0 ? padding : 0;
    offset = padding < 0 ? padding : 0;
    op.stride = 1;
    op.height = of.height + of.kernel - 1 - 2 * op.padding;
    op.width = of.width + of.kernel - 1 - 2 * op.padding;
    op.out_height = of.height;
    op.out_width = of.width;
    op.padded_width = op.width + 2 * op.padding;
    op.ring_rows = op.height;
    op.channel_blocks = 1;
  }
};

// The outputs along an axis that lie in the turned map: from `first` to before `end`.
struct Range {
  int64_t first, end;
  Range(int64_t outputs, int64_t stride, int64_t offset, int64_t size)
      : first((-offset + stride - 1) / stride), end((size - 1 - offset) / stride + 1) {
    if (end > outputs) end = outputs;
  }
};

// Everything about one map and channel block while gradients pass through the convolution.
template <class T>
class ConvGradients {
 public:
  ConvGradients(const TokenDepthwiseConvPass& op, float* scratch)
      : op_(op),
        turned_(op),
        block_(op, scratch),
        behind_(turned_.op, block_.end),
        sums_memory_(behind_.end),
        weight_sums_(sums_memory_ + SplitSums::floats(2, op.channel_block)),
        rows_(op.out_height, op.stride, turned_.offset, turned_.op.height),
        columns_(op.out_width, op.stride, turned_.offset, turned_.op.width),
        take_(choose_take_row<T>(op)),
        convolve_(choose_convolve_ring(op)),
        convolve_turned_(choose_convolve_ring(turned_.op)) {
    with_activation(op.activation,
                    [&]<Activation activation>() { through_output_ = &ConvGradients::output_row<activation>; });
    with_activation(op.pre_activation,
                    [&]<Activation activation>() { through_input_ = &ConvGradients::input_row<activation>; });
  }

  void operator()(int64_t begin, int64_t end) {
    for_each_item(op_, block_, begin, end, [&](int64_t image) { run(image); });
  }

 private:
  void run(int64_t image) {
    const T* x = image_of<T>(op_, image);
    for (int64_t y = 0; y < op_.height; ++y) take_(block_, x, y);
    SplitSums sums(sums_memory_, 2, op_.channel_block);
    for (int64_t y = 0; y < op_.out_height; ++y) {
      convolve_(block_, y * op_.stride - op_.padding);
      (this->*through_output_)(image, y, sums);
    }
    give(sums, op_.sums, image);
    if (op_.weight_sums != nullptr) weight_gradient(image);
    if (op_.dx != nullptr || op_.pre_sums != nullptr) input_gradient(image);
  }

  void give(SplitSums& sums, float* to, int64_t image) {
    if (to == nullptr) return;
    for (int64_t kind = 0; kind < 2; ++kind) sums.give(kind, block_.channels, place(to, 2, image, kind, block_));
  }

  // Where the gradient at an output lies in the turned map.
  float* behind(int64_t y) const { return behind_.ring_row(y * op_.stride + turned_.offset); }
  int64_t behind_column(int64_t x) const { return (x * op_.stride + turned_.offset) * op_.channel_block; }

  // From the result's gradient to the convolution's, row by row.
  template <Activation activation>
  void output_row(int64_t image, int64_t y, SplitSums& sums) {
    const int64_t token = op_.prefix_tokens + y * op_.out_width;
    const T* grad = grad_of<T>(op_, image, block_.first) + token * op_.grad_token_stride;
    const bool row_counts = y >= rows_.first && y < rows_.end;
    for (int64_t x = 0; x < op_.out_width; ++x, grad += op_.grad_token_stride) {
      const float* conv = block_.row + x * op_.channel_block;
      float* to = row_counts && x >= columns_.first && x < columns_.end ? behind(y) + behind_column(x) : nullptr;
      for_each_vector(block_.channels, [&](int64_t c, int64_t n) {
        const Normed at =
            through_norm<T, activation>(op_.post, Vec::load(conv + c), load(grad + c, n), block_.first + c, n);
        if (op_.sums != nullptr) {
          sums.add(0, c, at.dn);
          sums.add(1, c, at.dn * at.centred);
        }
        if (to != nullptr) before_norm(op_.post, at, block_.first + c, n).store(to + c);
      });
      sums.end_token();
    }
  }

  // From the convolution's input to x.
  template <Activation activation>
  void input_row(int64_t image, int64_t y, SplitSums& sums) {
    const int64_t token = op_.prefix_tokens + y * op_.width;
    const T* x = image_of<T>(op_, image) + token * op_.x_token_stride + block_.first;
    const T* grad = grad_of<T>(op_, image, block_.first) + token * op_.grad_token_stride;
    T* dx = op_.dx == nullptr ? nullptr : dx_token(image, token);
    const bool residual = op_.residual && !op_.dx_is_unnormed;
    for (int64_t column = 0; column < op_.width; ++column) {
      const float* from = behind_.row + column * op_.channel_block;
      for_each_vector(block_.channels, [&](int64_t c, int64_t n) {
        const int64_t channel = block_.first + c;
        const Normed at = through_norm<T, activation>(op_.pre, load(x + c, n), Vec::load(from + c), channel, n);
        if (op_.pre_sums != nullptr) {
          sums.add(0, c, at.dn);
          sums.add(1, c, at.dn * at.centred);
        }
        if (dx == nullptr) return;
        Vec value = op_.dx_is_unnormed ? at.dn : before_norm(op_.pre, at, channel, n);
        if (residual) value += load(grad + c, n);
        store(value, dx + c, n);
      });
      sums.end_token();
      x += op_.x_token_stride;
      if (residual) grad += op_.grad_token_stride;
      if (dx != nullptr) dx += op_.channels;
    }
  }

  T* dx_token(int64_t image, int64_t token) const {
    const int64_t tokens = op_.prefix_tokens + op_.height * op_.width;
    return static_cast<T*>(op_.dx) + (image * tokens + token) * op_.channels + block_.first;
  }

  void input_gradient(int64_t image) {
    behind_.turn(block_);
    SplitSums sums(sums_memory_, 2, op_.channel_block);
    for (int64_t y = 0; y < op_.height; ++y) {
      convolve_turned_(behind_, y - turned_.op.padding);
      (this->*through_input_)(image, y, sums);
    }
    give(sums, op_.pre_sums, image);
    for (int64_t token = 0; op_.dx != nullptr && token < op_.prefix_tokens; ++token) {
      const T* grad = grad_of<T>(op_, image, block_.first) + token * op_.grad_token_stride;
      memcpy(dx_token(image, token), grad, static_cast<size_t>(block_.channels) * sizeof(T));
    }
  }

  void weight_gradient(int64_t image) {
    const int64_t width = op_.channel_block, area = op_.kernel * op_.kernel;
    memset(weight_sums_, 0, static_cast<size_t>(area * width) * sizeof(float));
    for (int64_t y = rows_.first; y < rows_.end; ++y) {
      for (int64_t first = columns_.first; first < columns_.end; first += kSumTerms) {
        const int64_t last = first + kSumTerms < columns_.end ? first + kSumTerms : columns_.end;
        for (int64_t c = 0; c < block_.channels; c += kLanes) correlate(y, first, last, c);
      }
    }
    for (int64_t tap = 0; tap < area; ++tap) {
      memcpy(place(op_.weight_sums, area, image, tap, block_), weight_sums_ + tap * width,
             static_cast<size_t>(block_.channels) * sizeof(float));
    }
  }

  // The taps' gradients from outputs first to before last of row y, for a vector of channels.
  void correlate(int64_t y, int64_t first, int64_t last, int64_t c) {
    if (op_.kernel == 3) return correlate<3, 3>(y, first, last, c, 0, 0);
    for (int64_t dy = 0; dy < op_.kernel; ++dy) {
      int64_t dx = 0;
      for (; dx + 5 <= op_.kernel; dx += 5) correlate<1, 5>(y, first, last, c, dy, dx);
      for (; dx < op_.kernel; ++dx) correlate<1, 1>(y, first, last, c, dy, dx);
    }
  }

  // The same for `height` x `width` taps, from (dy, dx) on.
  template <int64_t height, int64_t width>
  FASTVIT_INLINE void correlate(int64_t y, int64_t first, int64_t last, int64_t c, int64_t dy, int64_t dx) {
    const int64_t block = op_.channel_block, step = op_.stride * block;
    const float* grad = behind(y) + behind_column(first) + c;
    const float* rows[height];
    for (int64_t i = 0; i < height; ++i) {
      rows[i] =
          block_.input_row(y * op_.stride - op_.padding + dy + i) + (first * op_.stride - op_.padding + dx) * block + c;
    }
    Vec sums[height][width];
    for (auto& row : sums) {
      for (Vec& sum : row) sum = Vec::fill(0.0f);
    }
    for (int64_t x = first; x < last; ++x, grad += step) {
      const Vec g = Vec::load(grad);
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) sums[i][j] = fma(g, Vec::load(rows[i] + j * block), sums[i][j]);
        rows[i] += step;
      }
    }
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        float* to = weight_sums_ + ((dy + i) * op_.kernel + dx + j) * block + c;
        (Vec::load(to) + sums[i][j]).store(to);
      }
    }
  }

  const TokenDepthwiseConvPass& op_;
  Turned turned_;
  Block block_, behind_;
  float *sums_memory_, *weight_sums_;
  Range rows_, columns_;
  TakeRow<T> take_;
  ConvolveRing convolve_, convolve_turned_;
  void (ConvGradients::*through_output_)(int64_t, int64_t, SplitSums&);
  void (ConvGradients::*through_input_)(int64_t, int64_t, SplitSums&);
};

template <class T>
void pre_norm_gradient(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end) {
  const int64_t tokens = op.height * op.width, all = op.prefix_tokens + tokens;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / op.channel_blocks, first = item % op.channel_blocks * op.channel_block;
    const int64_t channels = op.channels - first < op.channel_block ? op.channels - first : op.channel_block;
    const T* x = image_of<T>(op, image) + op.prefix_tokens * op.x_token_stride + first;
    const T* grad = grad_of<T>(op, image, first) + op.prefix_tokens * op.grad_token_stride;
    T* dx = static_cast<T*>(op.dx) + (image * all + op.prefix_tokens) * op.channels + first;
    for (int64_t token = 0; token < tokens; ++token) {
      for_each_vector(channels, [&](int64_t c, int64_t n) {
        const Vec centred = load(x + c, n) - load(op.pre.mean + first + c, n);
        Vec value = before_norm(op.pre, {centred, load(dx + c, n)}, first + c, n);
        if (op.residual) value += load(grad + c, n);
        store(value, dx + c, n);
      });
      x += op.x_token_stride;
      if (op.residual) grad += op.grad_token_stride;
      dx += op.channels;
    }
  }
}

}  // namespace

void token_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  op.element == Element::bfloat16 ? token_moments<bf16>(op, begin, end, scratch)
                                  : token_moments<float>(op, begin, end, scratch);
}

void conv_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  op.element == Element::bfloat16 ? conv_moments<bf16>(op, begin, end, scratch)
                                  : conv_moments<float>(op, begin, end, scratch);
}

void norm_gradient_sums(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  op.element == Element::bfloat16 ? norm_gradient_sums<bf16>(op, begin, end, scratch)
                                  : norm_gradient_sums<float>(op, begin, end, scratch);
}

void conv_gradients(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  op.element == Element::bfloat16 ? ConvGradients<bf16>(op, scratch)(begin, end)
                                  : ConvGradients<float>(op, scratch)(begin, end);
}

void pre_norm_gradient(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float*) {
  op.element == Element::bfloat16 ? pre_norm_gradient<bf16>(op, begin, end) : pre_norm_gradient<float>(op, begin, end);
}

}  // namespace fastvit::FASTVIT_ISA
