/* ops_avx512.c - the operations of ops.c, 16 lanes at a time, with the same bits.
 *
 * Tails are masked: a lane without an element keeps its value, as a scalar lane does that gets
 * nothing.  Compiled for AVX-512 F/BW/DQ/VL by target attributes; called only where isa_select()
 * found them. */
#include "engine/ops_attn_int.h"
#include "engine/ops_avx512_int.h"

#if defined(__x86_64__)
#include <math.h>
#include <stddef.h>

INLINE AVX512 float tree(__m512 v)
{
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b)); /* 0+2, 1+3 */
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
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
    .exp = exp_n,       .to_f16 = to_f16, .scores = avx512_scores,     .softmax = avx512_softmax,
    .values = avx512_values,   .scale = scale_n,
    .layernorm = layernorm, .rope_pairs = rope_pairs, .gelu_tanh = gelu_tanh,
    .gelu_erf = gelu_erf,   .softcap = softcap,
    .to_q8 = avx512_to_q8,
    .softmax_row = softmax_row, .softmax_grad = softmax_grad,
};
#endif
