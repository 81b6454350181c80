// Attention under a mask and an additive bias: what the checks hand to the kernels.
#pragma once

#include "attention.h"
#include "dispatch.h"

namespace fastvit {

// softmax(scale q k^T + bias, over the keys that the mask allows) v
struct MaskedAttentionParams : AttentionParams {
  const void* bias = nullptr;  // of q's dtype; strides are 0 where broadcast; null: none
  int64_t bias_batch_stride = 0, bias_head_stride = 0, bias_query_stride = 0, bias_key_stride = 0;
};

// Its problems are the heads of all batch elements, each on its own: problem = b * heads + h.
using MaskedAttentionKernel = AttentionKernel<MaskedAttentionParams>;

FASTVIT_DECLARE_PER_ISA(MaskedAttentionKernel masked_attention_kernel(const MaskedAttentionParams& p);)

}  // namespace fastvit
