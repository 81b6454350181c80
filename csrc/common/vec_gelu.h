// GELU (the erf form) and its derivative of vectors, compiled once per instruction set.
#pragma once

#include "common/vec.h"

namespace fastvit::FASTVIT_ISA {

#if defined(__AVX512F__)
// Q(t), the upper tail of the normal distribution, for t from 0 to 6 in steps of 0.4: around t = 0.4 n a polynomial in
// r = t / 0.4 - n, with [i][n] the coefficient of r^i; minimax fits of the relative error, 2e-7 up to t = 3 and 6e-5 at
// the end. The last entry makes it zero from 5.8 on, where Q < 4e-9.
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

// The same for Q(t) - t phi(t), phi being the normal density, up to t = 6.2: errors below 5e-8.
alignas(64) constexpr float kSlopeTail[6][16] = {
    {4.999999998e-01f, 1.972702438e-01f, -1.989780818e-02f, -1.179535970e-01f, -1.226740662e-01f, -8.523181610e-02f,
     -4.554933734e-02f, -1.960812934e-02f, -6.941941115e-03f, -2.043737581e-03f, -5.036498426e-04f, -1.043345637e-04f,
     -1.822101306e-05f, -2.688125143e-06f, -3.355158358e-07f, -3.546968941e-08f},
    {-3.191537962e-01f, -2.710467951e-01f, -1.575922005e-01f, -4.349770477e-02f, 2.484620683e-02f, 4.319273558e-02f,
     3.368137968e-02f, 1.849052227e-02f, 7.857973129e-03f, 2.682582183e-03f, 7.494469899e-04f, 1.731979965e-04f,
     3.333704596e-05f, 5.369197871e-06f, 7.259841572e-07f, 8.261142881e-08f},
    {-6.197876445e-07f, 4.525004843e-02f, 6.229272569e-02f, 4.772327419e-02f, 2.044656381e-02f, 1.103056361e-06f,
     -7.567517971e-03f, -6.808923531e-03f, -3.808688420e-03f, -1.579062175e-03f, -5.138917029e-04f, -1.348360243e-04f,
     -2.895265345e-05f, -5.135316094e-06f, -7.571235980e-07f, -9.320616812e-08f},
    {1.702644229e-02f, 1.141320308e-02f, -2.173692404e-04f, -8.297771830e-03f, -8.714594932e-03f, -4.606749216e-03f,
     -7.508331433e-04f, 8.933061216e-04f, 9.451615007e-04f, 5.302091076e-04f, 2.113147544e-04f, 6.476891982e-05f,
     1.580418618e-05f, 3.128121128e-06f, 5.080505554e-07f, 6.825057852e-08f},
    {-1.668832339e-05f, -2.523889843e-03f, -2.783447773e-03f, -1.053609404e-03f, 6.651097097e-04f, 1.139921596e-03f,
     6.979716059e-04f, 1.642334187e-04f, -8.036145120e-05f, -1.012966311e-04f, -5.615330018e-05f, -2.130041775e-05f,
     -6.108807920e-06f, -1.380313918e-06f, -2.511350324e-07f, -3.726083264e-08f},
    {-5.906380859e-04f, -3.183890783e-04f, 2.035530693e-04f, 4.131973853e-04f, 2.281203317e-04f, -2.799084486e-05f,
     -1.207556269e-04f, -7.933467396e-05f, -1.964345843e-05f, 6.918913918e-06f, 8.944105434e-06f, 4.621149557e-06f,
     1.601507846e-06f, 4.151332138e-07f, 8.414105823e-08f, 1.358312662e-08f},
};

// For results that are rounded to bfloat16, polynomials in t itself: -t Q(t), and Q(t) - t phi(t). Errors below 2e-5
// and 3e-5, relative errors below 1e-4 up to t = 3 and 6e-3 at the end.
alignas(64) constexpr float kCoarseGelu[4][16] = {
    {0.0f, 8.990631392e-04f, 6.552169050e-03f, -2.945064230e-02f, -1.880825390e-01f, -4.301023093e-01f,
     -5.861268752e-01f, -5.498917673e-01f, -3.801482141e-01f, -2.012969799e-01f, -8.367510558e-02f, -2.776641037e-02f,
     -7.443455105e-03f, -1.626442786e-03f, -2.916236592e-04f, 0.0f},
    {-5.000177891e-01f, -5.109395925e-01f, -5.422967982e-01f, -4.406716346e-01f, -1.045908008e-01f, 2.999041706e-01f,
     5.162078908e-01f, 4.771891594e-01f, 3.085495617e-01f, 1.508211535e-01f, 5.777942383e-02f, 1.771160592e-02f,
     4.402109061e-03f, 8.953822083e-04f, 1.500317203e-04f, 0.0f},
    {4.004763359e-01f, 4.469960674e-01f, 5.057136821e-01f, 4.098452319e-01f, 1.717350647e-01f, -5.406470112e-02f,
     -1.541250523e-01f, -1.401742998e-01f, -8.428726402e-02f, -3.789424291e-02f, -1.335065968e-02f, -3.775595888e-03f,
     -8.693303768e-04f, -1.645087966e-04f, -2.575156134e-05f, 0.0f},
    {-2.007037925e-02f, -9.163967725e-02f, -1.286247885e-01f, -9.838571189e-02f, -4.196763280e-02f, 1.311317933e-04f,
     1.557534496e-02f, 1.392013672e-02f, 7.742094937e-03f, 3.190966942e-03f, 1.031896956e-03f, 2.689131975e-04f,
     5.731792370e-05f, 1.008659920e-05f, 1.474553565e-06f, 0.0f},
};
alignas(64) constexpr float kCoarseSlopeTail[4][16] = {
    {5.000003614e-01f, 5.016647593e-01f, 5.432791573e-01f, 6.606888468e-01f, 6.573945528e-01f, 2.713603586e-01f,
     -3.573937225e-01f, -7.837356129e-01f, -7.888097998e-01f, -5.321595860e-01f, -2.649537649e-01f, -1.016401623e-01f,
     -3.078189164e-02f, -7.476161131e-03f, -1.472090088e-03f, 0.0f},
    {-7.979380865e-01f, -8.160942540e-01f, -1.015913709e+00f, -1.373124596e+00f, -1.380688042e+00f, -7.472438613e-01f,
     1.105065418e-01f, 6.078117331e-01f, 6.171432598e-01f, 3.922666277e-01f, 1.814052500e-01f, 6.451586009e-02f,
     1.814912251e-02f, 4.107536135e-03f, 7.563191334e-04f, 0.0f},
    {1.162068490e-03f, 6.740620148e-02f, 3.924558750e-01f, 7.570171548e-01f, 7.729122667e-01f, 4.258232960e-01f,
     3.525277460e-02f, -1.582642594e-01f, -1.627927757e-01f, -9.707866448e-02f, -4.158758899e-02f, -1.369029176e-02f,
     -3.573909481e-03f, -7.532672497e-04f, -1.296491334e-04f, 0.0f},
    {2.591106940e-01f, 1.762178919e-01f, -3.117009611e-03f, -1.278873677e-01f, -1.341865440e-01f, -7.067576924e-02f,
     -1.131600326e-02f, 1.380490249e-02f, 1.446557466e-02f, 8.061045000e-03f, 3.191107438e-03f, 9.709594827e-04f,
     2.350150952e-04f, 4.610433489e-05f, 7.414844773e-06f, 0.0f},
};

// The index of t's polynomial, in the low bits, and t's distance from the middle of the interval.
struct Interval {
  __m512i index;
  Vec r;
};

FASTVIT_INLINE Interval interval_of(Vec t) {
  const Vec magic = Vec::fill(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer, in the low bits
  const Vec shifted = fma(t, Vec::fill(2.5f), magic);
  return {_mm512_castps_si512(shifted.v), fma(t, Vec::fill(2.5f), magic - shifted)};
}

// Several polynomials at x, interleaved: each is one chain of dependent steps.
template <int terms, int count>
FASTVIT_INLINE void polynomials(const float (&coefficients)[terms][16], const Interval (&at)[count],
                                const Vec (&x)[count], Vec (&values)[count]) {
  const auto coefficient = [&](int i, int k) __attribute__((always_inline)) {
    return Vec{_mm512_permutexvar_ps(at[k].index, _mm512_load_ps(coefficients[i]))};
  };
#pragma GCC unroll 8
  for (int k = 0; k < count; ++k) values[k] = coefficient(terms - 1, k);
#pragma GCC unroll 8
  for (int i = terms - 2; i >= 0; --i) {
#pragma GCC unroll 8
    for (int k = 0; k < count; ++k) values[k] = fma(values[k], x[k], coefficient(i, k));
  }
}

template <int terms>
FASTVIT_INLINE Vec polynomial(const float (&coefficients)[terms][16], const Interval& at, Vec x) {
  Vec value[1];
  polynomials(coefficients, {at}, {x}, value);
  return value[0];
}

// max(x, 0), but NaN for -inf.
FASTVIT_INLINE Vec positive_part(Vec x) {
  // By class of x: 4, -inf, becomes NaN (3), 6, negative, becomes 0 (8), all else stays (0).
  return {_mm512_fixupimm_ps(x.v, x.v, _mm512_set1_epi32(3 << 4 * 4 | 8 << 6 * 4), 0)};
}

// min(|x|, 6), 6 for NaN.
FASTVIT_INLINE Vec size_below_6(Vec x) { return {_mm512_range_ps(x.v, _mm512_set1_ps(6.0f), 0b1010)}; }
#endif

#if !defined(__AVX512F__)
// Q(t), the upper tail of the normal distribution beyond t = |x|, with t clamped to where Q is practically 0.
struct NormalTail {
  Vec t, weight;
};

FASTVIT_INLINE NormalTail normal_tail(Vec x) {
  // Of v = t P(t^2) / R(t^2), which is odd in t, as (1 - v)^2 / 2 (1 + v^2): unlike 1/2 less a quotient, that keeps its
  // digits where Q is small. Errors below 2e-8 up to 5.6; beyond, Q is practically 0.
  const Vec size = abs(x), t = min(size, Vec::fill(5.6f)), t2 = t * t;
  Vec p = Vec::fill(1.4713643511e-04f);
  p = fma(p, t2, Vec::fill(3.2981745662e-03f));
  p = fma(p, t2, Vec::fill(6.3293245972e-02f));
  p = fma(p, t2, Vec::fill(3.9894238235e-01f));
  Vec r = Vec::fill(8.1942953267e-06f);
  r = fma(r, t2, Vec::fill(9.5958756902e-04f));
  r = fma(r, t2, Vec::fill(1.3429107249e-02f));
  r = fma(r, t2, Vec::fill(1.6616615967e-01f));
  r = fma(r, t2, Vec::fill(1.0f));
  const Vec less = fnma(t, p, r), more = fma(t, p, r), square = less * less;
  return {t, keep_below(size, 5.6f, square / fma(more, more, square))};
}
#endif

// GELU of each, x (1 - Q(x)), written as max(x, 0) - t Q(t) so that small results keep their digits. Absolute error
// below 1e-7 max(1, |x|); exactly 0 or x far out; NaN for NaN and, as -inf * 0, for -inf. coarse: the result will be
// rounded to bfloat16.
template <bool coarse, int count>
FASTVIT_INLINE void gelu(Vec (&x)[count]) {
#if defined(__AVX512F__)
  Vec t[count], r[count], tail[count];
  Interval at[count];
#pragma GCC unroll 8
  for (int k = 0; k < count; ++k) t[k] = size_below_6(x[k]);
#pragma GCC unroll 8
  for (int k = 0; k < count; ++k) at[k] = interval_of(t[k]), r[k] = at[k].r;
  if constexpr (coarse) {
    polynomials(kCoarseGelu, at, t, tail);
  } else {
    polynomials(kNormalTail, at, r, tail);
  }
#pragma GCC unroll 8
  for (int k = 0; k < count; ++k) {
    const Vec positive = positive_part(x[k]);
    x[k] = coarse ? tail[k] + positive : fnma(t[k], tail[k], positive);
  }
#else
  for (Vec& value : x) {
    const NormalTail tail = normal_tail(value);
    // Of a negative x as it is, so that -inf gives NaN.
    const Vec t = if_negative(value, abs(value), tail.t);
    value = fnma(t, tail.weight, max(Vec::fill(0.0f), value));
  }
#endif
}

// The derivative Phi(x) + x phi(x), which is Q(t) - t phi(t) for negative x and 1 minus that for positive x. NaN for
// NaN and both infinities.
template <bool coarse>
FASTVIT_INLINE Vec gelu_slope(Vec x) {
  const Vec zero = Vec::fill(0.0f), one = Vec::fill(1.0f);
#if defined(__AVX512F__)
  const Vec size{_mm512_abs_ps(x.v)}, t = min(Vec::fill(6.19f), size);  // NaN for NaN
  const Interval at = interval_of(t);
  const __mmask16 far = _mm512_cmp_ps_mask(size.v, _mm512_set1_ps(6.19f), _CMP_GT_OQ);
  const Vec tail = coarse ? polynomial(kCoarseSlopeTail, at, t)
                          : Vec{_mm512_mask_mov_ps(polynomial(kSlopeTail, at, at.r).v, far, zero.v)};
  return keep_positive(x, fnma(Vec::fill(2.0f), tail, one)) + fma(x, zero, tail);
#else
  // phi is 0 at 15.
  const Vec tail = normal_tail(x).weight;
  const Vec below = keep_positive(x, fnma(Vec::fill(2.0f), tail, one)) + fma(x, zero, tail);
  const Vec near = max(Vec::fill(-15.0f), min(Vec::fill(15.0f), x));
  return fma(near * Vec::fill(0.398942280f), exp(near * near * Vec::fill(-0.5f)), below);
#endif
}

}  // namespace fastvit::FASTVIT_ISA
