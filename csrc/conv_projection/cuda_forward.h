// CvT's depthwise convolutions of q, k and v from one reading of x on a GPU, as a BlockKernel.
//
// It is the convolution of q (token_depthwise_conv/cuda_forward.h), of kernel 3 and stride 1, whose input tile k and v,
// of kernel 3 and stride 2, read as well: a thread computes two neighbouring keys and the two values beside them, from
// the same windows. Other convolutions are computed one after another.
#pragma once

#include "conv_projection/args.h"
#include "token_depthwise_conv/cuda_passes.h"

namespace fastvit::tokens {

template <class T, int V>
struct ProjectionForward : Forward<T, V, 3, 1> {
  using Base = Forward<T, V, 3, 1>;
  using Base::channels;
  using Base::tiles;
  using Base::walkers;
  using State = typename Base::State;
  static constexpr int area = 9, stride = 2, pair = 2;

  TokenDepthwiseConv others[2];  // k and v
  Divisor pairs;                 // of a tile's row

  // Tiles begin at even rows and columns: where k and v begin anew.
  explicit ProjectionForward(const Projections& ops)
      : Base(ops[0], nullptr, stride, stride * Base::run),
        others{ops[1], ops[2]},
        pairs(divide_up(tiles.width / stride, pair)) {}

  // Whether q, k and v are such convolutions.
  static bool takes(const Projections& ops) {
    for (const TokenDepthwiseConv& op : ops) {
      if (op.kernel != 3 || op.padding != 1 || op.stride != (&op == &ops[0] ? 1 : stride) || !has_vectors<T>(op)) {
        return false;
      }
    }
    return V > 1 && ops[0].height * ops[0].width <= INT32_MAX && ops[0].channels <= INT32_MAX;
  }

  // Behind q's: taps and vectors of k and of v.
  static constexpr int other_floats = (area + Base::vectors) * channels;
  FASTVIT_DEVICE int64_t shared_bytes() const {
    return Base::shared_bytes() + 2 * other_floats * static_cast<int64_t>(sizeof(float));
  }
  FASTVIT_DEVICE float* taps_of(const Place& place, int which) const {
    return reinterpret_cast<float*>(place.shared + Base::shared_bytes()) + which * other_floats;
  }

  FASTVIT_DEVICE void start(State& state, const Place& place) const {
    this->find_tile(state, place);
    typename Base::Parameters parameters[3];
    parameters[0].load(this->op, state, place);
    parameters[1].load(others[0], state, place);
    parameters[2].load(others[1], state, place);
    this->start_copies(state, place);
    parameters[0].store(this->op, state, place, Base::floats(place));
    parameters[1].store(others[0], state, place, taps_of(place, 0));
    parameters[2].store(others[1], state, place, taps_of(place, 1));
  }

  FASTVIT_DEVICE void compute(State& state, const Place& place, int64_t round) const {
    Base::compute(state, place, round);
    compute_others(state, place);
  }

  FASTVIT_DEVICE void compute_others(const State& state, const Place& place) const {
    const int c = state.lane * V;
    const int64_t channel = state.first_channel + c;
    if (c >= state.count) return;
    const auto height = static_cast<int>(others[0].out_height), width = static_cast<int>(others[0].out_width);
    const int first_row = state.first_row / stride, first_column = state.first_column / stride;
    T* outs[2];
    FASTVIT_UNROLL
    for (int which = 0; which < 2; ++which) {
      const TokenDepthwiseConv& other = others[which];
      const auto out = contiguous_view<T>(other, other.out, other.out_height * other.out_width);
      if (first_row == 0 && first_column == 0) this->copy_prefix(state, channel, out);
      outs[which] = fixed(out.grid(state.image, 0, channel));
    }
    const int all_pairs = tiles.height / stride * static_cast<int>(pairs.value);
    for (int index = state.walker; index < all_pairs; index += walkers) {
      auto quotient = static_cast<uint32_t>(index);
      const int tile_column = static_cast<int>(pairs.split(quotient)) * pair, tile_row = static_cast<int>(quotient);
      const int row = first_row + tile_row, column = first_column + tile_column;
      if (row >= height) break;
      // A tile of 14 columns, seven of k's, is the only one of its rows: the last pair's second one is not in the map.
      const T* window = this->tile_of(place) + (tile_row * this->halo_width + tile_column) * stride * channels + c;
      float sums[2][pair][V];
      convolve_both(window, place, c, sums);
      const int count = width - column;
      const uint32_t token = static_cast<uint32_t>(row) * static_cast<uint32_t>(width) + static_cast<uint32_t>(column);
      const uint64_t offset = static_cast<uint64_t>(token) * static_cast<uint32_t>(this->op.channels);
      FASTVIT_UNROLL
      for (int which = 0; which < 2; ++which) {
        FASTVIT_UNROLL
        for (int r = 0; r < pair; ++r) Base::normalize(taps_of(place, which) + area * channels + c, sums[which][r]);
        FASTVIT_UNROLL
        for (int r = 0; r < pair; ++r) {
          if (r < count) store_narrow<T, V>(sums[which][r], moved(outs[which] + offset, this->out_step(), r));
        }
      }
    }
  }

  FASTVIT_DEVICE void convolve_both(const T* window, const Place& place, int c, float (&sums)[2][pair][V]) const {
    const float* taps[2] = {taps_of(place, 0) + c, taps_of(place, 1) + c};
    FASTVIT_UNROLL
    for (int which = 0; which < 2; ++which) {
      FASTVIT_UNROLL
      for (int r = 0; r < pair; ++r) load_floats<V>(taps[which] + (area + Base::bias) * channels, sums[which][r]);
    }
    const auto add_row = [&](int dy) {
      float tap[2][3][V];
      FASTVIT_UNROLL
      for (int which = 0; which < 2; ++which) {
        FASTVIT_UNROLL
        for (int dx = 0; dx < 3; ++dx) load_floats<V>(taps[which] + (dy * 3 + dx) * channels, tap[which][dx]);
      }
      FASTVIT_UNROLL
      for (int j = 0; j < (pair - 1) * stride + 3; ++j) {
        float value[V];
        load_wide<T, V>(window + (dy * this->halo_width + j) * channels, value);
        FASTVIT_UNROLL
        for (int r = 0; r < pair; ++r) {
          const int dx = j - r * stride;
          if (dx < 0 || dx > 2) continue;
          FASTVIT_UNROLL
          for (int which = 0; which < 2; ++which) {
            FASTVIT_UNROLL
            for (int i = 0; i < V; ++i) sums[which][r][i] = fmaf(value[i], tap[which][dx][i], sums[which][r][i]);
          }
        }
      }
    };
    add_row(0);
    FASTVIT_NO_UNROLL
    for (int dy = 1; dy < 3; ++dy) add_row(dy);
  }
};

// The three convolutions with their norms.
template <class T, class Device>
void project_tokens(const Projections& ops, Device& device) {
  using Together = ProjectionForward<T, 16 / sizeof(T)>;
  if (Together::takes(ops)) return device.run(Together(ops));
  for (const TokenDepthwiseConv& op : ops) device.template convolve<T>(op, nullptr);
}

}  // namespace fastvit::tokens
