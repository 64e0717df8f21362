/* ops_avx512.c - the operations of ops.c, 16 lanes at a time, with the same bits.
 *
 * Tails are masked: a lane without an element keeps its value, as a scalar lane does that gets
 * nothing.  Compiled for AVX-512 F/BW/DQ/VL by target attributes; called only where isa_select()
 * found them. */
#include "engine/ops.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
#include <math.h>
#include <stddef.h>


/* Mask of the first n lanes, n in 0..16. */
INLINE AVX512 __mmask16 first(int n) { return (__mmask16)((1u << n) - 1); }
INLINE AVX512 __mmask16 tail(int left) { return left >= 16 ? (__mmask16)0xffff : first(left); }

INLINE AVX512 float tree(__m512 v)
{
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b)); /* 0+2, 1+3 */
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

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

INLINE AVX512 __m512 tanh16(__m512 x)
{
    const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
    __m512 n, p = exp_parts(_mm512_mul_ps(two, clamp(x, -OPS_TANH_MAX, OPS_TANH_MAX)), &n);
    __m512 two_n = _mm512_scalef_ps(one, n);
    __m512 m = _mm512_fmadd_ps(p, two_n, _mm512_sub_ps(two_n, one));
    return _mm512_div_ps(m, _mm512_add_ps(m, two));
}

INLINE AVX512 __m512 gelu_tanh16(__m512 u)
{
    __m512 z = _mm512_fmadd_ps(_mm512_mul_ps(u, u), _mm512_set1_ps(OPS_GELU_B),
                               _mm512_set1_ps(OPS_GELU_A));
    __m512 e = exp16(_mm512_mul_ps(u, z));
    return _mm512_div_ps(u, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

INLINE AVX512 __m512 gelu_erf16(__m512 u)
{
    static const float c[OPS_ERFC_DEGREE + 1] = OPS_ERFC_P;
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 a = _mm512_abs_ps(u);
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(a, _mm512_set1_ps(0.25f), one));
    __m512 p = _mm512_set1_ps(c[OPS_ERFC_DEGREE]);
    UNROLL
    for (int i = OPS_ERFC_DEGREE - 1; i >= 0; i--)
        p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c[i]));
    __m512 e = exp16(_mm512_mul_ps(_mm512_mul_ps(a, a), _mm512_set1_ps(-0.5f)));
    __m512 h = _mm512_mul_ps(u, _mm512_mul_ps(p, e));
    return _mm512_mask_sub_ps(h, _mm512_cmp_ps_mask(u, _mm512_setzero_ps(), _CMP_NLT_UQ), u, h);
}

AVX512 static void rmsnorm(const float *x, const float *w, float eps, int n, float *y)
{
    __m512 acc = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 v = _mm512_maskz_loadu_ps(m, x + i);
        acc = _mm512_mask3_fmadd_ps(v, v, acc, m);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(tree(acc) / (float)n + eps));
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), scale);
        _mm512_mask_storeu_ps(y + i, m, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, w + i)));
    }
}

AVX512 static void layernorm(const float *x, const float *w, const float *bias, float eps, int n,
                             float *y)
{
    __m512 sum = _mm512_setzero_ps(), square = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        sum = _mm512_mask_add_ps(sum, m, sum, _mm512_maskz_loadu_ps(m, x + i));
    }
    const __m512 mean = _mm512_set1_ps(tree(sum) / (float)n);
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + i), mean);
        square = _mm512_mask3_fmadd_ps(d, d, square, m);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(tree(square) / (float)n + eps));
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + i), mean);
        __m512 v = _mm512_fmadd_ps(_mm512_mul_ps(d, scale), _mm512_maskz_loadu_ps(m, w + i),
                                   _mm512_maskz_loadu_ps(m, bias + i));
        _mm512_mask_storeu_ps(y + i, m, v);
    }
}

AVX512 static void rope(float *x, const float *cos, const float *sin, int n)
{
    int half = n / 2;
    for (int i = 0; i < half; i += 16) {
        __mmask16 m = tail(half - i);
        __m512 a = _mm512_maskz_loadu_ps(m, x + i), b = _mm512_maskz_loadu_ps(m, x + half + i);
        __m512 c = _mm512_maskz_loadu_ps(m, cos + i), s = _mm512_maskz_loadu_ps(m, sin + i);
        _mm512_mask_storeu_ps(x + i, m, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        _mm512_mask_storeu_ps(x + half + i, m, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

/* Eight pairs at a time: cos and sin are doubled, the pairs swapped, and the even elements get the
 * difference. */
AVX512 static void rope_pairs(float *x, const float *cos, const float *sin, int n)
{
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i), half = tail((n - i) / 2) & (__mmask16)0xff;
        __m512 v = _mm512_maskz_loadu_ps(m, x + i), swapped = _mm512_permute_ps(v, 0xb1);
        __m512 c = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(half, cos + i / 2));
        __m512 s = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(half, sin + i / 2));
        _mm512_mask_storeu_ps(x + i, m, _mm512_fmaddsub_ps(v, c, _mm512_mul_ps(swapped, s)));
    }
}

AVX512 static void silu_mul(const float *gate, const float *up, int n, float *y)
{
    const __m512 one = _mm512_set1_ps(1.0f), sign = _mm512_set1_ps(-0.0f);
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 g = _mm512_maskz_loadu_ps(m, gate + i);
        __m512 e = exp16(_mm512_xor_ps(g, sign));
        __m512 v = _mm512_div_ps(g, _mm512_add_ps(one, e));
        _mm512_mask_storeu_ps(y + i, m, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, up + i)));
    }
}

AVX512 static void gelu_tanh(const float *gate, const float *up, int n, float *y)
{
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 v = gelu_tanh16(_mm512_maskz_loadu_ps(m, gate + i));
        if (up != NULL)
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, up + i));
        _mm512_mask_storeu_ps(y + i, m, v);
    }
}

AVX512 static void gelu_erf(const float *gate, const float *up, int n, float *y)
{
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 v = gelu_erf16(_mm512_maskz_loadu_ps(m, gate + i));
        if (up != NULL)
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, up + i));
        _mm512_mask_storeu_ps(y + i, m, v);
    }
}

AVX512 static void softcap(float c, int n, float *y)
{
    const __m512 cap = _mm512_set1_ps(c);
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(m, y + i), cap);
        _mm512_mask_storeu_ps(y + i, m, _mm512_mul_ps(cap, tanh16(v)));
    }
}

AVX512 static void add(const float *x, int n, float *y)
{
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 v = _mm512_add_ps(_mm512_maskz_loadu_ps(m, y + i), _mm512_maskz_loadu_ps(m, x + i));
        _mm512_mask_storeu_ps(y + i, m, v);
    }
}

AVX512 static void exp_n(const float *x, int n, float *y)
{
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        _mm512_mask_storeu_ps(y + i, m, exp16(_mm512_maskz_loadu_ps(m, x + i)));
    }
}

AVX512 static void to_f16(const float *x, int n, uint16_t *y)
{
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m256i h = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(m, x + i),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_mask_storeu_epi16(y + i, m, h);
    }
}

/* 16 elements from element i on. */
INLINE AVX512 __m512 load(const void *p, bool f32, size_t i)
{
    if (f32)
        return _mm512_loadu_ps((const float *)p + i);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)p + i)));
}

INLINE AVX512 __m512 load_tail(const void *p, bool f32, size_t i, __mmask16 m)
{
    if (f32)
        return _mm512_maskz_loadu_ps(m, (const float *)p + i);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, (const uint16_t *)p + i));
}

/* `nq` and `f32` are literals at every call, so that the accumulators live in registers. */
INLINE AVX512 void scores_nq(const void *k, bool f32, int hd, float scale, int nq, const float *const *q,
                      float *const *s)
{
    __m512 acc[OPS_QUERIES][4];
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int a = 0; a < 4; a++)
            acc[i][a] = _mm512_setzero_ps();
    int d = 0;
    for (; d + 4 <= hd; d += 4)
        UNROLL
        for (int a = 0; a < 4; a++) {
            __m512 v = load(k, f32, (size_t)(d + a) * KV_PAGE);
            UNROLL
            for (int i = 0; i < nq; i++)
                acc[i][a] = _mm512_fmadd_ps(_mm512_set1_ps(q[i][d + a]), v, acc[i][a]);
        }
    UNROLL
    for (int a = 0; a < 3; a++)
        if (d + a < hd) {
            __m512 v = load(k, f32, (size_t)(d + a) * KV_PAGE);
            UNROLL
            for (int i = 0; i < nq; i++)
                acc[i][a] = _mm512_fmadd_ps(_mm512_set1_ps(q[i][d + a]), v, acc[i][a]);
        }
    UNROLL
    for (int i = 0; i < nq; i++) {
        __m512 sum = _mm512_add_ps(_mm512_add_ps(acc[i][0], acc[i][1]),
                                   _mm512_add_ps(acc[i][2], acc[i][3]));
        _mm512_storeu_ps(s[i], _mm512_mul_ps(sum, _mm512_set1_ps(scale)));
    }
}

AVX512 static void scores(const void *k, bool f32, int hd, float scale, int nq,
                          const float *const *q, float *const *s)
{
    switch (nq * 2 + f32) {
    case 2: scores_nq(k, false, hd, scale, 1, q, s); break;
    case 3: scores_nq(k, true, hd, scale, 1, q, s); break;
    case 4: scores_nq(k, false, hd, scale, 2, q, s); break;
    case 5: scores_nq(k, true, hd, scale, 2, q, s); break;
    case 6: scores_nq(k, false, hd, scale, 3, q, s); break;
    case 7: scores_nq(k, true, hd, scale, 3, q, s); break;
    case 8: scores_nq(k, false, hd, scale, 4, q, s); break;
    case 9: scores_nq(k, true, hd, scale, 4, q, s); break;
    }
}

AVX512 static float softmax(struct ops_softmax *m, float *s, int a, int b)
{
    const __m512 none = _mm512_set1_ps(-INFINITY);
    uint64_t visible = (b >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << b) - 1) & ~(uint64_t)0 << a;
    __m512 v[4], top = none;
    UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_mask_loadu_ps(none, (__mmask16)(visible >> 16 * i), s + 16 * i);
        top = _mm512_max_ps(v[i], top);
    }
    float fix = 1.0f, max = _mm512_reduce_max_ps(top);
    __m512 sum = _mm512_loadu_ps(m->sum);
    if (max > m->max) {
        fix = _mm512_cvtss_f32(exp16(_mm512_set1_ps(m->max - max)));
        m->max = max;
        sum = _mm512_mul_ps(sum, _mm512_set1_ps(fix));
    }
    const __m512 base = _mm512_set1_ps(m->max);
    UNROLL
    for (int i = 0; i < 4; i++) {
        __mmask16 k = (__mmask16)(visible >> 16 * i);
        v[i] = _mm512_maskz_mov_ps(k, exp16(_mm512_sub_ps(v[i], base)));
        sum = _mm512_add_ps(sum, v[i]);
        _mm512_storeu_ps(s + 16 * i, v[i]);
    }
    _mm512_storeu_ps(m->sum, sum);
    return fix;
}

/* `nv` vectors of the head from element d on; the last may be short.  nq, nv, f32 are literals. */
INLINE AVX512 void values_nq(const void *v, bool f32, int hd, int a, int b, int nq, const float *const *p,
                      float *const *out, int d, int nv, __mmask16 m)
{
    __m512 acc[OPS_QUERIES][4];
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int e = 0; e < nv; e++)
            acc[i][e] = _mm512_maskz_loadu_ps(e == nv - 1 ? m : (__mmask16)0xffff,
                                              out[i] + d + 16 * e);
    for (int j = a; j < b; j++) {
        const size_t at = (size_t)j * (size_t)hd + (size_t)d;
        __m512 x[4];
        UNROLL
        for (int e = 0; e < nv; e++)
            x[e] = e == nv - 1 ? load_tail(v, f32, at + 16 * (size_t)e, m)
                               : load(v, f32, at + 16 * (size_t)e);
        UNROLL
        for (int i = 0; i < nq; i++) {
            const __m512 w = _mm512_set1_ps(p[i][j]);
            UNROLL
            for (int e = 0; e < nv; e++)
                acc[i][e] = _mm512_fmadd_ps(w, x[e], acc[i][e]);
        }
    }
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int e = 0; e < nv; e++)
            _mm512_mask_storeu_ps(out[i] + d + 16 * e, e == nv - 1 ? m : (__mmask16)0xffff,
                                  acc[i][e]);
}

INLINE AVX512 void values_all(const void *v, bool f32, int hd, int a, int b, int nq,
                       const float *const *p, float *const *out)
{
    int d = 0;
    for (; d + 64 <= hd; d += 64)
        values_nq(v, f32, hd, a, b, nq, p, out, d, 4, (__mmask16)0xffff);
    for (; d + 32 <= hd; d += 32)
        values_nq(v, f32, hd, a, b, nq, p, out, d, 2, (__mmask16)0xffff);
    for (; d < hd; d += 16)
        values_nq(v, f32, hd, a, b, nq, p, out, d, 1, tail(hd - d));
}

AVX512 static void values(const void *v, bool f32, int hd, int a, int b, int nq,
                          const float *const *p, float *const *out)
{
    switch (nq * 2 + f32) {
    case 2: values_all(v, false, hd, a, b, 1, p, out); break;
    case 3: values_all(v, true, hd, a, b, 1, p, out); break;
    case 4: values_all(v, false, hd, a, b, 2, p, out); break;
    case 5: values_all(v, true, hd, a, b, 2, p, out); break;
    case 6: values_all(v, false, hd, a, b, 3, p, out); break;
    case 7: values_all(v, true, hd, a, b, 3, p, out); break;
    case 8: values_all(v, false, hd, a, b, 4, p, out); break;
    case 9: values_all(v, true, hd, a, b, 4, p, out); break;
    }
}

AVX512 static void scale_n(float c, int n, float *y)
{
    const __m512 v = _mm512_set1_ps(c);
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        _mm512_mask_storeu_ps(y + i, m, _mm512_mul_ps(_mm512_maskz_loadu_ps(m, y + i), v));
    }
}

AVX512 static float softmax_row(int n, float *s)
{
    __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16)
        top = _mm512_mask_max_ps(top, tail(n - i), _mm512_maskz_loadu_ps(tail(n - i), s + i), top);
    const __m512 max = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 e = exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, s + i), max));
        sum = _mm512_mask_add_ps(sum, m, sum, e);
        _mm512_mask_storeu_ps(s + i, m, e);
    }
    return tree(sum);
}

AVX512 static void softmax_grad(float c, float dot, int n, float *p, float *d)
{
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = tail(n - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, p + i), _mm512_set1_ps(c));
        __m512 g = _mm512_sub_ps(_mm512_maskz_loadu_ps(m, d + i), _mm512_set1_ps(dot));
        _mm512_mask_storeu_ps(p + i, m, v);
        _mm512_mask_storeu_ps(d + i, m, _mm512_mul_ps(v, g));
    }
}

const struct ops ops_avx512 = {
    .rmsnorm = rmsnorm, .rope = rope,     .silu_mul = silu_mul, .add = add,
    .exp = exp_n,       .to_f16 = to_f16, .scores = scores,     .softmax = softmax,
    .values = values,   .scale = scale_n,
    .layernorm = layernorm, .rope_pairs = rope_pairs, .gelu_tanh = gelu_tanh,
    .gelu_erf = gelu_erf,   .softcap = softcap,
    .softmax_row = softmax_row, .softmax_grad = softmax_grad,
};
#endif
