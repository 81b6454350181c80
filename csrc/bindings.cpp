// The Python module fastvit._C: what was built, what this CPU can run. The operators themselves reach Python through
// torch's dispatcher (torch_abi.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/torch_abi.h"
#include "snapshot.h"

namespace py = pybind11;

namespace {

std::vector<std::string> names_of(const std::vector<fastvit::Isa>& isas) {
  std::vector<std::string> names;
  for (fastvit::Isa isa : isas) names.emplace_back(name_of(isa));
  return names;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

// The macros FASTVIT_VERSION, FASTVIT_CUDA_ARCHS ("sm_80 sm_90 compute_90", "" without CUDA) and FASTVIT_NVCC_VERSION
// come from setup.py.
py::dict build_info() {
  py::dict info;
  info["version"] = FASTVIT_VERSION;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["isa_levels"] = names_of(fastvit::compiled_isas());
  info["cuda_archs"] = split(FASTVIT_CUDA_ARCHS);
  info["nvcc"] = *FASTVIT_NVCC_VERSION != '\0' ? py::object(py::str(FASTVIT_NVCC_VERSION)) : py::none();
  return info;
}

const char* cpu_vendor() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}

py::dict cpu_info() {
  py::dict info;
  info["vendor"] = cpu_vendor();
  info["supported"] = names_of(fastvit::supported_isas());
  info["in_use"] = std::string(name_of(fastvit::cpu_isa()));
  return info;
}

// A hash of 64 values spread over a matrix in memory; strides in elements.
uint64_t fingerprint(uintptr_t address, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                     int64_t element_bytes) {
  constexpr uint64_t kSamples = 64, kPrime = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio, which spreads the samples
  const auto* data = reinterpret_cast<const char*>(address);
  const auto count = static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns);
  uint64_t hash = count;
  for (uint64_t i = 0; i < kSamples && count > 0 && data != nullptr; ++i) {
    const uint64_t at = i == 0 ? count - 1 : static_cast<uint64_t>(static_cast<__uint128_t>(i * kPrime) * count >> 64);
    const auto row = static_cast<int64_t>(at / static_cast<uint64_t>(columns));
    const auto column = static_cast<int64_t>(at % static_cast<uint64_t>(columns));
    uint64_t value = 0;
    std::memcpy(&value, data + (row * row_stride + column * column_stride) * element_bytes,
                static_cast<size_t>(element_bytes < 8 ? element_bytes : 8));
    hash = (hash ^ value) * kPrime;
    hash ^= hash >> 29;
  }
  return hash;
}

// (operator, dispatch key) of every kernel in this binary.
std::vector<std::pair<std::string, std::string>> operators() {
  std::vector<std::pair<std::string, std::string>> all;
  for (const auto* entry = fastvit::registrations(); entry != nullptr; entry = entry->next) {
    all.emplace_back(entry->op, entry->key);
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  fastvit::cpu_isa();  // a wrong FASTVIT_CPU_CAPABILITY is an error here, not in the middle of a model
  fastvit::register_operators();
  module.doc() = "Native part of fastvit: build and CPU information; operators are registered with torch.";
  module.def("build_info", &build_info, "How this binary was built.");
  module.def("cpu_info", &cpu_info, "Who made this CPU, the instruction sets it can run, and the one in use.");
  module.def("fingerprint", &fingerprint, "A hash of 64 values spread over a matrix in memory, strides in elements.");
  module.def("operators", &operators, "(operator, dispatch key) of every kernel in this binary.");
  py::class_<fastvit::Snapshot>(module, "Snapshot", "What objects and some dictionaries of theirs were like.")
      .def(py::init<const py::iterable&, const py::iterable&>(), py::arg("objects"), py::arg("dictionaries"))
      .def("holds", &fastvit::Snapshot::holds, "Whether nothing was set, added, removed or replaced since.");
  module.def("_set_cpu_capability", &fastvit::set_cpu_isa, py::arg("name"),
             "Changes the instruction set in use (for tests); ValueError if this CPU cannot run it.");
}
