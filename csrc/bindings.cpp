// The Python module fastvit._C: what was built, what this CPU can run. The operators themselves reach Python through
// torch's dispatcher (torch_abi.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/torch_abi.h"
#include "program.h"
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
  module.def(
      "fingerprint",
      [](uintptr_t address, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
         int64_t element_bytes) {
        return fastvit::Sample(reinterpret_cast<const void*>(address), rows, columns, row_stride, column_stride,
                               element_bytes)
            .hash();
      },
      "A hash of 64 values spread over a matrix in memory, strides in elements.");
  module.def("operators", &operators, "(operator, dispatch key) of every kernel in this binary.");
  py::class_<fastvit::Snapshot>(module, "Snapshot", "What objects and some dictionaries of theirs were like.")
      .def(py::init<const py::iterable&, const py::iterable&>(), py::arg("objects"), py::arg("dictionaries"))
      .def("holds", &fastvit::Snapshot::holds, "Whether nothing was set, added, removed or replaced since.");
  using fastvit::Program;
  py::class_<Program, std::shared_ptr<Program>>(module, "Program", "Operators called one after the other.")
      .def(py::init(&Program::make))
      .def_property_readonly("id", &Program::id)
      .def("watch", &Program::watch)
      .def("add_view", &Program::add_view)
      .def("add_call",
           [](Program& program, const std::string& name, const std::string& overload, Program::Words words,
              Program::Lists lists, const std::vector<std::tuple<int64_t, int64_t, bool>>& tensors, int64_t results) {
             Program::Tensors arguments;
             for (const auto& [place, index, optional] : tensors) arguments.push_back({place, index, optional});
             program.add_call(name, overload, std::move(words), std::move(lists), std::move(arguments), results);
           })
      .def("finish", &Program::finish)
      .def("holds", &Program::holds, "Whether the tensors held are as they were.");
  module.def("_set_cpu_capability", &fastvit::set_cpu_isa, py::arg("name"),
             "Changes the instruction set in use (for tests); ValueError if this CPU cannot run it.");
}
