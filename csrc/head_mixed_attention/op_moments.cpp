// fastvit::head_map_moments and its backward on the CPU: checks, masked keys that kernels do not see, registration.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "head_mixed_attention/op.h"
#include "head_mixed_attention/op_parameters.h"

namespace fastvit {
namespace {

struct Arguments {
  using Schema = std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, double>;
  Tensor q, k;
  OptionalTensor pre_weight, pre_bias, mask;
  double scale;
};

// Whether little is left of the variance of some mix of the maps, w^T C w, from its terms: their rounding then shows.
// That is so where heads have nearly the same map, as under a mask that leaves few keys, and weights that add up to
// little.
bool cancels(const std::vector<double>& weight, const std::vector<double>& sums, const std::vector<double>& moments,
             double values) {
  constexpr double kLeft = 1.0 / 64.0;
  const size_t heads = sums.size();
  for (size_t row = 0; row < heads; ++row) {
    const double* w = weight.data() + row * heads;
    double variance = 0.0, largest = 0.0;
    for (size_t g = 0; g < heads; ++g) {
      largest += std::fabs(w[g]) * std::sqrt(moments[g * heads + g]);
      for (size_t h = 0; h < heads; ++h) {
        variance += w[g] * w[h] * (moments[g * heads + h] - sums[g] * sums[h] / values);
      }
    }
    if (variance < kLeft * largest * largest) return true;
  }
  return false;
}

// weight is that of the mix whose variance is wanted.
std::tuple<Tensor, Tensor> head_map_moments_cpu(const Arguments& a, const Tensor& weight) {
  constexpr char kOp[] = "head_map_moments";
  HeadMapParams p{attention_params(kOp, a.q, a.k, a.k, a.scale)};
  check_heads(kOp, p);
  const PreMix pre(kOp, a.pre_weight, a.pre_bias, p);
  const std::vector<double> mix = head_matrix(kOp, weight, "weight", p.heads);
  const KeyLists keys = take_mask(kOp, a.mask, p);

  // Keys that are not in the lists have P = 0 in all heads.
  int64_t masked_keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) masked_keys += p.keys - keys.of(b).count;
  const double share = p.keys == 0 ? 0.0 : 1.0 / static_cast<double>(p.keys);
  const double of_masked_keys = static_cast<double>(masked_keys * p.queries) * share * share;
  const HeadMapTotals at{p.heads};
  std::vector<double> sums, moments;
  const auto compute = [&] {
    const std::vector<double> totals =
        run_head_maps(p, FASTVIT_PER_ISA(head_moments_kernel, p.element)(p), p.heads * (p.dim + p.heads) * p.keys,
                      [&](int64_t b) { return keys.of(b); });
    moments.clear();
    for (int64_t g = 0; g < p.heads; ++g) {
      for (int64_t h = 0; h < p.heads; ++h) {
        const int64_t upper = std::min(g, h) * p.heads + std::max(g, h);
        moments.push_back(totals[static_cast<size_t>(at.map_products() + upper)] + of_masked_keys);
      }
    }
    sums.assign(totals.begin() + at.mixed(), totals.begin() + at.norm_factor());
  };
  compute();
  if (cancels(mix, sums, moments, static_cast<double>(p.batch * p.queries * p.keys))) {
    p.precise = true;
    compute();
  }
  // Not in float32: rounding, too, would show.
  Tensor result = empty({p.heads, p.heads}, a.q, Dtype::float64);
  std::copy(moments.begin(), moments.end(), result.mutable_data<double>());
  return {small_result(sums, {p.heads}, true, a.q), std::move(result)};
}

FASTVIT_REGISTER(head_map_moments, "CPU", head_map_moments_cpu);

std::tuple<Tensor, Tensor, Tensor, Tensor> head_map_moments_backward_cpu(const Tensor& dsums, const Tensor& dmoments,
                                                                         const Arguments& a) {
  constexpr char kOp[] = "head_map_moments_backward";
  HeadMapGradientParams p{{{attention_params(kOp, a.q, a.k, a.k, a.scale)}}};
  check_heads(kOp, p);
  check_cpu_shape(kOp, dsums, "dsums", {p.heads});  // not used: the sums do not depend on q and k
  const PreMix pre(kOp, a.pre_weight, a.pre_bias, p);
  const std::vector<double> gradient = head_matrix(kOp, dmoments, "dmoments", p.heads);
  const std::vector<float> zeros(static_cast<size_t>(p.heads), 0.0f);
  const double share = p.keys == 0 ? 0.0 : 1.0 / static_cast<double>(p.keys);
  std::vector<float> both, centre;
  for (int64_t g = 0; g < p.heads; ++g) {
    double row = 0.0;
    for (int64_t h = 0; h < p.heads; ++h) {
      const double value =
          gradient[static_cast<size_t>(g * p.heads + h)] + gradient[static_cast<size_t>(h * p.heads + g)];
      both.push_back(static_cast<float>(value));
      row += value;
    }
    centre.push_back(static_cast<float>(-share * row));
  }
  p.map_gradient = both.data(), p.map_gradient_bias = centre.data();
  p.pre_gradient = pre.back.data(), p.zeros = zeros.data();

  const KeyLists keys = take_mask(kOp, a.mask, p);
  Tensor dq = empty_heads_last(p, p.queries, a.q), dk = empty_heads_last(p, p.keys, a.k);
  p.dq = dq.mutable_data<void>(), p.dk = dk.mutable_data<void>();
  const std::vector<double> totals =
      run_head_maps(p, FASTVIT_PER_ISA(head_moments_backward_kernel, p.element)(p),
                    p.heads * (3 * p.dim + 2 * p.heads) * p.keys, [&](int64_t b) { return keys.of(b); });
  const HeadMapTotals at{p.heads};
  const std::vector<double> dpre(totals.begin() + at.pre_products(), totals.begin() + at.mixed());
  return {std::move(dq), std::move(dk), small_result(dpre, {p.heads, p.heads}, a.pre_weight.has_value(), a.q),
          small_result({totals.begin() + at.pre_bias(), totals.begin() + at.count()}, {p.heads}, a.pre_bias.has_value(),
                       a.q)};
}

FASTVIT_REGISTER(head_map_moments_backward, "CPU", head_map_moments_backward_cpu);

}  // namespace
}  // namespace fastvit
