// fastvit::head_mixed_attention on CPU: checks, folding of the normalisation, division of the work, registration.
#include "head_mixed_attention/args.h"

#include <cmath>
#include <optional>
#include <vector>

#include "head_mixed_attention/op_parameters.h"

namespace fastvit {
namespace {

constexpr char kOp[] = "head_mixed_attention";

Tensor head_mixed_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                const std::optional<Tensor>& pre_weight, const std::optional<Tensor>& pre_bias,
                                const std::optional<Tensor>& post_weight, const std::optional<Tensor>& post_bias,
                                const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                                const std::optional<Tensor>& norm_mean, const std::optional<Tensor>& norm_var,
                                double norm_eps, bool layer_norm, double output_scale,
                                const std::optional<Tensor>& mask, double scale) {
  HeadMixParams p{attention_params(kOp, q, k, v, scale)};
  check_heads(kOp, p);
  check(norm_mean.has_value() == norm_var.has_value(), kOp, ": norm_mean and norm_var must be given together");
  check(!layer_norm || !norm_mean, kOp, ": a layer norm takes no norm_mean and norm_var");
  const PreMix pre(kOp, pre_weight, pre_bias, p);

  // norm(x) * output_scale = factor * x + shift, or of a layer norm what follows the division.
  std::vector<double> factor = head_vector(kOp, norm_weight, "norm_weight", p.heads, 1.0);
  std::vector<double> shift = head_vector(kOp, norm_bias, "norm_bias", p.heads, 0.0);
  const std::vector<double> mean = head_vector(kOp, norm_mean, "norm_mean", p.heads, 0.0);
  const std::vector<double> variance = head_vector(kOp, norm_var, "norm_var", p.heads, 1.0);
  for (size_t h = 0; h < factor.size(); ++h) {
    if (norm_mean) factor[h] /= std::sqrt(variance[h] + norm_eps);
    shift[h] = output_scale * (shift[h] - factor[h] * mean[h]);
    factor[h] *= output_scale;
  }
  HeadMix post(kOp, post_weight, "post_weight", post_bias, "post_bias", p.heads);
  if (layer_norm) {
    post.centre();
  } else {
    post.scale(factor, shift);
  }
  const std::vector<float> weight = transposed_floats(post.matrix), bias = to_floats(post.offset);
  const std::vector<float> last_factor = to_floats(factor), last_shift = to_floats(shift);
  p.post_weight = weight.empty() ? nullptr : weight.data();
  p.post_factor = last_factor.data();
  p.post_bias = bias.data();
  if (layer_norm) {
    p.norm_factor = last_factor.data();
    p.norm_shift = last_shift.data();
    p.norm_eps = static_cast<float>(norm_eps);
  }

  const bool over_keys = mask && take_mask(kOp, *mask, p);
  Tensor out = attention_output(p, q);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data<void>();
  const KeyLists keys(p.batch, p.keys, over_keys ? &*mask : nullptr);
  run_attention(p, FASTVIT_PER_ISA(head_mix_kernel)(p), p.batch, 2 * p.heads * (p.dim + p.heads) * p.keys,
                [&](int64_t b) { return keys.of(b); });
  return out;
}

FASTVIT_REGISTER(head_mixed_attention, "CPU", head_mixed_attention_cpu);

}  // namespace
}  // namespace fastvit
