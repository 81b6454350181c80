// The passes of token_depthwise_conv in training, compiled once per instruction set; cpu_gradient.h has the gradients
// of a 3x3 convolution with padding 1.
#pragma once

#include "token_depthwise_conv/cpu_direct.h"
#include "token_depthwise_conv/cpu_training_block.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// The moments of a map's channels about a center near the mean, in one pass over its tokens. The center is the mean of
// the first ones, so its squared distance from the mean is at most the variance divided by their share of the tokens.
class Moments {
 public:
  Moments(float* scratch, int64_t channels, int64_t width)
      : center_(scratch), sums_(scratch + width, 2, width), channels_(channels) {}

  template <class T>
  void add(const T* first, int64_t tokens, int64_t step) {
    if (!has_center_) find_center(first, tokens, step);
    has_center_ = true;
    for (int64_t begin = 0; begin < tokens; begin += kGroup, first += kGroup * step) {
      const int64_t count = tokens - begin < kGroup ? tokens - begin : kGroup;
      for_each_vector(channels_, [&](int64_t c, int64_t n) {
        const Vec center = Vec::load(center_ + c);
        Vec sum = Vec::fill(0.0f), squares = sum;
        for (int64_t token = 0; token < count; ++token) {
          const Vec off = load(first + token * step + c, n) - center;
          sum += off;
          squares = fma(off, off, squares);
        }
        sums_.add(0, c, sum);
        sums_.add(1, c, squares);
      });
      sums_.end_term();
    }
  }

  void store(const TokenDepthwiseConvPass& op, int64_t image, const Block& block) {
    memcpy(place(op.moments, 3, image, 0, block), center_, static_cast<size_t>(channels_) * sizeof(float));
    sums_.store(0, channels_, place(op.moments, 3, image, 1, block));
    sums_.store(1, channels_, place(op.moments, 3, image, 2, block));
  }

 private:
  template <class T>
  void find_center(const T* first, int64_t tokens, int64_t step) {
    const Vec share = Vec::fill(1.0f / static_cast<float>(tokens));
    for_each_vector(channels_, [&](int64_t c, int64_t n) {
      Vec sum = Vec::fill(0.0f);
      for (int64_t token = 0; token < tokens; ++token) sum += load(first + token * step + c, n);
      (sum * share).store(center_ + c);
    });
  }

  float* center_;
  SplitSums sums_;
  int64_t channels_;
  bool has_center_ = false;
};

template <class T>
void token_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  Block block(op, scratch);
  for_each_unpacked(op, block, begin, end, [&](int64_t image) {
    const T* first = image_of<T>(op, image) + op.prefix_tokens * op.x_token_stride + block.first;
    Moments moments(block.end, block.channels, op.channel_block);
    moments.add(first, op.width, op.x_token_stride);
    moments.add(first + op.width * op.x_token_stride, (op.height - 1) * op.width, op.x_token_stride);
    moments.store(op, image, block);
  });
}

// Output rows of the plain convolution, with a ring buffer or directly.
template <class T>
class ConvolveRows {
 public:
  ConvolveRows(const TokenDepthwiseConvPass& op, float* scratch)
      : op_(op),
        block_(op, scratch),
        load_input_row_(choose_load_input_row<T>(op)),
        convolve_(choose_plain_convolve<T>(op)),
        convolve_directly_(choose_convolve_directly<T>(op)) {}

  // Starts an item; returns its first grid output, at the block's first channel.
  T* begin(int64_t item) {
    index_ = item % op_.channel_blocks;
    const bool is_new = block_.enter(index_);
    const int64_t image = item / op_.channel_blocks, tokens = op_.prefix_tokens + op_.out_height * op_.out_width;
    x_ = image_of<T>(op_, image);
    out_ = static_cast<T*>(op_.out) + image * tokens * op_.channels + block_.first;
    // So that all elements of the result are deterministic.
    for (int64_t token = 0; token < op_.prefix_tokens; ++token, out_ += op_.channels) {
      memset(out_, 0, static_cast<size_t>(block_.channels) * sizeof(T));
    }
    next_ = 0;
    if (op_.direct && is_new) pack_taps(block_, vectors(), packed());
    return out_;
  }

  void operator()(int64_t first_row, int64_t end_row, int64_t following) {
    if (op_.direct) {
      convolve_directly_(op_, vectors(), {grid(x_, index_), out_, following_image(following), first_row, end_row});
      return;
    }
    const int64_t row_step = op_.out_width * op_.channels;
    for (int64_t y = first_row; y < end_row; y += kRows) {
      const int64_t rows = end_row - y < kRows ? end_row - y : kRows;
      load_input_rows(block_, load_input_row_, x_, y, rows, next_);
      convolve_(block_, y * op_.stride - op_.padding,
                {rows, out_ + y * row_step, op_.channels, row_step, nullptr, 0, 0, false});
    }
  }

  const Block& block() const { return block_; }
  float* end() const { return block_.end + op_.channel_blocks * op_.direct_floats; }

 private:
  float* packed() const { return block_.end + index_ * op_.direct_floats; }
  TapVectors vectors() const { return {packed(), block_.channels}; }
  const T* grid(const T* image, int64_t index) const {
    return image + op_.prefix_tokens * op_.x_token_stride + index * op_.channel_block;
  }
  const T* following_image(int64_t item) const {
    return item < 0 ? nullptr : grid(image_of<T>(op_, item / op_.channel_blocks), item % op_.channel_blocks);
  }

  const TokenDepthwiseConvPass& op_;
  Block block_;
  LoadInputRow<T> load_input_row_;
  Convolve<T> convolve_;
  ConvolveDirectly<T> convolve_directly_;
  int64_t index_ = 0, next_ = 0;
  const T* x_ = nullptr;
  T* out_ = nullptr;
};

template <class T>
void convolve_with_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  ConvolveRows<T> convolve(op, scratch);
  const int64_t row_step = op.out_width * op.channels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t following = item + 1 < end ? item + 1 : -1;
    const T* out = convolve.begin(item);
    if (op.moments == nullptr) {
      convolve(0, op.out_height, following);
      continue;
    }
    Moments moments(convolve.end(), convolve.block().channels, op.channel_block);
    // The first row alone: at the edge of the map it is not computed together with the next one.
    for (int64_t y = 0, next; y < op.out_height; y = next) {
      next = y == 0 ? 1 : y + 2 < op.out_height ? y + 2 : op.out_height;
      convolve(y, next, following);
      moments.add(out + y * row_step, (next - y) * op.out_width, op.channels);
    }
    moments.store(op, item / op.channel_blocks, convolve.block());
  }
}

template <class T, Activation activation>
void finish(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  Block block(op, scratch);
  float *mean = block.end, *scale = mean + op.channel_block, *bias = scale + op.channel_block;
  const int64_t tokens = op.out_height * op.out_width, channels = op.channels;
  const Vec eps = Vec::fill(op.norm.mean.data == nullptr ? 0.0f : op.norm.eps);
  int64_t known = -1;  // the first channel of the block whose parameters are loaded
  for_each_unpacked(op, block, begin, end, [&](int64_t image) {
    if (known != block.first) {
      known = block.first;
      for_each_vector(block.channels, [&](int64_t c, int64_t n) {
        const int64_t at = block.first + c;
        const Vec zero = Vec::fill(0.0f), center = read(op.norm.mean, at, n, 0.0f);
        const Vec factor = read(op.norm.weight, at, n, 1.0f) / sqrt(read(op.norm.var, at, n, 1.0f) + eps);
        const Vec shift = read(op.norm.bias, at, n, 0.0f);
        // An infinite scale is applied as torch does, to c itself, so that NaN is in the same places.
        const Vec size = min(factor, zero - factor);
        if_hidden(size, zero, center).store(mean + c);
        factor.store(scale + c);
        if_hidden(size, fnma(center, factor, shift), shift).store(bias + c);
      });
    }
    const T *x = image_of<T>(op, image) + block.first, *conv = conv_of<T>(op, image, block.first);
    T* out = static_cast<T*>(op.out) + image * (op.prefix_tokens + tokens) * channels + block.first;
    for (int64_t token = 0; token < op.prefix_tokens; ++token) {
      memcpy(out, x, static_cast<size_t>(block.channels) * sizeof(T));
      out += channels, conv += channels, x += op.x_token_stride;
    }
    for (int64_t token = 0; token < tokens; ++token) {
      for_each_vector(block.channels, [&](int64_t c, int64_t n) {
        const Vec centred = load(conv + c, n) - Vec::load(mean + c);
        Vec value = activate<activation, T>(op.activation, fma(centred, Vec::load(scale + c), Vec::load(bias + c)));
        if (op.residual) value += load(x + c, n);
        store(value, out + c, n, op.streams);
      });
      out += channels, conv += channels, x += op.x_token_stride;
    }
  });
  if (kStreams && op.streams) end_streams();
}

template <class T>
void finish(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  with_activation(op.activation, [&]<Activation known>() { finish<T, known>(op, begin, end, scratch); });
}

template <class T>
void norm_gradient_sums(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  Block block(op, scratch);
  const OutputBackward<T> pass = choose_output_backward<T>(op.activation, op.post.mean != nullptr);
  for_each_unpacked(op, block, begin, end, [&](int64_t image) {
    SplitSums sums(block.end, 2, op.channel_block);
    auto row = output_row<T>(op, block, image, 0);
    row.columns = op.out_height * op.out_width;
    row.next_grad = 16 * op.grad_token_stride;
    row.next_value = 16 * op.channels;
    // Where all tokens seem to have the same gradient, as behind a mean over them, sums about that are exactly zero,
    // and so is the gradient of the norm's input.
    float* about = place(op.sums, 3, image, 2, block);
    const T* first = grad_of<T>(op, 0, block.first) + op.prefix_tokens * op.grad_token_stride;
    const T* second = first + (row.columns > 1 ? op.grad_token_stride : 0);
    for (int64_t c = 0; c < block.channels; ++c) {
      const bool same = op.activation == Activation::none && widen(first[c]) == widen(second[c]);
      about[c] = same ? widen(first[c]) : 0.0f;
    }
    row.about = about;
    pass(op.post, block, row, sums);
    for (int64_t kind = 0; kind < 2; ++kind) sums.store(kind, block.channels, place(op.sums, 3, image, kind, block));
  });
}

// The transposed convolution, as a convolution of stride 1 with flipped taps: of a map of zeros with the gradient's
// tokens `op.stride` apart, the first of them at `offset`.
struct TransposedConv {
  TokenDepthwiseConvWork op;
  int64_t offset;

  explicit TransposedConv(const TokenDepthwiseConvWork& of) : op(of) {
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

// Up to kRows rows of a convolution's result from row y on, stored at `to`.
inline Target<float> rows_at(const Block& block, int64_t y, float* to) {
  const TokenDepthwiseConvWork& op = block.op;
  const int64_t left = op.out_height - y, line = op.out_width * op.channel_block;
  return {left < kRows ? left : kRows, to, op.channel_block, line, nullptr, 0, 0, false};
}

// The outputs along an axis that are inside the transposed convolution's map: [first, end).
struct Range {
  int64_t first, end;
  Range(int64_t outputs, int64_t stride, int64_t offset, int64_t size)
      : first((-offset + stride - 1) / stride), end((size - 1 - offset) / stride + 1) {
    if (end > outputs) end = outputs;
  }
};

// The gradients of one map and channel block at a time, for any convolution.
template <class T>
class ConvGradients {
 public:
  ConvGradients(const TokenDepthwiseConvPass& op, float* scratch)
      : op_(op),
        transposed_(op),
        block_(op, scratch),
        gradient_map_(transposed_.op, block_.end),
        values_(gradient_map_.end),
        sums_memory_(values_ + kMaxRows * op.width * op.channel_block),
        weight_sums_(sums_memory_ + SplitSums::floats(2, op.channel_block)),
        rows_(op.out_height, op.stride, transposed_.offset, transposed_.op.height),
        columns_(op.out_width, op.stride, transposed_.offset, transposed_.op.width),
        load_input_row_(choose_load_input_row<T>(op)),
        convolve_transposed_(choose_plain_convolve<float>(transposed_.op)),
        output_backward_kernel_(choose_output_backward<T>(op.activation, op.post.mean != nullptr)),
        input_backward_kernel_(choose_input_backward<T>(op.pre_activation, op.pre.mean != nullptr)) {}

  void operator()(int64_t begin, int64_t end) {
    for_each_item(op_, block_, begin, end, [&](int64_t image) { run(image); });
  }

 private:
  void run(int64_t image) {
    const T* x = image_of<T>(op_, image);
    for (int64_t y = 0; y < op_.height; ++y) load_input_row_(block_, x, y);
    SplitSums sums(sums_memory_, 2, op_.channel_block);
    for (int64_t y = 0; y < op_.out_height; ++y) output_backward(image, y, sums);
    store_sums(sums, op_.sums, image, block_);
    if (op_.weight_sums != nullptr) weight_gradient(image);
    if (op_.dx != nullptr || op_.pre_sums != nullptr) input_gradient(image);
  }

  // Where the gradient of an output is in the map.
  float* gradient_row(int64_t y) const { return gradient_map_.ring_row(y * op_.stride + transposed_.offset); }
  int64_t gradient_column(int64_t x) const { return (x * op_.stride + transposed_.offset) * op_.channel_block; }

  // From the gradient of the result to the convolution's, of which only `rows_` and `columns_` are stored in the map.
  void output_backward(int64_t image, int64_t y, SplitSums& sums) {
    const auto row = output_row<T>(op_, block_, image, y);
    const bool counts = y >= rows_.first && y < rows_.end && columns_.first < columns_.end;
    const int64_t first = counts ? columns_.first : op_.out_width, end = counts ? columns_.end : op_.out_width;
    const auto part = [&](int64_t from, int64_t to, Tokens<float> out) {
      auto some = row;
      some.columns = to - from;
      some.value = row.value.from(from);
      some.grad = row.grad.from(from);
      some.out = out;
      output_backward_kernel_(op_.post, block_, some, sums);
    };
    part(0, first, {});
    if (counts) part(first, end, {gradient_row(y) + gradient_column(first), op_.stride * op_.channel_block});
    part(end, op_.out_width, {});
  }

  void input_gradient(int64_t image) {
    gradient_map_.flip(block_);
    const bool finite = has_finite_taps();
    SplitSums sums(sums_memory_, 2, op_.channel_block);
    for (int64_t y = 0; y < op_.height; y += kRows) {
      const Target<float> to = rows_at(gradient_map_, y, values_);
      if (finite) {
        convolve_transposed_(gradient_map_, y - transposed_.op.padding, to);
      } else {
        for (int64_t row = 0; row < to.rows; ++row) gather_gradients(y + row, to.to + row * to.row_step);
      }
      for (int64_t row = 0; row < to.rows; ++row) {
        const float* grad = values_ + row * op_.width * op_.channel_block;
        input_backward_kernel_(op_.pre, block_, input_row<T>(op_, block_, image, y + row, grad), sums);
      }
    }
    store_sums(sums, op_.pre_sums, image, block_);
    copy_prefix_gradient<T>(op_, block_, image);
  }

  bool has_finite_taps() const {
    bool finite = true;
    for (int64_t i = 0; i < op_.kernel * op_.kernel * op_.channel_block; i += kLanes) {
      finite &= all_finite(Vec::load(block_.taps + i));
    }
    return finite;
  }

  // Row y of the gradient of the convolution's input, from gradients of outputs alone: infinite taps and those that are
  // NaN must not meet the zeros between and around them.
  void gather_gradients(int64_t y, float* to) const {
    const int64_t width = op_.channel_block, stride = op_.stride;
    const auto is_output = [&](int64_t at, const Range& range) {
      return at >= 0 && at % stride == 0 && at / stride >= range.first && at / stride < range.end;
    };
    memset(to, 0, static_cast<size_t>(op_.width * width) * sizeof(float));
    for (int64_t x = 0; x < op_.width; ++x, to += width) {
      for (int64_t tap = 0; tap < op_.kernel * op_.kernel; ++tap) {
        const int64_t row = y + op_.padding - tap / op_.kernel, column = x + op_.padding - tap % op_.kernel;
        if (!is_output(row, rows_) || !is_output(column, columns_)) continue;
        const float* grad = gradient_row(row / stride) + gradient_column(column / stride);
        for (int64_t c = 0; c < width; c += kLanes) {
          fma(Vec::load(grad + c), Vec::load(block_.taps + tap * width + c), Vec::load(to + c)).store(to + c);
        }
      }
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

  // The gradients of the taps from outputs [first, last) of row y, for a vector of channels.
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
    const float* grad = gradient_row(y) + gradient_column(first) + c;
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
  TransposedConv transposed_;
  Block block_, gradient_map_;
  float *values_, *sums_memory_, *weight_sums_;
  Range rows_, columns_;
  LoadInputRow<T> load_input_row_;
  Convolve<float> convolve_transposed_;
  OutputBackward<T> output_backward_kernel_;
  InputBackward<T> input_backward_kernel_;
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
        Vec value = fma(centred, slope, load(dx + c, n) + load(op.pre.offset + first + c, n)) * scale;
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
  with_element(op.element, [&]<class T>() { token_moments<T>(op, begin, end, scratch); });
}

void convolve_with_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  with_element(op.element, [&]<class T>() { convolve_with_moments<T>(op, begin, end, scratch); });
}

void finish(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  with_element(op.element, [&]<class T>() { finish<T>(op, begin, end, scratch); });
}

void norm_gradient_sums(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  with_element(op.element, [&]<class T>() { norm_gradient_sums<T>(op, begin, end, scratch); });
}

void conv_gradients(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  with_element(op.element, [&]<class T>() { ConvGradients<T>(op, scratch)(begin, end); });
}

void pre_norm_gradient(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float*) {
  with_element(op.element, [&]<class T>() { pre_norm_gradient<T>(op, begin, end); });
}

}  // namespace fastvit::FASTVIT_ISA
