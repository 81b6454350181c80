// fastvit::conv_projection on CUDA. The kernel is in cuda_forward.h.
#include "conv_projection/cuda_forward.h"

#include "conv_projection/op.h"
#include "token_depthwise_conv/cuda_device.cuh"

namespace fastvit {
namespace {

void run(const Projections& ops, const Tensor& x) {
  TokenDevice device(x, "conv_projection");
  tokens::with_element(ops[0].element, [&]<class T>() { tokens::project_tokens<T>(ops, device); });
}

FASTVIT_REGISTER(conv_projection, "CUDA", conv_projection_entry<run>);

}  // namespace
}  // namespace fastvit
