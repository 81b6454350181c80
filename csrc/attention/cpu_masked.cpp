// Attention with a mask and an additive bias, forward; compiled once per instruction set.
//
// A tile is one or two vectors of queries of one head; it takes its keys a block at a time:
//   S[j] = sum_d k[j][d] q[d] + bias[j]     P[j] = exp(S[j] - max)     out[d] = sum_j v[j][d] P[j] / sum_j P[j]
// The map of a tile, (keys of a block, lanes) floats, stays in the L1 and L2 caches; no other map exists. The usual 197
// tokens of a vision transformer are one block. With more, the results of earlier blocks are multiplied by
// exp(old max - new max) as the maximum rises (online softmax, Milakov and Gimelshein 2018).
//
// Keys and values are packed once per head, block by block (see Packed).
#include "attention/args_masked.h"

#include "attention/cpu_bias.h"
#include "attention/cpu_tiles.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// Most keys of a block: its map takes 64 KiB with 16 lanes, 32 KiB with 8.
constexpr int64_t kBlockKeys = 512;

// A head's keys in blocks, each packed on its own.
struct Blocks : Split {
  int64_t dim, words;  // of the largest one

  Blocks(int64_t dim, int64_t keys)
      : Split(keys, kBlockKeys), dim(dim), words(Packed(dim, keys < kBlockKeys ? keys : kBlockKeys).head_words) {}
  Packed layout(int64_t block) const { return {dim, size(block)}; }
};

void pack(const MaskedAttentionParams& p, int64_t problem, AttentionKeys keys, int64_t part, int64_t parts,
          float* packed) {
  const int64_t b = problem / p.heads, h = problem % p.heads;
  const Blocks blocks(p.dim, keys.count);
  for (int64_t block = 0; block < blocks.blocks; ++block, packed += blocks.words) {
    const Packed layout = blocks.layout(block);
    const int32_t* indices = keys.indices + blocks.begin(block);
    const int64_t panels = layout.key_panels.blocks, words = layout.words(layout.count);
    with_rows<true>(p.element, p.k, b, h, [&](auto k) {
      for (int64_t panel = part * panels / parts; panel < (part + 1) * panels / parts; ++panel) {
        pack_key_panel(k, layout, indices, panel, packed);
      }
    });
    with_rows<true>(p.element, p.v, b, h, [&](auto v) {
      for (int64_t word = part * words / parts; word < (part + 1) * words / parts; ++word) {
        pack_value_row(v, layout, indices, word, packed);
      }
    });
  }
}

// A thread's scratch memory for a tile.
struct Scratch {
  static constexpr int64_t kWidth = kTileVectors * kLanes;

  float* map;       // [key of a block][lane]: logits, then exponentials
  float* mask;      // [key of a block][lane]: +inf where attended to, -inf elsewhere
  float* bias;      // [key of a block][lane]
  float* queries;   // [word of channels][lane]
  float* channels;  // [channel][lane]: the output

  static int64_t map_floats(const MaskedAttentionParams& p) {
    return (p.keys < kBlockKeys ? p.keys : kBlockKeys) * kWidth;
  }
  static int64_t channel_floats(const MaskedAttentionParams& p) { return round_up(p.dim, 4) * kWidth; }
  static int64_t floats(const MaskedAttentionParams& p) {
    return (1 + (p.mask != nullptr) + (p.bias != nullptr)) * map_floats(p) + 2 * channel_floats(p);
  }

  Scratch(const MaskedAttentionParams& p, float* memory)
      : map(memory),
        mask(map + map_floats(p)),
        bias(mask + (p.mask != nullptr) * map_floats(p)),
        queries(bias + (p.bias != nullptr) * map_floats(p)),
        channels(queries + channel_floats(p)) {}
};

template <int kV>  // kV vectors of queries
struct Tile {
  static constexpr int64_t kWidth = kV * kLanes;

  const MaskedAttentionParams& p;
  const Scratch& s;
  int64_t b, h, first_query, queries;  // queries <= kWidth
  AttentionKeys keys;
  const float* packed;
  const Limits<kV> limits{p, s.mask, s.bias};
  Vec largest[kV] = {}, sum[kV] = {};

  void run() {
    load_queries();
    gather(false);
    if (can_hide(p) && has_nan(s.channels, p.dim * kWidth)) gather(true);
    store_output();
  }

  // The output, not yet divided. leave_out: hidden keys are left out of the product with v, where otherwise their
  // weight is zero.
  void gather(bool leave_out) {
    const Blocks blocks(p.dim, keys.count);
    // Where a row may have no key in a block, its largest logit starts finite, so that logit - largest is.
    const bool always_a_key = p.mask == nullptr && p.bias == nullptr && blocks.blocks == 1;
    for (int v = 0; v < kV; ++v) {
      largest[v] = Vec::fill(always_a_key ? -__builtin_inff() : -__FLT_MAX__);
      sum[v] = Vec::fill(0.0f);
    }
    for (int64_t block = 0; block < blocks.blocks; ++block) {
      const AttentionKeys part{keys.indices + blocks.begin(block), blocks.size(block)};
      const Packed layout = blocks.layout(block);
      const float* from = packed + block * blocks.words;
      limits.load(b, h, first_query, queries, part);
      logits(layout, from);
      exponentials(part.count, block > 0);
      if (leave_out) {
        const auto hide = [&](int64_t j, int v, Vec yes, Vec no) { return limits.hide(j, v, yes, no); };
        with_rows<true>(p.element, p.v, b, h, [&](auto v) {
          product_of_visible<kV>(v, part, p.dim, s.map, 1.0f, hide, s.channels, block > 0);
        });
      } else {
        output(layout, from, block > 0);
      }
    }
    if (blocks.blocks == 0) __builtin_memset(s.channels, 0, round_up(p.dim, 4) * kWidth * sizeof(float));
  }

  void load_queries() const {
    with_rows<true>(p.element, p.q, b, h, [&](auto q) {
      for (int64_t first = 0; first < kWidth; first += 4) {
        load_four_queries(q, first_query + first, queries - first, p.dim, s.queries + first, kWidth);
      }
    });
  }

  void logits(const Packed& layout, const float* from) const {
    multiply_panels(layout.count, layout.key_words, kV, layout.words(p.dim), from, s.queries, p.scale, s.map);
  }

  // The map becomes exp(S - largest), in the layout of the product with v. Updates largest and sum, and scales the
  // results of earlier blocks to the new largest.
  void exponentials(int64_t count, bool later) {
    Vec before[kV];
    for (int v = 0; v < kV; ++v) before[v] = largest[v];
    for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        float* at = s.map + j * kWidth + v * kLanes;
        const Vec x = limits.limit(j, v, Vec::load(at));
        if (p.bias != nullptr || p.mask != nullptr) x.store(at);
        largest[v] = max(x, largest[v]);
      }
    }
    if (later) {
      for (int v = 0; v < kV; ++v) {
        const Vec shrink = exp_nonpositive(before[v] - largest[v]);
        sum[v] *= shrink;
        for (int64_t d = 0; d < p.dim; ++d) {
          float* at = s.channels + d * kWidth + v * kLanes;
          (Vec::load(at) * shrink).store(at);
        }
      }
    }
    for (int64_t first = 0; first < count; first += kPartialSum) {
      exponentials_of(first, count - first < kPartialSum ? count : first + kPartialSum);
    }
  }

  // The same for a few keys, as one partial sum: long sums are less accurate. `begin` is even.
  void exponentials_of(int64_t begin, int64_t end) {
    Vec part[kV];
    for (int v = 0; v < kV; ++v) part[v] = Vec::fill(0.0f);
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
      for (int64_t j = begin; j < end; j += 2) {
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          const Vec first = exponential(j, v), second = j + 1 < end ? exponential(j + 1, v) : Vec::fill(0.0f);
          part[v] += first + second;
          round_to_pairs(first, second).store(s.map + j / 2 * kWidth + v * kLanes);  // not past what has been read
        }
      }
    } else
#endif
    {
      for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          const Vec e = exponential(j, v);
          part[v] += e;
          e.store(s.map + j * kWidth + v * kLanes);
        }
      }
    }
    for (int v = 0; v < kV; ++v) sum[v] += part[v];
  }

  FASTVIT_INLINE Vec exponential(int64_t j, int v) const {
    return exp_nonpositive(Vec::load(s.map + j * kWidth + v * kLanes) - largest[v]);
  }

  void output(const Packed& layout, const float* from, bool add) const {
    multiply_panels(p.dim, layout.value_words, kV, layout.words(layout.count), from + layout.value_panel(0), s.map,
                    1.0f, s.channels, kPartialSum, add);
  }

  void store_output() {
    fail_infinite_rows(p, b, h, first_query, queries, keys, sum);
    for (int v = 0; v < kV; ++v) {
      // The sum is zero only where no key is seen: any finite inverse will do.
      const Vec inverse = Vec::fill(1.0f) / max(Vec::fill(__FLT_MIN__), sum[v]);
      for (int64_t d = 0; d < p.dim; ++d) {
        float* at = s.channels + d * kWidth + v * kLanes;
        (Vec::load(at) * inverse).store(at);
      }
    }
    const int64_t stride = p.heads * p.dim;
    with_element<true>(p.element, [&]<class T>() {
      T* out = static_cast<T*>(p.out) + (b * p.queries + first_query) * stride + h * p.dim;
      for (int64_t i = 0; i < queries; i += 4) {
        store_four_queries(s.channels + i, kWidth, queries - i, p.dim, out + i * stride, stride);
      }
    });
  }
};

void attend(const MaskedAttentionParams& p, int64_t problem, int64_t begin, int64_t end, AttentionKeys keys,
            const float* packed, float* memory) {
  const Scratch scratch(p, memory);
  const int64_t b = problem / p.heads, h = problem % p.heads;
  for_tiles(begin, end, [&](auto vectors, int64_t first_query, int64_t queries) {
    Tile<vectors.value>{p, scratch, b, h, first_query, queries, keys, packed}.run();
  });
}

}  // namespace

MaskedAttentionKernel masked_attention_kernel(const MaskedAttentionParams& p) {
  const Blocks blocks(p.dim, p.keys);
  return {kLanes, blocks.blocks * blocks.words, Scratch::floats(p), pack, attend};
}

}  // namespace fastvit::FASTVIT_ISA
