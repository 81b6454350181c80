// Runs the CUDA kernels' per-thread functions on the host: for every block, each step for every thread in turn. So the
// indexing, the division of the work and the order of the passes are those of the GPU.
#pragma once

#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "token_depthwise_conv/cuda_passes.h"

using namespace fastvit;

namespace {

struct FreeMemory {
  void operator()(unsigned char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<unsigned char, FreeMemory>;

// All bits set: NaN in every floating type, so that what nobody wrote shows when it is read.
Memory poisoned(int64_t bytes) {
  const auto size = static_cast<size_t>((bytes + 64) / 64 * 64);
  Memory memory(static_cast<unsigned char*>(std::aligned_alloc(64, size)));
  std::memset(memory.get(), 0xff, size);
  return memory;
}

struct HostDevice {
  int64_t most_shared = 0, launches = 0;
  std::vector<Memory> memory;

  template <class Kernel>
  void run(const Kernel& kernel) {
    const int64_t bytes = kernel.shared_bytes();
    most_shared = larger(most_shared, bytes);
    ++launches;
    std::vector<typename Kernel::State> states(blocks::kThreads);
    const auto every_thread = [&](int64_t block, unsigned char* shared, const auto& step) {
      for (int thread = 0; thread < blocks::kThreads; ++thread) {
        step(states[static_cast<size_t>(thread)], blocks::Place{block, thread, shared});
      }
    };
    for (int64_t block = 0; block < kernel.grid(); ++block) {
      // Exactly as long as asked for: AddressSanitizer sees a step beyond it.
      const Memory shared = poisoned(bytes);
      std::memset(static_cast<void*>(states.data()), 0xff, states.size() * sizeof(states[0]));
      using State = typename Kernel::State;
      const int64_t rounds = kernel.rounds(blocks::Place{block, 0, shared.get()});
      every_thread(block, shared.get(), [&](State& s, const blocks::Place& at) { kernel.start(s, at); });
      for (int64_t round = 0; round < rounds; ++round) {
        every_thread(block, shared.get(), [&](State& s, const blocks::Place& at) { kernel.load(s, at, round); });
        every_thread(block, shared.get(), [&](State& s, const blocks::Place& at) { kernel.compute(s, at, round); });
      }
      every_thread(block, shared.get(), [&](State& s, const blocks::Place& at) { kernel.flush(s, at); });
      every_thread(block, shared.get(), [&](State& s, const blocks::Place& at) { kernel.finish(s, at); });
    }
  }

  template <class E>
  E* allocate(int64_t count) {
    memory.push_back(poisoned(count * static_cast<int64_t>(sizeof(E))));
    return reinterpret_cast<E*>(memory.back().get());
  }

  template <class T>
  void convolve(const TokenDepthwiseConv& op, void* conv) {
    tokens::convolve_tokens<T>(op, conv, *this);
  }
};

// What the test passes: an operator's numbers and its parameters, or null.
struct Arguments {
  const void *x, *parameters[10];  // weight, bias, then weight, bias, mean, var of pre_norm and of norm
  int64_t element, parameter_element, statistics_element;  // the last: of mean and var
  int64_t batch, channels, prefix, height, width, out_height, out_width, kernel, stride, padding;
  int64_t x_batch_stride, x_token_stride, pre_activation, activation, residual;
  float pre_eps, eps;
};

TokenDepthwiseConv describe(const Arguments& from) {
  TokenDepthwiseConv op{};
  const auto parameter = [&](int i) {
    return ChannelParameter{from.parameters[i], static_cast<Element>(from.parameter_element)};
  };
  const auto statistic = [&](int i) {
    return ChannelParameter{from.parameters[i], static_cast<Element>(from.statistics_element)};
  };
  op.x = from.x;
  op.element = static_cast<Element>(from.element);
  op.x_batch_stride = from.x_batch_stride;
  op.x_token_stride = from.x_token_stride;
  op.batch = from.batch;
  op.channels = from.channels;
  op.prefix_tokens = from.prefix;
  op.height = from.height;
  op.width = from.width;
  op.out_height = from.out_height;
  op.out_width = from.out_width;
  op.kernel = from.kernel;
  op.stride = from.stride;
  op.padding = from.padding;
  op.weight = parameter(0);
  op.bias = parameter(1);
  op.pre_norm = {parameter(2), parameter(3), statistic(4), statistic(5), from.pre_eps};
  op.norm = {parameter(6), parameter(7), statistic(8), statistic(9), from.eps};
  op.pre_activation = static_cast<Activation>(from.pre_activation);
  op.activation = static_cast<Activation>(from.activation);
  op.residual = from.residual != 0;
  return op;
}

}  // namespace
