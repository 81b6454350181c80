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
#include <string.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

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
#define FASTVIT_UNROLL_TWO _Pragma("unroll 2")
#define FASTVIT_NO_UNROLL _Pragma("unroll 1")
#else
#define FASTVIT_UNROLL
#define FASTVIT_UNROLL_TWO
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

// Division of numbers below 2^31 by one that is known at launch, in three instructions; nvcc's own takes twenty.
struct Divisor {
  uint32_t value = 1, multiplier = 1u << 31, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift) < value) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + value - 1) / value);
  }
  FASTVIT_DEVICE uint32_t quotient(uint32_t number) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(2 * number) * multiplier >> 32) >> shift;
  }
  // The remainder; the number becomes the quotient.
  FASTVIT_DEVICE uint32_t split(uint32_t& number) const {
    const uint32_t before = number;
    number = quotient(before);
    return before - number * value;
  }
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

// A pointer to global memory, of which nvcc may not remember how it came about: it would work it out anew for every
// access.
template <class T>
FASTVIT_DEVICE T* fixed(T* pointer) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// The element `count` steps of so many bytes on. Written so it is one instruction of nvcc's.
template <class T>
FASTVIT_DEVICE T* moved(T* pointer, int step_bytes, int count) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + static_cast<int64_t>(step_bytes) * count);
}

template <class To, class From>
FASTVIT_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);  // __half is no trivial type
  return to;
}

#ifdef __CUDACC__
using Half = __half;
using BFloat16 = __nv_bfloat16;
FASTVIT_DEVICE float widen(Half x) { return __half2float(x); }
FASTVIT_DEVICE float widen(BFloat16 x) { return __bfloat162float(x); }
FASTVIT_DEVICE void narrow(float x, Half& to) { to = __float2half_rn(x); }
FASTVIT_DEVICE void narrow(float x, BFloat16& to) { to = __float2bfloat16_rn(x); }
FASTVIT_DEVICE uint32_t narrow_two(float x, float y, Half) { return bits_as<uint32_t>(__floats2half2_rn(x, y)); }
FASTVIT_DEVICE uint32_t narrow_two(float x, float y, BFloat16) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(x, y));
}
#else
using Half = _Float16;
struct BFloat16 {
  uint16_t bits;
};
FASTVIT_DEVICE float widen(Half x) { return static_cast<float>(x); }
FASTVIT_DEVICE float widen(BFloat16 x) { return float_of_bfloat16(x.bits); }
FASTVIT_DEVICE void narrow(float x, Half& to) { to = static_cast<Half>(x); }
FASTVIT_DEVICE void narrow(float x, BFloat16& to) { to.bits = bfloat16_of_float(x); }
template <class T>
FASTVIT_DEVICE uint32_t narrow_two(float x, float y, T) {
  T both[2];
  narrow(x, both[0]);
  narrow(y, both[1]);
  uint32_t word;
  memcpy(&word, both, sizeof word);
  return word;
}
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

// V neighbouring elements as they lie in memory. In words where they fill some: of 16-bit elements one by one nvcc
// makes a move each, and splits a store of them.
template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  using Unit = std::conditional_t<V * sizeof(T) % 4 == 0, uint32_t, T>;
  Unit units[V * sizeof(T) / sizeof(Unit)];
};

template <class T, int V>
FASTVIT_DEVICE Pack<T, V> load_pack(const T* from) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Pack<T, V>) == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    return {{words.x, words.y, words.z, words.w}};
  }
#endif
  Pack<T, V> pack;
  memcpy(&pack, from, sizeof pack);
  return pack;
}

template <class T, int V>
FASTVIT_DEVICE void store_pack(const Pack<T, V>& pack, T* to) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof pack == 16) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack.units[0], pack.units[1], pack.units[2], pack.units[3]);
    return;
  }
#endif
  memcpy(static_cast<void*>(to), &pack, sizeof pack);
}

template <class T, int V>
FASTVIT_DEVICE void widen_pack(const Pack<T, V>& pack, float (&values)[V]) {
  constexpr int each = sizeof(pack.units[0]) / sizeof(T);
  FASTVIT_UNROLL
  for (int i = 0; i < V; i += each) {
    const auto unit = pack.units[i / each];
    if constexpr (each == 1) {
      values[i] = widen(bits_as<T>(unit));
    } else if constexpr (std::is_same_v<T, BFloat16>) {  // the upper half of a float
      values[i] = bits_as<float>(unit << 16);
      values[i + 1] = bits_as<float>(unit & 0xffff0000u);
    } else {
      values[i] = widen(bits_as<T>(static_cast<uint16_t>(unit)));
      values[i + 1] = widen(bits_as<T>(static_cast<uint16_t>(unit >> 16)));
    }
  }
}

template <class T, int V>
FASTVIT_DEVICE void load_wide(const T* from, float (&values)[V]) {
  widen_pack(load_pack<T, V>(from), values);
}

template <class T, int V>
FASTVIT_DEVICE void store_narrow(const float (&values)[V], T* to) {
  Pack<T, V> pack;
  using Unit = typename Pack<T, V>::Unit;
  constexpr int each = sizeof(Unit) / sizeof(T);
  FASTVIT_UNROLL
  for (int i = 0; i < V; i += each) {
    if constexpr (each == 1) {
      T one;
      narrow(values[i], one);
      pack.units[i] = bits_as<Unit>(one);
    } else {
      pack.units[i / each] = narrow_two(values[i], values[i + 1], T{});
    }
  }
  store_pack<T, V>(pack, to);
}

// Copies V elements from global to shared memory, past the registers where it can be done, or zeros. They have arrived
// behind finish_copies() and a barrier.
template <class T, int V>
FASTVIT_DEVICE void copy_pack(const T* from, bool exists, T* to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Pack<T, V>) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(exists ? 16 : 0)
                 : "memory");
    return;
  }
#endif
  store_pack<T, V>(exists ? load_pack<T, V>(from) : Pack<T, V>{}, to);
}

FASTVIT_DEVICE void finish_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// V floats from or to shared memory, in vectors of up to 16 bytes.
template <int V>
FASTVIT_DEVICE void load_floats(const float* from, float (&values)[V]) {
  constexpr int step = V < 4 ? V : 4;
  FASTVIT_UNROLL
  for (int i = 0; i < V; i += step) {
    float part[step];
    load_wide<float, step>(from + i, part);
    FASTVIT_UNROLL
    for (int j = 0; j < step; ++j) values[i + j] = part[j];
  }
}

template <int V>
FASTVIT_DEVICE void store_floats(const float (&values)[V], float* to) {
  constexpr int step = V < 4 ? V : 4;
  FASTVIT_UNROLL
  for (int i = 0; i < V; i += step) {
    float part[step];
    FASTVIT_UNROLL
    for (int j = 0; j < step; ++j) part[j] = values[i + j];
    store_narrow<float, step>(part, to + i);
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

// 1 / x and 2^x by one instruction, without care for denormals.
FASTVIT_DEVICE float near_inverse(float x) {
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return 1.0f / x;
#endif
}

FASTVIT_DEVICE float near_exp2(float x) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return exp2f(x);
#endif
}

// GELU for 16-bit results, in ten instructions: x times the sigmoid of log(Phi(x) / Phi(-x)), which is odd, and here a
// polynomial, fitted by weighted least squares. The error is at most 6e-5 of the result, or 2e-6 where it is small.
FASTVIT_DEVICE float near_gelu(float x) {
  const float t = x * x;
  float odds = fmaf(fmaf(-2.5261975e-6f, t, 7.1039184e-5f), t, 4.9203e-4f);  // of -x, in base 2, over x
  odds = fmaf(fmaf(odds, t, -0.105580902f), t, -2.30179688f);
  return x * near_inverse(1.0f + near_exp2(odds * x));
}

FASTVIT_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::relu: return x < 0.0f ? 0.0f : x;  // keeps NaN
    case Activation::gelu_tanh: return x / (1.0f + expf(-twice_tanh_argument(x)));
    default: return x / (1.0f + expf(-slope_of(activation) * x));
  }
}

// Of all values, whose results are rounded to T.
template <class T, int V>
FASTVIT_DEVICE void activate_all(Activation activation, float (&values)[V]) {
  if (sizeof(T) == 2 && activation == Activation::gelu) {
    FASTVIT_UNROLL
    for (int i = 0; i < V; ++i) values[i] = near_gelu(values[i]);
    return;
  }
  FASTVIT_UNROLL
  for (int i = 0; i < V; ++i) values[i] = activate(activation, values[i]);
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
