// The forward CUDA kernel of token_depthwise_conv, as a BlockKernel, and what it shares with the kernels of training.
//
// A block computes a tile of outputs of a few channels of one image. It sets off copies of the input tile with its halo
// to shared memory, in the tensor's own element type, and loads the parameters of its channels meanwhile (start). Where
// a norm or an activation comes in front, every thread then normalises and activates what it has copied (load). Outputs
// are computed `run` of a row at a time, so that a value is used for several of them, and a tap for all (compute).
#pragma once

#include "common/cuda_block_kernel.h"
#include "token_depthwise_conv/args.h"

namespace fastvit::tokens {

using namespace blocks;

// --- Parameters ------------------------------------------------------------------------------------------------------

// An element of a parameter is loaded and read apart where other work is to be done while loads are on their way.
FASTVIT_DEVICE uint32_t load_bits(const ChannelParameter& parameter, int64_t i) {
  const bool wide = parameter.element == Element::float32;
  const char* from = static_cast<const char*>(parameter.data) + (i << (wide ? 2 : 1));
  return wide ? *reinterpret_cast<const uint32_t*>(from) : *reinterpret_cast<const uint16_t*>(from);
}

FASTVIT_DEVICE float float_of_bits(const ChannelParameter& parameter, uint32_t bits) {
  switch (parameter.element) {
    case Element::bfloat16: return bits_as<float>(bits << 16);
    case Element::float16: return widen(bits_as<Half>(static_cast<uint16_t>(bits)));
    default: return bits_as<float>(bits);
  }
}

FASTVIT_DEVICE float read(const ChannelParameter& parameter, int64_t i, float absent) {
  return parameter.data == nullptr ? absent : float_of_bits(parameter, load_bits(parameter, i));
}

// Some of them. They are waited for where they are read: behind copies that are set off before.
template <int N>
struct Held {
  uint32_t bits[N];

  FASTVIT_DEVICE void load(int n, const ChannelParameter& parameter, int64_t i) {
    bits[n] = parameter.data == nullptr ? 0 : load_bits(parameter, i);
  }
  FASTVIT_DEVICE float read(int n, const ChannelParameter& parameter, float absent) const {
    return parameter.data == nullptr ? absent : float_of_bits(parameter, arrived(n));
  }
  FASTVIT_DEVICE uint32_t arrived(int n) const {
    uint32_t word = bits[n];
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(word));
#endif
    return word;
  }
};

// A norm as scale * x + shift.
struct Affine {
  float scale, shift;
};

FASTVIT_DEVICE float deviation_of(const ChannelNorm& norm, int64_t channel) {
  return sqrtf(read(norm.var, channel, 1.0f) + norm.eps);
}

FASTVIT_DEVICE void load_norm(Held<4>& held, const ChannelNorm& norm, int64_t channel) {
  held.load(0, norm.weight, channel);
  held.load(1, norm.bias, channel);
  held.load(2, norm.mean, channel);
  held.load(3, norm.var, channel);
}

FASTVIT_DEVICE Affine fold(const Held<4>& held, const ChannelNorm& norm) {
  if (norm.mean.data == nullptr) return {1.0f, 0.0f};
  const float scale = held.read(0, norm.weight, 1.0f) / sqrtf(held.read(3, norm.var, 1.0f) + norm.eps);
  return {scale, held.read(1, norm.bias, 0.0f) - held.read(2, norm.mean, 0.0f) * scale};
}

FASTVIT_DEVICE Affine fold(const ChannelNorm& norm, int64_t channel) {
  Held<4> held;
  load_norm(held, norm, channel);
  return fold(held, norm);
}

// Takes the taps of a block's channels from (C, area) to shared memory as (area, channels); any beyond the last
// channel. Area: that of the kernel, or 0 if it is known at run time only; then they are loaded when they are stored.
template <int Area, int Channels>
struct Taps {
  static constexpr int rounds = Area > 0 ? (Area * Channels + kThreads - 1) / kThreads : 1;
  Held<rounds> held;

  FASTVIT_DEVICE static int area_of(const TokenDepthwiseConv& op) {
    return Area > 0 ? Area : static_cast<int>(op.kernel * op.kernel);
  }

  // count: of the channels there are.
  FASTVIT_DEVICE void load(const TokenDepthwiseConv& op, int64_t first_channel, int count, int thread) {
    if constexpr (Area > 0) {
      const int64_t first = first_channel * Area;
      const int last = count * Area - 1;
      FASTVIT_UNROLL
      for (int n = 0; n < rounds; ++n) {  // neighbouring threads read neighbouring elements
        const int i = thread + n * kThreads;
        held.bits[n] = load_bits(op.weight, first + (i < last ? i : last));
      }
    }
  }
  FASTVIT_DEVICE void store(const TokenDepthwiseConv& op, int64_t first_channel, int count, int thread,
                            float* taps) const {
    if constexpr (Area > 0) {
      FASTVIT_UNROLL
      for (int n = 0; n < rounds; ++n) {
        const uint32_t i = static_cast<uint32_t>(thread) + n * kThreads;
        if ((n + 1) * kThreads <= Area * Channels || i < Area * Channels) {
          taps[i % Area * Channels + i / Area] = float_of_bits(op.weight, held.arrived(n));
        }
      }
    } else {
      const int area = area_of(op);
      for (int i = thread; i < count * area; i += kThreads) {
        taps[i % area * Channels + i / area] = read(op.weight, first_channel * area + i, 0.0f);
      }
    }
  }
};

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
// 1, if the kernel is known at run time only. window: of the first output, with `channels` per token. With Residual the
// value under the middle tap is added as well.
template <class T, int V, int K, int S, int R, bool Residual = false>
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
    const auto add_row = [&](int dy) {
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
          if (!Residual || dx != K / 2) continue;
          if (dy == K / 2) {
            FASTVIT_UNROLL
            for (int i = 0; i < V; ++i) sums[r][i] += value[i];
          }
        }
      }
    };
    add_row(0);  // apart, so that the first sums need not be moved to where they are added to
    FASTVIT_NO_UNROLL
    for (int dy = 1; dy < K; ++dy) add_row(dy);
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
  int column_bits;                                        // walkers load 2^column_bits columns at a time
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
  FASTVIT_DEVICE int stride() const { return S > 0 ? S : static_cast<int>(op.stride); }
  FASTVIT_DEVICE int taps() const { return K > 0 ? K * K : static_cast<int>(op.kernel * op.kernel); }
  FASTVIT_DEVICE static float* floats(const Place& place) { return reinterpret_cast<float*>(place.shared); }
  FASTVIT_DEVICE float* vector_of(const Place& place, int index) const {
    return floats(place) + (taps() + index) * channels;
  }
  FASTVIT_DEVICE T* tile_of(const Place& place) const { return reinterpret_cast<T*>(vector_of(place, vectors)); }

  struct State {
    int64_t first_channel;
    int count;  // of its channels there are
    uint32_t image;
    int first_row, first_column;  // of the outputs
    int lane, walker;
  };

  FASTVIT_DEVICE void find_tile(State& state, const Place& place) const {
    auto index = static_cast<uint32_t>(place.block);
    state.first_channel = static_cast<int64_t>(channel_blocks.split(index)) * channels;
    state.count = static_cast<int>(smaller(op.channels - state.first_channel, channels));
    state.first_column = static_cast<int>(tile_columns.split(index)) * tiles.width;
    state.first_row = static_cast<int>(tile_rows.split(index)) * tiles.height;
    state.image = index;
    state.lane = place.thread % lanes;
    state.walker = place.thread / lanes;
  }

  FASTVIT_DEVICE void start(State& state, const Place& place) const {
    find_tile(state, place);
    Parameters parameters;
    parameters.load(op, state, place);
    start_copies(state, place);
    parameters.store(op, state, place, floats(place));
  }

  FASTVIT_DEVICE void start_copies(const State& state, const Place& place) const {
    for_each_position(state, place, [](const T* from, bool exists, T* to) { copy_pack<T, V>(from, exists, to); });
  }

  // The parameters of a block's channels: the taps, and behind them (vectors, channels), each sort by warps of its own.
  struct Parameters {
    Taps<K * K, channels> taps;
    Held<4> vector;

    FASTVIT_DEVICE static uint32_t which(const Place& place) { return static_cast<uint32_t>(place.thread) / channels; }
    FASTVIT_DEVICE static int lane(const Place& place) {
      return static_cast<int>(static_cast<uint32_t>(place.thread) % channels);
    }

    FASTVIT_DEVICE void load(const TokenDepthwiseConv& of, const State& state, const Place& place) {
      taps.load(of, state.first_channel, state.count, place.thread);
      vector = {};
      if (which(place) > 2 || lane(place) >= state.count) return;
      const int64_t channel = state.first_channel + lane(place);
      if (which(place) == 0) return vector.load(0, of.bias, channel);
      load_norm(vector, which(place) == 1 ? of.norm : of.pre_norm, channel);
    }

    FASTVIT_DEVICE void store(const TokenDepthwiseConv& of, const State& state, const Place& place, float* to) const {
      taps.store(of, state.first_channel, state.count, place.thread, to);
      if (which(place) > 2 || lane(place) >= state.count) return;
      to += taps.area_of(of) * channels + lane(place);
      if (which(place) == 0) {
        to[bias * channels] = vector.read(0, of.bias, 0.0f);
      } else {
        const Affine affine = fold(vector, which(place) == 1 ? of.norm : of.pre_norm);
        to += (which(place) == 1 ? scale : pre_scale) * channels;
        to[0] = affine.scale;
        to[channels] = affine.shift;
      }
    }
  };

  // f(where from, whether it exists, where to) for the positions of the tile that the thread loads, column by column.
  template <class F>
  FASTVIT_DEVICE void for_each_position(const State& state, const Place& place, const F& f) const {
    const int c = state.lane * V;
    if (c >= state.count) return;  // V divides the channels; nothing reads this lane
    const int first_y = state.first_row * stride() - static_cast<int>(op.padding);
    const int first_x = state.first_column * stride() - static_cast<int>(op.padding);
    const int first = state.walker >> column_bits, step_rows = walkers >> column_bits, step_columns = 1 << column_bits;
    const int64_t row_stride = op.width * op.x_token_stride, step = step_rows * row_stride;
    const T* image = input_of<T>(op).grid(state.image, 0, state.first_channel + c);
    FASTVIT_NO_UNROLL
    for (int column = state.walker & (step_columns - 1); column < halo_width; column += step_columns) {
      const int x = first_x + column;
      const uint32_t rows = x >= 0 && x < op.width ? static_cast<uint32_t>(op.height) : 0;  // that exist
      const T* from = fixed(image + (first_y + first) * row_stride + x * op.x_token_stride);
      T* to = tile_of(place) + (first * halo_width + column) * channels + c;
      FASTVIT_UNROLL_TWO  // so that one's chain of instructions goes on while the other's waits
          for (int y = first_y + first; y < first_y + halo_height; y += step_rows) {
        f(from, static_cast<uint32_t>(y) < rows, to);
        from += step;
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
    const auto transform = [&](const auto& activate) {
      for_each_position(state, place, [&](const T*, bool exists, T* tile) {
        if (!exists) return;
        float values[V];
        load_wide<T, V>(tile, values);
        FASTVIT_UNROLL
        for (int i = 0; i < V; ++i) values[i] = fmaf(values[i], scales[i], shifts[i]);
        activate(values);
        store_narrow<T, V>(values, tile);
      });
    };
    if (sizeof(T) == 2 && op.pre_activation == Activation::gelu) {
      transform([](float (&values)[V]) { activate_all<T>(Activation::gelu, values); });
    } else {
      transform([&](float (&values)[V]) { activate_all<T>(op.pre_activation, values); });
    }
  }

  // The blocks of the first tile also copy the prefix tokens.
  FASTVIT_DEVICE void compute(State& state, const Place& place, int64_t) const {
    const int c = state.lane * V;
    const int64_t channel = state.first_channel + c;
    if (c >= state.count) return;
    const int64_t tokens = op.out_height * op.out_width;
    const auto out = contiguous_view<T>(op, op.out, tokens), convs = contiguous_view<T>(op, conv, tokens);
    if (op.out != nullptr && state.first_row == 0 && state.first_column == 0) copy_prefix(state, channel, out);
    T* out_image = fixed((op.out != nullptr ? out : convs).grid(state.image, 0, channel));
    const int out_width = static_cast<int>(op.out_width), out_height = static_cast<int>(op.out_height);
    const float* vectors_of_lane = vector_of(place, 0) + c;
    const int all_runs = tiles.height * static_cast<int>(runs.value);
    for (int index = state.walker; index < all_runs; index += walkers) {
      auto quotient = static_cast<uint32_t>(index);
      const int tile_column = static_cast<int>(runs.split(quotient)) * run, tile_row = static_cast<int>(quotient);
      const int row = state.first_row + tile_row;
      if (row >= out_height) break;
      float sums[run][V];
      FASTVIT_UNROLL
      for (int r = 0; r < run; ++r) load_floats<V>(vectors_of_lane + bias * channels, sums[r]);
      const T* window = tile_of(place) + (tile_row * halo_width + tile_column) * stride() * channels + c;
      const bool plain = op.activation == Activation::none && conv == nullptr;
      const bool adds = K == 3 && S == 1 && op.residual && plain && copies() && op.norm.mean.data == nullptr;
      const bool residual = op.residual && !adds;
      const bool gelu = sizeof(T) == 2 && op.activation == Activation::gelu && conv == nullptr;  // in few instructions
      if constexpr (K == 3 && S == 1) {
        if (adds) {
          convolve<T, V, K, S, run, true>(K, window, halo_width, channels, floats(place) + c, sums);
        } else {
          convolve<T, V, K, S, run>(K, window, halo_width, channels, floats(place) + c, sums);
        }
      } else {
        convolve<T, V, K, S, run>(static_cast<int>(op.kernel), window, halo_width, channels, floats(place) + c, sums);
      }
      const int column = state.first_column + tile_column, count = out_width - column < run ? out_width - column : run;
      const int64_t token = static_cast<uint32_t>(row) * op.out_width + column;
      T* to = fixed(out_image + token * op.channels);  // of the first token of the run
      const auto x = input_of<T>(op);
      if (gelu) {
        float scales[V], shifts[V];
        load_floats<V>(vectors_of_lane + scale * channels, scales);
        load_floats<V>(vectors_of_lane + shift * channels, shifts);
        FASTVIT_UNROLL
        for (int r = 0; r < run; ++r) {
          FASTVIT_UNROLL
          for (int i = 0; i < V; ++i) sums[r][i] = near_gelu(fmaf(sums[r][i], scales[i], shifts[i]));
          if (r >= count) continue;
          if (residual) add<V>(x.grid(state.image, token + r, channel), sums[r]);
          store_narrow<T, V>(sums[r], moved(to, out_step(), r));
        }
      } else if (plain) {
        if (op.norm.mean.data != nullptr) {
          FASTVIT_UNROLL
          for (int r = 0; r < run; ++r) normalize(vectors_of_lane, sums[r]);
        }
        if (residual) {
          FASTVIT_UNROLL
          for (int r = 0; r < run; ++r) {
            if (r < count) add<V>(x.grid(state.image, token + r, channel), sums[r]);
          }
        }
        if (count >= run) {
          FASTVIT_UNROLL
          for (int r = 0; r < run; ++r) store_narrow<T, V>(sums[r], moved(to, out_step(), r));
        } else {
          FASTVIT_UNROLL
          for (int r = 0; r < run; ++r) {
            if (r < count) store_narrow<T, V>(sums[r], moved(to, out_step(), r));
          }
        }
      } else {
        // Other activations are long code: to have one copy of it, every sum is moved to sums[0] in turn.
        FASTVIT_NO_UNROLL
        for (int r = 0; r < count; ++r) {
          if (conv != nullptr) store_narrow<T, V>(sums[0], convs.grid(state.image, token + r, channel));
          if (op.out != nullptr) {
            normalize(vectors_of_lane, sums[0]);
            activate_all<T>(op.activation, sums[0]);
            if (residual) add<V>(x.grid(state.image, token + r, channel), sums[0]);
            store_narrow<T, V>(sums[0], moved(to, out_step(), r));
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
};

}  // namespace fastvit::tokens
