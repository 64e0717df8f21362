/* ops_avx512_attn.c - the leaves of attention of ops_attn.c, 16 lanes at a time, with the same bits.
 *
 * Numbers of queries and vectors and the type are literals at every call of an inlined body, so that
 * accumulators live in registers.  A page holds 16 positions: one vector of K^T, and of weights. */
#include "engine/ops_attn_int.h"
#include "engine/ops_avx512_int.h"

#if defined(__x86_64__)
#include "engine/num.h"

#include <math.h>
#include <stddef.h>

/* Elements i .. i + 15 of the codes, without their scales. */
INLINE AVX512 __m512 load(const void *p, enum kv_type type, size_t i)
{
    if (type == KV_F32)
        return _mm512_loadu_ps((const float *)p + i);
    if (type == KV_F16)
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)p + i)));
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)((const int8_t *)p + i))));
}

INLINE AVX512 __m512 load_tail(const void *p, enum kv_type type, size_t i, __mmask16 m)
{
    if (type == KV_F32)
        return _mm512_maskz_loadu_ps(m, (const float *)p + i);
    if (type == KV_F16)
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, (const uint16_t *)p + i));
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, (const int8_t *)p + i)));
}

/* The scales of a block, one for each position of the page. */
INLINE AVX512 __m512 scales(const void *p, int hd, int block)
{
    const uint16_t *s = (const uint16_t *)((const int8_t *)p + (size_t)hd * KV_PAGE);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(s + block * KV_PAGE)));
}

/* ret[i] = the sum of q k over elements [begin, end). */
INLINE AVX512 void scores_part(const void *k, enum kv_type type, int begin, int end, int nq,
                               const float *const *q, __m512 *ret)
{
    __m512 acc[OPS_QUERIES][4];
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int a = 0; a < 4; a++)
            acc[i][a] = _mm512_setzero_ps();
    int d = begin;
    for (; d + 4 <= end; d += 4)
        UNROLL
        for (int a = 0; a < 4; a++) {
            __m512 v = load(k, type, (size_t)(d + a) * KV_PAGE);
            UNROLL
            for (int i = 0; i < nq; i++)
                acc[i][a] = _mm512_fmadd_ps(_mm512_set1_ps(q[i][d + a]), v, acc[i][a]);
        }
    UNROLL
    for (int a = 0; a < 3; a++)
        if (d + a < end) {
            __m512 v = load(k, type, (size_t)(d + a) * KV_PAGE);
            UNROLL
            for (int i = 0; i < nq; i++)
                acc[i][a] = _mm512_fmadd_ps(_mm512_set1_ps(q[i][d + a]), v, acc[i][a]);
        }
    UNROLL
    for (int i = 0; i < nq; i++)
        ret[i] = _mm512_add_ps(_mm512_add_ps(acc[i][0], acc[i][1]),
                               _mm512_add_ps(acc[i][2], acc[i][3]));
}

INLINE AVX512 void scores_nq(const void *k, enum kv_type type, int hd, float scale, int nq,
                             const float *const *q, float *const *s)
{
    __m512 sum[OPS_QUERIES], part[OPS_QUERIES];
    if (type != KV_Q8) {
        scores_part(k, type, 0, hd, nq, q, sum);
    } else {
        UNROLL
        for (int i = 0; i < nq; i++)
            sum[i] = _mm512_setzero_ps();
        for (int d = 0; d < hd; d += KV_Q8_BLOCK) {
            const __m512 c = scales(k, hd, d / KV_Q8_BLOCK);
            scores_part(k, type, d, d + KV_Q8_BLOCK < hd ? d + KV_Q8_BLOCK : hd, nq, q, part);
            UNROLL
            for (int i = 0; i < nq; i++)
                sum[i] = _mm512_fmadd_ps(part[i], c, sum[i]);
        }
    }
    UNROLL
    for (int i = 0; i < nq; i++)
        _mm512_storeu_ps(s[i], _mm512_mul_ps(sum[i], _mm512_set1_ps(scale)));
}

INLINE AVX512 void scores_type(const void *k, enum kv_type type, int hd, float scale, int nq,
                               const float *const *q, float *const *s)
{
    switch (nq) {
    case 1: scores_nq(k, type, hd, scale, 1, q, s); break;
    case 2: scores_nq(k, type, hd, scale, 2, q, s); break;
    case 3: scores_nq(k, type, hd, scale, 3, q, s); break;
    case 4: scores_nq(k, type, hd, scale, 4, q, s); break;
    }
}

AVX512 void avx512_scores(const void *k, enum kv_type type, int hd, float scale, int nq,
                          const float *const *q, float *const *s)
{
    switch (type) {
    case KV_F16: scores_type(k, KV_F16, hd, scale, nq, q, s); break;
    case KV_F32: scores_type(k, KV_F32, hd, scale, nq, q, s); break;
    case KV_Q8: scores_type(k, KV_Q8, hd, scale, nq, q, s); break;
    }
}

INLINE AVX512 uint64_t visible(int a, int b)
{
    return (b >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << b) - 1) & ~(uint64_t)0 << a;
}

/* First the maximum of every query, then the exponentials of every query: chains that do not wait
 * for each other. */
INLINE AVX512 void softmax_nq(int nq, struct ops_softmax *const *m, float *const *s, const int *a,
                              const int *b, float *ret_fix)
{
    const __m512 none = _mm512_set1_ps(-INFINITY);
    float max[OPS_QUERIES];
    UNROLL
    for (int q = 0; q < nq; q++) {
        const uint64_t seen = visible(a[q], b[q]);
        __m512 top = none;
        UNROLL
        for (int i = 0; i < 4; i++) {
            const __m512 v = _mm512_mask_loadu_ps(none, (__mmask16)(seen >> 16 * i), s[q] + 16 * i);
            top = _mm512_max_ps(v, top);
        }
        max[q] = _mm512_reduce_max_ps(top);
    }
    UNROLL
    for (int q = 0; q < nq; q++) {
        ret_fix[q] = 1.0f;
        if (!(max[q] > m[q]->max))
            continue;
        const __m512 fix = exp16(_mm512_set1_ps(m[q]->max - max[q]));
        ret_fix[q] = _mm512_cvtss_f32(fix);
        m[q]->max = max[q];
        _mm512_storeu_ps(m[q]->sum, _mm512_mul_ps(_mm512_loadu_ps(m[q]->sum), fix));
    }
    UNROLL
    for (int q = 0; q < nq; q++) {
        const uint64_t seen = visible(a[q], b[q]);
        const __m512 base = _mm512_set1_ps(m[q]->max);
        __m512 sum = _mm512_loadu_ps(m[q]->sum);
        UNROLL
        for (int i = 0; i < 4; i++) {
            __m512 v = exp16(_mm512_sub_ps(_mm512_loadu_ps(s[q] + 16 * i), base));
            v = _mm512_maskz_mov_ps((__mmask16)(seen >> 16 * i), v);
            sum = _mm512_add_ps(sum, v);
            _mm512_storeu_ps(s[q] + 16 * i, v);
        }
        _mm512_storeu_ps(m[q]->sum, sum);
    }
}

AVX512 void avx512_softmax(int nq, struct ops_softmax *const *m, float *const *s, const int *a,
                           const int *b, float *ret_fix)
{
    switch (nq) {
    case 1: softmax_nq(1, m, s, a, b, ret_fix); break;
    case 2: softmax_nq(2, m, s, a, b, ret_fix); break;
    case 3: softmax_nq(3, m, s, a, b, ret_fix); break;
    case 4: softmax_nq(4, m, s, a, b, ret_fix); break;
    }
}

/* `nv` vectors of the head from element d on, a multiple of 16 nv; the last may be short. */
INLINE AVX512 void values_part(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,
                               const float *const *p, float *const *out, int d, int nv, __mmask16 m)
{
    enum { PER_BLOCK = KV_Q8_BLOCK / 16 }; /* vectors */
    __m512 acc[OPS_QUERIES][4];
    float weight[OPS_QUERIES][4 / PER_BLOCK][KV_PAGE];
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int e = 0; e < nv; e++)
            acc[i][e] = _mm512_maskz_loadu_ps(e == nv - 1 ? m : (__mmask16)0xffff,
                                              out[i] + d + 16 * e);
    for (int page = a / KV_PAGE; page * KV_PAGE < b; page++) {
        const int first = page * KV_PAGE, begin = a > first ? a - first : 0;
        const int end = b - first < KV_PAGE ? b - first : KV_PAGE;
        if (type == KV_Q8)
            UNROLL
            for (int c = 0; c < (nv + PER_BLOCK - 1) / PER_BLOCK; c++) {
                const __m512 scale = scales(v[page], hd, d / KV_Q8_BLOCK + c);
                UNROLL
                for (int i = 0; i < nq; i++)
                    _mm512_storeu_ps(weight[i][c],
                                     _mm512_mul_ps(_mm512_loadu_ps(p[i] + first), scale));
            }
        for (int j = begin; j < end; j++) {
            const size_t at = (size_t)j * (size_t)hd + (size_t)d;
            __m512 x[4];
            UNROLL
            for (int e = 0; e < nv; e++)
                x[e] = e == nv - 1 ? load_tail(v[page], type, at + 16 * (size_t)e, m)
                                   : load(v[page], type, at + 16 * (size_t)e);
            UNROLL
            for (int i = 0; i < nq; i++)
                UNROLL
                for (int e = 0; e < nv; e++) {
                    const float w = type == KV_Q8 ? weight[i][e / PER_BLOCK][j] : p[i][first + j];
                    acc[i][e] = _mm512_fmadd_ps(_mm512_set1_ps(w), x[e], acc[i][e]);
                }
        }
    }
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int e = 0; e < nv; e++)
            _mm512_mask_storeu_ps(out[i] + d + 16 * e, e == nv - 1 ? m : (__mmask16)0xffff,
                                  acc[i][e]);
}

INLINE AVX512 void values_nq(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,
                             const float *const *p, float *const *out)
{
    int d = 0;
    for (; d + 64 <= hd; d += 64)
        values_part(v, type, hd, a, b, nq, p, out, d, 4, (__mmask16)0xffff);
    for (; d + 32 <= hd; d += 32)
        values_part(v, type, hd, a, b, nq, p, out, d, 2, (__mmask16)0xffff);
    for (; d < hd; d += 16)
        values_part(v, type, hd, a, b, nq, p, out, d, 1, tail(hd - d));
}

INLINE AVX512 void values_type(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,
                               const float *const *p, float *const *out)
{
    switch (nq) {
    case 1: values_nq(v, type, hd, a, b, 1, p, out); break;
    case 2: values_nq(v, type, hd, a, b, 2, p, out); break;
    case 3: values_nq(v, type, hd, a, b, 3, p, out); break;
    case 4: values_nq(v, type, hd, a, b, 4, p, out); break;
    }
}

AVX512 void avx512_values(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,
                          const float *const *p, float *const *out)
{
    switch (type) {
    case KV_F16: values_type(v, KV_F16, hd, a, b, nq, p, out); break;
    case KV_F32: values_type(v, KV_F32, hd, a, b, nq, p, out); break;
    case KV_Q8: values_type(v, KV_Q8, hd, a, b, nq, p, out); break;
    }
}

AVX512 void avx512_to_q8(const float *x, int n, int8_t *codes, uint16_t *ret_scales)
{
    const __m512i size = _mm512_set1_epi32(0x7fffffff), most = _mm512_set1_epi32(127);
    const __m512i least = _mm512_set1_epi32(-127);
    int at = 0;
    for (; at + KV_Q8_BLOCK <= n; at += KV_Q8_BLOCK) {
        const __m512 v[2] = { _mm512_loadu_ps(x + at), _mm512_loadu_ps(x + at + 16) };
        const __m512i a = _mm512_and_si512(_mm512_castps_si512(v[0]), size);
        const __m512i b = _mm512_and_si512(_mm512_castps_si512(v[1]), size);
        const uint32_t top = _mm512_reduce_max_epu32(_mm512_max_epu32(a, b));
        const __m512 times = _mm512_set1_ps(ops_q8_scale(top, ret_scales + at / KV_Q8_BLOCK));
        UNROLL
        for (int i = 0; i < 2; i++) {
            __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], times));
            c = _mm512_max_epi32(_mm512_min_epi32(c, most), least);
            /* Where nothing is representable, times is 0 and x may be a NaN. */
            c = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(times, _mm512_setzero_ps(), _CMP_GT_OQ), c);
            _mm_storeu_si128((__m128i *)(codes + at + 16 * i), _mm512_cvtepi32_epi8(c));
        }
    }
    if (at < n)
        scalar_to_q8(x + at, n - at, codes + at, ret_scales + at / KV_Q8_BLOCK);
}
#endif
