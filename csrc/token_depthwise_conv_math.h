// What one thread of the CUDA kernel does, in functions that also compile as plain C++: a test on the host runs them,
// thread by thread, over whole tensors, and so proves the indexing without a GPU.
//
// A block computes a tile of tile_height x tile_width outputs of `block_channels` channels of one image, in three steps
// with a barrier behind each: the parameters of its channels to shared memory, with the norms folded in
// (load_parameters); the input tile with its halo, normalised and activated, in float32 (load_tile); the outputs
// (make_outputs). Each thread handles a vector of V neighbouring channels, 16 bytes where alignment allows.
#pragma once

#include <math.h>

#include <cstdint>

#include "token_depthwise_conv.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTVIT_DEVICE __host__ __device__ __forceinline__
#else
#define FASTVIT_DEVICE inline
#endif
#ifdef __CUDA_ARCH__
#define FASTVIT_UNROLL _Pragma("unroll")
#else
#define FASTVIT_UNROLL
#endif

namespace fastvit::tokens {

constexpr int kThreads = 256;
constexpr int kSharedBytes = 48 << 10;  // what every GPU gives without asking

#ifdef __CUDACC__
using Half = __half;
using BFloat16 = __nv_bfloat16;
FASTVIT_DEVICE float widen(Half x) { return __half2float(x); }
FASTVIT_DEVICE float widen(BFloat16 x) { return __bfloat162float(x); }
FASTVIT_DEVICE void narrow(float x, Half& to) { to = __float2half_rn(x); }
FASTVIT_DEVICE void narrow(float x, BFloat16& to) { to = __float2bfloat16_rn(x); }
#else
using Half = _Float16;
struct BFloat16 {
  uint16_t bits;
};
FASTVIT_DEVICE float widen(Half x) { return static_cast<float>(x); }
FASTVIT_DEVICE float widen(BFloat16 x) {
  union {
    uint32_t bits;
    float value;
  } u{static_cast<uint32_t>(x.bits) << 16};
  return u.value;
}
FASTVIT_DEVICE void narrow(float x, Half& to) { to = static_cast<Half>(x); }
FASTVIT_DEVICE void narrow(float x, BFloat16& to) {
  union {
    float value;
    uint32_t bits;
  } u{x};
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
}
#endif
FASTVIT_DEVICE float widen(float x) { return x; }
FASTVIT_DEVICE void narrow(float x, float& to) { to = x; }

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T v[V];
};

// V floats from or to shared memory, in vectors of up to 16 bytes.
template <int V>
FASTVIT_DEVICE void load_floats(const float* from, float (&values)[V]) {
  constexpr int step = V < 4 ? V : 4;
  FASTVIT_UNROLL
  for (int i = 0; i < V; i += step) {
    const auto pack = *reinterpret_cast<const Pack<float, step>*>(from + i);
    FASTVIT_UNROLL
    for (int j = 0; j < step; ++j) values[i + j] = pack.v[j];
  }
}

template <int V>
FASTVIT_DEVICE void store_floats(const float (&values)[V], float* to) {
  constexpr int step = V < 4 ? V : 4;
  FASTVIT_UNROLL
  for (int i = 0; i < V; i += step) {
    Pack<float, step> pack;
    FASTVIT_UNROLL
    for (int j = 0; j < step; ++j) pack.v[j] = values[i + j];
    *reinterpret_cast<Pack<float, step>*>(to + i) = pack;
  }
}

FASTVIT_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::quick_gelu: return x / (1.0f + expf(-1.702f * x));
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::relu: return x < 0.0f ? 0.0f : x;  // keeps NaN
    default: return x;
  }
}

FASTVIT_DEVICE float read(const ChannelParameter& parameter, int64_t i, float absent) {
  if (parameter.data == nullptr) return absent;
  switch (parameter.element) {
    case Element::bfloat16: return widen(static_cast<const BFloat16*>(parameter.data)[i]);
    case Element::float16: return widen(static_cast<const Half*>(parameter.data)[i]);
    default: return static_cast<const float*>(parameter.data)[i];
  }
}

struct Affine {
  float scale, shift;
};

FASTVIT_DEVICE Affine fold(const ChannelNorm& norm, int64_t channel) {
  if (norm.mean.data == nullptr) return {1.0f, 0.0f};
  const float scale = read(norm.weight, channel, 1.0f) / sqrtf(read(norm.var, channel, 1.0f) + norm.eps);
  return {scale, read(norm.bias, channel, 0.0f) - read(norm.mean, channel, 0.0f) * scale};
}

// The division of the work.
struct Plan {
  int lanes;           // threads side by side along the channels
  int block_channels;  // lanes * V
  int tile_height, tile_width, halo_height, halo_width;
  int64_t channel_blocks, tile_rows, tile_columns;

  FASTVIT_DEVICE int64_t blocks(int64_t batch) const { return batch * tile_rows * tile_columns * channel_blocks; }
  FASTVIT_DEVICE int taps(int64_t kernel) const { return static_cast<int>(kernel * kernel); }
  // Shared memory: taps, then shift, pre-scale and pre-shift, then the tile, all in rows of block_channels.
  FASTVIT_DEVICE int64_t shared_floats(int64_t kernel) const {
    return static_cast<int64_t>(block_channels) * (taps(kernel) + 3 + halo_height * halo_width);
  }
};

FASTVIT_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of up to 8 x 16 outputs, evened out over the map, as many as fit into shared memory. Gives tile_height 0 where
// not even one output fits (a kernel of 14 or more).
inline Plan make_plan(const TokenDepthwiseConv& op, int lanes, int vector) {
  Plan plan{};
  plan.lanes = lanes;
  plan.block_channels = lanes * vector;
  plan.channel_blocks = divide_up(op.channels, plan.block_channels);
  const auto set_tile = [&](int64_t height, int64_t width) {
    plan.tile_rows = divide_up(op.out_height, height);
    plan.tile_columns = divide_up(op.out_width, width);
    plan.tile_height = static_cast<int>(divide_up(op.out_height, plan.tile_rows));
    plan.tile_width = static_cast<int>(divide_up(op.out_width, plan.tile_columns));
    plan.halo_height = static_cast<int>((plan.tile_height - 1) * op.stride + op.kernel);
    plan.halo_width = static_cast<int>((plan.tile_width - 1) * op.stride + op.kernel);
    return plan.shared_floats(op.kernel) * static_cast<int64_t>(sizeof(float)) <= kSharedBytes;
  };
  int64_t height = 8, width = 16;
  while (!set_tile(height, width)) {
    if (height == 1 && width == 1) {
      plan.tile_height = 0;
      break;
    }
    (width > height ? width : height) /= 2;
  }
  return plan;
}

// A block's place in the work, and its shared memory.
struct Block {
  int64_t image, first_channel, first_row, first_column;  // of the outputs
  float *taps, *shift, *pre_scale, *pre_shift, *tile;

  FASTVIT_DEVICE Block(const TokenDepthwiseConv& op, const Plan& plan, int64_t index, float* shared) {
    first_channel = index % plan.channel_blocks * plan.block_channels;
    index /= plan.channel_blocks;
    first_column = index % plan.tile_columns * plan.tile_width;
    index /= plan.tile_columns;
    first_row = index % plan.tile_rows * plan.tile_height;
    image = index / plan.tile_rows;
    taps = shared;
    shift = taps + plan.taps(op.kernel) * plan.block_channels;
    pre_scale = shift + plan.block_channels;
    pre_shift = pre_scale + plan.block_channels;
    tile = pre_shift + plan.block_channels;
  }
};

// Step 1. Lanes behind the last channel get zeros.
FASTVIT_DEVICE void load_parameters(const TokenDepthwiseConv& op, const Plan& plan, const Block& block, int thread) {
  const int area = plan.taps(op.kernel);
  for (int i = thread; i < plan.block_channels; i += kThreads) {
    const int64_t channel = block.first_channel + i;
    const bool exists = channel < op.channels;
    const Affine pre = exists ? fold(op.pre_norm, channel) : Affine{0.0f, 0.0f};
    const Affine post = exists ? fold(op.norm, channel) : Affine{0.0f, 0.0f};
    block.pre_scale[i] = pre.scale;
    block.pre_shift[i] = pre.shift;
    block.shift[i] = exists ? fmaf(read(op.bias, channel, 0.0f), post.scale, post.shift) : 0.0f;
    for (int tap = 0; tap < area; ++tap) {
      block.taps[tap * plan.block_channels + i] =
          exists ? read(op.weight, channel * area + tap, 0.0f) * post.scale : 0.0f;
    }
  }
}

// Where a grid token of x begins, in elements.
FASTVIT_DEVICE int64_t x_offset(const TokenDepthwiseConv& op, int64_t image, int64_t row, int64_t column) {
  return image * op.x_batch_stride + (op.prefix_tokens + row * op.width + column) * op.x_token_stride;
}

// Step 2: x on the tile and its halo, zeros outside of the map.
template <class T, int V>
FASTVIT_DEVICE void load_tile(const TokenDepthwiseConv& op, const Plan& plan, const Block& block, int thread) {
  const int lane = thread % plan.lanes, walkers = kThreads / plan.lanes;
  const int c = lane * V;
  const int64_t channel = block.first_channel + c;
  const int64_t top = block.first_row * op.stride - op.padding, left = block.first_column * op.stride - op.padding;
  const bool exists = channel < op.channels;  // V divides the channels
  const T* x = static_cast<const T*>(op.x) + channel;
  const bool normalise = op.pre_norm.mean.data != nullptr;
  for (int position = thread / plan.lanes; position < plan.halo_height * plan.halo_width; position += walkers) {
    const int64_t row = top + position / plan.halo_width, column = left + position % plan.halo_width;
    float values[V];
    FASTVIT_UNROLL
    for (int i = 0; i < V; ++i) values[i] = 0.0f;
    if (exists && row >= 0 && row < op.height && column >= 0 && column < op.width) {
      const auto pack = *reinterpret_cast<const Pack<T, V>*>(x + x_offset(op, block.image, row, column));
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) {
        float value = widen(pack.v[i]);
        if (normalise) value = fmaf(value, block.pre_scale[c + i], block.pre_shift[c + i]);
        values[i] = activate(op.pre_activation, value);
      }
    }
    store_floats<V>(values, block.tile + position * plan.block_channels + c);
  }
}

// Sums taps over one output's window. K is the kernel, 0 where it is known at run time only.
template <int K, int V>
FASTVIT_DEVICE void convolve(const Plan& plan, int64_t kernel, const float* window, const float* taps,
                             float (&sum)[V]) {
  const int size = K > 0 ? K : static_cast<int>(kernel);
  FASTVIT_UNROLL
  for (int dy = 0; dy < size; ++dy) {
    FASTVIT_UNROLL
    for (int dx = 0; dx < size; ++dx) {
      float tap[V], value[V];
      load_floats<V>(taps + (dy * size + dx) * plan.block_channels, tap);
      load_floats<V>(window + (dy * plan.halo_width + dx) * plan.block_channels, value);
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) sum[i] = fmaf(value[i], tap[i], sum[i]);
    }
  }
}

// Step 3. The blocks of the first tile also copy the prefix tokens of their channels.
template <class T, int V, int K>
FASTVIT_DEVICE void make_outputs(const TokenDepthwiseConv& op, const Plan& plan, const Block& block, int thread) {
  const int lane = thread % plan.lanes, walker = thread / plan.lanes, walkers = kThreads / plan.lanes;
  const int c = lane * V;
  const int64_t channel = block.first_channel + c;
  if (channel >= op.channels) return;
  const T* x = static_cast<const T*>(op.x) + channel;
  T* out =
      static_cast<T*>(op.out) + channel + block.image * (op.prefix_tokens + op.out_height * op.out_width) * op.channels;
  if (block.first_row == 0 && block.first_column == 0) {
    for (int64_t token = walker; token < op.prefix_tokens; token += walkers) {
      *reinterpret_cast<Pack<T, V>*>(out + token * op.channels) =
          *reinterpret_cast<const Pack<T, V>*>(x + block.image * op.x_batch_stride + token * op.x_token_stride);
    }
  }
  const int stride = static_cast<int>(op.stride);
  for (int position = walker; position < plan.tile_height * plan.tile_width; position += walkers) {
    const int tile_row = position / plan.tile_width, tile_column = position % plan.tile_width;
    const int64_t row = block.first_row + tile_row, column = block.first_column + tile_column;
    if (row >= op.out_height || column >= op.out_width) continue;
    float sum[V];
    load_floats<V>(block.shift + c, sum);
    const int corner = tile_row * stride * plan.halo_width + tile_column * stride;
    convolve<K, V>(plan, op.kernel, block.tile + corner * plan.block_channels + c, block.taps + c, sum);
    Pack<T, V> pack;
    if (op.residual) {
      pack = *reinterpret_cast<const Pack<T, V>*>(x + x_offset(op, block.image, row, column));
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) sum[i] = activate(op.activation, sum[i]) + widen(pack.v[i]);
    } else {
      FASTVIT_UNROLL
      for (int i = 0; i < V; ++i) sum[i] = activate(op.activation, sum[i]);
    }
    FASTVIT_UNROLL
    for (int i = 0; i < V; ++i) narrow(sum[i], pack.v[i]);
    *reinterpret_cast<Pack<T, V>*>(out + (op.prefix_tokens + row * op.out_width + column) * op.channels) = pack;
  }
}

}  // namespace fastvit::tokens
