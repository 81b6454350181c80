// Transposition of words of 32 bits, for the kernels that are compiled once per instruction set.
#pragma once

#include <stdint.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace fastvit::FASTVIT_ISA {
namespace {

// out[d * stride + i] = rows[i][d] for four rows.
inline void transpose4(const float* const (&rows)[4], int64_t length, float* out, int64_t stride) {
  int64_t d = 0;
#if defined(__SSE__)
  for (; d + 4 <= length; d += 4) {
    __m128 a = _mm_loadu_ps(rows[0] + d), b = _mm_loadu_ps(rows[1] + d);
    __m128 c = _mm_loadu_ps(rows[2] + d), e = _mm_loadu_ps(rows[3] + d);
    _MM_TRANSPOSE4_PS(a, b, c, e);
    _mm_storeu_ps(out + d * stride, a);
    _mm_storeu_ps(out + (d + 1) * stride, b);
    _mm_storeu_ps(out + (d + 2) * stride, c);
    _mm_storeu_ps(out + (d + 3) * stride, e);
  }
#endif
  for (; d < length; ++d) {
    for (int i = 0; i < 4; ++i) out[d * stride + i] = rows[i][d];
  }
}

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
