// fastvit::linear on the CPU: checks, dividing the work, registration.
#include "linear/args.h"

#include <algorithm>
#include <vector>

#include "common/arguments.h"
#include "common/torch_abi.h"
#include "common/workspace.h"

namespace fastvit {
namespace {

constexpr char kOp[] = "linear";
constexpr int64_t kPackedFloats = 128 << 10;  // of a group, which stays in the L2 cache
// Terms of a long sum per slice: a group of deeper panels would have few of them, and every group reads x again.
constexpr int64_t kDepthSlice = 1024;

// The rows of x, (..., K), as one axis; throws if they have no common stride.
int64_t take_rows(const Tensor& x, LinearParams& p) {
  const int64_t last = x.dim() - 1;
  check(x.size(last) <= 1 || x.stride(last) == 1 || x.numel() == 0, kOp, ": x must be contiguous along its last axis");
  int64_t rows = 1, stride = x.size(last);
  for (int64_t axis = last - 1; axis >= 0; --axis) {
    if (x.size(axis) != 1) {
      check(rows == 1 || x.stride(axis) == rows * stride || x.numel() == 0, kOp, ": the leading axes of x, of shape ",
            shape_of(x), ", must be viewable as one");
      if (rows == 1) stride = x.stride(axis);
    }
    rows = rows == 0 || x.size(axis) == 0 ? 0 : checked_product(kOp, {rows, x.size(axis)});
  }
  p.x_stride = stride;
  return rows;
}

void run_slice(const LinearParams& p) {
  const LinearKernel kernel = FASTVIT_PER_ISA(linear_kernel)(p);
  const int64_t threads = p.rows * p.columns * p.depth < 2 * kSerialProducts ? 1 : num_threads();
  const int64_t panels = divide_up(p.columns, kernel.panel_columns);
  // Groups that fit the cache, in a multiple of the number of threads if there are enough panels.
  int64_t groups = larger(1, divide_up(panels * kernel.packed_floats_of_panel, kPackedFloats));
  groups = std::min(panels, divide_up(groups, threads) * threads);
  const int64_t chunks = std::min(divide_up(threads, groups), divide_up(p.rows, kernel.row_tile));
  const int64_t largest = divide_up(panels, groups);
  const int64_t packed_floats = largest * kernel.packed_floats_of_panel;
  const int64_t items = groups * chunks;
  parallel_for(0, items, divide_up(items, threads), [&](int64_t begin, int64_t end) {
    float* packed =
        Workspace::of_thread().take(packed_floats + kernel.scratch_floats + largest * kernel.scratch_floats_of_panel);
    int64_t last_group = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / chunks, chunk = item % chunks;
      const int64_t first = group * panels / groups, last = (group + 1) * panels / groups;
      if (group != last_group) kernel.pack(p, first, last, packed);
      last_group = group;
      kernel.multiply(p, chunk * p.rows / chunks, (chunk + 1) * p.rows / chunks, first, last, packed,
                      packed + packed_floats);
    }
    Workspace::of_thread().give_back();
  });
}

// Long float32 sums accumulate in the result, slice by slice.
void run(const LinearParams& p) {
  const int64_t slices = p.bfloat16 ? 1 : divide_up(std::max<int64_t>(p.depth, 1), kDepthSlice);
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t begin = slice * p.depth / slices;
    LinearParams part = p;
    part.depth = (slice + 1) * p.depth / slices - begin;
    if (!p.bfloat16) {
      part.x = static_cast<const float*>(p.x) + begin;
      part.weight = static_cast<const float*>(p.weight) + begin * p.weight_depth_stride;
    }
    part.accumulate = slice > 0;
    if (slice + 1 < slices) part.activation = Activation::none;
    run_slice(part);
  }
}

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t activation) {
  const Dtype dtype = x.dtype();
  check(x.is_cpu() && x.dim() >= 1, kOp, ": x must be (..., K) on the CPU, got ", shape_of(x));
  check_cpu_dtype(kOp, x, "x");
  check(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == x.size(x.dim() - 1) && weight.dtype() == dtype, kOp,
        ": weight must be (N, K) of x's dtype on the CPU, got ", shape_of(weight), " of ", weight.dtype(), " beside ",
        shape_of(x), " of ", dtype);
  check(weight.stride(1) == 1 || weight.stride(0) == 1 || weight.numel() == 0, kOp,
        ": weight must be contiguous along one axis");

  LinearParams p{};
  p.activation = activation_of(kOp, activation, "activation");
  p.rows = take_rows(x, p);
  p.columns = weight.size(0);
  p.depth = weight.size(1);
  checked_product(kOp, {64, p.rows, p.columns, p.depth});
  std::vector<int64_t> sizes(x.sizes(), x.sizes() + x.dim());
  sizes.back() = p.columns;
  Tensor out = empty(sizes, x);
  if (out.numel() == 0) return out;
  std::vector<float> bias_floats(static_cast<size_t>(p.columns), 0.0f);
  if (bias) {
    check_cpu_shape(kOp, *bias, "bias", {p.columns});
    bias_floats = small_values(kOp, *bias, "bias");
  }
  p.x = x.data<void>();
  p.weight = weight.data<void>();
  p.weight_column_stride = weight.stride(0);
  p.weight_depth_stride = weight.stride(1);
  p.bias = bias_floats.data();
  p.out = out.mutable_data<void>();
  p.bfloat16 = dtype == Dtype::bfloat16;
  run(p);
  return out;
}

FASTVIT_REGISTER(linear, "CPU", linear_cpu);

}  // namespace
}  // namespace fastvit
