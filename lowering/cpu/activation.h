// Activation functions of eight fp32 numbers, AVX2 and FMA.
//
// Against the functions in exact arithmetic the error is at most 4e-7 * |x| (3e-7 by erf, 1.2e-7 by
// exp; `test_activations_are_those_of_torch` measures it): torch's own, in fp32, have 1.2e-7. NaN
// stays NaN, and infinities give what torch has for them.

#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

// In the order of `avx2_linear.ACTIVATIONS`.
enum Activation { NONE, GELU, GELU_TANH, SILU, RELU, RELU6, HARDSWISH };

inline __m256 all(float value) { return _mm256_set1_ps(value); }

// `x` between two bounds. Where x is NaN these instructions return their second operand: x.
inline __m256 within(float low, __m256 x, float high) {
  return _mm256_min_ps(all(high), _mm256_max_ps(all(low), x));
}

// The polynomial with coefficients of falling powers.
template <int N>
inline __m256 polynomial(__m256 x, const float (&coefficients)[N]) {
  __m256 y = all(coefficients[0]);
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) y = _mm256_fmadd_ps(y, x, all(coefficients[i]));
  return y;
}

// exp(x) to 2 units in the last place; 2^n exp(r) with Cephes' polynomial for |r| <= ln 2 / 2. From
// 88.4 on it is Inf, below -87.3 it stays 2^-126.
inline __m256 exponential(__m256 x) {
  x = within(-87.3f, x, 89.0f);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, all(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, all(0.693359375f), x);  // ln 2 in two parts
  r = _mm256_fnmadd_ps(n, all(-2.12194440e-4f), r);
  const __m256 p = polynomial(r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                  4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f});
  const __m256 y = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, all(1.0f)));
  const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}

// erf(x), the rational function of Eigen and XLA for |x| <= 4; beyond, 1 is nearest.
inline __m256 error_function(__m256 x) {
  const __m256 c = within(-4.0f, x, 4.0f), square = _mm256_mul_ps(c, c);
  const __m256 p = polynomial(
      square, {-2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f,
               -5.69250639462346e-05f, -7.34990630326855e-04f, -2.95459980854025e-03f,
               -1.60960333262415e-02f});
  const __m256 q =
      polynomial(square, {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f,
                          -7.37332916720468e-03f, -1.42647390514189e-02f});
  const __m256 sign = _mm256_and_ps(x, all(-0.0f)), size = _mm256_andnot_ps(all(-0.0f), x);
  const __m256 beyond = _mm256_cmp_ps(size, all(4.0f), _CMP_GE_OQ);
  const __m256 y = _mm256_div_ps(_mm256_mul_ps(c, p), q);
  return _mm256_blendv_ps(y, _mm256_or_ps(sign, all(1.0f)), beyond);
}

// x / (1 + exp(-slope)).
inline __m256 gated(__m256 x, __m256 slope) {
  const __m256 e = exponential(_mm256_xor_ps(slope, all(-0.0f)));
  return _mm256_div_ps(x, _mm256_add_ps(e, all(1.0f)));
}

inline __m256 gelu(__m256 x) {
  const __m256 erf = error_function(_mm256_mul_ps(x, all(0.70710678f)));
  return _mm256_mul_ps(_mm256_mul_ps(x, all(0.5f)), _mm256_add_ps(erf, all(1.0f)));
}

inline __m256 gelu_tanh(__m256 x) {  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))
  const __m256 cube = _mm256_mul_ps(_mm256_mul_ps(x, x), x);
  const __m256 inner = _mm256_fmadd_ps(cube, all(0.044715f), x);
  return gated(x, _mm256_mul_ps(inner, all(1.59576912f)));  // 2 sqrt(2 / pi)
}

inline __m256 hardswish(__m256 x) {
  const __m256 gate = within(0.0f, _mm256_add_ps(x, all(3.0f)), 6.0f);
  return _mm256_div_ps(_mm256_mul_ps(x, gate), all(6.0f));
}

template <int ROWS, typename Function>
inline void each(__m256 (&x)[ROWS], Function function) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) x[r] = function(x[r]);
}

template <int ROWS>
inline void activate(__m256 (&x)[ROWS], int activation) {
  switch (activation) {
    case GELU: return each(x, gelu);
    case GELU_TANH: return each(x, gelu_tanh);
    case SILU: return each(x, [](__m256 one) { return gated(one, one); });
    case RELU: return each(x, [](__m256 one) { return _mm256_max_ps(all(0.0f), one); });
    case RELU6: return each(x, [](__m256 one) { return within(0.0f, one, 6.0f); });
    case HARDSWISH: return each(x, hardswish);
    default: return;
  }
}

}  // namespace
