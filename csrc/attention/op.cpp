#include "attention/op.h"

#include <limits>

namespace fastvit {
AttentionOperand attention_operand(const char* op, const Tensor& tensor, const char* name, Dtype dtype) {
  check(tensor.dtype() == dtype, op, ": ", name, " is ", tensor.dtype(), ", q is ", dtype);
  check(tensor.size(3) <= 1 || tensor.stride(3) == 1 || tensor.numel() == 0, op, ": ", name,
        " must have a contiguous last axis");
  return {tensor.data<void>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

AttentionParams attention_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                 bool or_float16) {
  const Dtype dtype = q.dtype();
  check_cpu_dtype(op, q, "q", or_float16);
  if (q.dim() != 4 || k.dim() != 4)
    check(false, op, ": q and k must be (B, H, N, D), got shapes ", shape_of(q), " and ", shape_of(k));
  AttentionParams p{};
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.dim = q.size(3), p.keys = k.size(2);
  check_cpu_shape(op, q, "q", {p.batch, p.heads, p.queries, p.dim});
  check_cpu_shape(op, k, "k", {p.batch, p.heads, p.keys, p.dim});
  check_cpu_shape(op, v, "v", {p.batch, p.heads, p.keys, p.dim});
  check(p.dim <= kAttentionMaxDim, op, ": expected head dimensions up to ", kAttentionMaxDim, ", got ", p.dim);
  check(p.keys <= std::numeric_limits<int32_t>::max(), op, ": expected fewer than 2^31 keys, got ", p.keys);
  // What the kernels count, multiply-adds too, and the memory they take are smaller than these.
  checked_product(op, {8, p.batch, p.heads, p.queries, p.keys, p.dim + p.heads});
  checked_product(op, {64, p.batch, p.heads, larger(p.queries, p.keys) + 32, p.dim + p.heads + 16});
  p.q = attention_operand(op, q, "q", dtype);
  p.k = attention_operand(op, k, "k", dtype);
  p.v = attention_operand(op, v, "v", dtype);
  p.element = element_of(dtype);
  p.scale = static_cast<float>(scale);
  return p;
}

Tensor empty_heads_last(const AttentionParams& p, int64_t tokens, const Tensor& like) {
  return empty_strided({p.batch, p.heads, tokens, p.dim}, {tokens * p.heads * p.dim, p.dim, p.heads * p.dim, 1}, like);
}

std::array<int64_t, 4> broadcast_strides(const char* op, const Tensor& tensor, const char* name,
                                         const AttentionParams& p) {
  check(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  const std::array<int64_t, 4> full{p.batch, p.heads, p.queries, p.keys};
  std::array<int64_t, 4> strides{};
  bool broadcasts = tensor.dim() == 4;
  for (size_t axis = 0; broadcasts && axis < 4; ++axis) {
    const auto at = static_cast<int64_t>(axis);
    broadcasts = tensor.size(at) == 1 || tensor.size(at) == full[axis];
    strides[axis] = tensor.size(at) == 1 ? 0 : tensor.stride(at);
  }
  if (!broadcasts) {
    check(false, op, ": ", name, " has shape ", shape_of(tensor), ", expected one that broadcasts to ",
          shape_of(full.data(), 4));
  }
  return strides;
}

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

KeyLists take_mask(const char* op, const OptionalTensor& mask, AttentionParams& p) {
  if (!mask) return KeyLists(p.batch, p.keys, nullptr);
  check(mask->dtype() == Dtype::boolean, op, ": mask must be bool, got ", mask->dtype());
  const auto [batch, head, query, key] = broadcast_strides(op, *mask, "mask", p);
  if (mask->size(1) == 1 && mask->size(2) == 1) return KeyLists(p.batch, p.keys, &*mask);
  p.mask = mask->data<bool>();
  p.mask_batch_stride = batch, p.mask_head_stride = head, p.mask_query_stride = query, p.mask_key_stride = key;
  return KeyLists(p.batch, p.keys, nullptr);
}

}  // namespace fastvit
