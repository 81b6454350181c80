// Attention whose maps are mixed across heads, forward: what the checks hand to the kernels.
#pragma once

#include <cstdint>

#include "attention.h"
#include "dispatch.h"

namespace fastvit {

inline constexpr int64_t kHeadMixMaxHeads = 32;

// out_h = (post_weight[h] . P + post_bias[h]) v_h,  P_g = softmax(pre_weight[g] . S + pre_bias[g]),  S_g = scale q_g
// k_g^T; without a mix after the softmax, (post_factor[h] P_h + post_bias[h]) v_h.
struct HeadMixParams : AttentionParams {
  const float* pre_weight = nullptr;  // (H, H), transposed: [g][h]; null: no mix before the softmax
  const float* pre_bias = nullptr;    // (H,)
  const float* post_weight =
      nullptr;  // (H, H), transposed, normalisation and output scale folded in; null: no mix after it
  const float* post_factor = nullptr;  // (H,), read where post_weight is null
  const float* post_bias = nullptr;    // (H,)
  // LayerNorm over heads of what the mix gives, whose weight and bias are centred over its output heads: then
  // M_h = norm_factor[h] X_h / sqrt(mean_g X_g^2 + norm_eps) + norm_shift[h]. Null: none.
  const float* norm_factor = nullptr;  // (H,)
  const float* norm_shift = nullptr;   // (H,)
  float norm_eps = 0.0f;
};

// Its problems are batch elements, all heads of one at a time.
using HeadMixKernel = AttentionKernel<HeadMixParams>;

FASTVIT_DECLARE_PER_ISA(HeadMixKernel head_mix_kernel(const HeadMixParams& p);)

}  // namespace fastvit
