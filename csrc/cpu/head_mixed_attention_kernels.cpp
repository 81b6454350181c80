// Attention whose maps are mixed across heads, forward, for one instruction set.
//
// A tile is one or two vectors of queries, for all heads. Queries are the lanes of every vector, so that
//   S_h[j] = sum_d k_h[j][d] q_h[d]       P_h[j] = exp(S_h[j] - max) / sum       M_h[j] = b_h + sum_g A[h][g] P_g[j]
//   out_h[d] = sum_j v_h[j][d] M_h[j]
// are one product each of broadcast scalars (keys, mixing matrix, values) with vectors of queries; softmax needs no
// reduction inside a vector; and neither head size nor key count is padded. The maps of a tile, (H, keys, lanes)
// floats, stay in the caches; no other map exists. A bias starts the sums of the mix, where it costs nothing.
//
// Keys and values are packed once per batch element (see pack). With the bfloat16 dot product (two terms a lane and
// instruction) the packed words hold pairs: of channels in q and k, of keys in the finished map and v.
#include "attention_tiles.h"
#include "head_mixed_attention.h"
#include "vec.h"

namespace fastvit::FASTVIT_ISA {
namespace {

template <class T, bool kPairs>
void pack(const HeadMixParams& p, int64_t b, AttentionKeys keys, int64_t part, int64_t parts, float* packed) {
  const Packed<T, kPairs> layout(p.dim, keys.count);
  const int64_t panels = layout.key_panels.blocks, words = layout.words(keys.count);
  // Heads inside: those of a key lie side by side.
  for (int64_t panel = part * panels / parts; panel < (part + 1) * panels / parts; ++panel) {
    for (int64_t h = 0; h < p.heads; ++h) {
      pack_key_panel(Rows<T>(p.k, b, h), layout, keys.indices, panel, packed + h * layout.head_words);
    }
  }
  for (int64_t word = part * words / parts; word < (part + 1) * words / parts; ++word) {
    for (int64_t h = 0; h < p.heads; ++h) {
      pack_value_row(Rows<T>(p.v, b, h), layout, keys.indices, word, packed + h * layout.head_words);
    }
  }
}

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

// --- One tile -------------------------------------------------------------------------------------------------------

// A thread's scratch for a tile.
struct Scratch {
  static constexpr int64_t kWidth = kTileVectors * kLanes;
  static constexpr int kStagedKeys = 2;
  static constexpr int kPadding = 4;  // keys that a block of the mix may reach past the last

  int64_t map_stride;
  float* maps;      // [head][key][lane]: logits, then exponentials, then the finished map
  float* mask;      // [head or 1][key][lane]: +inf where attended to, -inf elsewhere
  float* inverse;   // [head][lane]: 1 / sum of exponentials
  float* staged;    // [head][key of a block of the mix][lane]
  float* mixed;     // the same, behind the mix, where a layer norm waits for all heads
  float* channels;  // [head][channel][lane]: the queries, then the output

  // Heads are shifted against each other in the cache's sets.
  static int64_t stride_of(int64_t keys) { return (keys + kPadding) * kWidth + kLanes; }
  static int64_t mask_heads(const HeadMixParams& p) {
    return p.mask == nullptr ? 0 : p.mask_head_stride == 0 ? 1 : p.heads;
  }
  static int64_t floats(const HeadMixParams& p) {
    return (p.heads + mask_heads(p)) * stride_of(p.keys) + p.heads * kWidth + 2 * p.heads * kStagedKeys * kLanes +
           p.heads * round_up(p.dim, 4) * kWidth;
  }

  Scratch(const HeadMixParams& p, float* memory) : map_stride(stride_of(p.keys)), maps(memory) {
    mask = maps + p.heads * map_stride;
    inverse = mask + mask_heads(p) * map_stride;
    staged = inverse + p.heads * kWidth;
    mixed = staged + p.heads * kStagedKeys * kLanes;
    channels = mixed + p.heads * kStagedKeys * kLanes;
  }
};

template <class T, bool kPairs, int kV>  // kV vectors of queries
struct Tile {
  static constexpr int64_t kWidth = kV * kLanes;

  const HeadMixParams& p;
  const Scratch& s;
  int64_t b, first_query, queries;  // queries <= kWidth
  AttentionKeys keys;
  const float* packed;
  const Packed<T, kPairs> layout{p.dim, keys.count};

  float* map(int64_t h) const { return s.maps + h * s.map_stride; }
  const float* mask(int64_t h) const { return p.mask_head_stride == 0 ? s.mask : s.mask + h * s.map_stride; }
  float* channels(int64_t h) const { return s.channels + h * round_up(p.dim, 4) * kWidth; }

  void run() const {
    for (int64_t h = 0; h < Scratch::mask_heads(p); ++h) {
      expand_mask(p, b, h, first_query, queries, keys, s.mask + h * s.map_stride, kWidth);
    }
    load_queries();
    for (int64_t h = 0; h < p.heads; ++h) {
      logits(h);
      if (p.pre_weight == nullptr) softmax(h);  // while the map is hot
    }
    if (p.pre_weight != nullptr) {
      mix<false>(p.pre_weight, p.pre_bias);
      for (int64_t h = 0; h < p.heads; ++h) softmax(h);
    }
    if (p.norm_factor != nullptr) {
      mix_normalised();
    } else if (p.post_weight != nullptr) {
      mix<true>(p.post_weight, p.post_bias);
    } else {
      finish_unmixed();
    }
    for (int64_t h = 0; h < p.heads; ++h) output(h);
    store_output();
  }

  void load_queries() const {
    for (int64_t first = 0; first < kWidth; first += 4) {
      for (int64_t h = 0; h < p.heads; ++h) {  // inside: the heads of a query lie side by side
        load_four_queries<T, kPairs>(Rows<T>(p.q, b, h), first_query + first, queries - first, p.dim,
                                     channels(h) + first, kWidth);
      }
    }
  }

  // S_h, all keys.
  void logits(int64_t h) const {
    const Vec scale = Vec::fill(p.scale);
    for (int64_t panel = 0; panel < layout.key_panels.blocks; ++panel) {
      const float* k = packed + h * layout.head_words + layout.key_panel(panel);
      float* out = map(h) + layout.key_panels.begin(panel) * kWidth;
      with_constant<kRows>(layout.key_panels.size(panel), [&](auto rows) {
        product_to<kPairs, rows.value, kV>(layout.words(p.dim), k, channels(h), scale, out);
      });
    }
  }

  // exp(S_h - max) in place, and 1 / its sum over keys; a row with no key left gets zeros.
  void softmax(int64_t h) const {
    // With a mask, a row may have no key left; its largest logit must be finite for the difference to be.
    const float least = p.mask == nullptr ? -__builtin_inff() : -__FLT_MAX__;
    Vec largest[kV], sum[kV];
    for (int v = 0; v < kV; ++v) largest[v] = Vec::fill(least), sum[v] = Vec::fill(0.0f);
    for (int64_t j = 0; j < keys.count; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        float* at = map(h) + j * kWidth + v * kLanes;
        Vec x = Vec::load(at);
        if (p.mask != nullptr) {
          x = min(x, Vec::load(mask(h) + j * kWidth + v * kLanes));
          x.store(at);
        }
        largest[v] = max(x, largest[v]);
      }
    }
    for (int64_t j = 0; j < keys.count; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        float* at = map(h) + j * kWidth + v * kLanes;
        const Vec e = exp(Vec::load(at) - largest[v]);
        sum[v] += e;
        e.store(at);
      }
    }
    for (int v = 0; v < kV; ++v) {
      // The sum is zero only where every exponential is: any finite inverse will do.
      (Vec::fill(1.0f) / max(Vec::fill(__FLT_MIN__), sum[v])).store(s.inverse + h * kWidth + v * kLanes);
    }
  }

  // The maps become weight . maps + bias, in place. kFinish: exponentials become probabilities before, and the finished
  // map is stored as the product with v wants it.
  template <bool kFinish>
  void mix(const float* weight, const float* bias) const {
    if (p.heads > kRows) return mix_in_blocks<kFinish>(weight, bias);
    with_constant<kRows>(p.heads, [&](auto heads) {
      constexpr int kKeys = heads.value <= kRows / 2 ? 4 : 2;
      for (int64_t j = 0; j < keys.count; j += kKeys) {
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          mix_block<heads.value, kKeys>(
              weight, bias, 0, j, v, [&](int64_t g, int key) { return probability<kFinish>(g, j + key, v); },
              [&](int64_t h, int64_t j, int v, Vec(&mixed)[kKeys]) { store_mixed<kFinish>(h, j, v, mixed); });
        }
      }
    });
  }

  // With more heads than a block has rows: several blocks from one copy of the columns.
  template <bool kFinish>
  void mix_in_blocks(const float* weight, const float* bias) const {
    mix_staged<kFinish>(
        weight, bias,
        [&](int64_t h, int64_t j, int v, Vec(&mixed)[Scratch::kStagedKeys]) { store_mixed<kFinish>(h, j, v, mixed); },
        [](int64_t, int) {});
  }

  // A layer norm over heads behind the mix, whose results have mean zero.
  void mix_normalised() const {
    constexpr int kKeys = Scratch::kStagedKeys;
    const auto at = [&](int64_t h, int key) { return s.mixed + (h * kKeys + key) * kLanes; };
    const auto keep = [&](int64_t h, int64_t, int, Vec(&mixed)[kKeys]) {
      for (int key = 0; key < kKeys; ++key) mixed[key].store(at(h, key));
    };
    mix_staged<true>(p.post_weight, p.post_bias, keep, [&](int64_t j, int v) {
      Vec inverse[kKeys];
      for (int key = 0; key < kKeys; ++key) {
        Vec squares = Vec::fill(0.0f);
        for (int64_t h = 0; h < p.heads; ++h) squares = fma(Vec::load(at(h, key)), Vec::load(at(h, key)), squares);
        const Vec variance = fma(squares, Vec::fill(1.0f / static_cast<float>(p.heads)), Vec::fill(p.norm_eps));
        inverse[key] = Vec::fill(1.0f) / sqrt(variance);
      }
      for (int64_t h = 0; h < p.heads; ++h) {
        Vec normed[kKeys];
        for (int key = 0; key < kKeys; ++key) {
          normed[key] =
              fma(Vec::load(at(h, key)) * inverse[key], Vec::fill(p.norm_factor[h]), Vec::fill(p.norm_shift[h]));
        }
        store_mixed<true>(h, j, v, normed);
      }
    });
  }

  // Block by block: store(h, j, v, mixed) takes the results of two keys, all_heads(j, v) comes behind those of all
  // heads.
  template <bool kFinish, class Store, class AllHeads>
  FASTVIT_INLINE void mix_staged(const float* weight, const float* bias, const Store& store,
                                 const AllHeads& all_heads) const {
    constexpr int kKeys = Scratch::kStagedKeys;
    const Split blocks(p.heads, kRows);
    for (int64_t j = 0; j < keys.count; j += kKeys) {
      for (int v = 0; v < kV; ++v) {
        for (int64_t g = 0; g < p.heads; ++g) {
          for (int key = 0; key < kKeys; ++key) {
            probability<kFinish>(g, j + key, v).store(s.staged + (g * kKeys + key) * kLanes);
          }
        }
        for (int64_t block = 0; block < blocks.blocks; ++block) {
          with_constant<kRows>(blocks.size(block), [&](auto rows) {
            mix_block<rows.value, kKeys>(
                weight, bias, blocks.begin(block), j, v,
                [&](int64_t g, int key) { return Vec::load(s.staged + (g * kKeys + key) * kLanes); }, store);
          });
        }
        all_heads(j, v);
      }
    }
  }

  // Heads h .. h + kR - 1 of the mix, for kKeys keys and vector v of the queries.
  template <int kR, int kKeys, class F, class Store>
  FASTVIT_INLINE void mix_block(const float* weight, const float* bias, int64_t h, int64_t j, int v, const F& column,
                                const Store& store) const {
    Vec sums[kR][kKeys];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
      for (int key = 0; key < kKeys; ++key) sums[r][key] = Vec::fill(bias[h + r]);
    }
    product<false>(p.heads, weight + h, p.heads, column, sums);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) store(h + r, j, v, sums[r]);
  }

  template <bool kFinish>
  FASTVIT_INLINE Vec probability(int64_t h, int64_t j, int v) const {
    const Vec x = Vec::load(map(h) + j * kWidth + v * kLanes);
    return kFinish ? x * Vec::load(s.inverse + h * kWidth + v * kLanes) : x;
  }

  // Without a mix, the finished map is factor * P_h + bias.
  void finish_unmixed() const {
    for (int64_t h = 0; h < p.heads; ++h) {
      const Vec factor = Vec::fill(p.post_factor[h]), bias = Vec::fill(p.post_bias[h]);
      for (int64_t j = 0; j < keys.count; j += 2) {
        for (int v = 0; v < kV; ++v) {
          Vec finished[2];
          for (int key = 0; key < 2; ++key) finished[key] = fma(probability<true>(h, j + key, v), factor, bias);
          store_mixed<true>(h, j, v, finished);
        }
      }
    }
  }

  // Keys past the last land in the padding of the map; but a pair's second key that does not exist must be zero.
  template <bool kFinish, int kKeys>
  FASTVIT_INLINE void store_mixed(int64_t h, int64_t j, int v, Vec (&mixed)[kKeys]) const {
    if (kFinish && p.mask != nullptr) {
#pragma GCC unroll 8
      for (int key = 0; key < kKeys; ++key) {
        mixed[key] = where_attended(Vec::load(mask(h) + (j + key) * kWidth + v * kLanes), mixed[key]);
      }
    }
#if defined(__AVX512BF16__)
    if constexpr (kFinish && kPairs) {
#pragma GCC unroll 8
      for (int key = 0; key < kKeys; key += 2) {
        const Vec second = j + key + 1 < keys.count ? mixed[key + 1] : Vec::fill(0.0f);
        float* out = map(h) + (j + key) / 2 * kWidth + v * kLanes;  // at or before what has been read
        round_to_pairs(mixed[key], second).store(out);
      }
      return;
    }
#endif
#pragma GCC unroll 8
    for (int key = 0; key < kKeys; ++key) mixed[key].store(map(h) + (j + key) * kWidth + v * kLanes);
  }

  // M_h v_h, all channels.
  void output(int64_t h) const {
    for (int64_t panel = 0; panel < layout.value_panels.blocks; ++panel) {
      const float* v = packed + h * layout.head_words + layout.value_panel(panel);
      float* out = channels(h) + layout.value_panels.begin(panel) * kWidth;
      with_constant<kRows>(layout.value_panels.size(panel), [&](auto rows) {
        product_to<kPairs, rows.value, kV>(layout.words(keys.count), v, map(h), Vec::fill(1.0f), out);
      });
    }
  }

  void store_output() const {
    T* out = static_cast<T*>(p.out) + (b * p.queries + first_query) * p.heads * p.dim;
    for (int64_t i = 0; i < queries; i += 4) {
      for (int64_t h = 0; h < p.heads; ++h) {
        store_four_queries(channels(h) + i, kWidth, queries - i, p.dim, out + (i * p.heads + h) * p.dim,
                           p.heads * p.dim);
      }
    }
  }
};

template <class T, bool kPairs>
void attend(const HeadMixParams& p, int64_t b, int64_t begin, int64_t end, AttentionKeys keys, const float* packed,
            float* memory) {
  const Scratch scratch(p, memory);
  for (int64_t query = begin; query < end;) {
    const int64_t left = end - query;
    if (left > kLanes) {
      Tile<T, kPairs, 2>{p, scratch, b, query, left < 2 * kLanes ? left : 2 * kLanes, keys, packed}.run();
      query += 2 * kLanes;
    } else {
      Tile<T, kPairs, 1>{p, scratch, b, query, left, keys, packed}.run();
      query += kLanes;
    }
  }
}

template <class T, bool kPairs>
HeadMixKernel make_kernel(const HeadMixParams& p) {
  return {kLanes, p.heads * Packed<T, kPairs>(p.dim, p.keys).head_words, Scratch::floats(p), pack<T, kPairs>,
          attend<T, kPairs>};
}

}  // namespace

HeadMixKernel head_mix_kernel(const HeadMixParams& p) {
  return p.bfloat16 ? make_kernel<bf16, kHasPairs>(p) : make_kernel<float, false>(p);
}

}  // namespace fastvit::FASTVIT_ISA
