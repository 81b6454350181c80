// The passes of token_depthwise_conv's training, compiled once per instruction set; for the gradients of a 3x3
// convolution with padding 1 see token_depthwise_conv_gradient_kernels.cpp.
#include "token_depthwise_conv_training_block.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// Sums of `count` values of each of `tokens` tokens, kSumTerms at a time; values(token, terms) gives them.
template <int64_t count, class F>
FASTVIT_INLINE void add_up(int64_t tokens, Vec (&total)[count], const F& values) {
  for (Vec& sum : total) sum = Vec::fill(0.0f);
  for (int64_t begin = 0; begin < tokens; begin += kSumTerms) {
    const int64_t end = begin + kSumTerms < tokens ? begin + kSumTerms : tokens;
    Vec partial[count];
    for (Vec& sum : partial) sum = Vec::fill(0.0f);
    for (int64_t token = begin; token < end; ++token) values(token, partial);
    for (int64_t i = 0; i < count; ++i) total[i] += partial[i];
  }
}

// The moments of `tokens` tokens that lie `step` apart. A vector of channels goes over them twice, the second time in
// the cache.
template <class T>
void find_moments(const TokenDepthwiseConvPass& op, const Block& block, int64_t image, const T* first, int64_t tokens,
                  int64_t step) {
  constexpr int64_t ahead = 16;  // tokens, of fetching
  const Vec share = Vec::fill(1.0f / static_cast<float>(tokens));
  for (int64_t c = 0; c < block.channels; c += kLanes) {
    const int64_t n = block.channels - c < kLanes ? block.channels - c : kLanes;
    const T* p = first + c;
    Vec sum[1], moments[2];
    add_up(tokens, sum, [&](int64_t token, Vec(&sums)[1]) {
      __builtin_prefetch(p + (token + ahead) * step);
      sums[0] += load(p + token * step, n);
    });
    const Vec center = sum[0] * share;
    add_up(tokens, moments, [&](int64_t token, Vec(&sums)[2]) {
      const Vec centred = load(p + token * step, n) - center;
      sums[0] += centred;
      sums[1] = fma(centred, centred, sums[1]);
    });
    store(center, place(op.moments, 3, image, 0, block) + c, n);
    store(moments[0], place(op.moments, 3, image, 1, block) + c, n);
    store(moments[1], place(op.moments, 3, image, 2, block) + c, n);
  }
}

template <class T>
void token_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  Block block(op, scratch);
  for_each_item(op, block, begin, end, [&](int64_t image) {
    const T* first = image_of<T>(op, image) + op.prefix_tokens * op.x_token_stride + block.first;
    find_moments(op, block, image, first, op.height * op.width, op.x_token_stride);
  });
}

template <class T>
void conv_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  Block block(op, scratch);
  const TakeRow<T> take = choose_take_row<T>(op);
  const Convolve<float> convolve = choose_convolve<float>(op, Activation::none);
  float* map = block.end;
  const int64_t tokens = op.out_height * op.out_width;
  for_each_item(op, block, begin, end, [&](int64_t image) {
    int64_t next = 0;
    for (int64_t y = 0; y < op.out_height; y += kRows) {
      const Target<float> to = rows_at(block, y, map + y * op.out_width * op.channel_block);
      take_rows(block, take, image_of<T>(op, image), y, to.rows, next);
      convolve(block, y * op.stride - op.padding, to);
    }
    find_moments<float>(op, block, image, map, tokens, op.channel_block);
  });
}

template <class T>
void norm_gradient_sums(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  Block block(op, scratch);
  const TakeRow<T> take = choose_take_row<T>(op);
  const Convolve<float> convolve = choose_convolve<float>(op, Activation::none);
  const PassOutputBack<T> pass = choose_output_back<T>(op.activation);
  float* values = block.end;
  const int64_t line = op.out_width * op.channel_block;
  for_each_item(op, block, begin, end, [&](int64_t image) {
    SplitSums sums(values + kMaxRows * line, 2, op.channel_block);
    int64_t next = 0;
    for (int64_t y = 0; y < op.out_height; y += kRows) {
      const Target<float> to = rows_at(block, y, values);
      take_rows(block, take, image_of<T>(op, image), y, to.rows, next);
      convolve(block, y * op.stride - op.padding, to);
      for (int64_t row = 0; row < to.rows; ++row) {
        pass(op.post, block, output_row<T>(op, block, image, y + row, values + row * line), sums);
      }
    }
    give_sums(sums, op.sums, image, block);
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

// The gradients of a map and channel block, for any convolution.
template <class T>
class ConvGradients {
 public:
  ConvGradients(const TokenDepthwiseConvPass& op, float* scratch)
      : op_(op),
        turned_(op),
        block_(op, scratch),
        behind_(turned_.op, block_.end),
        values_(behind_.end),
        sums_memory_(values_ + kMaxRows * (op.width > op.out_width ? op.width : op.out_width) * op.channel_block),
        weight_sums_(sums_memory_ + SplitSums::floats(2, op.channel_block)),
        rows_(op.out_height, op.stride, turned_.offset, turned_.op.height),
        columns_(op.out_width, op.stride, turned_.offset, turned_.op.width),
        take_(choose_take_row<T>(op)),
        convolve_(choose_convolve<float>(op, Activation::none)),
        convolve_turned_(choose_convolve<float>(turned_.op, Activation::none)),
        pass_output_back_(choose_output_back<T>(op.activation)),
        pass_input_back_(choose_input_back<T>(op.pre_activation)) {}

  void operator()(int64_t begin, int64_t end) {
    for_each_item(op_, block_, begin, end, [&](int64_t image) { run(image); });
  }

 private:
  void run(int64_t image) {
    const T* x = image_of<T>(op_, image);
    for (int64_t y = 0; y < op_.height; ++y) take_(block_, x, y);
    SplitSums sums(sums_memory_, 2, op_.channel_block);
    const int64_t line = op_.out_width * op_.channel_block;
    for (int64_t y = 0; y < op_.out_height; y += kRows) {
      const Target<float> to = rows_at(block_, y, values_);
      convolve_(block_, y * op_.stride - op_.padding, to);
      for (int64_t row = 0; row < to.rows; ++row) output_back(image, y + row, values_ + row * line, sums);
    }
    give_sums(sums, op_.sums, image, block_);
    if (op_.weight_sums != nullptr) weight_gradient(image);
    if (op_.dx != nullptr || op_.pre_sums != nullptr) input_gradient(image);
  }

  // Where the gradient at an output lies in the turned map.
  float* behind(int64_t y) const { return behind_.ring_row(y * op_.stride + turned_.offset); }
  int64_t behind_column(int64_t x) const { return (x * op_.stride + turned_.offset) * op_.channel_block; }

  // From the result's gradient to the convolution's, of which that within `columns_` has a place in the map.
  void output_back(int64_t image, int64_t y, const float* value, SplitSums& sums) {
    const auto row = output_row<T>(op_, block_, image, y, value);
    const bool counts = y >= rows_.first && y < rows_.end && columns_.first < columns_.end;
    const int64_t first = counts ? columns_.first : op_.out_width, end = counts ? columns_.end : op_.out_width;
    const auto part = [&](int64_t from, int64_t to, Tokens<float> out) {
      auto some = row;
      some.columns = to - from;
      some.value = row.value.from(from);
      some.grad = row.grad.from(from);
      some.out = out;
      pass_output_back_(op_.post, block_, some, sums);
    };
    part(0, first, {});
    if (counts) part(first, end, {behind(y) + behind_column(first), op_.stride * op_.channel_block});
    part(end, op_.out_width, {});
  }

  void input_gradient(int64_t image) {
    behind_.turn(block_);
    SplitSums sums(sums_memory_, 2, op_.channel_block);
    for (int64_t y = 0; y < op_.height; y += kRows) {
      const Target<float> to = rows_at(behind_, y, values_);
      convolve_turned_(behind_, y - turned_.op.padding, to);
      for (int64_t row = 0; row < to.rows; ++row) {
        const float* grad = values_ + row * op_.width * op_.channel_block;
        pass_input_back_(op_.pre, block_, input_row<T>(op_, block_, image, y + row, grad), sums);
      }
    }
    give_sums(sums, op_.pre_sums, image, block_);
    copy_prefix_gradient<T>(op_, block_, image);
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
  float *values_, *sums_memory_, *weight_sums_;
  Range rows_, columns_;
  TakeRow<T> take_;
  Convolve<float> convolve_, convolve_turned_;
  PassOutputBack<T> pass_output_back_;
  PassInputBack<T> pass_input_back_;
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
        const Vec slope = load(op.pre.slope + first + c, n), scale = load(op.pre.scale + first + c, n);
        Vec value = fma(load(dx + c, n), scale, fma(centred, slope, load(op.pre.offset + first + c, n)));
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
