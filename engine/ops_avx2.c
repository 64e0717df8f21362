/* ops_avx2.c - the operations of ops.c, 8 lanes at a time, with the same bits.
 *
 * Where the scalar code has 16 lanes there are two vectors.  Tails are loaded as zeros and stored
 * under a mask. */
#include "engine/ops.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
#include <math.h>
#include <stddef.h>
#include <string.h>

static const int32_t ones_then_zeros[16] = { -1, -1, -1, -1, -1, -1, -1, -1 };

/* The first n of 8 lanes; all of them from 8 on, none below 1. */
INLINE AVX2 __m256i first(int n)
{
    n = n > 8 ? 8 : n < 0 ? 0 : n;
    return _mm256_loadu_si256((const __m256i *)(ones_then_zeros + 8 - n));
}

INLINE AVX2 __m256 load(const float *p, int n) { return _mm256_maskload_ps(p, first(n)); }
INLINE AVX2 void store(float *p, int n, __m256 v) { _mm256_maskstore_ps(p, first(n), v); }

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

INLINE AVX2 __m256 tanh8(__m256 x)
{
    const __m256 two = _mm256_set1_ps(2.0f);
    __m256 n, p = exp_parts(_mm256_mul_ps(two, clamp(x, -OPS_TANH_MAX, OPS_TANH_MAX)), &n);
    __m256 two_n = power(_mm256_cvtps_epi32(n));
    __m256 m = _mm256_fmadd_ps(p, two_n, _mm256_sub_ps(two_n, _mm256_set1_ps(1.0f)));
    return _mm256_div_ps(m, _mm256_add_ps(m, two));
}

INLINE AVX2 __m256 gelu_tanh8(__m256 u)
{
    __m256 z = _mm256_fmadd_ps(_mm256_mul_ps(u, u), _mm256_set1_ps(OPS_GELU_B),
                               _mm256_set1_ps(OPS_GELU_A));
    __m256 e = exp8(_mm256_mul_ps(u, z));
    return _mm256_div_ps(u, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
}

INLINE AVX2 __m256 gelu_erf8(__m256 u)
{
    static const float c[OPS_ERFC_DEGREE + 1] = OPS_ERFC_P;
    const __m256 one = _mm256_set1_ps(1.0f);
    __m256 a = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), u);
    __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(a, _mm256_set1_ps(0.25f), one));
    __m256 p = _mm256_set1_ps(c[OPS_ERFC_DEGREE]);
    UNROLL
    for (int i = OPS_ERFC_DEGREE - 1; i >= 0; i--)
        p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(c[i]));
    __m256 e = exp8(_mm256_mul_ps(_mm256_mul_ps(a, a), _mm256_set1_ps(-0.5f)));
    __m256 h = _mm256_mul_ps(u, _mm256_mul_ps(p, e));
    return _mm256_blendv_ps(_mm256_sub_ps(u, h), h,
                            _mm256_cmp_ps(u, _mm256_setzero_ps(), _CMP_LT_OQ));
}

INLINE AVX2 float tree(__m256 lo, __m256 hi)
{
    __m256 a = _mm256_add_ps(lo, hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

AVX2 static void rmsnorm(const float *x, const float *w, float eps, int n, float *y)
{
    __m256 acc[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    for (int i = 0; i < n; i += 16) {
        __m256 a = load(x + i, n - i);
        acc[0] = _mm256_fmadd_ps(a, a, acc[0]);
        if (n - i > 8) {
            __m256 b = load(x + i + 8, n - i - 8);
            acc[1] = _mm256_fmadd_ps(b, b, acc[1]);
        }
    }
    const __m256 scale = _mm256_set1_ps(1.0f / sqrtf(tree(acc[0], acc[1]) / (float)n + eps));
    for (int i = 0; i < n; i += 8)
        store(y + i, n - i,
              _mm256_mul_ps(_mm256_mul_ps(load(x + i, n - i), scale), load(w + i, n - i)));
}

/* x - mean, and 0 in lanes without an element. */
INLINE AVX2 __m256 centred(const float *x, int n, __m256 mean)
{
    return _mm256_and_ps(_mm256_sub_ps(load(x, n), mean), _mm256_castsi256_ps(first(n)));
}

AVX2 static void layernorm(const float *x, const float *w, const float *bias, float eps, int n,
                           float *y)
{
    __m256 sum[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() }, square[2] = { sum[0], sum[0] };
    for (int i = 0; i < n; i += 8)
        sum[i / 8 % 2] = _mm256_add_ps(sum[i / 8 % 2], load(x + i, n - i));
    const __m256 mean = _mm256_set1_ps(tree(sum[0], sum[1]) / (float)n);
    for (int i = 0; i < n; i += 8) {
        __m256 d = centred(x + i, n - i, mean);
        square[i / 8 % 2] = _mm256_fmadd_ps(d, d, square[i / 8 % 2]);
    }
    const __m256 scale = _mm256_set1_ps(1.0f / sqrtf(tree(square[0], square[1]) / (float)n + eps));
    for (int i = 0; i < n; i += 8)
        store(y + i, n - i,
              _mm256_fmadd_ps(_mm256_mul_ps(centred(x + i, n - i, mean), scale),
                              load(w + i, n - i), load(bias + i, n - i)));
}

AVX2 static void rope(float *x, const float *cos, const float *sin, int n)
{
    int half = n / 2;
    for (int i = 0; i < half; i += 8) {
        int left = half - i;
        __m256 a = load(x + i, left), b = load(x + half + i, left);
        __m256 c = load(cos + i, left), s = load(sin + i, left);
        store(x + i, left, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
        store(x + half + i, left, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
    }
}

/* Four pairs at a time: cos and sin are doubled, the pairs swapped, and the even elements get the
 * difference. */
AVX2 static void rope_pairs(float *x, const float *cos, const float *sin, int n)
{
    const __m256i twice = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
    for (int i = 0; i < n; i += 8) {
        int pairs = (n - i) / 2 < 4 ? (n - i) / 2 : 4;
        __m256 v = load(x + i, n - i), swapped = _mm256_permute_ps(v, 0xb1);
        __m256 c = _mm256_permutevar8x32_ps(load(cos + i / 2, pairs), twice);
        __m256 s = _mm256_permutevar8x32_ps(load(sin + i / 2, pairs), twice);
        store(x + i, n - i, _mm256_fmaddsub_ps(v, c, _mm256_mul_ps(swapped, s)));
    }
}

AVX2 static void silu_mul(const float *gate, const float *up, int n, float *y)
{
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    for (int i = 0; i < n; i += 8) {
        __m256 g = load(gate + i, n - i);
        __m256 v = _mm256_div_ps(g, _mm256_add_ps(one, exp8(_mm256_xor_ps(g, sign))));
        store(y + i, n - i, _mm256_mul_ps(v, load(up + i, n - i)));
    }
}

AVX2 static void gelu_tanh(const float *gate, const float *up, int n, float *y)
{
    for (int i = 0; i < n; i += 8) {
        __m256 v = gelu_tanh8(load(gate + i, n - i));
        store(y + i, n - i, up != NULL ? _mm256_mul_ps(v, load(up + i, n - i)) : v);
    }
}

AVX2 static void gelu_erf(const float *gate, const float *up, int n, float *y)
{
    for (int i = 0; i < n; i += 8) {
        __m256 v = gelu_erf8(load(gate + i, n - i));
        store(y + i, n - i, up != NULL ? _mm256_mul_ps(v, load(up + i, n - i)) : v);
    }
}

AVX2 static void softcap(float c, int n, float *y)
{
    const __m256 cap = _mm256_set1_ps(c);
    for (int i = 0; i < n; i += 8)
        store(y + i, n - i, _mm256_mul_ps(cap, tanh8(_mm256_div_ps(load(y + i, n - i), cap))));
}

AVX2 static void add(const float *x, int n, float *y)
{
    for (int i = 0; i < n; i += 8)
        store(y + i, n - i, _mm256_add_ps(load(y + i, n - i), load(x + i, n - i)));
}

AVX2 static void exp_n(const float *x, int n, float *y)
{
    for (int i = 0; i < n; i += 8)
        store(y + i, n - i, exp8(load(x + i, n - i)));
}

AVX2 static void to_f16(const float *x, int n, uint16_t *y)
{
    for (int i = 0; i < n; i += 8) {
        uint16_t h[8];
        __m128i v = _mm256_cvtps_ph(load(x + i, n - i),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128((__m128i *)h, v);
        memcpy(y + i, h, (size_t)(n - i < 8 ? n - i : 8) * sizeof *h);
    }
}

/* 8 elements from element i on, or as many as there are. */
INLINE AVX2 __m256 widen(const void *p, bool f32, size_t i, int n)
{
    if (f32)
        return n >= 8 ? _mm256_loadu_ps((const float *)p + i) : load((const float *)p + i, n);
    const uint16_t *h = (const uint16_t *)p + i;
    if (n >= 8)
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h));
    uint16_t part[8] = { 0 };
    memcpy(part, h, (size_t)n * sizeof *h);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)part));
}

/* Half a page (8 positions from `half` on) for 1 or 2 queries; nq and f32 are literals. */
INLINE AVX2 void scores_half(const void *k, bool f32, int hd, float scale, int nq,
                             const float *const *q, float *const *s, int half)
{
    __m256 acc[2][4];
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int a = 0; a < 4; a++)
            acc[i][a] = _mm256_setzero_ps();
    int d = 0;
    for (; d + 4 <= hd; d += 4)
        UNROLL
        for (int a = 0; a < 4; a++) {
            __m256 v = widen(k, f32, (size_t)(d + a) * KV_PAGE + (size_t)half, 8);
            UNROLL
            for (int i = 0; i < nq; i++)
                acc[i][a] = _mm256_fmadd_ps(_mm256_broadcast_ss(&q[i][d + a]), v, acc[i][a]);
        }
    UNROLL
    for (int a = 0; a < 3; a++)
        if (d + a < hd) {
            __m256 v = widen(k, f32, (size_t)(d + a) * KV_PAGE + (size_t)half, 8);
            UNROLL
            for (int i = 0; i < nq; i++)
                acc[i][a] = _mm256_fmadd_ps(_mm256_broadcast_ss(&q[i][d + a]), v, acc[i][a]);
        }
    UNROLL
    for (int i = 0; i < nq; i++) {
        __m256 sum = _mm256_add_ps(_mm256_add_ps(acc[i][0], acc[i][1]),
                                   _mm256_add_ps(acc[i][2], acc[i][3]));
        _mm256_storeu_ps(s[i] + half, _mm256_mul_ps(sum, _mm256_set1_ps(scale)));
    }
}

INLINE AVX2 void scores_type(const void *k, bool f32, int hd, float scale, int nq,
                             const float *const *q, float *const *s)
{
    for (int half = 0; half < KV_PAGE; half += 8) {
        int i = 0;
        for (; i + 2 <= nq; i += 2)
            scores_half(k, f32, hd, scale, 2, q + i, s + i, half);
        if (i < nq)
            scores_half(k, f32, hd, scale, 1, q + i, s + i, half);
    }
}

AVX2 static void scores(const void *k, bool f32, int hd, float scale, int nq,
                        const float *const *q, float *const *s)
{
    if (f32)
        scores_type(k, true, hd, scale, nq, q, s);
    else
        scores_type(k, false, hd, scale, nq, q, s);
}

AVX2 static float softmax(struct ops_softmax *m, float *s, int a, int b)
{
    float fix = 1.0f, max = -INFINITY;
    for (int j = a; j < b; j++)
        max = s[j] > max ? s[j] : max;
    __m256 sum[2] = { _mm256_loadu_ps(m->sum), _mm256_loadu_ps(m->sum + 8) };
    if (max > m->max) {
        fix = _mm256_cvtss_f32(exp8(_mm256_set1_ps(m->max - max)));
        m->max = max;
        sum[0] = _mm256_mul_ps(sum[0], _mm256_set1_ps(fix));
        sum[1] = _mm256_mul_ps(sum[1], _mm256_set1_ps(fix));
    }
    const __m256 base = _mm256_set1_ps(m->max);
    for (int i = 0; i < OPS_TILE / 8; i++) {
        const int j = 8 * i; /* visible lanes: below b, and not below a */
        __m256i seen = _mm256_andnot_si256(first(a - j), first(b - j));
        __m256 p = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + j), base));
        p = _mm256_and_ps(p, _mm256_castsi256_ps(seen));
        sum[i % 2] = _mm256_add_ps(sum[i % 2], p);
        _mm256_storeu_ps(s + j, p);
    }
    _mm256_storeu_ps(m->sum, sum[0]);
    _mm256_storeu_ps(m->sum + 8, sum[1]);
    return fix;
}

/* `nv` vectors of the head from element d on for 1 or 2 queries, the last with `last` elements.
 * nq, nv, f32 are literals. */
INLINE AVX2 void values_block(const void *v, bool f32, int hd, int a, int b, int nq,
                              const float *const *p, float *const *out, int d, int nv, int last)
{
    __m256 acc[2][4], x[4];
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int e = 0; e < nv; e++)
            acc[i][e] = load(out[i] + d + 8 * e, e == nv - 1 ? last : 8);
    for (int j = a; j < b; j++) {
        const size_t at = (size_t)j * (size_t)hd + (size_t)d;
        UNROLL
        for (int e = 0; e < nv; e++)
            x[e] = widen(v, f32, at + 8 * (size_t)e, e == nv - 1 ? last : 8);
        UNROLL
        for (int i = 0; i < nq; i++) {
            const __m256 w = _mm256_broadcast_ss(&p[i][j]);
            UNROLL
            for (int e = 0; e < nv; e++)
                acc[i][e] = _mm256_fmadd_ps(w, x[e], acc[i][e]);
        }
    }
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int e = 0; e < nv; e++)
            store(out[i] + d + 8 * e, e == nv - 1 ? last : 8, acc[i][e]);
}

INLINE AVX2 void values_nq(const void *v, bool f32, int hd, int a, int b, int nq,
                           const float *const *p, float *const *out)
{
    int d = 0;
    for (; d + 32 <= hd; d += 32)
        values_block(v, f32, hd, a, b, nq, p, out, d, 4, 8);
    for (; d + 8 <= hd; d += 8)
        values_block(v, f32, hd, a, b, nq, p, out, d, 1, 8);
    if (d < hd)
        values_block(v, f32, hd, a, b, nq, p, out, d, 1, hd - d);
}

INLINE AVX2 void values_type(const void *v, bool f32, int hd, int a, int b, int nq,
                             const float *const *p, float *const *out)
{
    int i = 0;
    for (; i + 2 <= nq; i += 2)
        values_nq(v, f32, hd, a, b, 2, p + i, out + i);
    if (i < nq)
        values_nq(v, f32, hd, a, b, 1, p + i, out + i);
}

AVX2 static void values(const void *v, bool f32, int hd, int a, int b, int nq,
                        const float *const *p, float *const *out)
{
    if (f32)
        values_type(v, true, hd, a, b, nq, p, out);
    else
        values_type(v, false, hd, a, b, nq, p, out);
}

AVX2 static void scale_n(float c, int n, float *y)
{
    for (int i = 0; i < n; i += 8)
        store(y + i, n - i, _mm256_mul_ps(load(y + i, n - i), _mm256_set1_ps(c)));
}

AVX2 static float softmax_row(int n, float *s)
{
    const __m256 none = _mm256_set1_ps(-INFINITY);
    __m256 top = none, sum[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    for (int i = 0; i < n; i += 8) {
        __m256 seen = _mm256_castsi256_ps(first(n - i));
        top = _mm256_max_ps(_mm256_blendv_ps(none, load(s + i, n - i), seen), top);
    }
    float lane[8], max = -INFINITY;
    _mm256_storeu_ps(lane, top);
    for (int i = 0; i < 8; i++)
        max = lane[i] > max ? lane[i] : max;
    for (int i = 0; i < n; i += 8) {
        __m256 e = exp8(_mm256_sub_ps(load(s + i, n - i), _mm256_set1_ps(max)));
        e = _mm256_and_ps(e, _mm256_castsi256_ps(first(n - i)));
        sum[i / 8 % 2] = _mm256_add_ps(sum[i / 8 % 2], e);
        store(s + i, n - i, e);
    }
    return tree(sum[0], sum[1]);
}

AVX2 static void softmax_grad(float c, float dot, int n, float *p, float *d)
{
    for (int i = 0; i < n; i += 8) {
        __m256 v = _mm256_mul_ps(load(p + i, n - i), _mm256_set1_ps(c));
        __m256 g = _mm256_sub_ps(load(d + i, n - i), _mm256_set1_ps(dot));
        store(p + i, n - i, v);
        store(d + i, n - i, _mm256_mul_ps(v, g));
    }
}

const struct ops ops_avx2 = {
    .rmsnorm = rmsnorm, .rope = rope,     .silu_mul = silu_mul, .add = add,
    .exp = exp_n,       .to_f16 = to_f16, .scores = scores,     .softmax = softmax,
    .values = values,   .scale = scale_n,
    .layernorm = layernorm, .rope_pairs = rope_pairs, .gelu_tanh = gelu_tanh,
    .gelu_erf = gelu_erf,   .softcap = softcap,
    .softmax_row = softmax_row, .softmax_grad = softmax_grad,
};
#endif
