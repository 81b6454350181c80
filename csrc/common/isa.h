// Which instruction set the CPU kernels use.
//
// Files named csrc/<operator>/cpu*.cpp are compiled once per instruction set, with -DFASTVIT_ISA=<name> as the
// namespace of everything in them. The linker would merge inline functions that those builds share into one body,
// possibly one that this CPU cannot run: so everything is in that namespace, in an anonymous one, or FASTVIT_INLINE.
#pragma once

#include <string>
#include <vector>

#include "common/element.h"

namespace fastvit {

enum class Isa { portable, avx2, avx512, avx512_bf16, neon };  // from the least to the most capable of an architecture

const char* name_of(Isa isa);
std::vector<Isa> compiled_isas();   // in this binary
std::vector<Isa> supported_isas();  // and supported by this CPU and its operating system

// The one in use: the best supported one, or the one that FASTVIT_CPU_CAPABILITY names (read once, in any case). Throws
// std::invalid_argument listing the supported names if this is none of them.
Isa cpu_isa();

// Changes it, for tests. Throws likewise.
void set_cpu_isa(const std::string& name);

}  // namespace fastvit

// The instruction sets compiled in besides "portable" (setup.py defines the macros for those the compiler supports).
#ifdef FASTVIT_HAS_AVX2
#define FASTVIT_IF_AVX2(...) __VA_ARGS__
#else
#define FASTVIT_IF_AVX2(...)
#endif
#ifdef FASTVIT_HAS_AVX512
#define FASTVIT_IF_AVX512(...) __VA_ARGS__
#else
#define FASTVIT_IF_AVX512(...)
#endif
#ifdef FASTVIT_HAS_AVX512_BF16
#define FASTVIT_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define FASTVIT_IF_AVX512_BF16(...)
#endif
#ifdef FASTVIT_HAS_NEON
#define FASTVIT_IF_NEON(...) __VA_ARGS__
#else
#define FASTVIT_IF_NEON(...)
#endif

// FASTVIT_DECLARE_PER_ISA(void f(const Params&);) inside namespace fastvit declares avx2::f, portable::f, ...
#define FASTVIT_DECLARE_PER_ISA(...)               \
  namespace portable {                             \
  __VA_ARGS__                                      \
  }                                                \
  FASTVIT_IF_AVX2(namespace avx2{__VA_ARGS__})     \
  FASTVIT_IF_AVX512(namespace avx512{__VA_ARGS__}) \
  FASTVIT_IF_AVX512_BF16(namespace avx512_bf16{__VA_ARGS__}) FASTVIT_IF_NEON(namespace neon{__VA_ARGS__})

// FASTVIT_PER_ISA(f, element): the function f of the instruction set in use, to be called, or passed on, for tensors of
// such elements. What avx512_bf16 adds is for bfloat16 alone: its other kernels are those of avx512.
#define FASTVIT_PER_ISA(function, element)                                                                         \
  ([](::fastvit::Element of) {                                                                                     \
    switch (::fastvit::cpu_isa()) {                                                                                \
      FASTVIT_IF_AVX512_BF16(case ::fastvit::Isa::avx512_bf16 : if (of == ::fastvit::Element::bfloat16) return &:: \
                                 fastvit::avx512_bf16::function;                                                   \
                             [[fallthrough]];)                                                                     \
      FASTVIT_IF_AVX512(case ::fastvit::Isa::avx512 : return &::fastvit::avx512::function;)                        \
      FASTVIT_IF_AVX2(case ::fastvit::Isa::avx2 : return &::fastvit::avx2::function;)                              \
      FASTVIT_IF_NEON(case ::fastvit::Isa::neon : return &::fastvit::neon::function;)                              \
      default: static_cast<void>(of); return &::fastvit::portable::function;                                       \
    }                                                                                                              \
  }(element))
