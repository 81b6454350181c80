// From the gradients of a tile's maps to those of q, k, and the mix before the softmax; compiled once per instruction
// set.
//
// With dP the gradient of the maps P, for one query,
//   dS'_g[j] = P_g[j] (dP_g[j] - sum_j P_g[j] dP_g[j])        dS_h[j] = sum_g L[g][h] dS'_g[j]
//   dq_h[d] = scale sum_j k_h[j][d] dS_h[j]                   dk_h[j][d] = scale sum_i dS_h[j][i] q_h[i][d]
// and dL[g][h] = sum dS'_g S_h over all queries and keys. The gradient of the bias before the softmax is zero, unless
// something is NaN: a constant added to all logits of a row changes nothing.
//
// The first three are products with queries in the lanes. The fourth is a sum over queries, of scalars from the map
// with rows of q; it accumulates in float32, per batch element or part of its queries. Sums over queries and keys are
// taken per block of keys, added up per tile, and over tiles in double.
#pragma once

#include "head_mixed_attention/cpu_tiles.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t kBlockKeys = 8;  // whose maps, with all heads, stay in the L1 cache

// block(begin, end) for every block of keys.
template <class F>
FASTVIT_INLINE void for_key_blocks(int64_t keys, const F& block) {
  for (int64_t begin = 0; begin < keys; begin += kBlockKeys) {
    block(begin, keys - begin < kBlockKeys ? keys : begin + kBlockKeys);
  }
}

// Packs k of a batch element, head by head: panels of keys, and of channels.
inline void pack_keys(const HeadMapParams& p, int64_t b, AttentionKeys keys, float* packed) {
  const Packed layout(p.dim, keys.count);
  for (int64_t h = 0; h < p.heads; ++h, packed += layout.head_words) {
    with_rows(p.element, p.k, b, h, [&](auto k) {
      for (int64_t panel = 0; panel < layout.key_panels.blocks; ++panel) {
        pack_key_panel(k, layout, keys.indices, panel, packed);
      }
      for (int64_t word = 0; word < layout.words(keys.count); ++word) {
        pack_value_row(k, layout, keys.indices, word, packed);
      }
    });
  }
}

// A head's panels of keys alone, of k or v.
inline void pack_key_panels(const HeadMapParams& p, const AttentionOperand& k, int64_t b, AttentionKeys keys,
                            float* packed) {
  const Packed layout(p.dim, keys.count);
  for (int64_t h = 0; h < p.heads; ++h, packed += layout.key_panels.blocks * layout.key_words) {
    with_rows(p.element, k, b, h, [&](auto rows) {
      for (int64_t panel = 0; panel < layout.key_panels.blocks; ++panel) {
        pack_key_panel(rows, layout, keys.indices, panel, packed);
      }
    });
  }
}

// A thread's scratch memory for a tile.
struct GradientScratch : MapScratch {
  HeadMapTotals totals;
  int64_t row_stride;   // of rows of q: the channels, padded to whole vectors
  int64_t rows_stride;  // of heads in [head][word of queries][channel]
  float* maps;          // [head][key][lane]: P
  float* gradients;     // [head][key][lane]: of M, then of P, of S', of S
  float* logits;        // [head][key][lane]: S, with a mix before the softmax
  float* delta;         // [head][lane]: sum_j P_g[j] dP_g[j]
  float* channels;      // [head][channel][lane]: the queries, then dq
  float* query_rows;    // [head][word of queries][channel]
  float* query_finite;  // [head][lane]: with a mask, whether a row of q is; where it is not, zeros take its place
  float* lane_sums;     // [total][lane]: the sums of a tile

  GradientScratch(const HeadMapParams& p, Arena& arena)
      : MapScratch(p, arena),
        totals{p.heads},
        row_stride(padded(p.dim)),
        rows_stride(kMaxWidth * row_stride),
        maps(arena.take(p.heads * map_stride)),
        gradients(arena.take(p.heads * map_stride)),
        logits(p.pre_weight == nullptr ? nullptr : arena.take(p.heads * map_stride)),
        delta(arena.take(p.heads * kMaxWidth)),
        channels(arena.take(p.heads * word_stride)),
        query_rows(arena.take(p.heads * rows_stride)),
        query_finite(arena.take(p.heads * kMaxWidth)),
        lane_sums(arena.take(totals.count() * kLanes)) {}
};

template <int kV>
struct GradientTile : MapTile<kV> {
  using Base = MapTile<kV>;
  using Base::at, Base::kWidth, Base::keys, Base::layout, Base::b, Base::first_query, Base::queries;

  const HeadMapGradientParams& p;
  const GradientScratch& s;
  const float* packed;  // of k
  float* dk;            // [head][key][channel]: sums

  GradientTile(const HeadMapGradientParams& p, const GradientScratch& s, int64_t b, int64_t first_query,
               int64_t queries, AttentionKeys keys, const float* packed, float* dk)
      : Base{p, s, b, first_query, queries, keys}, p(p), s(s), packed(packed), dk(dk) {}

  float* map(int64_t h) const { return s.maps + h * s.map_stride; }
  float* gradient(int64_t h) const { return s.gradients + h * s.map_stride; }
  float* logits(int64_t h) const { return s.logits + h * s.map_stride; }
  float* lane_sum(int64_t total) const { return s.lane_sums + total * kLanes; }

  // The maps P and the inputs of later steps.
  void compute_maps() const {
    this->load_mask();
    this->load_lanes(p.q, s.channels);
    load_rows(p.q, s.query_rows, s.query_finite);
    for (int64_t h = 0; h < p.heads; ++h) {
      float* out = p.pre_weight == nullptr ? map(h) : logits(h);
      this->products_with_keys(packed + h * layout.head_words, s.channels + h * s.word_stride, p.scale, out);
      if (p.pre_weight == nullptr) finish_map(h);
    }
    if (p.pre_weight != nullptr) {
      this->mix_logits(s.logits, s.maps);
      bool finite = true;
      for (int64_t h = 0; h < p.heads; ++h) finite &= finish_map(h);
      if (p.mask != nullptr && !finite) clear_hidden_logits();
    }
    __builtin_memset(s.delta, 0, p.heads * kWidth * sizeof(float));
    __builtin_memset(s.lane_sums, 0, s.totals.count() * kLanes * sizeof(float));
  }

  bool finish_map(int64_t h) const {
    const bool finite = this->softmax(h, map(h));
    for (int64_t j = 0; j < keys.count; ++j) {
      for (int v = 0; v < kV; ++v) (Vec::load(map(h) + at(j, v)) * this->inverse(h, v)).store(map(h) + at(j, v));
    }
    if (p.mask != nullptr && has_nan(s.inverse + h * kWidth, kWidth)) {
      for_each_place([&](int64_t j, int v, int64_t place) {
        this->hide(h, j, v, Vec::fill(0.0f), Vec::load(map(h) + place)).store(map(h) + place);
      });
    }
    return finite;
  }

  template <class F>
  FASTVIT_INLINE void for_each_place(const F& f) const {
    for (int64_t j = 0; j < keys.count; ++j) {
      for (int v = 0; v < kV; ++v) f(j, v, at(j, v));
    }
  }

  // S where every head's mask hides it, so that its products with gradients of zero are zero.
  void clear_hidden_logits() const {
    for (int64_t h = 0; h < p.heads; ++h) {
      for_each_place([&](int64_t j, int v, int64_t place) {
        this->hide_from_all(j, v, Vec::fill(0.0f), Vec::load(logits(h) + place)).store(logits(h) + place);
      });
    }
  }

  // Rows of q, or of a tensor of its shape, for products that sum over queries.
  void load_rows(const AttentionOperand& q, float* out, float* finite) const {
    with_element(p.element, [&]<class T>() { load_rows_of<T>(q, out, finite); });
  }

  template <class T>
  void load_rows_of(const AttentionOperand& q, float* out, float* finite) const {
    for (int64_t h = 0; p.mask != nullptr && h < p.heads; ++h) {
      for (int64_t i = 0; i < queries; ++i) {
        finite[h * kMaxWidth + i] = is_finite(Rows<T>(q, b, h)[first_query + i], p.dim);
      }
    }
    const auto takes_part = [&](int64_t h, int64_t i) {
      return p.mask == nullptr || finite[h * kMaxWidth + i] != 0.0f;
    };
    for (int64_t i = 0; i < queries; i += kPairs ? 2 : 1) {
      for (int64_t h = 0; h < p.heads; ++h) {
        float* row = out + h * s.rows_stride + i / (kPairs ? 2 : 1) * s.row_stride;
        const T* first = Rows<T>(q, b, h)[first_query + i];
        if constexpr (kPairs) {
          const bool has_first = takes_part(h, i), has_second = i + 1 < queries && takes_part(h, i + 1);
          const T* second = has_second ? Rows<T>(q, b, h)[first_query + i + 1] : nullptr;
          for (int64_t d = 0; d < p.dim; ++d) {
            row[d] = pair(has_first ? first[d] : bf16{0}, has_second ? second[d] : bf16{0});
          }
        } else {
          const bool present = takes_part(h, i);
          for (int64_t d = 0; d < p.dim; ++d) row[d] = present ? widen(first[d]) : 0.0f;
        }
        for (int64_t d = p.dim; d < s.row_stride; ++d) row[d] = 0.0f;
      }
    }
  }

  // sums[j][d] += sum_i map[j][i] rows[i][d] for keys [begin, end).
  void add_to_keys(int64_t count, const float* map, const float* rows, float* sums) const {
    add_outer_product(count, s.row_stride / kLanes, layout.words(queries), map, kWidth, rows, sums);
  }

  // The share in those sums of queries whose rows are not finite, in those of the keys they see.
  template <class Hide>
  void add_left_out(const AttentionOperand& q, const float* finite, int64_t h, int64_t begin, int64_t end,
                    const float* map, const Hide& hide, float* sums) const {
    for (int64_t i = 0; p.mask != nullptr && i < queries; ++i) {
      if (finite[h * kMaxWidth + i] != 0.0f) continue;
      for (int64_t j = begin; j < end; ++j) {
        float hidden[kLanes];
        hide(j, static_cast<int>(i / kLanes), Vec::fill(1.0f), Vec::fill(0.0f)).store(hidden);
        if (hidden[i % kLanes] != 0.0f) continue;
        const float* key = map + (j - begin) * kWidth;
        const float weight = kPairs ? widen(reinterpret_cast<const bf16*>(key)[i]) : key[i];
        with_rows(p.element, q, b, h, [&](auto rows) {
          const auto* row = rows[first_query + i];
          for (int64_t d = 0; d < p.dim; ++d) sums[(j - begin) * s.row_stride + d] += weight * widen(row[d]);
        });
      }
    }
  }

  // Key j of a map in the layout that add_to_keys reads: queries, or pairs of them.
  FASTVIT_INLINE void store_for_keys(float* row, int v, Vec x) const {
    if constexpr (kPairs) {
      x.store(reinterpret_cast<bf16*>(row) + v * kLanes);
    } else {
      x.store(row + v * kLanes);
    }
  }

  // The gradients of P for keys [begin, end), from maps `from`, which may be the gradients themselves.
  void gradients_of_maps(int64_t begin, int64_t end, const float* from) const {
    if (p.map_gradient != nullptr) {
      FASTVIT_FLOAT_ISA::mix_heads(p.heads, (end - begin) * kV, p.map_gradient, p.map_gradient_bias,
                                   from + at(begin, 0), s.map_stride, gradient(0) + at(begin, 0), s.map_stride);
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t i = at(begin, 0); p.map_gradient == nullptr && i < at(end, 0); i += kLanes) {
        (Vec::load(gradient(h) + i) * Vec::fill(p.post_factor[h])).store(gradient(h) + i);
      }
      for (int v = 0; v < kV; ++v) {
        float* delta = s.delta + h * kWidth + v * kLanes;
        Vec part = Vec::fill(0.0f);
        for (int64_t j = begin; j < end; ++j) {
          part = fma(Vec::load(map(h) + at(j, v)), Vec::load(gradient(h) + at(j, v)), part);
        }
        (Vec::load(delta) + part).store(delta);
      }
    }
  }

  // dS'.
  FASTVIT_INLINE Vec gradient_of_logit(int64_t h, int64_t j, int v) const {
    const Vec delta = Vec::load(s.delta + h * kWidth + v * kLanes);
    return Vec::load(map(h) + at(j, v)) * (Vec::load(gradient(h) + at(j, v)) - delta);
  }

  // dS_h of two keys, in the layouts of the products with keys and with queries. Overwrites the maps.
  FASTVIT_INLINE void store_gradient(int64_t h, int64_t j, int v, const Vec (&x)[2]) const {
    this->store_words(gradient(h), j, v, x);
    if constexpr (kPairs) {
      for (int key = 0; key < 2; ++key) store_for_keys(map(h) + at(j + key, 0), v, x[key]);
    }
  }

  // Where a sum of P dP is not finite: dP less the sum without hidden keys, whose own dP becomes zero. If that is not
  // finite either, nor is dS', nor its sum, the gradient of the bias before the softmax.
  void settle_deltas() const {
    if (is_finite(s.delta, p.heads * kWidth)) return;
    const Vec zero = Vec::fill(0.0f);
    const auto add_to_pre_bias = [&](int64_t h, Vec delta) {
      float* to = lane_sum(s.totals.pre_bias() + h);
      fma(delta, zero, Vec::load(to)).store(to);
    };
    for (int64_t h = 0; h < p.heads; ++h) {
      if (p.mask == nullptr) {
        for (int v = 0; v < kV; ++v) add_to_pre_bias(h, Vec::load(s.delta + h * kWidth + v * kLanes));
        continue;
      }
      Vec delta[kV];
      for (int v = 0; v < kV; ++v) delta[v] = zero;
      for_each_place([&](int64_t j, int v, int64_t place) {
        const Vec dp = this->hide(h, j, v, zero, Vec::load(gradient(h) + place));
        delta[v] = fma(Vec::load(map(h) + place), dp, delta[v]);
      });
      for_each_place([&](int64_t j, int v, int64_t place) {
        this->hide(h, j, v, zero, Vec::load(gradient(h) + place) - delta[v]).store(gradient(h) + place);
      });
      for (int v = 0; v < kV; ++v) {
        add_to_pre_bias(h, delta[v]);
        zero.store(s.delta + h * kWidth + v * kLanes);
      }
    }
  }

  // From the gradients of P to everything else.
  void gradients_of_queries_and_keys() const {
    settle_deltas();
    if (p.pre_weight != nullptr) gradients_through_mixed_logits();
    for (int64_t h = 0; h < p.heads; ++h) {
      if (p.pre_weight == nullptr) gradients_of_logits(h);
      float *channels = s.channels + h * s.word_stride, *dk_head = dk + h * p.keys * s.row_stride;
      const float* of_keys = kPairs ? map(h) : gradient(h);
      const auto hide = [&](int64_t j, int v, Vec yes, Vec no) {
        return p.pre_weight == nullptr ? this->hide(h, j, v, yes, no) : this->hide_from_all(j, v, yes, no);
      };
      this->products_with_values(packed + h * layout.head_words, gradient(h), p.scale, channels);
      this->leave_hidden_out(p.k, h, gradient(h), p.scale, hide, channels);
      add_to_keys(keys.count, of_keys, s.query_rows + h * s.rows_stride, dk_head);
      add_left_out(p.q, s.query_finite, h, 0, keys.count, of_keys, hide, dk_head);
    }
    this->store_lanes(s.channels, p.dq);
  }

  void gradients_of_logits(int64_t h) const {
    for (int64_t j = 0; j < keys.count; j += 2) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        const Vec x[2] = {gradient_of_logit(h, j, v), gradient_of_logit(h, j + 1, v)};
        store_gradient(h, j, v, x);
      }
    }
  }

  void gradients_through_mixed_logits() const {
    // Zeros at hidden pairs times such weights would be NaN.
    const bool hides = p.mask != nullptr && !is_finite(p.pre_gradient, p.heads * p.heads);
    for_key_blocks(keys.count, [&](int64_t begin, int64_t end) {
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t j = begin; j < end; ++j) {
          for (int v = 0; v < kV; ++v) gradient_of_logit(h, j, v).store(gradient(h) + at(j, v));
        }
      }
      FASTVIT_FLOAT_ISA::add_products_of_heads(p.heads, (end - begin) * kV, gradient(0) + at(begin, 0), s.map_stride,
                                               logits(0) + at(begin, 0), s.map_stride, false,
                                               lane_sum(s.totals.pre_products()));
      FASTVIT_FLOAT_ISA::mix_heads(p.heads, (end - begin) * kV, p.pre_gradient, p.zeros, gradient(0) + at(begin, 0),
                                   s.map_stride, gradient(0) + at(begin, 0), s.map_stride);
      for (int64_t h = 0; hides && h < p.heads; ++h) {
        for (int64_t j = begin; j < end; ++j) {
          for (int v = 0; v < kV; ++v) {
            float* x = gradient(h) + at(j, v);
            this->hide_from_all(j, v, Vec::fill(0.0f), Vec::load(x)).store(x);
          }
        }
      }
      if constexpr (kPairs) {
        for (int64_t h = 0; h < p.heads; ++h) {
          for (int64_t j = begin; j < end; j += 2) {
            for (int v = 0; v < kV; ++v) {
              const Vec x[2] = {Vec::load(gradient(h) + at(j, v)), Vec::load(gradient(h) + at(j + 1, v))};
              store_gradient(h, j, v, x);
            }
          }
        }
      }
    });
  }

  void add_totals(double* totals) const {
    for (int64_t i = 0; i < s.totals.count(); ++i) totals[i] += static_cast<double>(sum(Vec::load(lane_sum(i))));
  }
};

// The gradient of k or v of one head: the sum over parts, `part_stride` floats apart; zeros for masked keys.
template <class T>
void finish_rows(const HeadMapParams& p, int64_t b, int64_t h, AttentionKeys keys, const float* sums, int64_t parts,
                 int64_t part_stride, float factor, void* out) {
  const int64_t row_stride = padded(p.dim);
  int64_t next = 0;  // in the list of keys
  for (int64_t j = 0; j < p.keys; ++j) {
    T* row = static_cast<T*>(out) + ((b * p.keys + j) * p.heads + h) * p.dim;
    const bool attended = next < keys.count && keys.indices[next] == j;
    const float* from = sums + (h * p.keys + next) * row_stride;
    for (int64_t d = 0; d < p.dim; d += kLanes) {
      Vec total = Vec::fill(0.0f);
      for (int64_t part = 0; attended && part < parts; ++part) total += Vec::load(from + part * part_stride + d);
      store(total * Vec::fill(factor), row + d, smaller(kLanes, p.dim - d));
    }
    next += attended;
  }
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
