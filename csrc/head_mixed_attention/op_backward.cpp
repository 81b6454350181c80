// fastvit::head_mixed_attention_backward on the CPU: checks, folding, gradients of the small parameters, registration.
#include <tuple>
#include <vector>

#include "head_mixed_attention/op.h"
#include "head_mixed_attention/op_parameters.h"

namespace fastvit {
namespace {

constexpr char kOp[] = "head_mixed_attention_backward";

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients head_mixed_attention_backward_cpu(const Tensor& grad, const MixArguments& a, const MixOptions& options) {
  const bool layer_norm = options.layer_norm;
  const double output_scale = options.output_scale;
  HeadMapGradientParams p{{{attention_params(kOp, a.q, a.k, a.v, options.scale)}}};
  check_heads(kOp, p);
  check_cpu_shape(kOp, grad, "grad", {p.batch, p.heads, p.queries, p.dim});
  p.grad = attention_operand(kOp, grad, "grad", a.q.dtype());
  check(layer_norm || (!a.norm_weight && !a.norm_bias), kOp, ": norm_weight and norm_bias are for a layer norm only");
  const PreMix pre(kOp, a.pre_weight, a.pre_bias, p);

  std::vector<double> factor = head_vector(kOp, a.norm_weight, "norm_weight", p.heads, 1.0);
  std::vector<double> shift = head_vector(kOp, a.norm_bias, "norm_bias", p.heads, 0.0);
  for (size_t h = 0; h < factor.size(); ++h) factor[h] *= output_scale, shift[h] *= output_scale;
  HeadMix post(kOp, a.post_weight, "post_weight", a.post_bias, "post_bias", p.heads);
  if (layer_norm) {
    post.fill_in_identity();
  } else {
    post.scale(factor, shift);
  }
  const std::vector<float> weight = transposed_floats(post.matrix), back = to_floats(post.matrix);
  const std::vector<float> bias = to_floats(post.offset), zeros(factor.size(), 0.0f);
  const std::vector<float> last_factor = to_floats(factor), last_shift = to_floats(shift);
  p.post_weight = weight.empty() ? nullptr : weight.data(), p.map_gradient = weight.empty() ? nullptr : back.data();
  p.post_factor = last_factor.data(), p.post_bias = bias.data(), p.map_gradient_bias = zeros.data();
  p.centre = options.centre(p.keys);
  p.pre_gradient = pre.back.data(), p.zeros = zeros.data();
  if (layer_norm) {
    p.norm_factor = last_factor.data(), p.norm_shift = last_shift.data();
    p.norm_eps = static_cast<float>(options.norm_eps);
  }

  const KeyLists keys = take_mask(kOp, options.mask, p);
  Tensor dq = empty_heads_last(p, p.queries, a.q);
  Tensor dk = empty_heads_last(p, p.keys, a.k), dv = empty_heads_last(p, p.keys, a.v);
  p.dq = dq.mutable_data<void>(), p.dk = dk.mutable_data<void>(), p.dv = dv.mutable_data<void>();
  const std::vector<double> totals =
      run_head_maps(p, FASTVIT_PER_ISA(head_mix_backward_kernel, p.element)(p),
                    p.heads * (5 * p.dim + 3 * p.heads) * p.keys, [&](int64_t b) { return keys.of(b); });

  const HeadMapTotals at{p.heads};
  const auto part = [&](int64_t begin, int64_t end, double times) {
    std::vector<double> values(totals.begin() + begin, totals.begin() + end);
    for (double& value : values) value *= times;
    return values;
  };
  const double inner_scale = layer_norm ? 1.0 : output_scale;
  const std::vector<double> dweight = part(at.map_products(), at.pre_products(), inner_scale);
  const std::vector<double> dbias = part(at.mixed(), at.norm_factor(), inner_scale);
  const std::vector<int64_t> square{p.heads, p.heads}, line{p.heads};
  return {std::move(dq),
          std::move(dk),
          std::move(dv),
          small_result(part(at.pre_products(), at.mixed(), 1.0), square, a.pre_weight.has_value(), a.q),
          small_result(part(at.pre_bias(), at.count(), 1.0), line, a.pre_bias.has_value(), a.q),
          small_result(dweight, square, a.post_weight.has_value(), a.q),
          small_result(dbias, line, a.post_bias.has_value(), a.q),
          small_result(part(at.norm_factor(), at.norm_shift(), output_scale), line, a.norm_weight.has_value(), a.q),
          small_result(part(at.norm_shift(), at.pre_bias(), output_scale), line, a.norm_bias.has_value(), a.q)};
}

FASTVIT_REGISTER(head_mixed_attention_backward, "CPU", head_mixed_attention_backward_cpu);

}  // namespace
}  // namespace fastvit
