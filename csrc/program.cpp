#include "program.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_map>

namespace fastvit {
namespace {

struct Listed {
  std::mutex mutex;
  int64_t last = 0;
  std::unordered_map<int64_t, std::weak_ptr<Program>> programs;
};

Listed& listed() {
  static Listed programs;
  return programs;
}

int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 8;
    case Dtype::float32: return 4;
    case Dtype::float16:
    case Dtype::bfloat16: return 2;
    case Dtype::boolean: return 1;
    case Dtype::other: break;
  }
  throw std::runtime_error("fastvit: a matrix of another dtype");
}

Sample sample_of(const Tensor& tensor) {
  const int64_t bytes = bytes_of(tensor.dtype());
  if (tensor.dim() != 2) return {tensor.data<void>(), 1, tensor.numel(), 0, 1, bytes};
  return {tensor.data<void>(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1), bytes};
}

StableIValue list_of(const std::vector<int64_t>& values) {
  StableListHandle list = nullptr;
  FASTVIT_TORCH(torch_new_list_reserve_size, values.size(), &list);
  for (int64_t value : values) FASTVIT_TORCH(torch_list_push_back, list, static_cast<StableIValue>(value));
  return reinterpret_cast<StableIValue>(list);
}

// Three operators whose arguments the dispatcher's C interface cannot pass on.
Tensor add(const Tensor& x, const Tensor& y) {
  AtenTensorHandle sum = nullptr;
  FASTVIT_TORCH(aoti_torch_cpu_add_Tensor, x.handle(), y.handle(), 1.0, &sum);
  return Tensor(sum);
}

Tensor addmm(const Tensor& bias, const Tensor& x, const Tensor& y) {
  Tensor out = empty({x.size(0), y.size(1)}, x);
  FASTVIT_TORCH(aoti_torch_cpu_addmm_out, out.handle(), bias.handle(), x.handle(), y.handle(), 1.0, 1.0);
  return out;
}

Tensor cat(const Tensor& x, const Tensor& y, int64_t axis) {
  const AtenTensorHandle tensors[] = {x.handle(), y.handle()};
  AtenTensorHandle joined = nullptr;
  FASTVIT_TORCH(aoti_torch_cpu_cat, tensors, 2, axis, &joined);
  return Tensor(joined);
}

BoxedKernel kernel_of(const std::string& name) {
  if (name == "add") return detail::Box<add>::call;
  if (name == "addmm") return detail::Box<addmm>::call;
  if (name == "cat") return detail::Box<cat>::call;
  for (const auto* entry = registrations(); entry != nullptr; entry = entry->next) {
    if (name == std::string("fastvit::") + entry->op && std::string("CPU") == entry->key) return entry->kernel;
  }
  return nullptr;
}

// The operators that a program is made and called by, since torch alone can tell a tensor of Python's.
void hold(Tensor tensor, int64_t program, bool fixed) { Program::of(program)->hold(std::move(tensor), fixed); }
FASTVIT_REGISTER(_program_hold, "CPU", hold);

Tensor run(Tensor x, int64_t program) { return Program::of(program)->run(std::move(x)); }
FASTVIT_REGISTER(_program_run, "CPU", run);

}  // namespace

Sample::Sample(const void* address, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
               int64_t element_bytes)
    : bytes_(static_cast<size_t>(element_bytes < 8 ? element_bytes : 8)) {
  const auto* data = static_cast<const char*>(address);
  const auto count = static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns);
  if (count == 0 || data == nullptr) return;
  for (uint64_t i = 0; i < kValues; ++i) {
    const uint64_t at = i == 0 ? count - 1 : static_cast<uint64_t>(static_cast<__uint128_t>(i * kPrime) * count >> 64);
    const auto row = static_cast<int64_t>(at / static_cast<uint64_t>(columns));
    const auto column = static_cast<int64_t>(at % static_cast<uint64_t>(columns));
    values_.push_back(data + (row * row_stride + column * column_stride) * element_bytes);
  }
}

void Sample::prefetch() const {
  for (const char* each : values_) __builtin_prefetch(each);
}

uint64_t Sample::hash() const {
  uint64_t hash = values_.size();
  for (const char* each : values_) {
    uint64_t value = 0;
    std::memcpy(&value, each, bytes_);
    hash = (hash ^ value) * kPrime;
    hash ^= hash >> 29;
  }
  return hash;
}

Program::Layout::Layout(const Tensor& tensor)
    : address(tensor.data<void>()),
      dtype(tensor.dtype()),
      sizes(tensor.sizes(), tensor.sizes() + tensor.dim()),
      strides(tensor.strides(), tensor.strides() + tensor.dim()) {}

bool Program::Layout::is_of(const Tensor& tensor) const {
  return tensor.data<void>() == address && static_cast<size_t>(tensor.dim()) == sizes.size() &&
         std::equal(sizes.begin(), sizes.end(), tensor.sizes()) &&
         std::equal(strides.begin(), strides.end(), tensor.strides()) && tensor.dtype() == dtype;
}

std::shared_ptr<Program> Program::make() {
  const std::shared_ptr<Program> program(new Program);
  const std::lock_guard lock(listed().mutex);
  program->id_ = ++listed().last;
  listed().programs[program->id_] = program;
  return program;
}

Program::~Program() {
  const std::lock_guard lock(listed().mutex);
  listed().programs.erase(id_);
}

std::shared_ptr<Program> Program::of(int64_t id) {
  const std::lock_guard lock(listed().mutex);
  const auto found = listed().programs.find(id);
  const std::shared_ptr<Program> program = found == listed().programs.end() ? nullptr : found->second.lock();
  check(program != nullptr, "fastvit: there is no program ", id);
  return program;
}

void Program::hold(Tensor tensor, bool fixed) {
  if (fixed) fixed_.emplace_back(held_.size(), Layout(tensor));
  held_.push_back(std::move(tensor));
}

void Program::watch(int64_t index) {
  const Tensor& tensor = held_.at(static_cast<size_t>(-1 - index));
  check(tensor.is_cpu() && (tensor.dim() == 2 || tensor.is_contiguous()),
        "fastvit: a program watches matrices and contiguous tensors on the CPU");
  const Sample sample = sample_of(tensor);
  watched_.emplace_back(sample, sample.hash());
}

void Program::add_view(int64_t source, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t offset) {
  steps_.push_back({View{source, offset, std::move(sizes), std::move(strides)}, {}});
  ++results_;
}

void Program::add_call(const std::string& name, const std::string& overload, Words words, Lists lists, Tensors tensors,
                       int64_t results) {
  const BoxedKernel kernel = kernel_of(name);
  check(kernel != nullptr || name.rfind("fastvit::", 0) != 0, "fastvit: ", name, " has no kernel here");
  const auto arguments = static_cast<int64_t>(words.size());
  words.resize(static_cast<size_t>(larger(arguments, results)));
  steps_.push_back(
      {Call{kernel, name, overload, arguments, std::move(words), std::move(lists), std::move(tensors), results}, {}});
  results_ += results;
}

void Program::finish(int64_t result) {
  check(result > 0 && result <= results_, "fastvit: a program has no result ", result);
  result_ = result;
  std::vector<bool> read(static_cast<size_t>(results_) + 1);
  read[static_cast<size_t>(result)] = true;
  int64_t made = results_;
  for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
    const auto note = [&](int64_t index) {
      check(index <= results_ && -1 - index < static_cast<int64_t>(held_.size()), "fastvit: no tensor ", index);
      if (index <= 0 || read[static_cast<size_t>(index)]) return;
      read[static_cast<size_t>(index)] = true;
      step->last_read.push_back(index);
    };
    if (const auto* view = std::get_if<View>(&step->what)) {
      note(made--);
      note(view->source);
    } else {
      const auto& call = std::get<Call>(step->what);
      for (int64_t i = 0; i < call.results; ++i) note(made--);
      for (const Argument& each : call.tensors) note(each.index);
    }
  }
}

bool Program::holds() const {
  if (!std::all_of(fixed_.begin(), fixed_.end(),
                   [&](const auto& each) { return each.second.is_of(held_[each.first]); })) {
    return false;
  }
  // In a model they have left the caches since the last call: so that they are waited for together.
  for (const auto& [sample, hash] : watched_) sample.prefetch();
  return std::all_of(watched_.begin(), watched_.end(),
                     [](const auto& each) { return each.first.hash() == each.second; });
}

Tensor Program::run(Tensor x) const {
  check(result_ > 0, "fastvit: this program is not finished");
  std::vector<Tensor> results;
  results.reserve(static_cast<size_t>(results_));
  const auto at = [&](int64_t index) -> const Tensor& {
    return index == 0  ? x
           : index > 0 ? results[static_cast<size_t>(index - 1)]
                       : held_[static_cast<size_t>(-1 - index)];
  };
  Words stack;
  for (const Step& step : steps_) {
    if (const auto* view = std::get_if<View>(&step.what)) {
      AtenTensorHandle handle = nullptr;
      FASTVIT_TORCH(aoti_torch__reinterpret_tensor, at(view->source).handle(), static_cast<int64_t>(view->sizes.size()),
                    view->sizes.data(), view->strides.data(), view->offset, &handle);
      results.emplace_back(handle);
    } else {
      const auto& call = std::get<Call>(step.what);
      stack = call.words;
      for (const auto& [place, values] : call.lists) stack[static_cast<size_t>(place)] = list_of(values);
      for (const Argument& each : call.tensors) {
        const auto value = reinterpret_cast<StableIValue>(at(each.index).share().release());
        stack[static_cast<size_t>(each.place)] =
            each.optional ? reinterpret_cast<StableIValue>(new StableIValue(value)) : value;
      }
      if (call.kernel != nullptr) {
        call.kernel(stack.data(), static_cast<uint64_t>(call.arguments), static_cast<uint64_t>(call.results));
      } else {
        FASTVIT_TORCH(torch_call_dispatcher, call.name.c_str(), call.overload.c_str(), stack.data(), kTorchAbiVersion);
      }
      for (int64_t i = 0; i < call.results; ++i) {
        results.emplace_back(reinterpret_cast<AtenTensorHandle>(stack[static_cast<size_t>(i)]));
      }
    }
    for (int64_t index : step.last_read) results[static_cast<size_t>(index - 1)] = Tensor(nullptr);
  }
  return std::move(results[static_cast<size_t>(result_ - 1)]);
}

}  // namespace fastvit
