// The forward CUDA kernel of token_depthwise_conv, as a BlockKernel, and what it shares with the kernels of training.
//
// A block computes a tile of outputs of a few channels of one image. It loads the parameters of its channels to shared
// memory (start), then the input tile with its halo, normalised and activated, in the tensor's own element type (load),
// and computes the outputs (compute). A thread computes `run` outputs of a row at a time, so that a value read from
// shared memory is used for several of them, and a tap for all.
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

// Loads the taps of a block's channels from (C, taps) to shared memory as (taps, channels); zeros beyond the last
// channel.
FASTVIT_DEVICE void load_taps(const TokenDepthwiseConv& op, int64_t first_channel, int channels, int thread,
                              float* taps) {
  const int area = static_cast<int>(op.kernel * op.kernel);
  for (int i = thread; i < area * channels; i += kThreads) {
    const int c = i / area, tap = i % area;  // neighbouring threads read neighbouring elements
    const bool exists = first_channel + c < op.channels;
    taps[tap * channels + c] = exists ? read(op.weight, (first_channel + c) * area + tap, 0.0f) : 0.0f;
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
  int64_t channel_blocks;

  // op.out may be null if only conv is wanted.
  Forward(const TokenDepthwiseConv& operation, void* result) : op(operation), conv(result) {
    channel_blocks = divide_up(op.channels, channels);
    const auto cut_into = [&](int64_t height, int64_t width) {
      tiles = cut(op.out_height, op.out_width, height, width, 1, run);
      halo_height = static_cast<int>((tiles.height - 1) * op.stride + op.kernel);
      halo_width = static_cast<int>((tiles.width - 1) * op.stride + op.kernel);
    };
    const int64_t width = smaller(divide_up(op.out_width, run), 28 / run) * run;
    choose_tiles(larger(walkers / (width / run), K == 0 ? 8 : 1), width, cut_into, [&] { return shared_bytes(); });
  }

  int64_t grid() const { return op.batch * tiles.per_image() * channel_blocks; }
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
    int64_t image, first_channel, first_row, first_column;  // of the outputs
    int lane, walker;
  };

  FASTVIT_DEVICE void start(State& state, const Place& place) const {
    int64_t index = place.block;
    state.first_channel = index % channel_blocks * channels;
    index /= channel_blocks;
    state.first_column = index % tiles.columns * tiles.width;
    index /= tiles.columns;
    state.first_row = index % tiles.rows * tiles.height;
    state.image = index / tiles.rows;
    state.lane = place.thread % lanes;
    state.walker = place.thread / lanes;
    load_taps(op, state.first_channel, channels, place.thread, floats(place));
    for (int i = place.thread; i < channels; i += kThreads) {
      const int64_t channel = state.first_channel + i;
      if (channel >= op.channels) continue;
      const Affine pre = fold(op.pre_norm, channel), post = fold(op.norm, channel);
      vector_of(place, bias)[i] = read(op.bias, channel, 0.0f);
      vector_of(place, scale)[i] = post.scale;
      vector_of(place, shift)[i] = post.shift;
      vector_of(place, pre_scale)[i] = pre.scale;
      vector_of(place, pre_shift)[i] = pre.shift;
    }
  }

  FASTVIT_DEVICE void load(State& state, const Place& place, int64_t) const {
    const int c = state.lane * V;
    const int64_t channel = state.first_channel + c;
    if (channel >= op.channels) return;  // V divides the channels; nothing reads this lane
    if (op.pre_norm.mean.data == nullptr && op.pre_activation == Activation::none) {
      // Unrolled by the compiler, so that several loads are in flight.
      for (int position = state.walker; position < halo_height * halo_width; position += walkers) {
        const T* from = source(state, position, channel);
        const Pack<T, V> zeros{};
        store_pack<T, V>(from != nullptr ? load_pack<T, V>(from) : zeros, tile_of(place) + position * channels + c);
      }
      return;
    }
    FASTVIT_NO_UNROLL
    for (int position = state.walker; position < halo_height * halo_width; position += walkers) {
      float values[V] = {};
      if (const T* from = source(state, position, channel)) {
        load_wide<T, V>(from, values);
        FASTVIT_UNROLL
        for (int i = 0; i < V; ++i) {
          // Without a norm these are 1 and 0.
          const float n = fmaf(values[i], vector_of(place, pre_scale)[c + i], vector_of(place, pre_shift)[c + i]);
          values[i] = activate(op.pre_activation, n);
        }
      }
      store_narrow<T, V>(values, tile_of(place) + position * channels + c);
    }
  }

  // The input at a position of the tile; null outside of the map.
  FASTVIT_DEVICE const T* source(const State& state, int position, int64_t channel) const {
    const int64_t row = state.first_row * op.stride - op.padding + position / halo_width;
    const int64_t column = state.first_column * op.stride - op.padding + position % halo_width;
    if (row < 0 || row >= op.height || column < 0 || column >= op.width) return nullptr;
    return input_of<T>(op).grid(state.image, row * op.width + column, channel);
  }

  // The blocks of the first tile also copy the prefix tokens.
  FASTVIT_DEVICE void compute(State& state, const Place& place, int64_t) const {
    const int c = state.lane * V;
    const int64_t channel = state.first_channel + c;
    if (channel >= op.channels) return;
    const auto x = input_of<T>(op);
    const auto out = contiguous_view<T>(op, op.out, op.out_height * op.out_width);
    if (op.out != nullptr && state.first_row == 0 && state.first_column == 0) {
      for (int64_t token = state.walker; token < op.prefix_tokens; token += walkers) {
        store_pack<T, V>(load_pack<T, V>(x.at(state.image, token, channel)), out.at(state.image, token, channel));
      }
    }
    const int runs = tiles.width / run, stride = S > 0 ? S : static_cast<int>(op.stride);
    for (int index = state.walker; index < tiles.height * runs; index += walkers) {
      const int tile_row = index / runs, tile_column = index % runs * run;
      if (state.first_row + tile_row >= op.out_height) break;
      float sums[run][V];
      FASTVIT_UNROLL
      for (int r = 0; r < run; ++r) load_floats<V>(vector_of(place, bias) + c, sums[r]);
      const T* window = tile_of(place) + (tile_row * stride * halo_width + tile_column * stride) * channels + c;
      convolve<T, V, K, S, run>(static_cast<int>(op.kernel), window, halo_width, channels, floats(place) + c, sums);
      const int64_t token = (state.first_row + tile_row) * op.out_width + state.first_column + tile_column;
      const int count = static_cast<int>(smaller(run, op.out_width - state.first_column - tile_column));
      if (op.activation == Activation::none) {
        FASTVIT_UNROLL
        for (int r = 0; r < run; ++r) {
          if (r < count) finish_sum<false>(state, place, token + r, channel, c, sums[r]);
        }
      } else {
        // An activation is long code: to have one copy of it, every sum is moved to sums[0] in turn.
        FASTVIT_NO_UNROLL
        for (int r = 0; r < count; ++r) {
          finish_sum<true>(state, place, token + r, channel, c, sums[0]);
          FASTVIT_UNROLL
          for (int next = 1; next < run; ++next) {
            FASTVIT_UNROLL
            for (int i = 0; i < V; ++i) sums[next - 1][i] = sums[next][i];
          }
        }
      }
    }
  }

  // Finishes a sum and stores it to conv and out.
  template <bool activated>
  FASTVIT_DEVICE void finish_sum(const State& state, const Place& place, int64_t token, int64_t channel, int c,
                                 float (&sum)[V]) const {
    const int64_t tokens = op.out_height * op.out_width;
    if (conv != nullptr)
      store_narrow<T, V>(sum, contiguous_view<T>(op, conv, tokens).grid(state.image, token, channel));
    if (op.out == nullptr) return;
    FASTVIT_UNROLL
    for (int i = 0; i < V; ++i) {
      sum[i] = fmaf(sum[i], vector_of(place, scale)[c + i], vector_of(place, shift)[c + i]);
      if constexpr (activated) sum[i] = activate(op.activation, sum[i]);
    }
    if (op.residual) {
      float values[V];
      load_wide<T, V>(input_of<T>(op).grid(state.image, token, channel), values);
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) sum[i] += values[i];
    }
    store_narrow<T, V>(sum, contiguous_view<T>(op, op.out, tokens).grid(state.image, token, channel));
  }
};

}  // namespace fastvit::tokens
