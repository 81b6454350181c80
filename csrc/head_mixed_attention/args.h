// Attention whose maps are mixed across heads, forward and backward: the arguments of the kernels.
#pragma once

#include <cstdint>

#include "attention/args.h"
#include "common/inline.h"
#include "common/isa.h"

namespace fastvit {

inline constexpr int64_t kHeadMixMaxHeads = 32;

// P_g = softmax(sum_h pre_weight[g][h] S_h + pre_bias[g]), S_h = scale q_h k_h^T. Mixing matrices are stored
// transposed: [head read][head written].
struct HeadMapParams : AttentionParams {
  const float* pre_weight = nullptr;  // (H, H); null without a mix before the softmax
  const float* pre_bias = nullptr;    // (H,)
  bool precise = false;               // moments: products added up in double
};

// out_h = M_h v_h, M_h = sum_g post_weight[h][g] (P_g - centre) + post_bias[h]; without a mix after the softmax,
// post_factor[h] (P_h - centre) + post_bias[h].
struct HeadMixParams : HeadMapParams {
  const float* post_weight = nullptr;  // (H, H), with norm and output scale folded in; null without a mix after it
  const float* post_factor = nullptr;  // (H,), used where post_weight is null
  const float* post_bias = nullptr;    // (H,)
  float centre = 0.0f;                 // of a map: what the mix is of may differ from it by little
  // LayerNorm over heads after the mix. With X the mix less its mean over heads,
  // M_h = norm_factor[h] X_h / sqrt(mean_g X_g^2 + norm_eps) + norm_shift[h]. Null without it.
  const float* norm_factor = nullptr;  // (H,)
  const float* norm_shift = nullptr;   // (H,)
  float norm_eps = 0.0f;
};

// Gradients of q and k, from those of something computed from the maps P.
struct HeadMapGradientParams : HeadMixParams {
  AttentionOperand grad{};  // of the output of the attention
  // (H, H): from the gradients of M, or from the maps, to those of P; null: those of M times post_factor.
  const float* map_gradient = nullptr;
  const float* map_gradient_bias = nullptr;          // (H,)
  const float* pre_gradient = nullptr;               // (H, H): from the gradients of the mixed logits S' to those of S
  const float* zeros = nullptr;                      // (H,)
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;  // contiguous (B, N, H, D)
};

// The sums over all queries and keys from which the gradients of the small parameters, or the moments, are computed:
// indices into an array of doubles.
struct HeadMapTotals {
  int64_t heads;
  FASTVIT_INLINE int64_t map_products() const { return 0; }  // (H, H): gradient of M_h (or P_h) times P_g - centre
  FASTVIT_INLINE int64_t pre_products() const { return heads * heads; }   // (H, H): gradient of S'_h times S_g
  FASTVIT_INLINE int64_t mixed() const { return 2 * heads * heads; }      // (H,): gradient of M_h
  FASTVIT_INLINE int64_t norm_factor() const { return mixed() + heads; }  // (H,)
  FASTVIT_INLINE int64_t norm_shift() const { return mixed() + 2 * heads; }
  FASTVIT_INLINE int64_t pre_bias() const { return mixed() + 3 * heads; }  // zero, or NaN: see settle_deltas
  FASTVIT_INLINE int64_t count() const { return mixed() + 4 * heads; }
};

// A kernel over tiles of queries whose results are sums over all queries. A batch element's queries may be split into
// parts, whose sums are added up in a fixed order, whichever thread computed them.
template <class Params>
struct HeadMapKernel {
  int64_t lanes;  // queries are processed in multiples of this
  // Floats of a batch element's packed operands, a thread's scratch memory, a part's sums for the gradients of k and v.
  int64_t packed_floats, scratch_floats, sum_floats;
  void (*pack)(const Params&, int64_t b, AttentionKeys, float* packed);
  // Queries [begin, end) of a batch element; begin is a multiple of lanes. Adds to sums and totals.
  void (*run)(const Params&, int64_t b, int64_t begin, int64_t end, AttentionKeys, const float* packed, float* scratch,
              float* sums, double* totals);
  // Adds up the sums of all parts for one head of a batch element and writes its gradients. Null if there are none.
  void (*finish)(const Params&, int64_t b, int64_t h, AttentionKeys, const float* sums, int64_t parts);
};

// A problem is a batch element, with all of its heads.
using HeadMixKernel = AttentionKernel<HeadMixParams>;

FASTVIT_DECLARE_PER_ISA(
    HeadMixKernel head_mix_kernel(const HeadMixParams& p);
    HeadMapKernel<HeadMapGradientParams> head_mix_backward_kernel(const HeadMapGradientParams& p);
    HeadMapKernel<HeadMapParams> head_moments_kernel(const HeadMapParams& p);
    HeadMapKernel<HeadMapGradientParams> head_moments_backward_kernel(const HeadMapGradientParams& p);)

}  // namespace fastvit
