// Attention with a mask and an additive bias: the arguments of its kernels.
#pragma once

#include "attention/args.h"
#include "common/isa.h"

namespace fastvit {

// softmax(scale q k^T + bias, over the keys that the mask allows) v
struct MaskedAttentionParams : AttentionParams {
  const void* bias = nullptr;  // of q's dtype; strides are 0 where it broadcasts; null without one
  int64_t bias_batch_stride = 0, bias_head_stride = 0, bias_query_stride = 0, bias_key_stride = 0;
};

// A problem is one head of a batch element: problem = b * heads + h.
using MaskedAttentionKernel = AttentionKernel<MaskedAttentionParams>;

FASTVIT_DECLARE_PER_ISA(MaskedAttentionKernel masked_attention_kernel(const MaskedAttentionParams& p);)

// The backward pass; each gradient is of q's dtype, laid out as a contiguous (B, N, H, D).
struct MaskedAttentionGradients : MaskedAttentionParams {
  AttentionOperand grad{};  // of the output
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
};

// The steps of the backward pass, for one element type and instruction set. The gradients of keys and values are
// accumulated in float32 over the tiles of one thread, in `sums`; `finish` adds up those of several threads.
struct MaskedAttentionBackwardKernel {
  int64_t tile;                                        // queries per tile
  int64_t packed_floats, sums_floats, scratch_floats;  // per problem, per problem, per thread
  int64_t bias_floats;                                 // the accumulated gradient of a tile's bias
  void (*pack)(const MaskedAttentionGradients&, int64_t problem, AttentionKeys, float* packed);
  // One tile: writes dq and adds to the sums of dk, dv and, where bias_sums is not null, of the tile's bias.
  void (*attend)(const MaskedAttentionGradients&, int64_t problem, int64_t first_query, AttentionKeys,
                 const float* packed, float* sums, float* bias_sums, float* scratch);
  // Writes dk and dv of a problem from its `parts` sums, which are `stride` floats apart.
  void (*finish)(const MaskedAttentionGradients&, int64_t problem, AttentionKeys, const float* sums, int64_t parts,
                 int64_t stride);
  // out[i * stride + j] = the gradient of the bias of the tile's query i and key j; with a stride of 0 its sum over
  // the queries.
  void (*read_bias)(const MaskedAttentionGradients&, int64_t queries, const float* bias_sums, float* out,
                    int64_t stride);
};

FASTVIT_DECLARE_PER_ISA(
    MaskedAttentionBackwardKernel masked_attention_backward_kernel(const MaskedAttentionGradients& p);)

}  // namespace fastvit
