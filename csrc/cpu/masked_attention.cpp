// fastvit::masked_attention_cpp on CPU: checks and registration.
#include "masked_attention.h"

#include <optional>

#include "attention_entry.h"

namespace fastvit {
namespace {

constexpr char kOp[] = "masked_attention_cpp";

// Takes the bias, (B or 1, H or 1, Nq or 1, Nk or 1), into the parameters; throws naming what is not accepted.
void take_bias(const char* op, const Tensor& bias, MaskedAttentionParams& p) {
  check(bias.is_cpu(), op, ": bias must be on the CPU");
  const Dtype dtype = p.bfloat16 ? Dtype::bfloat16 : Dtype::float32;
  check(bias.dtype() == dtype, op, ": bias is ", bias.dtype(), ", q is ", dtype);
  const int64_t full[4] = {p.batch, p.heads, p.queries, p.keys};
  bool broadcasts = bias.dim() == 4;
  for (int axis = 0; broadcasts && axis < 4; ++axis) broadcasts = bias.size(axis) == 1 || bias.size(axis) == full[axis];
  if (!broadcasts) {
    check(false, op, ": bias has shape ", shape_of(bias), ", expected is one that broadcasts to (", full[0], ", ",
          full[1], ", ", full[2], ", ", full[3], ")");
  }
  p.bias = bias.data<void>();
  int64_t* strides[] = {&p.bias_batch_stride, &p.bias_head_stride, &p.bias_query_stride, &p.bias_key_stride};
  for (int axis = 0; axis < 4; ++axis) *strides[axis] = bias.size(axis) == 1 ? 0 : bias.stride(axis);
}

Tensor masked_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& bias, double scale) {
  MaskedAttentionParams p{attention_params(kOp, q, k, v, scale)};
  const bool over_keys = mask && take_mask(kOp, *mask, p);
  if (bias) take_bias(kOp, *bias, p);
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
