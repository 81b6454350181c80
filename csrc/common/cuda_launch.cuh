// Runs the kernels of cuda_block_kernel.h on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "common/cuda_block_kernel.h"
#include "common/torch_abi.h"

namespace fastvit::blocks {

template <class Kernel>
__global__ void __launch_bounds__(kThreads, Kernel::min_blocks) run_block(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Place place{blockIdx.x, static_cast<int>(threadIdx.x), shared};
  typename Kernel::State state;
  kernel.start(state, place);
  __syncthreads();
  const int64_t rounds = kernel.rounds(place);
  for (int64_t round = 0; round < rounds; ++round) {
    kernel.load(state, place, round);
    __syncthreads();
    kernel.compute(state, place, round);
    __syncthreads();
  }
  kernel.flush(state, place);
  __syncthreads();
  kernel.finish(state, place);
}

// Launches on the current stream of a tensor's device, and allocates there.
class CudaDevice {
 public:
  CudaDevice(const Tensor& tensor, const char* op) : op_(op), like_(tensor), guard_(tensor) {
    // This binary has its own copy of the CUDA runtime, which does not see the current device of torch's copy.
    check_cuda(cudaSetDevice(tensor.device_index()), "cannot use the device");
    stream_ = static_cast<cudaStream_t>(current_cuda_stream(tensor));
  }

  template <class Kernel>
  void run(const Kernel& kernel) {
    const int64_t blocks = kernel.grid(), bytes = kernel.shared_bytes();
    if (blocks == 0) return;
    check(blocks <= INT32_MAX, op_, ": ", blocks, " blocks exceed the CUDA grid");
    check(bytes <= kMaxSharedBytes, op_, ": for this shape the CUDA kernel needs ", bytes,
          " bytes of shared memory, of ", kMaxSharedBytes, " available");
    if (bytes > kFreeSharedBytes) {
      check_cuda(
          cudaFuncSetAttribute(run_block<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "cannot reserve shared memory");
    }
    run_block<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(bytes), stream_>>>(kernel);
    check_cuda(cudaGetLastError(), "the CUDA kernel did not start");
  }

  template <class E>
  E* allocate(int64_t count) {
    // Stream-ordered: torch's allocator reuses what is freed after the pass only once the pass's kernels have ended.
    memory_.push_back(empty({divide_up(count * static_cast<int64_t>(sizeof(E)), 4)}, like_, Dtype::float32));
    return reinterpret_cast<E*>(memory_.back().template mutable_data<void>());
  }

 private:
  void check_cuda(cudaError_t error, const char* what) const {
    check(error == cudaSuccess, op_, ": ", what, ": ", cudaGetErrorString(error));
  }

  const char* op_;
  const Tensor& like_;
  DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> memory_;
};

}  // namespace fastvit::blocks
