// fastvit::packed_linear, packed_mlp, packed_glu_mlp and pack_weight on the CPU: checks, dividing the work,
// registration.
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "common/arguments.h"
#include "common/float16.h"
#include "common/torch_abi.h"
#include "common/workspace.h"
#include "linear/op.h"

namespace fastvit {
namespace {

constexpr int64_t kItems = 16;       // of work for each thread, where they are
constexpr int64_t kBlockRows = 104;  // at most; with more, threads would share a block of short rows
constexpr int64_t kProductsOfItem = kSerialProducts / 8;  // at least
// Terms of a long float32 sum per slice: a deeper panel would not stay in the cache. Of rows that are columns of a
// matrix, which are many, and loaded anew for each group of panels, blocks hold more if their slices are shorter.
constexpr int64_t kDepthSlice = 3072, kDepthSliceOfColumns = 1024;

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
  int64_t isa, columns, depth, element;
  bool operator==(const PackedHeader&) const = default;
};
constexpr int64_t kHeaderFloats = 16;
static_assert(sizeof(PackedHeader) <= kHeaderFloats * sizeof(float));

PackedHeader header_of(const LinearParams& p) {
  return {static_cast<int64_t>(cpu_isa()), p.columns, p.depth, static_cast<int64_t>(p.element)};
}

int64_t panels_of(const LinearParams& p, const LinearKernel& kernel) {
  return divide_up(p.columns, kernel.panel_columns);
}

void pack(const LinearParams& p, const LinearKernel& kernel, float* packed) {
  const int64_t panels = panels_of(p, kernel);
  parallel_for(0, panels, grain_of(4 * kernel.panel_floats),
               [&](int64_t begin, int64_t end) { kernel.pack(p, begin, end, packed + begin * kernel.panel_floats); });
}

// Sizes and strides of the weight, copied unless contiguous along one axis; returns the number of columns.
int64_t take_weight(const char* op, const char* name, Tensor& weight, int64_t depth, Dtype dtype, LinearParams& p) {
  check(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == depth && weight.dtype() == dtype, op, ": ", name,
        " must be (N, ", depth, ") ", dtype, " on the CPU, got ", shape_of(weight), " ", weight.dtype());
  if (weight.stride(0) != 1) make_last_axis_contiguous(weight);
  p.weight = weight.data<void>();
  p.columns = weight.size(0);
  p.depth = depth;
  p.weight_column_stride = weight.stride(0);
  p.weight_depth_stride = weight.stride(1);
  p.element = element_of(dtype);
  return p.columns;
}

}  // namespace

Tensor pack_weight(Tensor weight) {
  constexpr char kOp[] = "pack_weight";
  check(weight.dim() == 2, kOp, ": weight must be (N, K), got ", shape_of(weight));
  check_cpu_dtype(kOp, weight, "weight", true);
  LinearParams p{};
  take_weight(kOp, "weight", weight, weight.size(1), weight.dtype(), p);
  const LinearKernel kernel = FASTVIT_PER_ISA(linear_kernel, p.element)(p);
  checked_product(kOp, {panels_of(p, kernel), kernel.panel_floats});
  const int64_t floats = panels_of(p, kernel) * kernel.panel_floats;
  Tensor packed = empty({kHeaderFloats + floats}, weight, Dtype::float32);
  const PackedHeader header = header_of(p);
  std::memcpy(packed.mutable_data<float>(), &header, sizeof header);
  pack(p, kernel, packed.mutable_data<float>() + kHeaderFloats);
  return packed;
}

namespace {

FASTVIT_REGISTER(pack_weight, "CPU", pack_weight);

// The weight (N, K), bit by bit, that was packed.
Tensor unpack_weight(Tensor packed) {
  constexpr char kOp[] = "unpack_weight";
  PackedHeader header{};
  bool fits = packed.is_cpu() && packed.dtype() == Dtype::float32 && packed.numel() >= kHeaderFloats;
  if (fits) std::memcpy(&header, packed.data<float>(), sizeof header);
  LinearParams p{};
  p.columns = header.columns, p.depth = header.depth, p.element = static_cast<Element>(header.element);
  const LinearKernel kernel = FASTVIT_PER_ISA(linear_kernel, p.element)(p);
  fits = fits && p.element >= Element::float32 && p.element <= Element::float16;
  fits = fits && header == header_of(p) && p.columns >= 0 && p.depth >= 0 &&
         packed.numel() == kHeaderFloats + checked_product(kOp, {panels_of(p, kernel), kernel.panel_floats});
  check(fits, kOp, ": packed is not what pack_weight makes here");
  Tensor weight = empty({p.columns, p.depth}, packed, dtype_of(p.element));
  if (weight.numel() == 0) return weight;
  const float* panels = packed.data<float>() + kHeaderFloats;
  void* to = weight.mutable_data<void>();
  parallel_for(0, p.columns, grain_of(4 * p.depth), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* panel = panels + n / kernel.panel_columns * kernel.panel_floats + n % kernel.panel_columns;
      for (int64_t k = 0; k < p.depth; ++k) {
        uint32_t word;
        std::memcpy(&word, panel + (kernel.pairs ? k / 2 : k) * kernel.panel_columns, sizeof word);
        if (p.element == Element::float32) {
          std::memcpy(static_cast<float*>(to) + n * p.depth + k, &word, sizeof word);
        } else if (p.element == Element::float16) {
          float value;
          std::memcpy(&value, &word, sizeof value);
          static_cast<uint16_t*>(to)[n * p.depth + k] = float16_of_float(value);
        } else {
          const bool low = kernel.pairs && k % 2 == 0;
          static_cast<uint16_t*>(to)[n * p.depth + k] = static_cast<uint16_t>(low ? word : word >> 16);
        }
      }
    }
  });
  return weight;
}

FASTVIT_REGISTER(unpack_weight, "CPU", unpack_weight);

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

// Rows that are processed together: blocks of equal size that fit the L2 cache, one for each thread or of whole tiles.
int64_t rows_of_block(const LinearParams& p, const LinearKernel& kernel) {
  const int64_t most = larger(kernel.row_tile, smaller(kBlockRows, kBlockFloats / larger(1, p.depth)));
  const int64_t blocks = divide_up(p.rows, most), rows = divide_up(p.rows, blocks);
  return blocks == num_threads() ? rows : smaller(p.rows, round_up(rows, kernel.row_tile));
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

// f(block, row, first panel, last panel) for items of work, where block holds rows of x from `row` on, and has memory
// for `more` floats a row behind it.
template <class F>
void for_each_loaded_block(const LinearParams& p, const LinearKernel& kernel, int64_t more, const F& f) {
  for_each_block(p, kernel, [&] {
    const int64_t floats = rows_of_block(p, kernel) * (kernel.row_floats + more);
    return [&, memory = BlockOfThread(floats), loaded = int64_t{-1}](int64_t row, int64_t rows, int64_t first,
                                                                     int64_t last) mutable {
      const RowBlock block{memory.data(), rows, rows};
      if (row != loaded) kernel.load(p, row, block);
      loaded = row;
      f(block, row, first, last);
    };
  });
}

void multiply(const LinearParams& p, const LinearKernel& kernel, const float* packed) {
  for_each_loaded_block(p, kernel, 0, [&](const RowBlock& block, int64_t row, int64_t first, int64_t last) {
    kernel.multiply(p, row, block, first, last, packed + first * p.panel_stride);
  });
}

// Long float32 sums accumulate in the result, slice by slice.
void run(const LinearParams& p, const LinearKernel& kernel, const float* packed) {
  const int64_t most = p.x_depth_stride == 1 ? kDepthSlice : kDepthSliceOfColumns;
  const int64_t slices = p.element != Element::float32 || p.has_norm ? 1 : larger(1, divide_up(p.depth, most));
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t begin = slice * p.depth / slices;
    LinearParams part = p;
    part.depth = (slice + 1) * p.depth / slices - begin;
    if (p.windows != nullptr) {
      part.first = begin;
    } else if (slices > 1) {
      part.x = static_cast<const float*>(p.x) + begin * p.x_depth_stride;
    }
    part.accumulate = slice > 0;
    if (slice + 1 < slices) {
      part.column_factor = part.column_shift = part.scale = nullptr;
      part.activation = Activation::none;
      part.residual = nullptr;
    }
    multiply(part, FASTVIT_PER_ISA(linear_kernel, part.element)(part), packed + begin * kernel.panel_columns);
  }
}

// --- The operators ---------------------------------------------------------------------------------------------------

// The norm of a product's rows.
struct Norm {
  Floats weight, bias;

  Norm(const char* op, const NormOfRows& norm, std::array<const char*, 2> names, int64_t depth, LinearParams& p)
      : weight(op, norm.weight, names[0], depth), bias(op, norm.bias, names[1], depth) {
    p.has_norm = norm.exists;
    p.norm_weight = weight.data(), p.norm_bias = bias.data();
    p.norm_eps = static_cast<float>(norm.eps);
  }
};

// x and its norm.
struct Input {
  Norm norm;

  Input(const char* op, Tensor& x, const NormOfRows& of, LinearParams& p)
      : norm(op, of, {"norm_weight", "norm_bias"}, last_size(op, x), p) {
    const bool columns = x.dim() == 2 && x.stride(0) == 1 && x.stride(1) != 1 && !of.exists;
    p.rows = columns ? x.size(0) : take_rows(op, x, p.x_stride);
    if (columns) p.x_stride = 1, p.x_depth_stride = x.stride(1);
    p.x = x.data<void>();
  }

  static int64_t last_size(const char* op, const Tensor& x) {
    check(x.is_cpu() && x.dim() >= 1, op, ": x must be (..., K) on the CPU, got ", shape_of(x));
    check_cpu_dtype(op, x, "x", true);
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

// A layer: its product, the weight packed for it, and the room to pack it in where it was not.
struct PackedLayer {
  LinearParams p;
  Floats bias;
  LinearKernel kernel;
  const float* packed;
  int64_t floats;

  // input: the rows that it takes.
  PackedLayer(const char* op, std::array<const char*, 2> names, Layer& layer, int64_t depth, Dtype dtype,
              const LinearParams& input)
      : p(input), bias(op, layer.bias, names[1], take_weight(op, names[0], layer.weight, depth, dtype, p)) {
    p.bias = bias.data_or_zeros(p.columns);
    checked_product(op, {64, p.rows, larger(p.columns, 1), larger(p.depth, 1)});
    kernel = FASTVIT_PER_ISA(linear_kernel, p.element)(p);
    p.panel_stride = kernel.panel_floats;
    packed = take_packed(op, layer.packed, p, kernel);
    floats = packed == nullptr ? whole_lines(panels_of(p, kernel) * kernel.panel_floats) : 0;
  }

  // Packs to `memory` what was not packed before; returns the memory behind it.
  float* pack_if_absent(float* memory) {
    if (packed == nullptr) pack(p, kernel, memory), packed = memory;
    return memory + floats;
  }
};

Tensor linear_cpu(Tensor x, Layer layer, const NormOfRows& norm, int64_t activation, Addition addition) {
  constexpr char kOp[] = "linear";
  return linear(kOp, x, layer, norm, {}, activation_of(kOp, activation, "activation"), addition);
}

FASTVIT_REGISTER(packed_linear, "CPU", linear_cpu);

// The layer of an MLP that gives the hidden values; gate: null where it has none.
struct HiddenLayer {
  const PackedLayer& values;
  const PackedLayer* gate;

  // Of memory behind a block of rows, for each of them.
  int64_t gate_floats() const { return gate == nullptr ? 0 : values.kernel.panel_columns; }

  // Computes panels [first, last) of the rows in a block to `hidden`.
  void multiply(const RowBlock& block, int64_t first, int64_t last, const RowBlock& hidden) const {
    const int64_t at = first * values.p.panel_stride;
    if (gate == nullptr) {
      values.kernel.multiply_to_block(values.p, block, first, last, values.packed + at, hidden);
    } else {
      values.kernel.multiply_gated_to_block(gate->p, values.p, block, first, last, gate->packed + at,
                                            values.packed + at, block.data + block.rows * values.kernel.row_floats,
                                            hidden);
    }
  }
};

// Whether there are blocks of rows enough to divide among the threads.
bool by_rows(const LinearParams& up, const LinearParams& down, const LinearKernel& kernel) {
  const int64_t threads = std::max(threads_for(up), threads_for(down));
  return threads == 1 ||
         divide_up(up.rows, rows_of_block(up.depth > down.depth ? up : down, kernel)) >= kItems / 2 * threads;
}

// Both layers of an MLP, block by block of rows: the hidden values of a block stay in the cache.
void run_by_rows(const HiddenLayer& hidden_layer, const PackedLayer& down) {
  const PackedLayer& up = hidden_layer.values;
  const int64_t step = rows_of_block(up.p.depth > down.p.depth ? up.p : down.p, up.kernel);
  const int64_t floats = up.kernel.row_floats + hidden_layer.gate_floats();
  parallel_dynamic(divide_up(up.p.rows, step), 1, std::max(threads_for(up.p), threads_for(down.p)), [&] {
    return [&, memory = BlockOfThread(step * (floats + down.kernel.row_floats))](int64_t block_of_rows, int64_t) {
      const int64_t row = block_of_rows * step, rows = smaller(step, up.p.rows - row);
      const RowBlock block{memory.data(), rows, rows}, hidden{block.data + step * floats, rows, rows};
      up.kernel.load(up.p, row, block);
      hidden_layer.multiply(block, 0, panels_of(up.p, up.kernel), hidden);
      if (down.p.has_norm) down.kernel.normalize(down.p, hidden);
      down.kernel.multiply(down.p, row, hidden, 0, panels_of(down.p, down.kernel), down.packed);
    };
  });
}

// One layer after the other, each divided by panels too; `hidden`: memory for all hidden values.
void run_by_panels(const HiddenLayer& hidden_layer, const PackedLayer& down, float* hidden) {
  const PackedLayer& up = hidden_layer.values;
  const int64_t all = down.p.rows;
  const auto rows_from = [&](int64_t row, int64_t rows) {
    return RowBlock{hidden + row * down.kernel.row_stride, rows, all};
  };
  for_each_loaded_block(up.p, up.kernel, hidden_layer.gate_floats(),
                        [&](const RowBlock& block, int64_t row, int64_t first, int64_t last) {
                          hidden_layer.multiply(block, first, last, rows_from(row, block.rows));
                        });
  if (down.p.has_norm) {
    parallel_for(0, all, grain_of(8 * down.p.depth),
                 [&](int64_t begin, int64_t end) { down.kernel.normalize(down.p, rows_from(begin, end - begin)); });
  }
  for_each_block(down.p, down.kernel, [&] {
    return [&](int64_t row, int64_t rows, int64_t first, int64_t last) {
      down.kernel.multiply(down.p, row, rows_from(row, rows), first, last, down.packed + first * down.p.panel_stride);
    };
  });
}

// `gate` and `hidden_norm`: null where there is none.
Tensor run_mlp(const char* op, Tensor x, Layer* gate, Layer up, Layer down, const NormOfRows& norm,
               const NormOfRows* hidden_norm, Activation activation, Addition addition) {
  LinearParams rows{}, hidden{};
  const Input input(op, x, norm, rows);
  const int64_t depth = x.size(x.dim() - 1);
  std::optional<PackedLayer> gates;
  if (gate != nullptr) gates.emplace(op, std::array{"gate_weight", "gate_bias"}, *gate, depth, x.dtype(), rows);
  const std::array names = gates ? std::array{"value_weight", "value_bias"} : std::array{"fc1_weight", "fc1_bias"};
  PackedLayer values(op, names, up, depth, x.dtype(), rows);
  check(!gates || gates->p.columns == values.p.columns, op, ": gate_weight and value_weight must be of one shape");
  (gates ? *gates : values).p.activation = activation;
  hidden.rows = rows.rows;
  std::optional<Norm> norm_of_hidden;
  if (hidden_norm != nullptr) {
    norm_of_hidden.emplace(op, *hidden_norm, std::array{"hidden_norm_weight", "hidden_norm_bias"}, values.p.columns,
                           hidden);
  }
  PackedLayer second(op, {"fc2_weight", "fc2_bias"}, down, values.p.columns, x.dtype(), hidden);
  Output output(op, x, addition, second.p);
  if (output.out.numel() == 0) return std::move(output.out);
  const bool rows_divided = by_rows(values.p, second.p, values.kernel);
  const int64_t hidden_floats = rows_divided ? 0 : checked_product(op, {hidden.rows, second.kernel.row_floats});
  const int64_t gate_floats = gates ? gates->floats : 0;
  float* memory = Workspace::of_call().take(gate_floats + values.floats + second.floats + hidden_floats);
  if (gates) memory = gates->pack_if_absent(memory);
  memory = second.pack_if_absent(values.pack_if_absent(memory));
  const HiddenLayer hidden_layer{values, gates ? &*gates : nullptr};
  if (rows_divided) {
    run_by_rows(hidden_layer, second);
  } else {
    run_by_panels(hidden_layer, second, memory);
  }
  Workspace::of_call().give_back();
  return std::move(output.out);
}

Tensor mlp_cpu(Tensor x, Layer fc1, Layer fc2, const NormOfRows& norm, int64_t activation, Addition addition) {
  const Activation code = activation_of("mlp", activation, "activation");
  return run_mlp("mlp", std::move(x), nullptr, std::move(fc1), std::move(fc2), norm, nullptr, code,
                 std::move(addition));
}

FASTVIT_REGISTER(packed_mlp, "CPU", mlp_cpu);

Tensor glu_mlp_cpu(Tensor x, Layer gate, Layer value, Layer fc2, const NormOfRows& norm, const NormOfRows& hidden_norm,
                   int64_t activation, Addition addition) {
  const Activation code = activation_of("glu_mlp", activation, "activation", Activation::sigmoid);
  return run_mlp("glu_mlp", std::move(x), &gate, std::move(value), std::move(fc2), norm, &hidden_norm, code,
                 std::move(addition));
}

FASTVIT_REGISTER(packed_glu_mlp, "CPU", glu_mlp_cpu);

}  // namespace

Tensor linear(const char* op, Tensor& x, Layer& layer, const NormOfRows& norm, const NormOfColumns& behind,
              Activation activation, Addition& addition) {
  LinearParams rows{};
  const Input input(op, x, norm, rows);
  PackedLayer product(op, {"weight", "bias"}, layer, x.size(x.dim() - 1), x.dtype(), rows);
  product.p.column_factor = behind.factor, product.p.column_shift = behind.shift;
  product.p.activation = activation;
  Output output(op, x, addition, product.p);
  if (output.out.numel() == 0) return std::move(output.out);
  product.pack_if_absent(Workspace::of_call().take(product.floats));
  run(product.p, product.kernel, product.packed);
  Workspace::of_call().give_back();
  return std::move(output.out);
}

Tensor convolve(const char* op, const Tensor& x, Layer& layer, const Windows& windows, const NormOfColumns& behind,
                Activation activation) {
  LinearParams rows{};
  rows.x = x.data<void>();
  rows.windows = &windows;
  rows.rows = x.size(0) == 0 ? 0 : checked_product(op, {x.size(0), windows.rows, windows.columns});
  const int64_t depth = windows.planes * windows.kernel_height * windows.kernel_width * windows.pixel;
  PackedLayer product(op, {"weight", "bias"}, layer, depth, x.dtype(), rows);
  product.p.column_factor = behind.factor, product.p.column_shift = behind.shift;
  product.p.activation = activation;
  const int64_t columns = product.p.columns, of_row = windows.columns * columns;
  Tensor out = empty_strided({x.size(0), columns, windows.rows, windows.columns},
                             {windows.rows * of_row, 1, of_row, columns}, x);
  product.p.out = out.mutable_data<void>();
  if (out.numel() == 0) return out;
  product.pack_if_absent(Workspace::of_call().take(product.floats));
  run(product.p, product.kernel, product.packed);
  Workspace::of_call().give_back();
  return out;
}

}  // namespace fastvit
