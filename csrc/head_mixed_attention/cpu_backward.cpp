// Attention whose maps are mixed across heads, backward; compiled once per instruction set.
//
// Per tile of queries (see cpu_tiles.h) the maps P are recomputed, and dM_h[j] = sum_d v_h[j][d] dout_h[d].
// Then, a few keys at a time, with all heads of them in the L1 cache,
//   M_h = sum_g A[h][g] (P_g - c) + b_h      dv_h[j][d] += sum_i M_h[j][i] dout_h[i][d]
//   dA[h][g] += sum dM_h (P_g - c)           db_h += sum dM_h           dP_g = sum_h A[h][g] dM_h
// and cpu_gradients.h continues from dP. With a layer norm over heads, for X = A (P - c) + b less its mean over heads,
//   r = 1 / sqrt(mean_h X_h^2 + eps)    y_h = r X_h    M_h = f_h y_h + s_h    df_h += sum dM_h y_h    ds_h += sum dM_h
//   dX_h = r (f_h dM_h - mean_g f_g dM_g - y_h mean_g f_g dM_g y_g)           replaces dM.
// A tile has two maps, or three with a mix before the softmax; no other map exists.
#include "head_mixed_attention/cpu_gradients.h"

namespace fastvit::FASTVIT_ISA {
namespace {

// After k's panels come v's, panels of keys only.
int64_t value_offset(const HeadMapParams& p, const Packed& layout) { return p.heads * layout.head_words; }

void pack(const HeadMapGradientParams& p, int64_t b, AttentionKeys keys, float* packed) {
  pack_keys(p, b, keys, packed);
  pack_key_panels(p, p.v, b, keys, packed + value_offset(p, Packed(p.dim, keys.count)));
}

struct Scratch : GradientScratch {
  static constexpr int64_t kMixedStride = (kBlockKeys + kMapPadding) * kMaxWidth + kLanes;

  float* grad_lanes;   // [head][word of channels][lane]
  float* grad_rows;    // [head][word of queries][channel]
  float* grad_finite;  // [head][lane]
  float* mixed_block;  // [head][key of a block][query]: M
  float* apart_block;  // the same of P - c

  Scratch(const HeadMapGradientParams& p, Arena& arena)
      : GradientScratch(p, arena),
        grad_lanes(arena.take(p.heads * word_stride)),
        grad_rows(arena.take(p.heads * rows_stride)),
        grad_finite(arena.take(p.heads * kMaxWidth)),
        mixed_block(arena.take(p.heads * kMixedStride)),
        apart_block(arena.take(p.heads * kMixedStride)) {}
};

template <int kV>
struct Tile : GradientTile<kV> {
  using Base = GradientTile<kV>;
  using Base::at, Base::kWidth, Base::keys, Base::layout, Base::p, Base::packed, Base::map, Base::gradient,
      Base::lane_sum;

  const Scratch& s;
  float* dv;  // [head][key][channel]: sums

  Tile(const HeadMapGradientParams& p, const Scratch& s, int64_t b, int64_t first_query, int64_t queries,
       AttentionKeys keys, const float* packed, float* sums)
      : Base(p, s, b, first_query, queries, keys, packed, sums), s(s), dv(sums + p.heads * p.keys * s.row_stride) {}

  void run(double* totals) const {
    this->compute_maps();
    gradients_of_mixed();
    for_key_blocks(keys.count, [&](int64_t begin, int64_t end) {
      mix(begin, end);
      if (p.norm_factor != nullptr) layer_norm_backward(begin, end);
      for (int64_t h = 0; h < p.heads; ++h) {
        finish_mixed(h, begin, end);
        float* dv_block = dv + (h * p.keys + begin) * s.row_stride;
        this->add_to_keys(end - begin, mixed(h, 0), s.grad_rows + h * s.rows_stride, dv_block);
        const auto hide = [&](int64_t j, int v, Vec yes, Vec no) { return this->hide(h, j, v, yes, no); };
        this->add_left_out(p.grad, s.grad_finite, h, begin, end, mixed(h, 0), hide, dv_block);
        add_gradient(h, begin, end);
      }
      FASTVIT_FLOAT_ISA::add_products_of_heads(p.heads, (end - begin) * kV, gradient(0) + at(begin, 0), s.map_stride,
                                               s.apart_block, s.kMixedStride, false, lane_sum(s.totals.map_products()));
      this->gradients_of_maps(begin, end, s.gradients);
    });
    this->gradients_of_queries_and_keys();
    this->add_totals(totals);
  }

  float* mixed(int64_t h, int64_t key) const { return s.mixed_block + h * s.kMixedStride + key * kWidth; }
  FASTVIT_INLINE Vec load_gradient(int64_t h, int64_t j, int v) const { return Vec::load(gradient(h) + at(j, v)); }

  // P - c, and M of it.
  void mix(int64_t begin, int64_t end) const {
    const int64_t count = (end - begin) * kV;
    for (int64_t h = 0; h < p.heads; ++h) {
      const float* from = map(h) + at(begin, 0);
      float *apart = s.apart_block + h * s.kMixedStride, *to = mixed(h, 0);
      const Vec factor = Vec::fill(p.post_factor[h]), bias = Vec::fill(p.post_bias[h]);
      for (int64_t i = 0; i < count * kLanes; i += kLanes) {
        const Vec x = Vec::load(from + i) - Vec::fill(p.centre);
        x.store(apart + i);
        if (p.post_weight == nullptr) fma(x, factor, bias).store(to + i);
      }
    }
    if (p.post_weight == nullptr) return;
    FASTVIT_FLOAT_ISA::mix_heads(p.heads, count, p.post_weight, p.post_bias, s.apart_block, s.kMixedStride, mixed(0, 0),
                                 s.kMixedStride);
  }

  // dM, all keys.
  void gradients_of_mixed() const {
    this->load_lanes(p.grad, s.grad_lanes);
    this->load_rows(p.grad, s.grad_rows, s.grad_finite);
    const float* values = packed + value_offset(p, layout);
    for (int64_t h = 0; h < p.heads; ++h, values += layout.key_panels.blocks * layout.key_words) {
      this->products_with_keys(values, s.grad_lanes + h * s.word_stride, 1.0f, gradient(h));
      for (int64_t j = 0; p.mask != nullptr && j < keys.count; ++j) {
        for (int v = 0; v < kV; ++v) {
          Vec x[1] = {load_gradient(h, j, v)};
          this->zero_masked(h, j, v, x);
          x[0].store(gradient(h) + at(j, v));
        }
      }
    }
  }

  // The layer norm: X becomes M, and dM becomes dX.
  void layer_norm_backward(int64_t begin, int64_t end) const {
    const int64_t count = (end - begin) * kV;
    const Vec share = Vec::fill(1.0f / static_cast<float>(p.heads));
    Vec inverse[kBlockKeys * kV], mean[kBlockKeys * kV], along[kBlockKeys * kV];  // sums of f dM, and of f dM y
    for (int64_t i = 0; i < count; ++i) {
      inverse[i] = centre_heads(p.heads, s.mixed_block + i * kLanes, s.kMixedStride, p.norm_eps);
      mean[i] = along[i] = Vec::fill(0.0f);
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      const Vec factor = Vec::fill(p.norm_factor[h]);
      Vec to_factor = Vec::fill(0.0f), to_shift = Vec::fill(0.0f);
      for (int64_t i = 0; i < count; ++i) {
        float* x = mixed(h, 0) + i * kLanes;
        const Vec dm = Vec::load(gradient(h) + at(begin, 0) + i * kLanes), y = Vec::load(x) * inverse[i];
        y.store(x);
        to_factor = fma(dm, y, to_factor);
        to_shift += dm;
        mean[i] = fma(factor, dm, mean[i]);
        along[i] = fma(factor * dm, y, along[i]);
      }
      add_to(s.totals.norm_factor() + h, to_factor);
      add_to(s.totals.norm_shift() + h, to_shift);
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      const Vec factor = Vec::fill(p.norm_factor[h]), shift = Vec::fill(p.norm_shift[h]);
      for (int64_t i = 0; i < count; ++i) {
        float *dm = gradient(h) + at(begin, 0) + i * kLanes, *x = mixed(h, 0) + i * kLanes;
        const Vec y = Vec::load(x), across = fnma(mean[i], share, factor * Vec::load(dm));
        (inverse[i] * fnma(y, along[i] * share, across)).store(dm);
        fma(y, factor, shift).store(x);
      }
    }
  }

  // M in the layout of the product over queries.
  void finish_mixed(int64_t h, int64_t begin, int64_t end) const {
    if (!kPairs && p.mask == nullptr) return;
    for (int64_t j = begin; j < end; ++j) {
      for (int v = 0; v < kV; ++v) {
        Vec x[1] = {Vec::load(mixed(h, j - begin) + v * kLanes)};
        this->zero_masked(h, j, v, x);
        this->store_for_keys(mixed(h, j - begin), v, x[0]);
      }
    }
  }

  void add_to(int64_t total, Vec x) const { (Vec::load(lane_sum(total)) + x).store(lane_sum(total)); }

  void add_gradient(int64_t h, int64_t begin, int64_t end) const {
    Vec part = Vec::fill(0.0f);
    for (int64_t j = begin; j < end; ++j) {
      for (int v = 0; v < kV; ++v) part += load_gradient(h, j, v);
    }
    add_to(s.totals.mixed() + h, part);
  }
};

void run(const HeadMapGradientParams& p, int64_t b, int64_t begin, int64_t end, AttentionKeys keys, const float* packed,
         float* memory, float* sums, double* totals) {
  Arena arena{memory};
  const Scratch scratch(p, arena);
  for_tiles(begin, end, [&](auto vectors, int64_t first_query, int64_t queries) {
    Tile<vectors.value>(p, scratch, b, first_query, queries, keys, packed, sums).run(totals);
  });
}

int64_t sum_floats(const HeadMapGradientParams& p) { return 2 * p.heads * p.keys * padded(p.dim); }

template <class T>
void finish(const HeadMapGradientParams& p, int64_t b, int64_t h, AttentionKeys keys, const float* sums,
            int64_t parts) {
  const int64_t stride = sum_floats(p);
  finish_rows<T>(p, b, h, keys, sums, parts, stride, p.scale, p.dk);
  finish_rows<T>(p, b, h, keys, sums + stride / 2, parts, stride, 1.0f, p.dv);
}

}  // namespace

HeadMapKernel<HeadMapGradientParams> head_mix_backward_kernel(const HeadMapGradientParams& p) {
  Arena arena{nullptr};
  const Scratch scratch(p, arena);
  const Packed layout(p.dim, p.keys);
  const int64_t packed = value_offset(p, layout) + p.heads * layout.key_panels.blocks * layout.key_words;
  return {kLanes,
          packed,
          arena.used,
          sum_floats(p),
          pack,
          run,
          with_element(p.element, []<class T>() { return &finish<T>; })};
}

}  // namespace fastvit::FASTVIT_ISA
