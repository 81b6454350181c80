// conv_projection by its CUDA kernels, on the host.
#include "conv_projection/cuda_forward.h"

#include "cuda_host.h"

// Of q, k and v; gives the bytes of shared memory of the greediest kernel, negative where it was not one for all three.
extern "C" int64_t projection_host(const Arguments* arguments, void* const* outs) {
  Projections ops{};
  for (size_t i = 0; i < ops.size(); ++i) {
    ops[i] = describe(arguments[i]);
    ops[i].out = outs[i];
  }
  HostDevice device;
  tokens::with_element(ops[0].element, [&]<class T>() { tokens::project_tokens<T>(ops, device); });
  return device.launches == 1 ? device.most_shared : -device.most_shared;
}
