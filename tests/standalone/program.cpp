// The operators of csrc without torch and Python: the functions of torch's C interface that they call, in plain C++,
// and a loop that reads calls from standard input and writes results to standard output. So they run wherever a C++
// program does, such as under an emulator of another CPU. tests/standalone/program.py is the other end.
//
// A call: the operator's name, an instruction set, a number of threads, how many arguments and results there are, and
// the arguments. A result: 0 and the tensors, or 1 and a message.
//
// Tensors lie in front of a page that must not be touched, and new ones hold NaN. Threads are taken one after the
// other.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#include "common/bfloat16.h"
#include "common/float16.h"
#include "common/isa.h"
#include "common/torch_abi.h"

// --- Tensors ---------------------------------------------------------------------------------------------------------

namespace {

constexpr int32_t kFloat16 = 5, kFloat32 = 6, kFloat64 = 7, kBool = 11, kBfloat16 = 15;  // as torch counts them

int64_t bytes_of(int32_t dtype) {
  switch (dtype) {
    case kBool: return 1;
    case kFloat16:
    case kBfloat16: return 2;
    case kFloat32: return 4;
    default: return 8;
  }
}

// Some bytes right in front of a page that must not be touched.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (static_cast<size_t>(bytes) + page - 1) / page * page;
    size_ = inner + page;
    memory_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(memory_ + inner, page, PROT_NONE) != 0) std::abort();
    data_ = memory_ + inner - bytes;
    std::memset(data_, 0xff, static_cast<size_t>(bytes));  // NaN
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, size_); }
  char* data() const { return data_; }

 private:
  char *memory_, *data_;
  size_t size_;
};

}  // namespace

struct AtenTensorOpaque {
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
  Guarded memory;

  AtenTensorOpaque(int32_t dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides)
      : dtype(dtype), sizes(std::move(sizes)), strides(std::move(strides)), memory(bytes()) {}

  int64_t numel() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>()); }
  int64_t bytes() const {
    if (numel() == 0) return 0;
    int64_t last = 0;
    for (size_t axis = 0; axis < sizes.size(); ++axis) last += (sizes[axis] - 1) * strides[axis];
    return (last + 1) * bytes_of(dtype);
  }
  // f(address) for every element, in the order of the indices.
  template <class F>
  void for_each(const F& f) const {
    for (int64_t i = 0; i < numel(); ++i) {
      int64_t rest = i, at = 0;
      for (size_t axis = sizes.size(); axis-- > 0; rest /= sizes[axis]) at += rest % sizes[axis] * strides[axis];
      f(memory.data() + at * bytes_of(dtype));
    }
  }
};

namespace {

template <class T>
T read_as(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

double value_at(const char* from, int32_t dtype) {
  switch (dtype) {
    case kBool: return *from != 0;
    case kFloat16: return fastvit::float_of_float16(read_as<uint16_t>(from));
    case kBfloat16: return fastvit::float_of_bfloat16(read_as<uint16_t>(from));
    case kFloat32: return read_as<float>(from);
    default: return read_as<double>(from);
  }
}

constexpr AOTITorchError kDone = 0, kFailed = 1;

struct Threads {
  int64_t count = 1, index = 0;
  bool within = false;
} threads;

std::map<std::string, fastvit::BoxedKernel> kernels;

}  // namespace

extern "C" {
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle* ret) {
  *ret = nullptr;
  return kDone;
}
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, fastvit::BoxedKernel kernel, uint64_t) {
  kernels[name] = kernel;
  return kDone;
}
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle*) {
  return kFailed;
}
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*) { return kFailed; }
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return kDone; }

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  delete tensor;
  return kDone;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret) {
  *ret = static_cast<int64_t>(tensor->sizes.size());
  return kDone;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* ret) {
  *ret = tensor->numel();
  return kDone;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** ret) {
  *ret = tensor->sizes.data();
  return kDone;
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** ret) {
  *ret = tensor->strides.data();
  return kDone;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* ret) {
  *ret = tensor->dtype;
  return kDone;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* ret) {
  *ret = aoti_torch_device_type_cpu();
  return kDone;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* ret) {
  *ret = -1;
  return kDone;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** ret) {
  *ret = tensor->memory.data();
  return kDone;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** ret) {
  *ret = tensor->memory.data();
  return kDone;
}
AOTITorchError aoti_torch_empty_strided(int64_t axes, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t, int32_t, AtenTensorHandle* ret) {
  try {
    *ret = new AtenTensorOpaque(dtype, {sizes, sizes + axes}, {strides, strides + axes});
    return kDone;
  } catch (const std::bad_alloc&) {
    return kFailed;
  }
}
AOTITorchError aoti_torch_copy_(AtenTensorHandle self, AtenTensorHandle source, int32_t) {
  if (self->sizes != source->sizes) return kFailed;
  std::vector<const char*> from;
  source->for_each([&](const char* at) { from.push_back(at); });
  auto next = from.begin();
  self->for_each([&](char* at) {
    if (self->dtype == source->dtype) {
      std::memcpy(at, *next++, static_cast<size_t>(bytes_of(self->dtype)));
    } else {  // to float32, which is all that is asked for
      if (self->dtype != kFloat32) std::abort();
      const auto value = static_cast<float>(value_at(*next++, source->dtype));
      std::memcpy(at, &value, sizeof value);
    }
  });
  return kDone;
}
int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_device_type_cuda() { return 1; }
int32_t aoti_torch_dtype_float32() { return kFloat32; }
int32_t aoti_torch_dtype_float64() { return kFloat64; }
int32_t aoti_torch_dtype_float16() { return kFloat16; }
int32_t aoti_torch_dtype_bfloat16() { return kBfloat16; }
int32_t aoti_torch_dtype_bool() { return kBool; }

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return kFailed; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return kFailed; }

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                  void (*f)(int64_t begin, int64_t end, void* context), void* context) {
  if (begin >= end) return kDone;
  if (threads.within) return f(begin, end, context), kDone;
  const int64_t count = end - begin, most = (count + std::max<int64_t>(1, grain) - 1) / std::max<int64_t>(1, grain);
  const int64_t chunks = std::min(threads.count, most), step = (count + chunks - 1) / chunks;
  threads.within = true;
  for (int64_t i = 0; i * step < count; ++i) {
    threads.index = i;
    f(begin + i * step, std::min(end, begin + (i + 1) * step), context);
  }
  threads = {threads.count, 0, false};
  return kDone;
}
AOTITorchError torch_get_num_threads(uint32_t* ret) {
  *ret = static_cast<uint32_t>(threads.count);
  return kDone;
}
AOTITorchError torch_get_thread_idx(uint32_t* ret) {
  *ret = static_cast<uint32_t>(threads.index);
  return kDone;
}
}

// --- Calls -----------------------------------------------------------------------------------------------------------

namespace {

void read_bytes(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);  // the other end has closed
}
void write_bytes(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

int64_t read_number() {
  int64_t value;
  read_bytes(&value, sizeof value);
  return value;
}
void write_number(int64_t value) { write_bytes(&value, sizeof value); }

std::vector<int64_t> read_numbers() {
  std::vector<int64_t> values(static_cast<size_t>(read_number()));
  read_bytes(values.data(), values.size() * sizeof(int64_t));
  return values;
}
void write_numbers(const std::vector<int64_t>& values) {
  write_number(static_cast<int64_t>(values.size()));
  write_bytes(values.data(), values.size() * sizeof(int64_t));
}

std::string read_text() {
  std::string text(static_cast<size_t>(read_number()), '\0');
  read_bytes(text.data(), text.size());
  return text;
}
void write_text(const std::string& text) {
  write_number(static_cast<int64_t>(text.size()));
  write_bytes(text.data(), text.size());
}

// A value for the stack: a tensor, 64 bits, or what an optional holds, which the kernel deletes.
StableIValue read_value() {
  switch (read_number()) {
    case 't': {
      const int64_t dtype = read_number();
      std::vector<int64_t> sizes = read_numbers(), strides = read_numbers();
      auto* tensor = new AtenTensorOpaque(static_cast<int32_t>(dtype), std::move(sizes), std::move(strides));
      read_bytes(tensor->memory.data(), static_cast<size_t>(tensor->bytes()));
      return reinterpret_cast<StableIValue>(tensor);
    }
    case 'o': return reinterpret_cast<StableIValue>(new StableIValue(read_value()));
    default: return static_cast<StableIValue>(read_number());
  }
}

void write_tensor(StableIValue value) {
  auto* tensor = reinterpret_cast<AtenTensorHandle>(value);
  write_number(tensor->dtype);
  write_numbers(tensor->sizes);
  write_numbers(tensor->strides);
  write_bytes(tensor->memory.data(), static_cast<size_t>(tensor->bytes()));
  delete tensor;
}

void run(const std::string& name) {
  fastvit::set_cpu_isa(read_text());
  threads.count = read_number();
  const auto arguments = static_cast<uint64_t>(read_number()), results = static_cast<uint64_t>(read_number());
  std::vector<StableIValue> stack(std::max(arguments, results));
  for (uint64_t i = 0; i < arguments; ++i) stack[i] = read_value();
  kernels.at(name)(stack.data(), arguments, results);
  write_number(0);
  for (uint64_t i = 0; i < results; ++i) write_tensor(stack[i]);
}

}  // namespace

int main() {
  fastvit::register_operators();
  while (true) {
    const std::string name = read_text();
    try {
      run(name);
    } catch (const std::exception& error) {
      write_number(1);
      write_text(error.what());
    }
    std::fflush(stdout);
  }
}
