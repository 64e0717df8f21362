/* ops_avx2.c - the operations of ops.c, 8 lanes at a time, with the same bits.
 *
 * Where the scalar code has 16 lanes there are two vectors.  Tails are loaded as zeros and stored
 * under a mask. */
#include "engine/ops_attn_int.h"
#include "engine/ops_avx2_int.h"

#if defined(__x86_64__)
#include <math.h>
#include <stddef.h>
#include <string.h>

INLINE AVX2 float tree(__m256 lo, __m256 hi)
{
    __m256 a = _mm256_add_ps(lo, hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
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
    .exp = exp_n,       .to_f16 = to_f16, .scores = avx2_scores,     .softmax = avx2_softmax,
    .values = avx2_values,   .scale = scale_n,
    .layernorm = layernorm, .rope_pairs = rope_pairs, .gelu_tanh = gelu_tanh,
    .gelu_erf = gelu_erf,   .softcap = softcap,
    .to_q8 = avx2_to_q8,
    .softmax_row = softmax_row, .softmax_grad = softmax_grad,
};
#endif
