// Attention of few queries, as class tokens are: what the checks hand to the kernels.
#pragma once

#include "attention/args_masked.h"

namespace fastvit {

// Up to so many queries; with more, queries as lanes are faster.
inline constexpr int64_t kClassQueries = 8;

class KeyLists;
void run_class_attention(const MaskedAttentionParams& p, const KeyLists& keys);
void run_class_attention_backward(const MaskedAttentionGradients& p, const KeyLists& keys);

// The steps of the computation, for one element type and instruction set. A problem is a head of a batch element.
struct ClassAttentionKernel {
  int64_t partial_floats, scratch_floats;  // of a part of a problem's keys, of a thread
  // What a problem's queries gather of these keys, not yet divided by the sum of exponentials.
  void (*attend)(const MaskedAttentionParams&, int64_t problem, AttentionKeys, float* partial, float* scratch);
  // Puts the parts of a problem's keys together, which lie `stride` floats apart, and writes the output.
  void (*combine)(const MaskedAttentionParams&, int64_t problem, const float* partials, int64_t parts, int64_t stride);
};

// The backward of a whole problem.
struct ClassAttentionBackwardKernel {
  int64_t scratch_floats;
  void (*attend)(const MaskedAttentionGradients&, int64_t problem, AttentionKeys, float* scratch);
};

FASTVIT_DECLARE_PER_ISA(ClassAttentionKernel class_attention_kernel(const MaskedAttentionParams& p);
                        ClassAttentionBackwardKernel class_attention_backward_kernel(const MaskedAttentionParams& p);)

}  // namespace fastvit
