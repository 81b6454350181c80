// The maps of one tile of queries, with all heads: what the forward and backward kernels of head-mixed attention share.
// Compiled once per instruction set.
//
// Queries are the lanes of every vector, so that
//   S_h[j] = sum_d k_h[j][d] q_h[d]       P_h[j] = exp(S_h[j] - max) / sum       M_h[j] = b_h + sum_g A[h][g] P_g[j]
// are one product each of broadcast scalars (keys, mixing matrix) with vectors of queries; softmax needs no reduction
// inside a vector; and neither head size nor key count is padded. The sums of a mix start with its bias. Maps are
// (H, keys, lanes) floats.
#pragma once

#include "attention/cpu_tiles.h"
#include "head_mixed_attention/args.h"
#include "head_mixed_attention/cpu_mix.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t kMaxWidth = kTileVectors * kLanes;  // most lanes of a tile
constexpr int kStagedKeys = 4;                        // per step of Tile::mix_in_steps
constexpr int kMapPadding = 4;                        // keys past the last one that a mix may touch
// Exponentials per partial sum, about the root of their number: an error of the sum is in all of a row's probabilities.
constexpr int64_t kSoftmaxTerms = 16;

// Hands out memory; with none, only counts what is asked for.
struct Arena {
  float* memory;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* taken = memory == nullptr ? nullptr : memory + used;
    used += round_up(floats, kMaxLanes);
    return taken;
  }
};

// A thread's scratch memory for the maps of a tile.
struct MapScratch {
  int64_t map_stride;   // of heads, padded so that they do not share cache sets
  int64_t word_stride;  // of heads in [head][word of channels][lane]
  int64_t mask_heads;
  float* mask;     // [head or 1][key][lane]: +inf where attended, -inf elsewhere
  float* inverse;  // [head][lane]: 1 / sum of exponentials

  MapScratch(const HeadMapParams& p, Arena& arena)
      : map_stride((p.keys + kMapPadding) * kMaxWidth + kLanes),
        word_stride(round_up(p.dim, 4) * kMaxWidth),
        mask_heads(p.mask == nullptr         ? 0
                   : p.mask_head_stride == 0 ? 1
                                             : p.heads),
        mask(arena.take(mask_heads * map_stride)),
        inverse(arena.take(p.heads * kMaxWidth)) {}
};

// Takes the mean over heads off one vector of each; gives 1 / sqrt(mean over heads of what is left^2 + eps). The mean
// is found about the first head, so that of heads that are all the same exactly zero is left.
FASTVIT_INLINE Vec centre_heads(int64_t heads, float* x, int64_t head_stride, float eps) {
  const Vec share = Vec::fill(1.0f / static_cast<float>(heads)), first = Vec::load(x);
  Vec apart = Vec::fill(0.0f), squares = apart;
  for (int64_t h = 1; h < heads; ++h) apart += Vec::load(x + h * head_stride) - first;
  const Vec mean = fma(apart, share, first);
  for (int64_t h = 0; h < heads; ++h) {
    const Vec value = Vec::load(x + h * head_stride) - mean;
    value.store(x + h * head_stride);
    squares = fma(value, value, squares);
  }
  return Vec::fill(1.0f) / sqrt(squares * share + Vec::fill(eps));
}

// --- A tile ----------------------------------------------------------------------------------------------------------

// x where `limit` is +inf, zero where it is -inf.
FASTVIT_INLINE Vec where_attended(Vec limit, Vec x) {
  typedef int32_t Ints __attribute__((vector_size(sizeof(Vec))));
  Ints masked, bits;
  __builtin_memcpy(&masked, &limit, sizeof limit);
  __builtin_memcpy(&bits, &x, sizeof x);
  bits &= ~(masked >> 31);
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

template <int kV>  // kV vectors of queries
struct MapTile {
  static constexpr int64_t kWidth = kV * kLanes;

  const HeadMapParams& p;
  const MapScratch& s;
  int64_t b, first_query, queries;  // queries <= kWidth
  AttentionKeys keys;
  const Packed layout{p.dim, keys.count};

  static int64_t at(int64_t j, int v) { return j * kWidth + v * kLanes; }  // in a map
  const float* mask(int64_t h) const { return s.mask_heads == 1 ? s.mask : s.mask + h * s.map_stride; }

  void load_mask() const {
    for (int64_t h = 0; h < s.mask_heads; ++h) {
      expand_mask(p, b, h, first_query, queries, keys, s.mask + h * s.map_stride, kWidth);
    }
  }

  // out[h][word of channels][lane] of q, or of a tensor of its shape.
  void load_lanes(const AttentionOperand& q, float* out) const {
    with_element<true>(p.element, [&]<class T>() {
      for (int64_t first = 0; first < kWidth; first += 4) {
        for (int64_t h = 0; h < p.heads; ++h) {  // innermost: the heads of a query are adjacent
          load_four_queries(Rows<T>(q, b, h), first_query + first, queries - first, p.dim,
                            out + h * s.word_stride + first, kWidth);
        }
      }
    });
  }

  // out[j] = factor * sum_d k[j][d] q[d] for all keys; `packed` are key panels. Large logits need short partial sums.
  void products_with_keys(const float* packed, const float* q, float factor, float* out) const {
    multiply_panels(keys.count, layout.key_words, kV, layout.words(p.dim), packed, q, factor, out,
                    smaller(kPartialSum, 32));
  }

  // out[d] = factor * sum_j v[j][d] map[j] for all channels; `packed` is a head of keys and values.
  void products_with_values(const float* packed, const float* map, float factor, float* out) const {
    multiply_panels(p.dim, layout.value_words, kV, layout.words(keys.count), packed + layout.value_panel(0), map,
                    factor, out);
  }

  // The mix before the softmax, of all keys; `from` and `to` may be the same.
  void mix_logits(const float* from, float* to) const {
    FASTVIT_FLOAT_ISA::mix_heads(p.heads, keys.count * kV, p.pre_weight, p.pre_bias, from, s.map_stride, to,
                                 s.map_stride);
  }

  // `yes` in the lanes of vector v that key j is hidden from, for head h or for every head.
  FASTVIT_INLINE Vec hide(int64_t h, int64_t j, int v, Vec yes, Vec no) const {
    return if_hidden(Vec::load(mask(h) + at(j, v)), yes, no);
  }
  FASTVIT_INLINE Vec hide_from_all(int64_t j, int v, Vec yes, Vec no) const {
    Vec result = yes;
    for (int64_t h = 0; h < s.mask_heads; ++h) result = hide(h, j, v, result, no);
    return result;
  }

  // The product of head h with rows of `of` again without hidden keys, where what is not finite in their rows has made
  // it NaN.
  template <class Hide>
  void leave_hidden_out(const AttentionOperand& of, int64_t h, const float* map, float factor, const Hide& hide,
                        float* out) const {
    if (p.mask == nullptr || !has_nan(out, p.dim * kWidth)) return;
    with_rows<true>(p.element, of, b, h,
                    [&](auto rows) { product_of_visible<kV>(rows, keys, p.dim, map, factor, hide, out, false); });
  }

  // A sum of exponentials is zero where no key is left, but also where all logits are -inf: those rows are NaN.
  void fail_infinite_rows(int64_t h, Vec (&sums)[kV]) const {
    float of_lanes[kWidth];
    for (int v = 0; v < kV; ++v) sums[v].store(of_lanes + v * kLanes);
    for (int64_t i = 0; i < queries; ++i) {
      bool sees = false;
      for (int64_t j = 0; of_lanes[i] == 0.0f && j < keys.count && !sees; ++j) sees = mask(h)[at(j, 0) + i] > 0.0f;
      if (sees) of_lanes[i] = __builtin_nanf("");
    }
    for (int v = 0; v < kV; ++v) sums[v] = Vec::load(of_lanes + v * kLanes);
  }

  // The largest logit of each lane, of those that the mask leaves; masked ones become -inf. zeros: NaN where a logit is
  // not finite.
  FASTVIT_NOINLINE void limit_and_find_largest(int64_t h, float* map, Vec (&largest)[kV], Vec& zeros) const {
    Vec most[kV], products = zeros;
    for (int v = 0; v < kV; ++v) most[v] = largest[v];
    const float* limits = p.mask == nullptr ? nullptr : mask(h);
    for (int64_t j = 0, count = keys.count; j < count; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        Vec x = Vec::load(map + at(j, v));
        if (limits != nullptr) {
          products = fma(x, Vec::fill(0.0f), products);
          x = min(x, Vec::load(limits + at(j, v)));
          x.store(map + at(j, v));
        }
        most[v] = max(x, most[v]);
      }
    }
    for (int v = 0; v < kV; ++v) largest[v] = most[v];
    zeros = products;
  }

  // exp(S_h - max) in place, and 1 / its sum over keys; zeros in a row whose keys are all masked. With a mask, returns
  // whether all logits are finite, masked ones too.
  bool softmax(int64_t h, float* map) const {
    // All keys of a row may be masked; its largest logit starts finite, so that logit - largest is.
    const float least = p.mask == nullptr ? -__builtin_inff() : -__FLT_MAX__;
    Vec largest[kV], sum[kV], zeros = Vec::fill(0.0f);
    for (int v = 0; v < kV; ++v) largest[v] = Vec::fill(least), sum[v] = Vec::fill(0.0f);
    limit_and_find_largest(h, map, largest, zeros);
    for (int64_t first = 0; first < keys.count; first += kSoftmaxTerms) {
      const int64_t end = keys.count - first < kSoftmaxTerms ? keys.count : first + kSoftmaxTerms;
      Vec part[kV];
      for (int v = 0; v < kV; ++v) part[v] = Vec::fill(0.0f);
      for (int64_t j = first; j < end; ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          const Vec e = exp_nonpositive(Vec::load(map + at(j, v)) - largest[v]);
          part[v] += e;
          e.store(map + at(j, v));
        }
      }
      for (int v = 0; v < kV; ++v) sum[v] += part[v];
    }
    if (p.mask != nullptr) fail_infinite_rows(h, sum);
    for (int v = 0; v < kV; ++v) {
      // The sum is zero only where no key is left: any finite inverse will do.
      (Vec::fill(1.0f) / max(Vec::fill(__FLT_MIN__), sum[v])).store(s.inverse + h * kWidth + v * kLanes);
    }
    return !any_nan(zeros);
  }

  Vec inverse(int64_t h, int v) const { return Vec::load(s.inverse + h * kWidth + v * kLanes); }

  // Stores [head][channel][lane] as rows of a contiguous (B, N, H, D).
  void store_lanes(const float* channels, void* to) const {
    const int64_t stride = p.heads * p.dim;
    with_element<true>(p.element, [&]<class T>() {
      T* out = static_cast<T*>(to) + (b * p.queries + first_query) * stride;
      for (int64_t i = 0; i < queries; i += 4) {
        for (int64_t h = 0; h < p.heads; ++h) {
          store_four_queries(channels + h * s.word_stride + i, kWidth, queries - i, p.dim, out + i * stride + h * p.dim,
                             stride);
        }
      }
    });
  }

  // Zero where masked.
  template <int kKeys>
  FASTVIT_INLINE void zero_masked(int64_t h, int64_t j, int v, Vec (&x)[kKeys]) const {
    if (p.mask == nullptr) return;
#pragma GCC unroll 8
    for (int key = 0; key < kKeys; ++key) x[key] = where_attended(Vec::load(mask(h) + at(j + key, v)), x[key]);
  }

  // Stores kKeys keys of a map, from key j on, in the layout of the product with values. Keys past the last land in the
  // padding, but the missing half of a pair must be zero.
  template <int kKeys>
  FASTVIT_INLINE void store_words(float* map, int64_t j, int v, const Vec (&x)[kKeys]) const {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
#pragma GCC unroll 8
      for (int key = 0; key < kKeys; key += 2) {
        const Vec second = j + key + 1 < keys.count ? x[key + 1] : Vec::fill(0.0f);
        round_to_pairs(x[key], second).store(map + at((j + key) / 2, v));  // not past what has been read
      }
      return;
    }
#endif
#pragma GCC unroll 8
    for (int key = 0; key < kKeys; ++key) x[key].store(map + at(j + key, v));
  }
};

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
