// fastvit::head_mixed_attention on CPU: checks, folding of the normalisation, division of the work, registration.
#include "head_mixed_attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <exception>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "../torch_abi.h"

namespace fastvit {
namespace {

// Multiply-adds below which waking another thread costs more than it saves.
constexpr int64_t kSerialProducts = 1 << 19;
// Floats of a thread's memory that stay allocated between calls.
constexpr int64_t kKeptFloats = 8 << 20;

template <class... Parts>
[[noreturn]] void fail(const Parts&... message) {
  check(false, "head_mixed_attention: ", message...);
  std::terminate();
}

// --- Arguments ------------------------------------------------------------------------------------------------------

void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  const bool same = tensor.dim() == static_cast<int64_t>(expected.size()) &&
                    std::equal(expected.begin(), expected.end(), tensor.sizes());
  if (same && tensor.is_cpu()) return;
  if (!tensor.is_cpu()) fail(name, " must be on the CPU");
  std::string text;
  for (int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  fail(name, " has shape ", shape_of(tensor), ", expected is (", text, ")");
}

HeadMixOperand operand(const Tensor& tensor, const char* name, Dtype dtype) {
  if (tensor.dtype() != dtype) fail(name, " is ", tensor.dtype(), ", q is ", dtype);
  if (tensor.size(3) > 1 && tensor.stride(3) != 1) fail(name, " must have a contiguous last axis");
  return {tensor.data<void>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A small parameter of one or two axes, as double.
std::vector<double> values(const Tensor& tensor, const char* name) {
  const Dtype dtype = tensor.dtype();
  if (dtype != Dtype::float32 && dtype != Dtype::bfloat16) fail(name, " must be float32 or bfloat16, got ", dtype);
  const bool matrix = tensor.dim() == 2;
  const int64_t rows = matrix ? tensor.size(0) : 1, columns = tensor.size(matrix ? 1 : 0);
  const int64_t row_stride = matrix ? tensor.stride(0) : 0, column_stride = tensor.stride(matrix ? 1 : 0);
  std::vector<double> result;
  result.reserve(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = i * row_stride + j * column_stride;
      result.push_back(dtype == Dtype::float32
                           ? tensor.data<float>()[at]
                           : std::bit_cast<float>(static_cast<uint32_t>(tensor.data<uint16_t>()[at]) << 16));
    }
  }
  return result;
}

std::vector<double> vector_or(const std::optional<Tensor>& tensor, const char* name, size_t heads, double otherwise) {
  if (!tensor) return std::vector<double>(heads, otherwise);
  check_shape(*tensor, name, {static_cast<int64_t>(heads)});
  return values(*tensor, name);
}

// A linear map over heads, as the kernels read it.
struct Mix {
  std::vector<float> weight;  // transposed; empty if there is none
  std::vector<float> bias;

  // factor[h] * (weight x + bias)[h] + shift[h]
  Mix(const std::optional<Tensor>& mix, const std::optional<Tensor>& mix_bias, const std::string& when,
      const std::vector<double>& factor, const std::vector<double>& shift) {
    const size_t heads = factor.size();
    const std::string name = when + "_weight", bias_name = when + "_bias";
    if (mix) {
      check_shape(*mix, name.c_str(), {static_cast<int64_t>(heads), static_cast<int64_t>(heads)});
      const std::vector<double> matrix = values(*mix, name.c_str());
      for (size_t g = 0; g < heads; ++g) {
        for (size_t h = 0; h < heads; ++h) weight.push_back(static_cast<float>(factor[h] * matrix[h * heads + g]));
      }
    }
    const std::vector<double> offset = vector_or(mix_bias, bias_name.c_str(), heads, 0.0);
    for (size_t h = 0; h < heads; ++h) bias.push_back(static_cast<float>(factor[h] * offset[h] + shift[h]));
  }
};

// --- Keys -----------------------------------------------------------------------------------------------------------

// The keys each batch element attends to: all, or those a mask over keys alone leaves.
class KeyLists {
 public:
  KeyLists(int64_t batch, int64_t keys, const Tensor* mask) {
    const int64_t lists = mask == nullptr || mask->size(0) == 1 ? 1 : batch;
    begins_.push_back(0);
    for (int64_t b = 0; b < lists; ++b) {
      for (int64_t j = 0; j < keys; ++j) {
        const bool attended =
            mask == nullptr || mask->data<bool>()[b * mask->stride(0) + (mask->size(3) == 1 ? 0 : j * mask->stride(3))];
        if (attended) indices_.push_back(static_cast<int32_t>(j));
      }
      begins_.push_back(indices_.size());
    }
  }

  HeadMixKeys of(int64_t b) const {
    const size_t list = begins_.size() == 2 ? 0 : static_cast<size_t>(b);
    return {indices_.data() + begins_[list], static_cast<int64_t>(begins_[list + 1] - begins_[list])};
  }

 private:
  std::vector<int32_t> indices_;
  std::vector<size_t> begins_;
};

void check_mask(const Tensor& mask, const HeadMixParams& p) {
  if (!mask.is_cpu()) fail("mask must be on the CPU");
  if (mask.dtype() != Dtype::boolean) fail("mask must be bool, got ", mask.dtype());
  const int64_t full[4] = {p.batch, p.heads, p.queries, p.keys};
  bool broadcasts = mask.dim() == 4;
  for (int axis = 0; broadcasts && axis < 4; ++axis) broadcasts = mask.size(axis) == 1 || mask.size(axis) == full[axis];
  if (broadcasts) return;
  fail("mask has shape ", shape_of(mask), ", expected is one that broadcasts to (", full[0], ", ", full[1], ", ",
       full[2], ", ", full[3], ")");
}

// --- Memory and threads ---------------------------------------------------------------------------------------------

// Uninitialised memory of a thread, kept between calls so that its pages are not mapped anew each time.
class Workspace {
 public:
  float* take(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(operator new(static_cast<size_t>(floats) * sizeof(float), kAlign)));
      size_ = floats;
    }
    return memory_.get();
  }
  void give_back() {
    if (size_ <= kKeptFloats) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* memory) const { operator delete(memory, kAlign); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

thread_local Workspace workspace;         // of a thread at work
thread_local Workspace shared_workspace;  // of a call, for what its threads share

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

void run(const HeadMixParams& p, const KeyLists& keys) {
  const HeadMixKernel kernel = FASTVIT_PER_ISA(head_mix_kernel)(p);
  const int64_t packed_floats = round_up(kernel.packed_floats, 16);
  const int64_t units = (p.queries + kernel.lanes - 1) / kernel.lanes;
  const int64_t products_per_unit = 2 * p.heads * (p.dim + p.heads) * p.keys * kernel.lanes;
  const int64_t grain = std::max<int64_t>(1, kSerialProducts / std::max<int64_t>(1, products_per_unit));

  // Where many threads need the same keys and values, pack them once for all; two do better with a copy each, and
  // without the wait for each other.
  const int64_t parts = num_threads();
  const bool shared = 2 * p.batch < parts && units > grain;
  float* packed_by_all = shared ? shared_workspace.take(p.batch * packed_floats) : nullptr;
  if (shared) {
    parallel_for(0, p.batch * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / parts;
        kernel.pack(p, b, keys.of(b), i % parts, parts, packed_by_all + b * packed_floats);
      }
    });
  }
  parallel_for(0, p.batch * units, grain, [&](int64_t begin, int64_t end) {
    float* scratch = workspace.take(kernel.scratch_floats + (shared ? 0 : packed_floats) + 16);
    float* packed_here = scratch + round_up(kernel.scratch_floats, 16);
    for (int64_t b = begin / units; begin < end; ++b) {
      const int64_t last = std::min(end, (b + 1) * units);
      const float* packed = shared ? packed_by_all + b * packed_floats : packed_here;
      if (!shared) kernel.pack(p, b, keys.of(b), 0, 1, packed_here);
      kernel.attend(p, b, (begin - b * units) * kernel.lanes, std::min(p.queries, (last - b * units) * kernel.lanes),
                    keys.of(b), packed, scratch);
      begin = last;
    }
    workspace.give_back();
  });
  shared_workspace.give_back();
}

// --- The operator ---------------------------------------------------------------------------------------------------

Tensor head_mixed_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                const std::optional<Tensor>& pre_weight, const std::optional<Tensor>& pre_bias,
                                const std::optional<Tensor>& post_weight, const std::optional<Tensor>& post_bias,
                                const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                                const std::optional<Tensor>& norm_mean, const std::optional<Tensor>& norm_var,
                                double norm_eps, double output_scale, const std::optional<Tensor>& mask, double scale) {
  const Dtype dtype = q.dtype();
  if (dtype != Dtype::float32 && dtype != Dtype::bfloat16)
    fail("q must be float32 or bfloat16 on the CPU, got ", dtype);
  if (q.dim() != 4 || k.dim() != 4)
    fail("q and k must be (B, H, N, D), got shapes ", shape_of(q), " and ", shape_of(k));
  HeadMixParams p{};
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.dim = q.size(3), p.keys = k.size(2);
  check_shape(q, "q", {p.batch, p.heads, p.queries, p.dim});
  check_shape(k, "k", {p.batch, p.heads, p.keys, p.dim});
  check_shape(v, "v", {p.batch, p.heads, p.keys, p.dim});
  if (p.heads > kHeadMixMaxHeads) fail("at most ", kHeadMixMaxHeads, " heads are accepted, got ", p.heads);
  if (p.dim > kHeadMixMaxDim) fail("head dimensions up to ", kHeadMixMaxDim, " are accepted, got ", p.dim);
  if (p.keys > std::numeric_limits<int32_t>::max()) fail("too many keys: ", p.keys);
  if (norm_mean.has_value() != norm_var.has_value()) fail("norm_mean and norm_var must be given together");
  p.q = operand(q, "q", dtype), p.k = operand(k, "k", dtype), p.v = operand(v, "v", dtype);
  p.bfloat16 = dtype == Dtype::bfloat16;
  p.scale = static_cast<float>(scale);

  const auto heads = static_cast<size_t>(p.heads);
  std::optional<Mix> pre;
  if (pre_weight) {
    pre.emplace(pre_weight, pre_bias, "pre", std::vector<double>(heads, 1.0), std::vector<double>(heads, 0.0));
    p.pre_weight = pre->weight.data();
    p.pre_bias = pre->bias.data();
  }
  // norm(x) * output_scale = factor * x + shift
  std::vector<double> factor = vector_or(norm_weight, "norm_weight", heads, 1.0);
  std::vector<double> shift = vector_or(norm_bias, "norm_bias", heads, 0.0);
  const std::vector<double> mean = vector_or(norm_mean, "norm_mean", heads, 0.0);
  const std::vector<double> variance = vector_or(norm_var, "norm_var", heads, 1.0);
  for (size_t h = 0; h < heads; ++h) {
    if (norm_mean) factor[h] /= std::sqrt(variance[h] + norm_eps);
    shift[h] = output_scale * (shift[h] - factor[h] * mean[h]);
    factor[h] *= output_scale;
  }
  const Mix post(post_weight, post_bias, "post", factor, shift);
  const std::vector<float> post_factor(factor.begin(), factor.end());
  p.post_weight = post_weight ? post.weight.data() : nullptr;
  p.post_factor = post_factor.data();
  p.post_bias = post.bias.data();

  const Tensor* key_mask = nullptr;
  if (mask) {
    check_mask(*mask, p);
    if (mask->size(1) == 1 && mask->size(2) == 1) {
      key_mask = &*mask;
    } else {
      p.mask = mask->data<bool>();
      int64_t* strides[] = {&p.mask_batch_stride, &p.mask_head_stride, &p.mask_query_stride, &p.mask_key_stride};
      for (int axis = 0; axis < 4; ++axis) *strides[axis] = mask->size(axis) == 1 ? 0 : mask->stride(axis);
    }
  }

  Tensor out =
      empty_strided({p.batch, p.heads, p.queries, p.dim}, {p.queries * p.heads * p.dim, p.dim, p.heads * p.dim, 1}, q);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data<void>();
  run(p, KeyLists(p.batch, p.keys, key_mask));
  return out;
}

FASTVIT_REGISTER(head_mixed_attention, "CPU", head_mixed_attention_cpu);

}  // namespace
}  // namespace fastvit
