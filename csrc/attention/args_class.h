// Attention of a few queries, such as class tokens: the arguments of its kernels, and what runs them on all threads.
#pragma once

#include "attention/args_masked.h"

namespace fastvit {

// At most this many queries; with more, kernels whose lanes are queries are faster.
inline constexpr int64_t kClassQueries = 8;

class KeyLists;
void run_class_attention(const MaskedAttentionParams& p, const KeyLists& keys);
void run_class_attention_backward(const MaskedAttentionGradients& p, const KeyLists& keys);

// The steps of the computation, for one element type and instruction set. A problem is a head of a batch element.
struct ClassAttentionKernel {
  int64_t partial_floats, scratch_floats;  // the result for a part of the keys, a thread's scratch memory
  // A problem's attention over these keys, not yet divided by the sum of exponentials.
  void (*attend)(const MaskedAttentionParams&, int64_t problem, AttentionKeys, float* partial, float* scratch);
  // Combines the parts of a problem's keys, whose results are `stride` floats apart, and writes the output.
  void (*combine)(const MaskedAttentionParams&, int64_t problem, const float* partials, int64_t parts, int64_t stride);
};

// The backward pass of a whole problem.
struct ClassAttentionBackwardKernel {
  int64_t scratch_floats;
  void (*attend)(const MaskedAttentionGradients&, int64_t problem, AttentionKeys, float* scratch);
};

FASTVIT_DECLARE_PER_ISA(ClassAttentionKernel class_attention_kernel(const MaskedAttentionParams& p);
                        ClassAttentionBackwardKernel class_attention_backward_kernel(const MaskedAttentionParams& p);)

}  // namespace fastvit
