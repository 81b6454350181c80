// The CUDA kernel of the convolution's gradients, as a BlockKernel: those of its input, weight and bias, from one
// reading of each tensor.
//
// With c = conv(t) + bias and dc the gradient of c, a tile of inputs i needs the same dc twice:
//     dt[i] = sum over taps d of w[d] dc[(i + padding - d) / stride],  for integer indices
//     dweight[d] = sum over i of t[i] dc[(i + padding - d) / stride]
// A block processes several tiles of a few channels in turn. It loads dc on the tile and its halo, and t on the tile,
// to shared memory in the tensor's own element type (load), and computes dt and the tile's part of dweight, which
// accumulates in registers (compute). After the last tile the threads' sums are added up to one partial result per
// block (flush, finish); SumPartials adds those.
#pragma once

#include "token_depthwise_conv/cuda_channels.h"

namespace fastvit::tokens {

// What to compute.
template <class T>
struct GradientTask {
  Step<T> step;             // from the output's gradient to dc; values.data is null if they are the same
  const double* sums;       // of that step's norm; null without one, or with given statistics
  TokenView<const T> grad;  // of the output
  T* dt;                    // as x, contiguous; null if not wanted
  bool dt_is_dx;            // there is no pre_norm or pre_activation: adds the residual, copies prefix tokens
  float* partials;          // (splits, taps + 1, C): weight, then bias; null if not wanted
};

template <class T, int V, int K, int S>
struct Gradient : BlockKernel, Lanes<T, V> {
  using Lanes<T, V>::lanes;
  using Lanes<T, V>::walkers;
  using Lanes<T, V>::channels;
  static constexpr int run = K == 0 ? 1 : K == 3 ? 4 : 2;
  // Each thread accumulates one row of taps; groups of such threads divide the tile's rows.
  static constexpr int groups = K == 0 ? 1 : K == 7 ? 3 : walkers / K;
  static constexpr int kept_taps = K == 0 ? 1 : K;
  static constexpr int min_blocks = K == 5 || K == 7 ? 1 : 2;

  TokenDepthwiseConv op;
  GradientTask<T> task;
  Tiles tiles;
  int halo_height, halo_width;  // of dc
  int64_t channel_blocks, splits, tiles_per_block;
  int64_t margin;  // the first tile starts this far before the map, with the first positions of dc

  Gradient(const TokenDepthwiseConv& operation, const GradientTask<T>& of) : op(operation), task(of) {
    // With much padding the windows of some outputs miss the map, but they count towards the bias.
    const int64_t beyond = larger(op.padding - op.kernel + 1, 0);
    margin = op.padding % op.stride + divide_up(beyond, op.stride) * op.stride;
    const auto cut_into = [&](int64_t height, int64_t width) {
      tiles = cut(op.height + margin + beyond, op.width + margin + beyond, height, width, op.stride,
                  K == 0 ? op.stride : run);
      halo_height = static_cast<int>((tiles.height - 1) / op.stride + (op.kernel - 1) / op.stride + 1);
      halo_width = static_cast<int>((tiles.width - 1) / op.stride + (op.kernel - 1) / op.stride + 1);
    };
    choose_tiles(8, 16, cut_into, [&] { return shared_bytes(); });
    channel_blocks = divide_up(op.channels, channels);
    const int64_t units = op.batch * tiles.per_image();
    const int64_t enough = divide_up(units, larger(smaller(divide_up(kBlocks, channel_blocks), units), 1));
    tiles_per_block = smaller(enough, 8);  // with more, a thread's sums would lose digits
    splits = units == 0 ? 0 : divide_up(units, tiles_per_block);
  }

  int64_t grid() const { return splits * channel_blocks; }
  FASTVIT_DEVICE int taps() const { return K > 0 ? K * K : static_cast<int>(op.kernel * op.kernel); }
  FASTVIT_DEVICE int stride() const { return S > 0 ? S : static_cast<int>(op.stride); }
  // The offset of dc in its tile: input a and tap d meet at (a - d) / stride + reach().
  FASTVIT_DEVICE int reach() const { return K > 0 ? (K - 1) / S : static_cast<int>((op.kernel - 1) / op.stride); }
  // Shared memory: the taps, the vectors of channels, the weight's gradient if it is not in registers; then dc and t,
  // which the threads' sums overwrite in the end.
  enum Vector { pre_scale, pre_shift, mean, scale, bias, constant, slope, vectors };
  FASTVIT_DEVICE int parameter_floats() const { return (taps() + vectors + walkers + (K > 0 ? 0 : taps())) * channels; }
  FASTVIT_DEVICE int64_t tile_bytes() const {
    const int64_t positions =
        static_cast<int64_t>(halo_height) * halo_width + static_cast<int64_t>(tiles.height) * tiles.width;
    return positions * channels * static_cast<int64_t>(sizeof(T));
  }
  FASTVIT_DEVICE int64_t thread_sum_floats() const { return K > 0 ? groups * taps() * channels : 0; }
  FASTVIT_DEVICE int64_t shared_bytes() const {
    constexpr auto size = static_cast<int64_t>(sizeof(float));
    return parameter_floats() * size + larger(tile_bytes(), thread_sum_floats() * size);
  }
  FASTVIT_DEVICE static float* floats(const Place& place) { return reinterpret_cast<float*>(place.shared); }
  FASTVIT_DEVICE float* vector_of(const Place& place, int index) const {
    return floats(place) + (taps() + index) * channels;
  }
  FASTVIT_DEVICE float* bias_sums(const Place& place) const { return vector_of(place, vectors); }
  FASTVIT_DEVICE float* weight_sums(const Place& place) const { return bias_sums(place) + walkers * channels; }
  FASTVIT_DEVICE float* thread_sums(const Place& place) const { return floats(place) + parameter_floats(); }
  FASTVIT_DEVICE T* dc_tile(const Place& place) const { return reinterpret_cast<T*>(thread_sums(place)); }
  FASTVIT_DEVICE T* t_tile(const Place& place) const { return dc_tile(place) + halo_height * halo_width * channels; }

  struct State {
    float weight[kept_taps][V];
  };

  FASTVIT_DEVICE int64_t first_channel(const Place& place) const { return place.block % channel_blocks * channels; }

  // A tile's image and first input; row and column may be negative.
  struct Origin {
    int64_t image;
    int row, column;
  };
  FASTVIT_DEVICE Origin origin_of(const Place& place, int64_t round) const {
    int64_t index = place.block / channel_blocks * tiles_per_block + round;
    const auto column = static_cast<int>(index % tiles.columns * tiles.width - margin);
    index /= tiles.columns;
    return {index / tiles.rows, static_cast<int>(index % tiles.rows * tiles.height - margin), column};
  }

  FASTVIT_DEVICE int64_t rounds(const Place& place) const {
    const int64_t first = place.block / channel_blocks * tiles_per_block;
    return smaller(tiles_per_block, op.batch * tiles.per_image() - first);
  }

  FASTVIT_DEVICE void start(State& state, const Place& place) const {
    FASTVIT_UNROLL
    for (int i = 0; i < kept_taps; ++i) clear(state.weight[i]);
    FASTVIT_UNROLL
    for (int i = 0; i < V; ++i) bias_sums(place)[place.thread * V + i] = 0.0f;
    Taps<K * K, channels> taps_of_thread;
    const int count = static_cast<int>(smaller(op.channels - first_channel(place), channels));
    taps_of_thread.load(op, first_channel(place), count, place.thread);
    taps_of_thread.store(op, first_channel(place), count, place.thread, floats(place));
    for (int i = place.thread; i < channels; i += kThreads) {
      const int64_t channel = first_channel(place) + i;
      if (channel >= op.channels) continue;
      const Affine pre = fold(op.pre_norm, channel);
      vector_of(place, pre_scale)[i] = pre.scale;
      vector_of(place, pre_shift)[i] = pre.shift;
      const NormGradient<1> gradient(task.step.norm, channel, op.channels, task.sums,
                                     op.batch * op.out_height * op.out_width);
      vector_of(place, mean)[i] = gradient.norm.mean[0];
      vector_of(place, scale)[i] = gradient.norm.scale[0];
      vector_of(place, bias)[i] = gradient.norm.bias[0];
      vector_of(place, constant)[i] = gradient.constant[0];
      vector_of(place, slope)[i] = gradient.slope[0];
    }
    if constexpr (K == 0) {
      for (int i = place.thread; i < taps() * channels; i += kThreads) weight_sums(place)[i] = 0.0f;
    }
  }

  FASTVIT_DEVICE void load(State&, const Place& place, int64_t round) const {
    const int c = place.thread % lanes * V, walker = place.thread / lanes;
    const int64_t channel = first_channel(place) + c;
    if (channel >= op.channels) return;
    const Origin origin = origin_of(place, round);
    load_dc(place, origin, c, channel, walker);
    if (task.partials != nullptr) load_t(place, origin, c, channel, walker);
  }

  // An output counts towards the bias in the tile with the first input of its window, clamped to the map.
  FASTVIT_DEVICE bool owns(int64_t input, int64_t size, int64_t first, int tile) const {
    const int64_t nearest = larger(-margin, smaller(input, size + margin - 1));
    return nearest >= first && nearest < first + tile;
  }

  FASTVIT_DEVICE void load_dc(const Place& place, const Origin& origin, int c, int64_t channel, int walker) const {
    const int padding = static_cast<int>(op.padding);
    const int top = (origin.row + padding) / stride() - reach(), left = (origin.column + padding) / stride() - reach();
    float bias_sum[V];
    load_floats<V>(bias_sums(place) + place.thread * V, bias_sum);
    FASTVIT_NO_UNROLL
    for (int position = walker; position < halo_height * halo_width; position += walkers) {
      const int row = top + position / halo_width, column = left + position % halo_width;
      float dc[V] = {};
      if (row >= 0 && row < op.out_height && column >= 0 && column < op.out_width) {
        const int64_t token = row * op.out_width + column;
        load_wide<T, V>(task.grad.grid(origin.image, token, channel), dc);
        if (task.step.values.data != nullptr) {
          float value[V];
          load_wide<T, V>(task.step.values.grid(origin.image, token, channel), value);
          FASTVIT_UNROLL
          for (int i = 0; i < V; ++i) {
            const float centred = value[i] - vector_of(place, mean)[c + i];
            const float n = fmaf(centred, vector_of(place, scale)[c + i], vector_of(place, bias)[c + i]);
            const float d = dc[i] * derivative(task.step.activation, n);
            dc[i] = vector_of(place, scale)[c + i] *
                    (d - vector_of(place, constant)[c + i] - centred * vector_of(place, slope)[c + i]);
          }
        }
        if (owns(row * stride() - padding, op.height, origin.row, tiles.height) &&
            owns(column * stride() - padding, op.width, origin.column, tiles.width)) {
          FASTVIT_UNROLL
          for (int i = 0; i < V; ++i) bias_sum[i] += dc[i];
        }
      }
      store_narrow<T, V>(dc, dc_tile(place) + position * channels + c);
    }
    store_floats<V>(bias_sum, bias_sums(place) + place.thread * V);
  }

  FASTVIT_DEVICE void load_t(const Place& place, const Origin& origin, int c, int64_t channel, int walker) const {
    const auto x = input_of<T>(op);
    const bool normalise = op.pre_norm.mean.data != nullptr;
    FASTVIT_NO_UNROLL
    for (int position = walker; position < tiles.height * tiles.width; position += walkers) {
      const int row = origin.row + position / tiles.width, column = origin.column + position % tiles.width;
      float t[V] = {};
      if (row >= 0 && row < op.height && column >= 0 && column < op.width) {
        load_wide<T, V>(x.grid(origin.image, row * op.width + column, channel), t);
        FASTVIT_UNROLL
        for (int i = 0; i < V; ++i) {
          if (normalise) t[i] = fmaf(t[i], vector_of(place, pre_scale)[c + i], vector_of(place, pre_shift)[c + i]);
        }
        activate_all<T>(op.pre_activation, t);
      }
      store_narrow<T, V>(t, t_tile(place) + position * channels + c);
    }
  }

  FASTVIT_DEVICE void compute(State& state, const Place& place, int64_t round) const {
    const int c = place.thread % lanes * V, walker = place.thread / lanes;
    const int64_t channel = first_channel(place) + c;
    if (channel >= op.channels) return;
    if (task.dt != nullptr) store_dt(place, round, c, channel, walker);
    if (task.partials == nullptr) return;
    if constexpr (K > 0) {
      accumulate_weight(state, place, c, walker);
    } else {
      accumulate_weight_in_shared_memory(place, c, walker);
    }
  }

  FASTVIT_DEVICE void store_dt(const Place& place, int64_t round, int c, int64_t channel, int walker) const {
    const Origin origin = origin_of(place, round);
    const auto dt = contiguous_view<T>(op, task.dt, op.height * op.width);
    if (task.dt_is_dx && origin.row == -margin && origin.column == -margin) {
      for (int64_t token = walker; token < op.prefix_tokens; token += walkers) {
        store_pack<T, V>(load_pack<T, V>(task.grad.at(origin.image, token, channel)),
                         dt.at(origin.image, token, channel));
      }
    }
    const int runs = tiles.width / run;
    for (int index = walker; index < tiles.height * runs; index += walkers) {
      const int a = index / runs, b = index % runs * run;
      const int row = origin.row + a;
      if (row < 0) continue;
      if (row >= op.height) break;
      float sums[run][V];
      FASTVIT_UNROLL
      for (int r = 0; r < run; ++r) clear(sums[r]);
      input_gradient(place, c, a, b, sums);
      FASTVIT_UNROLL
      for (int r = 0; r < run; ++r) {
        const int column = origin.column + b + r;
        if (column < 0 || column >= op.width) continue;
        const int64_t token = row * op.width + column;
        if (task.dt_is_dx && op.residual) {
          float added[V];
          load_wide<T, V>(task.grad.grid(origin.image, token, channel), added);
          FASTVIT_UNROLL
          for (int i = 0; i < V; ++i) sums[r][i] += added[i];
        }
        store_narrow<T, V>(sums[r], dt.grid(origin.image, token, channel));
      }
    }
  }

  // dt at the inputs (a, b), (a, b + 1), ... of the tile.
  FASTVIT_DEVICE void input_gradient(const Place& place, int c, int a, int b, float (&sums)[run][V]) const {
    const T* dc = dc_tile(place) + c;
    if constexpr (K > 0) {
      FASTVIT_NO_UNROLL
      for (int dy = (a & (S - 1)); dy < K; dy += S) {
        float tap[K][V];
        FASTVIT_UNROLL
        for (int dx = 0; dx < K; ++dx) load_floats<V>(floats(place) + (dy * K + dx) * channels + c, tap[dx]);
        const T* window = dc + ((a - dy + S * reach()) / S * halo_width + b / S) * channels;
        FASTVIT_UNROLL
        for (int j = 0; j <= (run - 1) / S + (K - 1) / S; ++j) {
          float value[V];
          load_wide<T, V>(window + j * channels, value);
          FASTVIT_UNROLL
          for (int r = 0; r < run; ++r) {
            const int dx = r - S * (j - (K - 1) / S);
            if (dx < 0 || dx >= K) continue;
            FASTVIT_UNROLL
            for (int i = 0; i < V; ++i) sums[r][i] = fmaf(value[i], tap[dx][i], sums[r][i]);
          }
        }
      }
    } else {
      for_each_tap(a, b, [&](int tap, int position) {
        float weight[V], value[V];
        load_floats<V>(floats(place) + tap * channels + c, weight);
        load_wide<T, V>(dc + position * channels, value);
        FASTVIT_UNROLL
        for (int i = 0; i < V; ++i) sums[0][i] = fmaf(value[i], weight[i], sums[0][i]);
      });
    }
  }

  // f(tap, position in dc's tile) for every tap that the input (a, b) of the tile meets.
  template <class F>
  FASTVIT_DEVICE void for_each_tap(int a, int b, const F& f) const {
    const int step = stride(), kernel = static_cast<int>(op.kernel);
    for (int dy = a % step; dy < kernel; dy += step) {
      for (int dx = b % step; dx < kernel; dx += step) {
        const int row = (a - dy + step * reach()) / step, column = (b - dx + step * reach()) / step;
        f(dy * kernel + dx, row * halo_width + column);
      }
    }
  }

  // Accumulates the thread's row of taps over the tile rows of its group.
  FASTVIT_DEVICE void accumulate_weight(State& state, const Place& place, int c, int walker) const {
    if constexpr (K > 0) {
      const int dy = walker % K, group = walker / K;
      if (group >= groups) return;
      const T *dc = dc_tile(place) + c, *t = t_tile(place) + c;
      FASTVIT_NO_UNROLL
      for (int a = (dy & (S - 1)) + group * S; a < tiles.height; a += groups * S) {
        const T* window = dc + (a - dy + S * reach()) / S * halo_width * channels;
        FASTVIT_NO_UNROLL
        for (int b = 0; b < tiles.width; b += run) {
          float input[run][V];
          FASTVIT_UNROLL
          for (int r = 0; r < run; ++r) load_wide<T, V>(t + (a * tiles.width + b + r) * channels, input[r]);
          FASTVIT_UNROLL
          for (int j = 0; j <= (run - 1) / S + (K - 1) / S; ++j) {
            float value[V];
            load_wide<T, V>(window + (b / S + j) * channels, value);
            FASTVIT_UNROLL
            for (int r = 0; r < run; ++r) {
              const int dx = r - S * (j - (K - 1) / S);
              if (dx < 0 || dx >= K) continue;
              FASTVIT_UNROLL
              for (int i = 0; i < V; ++i) state.weight[dx][i] = fmaf(value[i], input[r][i], state.weight[dx][i]);
            }
          }
        }
      }
    }
  }

  // For a kernel known at run time only: a thread has some taps, whose sums are in shared memory.
  FASTVIT_DEVICE void accumulate_weight_in_shared_memory(const Place& place, int c, int walker) const {
    const int step = stride(), kernel = static_cast<int>(op.kernel);
    for (int tap = walker; tap < kernel * kernel; tap += walkers) {
      const int dy = tap / kernel, dx = tap % kernel;
      float sum[V] = {};
      for (int a = dy % step; a < tiles.height; a += step) {
        for (int b = dx % step; b < tiles.width; b += step) {
          const int row = (a - dy + step * reach()) / step, column = (b - dx + step * reach()) / step;
          float value[V], input[V];
          load_wide<T, V>(dc_tile(place) + (row * halo_width + column) * channels + c, value);
          load_wide<T, V>(t_tile(place) + (a * tiles.width + b) * channels + c, input);
          FASTVIT_UNROLL
          for (int i = 0; i < V; ++i) sum[i] = fmaf(value[i], input[i], sum[i]);
        }
      }
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) weight_sums(place)[tap * channels + c + i] += sum[i];
    }
  }

  // Stores the threads' sums for the weight, (groups, taps, channels).
  FASTVIT_DEVICE void flush(State& state, const Place& place) const {
    if constexpr (K > 0) {
      const int c = place.thread % lanes * V, walker = place.thread / lanes;
      const int dy = walker % K, group = walker / K;
      if (task.partials == nullptr || group >= groups) return;
      FASTVIT_UNROLL
      for (int dx = 0; dx < K; ++dx) {
        store_floats<V>(state.weight[dx], thread_sums(place) + ((group * K + dy) * K + dx) * channels + c);
      }
    }
  }

  FASTVIT_DEVICE void finish(State&, const Place& place) const {
    if (task.partials == nullptr) return;
    const float* thread_totals = thread_sums(place);
    const int area = taps();
    float* to = task.partials + place.block / channel_blocks * (area + 1) * op.channels + first_channel(place);
    for (int k = place.thread; k < (area + 1) * channels; k += kThreads) {
      const int row = k / channels, c = k % channels;
      if (first_channel(place) + c >= op.channels) continue;
      float sum = 0.0f;
      if (row == area) {
        FASTVIT_NO_UNROLL
        for (int w = 0; w < walkers; ++w) sum += bias_sums(place)[w * channels + c];
      } else if constexpr (K > 0) {
        for (int group = 0; group < groups; ++group) sum += thread_totals[(group * area + row) * channels + c];
      } else {
        sum = weight_sums(place)[row * channels + c];
      }
      to[row * op.channels + c] = sum;
    }
  }
};

}  // namespace fastvit::tokens
