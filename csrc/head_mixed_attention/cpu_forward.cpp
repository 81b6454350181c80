// Attention whose maps are mixed across heads, forward; compiled once per instruction set.
//
// A tile is one or two vectors of queries, with all heads (see cpu_tiles.h). Its maps, (H, keys, lanes) floats, stay in
// the caches: logits, then exponentials, then the final map, whose product with the values is
//   out_h[d] = sum_j v_h[j][d] M_h[j]
// No other map exists.
//
// Keys and values are packed once per batch element.
#include "head_mixed_attention/cpu_tiles.h"

namespace fastvit::FASTVIT_ISA {
namespace {

void pack(const HeadMixParams& p, int64_t b, AttentionKeys keys, int64_t part, int64_t parts, float* packed) {
  const Packed layout(p.dim, keys.count);
  const int64_t panels = layout.key_panels.blocks, words = layout.words(keys.count);
  // Heads in the inner loop: the heads of a key are adjacent in memory.
  with_element<true>(p.element, [&]<class T>() {
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
  });
}

// A thread's scratch memory for a tile.
struct Scratch : MapScratch {
  static constexpr int64_t kStagedStride = kStagedKeys * kMaxWidth;

  float* maps;      // [head][key][lane]
  float* channels;  // [head][channel][lane]: the queries, then the output
  float* staged;    // [head][key of a group][lane]: probabilities, then the mix

  Scratch(const HeadMixParams& p, Arena& arena)
      : MapScratch(p, arena),
        maps(arena.take(p.heads * map_stride)),
        channels(arena.take(p.heads * word_stride)),
        staged(arena.take(p.heads * kStagedStride)) {}
};

template <int kV>
struct Tile : MapTile<kV> {
  using Base = MapTile<kV>;
  using Base::at, Base::keys, Base::layout;

  const HeadMixParams& p;
  const Scratch& s;
  const float* packed;

  Tile(const HeadMixParams& p, const Scratch& s, int64_t b, int64_t first_query, int64_t queries, AttentionKeys keys,
       const float* packed)
      : Base{p, s, b, first_query, queries, keys}, p(p), s(s), packed(packed) {}

  float* map(int64_t h) const { return s.maps + h * s.map_stride; }
  float* channels(int64_t h) const { return s.channels + h * s.word_stride; }

  void run() const {
    this->load_mask();
    this->load_lanes(p.q, s.channels);
    for (int64_t h = 0; h < p.heads; ++h) {
      this->products_with_keys(packed + h * layout.head_words, channels(h), p.scale, map(h));
      if (p.pre_weight == nullptr) this->softmax(h, map(h));  // while the map is in the cache
    }
    if (p.pre_weight != nullptr) {
      this->mix_logits(s.maps, s.maps);
      for (int64_t h = 0; h < p.heads; ++h) this->softmax(h, map(h));
    }
    if (p.post_weight == nullptr) {
      scale_unmixed();
    } else if (p.heads <= kRows && p.norm_factor == nullptr) {
      mix_in_registers();
    } else {
      mix_in_steps();
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      this->products_with_values(packed + h * layout.head_words, map(h), 1.0f, channels(h));
      const auto hide = [&](int64_t j, int v, Vec yes, Vec no) { return this->hide(h, j, v, yes, no); };
      this->leave_hidden_out(p.v, h, map(h), 1.0f, hide, channels(h));
    }
    this->store_lanes(s.channels, p.out);
  }

  // Less the centre.
  FASTVIT_INLINE Vec probability(int64_t h, int64_t j, int v) const {
    return fma(Vec::load(map(h) + at(j, v)), this->inverse(h, v), Vec::fill(-p.centre));
  }

  template <int kKeys>
  FASTVIT_INLINE void store_final(int64_t h, int64_t j, int v, Vec (&final_values)[kKeys]) const {
    this->zero_masked(h, j, v, final_values);
    this->store_words(map(h), j, v, final_values);
  }

  // From the exponentials to the final map, without storing anything in between.
  void mix_in_registers() const {
    with_constant<kRows>(p.heads, [&](auto heads) {
      constexpr int kKeys = kMixColumns<heads.value>;
      for (int64_t j = 0; j < keys.count; j += kKeys) {
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          Vec mixed[heads.value][kKeys];
          mix_columns<heads.value>(
              heads.value, p.post_weight, p.post_bias, [&](int64_t g, int key) { return probability(g, j + key, v); },
              mixed);
#pragma GCC unroll 16
          for (int h = 0; h < heads.value; ++h) store_final(h, j, v, mixed[h]);
        }
      }
    });
  }

  // With more heads than fit into registers, or a layer norm, which needs all heads.
  void mix_in_steps() const {
    const auto at_staged = [&](int64_t h, int key, int v) { return s.staged + h * s.kStagedStride + at(key, v); };
    for (int64_t j = 0; j < keys.count; j += kStagedKeys) {
      for (int64_t g = 0; g < p.heads; ++g) {
        for (int key = 0; key < kStagedKeys; ++key) {
          for (int v = 0; v < kV; ++v) probability(g, j + key, v).store(at_staged(g, key, v));
        }
      }
      FASTVIT_FLOAT_ISA::mix_heads(p.heads, kStagedKeys * kV, p.post_weight, p.post_bias, s.staged, s.kStagedStride,
                                   s.staged, s.kStagedStride);
      for (int v = 0; v < kV; ++v) {
        Vec inverse[kStagedKeys];
        for (int key = 0; p.norm_factor != nullptr && key < kStagedKeys; ++key) {
          inverse[key] = centre_heads(p.heads, at_staged(0, key, v), s.kStagedStride, p.norm_eps);
        }
        for (int64_t h = 0; h < p.heads; ++h) {
          Vec final_values[kStagedKeys];
          for (int key = 0; key < kStagedKeys; ++key) {
            final_values[key] = Vec::load(at_staged(h, key, v));
            if (p.norm_factor == nullptr) continue;
            const Vec factor = Vec::fill(p.norm_factor[h]), shift = Vec::fill(p.norm_shift[h]);
            final_values[key] = fma(final_values[key] * inverse[key], factor, shift);
          }
          store_final(h, j, v, final_values);
        }
      }
    }
  }

  // Without a mix, the final map is factor * (P_h - centre) + bias.
  void scale_unmixed() const {
    for (int64_t h = 0; h < p.heads; ++h) {
      const Vec factor = Vec::fill(p.post_factor[h]), bias = Vec::fill(p.post_bias[h]);
      for (int64_t j = 0; j < keys.count; j += 2) {
        for (int v = 0; v < kV; ++v) {
          Vec final_values[2];
          for (int key = 0; key < 2; ++key) final_values[key] = fma(probability(h, j + key, v), factor, bias);
          store_final(h, j, v, final_values);
        }
      }
    }
  }
};

void attend(const HeadMixParams& p, int64_t b, int64_t begin, int64_t end, AttentionKeys keys, const float* packed,
            float* memory) {
  Arena arena{memory};
  const Scratch scratch(p, arena);
  for_tiles(begin, end, [&](auto vectors, int64_t first_query, int64_t queries) {
    Tile<vectors.value>(p, scratch, b, first_query, queries, keys, packed).run();
  });
}

}  // namespace

HeadMixKernel head_mix_kernel(const HeadMixParams& p) {
  Arena arena{nullptr};
  const Scratch scratch(p, arena);
  return {kLanes, p.heads * Packed(p.dim, p.keys).head_words, arena.used, pack, attend};
}

}  // namespace fastvit::FASTVIT_ISA
