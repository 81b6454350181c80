// fastvit::conv_projection on the CPU: the three depthwise convolutions and norms of one x, without the linear layers.
// They are computed image by image, so that x is read from memory once.
#include "conv_projection/op.h"

#include <algorithm>

#include "common/workspace.h"
#include "token_depthwise_conv/cpu.h"

namespace fastvit {
namespace {

using Works = std::array<TokenDepthwiseConvWork, 3>;

// Part `part` of `parts` of each convolution. Items are ordered by image, so the parts read the same images of x.
void run_part(const Works& works, int64_t part, int64_t parts, float* scratch) {
  const auto kernel = FASTVIT_PER_ISA(token_depthwise_conv, works[0].element);
  for (const TokenDepthwiseConvWork& work : works) {
    const int64_t begin = work.items * part / parts, end = work.items * (part + 1) / parts;
    if (begin < end) kernel(work, begin, end, scratch);
  }
}

void run(const Projections& ops, const Tensor&) {
  const Works works{divide(ops[0]), divide(ops[1]), divide(ops[2])};
  const int64_t threads = num_threads(), batch = works[0].batch;
  const int64_t parts = batch >= threads ? batch : batch * threads;
  int64_t floats = 0;
  for (const TokenDepthwiseConvWork& work : works) floats = std::max(floats, work.scratch_floats);
  parallel_for(0, parts, (parts + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    float* scratch = Workspace::of_thread().take(floats);
    for (int64_t part = begin; part < end; ++part) run_part(works, part, parts, scratch);
    Workspace::of_thread().give_back();
  });
}

FASTVIT_REGISTER(conv_projection, "CPU", conv_projection_entry<run>);

}  // namespace
}  // namespace fastvit
