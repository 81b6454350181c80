// Attention under a mask, forward: what the checks hand to the kernels.
#pragma once

#include "attention.h"
#include "dispatch.h"

namespace fastvit {

// Its problems are the heads of all batch elements, each on its own: problem = b * heads + h.
using MaskedAttentionKernel = AttentionKernel<AttentionParams>;

FASTVIT_DECLARE_PER_ISA(MaskedAttentionKernel masked_attention_kernel(const AttentionParams& p);)

}  // namespace fastvit
