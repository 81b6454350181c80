// fastvit::head_mixed_attention on the CPU: checks, folding of the norm, registration.
#include "head_mixed_attention/args.h"

#include <cmath>
#include <vector>

#include "head_mixed_attention/op_parameters.h"

namespace fastvit {
namespace {

constexpr char kOp[] = "head_mixed_attention";

Tensor head_mixed_attention_cpu(const MixArguments& a, const OptionalTensor& norm_mean, const OptionalTensor& norm_var,
                                const MixOptions& options) {
  HeadMixParams p{{attention_params(kOp, a.q, a.k, a.v, options.scale, true)}};
  check_heads(kOp, p);
  check(norm_mean.has_value() == norm_var.has_value(), kOp, ": norm_mean and norm_var must be given together");
  check(!options.layer_norm || !norm_mean, kOp, ": a layer norm takes no norm_mean and norm_var");
  const PreMix pre(kOp, a.pre_weight, a.pre_bias, p);

  // output_scale * norm(x) = factor * x + shift, with x divided by its deviation first in a layer norm.
  std::vector<double> factor = head_vector(kOp, a.norm_weight, "norm_weight", p.heads, 1.0);
  std::vector<double> shift = head_vector(kOp, a.norm_bias, "norm_bias", p.heads, 0.0);
  const std::vector<double> mean = head_vector(kOp, norm_mean, "norm_mean", p.heads, 0.0);
  const std::vector<double> variance = head_vector(kOp, norm_var, "norm_var", p.heads, 1.0);
  for (size_t h = 0; h < factor.size(); ++h) {
    if (norm_mean) factor[h] /= std::sqrt(variance[h] + options.norm_eps);
    shift[h] = options.output_scale * (shift[h] - factor[h] * mean[h]);
    factor[h] *= options.output_scale;
  }
  HeadMix post(kOp, a.post_weight, "post_weight", a.post_bias, "post_bias", p.heads);
  if (options.layer_norm) {
    post.fill_in_identity();
  } else {
    post.scale(factor, shift);
  }
  const std::vector<float> weight = transposed_floats(post.matrix), bias = to_floats(post.offset);
  const std::vector<float> last_factor = to_floats(factor), last_shift = to_floats(shift);
  p.post_weight = weight.empty() ? nullptr : weight.data();
  p.post_factor = last_factor.data();
  p.post_bias = bias.data();
  p.centre = options.centre(p.keys);
  if (options.layer_norm) {
    p.norm_factor = last_factor.data();
    p.norm_shift = last_shift.data();
    p.norm_eps = static_cast<float>(options.norm_eps);
  }

  const KeyLists keys = take_mask(kOp, options.mask, p);
  Tensor out = empty_heads_last(p, p.queries, a.q);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data<void>();
  run_attention(p, FASTVIT_PER_ISA(head_mix_kernel, p.element)(p), p.batch, 2 * p.heads * (p.dim + p.heads) * p.keys,
                [&](int64_t b) { return keys.of(b); });
  return out;
}

FASTVIT_REGISTER(head_mixed_attention, "CPU", head_mixed_attention_cpu);

}  // namespace
}  // namespace fastvit
