// Transposition of 32-bit words, compiled once per instruction set.
#pragma once

#include <stdint.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "common/vec.h"

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
#elif defined(FASTVIT_NEON)
  for (; d + 4 <= length; d += 4) {
    const float32x4_t a = vld1q_f32(rows[0] + d), b = vld1q_f32(rows[1] + d);
    const float32x4_t c = vld1q_f32(rows[2] + d), e = vld1q_f32(rows[3] + d);
    const auto pairs = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
    const auto floats = [](float64x2_t x) { return vreinterpretq_f32_f64(x); };
    const float64x2_t even = pairs(vtrn1q_f32(a, b)), even2 = pairs(vtrn1q_f32(c, e));
    const float64x2_t odd = pairs(vtrn2q_f32(a, b)), odd2 = pairs(vtrn2q_f32(c, e));
    vst1q_f32(out + d * stride, floats(vtrn1q_f64(even, even2)));
    vst1q_f32(out + (d + 1) * stride, floats(vtrn1q_f64(odd, odd2)));
    vst1q_f32(out + (d + 2) * stride, floats(vtrn2q_f64(even, even2)));
    vst1q_f32(out + (d + 3) * stride, floats(vtrn2q_f64(odd, odd2)));
  }
#endif
  for (; d < length; ++d) {
    for (int i = 0; i < 4; ++i) out[d * stride + i] = rows[i][d];
  }
}

// out[i * stride + r] = rows[r][i], a square as wide as a vector.
#if defined(__AVX512F__)
inline void transpose_square(const float* const (&rows)[16], float* out, int64_t stride) {
  __m512 a[16], b[16];
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(rows[r]);
  // Interleave words of neighbouring rows, then pairs of words: quarter q of a[4 * n + i] then holds column 4 * q + i
  // of rows 4 * n to 4 * n + 3.
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
  }
  for (int r = 0; r < 16; r += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(b[r + half]), high = _mm512_castps_pd(b[r + half + 2]);
      a[r + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[r + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // Then transpose the quarters.
  for (int i = 0; i < 4; ++i) {
    const __m512 even = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_ps(out + i * stride, _mm512_shuffle_f32x4(even, even2, 0x88));
    _mm512_storeu_ps(out + (4 + i) * stride, _mm512_shuffle_f32x4(odd, odd2, 0x88));
    _mm512_storeu_ps(out + (8 + i) * stride, _mm512_shuffle_f32x4(even, even2, 0xdd));
    _mm512_storeu_ps(out + (12 + i) * stride, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
  }
}
#else
inline void transpose_square(const float* const (&rows)[Vec::lanes], float* out, int64_t stride) {
  for (int64_t r = 0; r < Vec::lanes; r += 4) {
    const float* const four[4] = {rows[r], rows[r + 1], rows[r + 2], rows[r + 3]};
    transpose4(four, Vec::lanes, out + r, stride);
  }
}
#endif

}  // namespace
}  // namespace fastvit::FASTVIT_ISA
