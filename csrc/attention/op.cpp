#include "attention/op.h"

#include <limits>
#include <string>

namespace fastvit {
namespace {

Tensor tokens_by_heads(const AttentionParams& p, int64_t tokens, const Tensor& like) {
  return empty_strided({p.batch, p.heads, tokens, p.dim}, {tokens * p.heads * p.dim, p.dim, p.heads * p.dim, 1}, like);
}

}  // namespace

AttentionOperand attention_operand(const char* op, const Tensor& tensor, const char* name, Dtype dtype) {
  check(tensor.dtype() == dtype, op, ": ", name, " is ", tensor.dtype(), ", q is ", dtype);
  check(tensor.size(3) <= 1 || tensor.stride(3) == 1 || tensor.numel() == 0, op, ": ", name,
        " must have a contiguous last axis");
  return {tensor.data<void>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check_cpu_shape(const char* op, const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  check(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  const bool same = tensor.dim() == static_cast<int64_t>(expected.size()) &&
                    std::equal(expected.begin(), expected.end(), tensor.sizes());
  if (same) return;
  std::string text;
  for (int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  check(false, op, ": ", name, " has shape ", shape_of(tensor), ", expected is (", text, ")");
}

AttentionParams attention_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  const Dtype dtype = q.dtype();
  check(dtype == Dtype::float32 || dtype == Dtype::bfloat16, op, ": q must be float32 or bfloat16 on the CPU, got ",
        dtype);
  if (q.dim() != 4 || k.dim() != 4)
    check(false, op, ": q and k must be (B, H, N, D), got shapes ", shape_of(q), " and ", shape_of(k));
  AttentionParams p{};
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.dim = q.size(3), p.keys = k.size(2);
  check_cpu_shape(op, q, "q", {p.batch, p.heads, p.queries, p.dim});
  check_cpu_shape(op, k, "k", {p.batch, p.heads, p.keys, p.dim});
  check_cpu_shape(op, v, "v", {p.batch, p.heads, p.keys, p.dim});
  check(p.dim <= kAttentionMaxDim, op, ": head dimensions up to ", kAttentionMaxDim, " are accepted, got ", p.dim);
  check(p.keys <= std::numeric_limits<int32_t>::max(), op, ": too many keys: ", p.keys);
  p.q = attention_operand(op, q, "q", dtype);
  p.k = attention_operand(op, k, "k", dtype);
  p.v = attention_operand(op, v, "v", dtype);
  p.bfloat16 = dtype == Dtype::bfloat16;
  p.scale = static_cast<float>(scale);
  return p;
}

bool take_mask(const char* op, const Tensor& mask, AttentionParams& p) {
  check(mask.is_cpu(), op, ": mask must be on the CPU");
  check(mask.dtype() == Dtype::boolean, op, ": mask must be bool, got ", mask.dtype());
  const int64_t full[4] = {p.batch, p.heads, p.queries, p.keys};
  bool broadcasts = mask.dim() == 4;
  for (int axis = 0; broadcasts && axis < 4; ++axis) broadcasts = mask.size(axis) == 1 || mask.size(axis) == full[axis];
  if (!broadcasts) {
    check(false, op, ": mask has shape ", shape_of(mask), ", expected is one that broadcasts to (", full[0], ", ",
          full[1], ", ", full[2], ", ", full[3], ")");
  }
  if (mask.size(1) == 1 && mask.size(2) == 1) return true;
  p.mask = mask.data<bool>();
  int64_t* strides[] = {&p.mask_batch_stride, &p.mask_head_stride, &p.mask_query_stride, &p.mask_key_stride};
  for (int axis = 0; axis < 4; ++axis) *strides[axis] = mask.size(axis) == 1 ? 0 : mask.stride(axis);
  return false;
}

Tensor attention_output(const AttentionParams& p, const Tensor& like) { return tokens_by_heads(p, p.queries, like); }

Tensor attention_key_gradient(const AttentionParams& p, const Tensor& like) { return tokens_by_heads(p, p.keys, like); }

KeyLists::KeyLists(int64_t batch, int64_t keys, const Tensor* mask) {
  const int64_t lists = mask == nullptr || mask->size(0) == 1 ? 1 : batch;
  begins_.push_back(0);
  for (int64_t b = 0; b < lists; ++b) {
    const bool* row = mask == nullptr ? nullptr : mask->data<bool>() + b * mask->stride(0);
    const int64_t stride = mask == nullptr || mask->size(3) == 1 ? 0 : mask->stride(3);
    for (int64_t j = 0; j < keys; ++j) {
      if (row == nullptr || row[j * stride]) indices_.push_back(static_cast<int32_t>(j));
    }
    begins_.push_back(indices_.size());
  }
}

AttentionKeys KeyLists::of(int64_t b) const {
  const size_t list = begins_.size() == 2 ? 0 : static_cast<size_t>(b);
  return {indices_.data() + begins_[list], static_cast<int64_t>(begins_[list + 1] - begins_[list])};
}

}  // namespace fastvit
