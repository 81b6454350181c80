// The gradients of a 3x3 convolution with padding 1 and stride 1 or 2, compiled once per instruction set.
//
// With c = conv(t) and dc the gradient of c, an input needs the same few dc twice:
//     dt[i] = sum over taps d of w[d] dc[(i + 1 - d) / stride],  for integer indices
//     dweight[d] = sum over i of t[i] dc[(i + 1 - d) / stride]
// So both come from one reading of t and dc. Tiles of neighbouring inputs iterate over the channels first, in memory
// order; for a vector of channels their sums stay in registers. A ring buffer of a few rows of dc moves over the map.
#pragma once

#include "token_depthwise_conv/cpu_training_block.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// Inputs per row of a tile; with stride 2, pairs of inputs.
constexpr int64_t kTileInputs = kLanes == 16 ? 4 : 2;

// Neighbouring tokens of one row or two.
template <class T>
struct TileTokens {
  T* p = nullptr;
  int64_t step = 0, row_step = 0;

  FASTVIT_INLINE void advance(int64_t tokens) {
    if (p != nullptr) p += tokens * step;
  }
};

// Neighbouring inputs of one row or two. X: x's own type, or float from the ring buffer.
template <class X, class Out>
struct GradientTile {
  // Rows of dc. With stride 1 from the row above the inputs on, starting one column to their left; with stride 2 the
  // row of which the first input is under the middle tap, and the next.
  const float* dc[4];
  int64_t dc_step;
  TileTokens<const X> x;
  TileTokens<Out> out;        // dt
  TileTokens<const Out> add;  // added to dt
  // The rows of x and dt that come next, to prefetch; null if they are in the ring buffer.
  TileTokens<const X> next_x;
  TileTokens<const Out> next_out;
  bool streams;

  FASTVIT_INLINE void advance(int64_t inputs, int64_t outputs) {
    for (const float*& row : dc) row += outputs * dc_step;
    x.advance(inputs);
    out.advance(inputs);
    add.advance(inputs);
    next_x.advance(inputs);
    next_out.advance(inputs);
  }
};

// Prefetches the line of channel c in `columns` tokens of two rows.
template <int for_writing, class T>
FASTVIT_INLINE void prefetch_tokens(const TileTokens<T>& tokens, int64_t columns, int64_t c) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  if (tokens.p == nullptr || (kLanes < line && c % line != 0)) return;
  const T* p = tokens.p + c;
#pragma GCC unroll 4
  for (int64_t column = 0; column < columns; ++column, p += tokens.step) {
    __builtin_prefetch(p, for_writing);
    __builtin_prefetch(p + tokens.row_step, for_writing);
  }
}

// The taps of each vector of channels, consecutive, and the sums of their gradients.
struct TapSums {
  const float* taps;
  float* sums;
  int64_t channels;

  static FASTVIT_INLINE Vec tap(const float* taps, int64_t dy, int64_t dx) {
    return Vec::load(taps + (3 * dy + dx) * kLanes);
  }
  // f(c, n, taps, sums) for each vector of channels.
  template <class F>
  FASTVIT_INLINE void for_each(const F& f) const {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) f(c, kLanes, taps + 9 * c, sums + 9 * c);
    if (c < channels) f(c, channels - c, taps + 9 * c, sums + 9 * c);
  }
  static FASTVIT_INLINE void add(const Vec (&weight)[3][3], float* to) {
    for (int64_t tap = 0; tap < 9; ++tap, to += kLanes) (Vec::load(to) + weight[tap / 3][tap % 3]).store(to);
  }
};

FASTVIT_INLINE void clear(Vec (&weight)[3][3]) {
  for (auto& row : weight) {
    for (Vec& sum : row) sum = Vec::fill(0.0f);
  }
}

// Stride 1: every input meets dc of three rows and columns. inputs: computes dt, plus tile.add where there is one;
// weights: computes the gradients of the taps.
template <bool inputs, bool weights, int64_t rows, int64_t columns, class X, class Out>
void backward_stride_1(const TapSums& taps_sums, const GradientTile<X, Out>& given) {
  const GradientTile<X, Out> tile = given;
  taps_sums.for_each([&](int64_t c, int64_t n, const float* taps, float* weight_sums) __attribute__((always_inline)) {
    if constexpr (weights) prefetch_tokens<0>(tile.next_x, columns, c);
    if constexpr (inputs) prefetch_tokens<1>(tile.next_out, columns, c);
    Vec t[rows][columns], sums[rows][columns], weight[3][3];
    clear(weight);
#pragma GCC unroll 2
    for (int64_t row = 0; row < rows; ++row) {
      const X* x = tile.x.p + row * tile.x.row_step + c;
#pragma GCC unroll 4
      for (int64_t column = 0; column < columns; ++column, x += tile.x.step) {
        if constexpr (weights) t[row][column] = load(x, n);
        sums[row][column] = Vec::fill(0.0f);
      }
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < rows + 2; ++i) {
      Vec dc[columns + 2];
      const float* from = tile.dc[i] + c;
#pragma GCC unroll 6
      for (int64_t j = 0; j < columns + 2; ++j, from += tile.dc_step) dc[j] = Vec::load(from);
#pragma GCC unroll 2
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t dy = 2 - (i - row);
        if (dy < 0 || dy > 2) continue;
#pragma GCC unroll 3
        for (int64_t dx = 0; dx < 3; ++dx) {
          const Vec tap = TapSums::tap(taps, dy, dx);
#pragma GCC unroll 4
          for (int64_t column = 0; column < columns; ++column) {
            const Vec d = dc[column + 2 - dx];
            if constexpr (inputs) sums[row][column] = fma(d, tap, sums[row][column]);
            if constexpr (weights) weight[dy][dx] = fma(d, t[row][column], weight[dy][dx]);
          }
        }
      }
    }
    if constexpr (weights) TapSums::add(weight, weight_sums);
#pragma GCC unroll 2
    for (int64_t row = 0; inputs && row < rows; ++row) {
      Out* out = tile.out.p + row * tile.out.row_step + c;
      const Out* add = tile.add.p == nullptr ? nullptr : tile.add.p + row * tile.add.row_step + c;
#pragma GCC unroll 4
      for (int64_t column = 0; column < columns; ++column, out += tile.out.step) {
        if (add != nullptr) sums[row][column] += load(add + column * tile.add.step, n);
        store(sums[row][column], out, n, tile.streams);
      }
    }
  });
}

// Stride 2: inputs in even columns meet dc of one column, those in odd columns of two; likewise for rows. `count`
// pairs of columns; bottom, right: whether the second row or column of a pair exists.
template <bool inputs, bool weights, bool bottom, bool right, class X, class Out>
void backward_stride_2(const TapSums& taps_sums, const GradientTile<X, Out>& given, int64_t count) {
  const GradientTile<X, Out> tile = given;
  taps_sums.for_each([&](int64_t c, int64_t n, const float* taps, float* weight_sums) __attribute__((always_inline)) {
    if constexpr (weights) prefetch_tokens<0>(tile.next_x, 2 * count, c);
    if constexpr (inputs) prefetch_tokens<1>(tile.next_out, 2 * count, c);
    Vec weight[3][3], tap[3][3];
    clear(weight);
    for (int64_t i = 0; i < 9; ++i) tap[i / 3][i % 3] = Vec::load(taps + i * kLanes);
    const float *above = tile.dc[0] + c, *below = tile.dc[1] + c;
    const X* x = tile.x.p + c;
    Out* out = tile.out.p + c;
    Vec left_above = Vec::load(above), left_below = Vec::load(below);
    // An input, with the dc that it meets and their taps.
    const auto add_input = [&](const X* from, Out* to, const auto&... pairs) __attribute__((always_inline)) {
      if constexpr (inputs) {
        Vec sum = Vec::fill(0.0f);
        ((sum = fma(pairs.dc, tap[pairs.dy][pairs.dx], sum)), ...);
        store(sum, to, n, tile.streams);
      }
      if constexpr (weights) {
        const Vec t = load(from, n);
        ((weight[pairs.dy][pairs.dx] = fma(pairs.dc, t, weight[pairs.dy][pairs.dx])), ...);
      }
    };
    struct Pair {
      Vec dc;
      int64_t dy, dx;
    };
    for (int64_t pair = 0; pair < count; ++pair) {
      above += tile.dc_step, below += tile.dc_step;
      const Vec right_above = Vec::load(above), right_below = Vec::load(below);
      add_input(x, out, Pair{left_above, 1, 1});
      if constexpr (right)
        add_input(x + tile.x.step, out + tile.out.step, Pair{left_above, 1, 2}, Pair{right_above, 1, 0});
      if constexpr (bottom) {
        const X* lower = x + tile.x.row_step;
        Out* lower_out = out + tile.out.row_step;
        add_input(lower, lower_out, Pair{left_above, 2, 1}, Pair{left_below, 0, 1});
        if constexpr (right) {
          add_input(lower + tile.x.step, lower_out + tile.out.step, Pair{left_above, 2, 2}, Pair{right_above, 2, 0},
                    Pair{left_below, 0, 2}, Pair{right_below, 0, 0});
        }
      }
      left_above = right_above, left_below = right_below;
      x += 2 * tile.x.step, out += 2 * tile.out.step;
    }
    if constexpr (weights) TapSums::add(weight, weight_sums);
  });
}

// f.operator()<inputs, weights>() for the gradients wanted: both at once, or one after the other.
template <class F>
FASTVIT_INLINE void with_wanted(bool inputs, bool weights, const F& f) {
  constexpr bool together = kLanes == 16;  // other instruction sets have too few registers
  if (together && inputs && weights) return f.template operator()<true, together>();
  if (inputs) f.template operator()<true, false>();
  if (weights) f.template operator()<false, true>();
}

// The gradients of one map and channel block at a time.
template <class T>
class Gradients3x3 {
 public:
  Gradients3x3(const TokenDepthwiseConvPass& op, float* scratch)
      : op_(op),
        block_(op, scratch),
        line_((op.out_width + 2) * op.channel_block),
        dc_(block_.end),
        dt_(dc_ + kDcRows * line_),
        taps_(dt_ + kMaxRows * op.width * op.channel_block),
        weight_memory_(taps_ + 9 * op.channel_block),
        sums_memory_(weight_memory_ + SplitSums::floats(9, op.channel_block)),
        pre_sums_memory_(sums_memory_ + SplitSums::floats(2, op.channel_block)),
        is_plain_(op.pre_activation == Activation::none && op.pre.mean == nullptr),
        load_input_row_(choose_load_input_row<T>(op)),
        output_backward_kernel_(choose_output_backward<T>(op.activation, op.post.mean != nullptr)),
        input_backward_kernel_(choose_input_backward<T>(op.pre_activation, op.pre.mean != nullptr)) {
    memset(dc_, 0, static_cast<size_t>(kDcRows * line_) * sizeof(float));
  }

  void operator()(int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      block_.enter(item % op_.channel_blocks);
      following_ = item + 1 < end ? item + 1 : -1;
      run(item / op_.channel_blocks);
    }
  }

 private:
  void run(int64_t image) {
    const T* x = image_of<T>(op_, image);
    const bool weights = op_.weight_sums != nullptr;
    SplitSums sums(sums_memory_, 2, op_.channel_block), pre_sums(pre_sums_memory_, 2, op_.channel_block);
    SplitSums weight_sums(weight_memory_, 9, op_.channel_block);
    pack_taps();
    int64_t known = 0;  // rows of dc
    for (int64_t y = 0; y < op_.height; y += kMaxRows) {
      const int64_t rows = op_.height - y < kMaxRows ? op_.height - y : kMaxRows;
      // The last row of dc that the inputs meet.
      const int64_t reach = op_.stride == 1 ? y + rows : (y + rows) / 2;
      for (; known <= reach && known < op_.out_height; ++known) output_backward(image, known, sums);
      if (is_plain_) {
        backward_rows(plain_tile(image, y), y, rows, op_.dx != nullptr, weight_sums);
        continue;
      }
      for (int64_t row = 0; weights && row < rows; ++row) load_input_row_(block_, x, y + row);
      const bool wanted = op_.dx != nullptr || op_.pre_sums != nullptr;
      backward_rows(ring_tile(), y, rows, wanted, weight_sums);
      for (int64_t row = 0; wanted && row < rows; ++row) {
        const float* dt = dt_ + row * op_.width * op_.channel_block;
        input_backward_kernel_(op_.pre, block_, input_row<T>(op_, block_, image, y + row, dt), pre_sums);
      }
    }
    store_sums(sums, op_.sums, image, block_);
    store_sums(pre_sums, op_.pre_sums, image, block_);
    copy_prefix_gradient<T>(op_, block_, image);
    if (weights) store_weight_sums(weight_sums, image);
  }

  void pack_taps() {
    for (int64_t c = 0; c < block_.channels; c += kLanes) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        Vec::load(block_.taps + tap * op_.channel_block + c).store(taps_ + 9 * c + tap * kLanes);
      }
    }
  }

  void store_weight_sums(SplitSums& sums, int64_t image) {
    const float* from = sums.get(0);
    for_each_vector(block_.channels, [&](int64_t c, int64_t n) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        store(Vec::load(from + 9 * c + tap * kLanes), place(op_.weight_sums, 9, image, tap, block_) + c, n);
      }
    });
  }

  // From the gradient of the result to dc, into the ring buffer.
  void output_backward(int64_t image, int64_t y, SplitSums& sums) {
    auto back = output_row<T>(op_, block_, image, y);
    back.out = {dc_ + y % kDcRows * line_ + op_.channel_block, op_.channel_block};
    output_backward_kernel_(op_.post, block_, back, sums);
  }

  // Row y of dc with a column of zeros on each side; zeros outside of the map.
  const float* dc_row(int64_t y) const {
    const float* row = y < 0 || y >= op_.out_height ? block_.zeros : dc_ + y % kDcRows * line_;
    return row + op_.channel_block;
  }

  // Row y of a tensor at the block's first channel; beyond the map, the corresponding row of the next item, or null.
  // tokens(image, channel): the image's first token.
  template <class F>
  auto next_row(int64_t image, int64_t y, int64_t step, const F& tokens) const {
    int64_t channel = block_.first;
    if (y >= op_.height) {
      y -= op_.height;
      if (following_ < 0 || y >= op_.height) return decltype(tokens(image, channel)){};
      image = following_ / op_.channel_blocks;
      channel = following_ % op_.channel_blocks * op_.channel_block;
    }
    return tokens(image, channel) + (op_.prefix_tokens + y * op_.width) * step;
  }

  // The first tile of rows y and y + 1, from x to dx.
  GradientTile<T, T> plain_tile(int64_t image, int64_t y) const {
    GradientTile<T, T> tile{};
    const int64_t token = op_.prefix_tokens + y * op_.width, x_step = op_.x_token_stride;
    const auto x = [&](int64_t of, int64_t channel) { return image_of<T>(op_, of) + channel; };
    const auto dx = [&](int64_t of, int64_t channel) { return dx_of<T>(op_, of, channel); };
    tile.x = {x(image, block_.first) + token * x_step, x_step, op_.width * x_step};
    tile.next_x = {next_row(image, y + 2, x_step, x), x_step, tile.x.row_step};
    if (op_.dx == nullptr) return tile;
    tile.out = {dx(image, block_.first) + token * op_.channels, op_.channels, op_.width * op_.channels};
    tile.streams = op_.streams;
    if (!(kStreams && op_.streams)) {
      tile.next_out = {next_row(image, y + 2, op_.channels, dx), op_.channels, tile.out.row_step};
    }
    const int64_t grad_step = op_.grad_token_stride;
    if (op_.residual) {
      tile.add = {grad_of<T>(op_, image, block_.first) + token * grad_step, grad_step, op_.width * grad_step};
    }
    return tile;
  }

  // The same from the ring buffer to dt_.
  GradientTile<float, float> ring_tile() const {
    GradientTile<float, float> tile{};
    tile.x = {block_.ring_row(0), op_.channel_block, op_.padded_width * op_.channel_block};
    tile.out = {dt_, op_.channel_block, op_.width * op_.channel_block};
    return tile;
  }

  // The gradients of one row of inputs or two, given the first tile.
  template <class X, class Out>
  void backward_rows(GradientTile<X, Out> tile, int64_t y, int64_t rows, bool inputs, SplitSums& weight_sums) const {
    const TapSums sums{taps_, weight_sums.partial(), block_.channels};
    const bool weights = op_.weight_sums != nullptr;
    tile.dc_step = op_.channel_block;
    const auto advance = [&](int64_t inputs, int64_t outputs) {
      weight_sums.end_term();
      tile.advance(inputs, outputs);
    };
    if (op_.stride == 1) {
      for (int64_t row = 0; row < 4; ++row) tile.dc[row] = dc_row(y - 1 + row) - op_.channel_block;
      for (int64_t column = 0; column < op_.width;) {
        const int64_t count = column + kTileInputs <= op_.width ? kTileInputs : 1;
        with_wanted(inputs, weights, [&]<bool dt, bool dw>() {
          const auto go = [&]<int64_t columns>() {
            rows == 2 ? backward_stride_1<dt, dw, 2, columns>(sums, tile)
                      : backward_stride_1<dt, dw, 1, columns>(sums, tile);
          };
          count == 1 ? go.template operator()<1>() : go.template operator()<kTileInputs>();
        });
        advance(count, count);
        column += count;
      }
      return;
    }
    for (int64_t row = 0; row < 4; ++row) tile.dc[row] = dc_row(y / 2 + row % 2);
    for (int64_t column = 0; column < op_.width;) {
      const int64_t pairs = (op_.width - column) / 2, count = pairs < kTileInputs ? pairs : kTileInputs;
      with_wanted(inputs, weights, [&]<bool dt, bool dw>() {
        const auto go = [&]<bool right>(int64_t of) {
          rows == 2 ? backward_stride_2<dt, dw, true, right>(sums, tile, of)
                    : backward_stride_2<dt, dw, false, right>(sums, tile, of);
        };
        count > 0 ? go.template operator()<true>(count) : go.template operator()<false>(1);
      });
      const int64_t outputs = count > 0 ? count : 1;
      advance(2 * outputs, outputs);
      column += 2 * outputs;
    }
  }

  const TokenDepthwiseConvPass& op_;
  Block block_;
  int64_t line_;
  float *dc_, *dt_, *taps_, *weight_memory_, *sums_memory_, *pre_sums_memory_;
  bool is_plain_;
  LoadInputRow<T> load_input_row_;
  OutputBackward<T> output_backward_kernel_;
  InputBackward<T> input_backward_kernel_;
  int64_t following_ = -1;  // the next item, or -1
};

}  // namespace

void conv_3x3_gradients(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  with_element(op.element, [&]<class T>() { Gradients3x3<T>(op, scratch)(begin, end); });
  if (kStreams && op.streams) end_streams();
}

}  // namespace fastvit::FASTVIT_ISA
