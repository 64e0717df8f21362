/* ops_avx2_int.h - tails and the exponential, for ops_avx2.c and ops_avx2_attn.c. */
#ifndef ENGINE_OPS_AVX2_INT_H
#define ENGINE_OPS_AVX2_INT_H

#include "engine/ops.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
static const int32_t ones_then_zeros[16] = { -1, -1, -1, -1, -1, -1, -1, -1 };

/* The first n of 8 lanes; all of them from 8 on, none below 1. */
INLINE AVX2 __m256i first(int n)
{
    n = n > 8 ? 8 : n < 0 ? 0 : n;
    return _mm256_loadu_si256((const __m256i *)(ones_then_zeros + 8 - n));
}

/* Storing under a mask is slow on some processors, so only the end of a row is stored like that. */
INLINE AVX2 __m256 load(const float *p, int n)
{
    return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(n));
}

INLINE AVX2 void store(float *p, int n, __m256 v)
{
    if (n >= 8)
        _mm256_storeu_ps(p, v);
    else
        _mm256_maskstore_ps(p, first(n), v);
}

/* 2^n for -126 <= n <= 127. */
INLINE AVX2 __m256 power(__m256i n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

/* exp(x) = 2^n (1 + p); returns p. */
INLINE AVX2 __m256 exp_parts(__m256 x, __m256 *ret_n)
{
    const __m256 magic = _mm256_set1_ps(OPS_ROUND);
    __m256 n = _mm256_sub_ps(
        _mm256_add_ps(_mm256_mul_ps(x, _mm256_set1_ps(OPS_LOG2E)), magic), magic);
    __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-OPS_LN2_HI), x);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(-OPS_LN2_LO), r);
    __m256 q = _mm256_fmadd_ps(_mm256_set1_ps(OPS_EXP_Q5), r, _mm256_set1_ps(OPS_EXP_Q4));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(OPS_EXP_Q3));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(OPS_EXP_Q2));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(OPS_EXP_Q1));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(OPS_EXP_Q0));
    *ret_n = n;
    return _mm256_fmadd_ps(_mm256_mul_ps(r, r), q, r);
}

/* max and min return their second operand when one is a NaN: x, here. */
INLINE AVX2 __m256 clamp(__m256 x, float lo, float hi)
{
    return _mm256_min_ps(_mm256_set1_ps(hi), _mm256_max_ps(_mm256_set1_ps(lo), x));
}

INLINE AVX2 __m256 exp8(__m256 x)
{
    __m256 n, p = exp_parts(clamp(x, OPS_EXP_MIN, OPS_EXP_MAX), &n);
    __m256 y = _mm256_add_ps(p, _mm256_set1_ps(1.0f));
    /* In two steps, of which only the last can round. */
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(y, power(half)), power(_mm256_sub_epi32(whole, half)));
}
#endif

#endif
