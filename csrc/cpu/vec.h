// Vectors of float32 for the kernels that are compiled once per instruction set (csrc/cpu/*_kernels.cpp).
//
// Vec is the widest register of the instruction set this file is compiled for: 16 lanes with AVX-512, 8 with AVX2, 4
// elsewhere (a GNU vector type, which compilers turn into SSE, NEON and the like). bfloat16 is a storage type: it is
// widened on load and rounded to nearest even on store. Everything lives in the namespace of the instruction set, so
// that the linker never merges two builds of one function.
#pragma once

#include <stdint.h>
#include <string.h>

#include "inline.h"

#if defined(__AVX512F__) || defined(__AVX2__)
// GCC 12's own header initialises its "undefined" registers with themselves, and warns of that.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#ifndef FASTVIT_ISA
#error "vec.h is for files compiled per instruction set: define FASTVIT_ISA"
#endif

namespace fastvit::FASTVIT_ISA {

struct bf16 {
  uint16_t bits;
};

// The widest channel count a load or store below touches; buffers rounded up to it may be read and written whole
// whatever the instruction set.
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
// value where a > 0 or a is NaN, otherwise 0
FASTVIT_INLINE Vec keep_positive(Vec a, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ), value.v)};
}
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

  FASTVIT_INLINE __m128i narrow() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
    const __m256i high = _mm256_srli_epi32(result, 16);
    // packus works within each half; the permutation puts the two halves' results side by side.
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08));
  }
  FASTVIT_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FASTVIT_INLINE void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  FASTVIT_INLINE void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  FASTVIT_INLINE void store(bf16* p, int64_t n) const {
    const __m128i h = narrow();
    memcpy(p, &h, static_cast<size_t>(n) * sizeof(bf16));
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
// In two factors, since n may reach -150 or 128 and 2^n then is no normal number.
FASTVIT_INLINE Vec scale_by_power(Vec mantissa, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(mantissa.v, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high))};
}
FASTVIT_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
// value where a < limit, otherwise 0
FASTVIT_INLINE Vec keep_below(Vec a, float limit, Vec value) {
  return {_mm256_and_ps(value.v, _mm256_cmp_ps(a.v, _mm256_set1_ps(limit), _CMP_LT_OQ))};
}
FASTVIT_INLINE Vec keep_positive(Vec a, Vec value) {
  return {_mm256_and_ps(value.v, _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NLE_UQ))};
}
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
// Adding and taking away 1.5 * 2^23 leaves the whole number, for |a| < 2^22.
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
FASTVIT_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FASTVIT_INLINE float largest(Vec a) {
  const float even = a.v[0] > a.v[2] ? a.v[0] : a.v[2], odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return even > odd ? even : odd;
}

#endif

FASTVIT_INLINE Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
FASTVIT_INLINE Vec& operator*=(Vec& a, Vec b) { return a = a * b; }

// e^x to about one unit in the last place; 0 below -104 (subnormal results are kept), infinity above 88.7, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r^2 p(r), p a least-maximum fit of degree 4 (relative error 3e-9).
FASTVIT_INLINE Vec exp(Vec x) {
  x = min(Vec::fill(89.0f), max(Vec::fill(-104.0f), x));
  const Vec n = round_even(x * Vec::fill(1.44269504f));
  // ln 2 in two parts, the first short enough for n times it to be exact.
  Vec r = fnma(n, Vec::fill(0.693359375f), x);
  r = fnma(n, Vec::fill(-2.12194440e-4f), r);
  Vec p = Vec::fill(0.0013814594683f);
  p = fma(p, r, Vec::fill(0.0083687173520f));
  p = fma(p, r, Vec::fill(0.0416683881498f));
  p = fma(p, r, Vec::fill(0.1666652062663f));
  p = fma(p, r, Vec::fill(0.4999999344729f));
  return scale_by_power(fma(r * r, p, r) + Vec::fill(1.0f), n);
}

FASTVIT_INLINE Vec sigmoid(Vec x) {
  const Vec one = Vec::fill(1.0f);
  return one / (one + exp(Vec::fill(0.0f) - x));
}

#if defined(__AVX512F__)
// Q(t), the weight of the normal distribution's upper tail, for t from 0 to 6 in steps of 0.4: around t = 0.4 n the
// polynomial in r = t / 0.4 - n whose coefficient of r^i is [i][n]; least-maximum fits of the relative error, 2e-7 up
// to t = 3 and 6e-5 at the end. The last entry makes it zero from 5.8 on, where Q < 4e-9.
alignas(64) constexpr float kNormalTail[6][16] = {
    {5.000000000e-01f, 3.445782661e-01f, 2.118554115e-01f, 1.150696725e-01f, 5.479928851e-02f, 2.275012992e-02f,
     8.197534829e-03f, 2.555130282e-03f, 6.871382357e-04f, 1.591088221e-04f, 3.167135583e-05f, 5.412583050e-06f,
     7.933383586e-07f, 9.964634273e-08f, 1.071792521e-08f, 0.0f},
    {-1.595769078e-01f, -1.473080367e-01f, -1.158766076e-01f, -7.767441869e-02f, -4.436834529e-02f, -2.159639820e-02f,
     -8.957818151e-03f, -3.166180570e-03f, -9.536327561e-04f, -2.447585575e-04f, -5.353091910e-05f, -9.976540241e-06f,
     -1.584387860e-06f, -2.144108038e-07f, -2.472475913e-08f, 0.0f},
    {-6.837991151e-08f, 1.178425644e-02f, 1.853984967e-02f, 1.864173822e-02f, 1.419800334e-02f, 8.638739586e-03f,
     4.299846012e-03f, 1.773069846e-03f, 6.103030755e-04f, 1.762071042e-04f, 4.281541260e-05f, 8.776110008e-06f,
     1.520149908e-06f, 2.228067046e-07f, 2.766144647e-08f, 0.0f},
    {4.255960230e-03f, 3.299439093e-03f, 1.112216618e-03f, -9.113713750e-04f, -1.845545601e-03f, -1.727522584e-03f,
     -1.136957319e-03f, -5.775189493e-04f, -2.350184368e-04f, -7.809782255e-05f, -2.143125312e-05f, -4.891728622e-06f,
     -9.333274420e-07f, -1.493862811e-07f, -2.011176470e-08f, 0.0f},
    {-2.019397016e-06f, -4.420684709e-04f, -5.789884017e-04f, -3.864256432e-04f, -8.478894597e-05f, 1.131501704e-04f,
     1.571711909e-04f, 1.143278205e-04f, 5.918737224e-05f, 2.364206739e-05f, 7.543451375e-06f, 1.958515895e-06f,
     4.184423403e-07f, 7.411566827e-08f, 1.093948487e-08f, 0.0f},
    {-9.940504970e-05f, -6.381849380e-05f, 1.108401284e-05f, 5.871327812e-05f, 5.421385868e-05f, 2.248087912e-05f,
     -3.254735702e-06f, -1.167697792e-05f, -9.293494259e-06f, -4.762602202e-06f, -1.812129199e-06f, -5.392051321e-07f,
     -1.287375113e-07f, -2.503472452e-08f, -4.003504195e-09f, 0.0f},
};
#endif

// Q(t), the weight of the normal distribution's upper tail beyond t = |x|, with t kept below where Q is as good as 0.
struct NormalTail {
  Vec t, weight;
};

#if defined(__AVX512F__)
FASTVIT_INLINE Vec normal_tail_coefficient(__m512i interval, int power) {
  return Vec{_mm512_permutexvar_ps(interval, _mm512_load_ps(kNormalTail[power]))};
}
#endif

FASTVIT_INLINE NormalTail normal_tail(Vec x) {
#if defined(__AVX512F__)
  const Vec t{_mm512_range_ps(x.v, _mm512_set1_ps(6.0f), 0b1010)};  // the smaller size of the two, sign cleared
  const Vec magic = Vec::fill(12582912.0f);  // adding 1.5 * 2^23 rounds to whole, which then is in the low bits
  const Vec shifted = fma(t, Vec::fill(2.5f), magic);
  const Vec r = fma(t, Vec::fill(2.5f), magic - shifted);
  const __m512i n = _mm512_castps_si512(shifted.v);
  Vec tail = normal_tail_coefficient(n, 5);
  for (int i = 4; i >= 0; --i) tail = fma(tail, r, normal_tail_coefficient(n, i));
  return {t, tail};
#else
  // 1/2 - Q(t) = t P(t^2) / R(t^2) up to 5.45 (relative error 1.5e-8); beyond, Q is as good as 0.
  const Vec size = abs(x), t = min(size, Vec::fill(5.45f)), t2 = t * t;
  Vec p = Vec::fill(2.3297138108e-08f);
  p = fma(p, t2, Vec::fill(6.3092584601e-06f));
  p = fma(p, t2, Vec::fill(1.6214257042e-04f));
  p = fma(p, t2, Vec::fill(4.6371810035e-03f));
  p = fma(p, t2, Vec::fill(3.3195939616e-02f));
  p = fma(p, t2, Vec::fill(3.9894227491e-01f));
  Vec q = Vec::fill(1.2102398579e-06f);
  q = fma(q, t2, Vec::fill(7.1513197801e-05f));
  q = fma(q, t2, Vec::fill(1.8468363846e-03f));
  q = fma(q, t2, Vec::fill(2.8270322553e-02f));
  q = fma(q, t2, Vec::fill(2.4987632807e-01f));
  q = fma(q, t2, Vec::fill(1.0f));
  return {t, keep_below(size, 5.45f, fnma(t, p / q, Vec::fill(0.5f)))};
#endif
}

// GELU, x (1 - Q(x)), written as max(x, 0) - t Q(t) so that small results keep their digits. Absolute error below
// 1e-7 max(1, |x|); exactly 0 or x far out, NaN for NaN.
FASTVIT_INLINE Vec gelu(Vec x) {
  const NormalTail tail = normal_tail(x);
  return fnma(tail.t, tail.weight, max(Vec::fill(0.0f), x));
}

}  // namespace fastvit::FASTVIT_ISA
