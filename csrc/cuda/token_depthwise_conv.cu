// fastvit::token_depthwise_conv on CUDA: launch and registration. What a thread does is in
// ../token_depthwise_conv_math.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "../token_depthwise_conv_entry.h"
#include "../token_depthwise_conv_math.h"

namespace fastvit {
namespace {

template <class T, int V, int K>
__global__ void __launch_bounds__(tokens::kThreads, 2)
    token_depthwise_conv_kernel(const __grid_constant__ TokenDepthwiseConv op,
                                const __grid_constant__ tokens::Plan plan) {
  extern __shared__ __align__(16) float shared[];
  const tokens::Block block(op, plan, blockIdx.x, shared);
  const int thread = static_cast<int>(threadIdx.x);
  tokens::load_parameters(op, plan, block, thread);
  __syncthreads();
  tokens::load_tile<T, V>(op, plan, block, thread);
  __syncthreads();
  tokens::make_outputs<T, V, K>(op, plan, block, thread);
}

template <class T, int V, int K>
void launch(const TokenDepthwiseConv& op, int lanes, cudaStream_t stream) {
  const tokens::Plan plan = tokens::make_plan(op, lanes, V);
  check(plan.tile_height > 0, "token_depthwise_conv: a kernel of ", op.kernel, " is too large for the CUDA kernels");
  const int64_t blocks = plan.blocks(op.batch);
  check(blocks <= INT32_MAX, "token_depthwise_conv: ", blocks, " blocks are more than a CUDA grid has");
  const auto bytes = static_cast<size_t>(plan.shared_floats(op.kernel)) * sizeof(float);
  token_depthwise_conv_kernel<T, V, K><<<static_cast<unsigned>(blocks), tokens::kThreads, bytes, stream>>>(op, plan);
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "token_depthwise_conv: the CUDA kernel did not start: ", cudaGetErrorString(error));
}

// Whether every vector of 16 bytes that the kernel reads or writes is aligned.
template <int V>
bool is_aligned(const TokenDepthwiseConv& op) {
  const bool pointers = reinterpret_cast<uintptr_t>(op.x) % 16 == 0 && reinterpret_cast<uintptr_t>(op.out) % 16 == 0;
  return pointers && op.channels % V == 0 && op.x_token_stride % V == 0 && op.x_batch_stride % V == 0;
}

template <class T>
void launch_for(const TokenDepthwiseConv& op, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (!is_aligned<V>(op)) return launch<T, 1, 0>(op, 32, stream);
  switch (op.kernel) {
    case 3: return launch<T, V, 3>(op, 8, stream);
    case 5: return launch<T, V, 5>(op, 8, stream);
    case 7: return launch<T, V, 7>(op, 8, stream);
    default: return launch<T, 1, 0>(op, 32, stream);
  }
}

void run(const TokenDepthwiseConv& op, const Tensor& x) {
  const DeviceGuard guard(x);
  // torch's notion of the current device and this binary's own copy of the CUDA runtime agree through the driver only.
  check(cudaSetDevice(x.device_index()) == cudaSuccess, "token_depthwise_conv: cannot use CUDA device ",
        x.device_index());
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(x));
  switch (op.element) {
    case Element::float32: return launch_for<float>(op, stream);
    case Element::bfloat16: return launch_for<tokens::BFloat16>(op, stream);
    case Element::float16: return launch_for<tokens::Half>(op, stream);
  }
}

FASTVIT_REGISTER(token_depthwise_conv, "CUDA", token_depthwise_conv_entry<run>);

}  // namespace
}  // namespace fastvit
