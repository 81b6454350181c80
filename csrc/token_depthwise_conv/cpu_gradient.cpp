// The gradients of a 3x3 convolution with padding 1 and stride 1 or 2, compiled once per instruction set.
//
// With c = conv(t) and dc the gradient of c, an input needs the same few dc twice:
//     dt[i] = sum over taps d of w[d] dc[(i + 1 - d) / stride],  where that is whole
//     dweight[d] = sum over i of t[i] dc[(i + 1 - d) / stride]
// So one reading of both finds both. Tiles of neighbouring inputs go along the channels first, as tokens lie in memory;
// for a vector of channels their sums lie in registers. A ring of a few rows of dc slides over the map.
#include "token_depthwise_conv/cpu_training_block.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// Inputs of a tile with stride 1, a row; with stride 2, pairs of them.
constexpr int64_t kTileInputs = kLanes == 16 ? 4 : 2;

// The channels of neighbouring tokens of one row or two.
template <class T>
struct TileTokens {
  T* p = nullptr;
  int64_t step = 0, row_step = 0;

  FASTVIT_INLINE void advance(int64_t tokens) {
    if (p != nullptr) p += tokens * step;
  }
};

// Neighbouring inputs of one row or two. X: x as it lies, or float, where it comes from the ring.
template <class X, class Out>
struct GradientTile {
  // Rows of dc; with stride 1 from the one above the inputs on, beginning a column to their left. With stride 2 that in
  // which the first input is in the middle of the taps, and the next.
  const float* dc[4];
  int64_t dc_step;
  TileTokens<const X> x;
  TileTokens<Out> out;        // dt goes there
  TileTokens<const Out> add;  // to it
  // Where the rows come from, and go to, that are next; null where that is not memory.
  TileTokens<const X> x_ahead;
  TileTokens<const Out> out_ahead;
  bool streams;

  FASTVIT_INLINE void advance(int64_t inputs, int64_t outputs) {
    for (const float*& row : dc) row += outputs * dc_step;
    x.advance(inputs);
    out.advance(inputs);
    add.advance(inputs);
    x_ahead.advance(inputs);
    out_ahead.advance(inputs);
  }
};

// Fetches channel c, and what shares a line with it, of `columns` tokens of two rows.
template <int for_writing, class T>
FASTVIT_INLINE void fetch_tokens(const TileTokens<T>& tokens, int64_t columns, int64_t c) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  if (tokens.p == nullptr || (kLanes < line && c % line != 0)) return;
  const T* p = tokens.p + c;
#pragma GCC unroll 4
  for (int64_t column = 0; column < columns; ++column, p += tokens.step) {
    __builtin_prefetch(p, for_writing);
    __builtin_prefetch(p + tokens.row_step, for_writing);
  }
}

// The taps of a vector of channels side by side, and the sums of their gradients.
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

// Stride 1: dc of three rows and columns for every input. What is wanted: dt, with something added to it or not, and
// the taps' gradients.
template <bool inputs, bool weights, bool adds, int64_t rows, int64_t columns, class X, class Out>
void go_back_1(const TapSums& taps_sums, const GradientTile<X, Out>& given) {
  const GradientTile<X, Out> tile = given;
  taps_sums.for_each([&](int64_t c, int64_t n, const float* taps, float* weight_sums) __attribute__((always_inline)) {
    if constexpr (weights) fetch_tokens<0>(tile.x_ahead, columns, c);
    if constexpr (inputs) fetch_tokens<1>(tile.out_ahead, columns, c);
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
      const Out* add = adds ? tile.add.p + row * tile.add.row_step + c : nullptr;
#pragma GCC unroll 4
      for (int64_t column = 0; column < columns; ++column, out += tile.out.step) {
        if constexpr (adds) sums[row][column] += load(add + column * tile.add.step, n);
        store(sums[row][column], out, n, tile.streams);
      }
    }
  });
}

// Stride 2: inputs in even columns see dc of one column, those in odd ones of two; likewise rows. `count` pairs of
// columns; bottom, right: of a pair the second is there.
template <bool inputs, bool weights, bool bottom, bool right, class X, class Out>
void go_back_2(const TapSums& taps_sums, const GradientTile<X, Out>& given, int64_t count) {
  const GradientTile<X, Out> tile = given;
  taps_sums.for_each([&](int64_t c, int64_t n, const float* taps, float* weight_sums) __attribute__((always_inline)) {
    if constexpr (weights) fetch_tokens<0>(tile.x_ahead, 2 * count, c);
    if constexpr (inputs) fetch_tokens<1>(tile.out_ahead, 2 * count, c);
    Vec weight[3][3], tap[3][3];
    clear(weight);
    for (int64_t i = 0; i < 9; ++i) tap[i / 3][i % 3] = Vec::load(taps + i * kLanes);
    const float *above = tile.dc[0] + c, *below = tile.dc[1] + c;
    const X* x = tile.x.p + c;
    Out* out = tile.out.p + c;
    Vec left_above = Vec::load(above), left_below = Vec::load(below);
    // An input, and the gradients that it sees with their taps.
    const auto meet = [&](const X* from, Out* to, const auto&... pairs) __attribute__((always_inline)) {
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
      meet(x, out, Pair{left_above, 1, 1});
      if constexpr (right) meet(x + tile.x.step, out + tile.out.step, Pair{left_above, 1, 2}, Pair{right_above, 1, 0});
      if constexpr (bottom) {
        const X* lower = x + tile.x.row_step;
        Out* lower_out = out + tile.out.row_step;
        meet(lower, lower_out, Pair{left_above, 2, 1}, Pair{left_below, 0, 1});
        if constexpr (right) {
          meet(lower + tile.x.step, lower_out + tile.out.step, Pair{left_above, 2, 2}, Pair{right_above, 2, 0},
               Pair{left_below, 0, 2}, Pair{right_below, 0, 0});
        }
      }
      left_above = right_above, left_below = right_below;
      x += 2 * tile.x.step, out += 2 * tile.out.step;
    }
    if constexpr (weights) TapSums::add(weight, weight_sums);
  });
}

// f.operator()<inputs, weights, adds>() for what is wanted.
template <class F>
FASTVIT_INLINE void with_wanted(bool inputs, bool weights, bool adds, const F& f) {
  constexpr bool together = kLanes == 16;  // other instruction sets have too few registers for both
  if (together && inputs && weights) {
    adds ? f.template operator()<true, together, true>() : f.template operator()<true, together, false>();
    return;
  }
  if (inputs) adds ? f.template operator()<true, false, true>() : f.template operator()<true, false, false>();
  if (weights) f.template operator()<false, true, false>();
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
        dt_(dc_ + kDcRows * line_),
        taps_(dt_ + kMaxRows * op.width * op.channel_block),
        weight_memory_(taps_ + 9 * op.channel_block),
        sums_memory_(weight_memory_ + SplitSums::floats(9, op.channel_block)),
        pre_sums_memory_(sums_memory_ + SplitSums::floats(2, op.channel_block)),
        is_plain_(op.pre_activation == Activation::none && op.pre.mean == nullptr),
        take_(choose_take_row<T>(op)),
        pass_output_back_(choose_output_back<T>(op.activation, op.post.mean != nullptr)),
        pass_input_back_(choose_input_back<T>(op.pre_activation, op.pre.mean != nullptr)) {
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
      // The last row of dc that the inputs reach.
      const int64_t reach = op_.stride == 1 ? y + rows : (y + rows) / 2;
      for (; known <= reach && known < op_.out_height; ++known) output_back(image, known, sums);
      if (is_plain_) {
        go_back(plain_tile(image, y), y, rows, op_.dx != nullptr, weight_sums);
        continue;
      }
      for (int64_t row = 0; weights && row < rows; ++row) take_(block_, x, y + row);
      const bool wanted = op_.dx != nullptr || op_.pre_sums != nullptr;
      go_back(ring_tile(), y, rows, wanted, weight_sums);
      for (int64_t row = 0; wanted && row < rows; ++row) {
        const float* dt = dt_ + row * op_.width * op_.channel_block;
        pass_input_back_(op_.pre, block_, input_row<T>(op_, block_, image, y + row, dt), pre_sums);
      }
    }
    give_sums(sums, op_.sums, image, block_);
    give_sums(pre_sums, op_.pre_sums, image, block_);
    copy_prefix_gradient<T>(op_, block_, image);
    if (weights) give_weight_sums(weight_sums, image);
  }

  void pack_taps() {
    for (int64_t c = 0; c < block_.channels; c += kLanes) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        Vec::load(block_.taps + tap * op_.channel_block + c).store(taps_ + 9 * c + tap * kLanes);
      }
    }
  }

  void give_weight_sums(SplitSums& sums, int64_t image) {
    const float* from = sums.get(0);
    for_each_vector(block_.channels, [&](int64_t c, int64_t n) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        store(Vec::load(from + 9 * c + tap * kLanes), place(op_.weight_sums, 9, image, tap, block_) + c, n);
      }
    });
  }

  // From the result's gradient to the convolution's, into the ring.
  void output_back(int64_t image, int64_t y, SplitSums& sums) {
    auto back = output_row<T>(op_, block_, image, y);
    back.out = {dc_ + y % kDcRows * line_ + op_.channel_block, op_.channel_block};
    pass_output_back_(op_.post, block_, back, sums);
  }

  // Row y of dc with a column of zeros on each side, which are all there is of rows beyond the map.
  const float* dc_row(int64_t y) const {
    const float* row = y < 0 || y >= op_.out_height ? block_.zeros : dc_ + y % kDcRows * line_;
    return row + op_.channel_block;
  }

  // Row y of the block's channels of a tensor, or where that is beyond the map, of what is worked on next; or null.
  // tokens(image, channel): the image's first token there.
  template <class F>
  auto row_ahead(int64_t image, int64_t y, int64_t step, const F& tokens) const {
    int64_t channel = block_.first;
    if (y >= op_.height) {
      y -= op_.height;
      if (following_ < 0 || y >= op_.height) return decltype(tokens(image, channel)){};
      image = following_ / op_.channel_blocks;
      channel = following_ % op_.channel_blocks * op_.channel_block;
    }
    return tokens(image, channel) + (op_.prefix_tokens + y * op_.width) * step;
  }

  // The tile at the left edge of rows y and y + 1, from x to dx.
  GradientTile<T, T> plain_tile(int64_t image, int64_t y) const {
    GradientTile<T, T> tile{};
    const int64_t token = op_.prefix_tokens + y * op_.width, x_step = op_.x_token_stride;
    const auto x = [&](int64_t of, int64_t channel) { return image_of<T>(op_, of) + channel; };
    const auto dx = [&](int64_t of, int64_t channel) { return dx_of<T>(op_, of, channel); };
    tile.x = {x(image, block_.first) + token * x_step, x_step, op_.width * x_step};
    tile.x_ahead = {row_ahead(image, y + 2, x_step, x), x_step, tile.x.row_step};
    if (op_.dx == nullptr) return tile;
    tile.out = {dx(image, block_.first) + token * op_.channels, op_.channels, op_.width * op_.channels};
    tile.streams = op_.streams;
    if (!(kStreams && op_.streams)) {
      tile.out_ahead = {row_ahead(image, y + 2, op_.channels, dx), op_.channels, tile.out.row_step};
    }
    const int64_t grad_step = op_.grad_token_stride;
    if (op_.residual) {
      tile.add = {grad_of<T>(op_, image, block_.first) + token * grad_step, grad_step, op_.width * grad_step};
    }
    return tile;
  }

  // The same from the ring to dt_.
  GradientTile<float, float> ring_tile() const {
    GradientTile<float, float> tile{};
    tile.x = {block_.ring_row(0), op_.channel_block, op_.padded_width * op_.channel_block};
    tile.out = {dt_, op_.channel_block, op_.width * op_.channel_block};
    return tile;
  }

  // The gradients that one row of inputs or two have, from the one at the left edge on.
  template <class X, class Out>
  void go_back(GradientTile<X, Out> tile, int64_t y, int64_t rows, bool inputs, SplitSums& weight_sums) const {
    const TapSums sums{taps_, weight_sums.partial(), block_.channels};
    const bool weights = op_.weight_sums != nullptr;
    tile.dc_step = op_.channel_block;
    const auto go_on = [&](int64_t inputs, int64_t outputs) {
      weight_sums.end_term();
      tile.advance(inputs, outputs);
    };
    if (op_.stride == 1) {
      for (int64_t row = 0; row < 4; ++row) tile.dc[row] = dc_row(y - 1 + row) - op_.channel_block;
      for (int64_t column = 0; column < op_.width;) {
        const int64_t count = column + kTileInputs <= op_.width ? kTileInputs : 1;
        with_wanted(inputs, weights, tile.add.p != nullptr, [&]<bool dt, bool dw, bool adds>() {
          const auto go = [&]<int64_t columns>() {
            rows == 2 ? go_back_1<dt, dw, adds, 2, columns>(sums, tile)
                      : go_back_1<dt, dw, adds, 1, columns>(sums, tile);
          };
          count == 1 ? go.template operator()<1>() : go.template operator()<kTileInputs>();
        });
        go_on(count, count);
        column += count;
      }
      return;
    }
    for (int64_t row = 0; row < 4; ++row) tile.dc[row] = dc_row(y / 2 + row % 2);
    for (int64_t column = 0; column < op_.width;) {
      const int64_t pairs = (op_.width - column) / 2, count = pairs < kTileInputs ? pairs : kTileInputs;
      with_wanted(inputs, weights, false, [&]<bool dt, bool dw, bool>() {
        const auto go = [&]<bool right>(int64_t of) {
          rows == 2 ? go_back_2<dt, dw, true, right>(sums, tile, of) : go_back_2<dt, dw, false, right>(sums, tile, of);
        };
        count > 0 ? go.template operator()<true>(count) : go.template operator()<false>(1);
      });
      const int64_t outputs = count > 0 ? count : 1;
      go_on(2 * outputs, outputs);
      column += 2 * outputs;
    }
  }

  const TokenDepthwiseConvPass& op_;
  Block block_;
  int64_t line_;
  float *dc_, *dt_, *taps_, *weight_memory_, *sums_memory_, *pre_sums_memory_;
  bool is_plain_;
  TakeRow<T> take_;
  PassOutputBack<T> pass_output_back_;
  PassInputBack<T> pass_input_back_;
  int64_t following_ = -1;  // the item that is next, or -1
};

}  // namespace

void conv_3x3_gradients(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch) {
  op.element == Element::bfloat16 ? Gradients3x3<bf16>(op, scratch)(begin, end)
                                  : Gradients3x3<float>(op, scratch)(begin, end);
  if (kStreams && op.streams) end_streams();
}

}  // namespace fastvit::FASTVIT_ISA
