// FASTVIT_INLINE functions are inlined into every caller, so that none is left for the linker to merge between files
// that are compiled for different instruction sets. nvcc compiles them for host and device.
#pragma once

#ifdef __CUDACC__
#define FASTVIT_INLINE __host__ __device__ __forceinline__
#else
#define FASTVIT_INLINE inline __attribute__((always_inline))
#endif

// A loop that needs all registers is a function of its own, so that it has them to itself.
#define FASTVIT_NOINLINE __attribute__((noinline))
