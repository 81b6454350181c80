// CUDA kernels of token_depthwise_conv in training that process tokens channel by channel, without a window: statistics
// of BatchNorm, sums over tokens, and the element-wise passes that need them.
//
// A reduction has two stages, both in a fixed order: a block reduces some tokens of a few channels to a partial result,
// and a second kernel reduces the partial results. The division of the tokens depends on the shape only. A thread adds
// up few values, in float32; their sums are added in float64, as BatchNorm's backward pass subtracts sums that nearly
// cancel.
#pragma once

#include "token_depthwise_conv/cuda_forward.h"

namespace fastvit::tokens {

// The tokens of all images, `rows` in all, divided among blocks.
struct Division {
  int64_t channel_blocks, splits, rows, rows_per_block;

  Division(int64_t channels, int block_channels, int64_t all_rows, int walkers) : rows(all_rows) {
    channel_blocks = divide_up(channels, block_channels);
    // Enough blocks, each of more than a few rows, but not of so many that a thread's sums lose digits.
    const int64_t wanted = larger(smaller(divide_up(kBlocks, channel_blocks), divide_up(rows, 2 * walkers)),
                                  divide_up(rows, 64 * walkers));
    rows_per_block = divide_up(rows, larger(wanted, 1));
    splits = divide_up(rows, larger(rows_per_block, 1));
  }
  int64_t grid() const { return channel_blocks * splits; }
  FASTVIT_DEVICE int64_t first_row(int64_t block) const { return block / channel_blocks * rows_per_block; }
  FASTVIT_DEVICE int64_t rows_of(int64_t block) const { return smaller(rows_per_block, rows - first_row(block)); }
};

// What these kernels share: a thread's channels, and its loop over a block's rows.
template <class T, int V>
struct RowKernel : BlockKernel, Lanes<T, V> {
  using Lanes<T, V>::lanes;
  using Lanes<T, V>::walkers;
  using Lanes<T, V>::channels;

  TokenDepthwiseConv op;
  Division division;
  int64_t tokens;  // per image, to loop over

  RowKernel(const TokenDepthwiseConv& operation, int64_t tokens_per_image)
      : op(operation),
        division(operation.channels, channels, operation.batch * tokens_per_image, walkers),
        tokens(tokens_per_image) {}

  int64_t grid() const { return division.grid(); }
  FASTVIT_DEVICE int64_t first_channel(const Place& place) const {
    return place.block % division.channel_blocks * channels;
  }
  FASTVIT_DEVICE int64_t channel_of(const Place& place) const {
    return first_channel(place) + place.thread % lanes * V;
  }
  // f(image, token) for every row of the thread.
  template <class F>
  FASTVIT_DEVICE void for_each_row(const Place& place, const F& f) const {
    const int64_t first = division.first_row(place.block) + place.thread / lanes;
    const int64_t end = division.first_row(place.block) + division.rows_of(place.block);
    int64_t image = first / tokens, token = first % tokens;
    FASTVIT_NO_UNROLL
    for (int64_t row = first; row < end; row += walkers) {
      f(image, token);
      for (token += walkers; token >= tokens; token -= tokens) ++image;
    }
  }
};

// --- Statistics ------------------------------------------------------------------------------------------------------

// Per block and channel the number of values, their mean, and the sum of squares about it: (splits, 3, C).
template <class T, int V>
struct Statistics : RowKernel<T, V> {
  using Base = RowKernel<T, V>;
  using Base::channels;
  using Base::walkers;

  TokenView<const T> values;
  double* partials;

  Statistics(const TokenDepthwiseConv& op, TokenView<const T> view, int64_t tokens, double* results)
      : Base(op, tokens), values(view), partials(results) {}

  FASTVIT_DEVICE int64_t shared_bytes() const { return 2 * walkers * channels * static_cast<int64_t>(sizeof(float)); }

  struct State {
    float mean[V], squares[V];
  };

  FASTVIT_DEVICE void compute(State& state, const Place& place, int64_t) const {
    const int64_t channel = this->channel_of(place);
    clear(state.mean);
    clear(state.squares);
    if (channel >= this->op.channels) return;
    float count = 0.0f;
    this->for_each_row(place, [&](int64_t image, int64_t token) {
      float value[V];
      load_wide<T, V>(values.grid(image, token, channel), value);
      const float weight = 1.0f / (count += 1.0f);
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) {
        const float difference = value[i] - state.mean[i];
        state.mean[i] = fmaf(difference, weight, state.mean[i]);
        state.squares[i] = fmaf(difference, value[i] - state.mean[i], state.squares[i]);
      }
    });
  }

  FASTVIT_DEVICE void flush(State& state, const Place& place) const {
    auto* shared = reinterpret_cast<float*>(place.shared);
    store_floats<V>(state.mean, shared + place.thread * V);
    store_floats<V>(state.squares, shared + (kThreads + place.thread) * V);
  }

  FASTVIT_DEVICE void finish(State&, const Place& place) const {
    const int c = place.thread;
    const int64_t channel = this->first_channel(place) + c, rows = this->division.rows_of(place.block);
    if (c >= channels || channel >= this->op.channels) return;
    const auto* means = reinterpret_cast<const float*>(place.shared) + c;
    const float* squares = means + walkers * channels;
    const auto count = [&](int walker) {  // rows are assigned in turn
      return static_cast<double>(larger((rows - walker + walkers - 1) / walkers, 0));
    };
    double sum = 0.0, about = 0.0;
    FASTVIT_NO_UNROLL
    for (int w = 0; w < walkers; ++w) sum += count(w) * means[w * channels];
    const double mean = sum / static_cast<double>(rows);
    FASTVIT_NO_UNROLL
    for (int w = 0; w < walkers; ++w) {
      const double away = means[w * channels] - mean;
      about += count(w) * away * away + squares[w * channels];
    }
    double* to = partials + place.block / this->division.channel_blocks * 3 * this->op.channels + channel;
    to[0] = static_cast<double>(rows);
    to[this->op.channels] = mean;
    to[2 * this->op.channels] = about;
  }
};

// From the results of Statistics to mean and biased variance per channel.
struct MergeStatistics : BlockKernel {
  static constexpr int lanes = 32, walkers = kThreads / lanes;

  const double* partials;
  int64_t splits, channels;
  float *mean, *var;
  ChannelParameter left_out;  // a bias that the mean takes away again, but not a NaN or infinity

  int64_t grid() const { return divide_up(channels, lanes); }
  FASTVIT_DEVICE int64_t rounds(const Place&) const { return 2; }
  FASTVIT_DEVICE int64_t shared_bytes() const { return 3 * kThreads * static_cast<int64_t>(sizeof(double)); }

  struct State {
    double mean, count;
  };

  // Over the walkers of a channel.
  FASTVIT_DEVICE static double total(const double* shared, int lane) {
    double sum = 0.0;
    FASTVIT_NO_UNROLL
    for (int w = 0; w < walkers; ++w) sum += shared[w * lanes + lane];
    return sum;
  }

  // The first round computes the mean, the second one the sum of squares about it.
  FASTVIT_DEVICE void compute(State& state, const Place& place, int64_t round) const {
    const int lane = place.thread % lanes, walker = place.thread / lanes;
    const int64_t channel = place.block * lanes + lane;
    auto* shared = reinterpret_cast<double*>(place.shared);
    if (round == 1) {
      state.count = total(shared, lane);
      state.mean = total(shared + kThreads, lane) / state.count;
    }
    double counts = 0.0, sums = 0.0;
    for (int64_t split = walker; split < splits && channel < channels; split += walkers) {
      const double* partial = partials + split * 3 * channels + channel;
      if (round == 0) {
        counts += partial[0];
        sums += partial[0] * partial[channels];
      } else {
        const double away = partial[channels] - state.mean;
        sums += partial[0] * away * away + partial[2 * channels];
      }
    }
    if (round == 0) shared[place.thread] = counts;
    shared[(1 + round) * kThreads + place.thread] = sums;
  }

  FASTVIT_DEVICE void finish(State& state, const Place& place) const {
    const int64_t channel = place.block * lanes + place.thread;
    if (place.thread >= lanes || channel >= channels) return;
    mean[channel] = static_cast<float>(state.mean);
    const auto* squares = reinterpret_cast<const double*>(place.shared) + 2 * kThreads;
    const float variance = static_cast<float>(total(squares, place.thread) / state.count);
    var[channel] = variance + 0.0f * read(left_out, channel, 0.0f);
  }
};

// --- Sums ------------------------------------------------------------------------------------------------------------

FASTVIT_DEVICE double exact_deviation(const ChannelNorm& norm, int64_t channel) {
  return sqrt(static_cast<double>(read(norm.var, channel, 1.0f)) + static_cast<double>(norm.eps));
}

// A norm's parameters for the V channels of a thread, in centred form: n = (v - mean) * scale + bias.
template <int V>
struct NormLanes {
  float mean[V], scale[V], bias[V], deviation[V];

  FASTVIT_DEVICE NormLanes(const ChannelNorm& norm, int64_t channel) {
    const bool exists = norm.mean.data != nullptr;
    FASTVIT_UNROLL
    for (int i = 0; i < V; ++i) {
      deviation[i] = exists ? deviation_of(norm, channel + i) : 1.0f;
      scale[i] = exists ? read(norm.weight, channel + i, 1.0f) / deviation[i] : 1.0f;
      mean[i] = exists ? read(norm.mean, channel + i, 0.0f) : 0.0f;
      bias[i] = exists ? read(norm.bias, channel + i, 0.0f) : 0.0f;
    }
  }
};

// A step of the backward pass, through activation(norm(value)): the gradient of its result, and its inputs.
template <class T>
struct Step {
  TokenView<const T> grad, values;
  ChannelNorm norm;
  Activation activation;
};

// Per block and channel the sums of d and of d * xhat, with d = grad * activation'(norm(value)) and xhat the normalised
// value: (splits, 2, C).
template <class T, int V>
struct NormSums : RowKernel<T, V> {
  using Base = RowKernel<T, V>;
  using Base::channels;
  using Base::walkers;

  Step<T> step;
  double* partials;

  NormSums(const TokenDepthwiseConv& op, const Step<T>& of, int64_t tokens, double* results)
      : Base(op, tokens), step(of), partials(results) {}

  FASTVIT_DEVICE int64_t shared_bytes() const { return 2 * walkers * channels * static_cast<int64_t>(sizeof(float)); }

  struct State {
    float plain[V], weighted[V];
  };

  FASTVIT_DEVICE void compute(State& state, const Place& place, int64_t) const {
    const int64_t channel = this->channel_of(place);
    clear(state.plain);
    clear(state.weighted);
    if (channel >= this->op.channels) return;
    const NormLanes<V> norm(step.norm, channel);
    this->for_each_row(place, [&](int64_t image, int64_t token) {
      float grad[V], value[V];
      load_wide<T, V>(step.grad.grid(image, token, channel), grad);
      load_wide<T, V>(step.values.grid(image, token, channel), value);
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) {
        const float centred = value[i] - norm.mean[i];
        const float d = grad[i] * derivative(step.activation, fmaf(centred, norm.scale[i], norm.bias[i]));
        state.plain[i] += d;
        state.weighted[i] = fmaf(d, centred, state.weighted[i]);
      }
    });
  }

  FASTVIT_DEVICE void flush(State& state, const Place& place) const {
    auto* shared = reinterpret_cast<float*>(place.shared);
    store_floats<V>(state.plain, shared + place.thread * V);
    store_floats<V>(state.weighted, shared + (kThreads + place.thread) * V);
  }

  FASTVIT_DEVICE void finish(State&, const Place& place) const {
    const int64_t split = place.block / this->division.channel_blocks;
    for (int k = place.thread; k < 2 * channels; k += kThreads) {
      const int which = k / channels, c = k % channels;
      const int64_t channel = this->first_channel(place) + c;
      if (channel >= this->op.channels) continue;
      const auto* terms = reinterpret_cast<const float*>(place.shared) + which * walkers * channels + c;
      double sum = 0.0;
      FASTVIT_NO_UNROLL
      for (int w = 0; w < walkers; ++w) sum += terms[w * channels];
      if (which == 1) sum /= exact_deviation(step.norm, channel);
      partials[(split * 2 + which) * this->op.channels + channel] = sum;
    }
  }
};

// Adds up partial sums (splits, rows, C). The first `taps` rows go to first (C, taps), the next to second (C), all of
// them to whole (rows, C); each unless null.
template <class Partial>
struct SumPartials : BlockKernel {
  static constexpr int lanes = 32, walkers = kThreads / lanes;

  const Partial* partials;
  int64_t splits, rows, channels, taps;
  float *first, *second;
  double* whole;

  int64_t grid() const { return divide_up(rows * channels, lanes); }
  FASTVIT_DEVICE int64_t shared_bytes() const { return kThreads * static_cast<int64_t>(sizeof(double)); }

  FASTVIT_DEVICE void compute(State&, const Place& place, int64_t) const {
    const int64_t size = rows * channels, k = place.block * lanes + place.thread % lanes;
    double sum = 0.0;
    for (int64_t split = place.thread / lanes; split < splits && k < size; split += walkers) {
      sum += partials[split * size + k];
    }
    reinterpret_cast<double*>(place.shared)[place.thread] = sum;
  }

  FASTVIT_DEVICE void finish(State&, const Place& place) const {
    const int64_t k = place.block * lanes + place.thread;
    if (place.thread >= lanes || k >= rows * channels) return;
    double sum = 0.0;
    FASTVIT_NO_UNROLL
    for (int w = 0; w < walkers; ++w) sum += reinterpret_cast<const double*>(place.shared)[w * lanes + place.thread];
    const int64_t row = k / channels, channel = k % channels;
    if (whole != nullptr) whole[k] = sum;
    if (row < taps && first != nullptr) first[channel * taps + row] = static_cast<float>(sum);
    if (row >= taps && second != nullptr) second[channel] = static_cast<float>(sum);
  }
};

// --- Element-wise passes ---------------------------------------------------------------------------------------------

// out = activation(norm(conv)) [+ x]; prefix tokens are copied from x.
template <class T, int V>
struct Finish : RowKernel<T, V> {
  using Base = RowKernel<T, V>;
  const void* conv;

  Finish(const TokenDepthwiseConv& op, const void* result)
      : Base(op, op.prefix_tokens + op.out_height * op.out_width), conv(result) {}

  FASTVIT_DEVICE int64_t shared_bytes() const { return 0; }

  using State = BlockKernel::State;
  FASTVIT_DEVICE void compute(State&, const Place& place, int64_t) const {
    const TokenDepthwiseConv& op = this->op;
    const int64_t channel = this->channel_of(place), tokens = op.out_height * op.out_width;
    if (channel >= op.channels) return;
    const NormLanes<V> norm(op.norm, channel);
    const auto x = input_of<T>(op);
    const auto from = contiguous_view<const T>(op, conv, tokens);
    const auto out = contiguous_view<T>(op, op.out, tokens);
    this->for_each_row(place, [&](int64_t image, int64_t token) {
      T* to = out.at(image, token, channel);
      if (token < op.prefix_tokens) {
        store_pack<T, V>(load_pack<T, V>(x.at(image, token, channel)), to);
        return;
      }
      float value[V], added[V] = {};
      load_wide<T, V>(from.at(image, token, channel), value);
      if (op.residual) load_wide<T, V>(x.at(image, token, channel), added);
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) value[i] = fmaf(value[i] - norm.mean[i], norm.scale[i], norm.bias[i]);
      activate_all<T>(op.activation, value);
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) value[i] += added[i];
      store_narrow<T, V>(value, to);
    });
  }
};

// The gradient of a norm's input from d, that of its output: scale * d, minus the part through batch statistics.
template <int V>
struct NormGradient {
  NormLanes<V> norm;
  float constant[V], slope[V];

  // sums: (2, C), from NormSums over `count` values, or null if the statistics were given.
  FASTVIT_DEVICE NormGradient(const ChannelNorm& of, int64_t channel, int64_t channels, const double* sums,
                              int64_t count)
      : norm(of, channel) {
    clear(constant);
    clear(slope);
    if (sums == nullptr) return;
    const double values = static_cast<double>(count);
    FASTVIT_UNROLL
    for (int i = 0; i < V; ++i) {
      constant[i] = static_cast<float>(sums[channel + i] / values);
      slope[i] = static_cast<float>(sums[channels + channel + i] / (values * exact_deviation(of, channel + i)));
    }
  }

  FASTVIT_DEVICE float of(int i, float grad, float value, Activation activation) const {
    const float centred = value - norm.mean[i];
    const float d = grad * derivative(activation, fmaf(centred, norm.scale[i], norm.bias[i]));
    return norm.scale[i] * (d - constant[i] - centred * slope[i]);
  }
};

// dx from the gradient of pre_activation's output, [+ the output's]; for prefix tokens the output's.
template <class T, int V>
struct Apply : RowKernel<T, V> {
  using Base = RowKernel<T, V>;
  Step<T> step;
  TokenView<const T> grad;  // of the output
  const double* sums;
  T* dx;

  Apply(const TokenDepthwiseConv& op, const Step<T>& of, TokenView<const T> output_grad, const double* norm_sums, T* to)
      : Base(op, op.prefix_tokens + op.height * op.width), step(of), grad(output_grad), sums(norm_sums), dx(to) {}

  FASTVIT_DEVICE int64_t shared_bytes() const { return 0; }

  using State = BlockKernel::State;
  FASTVIT_DEVICE void compute(State&, const Place& place, int64_t) const {
    const TokenDepthwiseConv& op = this->op;
    const int64_t channel = this->channel_of(place), tokens = op.height * op.width;
    if (channel >= op.channels) return;
    const NormGradient<V> gradient(step.norm, channel, op.channels, sums, op.batch * tokens);
    const auto out = contiguous_view<T>(op, dx, tokens);
    this->for_each_row(place, [&](int64_t image, int64_t token) {
      T* to = out.at(image, token, channel);
      if (token < op.prefix_tokens) {
        store_pack<T, V>(load_pack<T, V>(grad.at(image, token, channel)), to);
        return;
      }
      float d[V], value[V], added[V] = {};
      load_wide<T, V>(step.grad.at(image, token, channel), d);
      load_wide<T, V>(step.values.at(image, token, channel), value);
      if (op.residual) load_wide<T, V>(grad.at(image, token, channel), added);
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) d[i] = gradient.of(i, d[i], value[i], step.activation) + added[i];
      store_narrow<T, V>(d, to);
    });
  }
};

}  // namespace fastvit::tokens
