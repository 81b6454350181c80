// The arguments that the kernels of every attention operator take, as plain data.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace fastvit {

inline constexpr int64_t kAttentionMaxDim = 128;

// (B, H, N, D) with these strides, in elements; the last axis is contiguous.
struct AttentionOperand {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

struct AttentionParams {
  int64_t batch, heads, queries, keys, dim;
  AttentionOperand q, k, v;
  void* out;        // contiguous (B, Nq, H, D)
  Element element;  // of q, k, v and out
  float scale;
  // True = attend; strides are 0 where it broadcasts; null without a mask. A mask over keys alone becomes a list of
  // keys instead.
  const bool* mask;
  int64_t mask_batch_stride, mask_head_stride, mask_query_stride, mask_key_stride;
};

// The keys that a batch element attends to, ascending.
struct AttentionKeys {
  const int32_t* indices;
  int64_t count;
};

// The steps of the computation, for one element type and instruction set. A problem is a set of queries that share
// packed keys and values: a batch element, or one of its heads.
template <class Params>
struct AttentionKernel {
  int64_t lanes;                          // queries are processed in multiples of this
  int64_t packed_floats, scratch_floats;  // a problem's packed keys and values, a thread's scratch memory
  // Packs one part of a problem's keys and values.
  void (*pack)(const Params&, int64_t problem, AttentionKeys, int64_t part, int64_t parts, float* packed);
  // Computes queries [begin, end) of a problem; begin is a multiple of lanes.
  void (*attend)(const Params&, int64_t problem, int64_t begin, int64_t end, AttentionKeys, const float* packed,
                 float* scratch);
};

}  // namespace fastvit
