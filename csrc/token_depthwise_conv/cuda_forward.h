// The forward CUDA kernel of token_depthwise_conv, as a BlockKernel, and what it shares with the kernels of training.
//
// A block computes a tile of outputs of a few channels of one image. It sets off copies of the input tile with its halo
// to shared memory, in the tensor's own element type, and loads the parameters of its channels meanwhile (start). Where a
// norm or an activation comes in front, every thread then normalises and activates what it has copied (load). Outputs are
// computed `run` of a row at a time, so that a value is used for several of them, and a tap for all (compute).
#pragma once

#include "common/cuda_block_kernel.h"
#include "token_depthwise_conv/args.h"

namespace fastvit::tokens {

using namespace blocks;

// --- Parameters ------------------------------------------------------------------------------------------------------

FASTVIT_DEVICE float read(const ChannelParameter& parameter, int64_t i, float absent) {
  if (parameter.data == nullptr) return absent;
  switch (parameter.element) {
    case Element::bfloat16: return widen(static_cast<const BFloat16*>(parameter.data)[i]);
    case Element::float16: return widen(static_cast<const Half*>(parameter.data)[i]);
    default: return static_cast<const float*>(parameter.data)[i];
  }
}

// A norm as scale * x + shift.
struct Affine {
  float scale, shift;
};

FASTVIT_DEVICE float deviation_of(const ChannelNorm& norm, int64_t channel) {
  return sqrtf(read(norm.var, channel, 1.0f) + norm.eps);
}

FASTVIT_DEVICE Affine fold(const ChannelNorm& norm, int64_t channel) {
  if (norm.mean.data == nullptr) return {1.0f, 0.0f};
  const float scale = read(norm.weight, channel, 1.0f) / deviation_of(norm, channel);
  return {scale, read(norm.bias, channel, 0.0f) - read(norm.mean, channel, 0.0f) * scale};
}

// Loads the taps of a block's channels from (C, area) to shared memory as (area, channels); zeros beyond the last
// channel. Area: that of the kernel, or 0 if it is known at run time only; then all of a thread's loads are on their
// way at once.
template <int Area, int Channels, class P>
FASTVIT_DEVICE void load_taps_of(const P* weight, int area, int64_t left, int thread, float* taps) {
  const auto load = [&](int i) {  // neighbouring threads read neighbouring elements
    return i < area * Channels && i / area < left ? widen(weight[i]) : 0.0f;
  };
  const auto store = [&](int i, float tap) {
    if (i < area * Channels) taps[i % area * Channels + i / area] = tap;
  };
  if constexpr (Area > 0) {
    area = Area;
    constexpr int rounds = (Area * Channels + kThreads - 1) / kThreads;
    float values[rounds];
    FASTVIT_UNROLL
    for (int n = 0; n < rounds; ++n) values[n] = load(thread + n * kThreads);
    FASTVIT_UNROLL
    for (int n = 0; n < rounds; ++n) store(thread + n * kThreads, values[n]);
  } else {
    for (int i = thread; i < area * Channels; i += kThreads) store(i, load(i));
  }
}

template <int Area, int Channels>
FASTVIT_DEVICE void load_taps(const TokenDepthwiseConv& op, int64_t first_channel, int thread, float* taps) {
  const int area = static_cast<int>(op.kernel * op.kernel);
  const int64_t first = first_channel * area, left = op.channels - first_channel;
  const void* weight = op.weight.data;
  switch (op.weight.element) {
    case Element::bfloat16:
      return load_taps_of<Area, Channels>(static_cast<const BFloat16*>(weight) + first, area, left, thread, taps);
    case Element::float16:
      return load_taps_of<Area, Channels>(static_cast<const Half*>(weight) + first, area, left, thread, taps);
    default: return load_taps_of<Area, Channels>(static_cast<const float*>(weight) + first, area, left, thread, taps);
  }
}

// --- Tokens ----------------------------------------------------------------------------------------------------------

// Tokens of all images, of which the first `prefix` of an image are not grid tokens.
template <class T>
struct TokenView {
  T* data;
  int64_t batch_stride, token_stride, prefix;  // in elements

  FASTVIT_DEVICE T* at(int64_t image, int64_t token, int64_t channel) const {
    return data + image * batch_stride + token * token_stride + channel;
  }
  FASTVIT_DEVICE T* grid(int64_t image, int64_t token, int64_t channel) const {
    return at(image, prefix + token, channel);
  }
};

template <class T>
FASTVIT_DEVICE TokenView<const T> input_of(const TokenDepthwiseConv& op) {
  return {static_cast<const T*>(op.x), op.x_batch_stride, op.x_token_stride, op.prefix_tokens};
}

// A contiguous tensor of `tokens` grid tokens.
template <class T, class Pointer>
FASTVIT_DEVICE TokenView<T> contiguous_view(const TokenDepthwiseConv& op, Pointer data, int64_t tokens) {
  return {static_cast<T*>(data), (op.prefix_tokens + tokens) * op.channels, op.channels, op.prefix_tokens};
}

// --- Tiles -----------------------------------------------------------------------------------------------------------

// Outputs of a row that a thread computes at a time, by kernel and stride.
template <int K, int S>
constexpr int run_of = K == 0             ? 1
                       : K == 3 && S == 1 ? 7
                                          : 4;

// A map cut into tiles whose width is a multiple of a run.
struct Tiles {
  int height, width;  // of a tile
  int64_t rows, columns;

  FASTVIT_DEVICE int64_t per_image() const { return rows * columns; }
};

// Even tiles of about the given size; heights are multiples of `step`, widths of `run`.
inline Tiles cut(int64_t map_height, int64_t map_width, int64_t height, int64_t width, int64_t step, int64_t run) {
  const auto even = [](int64_t size, int64_t wanted, int64_t unit) {
    const int64_t pieces = divide_up(size, divide_up(wanted, unit) * unit);
    return static_cast<int>(divide_up(divide_up(size, pieces), unit) * unit);
  };
  Tiles tiles{even(map_height, height, step), even(map_width, width, run), 0, 0};
  tiles.rows = divide_up(map_height, tiles.height);
  tiles.columns = divide_up(map_width, tiles.width);
  return tiles;
}

// The largest tiles whose shared memory, bytes(), leaves room for other blocks. The smallest ones may take more.
template <class Cut, class Bytes>
inline void choose_tiles(int64_t height, int64_t width, const Cut& cut_into, const Bytes& bytes) {
  while (cut_into(height, width), bytes() > kSharedBytes && (height > 1 || width > 1)) {
    (width > height ? width : height) /= 2;
  }
}

// --- The kernel ------------------------------------------------------------------------------------------------------

// sums[r][i] += the taps times the windows of R neighbouring outputs. K and S are kernel and stride; K is 0, and R is
// 1, if the kernel is known at run time only. window: of the first output, with `channels` per token.
template <class T, int V, int K, int S, int R>
FASTVIT_DEVICE void convolve(int kernel, const T* window, int token_width, int channels, const float* taps,
                             float (&sums)[R][V]) {
  if constexpr (K == 0) {
    for (int dy = 0; dy < kernel; ++dy) {
      for (int dx = 0; dx < kernel; ++dx) {
        float tap[V], value[V];
        load_floats<V>(taps + (dy * kernel + dx) * channels, tap);
        load_wide<T, V>(window + (dy * token_width + dx) * channels, value);
        FASTVIT_UNROLL
        for (int i = 0; i < V; ++i) sums[0][i] = fmaf(value[i], tap[i], sums[0][i]);
      }
    }
  } else {
    FASTVIT_NO_UNROLL
    for (int dy = 0; dy < K; ++dy) {
      float tap[K][V];
      FASTVIT_UNROLL
      for (int dx = 0; dx < K; ++dx) load_floats<V>(taps + (dy * K + dx) * channels, tap[dx]);
      FASTVIT_UNROLL
      for (int j = 0; j < (R - 1) * S + K; ++j) {
        float value[V];
        load_wide<T, V>(window + (dy * token_width + j) * channels, value);
        FASTVIT_UNROLL
        for (int r = 0; r < R; ++r) {
          const int dx = j - r * S;
          if (dx < 0 || dx >= K) continue;
          FASTVIT_UNROLL
          for (int i = 0; i < V; ++i) sums[r][i] = fmaf(value[i], tap[dx][i], sums[r][i]);
        }
      }
    }
  }
}

// K and S are 0 if kernel and stride are known at run time only.
template <class T, int V, int K, int S>
struct Forward : BlockKernel, Lanes<T, V> {
  using Lanes<T, V>::lanes;
  using Lanes<T, V>::walkers;
  using Lanes<T, V>::channels;
  static constexpr int run = run_of<K, S>;

  TokenDepthwiseConv op;
  void* conv;  // the convolution's result, laid out as out; null if not wanted
  Tiles tiles;
  int halo_height, halo_width;
  int column_bits;  // walkers load 2^column_bits columns at a time
  Divisor channel_blocks, tile_columns, tile_rows, runs;  // runs: of a tile's row

  // op.out may be null if only conv is wanted. Heights of tiles are multiples of `row_step`, widths of `column_step`.
  Forward(const TokenDepthwiseConv& operation, void* result, int64_t row_step = 1, int64_t column_step = run)
      : op(operation), conv(result), channel_blocks(divide_up(op.channels, channels)) {
    const auto cut_into = [&](int64_t height, int64_t width) {
      tiles = cut(op.out_height, op.out_width, height, width, row_step, column_step);
      halo_height = static_cast<int>((tiles.height - 1) * op.stride + op.kernel);
      halo_width = static_cast<int>((tiles.width - 1) * op.stride + op.kernel);
    };
    const int64_t width = smaller(divide_up(op.out_width, column_step), 28 / column_step) * column_step;
    choose_tiles(larger(walkers / (width / run), K == 0 ? 8 : 1), width, cut_into, [&] { return shared_bytes(); });
    tile_columns = Divisor(tiles.columns);
    tile_rows = Divisor(tiles.rows);
    runs = Divisor(tiles.width / run);
    for (column_bits = 0; 1 << column_bits < walkers && 1 << column_bits < halo_width;) ++column_bits;
  }

  int64_t grid() const { return op.batch * tiles.per_image() * channel_blocks.value; }
  // Whether the tile holds x as it is.
  FASTVIT_DEVICE bool copies() const {
    return op.pre_norm.mean.data == nullptr && op.pre_activation == Activation::none;
  }
  // Shared memory: the taps, the vectors of channels, the tile.
  FASTVIT_DEVICE int64_t shared_bytes() const {
    return channels * ((taps() + vectors) * static_cast<int64_t>(sizeof(float)) +
                       static_cast<int64_t>(halo_height) * halo_width * static_cast<int64_t>(sizeof(T)));
  }

  enum Vector { bias, scale, shift, pre_scale, pre_shift, vectors };
  FASTVIT_DEVICE int taps() const { return K > 0 ? K * K : static_cast<int>(op.kernel * op.kernel); }
  FASTVIT_DEVICE static float* floats(const Place& place) { return reinterpret_cast<float*>(place.shared); }
  FASTVIT_DEVICE float* vector_of(const Place& place, int index) const {
    return floats(place) + (taps() + index) * channels;
  }
  FASTVIT_DEVICE T* tile_of(const Place& place) const { return reinterpret_cast<T*>(vector_of(place, vectors)); }

  struct State {
    int64_t image, first_channel;
    int first_row, first_column;  // of the outputs
    int lane, walker;
  };

  FASTVIT_DEVICE void start(State& state, const Place& place) const {
    auto index = static_cast<uint32_t>(place.block);
    state.first_channel = static_cast<int64_t>(channel_blocks.split(index)) * channels;
    state.first_column = static_cast<int>(tile_columns.split(index)) * tiles.width;
    state.first_row = static_cast<int>(tile_rows.split(index)) * tiles.height;
    state.image = index;
    state.lane = place.thread % lanes;
    state.walker = place.thread / lanes;
    for_each_position(state, place, [](const T* from, bool exists, T* to) { copy_pack<T, V>(from, exists, to); });
    load_taps<K * K, channels>(op, state.first_channel, place.thread, floats(place));
    load_vectors(op, state, place, vector_of(place, 0));
  }

  // The parameters of a block's channels but the taps, each sort by warps of its own: (vectors, channels).
  FASTVIT_DEVICE static void load_vectors(const TokenDepthwiseConv& of, const State& state, const Place& place,
                                          float* to) {
    for (int i = place.thread; i < 3 * channels; i += kThreads) {
      const int which = i / channels, c = i % channels;
      const int64_t channel = state.first_channel + c;
      if (channel >= of.channels) continue;
      if (which == 0) {
        to[bias * channels + c] = read(of.bias, channel, 0.0f);
      } else {
        const Affine affine = fold(which == 1 ? of.norm : of.pre_norm, channel);
        float* scales = to + (which == 1 ? scale : pre_scale) * channels;
        scales[c] = affine.scale;
        scales[channels + c] = affine.shift;
      }
    }
  }

  // f(where from, whether it exists, where to) for the positions of the tile that the thread loads, column by column.
  template <class F>
  FASTVIT_DEVICE void for_each_position(const State& state, const Place& place, const F& f) const {
    const int c = state.lane * V;
    const int64_t channel = state.first_channel + c;
    if (channel >= op.channels) return;  // V divides the channels; nothing reads this lane
    const auto height = static_cast<unsigned>(op.height), width = static_cast<unsigned>(op.width);
    const int first_y = static_cast<int>(state.first_row * op.stride - op.padding);
    const int first_x = static_cast<int>(state.first_column * op.stride - op.padding);
    const int first = state.walker >> column_bits, step_rows = walkers >> column_bits, step_columns = 1 << column_bits;
    const int64_t row_stride = op.width * op.x_token_stride;
    const T* image = input_of<T>(op).grid(state.image, 0, channel);
    FASTVIT_NO_UNROLL
    for (int column = state.walker & (step_columns - 1); column < halo_width; column += step_columns) {
      const bool inside = static_cast<unsigned>(first_x + column) < width;
      const T* from = fixed(image + (first_y + first) * row_stride + (first_x + column) * op.x_token_stride);
      T* to = tile_of(place) + (first * halo_width + column) * channels + c;
      FASTVIT_NO_UNROLL
      for (int row = first; row < halo_height; row += step_rows) {
        f(from, inside && static_cast<unsigned>(first_y + row) < height, to);
        from += step_rows * row_stride;
        to += step_rows * halo_width * channels;
      }
    }
  }

  FASTVIT_DEVICE void load(State& state, const Place& place, int64_t) const {
    finish_copies();
    if (copies()) return;
    const int c = state.lane * V;
    float scales[V], shifts[V];  // without a norm 1 and 0
    load_floats<V>(vector_of(place, pre_scale) + c, scales);
    load_floats<V>(vector_of(place, pre_shift) + c, shifts);
    for_each_position(state, place, [&](const T*, bool exists, T* tile) {
      if (!exists) return;
      float values[V];
      load_wide<T, V>(tile, values);
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) values[i] = fmaf(values[i], scales[i], shifts[i]);
      activate_all<T>(op.pre_activation, values);
      store_narrow<T, V>(values, tile);
    });
  }

  // The blocks of the first tile also copy the prefix tokens.
  FASTVIT_DEVICE void compute(State& state, const Place& place, int64_t) const {
    const int c = state.lane * V;
    const int64_t channel = state.first_channel + c;
    if (channel >= op.channels) return;
    const auto x = input_of<T>(op);
    const int64_t tokens = op.out_height * op.out_width;
    const auto out = contiguous_view<T>(op, op.out, tokens), convs = contiguous_view<T>(op, conv, tokens);
    if (op.out != nullptr && state.first_row == 0 && state.first_column == 0) copy_prefix(state, channel, out);
    const T* x_image = fixed(x.grid(state.image, 0, channel));
    T* out_image = fixed((op.out != nullptr ? out : convs).grid(state.image, 0, channel));
    const int out_width = static_cast<int>(op.out_width), out_height = static_cast<int>(op.out_height);
    const float* vectors_of_lane = vector_of(place, 0) + c;
    const int stride = S > 0 ? S : static_cast<int>(op.stride), all_runs = tiles.height * static_cast<int>(runs.value);
    for (int index = state.walker; index < all_runs; index += walkers) {
      auto quotient = static_cast<uint32_t>(index);
      const int tile_column = static_cast<int>(runs.split(quotient)) * run, tile_row = static_cast<int>(quotient);
      if (state.first_row + tile_row >= out_height) break;
      float sums[run][V];
      FASTVIT_UNROLL
      for (int r = 0; r < run; ++r) load_floats<V>(vectors_of_lane + bias * channels, sums[r]);
      const T* window = tile_of(place) + (tile_row * stride * halo_width + tile_column * stride) * channels + c;
      convolve<T, V, K, S, run>(static_cast<int>(op.kernel), window, halo_width, channels, floats(place) + c, sums);
      const int column = state.first_column + tile_column, count = out_width - column < run ? out_width - column : run;
      const int64_t token = static_cast<int64_t>(state.first_row + tile_row) * out_width + column;
      const Ends ends{fixed(out_image + token * op.channels), fixed(x_image + token * op.x_token_stride)};
      const bool gelu = sizeof(T) == 2 && op.activation == Activation::gelu;  // in few instructions
      if ((op.activation == Activation::none || gelu) && conv == nullptr) {
        if (op.norm.mean.data != nullptr) {
          FASTVIT_UNROLL
          for (int r = 0; r < run; ++r) normalize(vectors_of_lane, sums[r]);
        }
        if (gelu) {
          FASTVIT_UNROLL
          for (int r = 0; r < run; ++r) activate_all<T>(Activation::gelu, sums[r]);
        }
        const bool in_tile = S == 1 && copies();  // then the residual is under the middle tap
        if (op.residual && in_tile) {
          const T* middle = window + static_cast<int>(op.padding) * (halo_width + 1) * channels;
          FASTVIT_UNROLL
          for (int r = 0; r < run; ++r) add<V>(middle + r * channels, sums[r]);
        }
        FASTVIT_UNROLL
        for (int r = 0; r < run; ++r) {
          if (r < count) store(ends, r, op.residual && !in_tile, sums[r]);
        }
      } else {
        // Other activations are long code: to have one copy of it, every sum is moved to sums[0] in turn.
        FASTVIT_NO_UNROLL
        for (int r = 0; r < count; ++r) {
          if (conv != nullptr) store_narrow<T, V>(sums[0], convs.grid(state.image, token + r, channel));
          if (op.out != nullptr) {
            normalize(vectors_of_lane, sums[0]);
            activate_all<T>(op.activation, sums[0]);
            store(ends, r, op.residual, sums[0]);
          }
          FASTVIT_UNROLL
          for (int next = 1; next < run; ++next) {
            FASTVIT_UNROLL
            for (int i = 0; i < V; ++i) sums[next - 1][i] = sums[next][i];
          }
        }
      }
    }
  }

  FASTVIT_DEVICE void copy_prefix(const State& state, int64_t channel, const TokenView<T>& out) const {
    const auto x = input_of<T>(op);
    for (int64_t token = state.walker; token < op.prefix_tokens; token += walkers) {
      store_pack<T, V>(load_pack<T, V>(x.at(state.image, token, channel)), out.at(state.image, token, channel));
    }
  }

  // The first token of a run.
  struct Ends {
    T* out;
    const T* x;
  };

  FASTVIT_DEVICE int out_step() const { return static_cast<int>(op.channels * static_cast<int64_t>(sizeof(T))); }

  // from: the vectors, from the thread's channels on.
  FASTVIT_DEVICE static void normalize(const float* from, float (&sum)[V]) {
    float scales[V], shifts[V];
    load_floats<V>(from + scale * channels, scales);
    load_floats<V>(from + shift * channels, shifts);
    FASTVIT_UNROLL
    for (int i = 0; i < V; ++i) sum[i] = fmaf(sum[i], scales[i], shifts[i]);
  }

  template <int N>
  FASTVIT_DEVICE static void add(const T* from, float (&sum)[N]) {
    float values[N];
    load_wide<T, N>(from, values);
    FASTVIT_UNROLL
    for (int i = 0; i < N; ++i) sum[i] += values[i];
  }

  // Stores the r-th sum of a run to out.
  FASTVIT_DEVICE void store(const Ends& ends, int r, bool residual, float (&sum)[V]) const {
    if (residual) add<V>(ends.x + r * op.x_token_stride, sum);
    store_narrow<T, V>(sum, moved(ends.out, out_step(), r));
  }
};

}  // namespace fastvit::tokens
