// Attention under a mask and an additive bias: what the checks hand to the kernels.
#pragma once

#include "attention/args.h"
#include "common/isa.h"

namespace fastvit {

// softmax(scale q k^T + bias, over the keys that the mask allows) v
struct MaskedAttentionParams : AttentionParams {
  const void* bias = nullptr;  // of q's dtype; strides are 0 where broadcast; null: none
  int64_t bias_batch_stride = 0, bias_head_stride = 0, bias_query_stride = 0, bias_key_stride = 0;
};

// Its problems are the heads of all batch elements, each on its own: problem = b * heads + h.
using MaskedAttentionKernel = AttentionKernel<MaskedAttentionParams>;

FASTVIT_DECLARE_PER_ISA(MaskedAttentionKernel masked_attention_kernel(const MaskedAttentionParams& p);)

// The gradients; each lies as a contiguous (B, N, H, D) of q's dtype.
struct MaskedAttentionGradients : MaskedAttentionParams {
  AttentionOperand grad{};  // of the output
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
};

// The steps of the backward, for one element type and instruction set. The gradients of keys and values are summed in
// float32 over the tiles that one thread takes, `sums`, and put together from those of several threads by `finish`.
struct MaskedAttentionBackwardKernel {
  int64_t tile;                                        // queries of a tile
  int64_t packed_floats, sums_floats, scratch_floats;  // of a problem, of a problem, of a thread
  int64_t bias_floats;                                 // of the summed gradient of a tile's bias
  void (*pack)(const MaskedAttentionGradients&, int64_t problem, AttentionKeys, float* packed);
  // One tile: writes dq, adds to the sums of dk and dv and, where asked for, of the tile's bias.
  void (*attend)(const MaskedAttentionGradients&, int64_t problem, int64_t first_query, AttentionKeys,
                 const float* packed, float* sums, float* bias_sums, float* scratch);
  // Writes dk and dv of a problem from its sums, of which there are `parts`, `stride` floats apart.
  void (*finish)(const MaskedAttentionGradients&, int64_t problem, AttentionKeys, const float* sums, int64_t parts,
                 int64_t stride);
  // out[i * stride + j] = what the bias of the tile's query i and of key j gathered; with a stride of 0 the sum over
  // the queries.
  void (*read_bias)(const MaskedAttentionGradients&, int64_t queries, const float* bias_sums, float* out,
                    int64_t stride);
};

FASTVIT_DECLARE_PER_ISA(
    MaskedAttentionBackwardKernel masked_attention_backward_kernel(const MaskedAttentionGradients& p);)

}  // namespace fastvit
