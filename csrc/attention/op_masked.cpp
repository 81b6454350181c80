// fastvit::masked_attention_cpp and its backward on the CPU: checks, dividing the work, registration.
#include "attention/args_masked.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>

#include "attention/args_class.h"
#include "attention/op.h"
#include "common/bfloat16.h"

namespace fastvit {
namespace {

constexpr char kOp[] = "masked_attention_cpp";
constexpr char kBackwardOp[] = "masked_attention_cpp_backward";

struct Arguments {
  using Schema = std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, double>;
  Tensor q, k, v;
  OptionalTensor mask, bias;
  double scale;
};

// Fills in the parameters; throws naming what is wrong with an argument.
KeyLists take_arguments(const char* op, const Arguments& a, bool or_float16, MaskedAttentionParams& p) {
  static_cast<AttentionParams&>(p) = attention_params(op, a.q, a.k, a.v, a.scale, or_float16);
  KeyLists keys = take_mask(op, a.mask, p);
  if (!a.bias) return keys;
  check(a.bias->dtype() == a.q.dtype(), op, ": bias is ", a.bias->dtype(), ", q is ", a.q.dtype());
  const auto [batch, head, query, key] = broadcast_strides(op, *a.bias, "bias", p);
  p.bias = a.bias->data<void>();
  p.bias_batch_stride = batch, p.bias_head_stride = head, p.bias_query_stride = query, p.bias_key_stride = key;
  return keys;
}

Tensor masked_attention_cpu(Arguments a) {
  for (Tensor* tensor : {&a.q, &a.k, &a.v}) make_last_axis_contiguous(*tensor);
  MaskedAttentionParams p{};
  const KeyLists keys = take_arguments(kOp, a, true, p);
  Tensor out = empty_heads_last(p, p.queries, a.q);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data<void>();
  if (p.queries <= kClassQueries) {
    run_class_attention(p, keys);
    return out;
  }
  run_attention(p, FASTVIT_PER_ISA(masked_attention_kernel, p.element)(p), p.batch * p.heads, 2 * p.dim * p.keys,
                [&](int64_t problem) { return keys.of(problem / p.heads); });
  return out;
}

FASTVIT_REGISTER(masked_attention_cpp, "CPU", masked_attention_cpu);

// --- Backward --------------------------------------------------------------------------------------------------------

// The gradient of the bias, summed over the axes along which it broadcasts. A group is the problems that share a bias:
// a thread processes a tile of all of them before the next tile, and so accumulates in a fixed order.
struct BiasGradient {
  bool wanted = false, over_batch = false, over_heads = false, over_queries = false;
  int64_t group_floats = 1;  // elements of a group's bias
  float* out = nullptr;

  explicit BiasGradient(const Tensor* bias) {
    if (bias == nullptr) return;
    wanted = true;
    over_batch = bias->size(0) == 1, over_heads = bias->size(1) == 1;
    over_queries = bias->size(2) == 1;
    group_floats = bias->size(2) * bias->size(3);
  }
};

class Backward {
 public:
  Backward(const MaskedAttentionGradients& p, const KeyLists& keys, const BiasGradient& bias)
      : p_(p),
        keys_(keys),
        bias_(bias),
        kernel_(FASTVIT_PER_ISA(masked_attention_backward_kernel, p.element)(p)),
        groups_((bias.over_batch ? 1 : p.batch) * (bias.over_heads ? 1 : p.heads)),
        members_(p.batch * p.heads / groups_),
        tiles_(divide_up(p.queries, kernel_.tile)),
        parts_(parts()) {}

  void run() {
    const int64_t problems = groups_ * members_;
    const bool together = members_ == 1 && parts_ == 1;  // the thread that accumulates sums also finishes them
    const int64_t sums = whole_lines(kernel_.sums_floats),
                  packed = members_ == 1 ? 0 : whole_lines(kernel_.packed_floats);
    const int64_t row = bias_.wanted && bias_.over_queries ? whole_lines(p_.keys) : 0;
    float* shared = Workspace::of_call().take((together ? 0 : problems * parts_ * sums) + problems * packed +
                                              groups_ * parts_ * row + 16);
    sums_ = shared;
    packed_ = sums_ + (together ? 0 : problems * parts_ * sums);
    bias_rows_ = packed_ + problems * packed;
    if (members_ > 1) {
      parallel_for(0, problems, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernel_.pack(p_, i, keys_.of(i / p_.heads), packed_ + i * packed);
      });
    }
    const int64_t products = 5 * p_.dim * p_.keys * kernel_.tile * members_ * std::max<int64_t>(1, tiles_ / parts_);
    parallel_for(0, groups_ * parts_, grain_of(products), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) run_unit(unit / parts_, unit % parts_, together);
      Workspace::of_thread().give_back();
    });
    if (!together) {
      const int64_t grain = grain_of(8 * kernel_.sums_floats * parts_ + 1);
      parallel_for(0, problems, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          kernel_.finish(p_, i, keys_.of(i / p_.heads), sums_ + i * parts_ * sums, parts_, sums);
        }
      });
    }
    if (row > 0) add_bias_rows(row);
    Workspace::of_call().give_back();
  }

 private:
  // Tiles of a group are divided among threads if there are few groups. Results depend on the number of threads only.
  int64_t parts() const {
    const int64_t threads = num_threads();
    if (groups_ >= 4 * threads) return 1;
    return std::min(tiles_, threads / std::gcd(groups_, threads));
  }

  int64_t problem(int64_t group, int64_t member) const {
    const int64_t heads = bias_.over_heads ? 1 : p_.heads;  // of a group's index
    const int64_t member_heads = p_.heads / heads;
    const int64_t b = bias_.over_batch ? member / member_heads : group / heads;
    return b * p_.heads + (bias_.over_heads ? member % member_heads : group % heads);
  }

  void run_unit(int64_t group, int64_t part, bool together) const {
    const int64_t sums_floats = whole_lines(kernel_.sums_floats), packed_floats = whole_lines(kernel_.packed_floats);
    const int64_t bias_floats = bias_.wanted ? whole_lines(kernel_.bias_floats) : 0;
    float* scratch = Workspace::of_thread().take(whole_lines(kernel_.scratch_floats) + bias_floats +
                                                 (members_ == 1 ? packed_floats : 0) + (together ? sums_floats : 0));
    float* bias_sums = bias_.wanted ? scratch + whole_lines(kernel_.scratch_floats) : nullptr;
    float* packed_here = scratch + whole_lines(kernel_.scratch_floats) + bias_floats;
    float* sums_here = packed_here + (members_ == 1 ? packed_floats : 0);
    const auto sums_of = [&](int64_t i) { return together ? sums_here : sums_ + (i * parts_ + part) * sums_floats; };
    for (int64_t member = 0; member < members_; ++member) {
      std::memset(sums_of(problem(group, member)), 0, kernel_.sums_floats * sizeof(float));
    }
    if (members_ == 1) {
      const int64_t i = problem(group, 0);
      kernel_.pack(p_, i, keys_.of(i / p_.heads), packed_here);
    }
    const int64_t first = part * tiles_ / parts_, last = (part + 1) * tiles_ / parts_;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t query = tile * kernel_.tile, queries = std::min(kernel_.tile, p_.queries - query);
      const bool fresh = !bias_.over_queries || tile == first;
      if (bias_sums != nullptr && fresh) std::memset(bias_sums, 0, kernel_.bias_floats * sizeof(float));
      for (int64_t member = 0; member < members_; ++member) {
        const int64_t i = problem(group, member);
        const float* packed = members_ == 1 ? packed_here : packed_ + i * packed_floats;
        kernel_.attend(p_, i, query, keys_.of(i / p_.heads), packed, sums_of(i), bias_sums, scratch);
      }
      if (bias_sums != nullptr && !bias_.over_queries) {
        kernel_.read_bias(p_, queries, bias_sums, bias_.out + group * bias_.group_floats + query * p_.keys, p_.keys);
      }
    }
    if (bias_sums != nullptr && bias_.over_queries) {
      kernel_.read_bias(p_, std::min(kernel_.tile, p_.queries), bias_sums,
                        bias_rows_ + (group * parts_ + part) * whole_lines(p_.keys), 0);
    }
    if (together) {
      const int64_t i = problem(group, 0);
      kernel_.finish(p_, i, keys_.of(i / p_.heads), sums_here, 1, 0);
    }
  }

  // For a bias that broadcasts over queries: adds up the parts of each group.
  void add_bias_rows(int64_t row) const {
    for (int64_t group = 0; group < groups_; ++group) {
      for (int64_t j = 0; j < p_.keys; ++j) {
        double total = 0.0;
        for (int64_t part = 0; part < parts_; ++part) total += bias_rows_[(group * parts_ + part) * row + j];
        bias_.out[group * p_.keys + j] = static_cast<float>(total);
      }
    }
  }

  const MaskedAttentionGradients& p_;
  const KeyLists& keys_;
  const BiasGradient& bias_;
  const MaskedAttentionBackwardKernel kernel_;
  const int64_t groups_, members_, tiles_, parts_;
  float *sums_ = nullptr, *packed_ = nullptr, *bias_rows_ = nullptr;
};

void zero(Tensor& tensor, int64_t element_size) {
  if (tensor.numel() > 0) std::memset(tensor.mutable_data<void>(), 0, tensor.numel() * element_size);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_attention_backward_cpu(Tensor grad, Arguments a, bool bias_grad) {
  for (Tensor* tensor : {&grad, &a.q, &a.k, &a.v}) make_last_axis_contiguous(*tensor);
  MaskedAttentionGradients p{};
  const KeyLists keys = take_arguments(kBackwardOp, a, false, p);
  check(a.bias || !bias_grad, kBackwardOp, ": the gradient of a bias was requested, but there is no bias");
  check_cpu_shape(kBackwardOp, grad, "grad", {p.batch, p.heads, p.queries, p.dim});
  p.grad = attention_operand(kBackwardOp, grad, "grad", a.q.dtype());

  Tensor dq = empty_heads_last(p, p.queries, a.q);
  Tensor dk = empty_heads_last(p, p.keys, a.k), dv = empty_heads_last(p, p.keys, a.v);
  Tensor dbias =
      empty(bias_grad ? std::vector<int64_t>(a.bias->sizes(), a.bias->sizes() + 4) : std::vector<int64_t>{0}, a.q);
  const int64_t element_size = p.element == Element::bfloat16 ? 2 : 4;
  if (dq.numel() == 0 || dk.numel() == 0) {
    for (Tensor* tensor : {&dq, &dk, &dv, &dbias}) zero(*tensor, element_size);
    return {std::move(dq), std::move(dk), std::move(dv), std::move(dbias)};
  }
  p.dq = dq.mutable_data<void>(), p.dk = dk.mutable_data<void>(), p.dv = dv.mutable_data<void>();
  // A bias that is the same for all keys of a row has no effect on the softmax, and no gradient.
  const bool wanted = bias_grad && a.bias->size(3) > 1;
  if (!wanted) zero(dbias, element_size);
  BiasGradient of_bias(wanted ? &*a.bias : nullptr);
  OptionalTensor wide;
  if (wanted) {
    if (p.element == Element::bfloat16) wide = empty({dbias.numel()}, a.q, Dtype::float32);
    of_bias.out = (wide ? *wide : dbias).mutable_data<float>();
  }
  if (p.queries <= kClassQueries && !wanted) {
    run_class_attention_backward(p, keys);
  } else {
    Backward(p, keys, of_bias).run();
  }
  if (wide) {
    const float* values = wide->data<float>();
    std::transform(values, values + dbias.numel(), dbias.mutable_data<uint16_t>(), bfloat16_of_float);
  }
  return {std::move(dq), std::move(dk), std::move(dv), std::move(dbias)};
}

FASTVIT_REGISTER(masked_attention_cpp_backward, "CPU", masked_attention_backward_cpu);

}  // namespace
}  // namespace fastvit
