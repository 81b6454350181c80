#include "common/isa.h"

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <stdexcept>

namespace fastvit {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon};

bool is_compiled(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
      FASTVIT_IF_AVX2(case Isa::avx2 : return true;)
      FASTVIT_IF_AVX512(case Isa::avx512 : return true;)
      FASTVIT_IF_AVX512_BF16(case Isa::avx512_bf16 : return true;)
      FASTVIT_IF_NEON(case Isa::neon : return true;)
    default: return false;
  }
}

// The features that the compiler flags in setup.py imply. __builtin_cpu_supports also checks that the operating system
// saves the wide registers.
bool runs_here([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    default: return false;
  }
#else
  return true;  // NEON, where it is compiled, is part of the architecture
#endif
}

Isa find_isa(const std::string& name, const char* asked_by) {
  std::string expected, lower = name;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  for (Isa isa : supported_isas()) {
    if (lower == name_of(isa)) return isa;
    expected += (expected.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  throw std::invalid_argument(std::string(asked_by) + ": expected one of " + expected + " (on this CPU), got '" + name +
                              "'");
}

Isa initial_isa() {
  const char* asked = std::getenv("FASTVIT_CPU_CAPABILITY");
  if (asked != nullptr && *asked != '\0') return find_isa(asked, "FASTVIT_CPU_CAPABILITY");
  return supported_isas().back();
}

std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa(initial_isa());
  return isa;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::neon: return "neon";
  }
  return "unknown";
}

std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas;
  std::copy_if(std::begin(kAll), std::end(kAll), std::back_inserter(isas), is_compiled);
  return isas;
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas = compiled_isas();
  std::erase_if(isas, [](Isa isa) { return !runs_here(isa); });
  return isas;
}

Isa cpu_isa() { return current_isa().load(std::memory_order_relaxed); }

void set_cpu_isa(const std::string& name) { current_isa() = find_isa(name, "name"); }

}  // namespace fastvit
