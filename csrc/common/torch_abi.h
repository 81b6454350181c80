// The part of LibTorch's stable C shim that fastvit uses, declared by hand, with thin RAII wrappers.
//
// These functions are a published, stable ABI (torch >= 2.10). Declaring them here instead of including torch's headers
// lets the extension be built without torch installed, and one binary serve every later torch. A test compiles this
// file together with torch's own headers, so that a declaration that differs is a compile error.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/parallel.h"

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct DeviceGuardOpaque;
using DeviceGuardHandle = DeviceGuardOpaque*;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;
using StableIValue = uint64_t;
using AOTITorchError = int32_t;

extern "C" {
// Registration of operators.
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle* ret);
AOTITorchError torch_library_impl(TorchLibraryHandle self, const char* name,
                                  void (*fn)(StableIValue*, uint64_t, uint64_t), uint64_t extension_build_version);
AOTITorchError aoti_torch_library_init_fragment(const char* ns, const char* file, uint32_t line,
                                                TorchLibraryHandle* ret);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle self, const char* schema);
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle library);

// Tensors.
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* ret);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** ret);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** ret);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* ret);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* ret);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* ret);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** ret);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** ret);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* ret);
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* ret);
AOTITorchError aoti_torch__reinterpret_tensor(AtenTensorHandle self, int64_t ndim, const int64_t* sizes,
                                              const int64_t* strides, int64_t offset, AtenTensorHandle* ret);
AOTITorchError aoti_torch_copy_(AtenTensorHandle self, AtenTensorHandle src, int32_t non_blocking);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_bool();

// Calls of operators.
AOTITorchError aoti_torch_cpu_add_Tensor(AtenTensorHandle self, AtenTensorHandle other, double alpha,
                                         AtenTensorHandle* ret);
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle left,
                                        AtenTensorHandle right, double beta, double alpha);
AOTITorchError aoti_torch_cpu_cat(const AtenTensorHandle* tensors, int64_t count, int64_t axis, AtenTensorHandle* ret);
AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack,
                                     uint64_t extension_build_version);
AOTITorchError torch_new_list_reserve_size(size_t size, StableListHandle* ret);
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue element);

// Devices.
AOTITorchError aoti_torch_create_device_guard(int32_t device_index, DeviceGuardHandle* ret);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard);

// Threads.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                  void (*func)(int64_t begin, int64_t end, void* context), void* context);
AOTITorchError torch_get_num_threads(uint32_t* ret);
AOTITorchError torch_get_thread_idx(uint32_t* ret);
}

namespace fastvit {

// The oldest torch that this binary supports. Later versions pass arguments in the form that this version used.
inline constexpr uint64_t kTorchAbiVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);

// Throws std::runtime_error (a RuntimeError in Python) with the message's parts joined, unless the condition holds.
template <class... Parts>
void check(bool condition, const Parts&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// The product of sizes that come from outside, those below 1 counted as 1; throws where it does not fit.
int64_t checked_product(const char* op, std::initializer_list<int64_t> sizes);

// Turns an error code of the shim into an exception that names the call.
inline void check_call(AOTITorchError error, const char* call) {
  check(error == 0, "fastvit: torch's ", call, " failed");
}
#define FASTVIT_TORCH(call, ...) ::fastvit::check_call(call(__VA_ARGS__), #call)

enum class Dtype { float32, float64, float16, bfloat16, boolean, other };
const char* name_of(Dtype dtype);
std::ostream& operator<<(std::ostream& stream, Dtype dtype);

// An owned reference to a torch tensor.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim, "get_dim"); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel, "get_numel"); }
  const int64_t* sizes() const { return get<int64_t*>(aoti_torch_get_sizes, "get_sizes"); }
  const int64_t* strides() const { return get<int64_t*>(aoti_torch_get_strides, "get_strides"); }
  int64_t size(int64_t axis) const { return sizes()[axis]; }      // axis from 0, unchecked
  int64_t stride(int64_t axis) const { return strides()[axis]; }  // in elements; axis from 0, unchecked
  bool is_contiguous() const;
  Dtype dtype() const;
  bool is_cpu() const { return device_type() == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type() == aoti_torch_device_type_cuda(); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type, "get_device_type"); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index, "get_device_index"); }

  // The first element; the type is not checked.
  template <class T>
  const T* data() const {
    return static_cast<const T*>(get<const void*>(torch_get_const_data_ptr, "get_const_data_ptr"));
  }
  template <class T>
  T* mutable_data() {
    return static_cast<T*>(get<void*>(torch_get_mutable_data_ptr, "get_mutable_data_ptr"));
  }

  // The same tensor once more.
  Tensor share() const { return Tensor(get<AtenTensorHandle>(aoti_torch_new_tensor_handle, "new_tensor_handle")); }
  AtenTensorHandle handle() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  template <class T>
  T get(AOTITorchError (*getter)(AtenTensorHandle, T*), const char* name) const {
    T value{};
    check_call(getter(handle_, &value), name);
    return value;
  }

  AtenTensorHandle handle_;
};
using OptionalTensor = std::optional<Tensor>;

// "(8, 197, 384)", for messages.
std::string shape_of(const int64_t* sizes, int64_t axes);
std::string shape_of(const Tensor& tensor);

// An uninitialised tensor on like's device, of like's dtype or the one given.
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, const Tensor& like);
Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like);  // contiguous
Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like, Dtype dtype);

// Replaces a tensor by a contiguous copy, the second unless the stride of its last axis is 1.
void make_contiguous(Tensor& tensor);
void make_last_axis_contiguous(Tensor& tensor);

// Replaces a parameter by a contiguous copy in float32 unless it is contiguous, and in float32 or x's dtype.
void make_parameter(Tensor& tensor, const Tensor& x);
void make_parameter(OptionalTensor& tensor, const Tensor& x);

// Makes the tensor's device current for the life of the object (CUDA).
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) {
    FASTVIT_TORCH(aoti_torch_create_device_guard, tensor.device_index(), &handle_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { aoti_torch_delete_device_guard(handle_); }

 private:
  DeviceGuardHandle handle_ = nullptr;
};

// Torch's current stream (a cudaStream_t) on the tensor's device.
void* current_cuda_stream(const Tensor& tensor);

// --- Registration ----------------------------------------------------------------------------------------------------

// A boxed kernel: replaces its arguments on the stack by its results.
using BoxedKernel = void (*)(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);

// One implementation of the operator fastvit::<op> for a dispatch key. Objects of this type form a list while the
// library is loaded; register_operators() registers them with torch. (In the constructor an error would abort the
// process: exceptions cannot leave dlopen.)
struct Registration {
  Registration(const char* op, const char* key, BoxedKernel kernel, const char* file, uint32_t line);
  const char* op;
  const char* key;
  BoxedKernel kernel;
  const char* file;
  uint32_t line;
  const Registration* next;
};
const Registration* registrations();  // the head of the list
void register_operators();
void register_operator(const Registration& entry);
void define_operator(const std::string& schema);  // "fastvit::" and what follows: "linear(Tensor x, ...) -> Tensor"

namespace detail {

// Takes an argument off the stack: `slots` entries from `stack` on, which moves past them.
//
// A T that has no specialisation is a struct of consecutive arguments of the schema: T::Schema is the std::tuple of its
// fields' types.
template <class T>
struct Unbox {
  using Fields = Unbox<typename T::Schema>;
  static constexpr uint64_t slots = Fields::slots;
  static T take(StableIValue*& stack) {
    return std::apply([](auto&&... fields) { return T{std::move(fields)...}; }, Fields::take(stack));
  }
};

template <class... Args>
struct Unbox<std::tuple<Args...>> {
  static constexpr uint64_t slots = (uint64_t{0} + ... + Unbox<Args>::slots);
  static std::tuple<Args...> take(StableIValue*& stack) {
    return std::tuple<Args...>{Unbox<Args>::take(stack)...};  // braces: in this order
  }
};

struct OneSlot {
  static constexpr uint64_t slots = 1;
};

template <>
struct Unbox<Tensor> : OneSlot {
  static Tensor take(StableIValue*& stack) { return Tensor(reinterpret_cast<AtenTensorHandle>(*stack++)); }
};

template <>
struct Unbox<int64_t> : OneSlot {
  static int64_t take(StableIValue*& stack) { return static_cast<int64_t>(*stack++); }
};

template <>
struct Unbox<double> : OneSlot {
  static double take(StableIValue*& stack) { return std::bit_cast<double>(*stack++); }
};

template <>
struct Unbox<bool> : OneSlot {
  static bool take(StableIValue*& stack) { return (*stack++ & 0xff) != 0; }
};

// An optional is null or a pointer to a value on the heap, owned by the callee.
template <class T>
struct Unbox<std::optional<T>> : OneSlot {
  static std::optional<T> take(StableIValue*& stack) {
    const std::unique_ptr<StableIValue> value(reinterpret_cast<StableIValue*>(*stack++));
    if (value == nullptr) return std::nullopt;
    StableIValue* at = value.get();
    return Unbox<T>::take(at);
  }
};

// Puts results on the stack; how many there are.
inline constexpr uint64_t results_of(const Tensor*) { return 1; }
template <class... Results>
constexpr uint64_t results_of(const std::tuple<Results...>*) {
  return sizeof...(Results);
}
inline void put(Tensor result, StableIValue* stack) { *stack = reinterpret_cast<StableIValue>(result.release()); }
template <class... Results>
void put(std::tuple<Results...> results, StableIValue* stack) {
  std::apply([&](Results&... each) { (put(std::move(each), stack++), ...); }, results);
}

template <auto function>
struct Box;

template <class Result, class... Args, Result (*function)(Args...)>
struct Box<function> {
  static void call(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
    using Taken = Unbox<std::tuple<std::remove_cvref_t<Args>...>>;
    constexpr uint64_t results = [] {
      if constexpr (std::is_void_v<Result>)
        return uint64_t{0};
      else
        return results_of(static_cast<const Result*>(nullptr));
    }();
    check(num_args == Taken::slots && num_outputs == results, "fastvit: the schema has ", num_args, " arguments and ",
          num_outputs, " results, the kernel takes ", Taken::slots, " and returns ", results);
    // Takes ownership of every argument before the function runs, so that all are released if it throws.
    StableIValue* next = stack;
    auto args = Taken::take(next);
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, std::move(args));
    } else {
      put(std::apply(function, std::move(args)), stack);
    }
  }
};

}  // namespace detail
}  // namespace fastvit

// FASTVIT_REGISTER(token_depthwise_conv, "CPU", run): `run` implements fastvit::token_depthwise_conv there. `run` is a
// function of Tensor, OptionalTensor, int64_t, double and bool, and of structs of them that have a Schema (by value or
// const reference), that returns a Tensor, a std::tuple of them, or nothing.
#define FASTVIT_REGISTER(op, key, function)                                                                      \
  static const ::fastvit::Registration fastvit_register_##op(#op, key, ::fastvit::detail::Box<(function)>::call, \
                                                             __FILE__, __LINE__)
