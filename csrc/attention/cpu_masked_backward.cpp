// Attention with a mask and an additive bias, backward; compiled once per instruction set.
//
// A tile is one or two vectors of queries of one head and all of its keys; with G the gradient of the output:
//   P[j] = softmax_j(scale q k[j] + bias[j])     dP[j] = sum_d v[j][d] G[d]     dS[j] = P[j] (dP[j] - sum_i P[i] dP[i])
//   dq[d] = scale sum_j dS[j] k[j][d]     dk[j][d] = scale sum_lane dS[j] q[d]     dv[j][d] = sum_lane P[j] G[d]
// P is recomputed as in the forward pass, and sum_i P[i] dP[i] is taken of the same dP that it is subtracted from:
// where one key has all the weight, the difference is exactly zero, as in the plain form. Computed from a saved output,
// as G . out, it would be the output's rounding error. So nothing is saved for the backward pass.
//
// The two maps of a tile, (keys, lanes) floats each, stay in the L2 cache; no other map exists.
#include "attention/args_masked.h"
#include "attention/cpu_bias.h"
#include "attention/cpu_tiles.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// With more keys a tile is one vector of queries, so that its maps stay in the L2 cache.
constexpr int64_t kWideTileKeys = 1536;
constexpr int64_t kTileWidth = kTileVectors * kLanes;
constexpr int64_t kBlockKeys = 256;  // of mask and bias, expanded at a time
// Terms of a partial sum, in products and in sums over a row: an error in dS, where gradients cancel, appears in full
// in dq.
constexpr int64_t kTerms = 16, kFewTerms = 8;

// Keys as panels of keys and of channels, and values as panels of keys: see Packed.
struct PackedForBackward {
  Packed layout;

  PackedForBackward(int64_t dim, int64_t count) : layout(dim, count) {}
  int64_t values() const { return layout.head_words; }
  // The last term: a panel of fewer channels also copies those of the next one.
  int64_t words() const { return layout.head_words + layout.key_panels.blocks * layout.key_words + kRows; }
};

void pack(const MaskedAttentionGradients& p, int64_t problem, AttentionKeys keys, float* packed) {
  const int64_t b = problem / p.heads, h = problem % p.heads;
  const PackedForBackward both(p.dim, keys.count);
  with_element(p.element, [&]<class T>() {
    const Rows<T> k(p.k, b, h), v(p.v, b, h);
    for (int64_t panel = 0; panel < both.layout.key_panels.blocks; ++panel) {
      pack_key_panel(k, both.layout, keys.indices, panel, packed);
      pack_key_panel(v, both.layout, keys.indices, panel, packed + both.values());
    }
    for (int64_t word = 0; word < both.layout.words(keys.count); ++word) {
      pack_value_row(k, both.layout, keys.indices, word, packed);
    }
  });
}

// A thread's scratch memory for a tile.
struct Scratch {
  float *map, *gradient;            // [key][lane]: P, and dP, then dS; see Tile::pack_pairs
  float *mask, *bias;               // [key of a block][lane]
  float *queries, *outputs;         // [word of channels][lane] of q and G
  float* channels;                  // [channel][lane]: dq
  float *query_rows, *output_rows;  // [lane, or pair of lanes][channel] of q and G

  static int64_t map_floats(const AttentionParams& p) { return p.keys * kTileWidth; }
  static int64_t block_floats(bool used) { return used ? kBlockKeys * kTileWidth : 0; }
  static int64_t channel_floats(const AttentionParams& p) { return round_up(p.dim, 4) * kTileWidth; }
  static int64_t row_floats(const AttentionParams& p) { return padded(p.dim) * kTileWidth; }
  static int64_t floats(const MaskedAttentionParams& p) {
    return 2 * map_floats(p) + block_floats(p.mask != nullptr) + block_floats(p.bias != nullptr) +
           3 * channel_floats(p) + 2 * row_floats(p);
  }

  Scratch(const MaskedAttentionParams& p, float* memory)
      : map(memory),
        gradient(map + map_floats(p)),
        mask(gradient + map_floats(p)),
        bias(mask + block_floats(p.mask != nullptr)),
        queries(bias + block_floats(p.bias != nullptr)),
        outputs(queries + channel_floats(p)),
        channels(outputs + channel_floats(p)),
        query_rows(channels + channel_floats(p)),
        output_rows(query_rows + row_floats(p)) {}
};

template <int kV>  // kV vectors of queries
struct Tile {
  static constexpr int64_t kWidth = kV * kLanes;

  const MaskedAttentionGradients& p;
  const Scratch& s;
  int64_t b, h, first_query, queries;  // queries <= kWidth
  AttentionKeys keys;
  const float* packed;
  float *sums, *bias_sums;
  const Limits<kV> limits{p, s.mask, s.bias};
  bool left_out[kWidth] = {};  // of the products over queries, as their rows are not finite

  void run() {
    const PackedForBackward both(p.dim, keys.count);
    with_element(p.element, [&]<class T>() {
      const Rows<T> q(p.q, b, h), grad(p.grad, b, h);
      for (int64_t i = 0; can_hide(p) && i < queries; ++i) {
        left_out[i] = !is_finite(q[first_query + i], p.dim) || !is_finite(grad[first_query + i], p.dim);
      }
      load(q, s.queries, s.query_rows);
      load(grad, s.outputs, s.output_rows);
    });
    product_with_rows(both.layout, packed, s.queries, p.scale, s.map);
    product_with_rows(both.layout, packed + both.values(), s.outputs, 1.0f, s.gradient);
    softmax();
    if (bias_sums != nullptr) add_bias_gradient();
    pack_pairs();
    store_query_gradient(both.layout);
    add_key_gradients();
    for (int64_t i = 0; i < queries; ++i) {
      if (left_out[i]) with_element(p.element, [&]<class T>() { add_key_gradients_of<T>(i); });
    }
  }

  // q, or the gradient of the output, both as lanes and as rows.
  template <class T>
  void load(Rows<T> from, float* lanes, float* rows) const {
    const int64_t width = padded(p.dim);
    for (int64_t first = 0; first < kWidth; first += 4) {
      load_four_queries(from, first_query + first, queries - first, p.dim, lanes + first, kWidth);
    }
    __builtin_memset(rows, 0, width * kWidth / (kPairs ? 2 : 1) * sizeof(float));
    for (int64_t i = 0; i < queries; i += kPairs ? 2 : 1) {
      const T* row = from[first_query + i];
      if constexpr (kPairs) {
        const bool has_next = i + 1 < queries && !left_out[i + 1];
        const T* next = has_next ? from[first_query + i + 1] : nullptr;
        float* to = rows + i / 2 * width;
        for (int64_t d = 0; d < p.dim; ++d) {
          to[d] = pair(left_out[i] ? bf16{0} : row[d], next == nullptr ? bf16{0} : next[d]);
        }
      } else if (!left_out[i]) {
        for (int64_t d = 0; d < p.dim; ++d) rows[i * width + d] = widen(row[d]);
      }
    }
  }

  // out[j][lane] = factor * (packed row j . lane)
  void product_with_rows(const Packed& layout, const float* from, const float* lanes, float factor, float* out) const {
    multiply_panels(layout.count, layout.key_words, kV, layout.words(p.dim), from, lanes, factor, out, kTerms);
  }

  FASTVIT_INLINE float* at(float* map, int64_t j, int v) const { return map + j * kWidth + v * kLanes; }

  // The logits become P, dP becomes dS. Sums are made of partial sums, which are more accurate; and sum_i P[i] dP[i] is
  // computed from the exponentials and then divided by their sum, without P's rounding errors.
  void softmax() {
    Vec largest[kV], sum[kV], dot[kV];
    for (int v = 0; v < kV; ++v) {
      largest[v] = Vec::fill(p.mask == nullptr && p.bias == nullptr ? -__builtin_inff() : -__FLT_MAX__);
      sum[v] = dot[v] = Vec::fill(0.0f);
    }
    for_limited_blocks([&](int64_t first, AttentionKeys block) {
      for (int64_t j = 0; j < block.count; ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          const Vec x = limits.limit(j, v, Vec::load(at(s.map, first + j, v)));
          if (p.bias != nullptr || p.mask != nullptr) x.store(at(s.map, first + j, v));
          largest[v] = max(x, largest[v]);
        }
      }
    });
    in_parts([&](int64_t begin, int64_t end) {
      for (int v = 0; v < kV; ++v) {
        Vec part = Vec::fill(0.0f), dot_part = part;
        for (int64_t j = begin; j < end;) {
          Vec few = Vec::fill(0.0f), dot_few = few;
          for (const int64_t last = end - j < kFewTerms ? end : j + kFewTerms; j < last; ++j) {
            const Vec e = exp_nonpositive(Vec::load(at(s.map, j, v)) - largest[v]);
            e.store(at(s.map, j, v));
            few += e;
            dot_few = fma(e, Vec::load(at(s.gradient, j, v)), dot_few);
          }
          part += few;
          dot_part += dot_few;
        }
        sum[v] += part;
        dot[v] += dot_part;
      }
    });
    fail_infinite_rows(p, b, h, first_query, queries, keys, sum);
    if (can_hide(p)) dot_of_visible(dot);
    for (int v = 0; v < kV; ++v) {
      // The sum is zero only where no key is seen: any finite inverse will do.
      sum[v] = max(Vec::fill(__FLT_MIN__), sum[v]);
      dot[v] = dot[v] / sum[v];
      sum[v] = Vec::fill(1.0f) / sum[v];
    }
    for (int64_t j = 0; j < keys.count; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        const Vec probability = Vec::load(at(s.map, j, v)) * sum[v];
        probability.store(at(s.map, j, v));
        (probability * (Vec::load(at(s.gradient, j, v)) - dot[v])).store(at(s.gradient, j, v));
      }
    }
    bool finite = true;
    for (int v = 0; v < kV; ++v) finite &= all_finite(dot[v]) && all_finite(sum[v]);
    if (can_hide(p) && !finite) clear_hidden(s.map), clear_hidden(s.gradient);
    if (!finite) clear_padding();
  }

  // f(the first of a block of keys, the block), with `limits` of it.
  template <class F>
  FASTVIT_INLINE void for_limited_blocks(const F& f) const {
    for (int64_t first = 0; first < keys.count; first += kBlockKeys) {
      const AttentionKeys block{keys.indices + first, smaller(keys.count - first, kBlockKeys)};
      limits.load(b, h, first_query, queries, block);
      f(first, block);
    }
  }

  void clear_hidden(float* map) const {
    for_limited_blocks([&](int64_t first, AttentionKeys block) {
      for (int64_t j = 0; j < block.count; ++j) {
        for (int v = 0; v < kV; ++v) {
          limits.hide(j, v, Vec::fill(0.0f), Vec::load(at(map, first + j, v))).store(at(map, first + j, v));
        }
      }
    });
  }

  // The lanes beyond the last query: their zeros times what is infinite in a row of k or v are NaN.
  void clear_padding() const {
    for (int64_t j = 0; j < keys.count; ++j) {
      for (int64_t i = queries; i < kWidth; ++i) at(s.map, j, 0)[i] = at(s.gradient, j, 0)[i] = 0.0f;
    }
  }

  // sum_j e[j] dP[j] again without hidden keys, where their dP has made it NaN.
  void dot_of_visible(Vec (&dot)[kV]) const {
    bool is_nan = false;
    for (int v = 0; v < kV; ++v) is_nan |= any_nan(dot[v]);
    if (!is_nan) return;
    clear_hidden(s.gradient);
    for (int v = 0; v < kV; ++v) dot[v] = Vec::fill(0.0f);
    in_parts([&](int64_t begin, int64_t end) {
      for (int v = 0; v < kV; ++v) {
        Vec part = Vec::fill(0.0f);
        for (int64_t j = begin; j < end; ++j) {
          part = fma(Vec::load(at(s.map, j, v)), Vec::load(at(s.gradient, j, v)), part);
        }
        dot[v] += part;
      }
    });
  }

  template <class F>
  FASTVIT_INLINE void in_parts(const F& f) const {
    for (int64_t begin = 0; begin < keys.count; begin += kPartialSum) {
      f(begin, keys.count - begin < kPartialSum ? keys.count : begin + kPartialSum);
    }
  }

  // Compensated sums, as batches may be long: a second float holds what rounding takes off the first (Knuth's two-sum).
  void add_bias_gradient() const {
    float* rest = bias_sums + p.keys * kTileWidth;
    for (int64_t j = 0; j < keys.count; ++j) {
      for (int v = 0; v < kV; ++v) {
        const int64_t offset = keys.indices[j] * kTileWidth + v * kLanes;
        const Vec sum = Vec::load(bias_sums + offset), term = Vec::load(at(s.gradient, j, v)), total = sum + term;
        const Vec part = total - sum;
        total.store(bias_sums + offset);
        (Vec::load(rest + offset) + ((sum - (total - part)) + (term - part))).store(rest + offset);
      }
    }
  }

  // P and dS as pairs, in place: `gradient` becomes [pair of keys][lane] of dS, for the product over keys; a row of the
  // map becomes the key's P and then its dS, lane by lane, for the products over lanes. Nothing is overwritten before
  // it is read.
  void pack_pairs() const {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
      for (int64_t j = 0; j < keys.count; j += 2) {
        Vec probability[2][kV], difference[2][kV];
        for (int i = 0; i < 2; ++i) {
          for (int v = 0; v < kV; ++v) {
            const bool exists = j + i < keys.count;
            probability[i][v] = exists ? Vec::load(at(s.map, j + i, v)) : Vec::fill(0.0f);
            difference[i][v] = exists ? Vec::load(at(s.gradient, j + i, v)) : Vec::fill(0.0f);
          }
        }
        for (int i = 0; i < 2 && j + i < keys.count; ++i) {
          bf16* row = reinterpret_cast<bf16*>(at(s.map, j + i, 0));
          for (int v = 0; v < kV; ++v) {
            probability[i][v].store(row + v * kLanes);
            difference[i][v].store(row + kWidth + v * kLanes);
          }
        }
        for (int v = 0; v < kV; ++v) {
          round_to_pairs(difference[0][v], difference[1][v]).store(at(s.gradient, j / 2, v));
        }
      }
    }
#endif
  }

  void store_query_gradient(const Packed& layout) const {
    multiply_panels(p.dim, layout.value_words, kV, layout.words(keys.count), packed + layout.value_panel(0), s.gradient,
                    p.scale, s.channels, kTerms);
    if (can_hide(p) && has_nan(s.channels, p.dim * kWidth)) {
      for_limited_blocks([&](int64_t first, AttentionKeys block) {
        const auto hide = [&](int64_t j, int v, Vec yes, Vec no) { return limits.hide(j, v, yes, no); };
        const float* map = s.gradient + first / (kPairs ? 2 : 1) * kWidth;
        with_rows(p.element, p.k, b, h,
                  [&](auto k) { product_of_visible<kV>(k, block, p.dim, map, p.scale, hide, s.channels, first > 0); });
      });
    }
    const int64_t stride = p.heads * p.dim;
    with_element(p.element, [&]<class T>() {
      T* out = static_cast<T*>(p.dq) + (b * p.queries + first_query) * stride + h * p.dim;
      for (int64_t i = 0; i < queries; i += 4) {
        store_four_queries(s.channels + i, kWidth, queries - i, p.dim, out + i * stride, stride);
      }
    });
  }

  void add_key_gradients() const {
    const int64_t width = padded(p.dim), depth = words_of(kWidth);
    const float* of_keys = kPairs ? s.map + kWidth / 2 : s.gradient;
    add_outer_product(keys.count, width / kLanes, depth, of_keys, kWidth, s.query_rows, sums);
    add_outer_product(keys.count, width / kLanes, depth, s.map, kWidth, s.output_rows, sums + p.keys * width);
  }

  // What query i alone adds, to the keys it sees.
  template <class T>
  void add_key_gradients_of(int64_t i) const {
    const int64_t width = padded(p.dim);
    const T *query = Rows<T>(p.q, b, h)[first_query + i], *output = Rows<T>(p.grad, b, h)[first_query + i];
    for (int64_t j = 0; j < keys.count; ++j) {
      if (!Sight<T>{p, b, h}.sees(first_query + i, keys.indices[j])) continue;
      float difference = at(s.gradient, j, 0)[i], probability = at(s.map, j, 0)[i];
      if constexpr (kPairs) {
        const bf16* row = reinterpret_cast<const bf16*>(at(s.map, j, 0));
        probability = widen(row[i]), difference = widen(row[kWidth + i]);
      }
      float *keys_to = sums + j * width, *values_to = keys_to + p.keys * width;
      for (int64_t d = 0; d < p.dim; ++d) {
        keys_to[d] += difference * widen(query[d]);
        values_to[d] += probability * widen(output[d]);
      }
    }
  }
};

void attend(const MaskedAttentionGradients& p, int64_t problem, int64_t first_query, AttentionKeys keys,
            const float* packed, float* sums, float* bias_sums, float* memory) {
  const Scratch scratch(p, memory);
  const int64_t b = problem / p.heads, h = problem % p.heads;
  const int64_t left = p.queries - first_query;
  if (left > kLanes && p.keys <= kWideTileKeys) {
    const int64_t queries = left < kTileWidth ? left : kTileWidth;
    Tile<kTileVectors>{p, scratch, b, h, first_query, queries, keys, packed, sums, bias_sums}.run();
  } else {
    const int64_t queries = left < kLanes ? left : kLanes;
    Tile<1>{p, scratch, b, h, first_query, queries, keys, packed, sums, bias_sums}.run();
  }
}

// out = factor * the sum of a row over all parts.
template <class T>
void finish_row(const float* from, int64_t parts, int64_t part_floats, float factor, int64_t dim, T* out) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    Vec sum = Vec::load(from + d);
    for (int64_t part = 1; part < parts; ++part) sum += Vec::load(from + part * part_floats + d);
    store(sum * Vec::fill(factor), out + d, smaller(kLanes, dim - d));
  }
}

template <class T>
void finish(const MaskedAttentionGradients& p, int64_t problem, AttentionKeys keys, const float* sums, int64_t parts,
            int64_t part_floats) {
  const int64_t b = problem / p.heads, h = problem % p.heads, width = padded(p.dim), stride = p.heads * p.dim;
  T* dk = static_cast<T*>(p.dk) + b * p.keys * stride + h * p.dim;
  T* dv = static_cast<T*>(p.dv) + b * p.keys * stride + h * p.dim;
  for (int64_t key = 0, j = 0; key < p.keys; ++key) {
    if (j < keys.count && keys.indices[j] == key) {
      finish_row(sums + j * width, parts, part_floats, p.scale, p.dim, dk + key * stride);
      finish_row(sums + (p.keys + j) * width, parts, part_floats, 1.0f, p.dim, dv + key * stride);
      ++j;
    } else {
      __builtin_memset(dk + key * stride, 0, p.dim * sizeof(T));
      __builtin_memset(dv + key * stride, 0, p.dim * sizeof(T));
    }
  }
}

void read_bias(const MaskedAttentionGradients& p, int64_t queries, const float* bias_sums, float* out, int64_t stride) {
  const float* rest = bias_sums + p.keys * kTileWidth;
  const int64_t summed = stride == 0 ? queries : 1;
  for (int64_t i = 0; i < queries; i += summed) {
    for (int64_t j = 0; j < p.keys; ++j) {
      double total = 0.0;
      for (int64_t lane = i; lane < i + summed; ++lane) {
        const int64_t offset = j * kTileWidth + lane;
        total += static_cast<double>(bias_sums[offset]) + static_cast<double>(rest[offset]);
      }
      out[i * stride + j] = static_cast<float>(total);
    }
  }
}

}  // namespace

MaskedAttentionBackwardKernel masked_attention_backward_kernel(const MaskedAttentionGradients& p) {
  return {p.keys <= kWideTileKeys ? kTileWidth : kLanes,
          PackedForBackward(p.dim, p.keys).words(),
          2 * p.keys * padded(p.dim),
          Scratch::floats(p),
          2 * p.keys * kTileWidth,
          pack,
          attend,
          with_element(p.element, []<class T>() { return &finish<T>; }),
          read_bias};
}

}  // namespace fastvit::FASTVIT_ISA
