// Attention whose maps are mixed across heads, forward: what the checks hand to the kernels.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace fastvit {

inline constexpr int64_t kHeadMixMaxHeads = 32;
inline constexpr int64_t kHeadMixMaxDim = 128;

// (B, H, N, D) as it lies; strides in elements, the last axis contiguous.
struct HeadMixOperand {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

// out_h = (post_weight[h] . P + post_bias[h]) v_h,  P_g = softmax(pre_weight[g] . S + pre_bias[g]),  S_g = scale q_g
// k_g^T; without a mix after the softmax, (post_factor[h] P_h + post_bias[h]) v_h.
struct HeadMixParams {
  int64_t batch, heads, queries, keys, dim;
  HeadMixOperand q, k, v;
  void* out;      // contiguous (B, Nq, H, D)
  bool bfloat16;  // q, k, v and out; float32 otherwise
  float scale;
  const float* pre_weight;   // (H, H), transposed: [g][h]; null: no mix before the softmax
  const float* pre_bias;     // (H,)
  const float* post_weight;  // (H, H), transposed, normalisation and output scale folded in; null: no mix after it
  const float* post_factor;  // (H,), read where post_weight is null
  const float* post_bias;    // (H,)
  // True = attend; strides are 0 where broadcast; null: none. A mask over keys alone is given as a list of keys
  // instead.
  const bool* mask;
  int64_t mask_batch_stride, mask_head_stride, mask_query_stride, mask_key_stride;
};

// The keys that a batch element attends to, ascending.
struct HeadMixKeys {
  const int32_t* indices;
  int64_t count;
};

// The steps of the computation, for one element type and instruction set.
struct HeadMixKernel {
  int64_t lanes;                          // queries are handled in multiples of this
  int64_t packed_floats, scratch_floats;  // of one batch element's packed keys and values, of a thread's scratch
  // Packs one part of the keys and values of batch element b; all parts together pack them whole.
  void (*pack)(const HeadMixParams&, int64_t b, HeadMixKeys, int64_t part, int64_t parts, float* packed);
  // Computes queries [begin, end) of batch element b for all heads; begin is a multiple of lanes.
  void (*attend)(const HeadMixParams&, int64_t b, int64_t begin, int64_t end, HeadMixKeys, const float* packed,
                 float* scratch);
};

FASTVIT_DECLARE_PER_ISA(HeadMixKernel head_mix_kernel(const HeadMixParams& p);)

}  // namespace fastvit
