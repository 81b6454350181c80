// First and second moments of attention maps across heads, and their gradients; compiled once per instruction set.
//
// With c = 1 / keys, over all queries and keys, masked keys (P = 0) included:
//   sums_g = sum (P_g - c)        moments_gh = sum (P_g - c) (P_h - c)
// A row of a map sums to one, or to zero if all its keys are masked: so the sums only count such rows, without
// rounding; those of a map with NaN are NaN. A gradient of P that is constant along a row therefore has no effect,
// which leaves
//   dP_g = sum_h (dmoments_gh + dmoments_hg) (P_h - c)
#include "head_mixed_attention/cpu_gradients.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// --- The moments -----------------------------------------------------------------------------------------------------

void pack_moments(const HeadMapParams& p, int64_t b, AttentionKeys keys, float* packed) {
  pack_key_panels(p, p.k, b, keys, packed);
}

struct MomentScratch : MapScratch {
  float* maps;       // [head][key][lane]
  float* channels;   // [head][word of channels][lane]: the queries
  float* lane_sums;  // [head][head][lane]

  MomentScratch(const HeadMapParams& p, Arena& arena)
      : MapScratch(p, arena),
        maps(arena.take(p.heads * map_stride)),
        channels(arena.take(p.heads * word_stride)),
        lane_sums(arena.take(p.heads * p.heads * kLanes)) {}
};

template <int kV>
struct MomentTile : MapTile<kV> {
  using Base = MapTile<kV>;
  using Base::at, Base::keys, Base::layout, Base::p, Base::queries;

  const MomentScratch& s;
  const float* packed;

  MomentTile(const HeadMapParams& p, const MomentScratch& s, int64_t b, int64_t first_query, int64_t queries,
             AttentionKeys keys, const float* packed)
      : Base{p, s, b, first_query, queries, keys}, s(s), packed(packed) {}

  float* map(int64_t h) const { return s.maps + h * s.map_stride; }

  void run(double* totals) const {
    const HeadMapTotals at_total{p.heads};
    compute_exponentials();
    __builtin_memset(s.lane_sums, 0, p.heads * p.heads * kLanes * sizeof(float));
    for_key_blocks(keys.count, [&](int64_t begin, int64_t end) {
      centre(begin, end);
      if (p.precise) return add_precise_products(begin, end, totals + at_total.map_products());
      FASTVIT_FLOAT_ISA::add_products_of_heads(p.heads, (end - begin) * kV, map(0) + at(begin, 0), s.map_stride,
                                               map(0) + at(begin, 0), s.map_stride, true, s.lane_sums);
    });
    for (int64_t i = 0; i < p.heads * p.heads; ++i) {
      totals[at_total.map_products() + i] += static_cast<double>(sum(Vec::load(s.lane_sums + i * kLanes)));
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t i = 0; i < queries; ++i) {
        // The largest exponential of a row is one, so its sum is at least one unless all keys are masked.
        const float inverse = s.inverse[h * kV * kLanes + i];
        if (inverse > 1.0f) totals[at_total.mixed() + h] -= 1.0;
        if (inverse != inverse) totals[at_total.mixed() + h] = inverse;
      }
    }
  }

  // Exact products, added up in double.
  void add_precise_products(int64_t begin, int64_t end, double* products) const {
    typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
    typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));
    const auto load = [](const float* from, Doubles& to) {
      Floats x;
      __builtin_memcpy(&x, from, sizeof x);
      to = __builtin_convertvector(x, Doubles);
    };
    for (int64_t g = 0; g < p.heads; ++g) {
      for (int64_t h = g; h < p.heads; ++h) {
        Doubles sums{}, left, right;
        for (int64_t i = at(begin, 0); i < at(end, 0); i += kLanes) {
          load(map(g) + i, left);
          load(map(h) + i, right);
          sums += left * right;
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) products[g * p.heads + h] += sums[lane];
      }
    }
  }

  void compute_exponentials() const {
    this->load_mask();
    this->load_lanes(p.q, s.channels);
    for (int64_t h = 0; h < p.heads; ++h) {
      this->products_with_keys(packed + h * layout.key_panels.blocks * layout.key_words, s.channels + h * s.word_stride,
                               p.scale, map(h));
      if (p.pre_weight == nullptr) this->softmax(h, map(h));
    }
    if (p.pre_weight == nullptr) return;
    this->mix_logits(s.maps, s.maps);
    for (int64_t h = 0; h < p.heads; ++h) this->softmax(h, map(h));
  }

  // P - c of keys [begin, end); zero in lanes without a query.
  void centre(int64_t begin, int64_t end) const {
    for (int v = 0; v < kV; ++v) {
      float exists[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) exists[i] = v * kLanes + i < queries ? 1.0f : 0.0f;
      const Vec query = Vec::load(exists), c = query * Vec::fill(1.0f / static_cast<float>(p.keys));
      for (int64_t h = 0; h < p.heads; ++h) {
        const Vec inverse = this->inverse(h, v) * query;
        for (int64_t j = begin; j < end; ++j) {
          float* x = map(h) + at(j, v);
          (Vec::load(x) * inverse - c).store(x);
        }
      }
    }
  }
};

void run_moments(const HeadMapParams& p, int64_t b, int64_t begin, int64_t end, AttentionKeys keys, const float* packed,
                 float* memory, float*, double* totals) {
  Arena arena{memory};
  const MomentScratch scratch(p, arena);
  for_tiles(begin, end, [&](auto vectors, int64_t first_query, int64_t queries) {
    MomentTile<vectors.value>(p, scratch, b, first_query, queries, keys, packed).run(totals);
  });
}

// --- Their gradients -------------------------------------------------------------------------------------------------

template <int kV>
struct MomentGradientTile : GradientTile<kV> {
  using Base = GradientTile<kV>;
  using Base::Base;

  void run(double* totals) const {
    this->compute_maps();
    for_key_blocks(this->keys.count,
                   [&](int64_t begin, int64_t end) { this->gradients_of_maps(begin, end, this->s.maps); });
    this->gradients_of_queries_and_keys();
    this->add_totals(totals);
  }
};

void pack_gradient(const HeadMapGradientParams& p, int64_t b, AttentionKeys keys, float* packed) {
  pack_keys(p, b, keys, packed);
}

void run_gradient(const HeadMapGradientParams& p, int64_t b, int64_t begin, int64_t end, AttentionKeys keys,
                  const float* packed, float* memory, float* sums, double* totals) {
  Arena arena{memory};
  const GradientScratch scratch(p, arena);
  for_tiles(begin, end, [&](auto vectors, int64_t first_query, int64_t queries) {
    MomentGradientTile<vectors.value>(p, scratch, b, first_query, queries, keys, packed, sums).run(totals);
  });
}

int64_t sum_floats(const HeadMapGradientParams& p) { return p.heads * p.keys * padded(p.dim); }

template <class T>
void finish_gradient(const HeadMapGradientParams& p, int64_t b, int64_t h, AttentionKeys keys, const float* sums,
                     int64_t parts) {
  finish_rows<T>(p, b, h, keys, sums, parts, sum_floats(p), p.scale, p.dk);
}

}  // namespace

HeadMapKernel<HeadMapParams> head_moments_kernel(const HeadMapParams& p) {
  Arena arena{nullptr};
  const MomentScratch scratch(p, arena);
  const Packed layout(p.dim, p.keys);
  const int64_t packed = p.heads * layout.key_panels.blocks * layout.key_words;
  return {kLanes, packed, arena.used, 0, pack_moments, run_moments, nullptr};
}

HeadMapKernel<HeadMapGradientParams> head_moments_backward_kernel(const HeadMapGradientParams& p) {
  Arena arena{nullptr};
  const GradientScratch scratch(p, arena);
  return {kLanes,
          p.heads * Packed(p.dim, p.keys).head_words,
          arena.used,
          sum_floats(p),
          pack_gradient,
          run_gradient,
          with_element(p.element, []<class T>() { return &finish_gradient<T>; })};
}

}  // namespace fastvit::FASTVIT_ISA
