// fastvit::masked_attention_cpp on CPU: checks and registration.
#include "masked_attention.h"

#include <optional>

#include "attention_entry.h"

namespace fastvit {
namespace {

constexpr char kOp[] = "masked_attention_cpp";

Tensor masked_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                            double scale) {
  AttentionParams p = attention_params(kOp, q, k, v, scale);
  const bool over_keys = mask && take_mask(kOp, *mask, p);
  Tensor out = attention_output(p, q);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data<void>();
  const KeyLists keys(p.batch, p.keys, over_keys ? &*mask : nullptr);
  run_attention(p, FASTVIT_PER_ISA(masked_attention_kernel)(p), p.batch * p.heads, 2 * p.dim * p.keys,
                [&](int64_t problem) { return keys.of(problem / p.heads); });
  return out;
}

FASTVIT_REGISTER(masked_attention_cpp, "CPU", masked_attention_cpu);

}  // namespace
}  // namespace fastvit
