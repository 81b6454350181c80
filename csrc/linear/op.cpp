// fastvit::packed_linear, packed_mlp and pack_weight on the CPU: checks, dividing the work, registration.
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "common/workspace.h"
#include "linear/op.h"

namespace fastvit {
namespace {

constexpr int64_t kItems = 16;       // of work for each thread, where they are
constexpr int64_t kBlockRows = 104;  // at most; with more, threads would share a block of short rows
constexpr int64_t kProductsOfItem = kSerialProducts / 8;  // at least
// Terms of a long float32 sum per slice: a deeper panel would not stay in the cache.
constexpr int64_t kDepthSlice = 3072;

// --- Rows ------------------------------------------------------------------------------------------------------------

// The rows of (..., K) as one axis, and their stride; copies the tensor where they have no common stride.
int64_t take_rows(const char* op, Tensor& x, int64_t& stride) {
  make_last_axis_contiguous(x);
  const int64_t last = x.dim() - 1;
  for (const bool copied : {false, true}) {
    int64_t rows = 1;
    bool together = true;
    stride = x.size(last);
    for (int64_t axis = last - 1; axis >= 0; --axis) {
      if (x.size(axis) == 1) continue;
      if (rows == 1) stride = x.stride(axis);
      together = together && x.stride(axis) == rows * stride;
      rows = rows == 0 || x.size(axis) == 0 ? 0 : checked_product(op, {rows, x.size(axis)});
    }
    if (together || rows == 0 || copied) return rows;
    make_contiguous(x);
  }
  return 0;
}

// --- The packed weight -----------------------------------------------------------------------------------------------

// What a packed weight begins with: a layout is that of an instruction set.
struct PackedHeader {
  int64_t isa, columns, depth, bfloat16;
  bool operator==(const PackedHeader&) const = default;
};
constexpr int64_t kHeaderFloats = 16;
static_assert(sizeof(PackedHeader) <= kHeaderFloats * sizeof(float));

PackedHeader header_of(const LinearParams& p) {
  return {static_cast<int64_t>(cpu_isa()), p.columns, p.depth, p.bfloat16};
}

int64_t panels_of(const LinearParams& p, const LinearKernel& kernel) {
  return divide_up(p.columns, kernel.panel_columns);
}

void pack(const LinearParams& p, const LinearKernel& kernel, float* packed) {
  const int64_t panels = panels_of(p, kernel);
  parallel_for(0, panels, grain_of(4 * kernel.panel_floats),
               [&](int64_t begin, int64_t end) { kernel.pack(p, begin, end, packed + begin * kernel.panel_floats); });
}

// Sizes and strides of the weight, copied unless contiguous along one axis.
void take_weight(const char* op, const char* name, Tensor& weight, int64_t depth, Dtype dtype, LinearParams& p) {
  check(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == depth && weight.dtype() == dtype, op, ": ", name,
        " must be (N, ", depth, ") ", dtype, " on the CPU, got ", shape_of(weight), " ", weight.dtype());
  if (weight.stride(0) != 1) make_last_axis_contiguous(weight);
  p.weight = weight.data<void>();
  p.columns = weight.size(0);
  p.depth = depth;
  p.weight_column_stride = weight.stride(0);
  p.weight_depth_stride = weight.stride(1);
  p.bfloat16 = dtype == Dtype::bfloat16;
}

Tensor pack_weight(Tensor weight) {
  constexpr char kOp[] = "pack_weight";
  check(weight.dim() == 2, kOp, ": weight must be (N, K), got ", shape_of(weight));
  check_cpu_dtype(kOp, weight, "weight");
  LinearParams p{};
  take_weight(kOp, "weight", weight, weight.size(1), weight.dtype(), p);
  const LinearKernel kernel = FASTVIT_PER_ISA(linear_kernel)(p);
  checked_product(kOp, {panels_of(p, kernel), kernel.panel_floats});
  const int64_t floats = panels_of(p, kernel) * kernel.panel_floats;
  Tensor packed = empty({kHeaderFloats + floats}, weight, Dtype::float32);
  const PackedHeader header = header_of(p);
  std::memcpy(packed.mutable_data<float>(), &header, sizeof header);
  pack(p, kernel, packed.mutable_data<float>() + kHeaderFloats);
  return packed;
}

FASTVIT_REGISTER(pack_weight, "CPU", pack_weight);

// The panels that were packed before; null where they were not.
const float* take_packed(const char* op, const OptionalTensor& packed, const LinearParams& p,
                         const LinearKernel& kernel) {
  if (!packed) return nullptr;
  PackedHeader header{};
  const int64_t floats = kHeaderFloats + panels_of(p, kernel) * kernel.panel_floats;
  const bool fits = packed->is_cpu() && packed->dtype() == Dtype::float32 && packed->numel() == floats;
  if (fits) std::memcpy(&header, packed->data<float>(), sizeof header);
  check(fits && header == header_of(p), op, ": packed is not what pack_weight makes of this weight here");
  return packed->data<float>() + kHeaderFloats;
}

// --- Dividing the work -----------------------------------------------------------------------------------------------

// Rows that are processed together: blocks of equal size, whole tiles, that fit the L2 cache.
int64_t rows_of_block(const LinearParams& p, const LinearKernel& kernel) {
  const int64_t most = larger(kernel.row_tile, smaller(kBlockRows, kBlockFloats / larger(1, p.depth)));
  const int64_t blocks = divide_up(p.rows, most);
  return smaller(p.rows, round_up(divide_up(p.rows, blocks), kernel.row_tile));
}

int64_t threads_for(const LinearParams& p) {
  return p.rows * p.columns * p.depth < 2 * kSerialProducts ? 1 : num_threads();
}

// A thread's memory for a block of rows.
class BlockOfThread {
 public:
  explicit BlockOfThread(int64_t floats) : data_(Workspace::of_thread().take(floats)) {}
  BlockOfThread(const BlockOfThread&) = delete;
  BlockOfThread& operator=(const BlockOfThread&) = delete;
  ~BlockOfThread() { Workspace::of_thread().give_back(); }
  float* data() const { return data_; }

 private:
  float* data_;
};

// f(row, rows, first panel, last panel) for groups of panels of blocks of rows. `start` gives f to each thread.
template <class F>
void for_each_block(const LinearParams& p, const LinearKernel& kernel, const F& start) {
  const int64_t threads = threads_for(p), panels = panels_of(p, kernel);
  const int64_t step = rows_of_block(p, kernel), blocks = divide_up(p.rows, step);
  const int64_t most = larger(1, p.rows * p.columns * larger(1, p.depth) / blocks / kProductsOfItem);
  const int64_t groups = threads == 1 ? 1 : std::min({panels, most, divide_up(kItems * threads, blocks)});
  parallel_dynamic(blocks, groups, threads, [&] {
    return [&, f = start()](int64_t block, int64_t group) mutable {
      const int64_t row = block * step;
      f(row, smaller(step, p.rows - row), group * panels / groups, (group + 1) * panels / groups);
    };
  });
}

// `from`: the rows of x in one block, where they are already; `to`: a block for the result instead of out.
void multiply(const LinearParams& p, const LinearKernel& kernel, const float* packed, float* from = nullptr,
              float* to = nullptr) {
  for_each_block(p, kernel, [&] {
    const int64_t floats = from == nullptr ? rows_of_block(p, kernel) * kernel.row_floats : 0;
    return [&, memory = BlockOfThread(floats), loaded = int64_t{-1}](int64_t row, int64_t rows, int64_t first,
                                                                     int64_t last) mutable {
      RowBlock block{memory.data(), rows, rows};
      if (from != nullptr) {
        block = {from + row * kernel.row_stride, rows, p.rows};
      } else if (row != loaded) {
        kernel.load(p, row, block);
        loaded = row;
      }
      const float* panels = packed + first * p.panel_stride;
      if (to == nullptr) {
        kernel.multiply(p, row, block, first, last, panels);
      } else {
        kernel.multiply_to_block(p, block, first, last, panels, {to + row * kernel.row_stride, rows, p.rows});
      }
    };
  });
}

// Long float32 sums accumulate in the result, slice by slice.
void run(const LinearParams& p, const LinearKernel& kernel, const float* packed) {
  const int64_t slices = p.bfloat16 || p.has_norm ? 1 : larger(1, divide_up(p.depth, kDepthSlice));
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t begin = slice * p.depth / slices;
    LinearParams part = p;
    part.depth = (slice + 1) * p.depth / slices - begin;
    if (slices > 1) part.x = static_cast<const float*>(p.x) + begin;
    part.accumulate = slice > 0;
    if (slice + 1 < slices) {
      part.column_factor = part.column_shift = part.scale = nullptr;
      part.activation = Activation::none;
      part.residual = nullptr;
    }
    multiply(part, FASTVIT_PER_ISA(linear_kernel)(part), packed + begin * kernel.panel_columns);
  }
}

// The packed panels, packed to `memory` where they were not before.
const float* pack_if_absent(const float* packed, const LinearParams& p, const LinearKernel& kernel, float* memory) {
  if (packed == nullptr) pack(p, kernel, memory);
  return packed == nullptr ? memory : packed;
}

int64_t floats_to_pack(const float* packed, const LinearParams& p, const LinearKernel& kernel) {
  return packed == nullptr ? whole_lines(panels_of(p, kernel) * kernel.panel_floats) : 0;
}

// --- The operators ---------------------------------------------------------------------------------------------------

// x and its norm.
struct Input {
  Floats norm_weight, norm_bias;

  Input(const char* op, Tensor& x, const NormOfRows& norm, LinearParams& p)
      : norm_weight(op, norm.weight, "norm_weight", last_size(op, x)),
        norm_bias(op, norm.bias, "norm_bias", last_size(op, x)) {
    p.rows = take_rows(op, x, p.x_stride);
    p.x = x.data<void>();
    p.has_norm = norm.exists;
    p.norm_weight = norm_weight.data(), p.norm_bias = norm_bias.data();
    p.norm_eps = static_cast<float>(norm.eps);
  }

  static int64_t last_size(const char* op, const Tensor& x) {
    check(x.is_cpu() && x.dim() >= 1, op, ": x must be (..., K) on the CPU, got ", shape_of(x));
    check_cpu_dtype(op, x, "x");
    return x.size(x.dim() - 1);
  }
};

// The result, and what is added to it.
struct Output {
  Floats scale;
  Tensor out;

  Output(const char* op, const Tensor& x, Addition& addition, LinearParams& p)
      : scale(op, addition.scale, "scale", p.columns), out(result(x, p.columns)) {
    p.scale = scale.data();
    p.out = out.mutable_data<void>();
    if (!addition.residual) return;
    Tensor& residual = *addition.residual;
    check(residual.is_cpu() && residual.dtype() == x.dtype() && residual.dim() == out.dim() &&
              std::equal(out.sizes(), out.sizes() + out.dim(), residual.sizes()),
          op, ": residual must be ", shape_of(out), " ", x.dtype(), " on the CPU, got ", shape_of(residual), " ",
          residual.dtype());
    take_rows(op, residual, p.residual_stride);
    p.residual = residual.data<void>();
  }

  static Tensor result(const Tensor& x, int64_t columns) {
    std::vector<int64_t> sizes(x.sizes(), x.sizes() + x.dim());
    sizes.back() = columns;
    return empty(sizes, x);
  }
};

Tensor linear_cpu(Tensor x, Layer layer, const NormOfRows& norm, int64_t activation, Addition addition) {
  constexpr char kOp[] = "linear";
  return linear(kOp, x, layer, norm, {}, activation_of(kOp, activation, "activation"), addition);
}

FASTVIT_REGISTER(packed_linear, "CPU", linear_cpu);

// Whether there are blocks of rows enough to divide among the threads.
bool by_rows(const LinearParams& up, const LinearParams& down, const LinearKernel& kernel) {
  const int64_t threads = std::max(threads_for(up), threads_for(down));
  return threads == 1 ||
         divide_up(up.rows, rows_of_block(up.depth > down.depth ? up : down, kernel)) >= kItems / 2 * threads;
}

// Two layers, block by block of rows: the hidden values of a block stay in the cache.
void run_mlp(const LinearParams& up, const LinearKernel& up_kernel, const float* up_packed, const LinearParams& down,
             const LinearKernel& down_kernel, const float* down_packed) {
  const int64_t step = rows_of_block(up.depth > down.depth ? up : down, up_kernel);
  parallel_dynamic(divide_up(up.rows, step), 1, std::max(threads_for(up), threads_for(down)), [&] {
    return [&, memory = BlockOfThread(step * (up_kernel.row_floats + down_kernel.row_floats))](int64_t block_of_rows,
                                                                                               int64_t) {
      const int64_t row = block_of_rows * step, rows = smaller(step, up.rows - row);
      const RowBlock block{memory.data(), rows, rows}, hidden{block.data + step * up_kernel.row_floats, rows, rows};
      up_kernel.load(up, row, block);
      up_kernel.multiply_to_block(up, block, 0, panels_of(up, up_kernel), up_packed, hidden);
      down_kernel.multiply(down, row, hidden, 0, panels_of(down, down_kernel), down_packed);
    };
  });
}

Tensor mlp_cpu(Tensor x, Layer fc1, Layer fc2, const NormOfRows& norm, int64_t activation, Addition addition) {
  constexpr char kOp[] = "mlp";
  LinearParams up{};
  const Input input(kOp, x, norm, up);
  take_weight(kOp, "fc1_weight", fc1.weight, x.size(x.dim() - 1), x.dtype(), up);
  Floats up_bias(kOp, fc1.bias, "fc1_bias", up.columns);
  up.bias = up_bias.data_or_zeros(up.columns);
  up.activation = activation_of(kOp, activation, "activation");
  LinearParams down{};
  down.rows = up.rows;
  take_weight(kOp, "fc2_weight", fc2.weight, up.columns, x.dtype(), down);
  Floats down_bias(kOp, fc2.bias, "fc2_bias", down.columns);
  down.bias = down_bias.data_or_zeros(down.columns);
  checked_product(kOp, {64, up.rows, larger(up.columns, 1), larger(up.depth, down.columns)});
  Output output(kOp, x, addition, down);
  if (output.out.numel() == 0) return std::move(output.out);
  const LinearKernel up_kernel = FASTVIT_PER_ISA(linear_kernel)(up);
  const LinearKernel down_kernel = FASTVIT_PER_ISA(linear_kernel)(down);
  up.panel_stride = up_kernel.panel_floats, down.panel_stride = down_kernel.panel_floats;
  const float* up_packed = take_packed(kOp, fc1.packed, up, up_kernel);
  const float* down_packed = take_packed(kOp, fc2.packed, down, down_kernel);
  const bool rows_divided = by_rows(up, down, up_kernel);
  const int64_t up_floats = floats_to_pack(up_packed, up, up_kernel);
  const int64_t down_floats = floats_to_pack(down_packed, down, down_kernel);
  const int64_t hidden_floats = rows_divided ? 0 : checked_product(kOp, {up.rows, down_kernel.row_floats});
  float* memory = Workspace::of_call().take(up_floats + down_floats + hidden_floats);
  up_packed = pack_if_absent(up_packed, up, up_kernel, memory);
  down_packed = pack_if_absent(down_packed, down, down_kernel, memory + up_floats);
  if (rows_divided) {
    run_mlp(up, up_kernel, up_packed, down, down_kernel, down_packed);
  } else {
    float* hidden = memory + up_floats + down_floats;
    multiply(up, up_kernel, up_packed, nullptr, hidden);
    multiply(down, down_kernel, down_packed, hidden);
  }
  Workspace::of_call().give_back();
  return std::move(output.out);
}

FASTVIT_REGISTER(packed_mlp, "CPU", mlp_cpu);

}  // namespace

Tensor linear(const char* op, Tensor& x, Layer& layer, const NormOfRows& norm, const NormOfColumns& behind,
              Activation activation, Addition& addition) {
  LinearParams p{};
  const Input input(op, x, norm, p);
  take_weight(op, "weight", layer.weight, x.size(x.dim() - 1), x.dtype(), p);
  Floats bias(op, layer.bias, "bias", p.columns);
  p.bias = bias.data_or_zeros(p.columns);
  p.column_factor = behind.factor, p.column_shift = behind.shift;
  p.activation = activation;
  checked_product(op, {64, p.rows, p.columns, p.depth});
  Output output(op, x, addition, p);
  const LinearKernel kernel = FASTVIT_PER_ISA(linear_kernel)(p);
  p.panel_stride = kernel.panel_floats;
  const float* packed = take_packed(op, layer.packed, p, kernel);
  if (output.out.numel() == 0) return std::move(output.out);
  float* memory = Workspace::of_call().take(floats_to_pack(packed, p, kernel));
  run(p, kernel, pack_if_absent(packed, p, kernel, memory));
  Workspace::of_call().give_back();
  return std::move(output.out);
}

}  // namespace fastvit
