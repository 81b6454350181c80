// The gradients of a 3x3 convolution with padding 1 and stride 1 or 2, compiled once per instruction set.
//
// With c = conv(t) and dc the gradient of c, an input needs the same few dc twice:
//     dt[i] = sum over taps d of w[d] dc[(i + 1 - d) / stride],  where that is whole
//     dweight[d] = sum over i of t[i] dc[(i + 1 - d) / stride]
// So one walk along a row of inputs finds both, the taps, the sums and a window of dc in registers. Rings of a few rows
// of t and dc slide over the map together, and stay in the L1 cache.
#include "token_depthwise_conv_training_block.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// A walk along a row of inputs. Rows of dc that count for it, and the taps' row that belongs to each.
struct Walk {
  const Block& block;
  const float* dc[3];
  int64_t tap_rows[3];
  const float* t;
  float* weight_sums;
};

// Adds a walk's sums of a row of taps to those in memory.
FASTVIT_INLINE void add_sums(const Walk& walk, int64_t row, int64_t c, const Vec (&sums)[3]) {
  const int64_t width = walk.block.op.channel_block;
  for (int64_t dx = 0; dx < 3; ++dx) {
    float* to = walk.weight_sums + (walk.tap_rows[row] * 3 + dx) * width + c;
    (Vec::load(to) + sums[dx]).store(to);
  }
}

template <int64_t rows>
FASTVIT_INLINE void load_taps(const Walk& walk, int64_t c, Vec (&taps)[rows][3]) {
  const int64_t width = walk.block.op.channel_block;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t dx = 0; dx < 3; ++dx) {
      taps[row][dx] = Vec::load(walk.block.taps + (walk.tap_rows[row] * 3 + dx) * width + c);
    }
  }
}

// Stride 1: dc of three rows and columns for every input. What is wanted: dt, and the taps' gradients.
template <bool inputs, bool weights, class Out>
void walk_1(const Walk& walk, const Target<Out>& target) {
  const int64_t channels = walk.block.channels, width = walk.block.op.channel_block, columns = walk.block.op.width;
  const Vec zero = Vec::fill(0.0f);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c < kLanes ? channels - c : kLanes;
    Vec taps[3][3];
    if constexpr (inputs) load_taps(walk, c, taps);
    Target<Out> to = target;
    for (int64_t begin = 0; begin < columns; begin += kSumTerms) {
      const int64_t end = begin + kSumTerms < columns ? begin + kSumTerms : columns;
      Vec sums[3][3], window[3][3];  // the latter by dx: the column to the right, this one, the one to the left
      const float *dc[3], *t = walk.t + begin * width + c;
      for (int64_t row = 0; row < 3; ++row) {
        for (Vec& sum : sums[row]) sum = zero;
        dc[row] = walk.dc[row] + (begin + 1) * width + c;
        window[row][1] = Vec::load(dc[row] - 2 * width);
        window[row][0] = Vec::load(dc[row] - width);
      }
      for (int64_t x = begin; x < end; ++x) {
        Vec parts[3];
        Vec input = zero;
        if constexpr (weights) input = Vec::load(t);
        for (int64_t row = 0; row < 3; ++row) {
          window[row][2] = window[row][1];
          window[row][1] = window[row][0];
          window[row][0] = Vec::load(dc[row]);
          dc[row] += width;
          if constexpr (inputs) {
            parts[row] =
                fma(window[row][0], taps[row][0], fma(window[row][1], taps[row][1], window[row][2] * taps[row][2]));
          }
          if constexpr (weights) {
            for (int64_t dx = 0; dx < 3; ++dx) sums[row][dx] = fma(input, window[row][dx], sums[row][dx]);
          }
        }
        t += width;
        if constexpr (inputs) {
          to.template give<Activation::none>(parts[0] + parts[1] + parts[2], 0, c, n);
          to.advance();
        }
      }
      if constexpr (weights) {
        for (int64_t row = 0; row < 3; ++row) add_sums(walk, row, c, sums[row]);
      }
    }
  }
}

// Stride 2: inputs in even columns see dc of one column, those in odd ones of two; likewise rows, of which there are
// `rows`.
template <int64_t rows, bool inputs, bool weights, class Out>
void walk_2(const Walk& walk, const Target<Out>& target) {
  const int64_t channels = walk.block.channels, width = walk.block.op.channel_block, columns = walk.block.op.width;
  const Vec zero = Vec::fill(0.0f);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c < kLanes ? channels - c : kLanes;
    Vec taps[rows][3];
    if constexpr (inputs) load_taps(walk, c, taps);
    Target<Out> to = target;
    for (int64_t begin = 0; begin < columns; begin += 2 * kSumTerms) {
      const int64_t end = begin + 2 * kSumTerms < columns ? begin + 2 * kSumTerms : columns;
      Vec sums[rows][3], here[rows], right[rows];
      const float *dc[rows], *t = walk.t + begin * width + c;
      for (int64_t row = 0; row < rows; ++row) {
        for (Vec& sum : sums[row]) sum = zero;
        dc[row] = walk.dc[row] + (begin / 2 + 1) * width + c;
        right[row] = Vec::load(dc[row] - width);
      }
      for (int64_t x = begin; x < end; x += 2) {
        const bool is_pair = x + 1 < end;
        Vec even = zero, odd = zero, input = zero, input_right = zero;
        if constexpr (weights) {
          input = Vec::load(t);
          if (is_pair) input_right = Vec::load(t + width);
        }
        for (int64_t row = 0; row < rows; ++row) {
          here[row] = right[row];
          right[row] = Vec::load(dc[row]);
          dc[row] += width;
          if constexpr (inputs) {
            even = fma(here[row], taps[row][1], even);
            odd = fma(here[row], taps[row][2], fma(right[row], taps[row][0], odd));
          }
          if constexpr (weights) {
            sums[row][1] = fma(input, here[row], sums[row][1]);
            sums[row][2] = fma(input_right, here[row], sums[row][2]);
            sums[row][0] = fma(input_right, right[row], sums[row][0]);
          }
        }
        t += 2 * width;
        if constexpr (inputs) {
          to.template give<Activation::none>(even, 0, c, n);
          to.advance();
          if (is_pair) {
            to.template give<Activation::none>(odd, 0, c, n);
            to.advance();
          }
        }
      }
      if constexpr (weights) {
        for (int64_t row = 0; row < rows; ++row) add_sums(walk, row, c, sums[row]);
      }
    }
  }
}

template <bool inputs, bool weights, class Out>
void walk_row(const Walk& walk, const Target<Out>& target, int64_t rows) {
  if (walk.block.op.stride == 1) {
    walk_1<inputs, weights>(walk, target);
  } else {
    rows == 1 ? walk_2<1, inputs, weights>(walk, target) : walk_2<2, inputs, weights>(walk, target);
  }
}

// dt to the target, if it has a place, and the taps' gradients to the sums, if those have.
template <class Out>
void walk_row(const Walk& walk, const Target<Out>& target, int64_t rows) {
  const bool inputs = target.to != nullptr, weights = walk.weight_sums != nullptr;
  if (kLanes == 16 && inputs && weights) {  // other instruction sets have too few registers for both
    walk_row<true, true>(walk, target, rows);
  } else {
    if (inputs) walk_row<true, false>(walk, target, rows);
    if (weights) walk_row<false, true>(walk, target, rows);
  }
}

// The gradients of a map and channel block.
template <class T>
class Gradients3x3 {
 public:
  Gradients3x3(const TokenDepthwiseConvPass& op, float* scratch)
      : op_(op),
        block_(op, scratch),
        line_((op.out_width + 2) * op.channel_block),
        dc_(block_.end),
        values_(dc_ + kDcRows * line_),
        dt_(values_ + kMaxRows * op.out_width * op.channel_block),
        weight_sums_(dt_ + op.width * op.channel_block),
        sums_memory_(weight_sums_ + 9 * op.channel_block),
        pre_sums_memory_(sums_memory_ + SplitSums::floats(2, op.channel_block)),
        has_values_(op.activation != Activation::none || op.post.mean != nullptr),
        is_plain_(op.pre_activation == Activation::none && op.pre.mean == nullptr && op.pre_sums == nullptr),
        take_(choose_take_row<T>(op)),
        convolve_(choose_convolve<float>(op, Activation::none)),
        pass_output_back_(choose_output_back<T>(op.activation)),
        pass_input_back_(choose_input_back<T>(op.pre_activation)) {
    memset(dc_, 0, static_cast<size_t>(kDcRows * line_) * sizeof(float));
  }

  void operator()(int64_t begin, int64_t end) {
    for_each_item(op_, block_, begin, end, [&](int64_t image) { run(image); });
  }

 private:
  void run(int64_t image) {
    const T* x = image_of<T>(op_, image);
    const int64_t width = op_.channel_block;
    const bool weights = op_.weight_sums != nullptr;
    SplitSums sums(sums_memory_, 2, width), pre_sums(pre_sums_memory_, 2, width);
    memset(weight_sums_, 0, static_cast<size_t>(9 * width) * sizeof(float));
    int64_t taken = 0, known = 0;  // rows of t and of dc
    for (int64_t y = 0; y < op_.height; ++y) {
      // The last row of dc that inputs in row y reach.
      const int64_t reach = op_.stride == 1 ? y + 1 : (y + 1) / 2;
      while (known <= reach && known < op_.out_height) {
        const Target<float> to = rows_at(block_, known, values_);
        if (has_values_) {
          take_rows(block_, take_, x, known, to.rows, taken);
          convolve_(block_, known * op_.stride - 1, to);
        }
        for (int64_t row = 0; row < to.rows; ++row) output_back(image, known + row, row, sums);
        known += to.rows;
      }
      for (; weights && taken <= y; ++taken) take_(block_, x, taken);
      input_back(image, y, pre_sums);
    }
    give_sums(sums, op_.sums, image, block_);
    give_sums(pre_sums, op_.pre_sums, image, block_);
    copy_prefix_gradient<T>(op_, block_, image);
    for (int64_t tap = 0; weights && tap < 9; ++tap) {
      memcpy(place(op_.weight_sums, 9, image, tap, block_), weight_sums_ + tap * width,
             static_cast<size_t>(block_.channels) * sizeof(float));
    }
  }

  // From the result's gradient to the convolution's, into the ring.
  void output_back(int64_t image, int64_t y, int64_t row, SplitSums& sums) {
    const float* value = has_values_ ? values_ + row * op_.out_width * op_.channel_block : nullptr;
    auto back = output_row<T>(op_, block_, image, y, value);
    back.out = {dc_ + y % kDcRows * line_ + op_.channel_block, op_.channel_block};
    pass_output_back_(op_.post, block_, back, sums);
  }

  // Row y of dc with a column of zeros on each side, which are all there is of rows beyond the map.
  const float* dc_row(int64_t y) const {
    const float* row = y < 0 || y >= op_.out_height ? block_.zeros : dc_ + y % kDcRows * line_;
    return row + op_.channel_block;
  }

  // From the convolution's gradient to that of row y of x.
  void input_back(int64_t image, int64_t y, SplitSums& sums) {
    const float* t = block_.ring_row(y);
    float* weight_sums = op_.weight_sums == nullptr ? nullptr : weight_sums_;
    Walk walk{block_, {}, {}, t, weight_sums};
    int64_t rows = 0;
    for (int64_t tap_row = 0; tap_row < 3; ++tap_row) {
      if ((y + 1 - tap_row) % op_.stride != 0) continue;
      walk.dc[rows] = dc_row((y + 1 - tap_row) / op_.stride);
      walk.tap_rows[rows++] = tap_row;
    }
    const BackwardRow<T, float, T> back = input_row<T>(op_, block_, image, y, dt_);
    if (is_plain_) {
      walk_row<T>(walk, {1, back.out.p, back.out.step, 0, back.add.p, back.add.step, 0}, rows);
    } else {
      const bool wanted = op_.dx != nullptr || op_.pre_sums != nullptr;
      walk_row<float>(walk, {1, wanted ? dt_ : nullptr, op_.channel_block, 0, nullptr, 0, 0}, rows);
      if (wanted) pass_input_back_(op_.pre, block_, back, sums);
    }
  }

  const TokenDepthwiseConvPass& op_;
  Block block_;
  int64_t line_;
  float *dc_, *values_, *dt_, *weight_sums_, *sums_memory_, *pre_sums_memory_;
  bool has_values_, is_plain_;
  TakeRow<T> take_;
  Convolve<float> convolve_;
  PassOutputBack<T> pass_output_back_;
  PassInputBack<T> pass_input_back_;
};

}  // namespace

void conv_3x3_gradients(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  op.element == Element::bfloat16 ? Gradients3x3<bf16>(op, scratch)(begin, end)
                                  : Gradients3x3<float>(op, scratch)(begin, end);
}

}  // namespace fastvit::FASTVIT_ISA
