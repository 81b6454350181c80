// The additive bias of a tile of attention, for one instruction set.
#pragma once

#include "attention/args_masked.h"
#include "attention/cpu_tiles.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// The bias of one head as [key][lane]; lanes beyond the last query repeat the first.
template <class T>
void expand_bias(const MaskedAttentionParams& p, int64_t b, int64_t h, int64_t first_query, int64_t queries,
                 AttentionKeys keys, float* out, int64_t width) {
  const T* head = static_cast<const T*>(p.bias) + b * p.bias_batch_stride + h * p.bias_head_stride;
  if (p.bias_query_stride == 0) {
    for (int64_t j = 0; j < keys.count; ++j) {
      const Vec one = Vec::fill(widen(head[keys.indices[j] * p.bias_key_stride]));
      for (int64_t i = 0; i < width; i += kLanes) one.store(out + j * width + i);
    }
    return;
  }
  constexpr int64_t kChunk = 64;
  float buffers[4][kChunk];
  const float* const rows[4] = {buffers[0], buffers[1], buffers[2], buffers[3]};
  for (int64_t begin = 0; begin < keys.count; begin += kChunk) {
    const int64_t count = keys.count - begin < kChunk ? keys.count - begin : kChunk;
    const int32_t* indices = keys.indices + begin;
    const bool adjacent = p.bias_key_stride == 1 && indices[count - 1] - indices[0] == count - 1;
    for (int64_t i = 0; i < width; i += 4) {
      for (int64_t r = 0; r < 4; ++r) {
        const T* row = head + (first_query + (i + r < queries ? i + r : 0)) * p.bias_query_stride;
        if (adjacent) {
          for (int64_t j = 0; j < count; ++j) buffers[r][j] = widen(row[indices[0] + j]);
        } else {
          for (int64_t j = 0; j < count; ++j) buffers[r][j] = widen(row[indices[j] * p.bias_key_stride]);
        }
      }
      transpose4(rows, count, out + begin * width + i, width);
    }
  }
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
