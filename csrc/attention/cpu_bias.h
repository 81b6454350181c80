// The mask and the additive bias of attention, for one instruction set.
#pragma once

#include "attention/args_masked.h"
#include "attention/cpu_tiles.h"

namespace fastvit::FASTVIT_ISA {
namespace {

inline bool can_hide(const MaskedAttentionParams& p) { return p.mask != nullptr || p.bias != nullptr; }

// The queries of one head, and the keys that mask and bias leave each.
template <class T>
struct Sight {
  const MaskedAttentionParams& p;
  int64_t b, h;

  const bool* mask_row(int64_t query) const {
    return p.mask + b * p.mask_batch_stride + h * p.mask_head_stride + query * p.mask_query_stride;
  }
  const T* bias_row(int64_t query) const {
    return static_cast<const T*>(p.bias) + b * p.bias_batch_stride + h * p.bias_head_stride +
           query * p.bias_query_stride;
  }
  bool sees(int64_t query, int64_t key) const {
    return (p.mask == nullptr || mask_row(query)[key * p.mask_key_stride]) &&
           (p.bias == nullptr || widen(bias_row(query)[key * p.bias_key_stride]) != -__builtin_inff());
  }
  bool sees_any(int64_t query, AttentionKeys keys) const {
    for (int64_t j = 0; j < keys.count; ++j) {
      if (sees(query, keys.indices[j])) return true;
    }
    return false;
  }
};

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

// A sum of exponentials is zero where no key is seen, but also where all logits are -inf: those rows are NaN.
template <int kV>
void fail_infinite_rows(const MaskedAttentionParams& p, int64_t b, int64_t h, int64_t first_query, int64_t queries,
                        AttentionKeys keys, Vec (&sums)[kV]) {
  float of_lanes[kV * kLanes];
  bool failed = false;
  for (int v = 0; v < kV; ++v) sums[v].store(of_lanes + v * kLanes);
  for (int64_t i = 0; i < queries; ++i) {
    if (of_lanes[i] != 0.0f ||
        !with_element<true>(p.element, [&]<class T>() { return Sight<T>{p, b, h}.sees_any(first_query + i, keys); })) {
      continue;
    }
    of_lanes[i] = __builtin_nanf("");
    failed = true;
  }
  for (int v = 0; failed && v < kV; ++v) sums[v] = Vec::load(of_lanes + v * kLanes);
}

// Mask and bias of a block of keys for a tile of kV vectors of queries, each [key][lane] where it is there.
template <int kV>
struct Limits {
  static constexpr int64_t kWidth = kV * kLanes;
  const MaskedAttentionParams& p;
  float *mask, *bias;

  void load(int64_t b, int64_t h, int64_t first_query, int64_t queries, AttentionKeys keys) const {
    if (p.mask != nullptr) expand_mask(p, b, h, first_query, queries, keys, mask, kWidth);
    if (p.bias == nullptr) return;
    with_element<true>(p.element,
                       [&]<class T>() { expand_bias<T>(p, b, h, first_query, queries, keys, bias, kWidth); });
  }
  // The logits of key j of the block, -inf where it is hidden, whatever they are.
  FASTVIT_INLINE Vec limit(int64_t j, int v, Vec x) const {
    if (p.bias != nullptr) {
      const Vec added = Vec::load(bias + j * kWidth + v * kLanes);
      x = if_hidden(added, added, x + added);
    }
    if (p.mask != nullptr) x = min(x, Vec::load(mask + j * kWidth + v * kLanes));
    return x;
  }
  FASTVIT_INLINE Vec hide(int64_t j, int v, Vec yes, Vec no) const {
    if (p.bias != nullptr) no = if_hidden(Vec::load(bias + j * kWidth + v * kLanes), yes, no);
    if (p.mask != nullptr) no = if_hidden(Vec::load(mask + j * kWidth + v * kLanes), yes, no);
    return no;
  }
};

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
