// Vectors of float32 for the kernels that are compiled once per instruction set (csrc/<operator>/cpu*.cpp).
//
// Vec is the widest register of the instruction set this file is compiled for: 16 lanes with AVX-512, 8 with AVX2, 4
// elsewhere (a GNU vector type, which compilers map to SSE and the like). With NEON it is two registers: of 8 lanes,
// too, and as many as AVX2 has, so that what is laid out for the one suits the other. bfloat16 and float16 are storage
// types: they are widened on load and rounded to nearest even on store.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "common/bfloat16.h"
#include "common/element.h"
#include "common/float16.h"
#include "common/inline.h"
#include "common/integers.h"

#if defined(__AVX512F__) || defined(__AVX2__)
// GCC 12's header initialises "undefined" registers with themselves, and warns about it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(FASTVIT_NEON)  // set by setup.py: every aarch64 compiler has NEON, for the portable kernels, too
#include <arm_neon.h>
#endif

#ifndef FASTVIT_ISA
#error "vec.h is for files compiled per instruction set: define FASTVIT_ISA"
#endif

// The instruction set whose kernels this one uses for all but bfloat16 (see FASTVIT_PER_ISA).
#if defined(__AVX512BF16__)
#define FASTVIT_FLOAT_ISA avx512
#else
#define FASTVIT_FLOAT_ISA FASTVIT_ISA
#endif

namespace fastvit::FASTVIT_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// f.operator()<T>() for the type of a tensor's elements, of those that FASTVIT_PER_ISA has kernels of this instruction
// set called for; kHalf: float16 may be among them.
template <bool kHalf = false, class F>
FASTVIT_INLINE auto with_element([[maybe_unused]] Element element, const F& f) {
#if !defined(__AVX512BF16__)
  if constexpr (kHalf) {
    if (element == Element::float16) return f.template operator()<f16>();
  }
  if (element == Element::float32) return f.template operator()<float>();
#endif
  return f.template operator()<bf16>();
}

// The most lanes of any instruction set: buffers rounded up to it can be loaded and stored in whole vectors.
constexpr int64_t kMaxLanes = 16;

#if defined(__AVX512F__)

struct Vec {
  static constexpr int64_t lanes = 16;
  __m512 v;

  static FASTVIT_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static FASTVIT_INLINE Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  static FASTVIT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FASTVIT_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static FASTVIT_INLINE Vec widen(__m256i h) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  static FASTVIT_INLINE Vec load(const bf16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static FASTVIT_INLINE Vec load(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  static FASTVIT_INLINE Vec load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static FASTVIT_INLINE Vec load(const f16* p, int64_t n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
  }

  FASTVIT_INLINE __m256i narrow() const {
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh(v);
    __m256i bits;
    memcpy(&bits, &h, sizeof bits);
    return bits;
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
#endif
  }
  FASTVIT_INLINE __m256i halves() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  FASTVIT_INLINE void store(f16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves()); }
  FASTVIT_INLINE void store(f16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), halves()); }
  FASTVIT_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FASTVIT_INLINE void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  FASTVIT_INLINE void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  FASTVIT_INLINE void store(bf16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), narrow()); }
};

FASTVIT_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTVIT_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTVIT_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTVIT_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTVIT_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
FASTVIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
FASTVIT_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
FASTVIT_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }                  // b where either is NaN
FASTVIT_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }                  // b where either is NaN
FASTVIT_INLINE Vec round_even(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// mantissa * 2^n for a whole n
FASTVIT_INLINE Vec scale_by_power(Vec mantissa, Vec n) { return {_mm512_scalef_ps(mantissa.v, n.v)}; }
// mantissa * 2^n for n from -126 to 127, n = shifted - 1.5 * 2^23
FASTVIT_INLINE Vec scale_by_low_bits(Vec mantissa, Vec shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_mul_ps(mantissa.v, _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3f800000))))};
}
// value where a > 0 or a is NaN, otherwise 0
FASTVIT_INLINE Vec keep_positive(Vec a, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ), value.v)};
}
// yes where limit is -inf, otherwise no
FASTVIT_INLINE Vec if_hidden(Vec limit, Vec yes, Vec no) {
  const __mmask16 hidden = _mm512_cmp_ps_mask(limit.v, _mm512_set1_ps(-__builtin_inff()), _CMP_EQ_OQ);
  return {_mm512_mask_mov_ps(no.v, hidden, yes.v)};
}
FASTVIT_INLINE bool any_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
FASTVIT_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
FASTVIT_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int64_t lanes = 8;
  __m256 v;

  static FASTVIT_INLINE __m256i first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  }
  static FASTVIT_INLINE Vec fill(float x) { return {_mm256_set1_ps(x)}; }
  static FASTVIT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static FASTVIT_INLINE Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  static FASTVIT_INLINE Vec load(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static FASTVIT_INLINE Vec load(const bf16* p, int64_t n) {
    bf16 whole[lanes] = {};
    memcpy(whole, p, static_cast<size_t>(n) * sizeof(bf16));
    return load(whole);
  }
  static FASTVIT_INLINE Vec load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static FASTVIT_INLINE Vec load(const f16* p, int64_t n) {
    f16 whole[lanes] = {};
    memcpy(whole, p, static_cast<size_t>(n) * sizeof(f16));
    return load(whole);
  }

  FASTVIT_INLINE __m128i narrow() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
    const __m256i high = _mm256_srli_epi32(result, 16);
    // packus works within each half; the permutation joins the results of both halves.
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08));
  }
  FASTVIT_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FASTVIT_INLINE void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  FASTVIT_INLINE __m128i halves() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  FASTVIT_INLINE void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  FASTVIT_INLINE void store(bf16* p, int64_t n) const {
    const __m128i h = narrow();
    memcpy(p, &h, static_cast<size_t>(n) * sizeof(bf16));
  }
  FASTVIT_INLINE void store(f16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves()); }
  FASTVIT_INLINE void store(f16* p, int64_t n) const {
    const __m128i h = halves();
    memcpy(p, &h, static_cast<size_t>(n) * sizeof(f16));
  }
};

FASTVIT_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTVIT_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTVIT_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTVIT_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTVIT_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
FASTVIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTVIT_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
FASTVIT_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTVIT_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTVIT_INLINE Vec round_even(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n as two factors, since n may reach -150 or 128, where 2^n is not a normal number.
FASTVIT_INLINE Vec scale_by_power(Vec mantissa, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(mantissa.v, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high))};
}
FASTVIT_INLINE Vec scale_by_low_bits(Vec mantissa, Vec shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_mul_ps(mantissa.v, _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(0x3f800000))))};
}
FASTVIT_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
// value where a < limit, otherwise 0
FASTVIT_INLINE Vec keep_below(Vec a, float limit, Vec value) {
  return {_mm256_and_ps(value.v, _mm256_cmp_ps(a.v, _mm256_set1_ps(limit), _CMP_LT_OQ))};
}
FASTVIT_INLINE Vec keep_positive(Vec a, Vec value) {
  return {_mm256_and_ps(value.v, _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NLE_UQ))};
}
// yes where a's sign bit is set, otherwise no
FASTVIT_INLINE Vec if_negative(Vec a, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, a.v)}; }
FASTVIT_INLINE Vec if_hidden(Vec limit, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(limit.v, _mm256_set1_ps(-__builtin_inff()), _CMP_EQ_OQ))};
}
FASTVIT_INLINE bool any_nan(Vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)) != 0; }
FASTVIT_INLINE float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
FASTVIT_INLINE float largest(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

#elif defined(FASTVIT_NEON)

struct Vec {
  static constexpr int64_t lanes = 8;
  float32x4_t low, high;

  // Bit by bit of n, at most 8: memcpy would be a call.
  template <class T>
  static FASTVIT_INLINE void copy_first(const T* from, int64_t n, T* to) {
    if (n & 8) memcpy(to, from, 8 * sizeof(T));
    if (n & 4) memcpy(to, from, 4 * sizeof(T)), from += 4, to += 4;
    if (n & 2) memcpy(to, from, 2 * sizeof(T)), from += 2, to += 2;
    if (n & 1) memcpy(to, from, sizeof(T));
  }
  static FASTVIT_INLINE Vec fill(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static FASTVIT_INLINE Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static FASTVIT_INLINE Vec load(const bf16* p) {
    const uint16x8_t h = vld1q_u16(&p->bits);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(h, 16))};
  }
  static FASTVIT_INLINE Vec widen(float16x8_t h) { return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)}; }
  static FASTVIT_INLINE Vec load(const f16* p) { return widen(vreinterpretq_f16_u16(vld1q_u16(&p->bits))); }
  template <class T>
  static FASTVIT_INLINE Vec load(const T* p, int64_t n) {
    T whole[lanes] = {};
    copy_first(p, n, whole);
    return load(whole);
  }

  static FASTVIT_INLINE uint16x8_t rounded(float32x4_t v) {  // to bfloat16, in the odd elements
    const uint32x4_t bits = vreinterpretq_u32_f32(v), even = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t result = vaddq_u32(bits, vaddq_u32(even, vdupq_n_u32(0x7fff)));
    return vreinterpretq_u16_u32(vbslq_u32(vceqq_f32(v, v), result, vdupq_n_u32(0x7fc00000)));
  }
  FASTVIT_INLINE float16x8_t halves() const { return vcvt_high_f16_f32(vcvt_f16_f32(low), high); }
  FASTVIT_INLINE void store(float* p) const { vst1q_f32(p, low), vst1q_f32(p + 4, high); }
  FASTVIT_INLINE void store(bf16* p) const { vst1q_u16(&p->bits, vuzp2q_u16(rounded(low), rounded(high))); }
  FASTVIT_INLINE void store(f16* p) const { vst1q_u16(&p->bits, vreinterpretq_u16_f16(halves())); }
  template <class T>
  FASTVIT_INLINE void store(T* p, int64_t n) const {
    T whole[lanes];
    store(whole);
    copy_first(whole, n, p);
  }
};

FASTVIT_INLINE float32x4_t masked(float32x4_t v, uint32x4_t mask) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), mask));
}

FASTVIT_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
FASTVIT_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
FASTVIT_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
FASTVIT_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
FASTVIT_INLINE Vec sqrt(Vec a) { return {vsqrtq_f32(a.low), vsqrtq_f32(a.high)}; }
FASTVIT_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
FASTVIT_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  return {vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high)};
}
// Not FMIN and FMAX, which give NaN where either is.
FASTVIT_INLINE Vec min(Vec a, Vec b) {
  return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
}
FASTVIT_INLINE Vec max(Vec a, Vec b) {
  return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
}
FASTVIT_INLINE Vec round_even(Vec a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
FASTVIT_INLINE float32x4_t power_of_two(int32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
// By two factors, as with AVX2.
FASTVIT_INLINE float32x4_t scale_by_power(float32x4_t mantissa, float32x4_t n) {
  const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
  return vmulq_f32(vmulq_f32(mantissa, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
}
FASTVIT_INLINE Vec scale_by_power(Vec mantissa, Vec n) {
  return {scale_by_power(mantissa.low, n.low), scale_by_power(mantissa.high, n.high)};
}
FASTVIT_INLINE float32x4_t scale_by_low_bits(float32x4_t mantissa, float32x4_t shifted) {
  return vmulq_f32(mantissa, power_of_two(vreinterpretq_s32_f32(shifted)));
}
FASTVIT_INLINE Vec scale_by_low_bits(Vec mantissa, Vec shifted) {
  return {scale_by_low_bits(mantissa.low, shifted.low), scale_by_low_bits(mantissa.high, shifted.high)};
}
FASTVIT_INLINE Vec abs(Vec a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
FASTVIT_INLINE Vec keep_below(Vec a, float limit, Vec value) {
  const float32x4_t most = vdupq_n_f32(limit);
  return {masked(value.low, vcltq_f32(a.low, most)), masked(value.high, vcltq_f32(a.high, most))};
}
FASTVIT_INLINE Vec keep_positive(Vec a, Vec value) {
  return {masked(value.low, vmvnq_u32(vclezq_f32(a.low))), masked(value.high, vmvnq_u32(vclezq_f32(a.high)))};
}
FASTVIT_INLINE Vec if_negative(Vec a, Vec yes, Vec no) {
  return {vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(a.low)), yes.low, no.low),
          vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(a.high)), yes.high, no.high)};
}
FASTVIT_INLINE Vec if_hidden(Vec limit, Vec yes, Vec no) {
  const float32x4_t hidden = vdupq_n_f32(-__builtin_inff());
  return {vbslq_f32(vceqq_f32(limit.low, hidden), yes.low, no.low),
          vbslq_f32(vceqq_f32(limit.high, hidden), yes.high, no.high)};
}
FASTVIT_INLINE bool any_nan(Vec a) {
  return vminvq_u32(vandq_u32(vceqq_f32(a.low, a.low), vceqq_f32(a.high, a.high))) == 0;
}
FASTVIT_INLINE float sum(Vec a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }
FASTVIT_INLINE float largest(Vec a) { return vmaxvq_f32(vmaxq_f32(a.low, a.high)); }

#else  // portable

struct Vec {
  static constexpr int64_t lanes = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  Floats v;

  static FASTVIT_INLINE Ints bits_of(Floats x) { return reinterpret_cast<Ints>(x); }
  static FASTVIT_INLINE Floats floats_of(Ints x) { return reinterpret_cast<Floats>(x); }
  static FASTVIT_INLINE Floats select(Ints condition, Floats yes, Floats no) {
    return floats_of((bits_of(yes) & condition) | (bits_of(no) & ~condition));
  }
  static FASTVIT_INLINE Vec fill(float x) { return {Floats{x, x, x, x}}; }
  static FASTVIT_INLINE Vec load(const float* p, int64_t n) {
    Vec r = fill(0.0f);
    memcpy(&r.v, p, static_cast<size_t>(n) * sizeof(float));
    return r;
  }
  static FASTVIT_INLINE Vec load(const float* p) { return load(p, lanes); }
  static FASTVIT_INLINE Vec load(const bf16* p, int64_t n) {
    Ints r{};
    for (int64_t i = 0; i < n; ++i) r[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i].bits) << 16);
    return {floats_of(r)};
  }
  static FASTVIT_INLINE Vec load(const bf16* p) { return load(p, lanes); }
  static FASTVIT_INLINE Vec load(const f16* p, int64_t n) {
    Vec r = fill(0.0f);
    for (int64_t i = 0; i < n; ++i) r.v[i] = float_of_float16(p[i].bits);
    return r;
  }
  static FASTVIT_INLINE Vec load(const f16* p) { return load(p, lanes); }
  FASTVIT_INLINE void store(float* p, int64_t n) const { memcpy(p, &v, static_cast<size_t>(n) * sizeof(float)); }
  FASTVIT_INLINE void store(float* p) const { store(p, lanes); }
  FASTVIT_INLINE void store(bf16* p, int64_t n) const {
    typedef uint32_t Words __attribute__((vector_size(16)));
    const Words bits = reinterpret_cast<Words>(v);
    const Words rounded = bits + ((bits >> 16) & 1u) + 0x7fffu;
    const Words is_nan = reinterpret_cast<Words>(v != v);
    const Words result = ((rounded & ~is_nan) | (is_nan & 0x7fc00000u)) >> 16;
    for (int64_t i = 0; i < n; ++i) p[i].bits = static_cast<uint16_t>(result[i]);
  }
  FASTVIT_INLINE void store(bf16* p) const { store(p, lanes); }
  FASTVIT_INLINE void store(f16* p, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) p[i].bits = float16_of_float(v[i]);
  }
  FASTVIT_INLINE void store(f16* p) const { store(p, lanes); }
};

FASTVIT_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
FASTVIT_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
FASTVIT_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
FASTVIT_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
FASTVIT_INLINE Vec sqrt(Vec a) {
  for (int64_t i = 0; i < Vec::lanes; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
FASTVIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
FASTVIT_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
FASTVIT_INLINE Vec min(Vec a, Vec b) { return {Vec::select(a.v < b.v, a.v, b.v)}; }
FASTVIT_INLINE Vec max(Vec a, Vec b) { return {Vec::select(a.v > b.v, a.v, b.v)}; }
// Adding and subtracting 1.5 * 2^23 rounds to an integer, for |a| < 2^22.
FASTVIT_INLINE Vec round_even(Vec a) {
  const Vec magic = Vec::fill(12582912.0f);
  return (a + magic) - magic;
}
FASTVIT_INLINE Vec scale_by_power(Vec mantissa, Vec n) {
  const Vec::Ints whole = __builtin_convertvector(n.v, Vec::Ints);
  const Vec::Ints half = whole >> 1;
  const Vec::Floats low = Vec::floats_of((half + 127) << 23);
  const Vec::Floats high = Vec::floats_of((whole - half + 127) << 23);
  return {mantissa.v * low * high};
}
FASTVIT_INLINE Vec abs(Vec a) { return {Vec::floats_of(Vec::bits_of(a.v) & INT32_MAX)}; }
FASTVIT_INLINE Vec keep_below(Vec a, float limit, Vec value) {
  return {Vec::floats_of(Vec::bits_of(value.v) & (a.v < Vec::fill(limit).v))};
}
FASTVIT_INLINE Vec keep_positive(Vec a, Vec value) {
  return {Vec::floats_of(Vec::bits_of(value.v) & ~(a.v <= Vec::fill(0.0f).v))};
}
FASTVIT_INLINE Vec if_negative(Vec a, Vec yes, Vec no) { return {Vec::select(Vec::bits_of(a.v) >> 31, yes.v, no.v)}; }
FASTVIT_INLINE Vec if_hidden(Vec limit, Vec yes, Vec no) {
  return {Vec::select(limit.v == Vec::fill(-__builtin_inff()).v, yes.v, no.v)};
}
FASTVIT_INLINE bool any_nan(Vec a) {
  const Vec::Ints is_nan = a.v != a.v;
  return (is_nan[0] | is_nan[1] | is_nan[2] | is_nan[3]) != 0;
}
FASTVIT_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FASTVIT_INLINE float largest(Vec a) {
  const float even = a.v[0] > a.v[2] ? a.v[0] : a.v[2], odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return even > odd ? even : odd;
}

#endif

constexpr int64_t kLanes = Vec::lanes;

FASTVIT_INLINE bool all_finite(Vec a) { return !any_nan(a * Vec::fill(0.0f)); }
FASTVIT_INLINE Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
FASTVIT_INLINE Vec& operator*=(Vec& a, Vec b) { return a = a * b; }

// e^x to about one unit in the last place; 0 below -104 (subnormal results are kept), infinity above 88.7, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r^2 p(r), p a minimax fit of degree 4 (relative error 3e-9).
FASTVIT_INLINE Vec exp(Vec x) {
  x = min(Vec::fill(89.0f), max(Vec::fill(-104.0f), x));
  const Vec n = round_even(x * Vec::fill(1.44269504f));
  // ln 2 in two parts, the first with few enough digits that n times it is exact.
  Vec r = fnma(n, Vec::fill(0.693359375f), x);
  r = fnma(n, Vec::fill(-2.12194440e-4f), r);
  Vec p = Vec::fill(0.0013814594683f);
  p = fma(p, r, Vec::fill(0.0083687173520f));
  p = fma(p, r, Vec::fill(0.0416683881498f));
  p = fma(p, r, Vec::fill(0.1666652062663f));
  p = fma(p, r, Vec::fill(0.4999999344729f));
  return scale_by_power(fma(r * r, p, r) + Vec::fill(1.0f), n);
}

// e^x for x <= 0 or NaN, as softmax needs it, by two thirds of the instructions of exp: 0 below -87.3 instead of
// subnormal results, and 1.4e-8 |x| of the result less accurate.
FASTVIT_INLINE Vec exp_nonpositive(Vec x) {
#if defined(__FMA__) || defined(FASTVIT_NEON)
  // x = (n + r) ln 2 with |r| <= 1/2, n in the low bits of a sum with 1.5 * 2^23; 2^r = 1 + r p(r), p a minimax fit of
  // degree 5 (relative error 2e-9).
  const Vec log2e = Vec::fill(1.44269504f), magic = Vec::fill(12582912.0f);
  const Vec shifted = fma(x, log2e, magic), r = fma(x, log2e, magic - shifted);
  Vec p = Vec::fill(1.5353362050e-04f);
  p = fma(p, r, Vec::fill(1.3398874619e-03f));
  p = fma(p, r, Vec::fill(9.6184373588e-03f));
  p = fma(p, r, Vec::fill(5.5503324706e-02f));
  p = fma(p, r, Vec::fill(2.4022647914e-01f));
  p = fma(p, r, Vec::fill(6.9314720286e-01f));
  p = fma(p, r, Vec::fill(1.0f));
  return keep_positive(x + Vec::fill(87.3f), scale_by_low_bits(p, shifted));
#else
  return exp(x);
#endif
}

FASTVIT_INLINE Vec sigmoid(Vec x) {
  const Vec one = Vec::fill(1.0f);
  return one / (one + exp(Vec::fill(0.0f) - x));
}

FASTVIT_INLINE float widen(float x) { return x; }
FASTVIT_INLINE float widen(bf16 x) { return float_of_bfloat16(x.bits); }
FASTVIT_INLINE float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(FASTVIT_NEON)
  return static_cast<float>(__builtin_bit_cast(__fp16, x.bits));
#else
  return float_of_float16(x.bits);
#endif
}

// Rounded to float16 where that is T, and otherwise as it is.
template <class T>
FASTVIT_INLINE Vec round_to(Vec x) {
  if constexpr (!std::is_same_v<T, f16>) return x;
#if defined(__AVX512F__)
  return {_mm512_cvtph_ps(x.halves())};
#elif defined(__AVX2__)
  return {_mm256_cvtph_ps(x.halves())};
#elif defined(FASTVIT_NEON)
  return Vec::widen(x.halves());
#else
  for (int64_t i = 0; i < Vec::lanes; ++i) x.v[i] = float_of_float16(float16_of_float(x.v[i]));
  return x;
#endif
}

// The first n lanes.
template <class T>
FASTVIT_INLINE Vec load(const T* p, int64_t n) {
  return n == kLanes ? Vec::load(p) : Vec::load(p, n);
}
template <class T>
FASTVIT_INLINE void store(Vec v, T* p, int64_t n) {
  n == kLanes ? v.store(p) : v.store(p, n);
}

// Prefetches the cache lines of `count` elements. A prefetch beyond a tensor is harmless.
template <int for_writing = 0, class T>
FASTVIT_INLINE void prefetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i, for_writing);
}

// Two vectors to consecutive memory.
FASTVIT_INLINE void store_two(Vec first, Vec second, float* p) {
  first.store(p);
  second.store(p + Vec::lanes);
}
FASTVIT_INLINE void store_two(Vec first, Vec second, f16* p) {
  first.store(p);
  second.store(p + Vec::lanes);
}
FASTVIT_INLINE void store_two(Vec first, Vec second, bf16* p) {
#if defined(__AVX512BF16__)
  const __m512bh halves = _mm512_cvtne2ps_pbh(second.v, first.v);
  memcpy(p, &halves, sizeof halves);
#else
  first.store(p);
  second.store(p + Vec::lanes);
#endif
}

// Non-temporal stores of whole cache lines, which need not be read before they are written. Ordinary stores where a
// vector is less than a line.
#if defined(__AVX512F__)
constexpr bool kStreams = true;
FASTVIT_INLINE void stream(Vec v, float* p) { _mm512_stream_ps(p, v.v); }  // 64-byte aligned
FASTVIT_INLINE void end_streams() { _mm_sfence(); }  // before another thread reads what was stored
#else
constexpr bool kStreams = false;
FASTVIT_INLINE void stream(Vec v, float* p) { v.store(p); }
FASTVIT_INLINE void end_streams() {}
#endif
FASTVIT_INLINE void stream(Vec v, bf16* p) { v.store(p); }
FASTVIT_INLINE void stream(Vec v, f16* p) { v.store(p); }

}  // namespace fastvit::FASTVIT_ISA
