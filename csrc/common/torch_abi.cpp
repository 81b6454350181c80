#include "common/torch_abi.h"

#include <dlfcn.h>

#include <atomic>
#include <exception>
#include <memory>

namespace fastvit {
namespace {

const Registration* first_registration = nullptr;

// Never deleted: that would take back what was registered, and at exit torch may already be unloaded.
using Library = std::unique_ptr<TorchLibraryOpaque, AOTITorchError (*)(TorchLibraryHandle)>;
Library owned(TorchLibraryHandle library) { return {library, aoti_torch_delete_library_object}; }

int32_t code_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return aoti_torch_dtype_float32();
    case Dtype::float64: return aoti_torch_dtype_float64();
    case Dtype::float16: return aoti_torch_dtype_float16();
    case Dtype::bfloat16: return aoti_torch_dtype_bfloat16();
    case Dtype::boolean: return aoti_torch_dtype_bool();
    case Dtype::other: break;
  }
  throw std::logic_error("fastvit: this dtype has no code");
}

// What the chunks of a parallel_for share.
struct Range {
  RangeBody body;
  const void* context;
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
};

void run_chunk(int64_t begin, int64_t end, void* context) {
  auto& range = *static_cast<Range*>(context);
  try {
    range.body(begin, end, range.context);
  } catch (...) {
    if (!range.failed.test_and_set()) range.error = std::current_exception();
  }
}

}  // namespace

Registration::Registration(const char* op, const char* key, BoxedKernel kernel, const char* file, uint32_t line)
    : op(op), key(key), kernel(kernel), file(file), line(line), next(std::exchange(first_registration, this)) {}

const Registration* registrations() { return first_registration; }

void register_operator(const Registration& entry) {
  TorchLibraryHandle library = nullptr;
  FASTVIT_TORCH(aoti_torch_library_init_impl, "fastvit", entry.key, entry.file, entry.line, &library);
  Library owner = owned(library);
  FASTVIT_TORCH(torch_library_impl, library, entry.op, entry.kernel, kTorchAbiVersion);
  owner.release();
}

void define_operator(const std::string& schema) {
  TorchLibraryHandle library = nullptr;
  FASTVIT_TORCH(aoti_torch_library_init_fragment, "fastvit", __FILE__, __LINE__, &library);
  Library owner = owned(library);
  FASTVIT_TORCH(aoti_torch_library_def, library, schema.c_str());
  owner.release();
}

void register_operators() {
  for (const auto* entry = registrations(); entry != nullptr; entry = entry->next) register_operator(*entry);
}

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return "float32";
    case Dtype::float64: return "float64";
    case Dtype::float16: return "float16";
    case Dtype::bfloat16: return "bfloat16";
    case Dtype::boolean: return "bool";
    case Dtype::other: break;
  }
  return "another dtype";
}

std::ostream& operator<<(std::ostream& stream, Dtype dtype) { return stream << name_of(dtype); }

Dtype Tensor::dtype() const {
  const auto code = get<int32_t>(aoti_torch_get_dtype, "get_dtype");
  for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64, Dtype::boolean}) {
    if (code == code_of(dtype)) return dtype;
  }
  return Dtype::other;
}

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  for (int64_t axis = dim() - 1; axis >= 0; --axis) {
    if (size(axis) != 1 && stride(axis) != expected) return numel() == 0;
    expected *= size(axis);
  }
  return true;
}

int64_t checked_product(const char* op, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (int64_t size : sizes) {
    if (size > 1 && __builtin_mul_overflow(product, size, &product)) {
      check(false, op, ": the sizes are too large, the product of ",
            shape_of(sizes.begin(), static_cast<int64_t>(sizes.size())), " does not fit into 64 bits");
    }
  }
  return product;
}

std::string shape_of(const int64_t* sizes, int64_t axes) {
  std::ostringstream text;
  text << '(';
  for (int64_t axis = 0; axis < axes; ++axis) text << (axis == 0 ? "" : ", ") << sizes[axis];
  text << (axes == 1 ? ",)" : ")");
  return text.str();
}

std::string shape_of(const Tensor& tensor) { return shape_of(tensor.sizes(), tensor.dim()); }

namespace {

Tensor make_empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, const Tensor& like,
                  Dtype dtype) {
  check(sizes.size() == strides.size(), "fastvit: empty_strided got ", sizes.size(), " sizes and ", strides.size(),
        " strides");
  AtenTensorHandle handle = nullptr;
  FASTVIT_TORCH(aoti_torch_empty_strided, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                code_of(dtype), like.device_type(), like.device_index(), &handle);
  return Tensor(handle);
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = step;
    step = checked_product("fastvit", {step, sizes[axis]});
  }
  return strides;
}

}  // namespace

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, const Tensor& like) {
  return make_empty(sizes, strides, like, like.dtype());
}

Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like) { return empty(sizes, like, like.dtype()); }

Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like, Dtype dtype) {
  return make_empty(sizes, contiguous_strides(sizes), like, dtype);
}

namespace {

// By a contiguous copy in this dtype.
void replace(Tensor& tensor, Dtype dtype) {
  Tensor copy = empty({tensor.sizes(), tensor.sizes() + tensor.dim()}, tensor, dtype);
  FASTVIT_TORCH(aoti_torch_copy_, copy.handle(), tensor.handle(), 0);
  tensor = std::move(copy);
}

}  // namespace

void make_contiguous(Tensor& tensor) {
  const Dtype dtype = tensor.dtype();
  if (dtype != Dtype::other) replace(tensor, dtype);
}

void make_last_axis_contiguous(Tensor& tensor) {
  const int64_t axes = tensor.dim();
  if (axes > 0 && tensor.stride(axes - 1) != 1 && tensor.numel() > 0) make_contiguous(tensor);
}

void make_parameter(Tensor& tensor, const Tensor& x) {
  const Dtype dtype = tensor.dtype();
  const bool accepted = dtype == Dtype::float32 || dtype == x.dtype();
  if ((accepted && tensor.is_contiguous()) || dtype == Dtype::other || dtype == Dtype::boolean) return;
  replace(tensor, Dtype::float32);
}

void make_parameter(OptionalTensor& tensor, const Tensor& x) {
  if (tensor) make_parameter(*tensor, x);
}

void* current_cuda_stream(const Tensor& tensor) {
  // Looked up at run time, as a torch without CUDA, which has no such symbol, must be able to load this binary.
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    check(library != nullptr, "fastvit: CUDA kernels need a torch with CUDA (libtorch_cuda.so is not loaded)");
    void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
    check(symbol != nullptr, "fastvit: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  FASTVIT_TORCH(get_stream, tensor.device_index(), &stream);
  return stream;
}

void parallel_for_range(int64_t begin, int64_t end, int64_t grain, RangeBody body, const void* context) {
  Range range{.body = body, .context = context, .error = nullptr};
  FASTVIT_TORCH(torch_parallel_for, begin, end, grain, run_chunk, &range);
  if (range.error) std::rethrow_exception(range.error);
}

int num_threads() {
  uint32_t count = 0;
  FASTVIT_TORCH(torch_get_num_threads, &count);
  return static_cast<int>(count);
}

int thread_index() {
  uint32_t index = 0;
  FASTVIT_TORCH(torch_get_thread_idx, &index);
  return static_cast<int>(index);
}

}  // namespace fastvit
