// CUDA kernels as plain C++: what one thread of a block does, in functions that also compile for the host, where a test
// runs them over whole tensors and so checks the indexing without a GPU.
//
// A kernel is a struct of plain data, passed by value at launch, with
//     State                                a thread's registers, kept from step to step
//     start(state, place)                  once; then a barrier
//     load(state, place, round)            in every round below rounds(place); then a barrier
//     compute(state, place, round)         after it; then a barrier
//     flush(state, place)                  once, after all rounds; then a barrier
//     finish(state, place)                 once
//     shared_bytes()                       shared memory of a block
//     min_blocks                           resident blocks per multiprocessor, which bounds the registers
// Between two barriers no thread of a block reads what another one writes. BlockKernel has the empty steps to inherit.
// cuda_launch.cuh runs kernels on a GPU.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

#include "common/activation.h"
#include "common/integers.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTVIT_DEVICE __host__ __device__ __forceinline__
#else
#include "common/bfloat16.h"
#define FASTVIT_DEVICE inline
#endif
#ifdef __CUDA_ARCH__
#define FASTVIT_UNROLL _Pragma("unroll")
#define FASTVIT_NO_UNROLL _Pragma("unroll 1")
#else
#define FASTVIT_UNROLL
#define FASTVIT_NO_UNROLL
#endif

namespace fastvit::blocks {

constexpr int kThreads = 256;
constexpr int64_t kFreeSharedBytes = 48 << 10;  // available on every GPU by default
constexpr int64_t kSharedBytes = 56 << 10;      // two blocks fit from compute capability 8.0 on
constexpr int64_t kMaxSharedBytes = 96 << 10;   // available from 8.0 on upon request
#ifndef FASTVIT_BLOCKS  // fewer in a test, so that blocks of small tensors process several tiles
#define FASTVIT_BLOCKS 1024
#endif
constexpr int64_t kBlocks = FASTVIT_BLOCKS;  // enough for any GPU, and fixed, so that results do not depend on the GPU

// Where a thread is.
struct Place {
  int64_t block;
  int thread;
  unsigned char* shared;
};

struct BlockKernel {
  struct State {};
  static constexpr int min_blocks = 2;
  FASTVIT_DEVICE int64_t rounds(const Place&) const { return 1; }
  template <class S>
  FASTVIT_DEVICE void start(S&, const Place&) const {}
  template <class S>
  FASTVIT_DEVICE void load(S&, const Place&, int64_t) const {}
  template <class S>
  FASTVIT_DEVICE void flush(S&, const Place&) const {}
  template <class S>
  FASTVIT_DEVICE void finish(S&, const Place&) const {}
};

// --- Elements --------------------------------------------------------------------------------------------------------

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
FASTVIT_DEVICE float widen(BFloat16 x) { return float_of_bfloat16(x.bits); }
FASTVIT_DEVICE void narrow(float x, Half& to) { to = static_cast<Half>(x); }
FASTVIT_DEVICE void narrow(float x, BFloat16& to) { to.bits = bfloat16_of_float(x); }
#endif
FASTVIT_DEVICE float widen(float x) { return x; }
FASTVIT_DEVICE void narrow(float x, float& to) { to = x; }

// A thread processes V neighbouring channels: 16 bytes if aligned, otherwise one element. `lanes` neighbouring threads
// cover the channels of a block; `walkers` such rows of threads iterate over the tokens.
template <class T, int V>
struct Lanes {
  static constexpr int lanes = V > 1 ? 8 : 32;
  static constexpr int walkers = kThreads / lanes;
  static constexpr int channels = lanes * V;
};

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T v[V];
};

template <class T, int V>
FASTVIT_DEVICE Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <class T, int V>
FASTVIT_DEVICE void store_pack(const Pack<T, V>& pack, T* to) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

template <class T, int V>
FASTVIT_DEVICE void load_wide(const T* from, float (&values)[V]) {
  const auto pack = load_pack<T, V>(from);
  FASTVIT_UNROLL
  for (int i = 0; i < V; ++i) values[i] = widen(pack.v[i]);
}

template <class T, int V>
FASTVIT_DEVICE void store_narrow(const float (&values)[V], T* to) {
  Pack<T, V> pack;
  FASTVIT_UNROLL
  for (int i = 0; i < V; ++i) narrow(values[i], pack.v[i]);
  store_pack<T, V>(pack, to);
}

// V floats from or to shared memory, in vectors of up to 16 bytes.
template <int V>
FASTVIT_DEVICE void load_floats(const float* from, float (&values)[V]) {
  constexpr int step = V < 4 ? V : 4;
  FASTVIT_UNROLL
  for (int i = 0; i < V; i += step) {
    const auto pack = load_pack<float, step>(from + i);
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
    store_pack<float, step>(pack, to + i);
  }
}

template <int V>
FASTVIT_DEVICE void clear(float (&values)[V]) {
  FASTVIT_UNROLL
  for (int i = 0; i < V; ++i) values[i] = 0.0f;
}

// --- Functions -------------------------------------------------------------------------------------------------------

// quick_gelu and silu are x times the sigmoid of slope x.
FASTVIT_DEVICE float slope_of(Activation activation) { return activation == Activation::quick_gelu ? 1.702f : 1.0f; }

// gelu_tanh is x times the sigmoid of this.
FASTVIT_DEVICE float twice_tanh_argument(float x) { return x * fmaf(x * x, 0.07135481627f, 1.59576912161f); }

FASTVIT_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::relu: return x < 0.0f ? 0.0f : x;  // keeps NaN
    case Activation::gelu_tanh: return x / (1.0f + expf(-twice_tanh_argument(x)));
    default: return x / (1.0f + expf(-slope_of(activation) * x));
  }
}

// The derivative at x.
FASTVIT_DEVICE float derivative(Activation activation, float x) {
  switch (activation) {
    case Activation::none: return 1.0f;
    case Activation::gelu: {
      // x phi(x) underflows long before x * x overflows.
      const float near = x > 30.0f ? 30.0f : x < -30.0f ? -30.0f : x;
      return fmaf(near * 0.39894228f, expf(-0.5f * near * near), 0.5f * (1.0f + erff(x * 0.70710678f)));
    }
    case Activation::relu: return x <= 0.0f ? 0.0f : 1.0f;
    case Activation::gelu_tanh: {
      const float s = 1.0f / (1.0f + expf(-twice_tanh_argument(x)));
      return fmaf(x * (s * (1.0f - s)), fmaf(x * x, 0.21406444882f, 1.59576912161f), s);
    }
    default: {
      const float scaled = slope_of(activation) * x, s = 1.0f / (1.0f + expf(-scaled));
      return s * fmaf(scaled, 1.0f - s, 1.0f);
    }
  }
}

}  // namespace fastvit::blocks
