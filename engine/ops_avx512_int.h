/* ops_avx512_int.h - masks and the exponential, for ops_avx512.c and ops_avx512_attn.c. */
#ifndef ENGINE_OPS_AVX512_INT_H
#define ENGINE_OPS_AVX512_INT_H

#include "engine/ops.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
/* Mask of the first n lanes, n in 0..16. */
INLINE AVX512 __mmask16 first(int n) { return (__mmask16)((1u << n) - 1); }
INLINE AVX512 __mmask16 tail(int left) { return left >= 16 ? (__mmask16)0xffff : first(left); }

/* exp(x) = 2^n (1 + p); returns p. */
INLINE AVX512 __m512 exp_parts(__m512 x, __m512 *ret_n)
{
    const __m512 magic = _mm512_set1_ps(OPS_ROUND);
    __m512 n = _mm512_sub_ps(
        _mm512_add_ps(_mm512_mul_ps(x, _mm512_set1_ps(OPS_LOG2E)), magic), magic);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-OPS_LN2_HI), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(-OPS_LN2_LO), r);
    __m512 q = _mm512_fmadd_ps(_mm512_set1_ps(OPS_EXP_Q5), r, _mm512_set1_ps(OPS_EXP_Q4));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(OPS_EXP_Q3));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(OPS_EXP_Q2));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(OPS_EXP_Q1));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(OPS_EXP_Q0));
    *ret_n = n;
    return _mm512_fmadd_ps(_mm512_mul_ps(r, r), q, r);
}

/* max and min return their second operand when one is a NaN: x, here. */
INLINE AVX512 __m512 clamp(__m512 x, float lo, float hi)
{
    return _mm512_min_ps(_mm512_set1_ps(hi), _mm512_max_ps(_mm512_set1_ps(lo), x));
}

INLINE AVX512 __m512 exp16(__m512 x)
{
    __m512 n, p = exp_parts(clamp(x, OPS_EXP_MIN, OPS_EXP_MAX), &n);
    return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1.0f)), n);
}
#endif

#endif
