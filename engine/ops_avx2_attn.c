/* ops_avx2_attn.c - the leaves of attention of ops_attn.c, 8 lanes at a time, with the same bits.
 *
 * As in ops_avx512_attn.c; half as many registers hold two queries at a time. */
#include "engine/ops_attn_int.h"
#include "engine/ops_avx2_int.h"

#if defined(__x86_64__)
#include "engine/num.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

/* Elements i .. i + n - 1 (n <= 8) of the codes, without their scales. */
INLINE AVX2 __m256 widen(const void *p, enum kv_type type, size_t i, int n)
{
    if (type == KV_F32)
        return load((const float *)p + i, n);
    if (type == KV_F16) {
        const uint16_t *h = (const uint16_t *)p + i;
        if (n >= 8)
            return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h));
        uint16_t part[8] = { 0 };
        memcpy(part, h, (size_t)n * sizeof *h);
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)part));
    }
    const int8_t *c = (const int8_t *)p + i;
    if (n >= 8)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)c)));
    int8_t part[8] = { 0 };
    memcpy(part, c, (size_t)n);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)part)));
}

/* The scales of a block, for 8 positions of the page from `half` on. */
INLINE AVX2 __m256 scales(const void *p, int hd, int block, int half)
{
    const uint16_t *s = (const uint16_t *)((const int8_t *)p + (size_t)hd * KV_PAGE);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(s + block * KV_PAGE + half)));
}

/* ret[i] = the sum of q k over elements [begin, end), of 8 positions from `half` on. */
INLINE AVX2 void scores_part(const void *k, enum kv_type type, int begin, int end, int nq,
                             const float *const *q, int half, __m256 *ret)
{
    __m256 acc[2][4];
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int a = 0; a < 4; a++)
            acc[i][a] = _mm256_setzero_ps();
    int d = begin;
    for (; d + 4 <= end; d += 4)
        UNROLL
        for (int a = 0; a < 4; a++) {
            __m256 v = widen(k, type, (size_t)(d + a) * KV_PAGE + (size_t)half, 8);
            UNROLL
            for (int i = 0; i < nq; i++)
                acc[i][a] = _mm256_fmadd_ps(_mm256_broadcast_ss(&q[i][d + a]), v, acc[i][a]);
        }
    UNROLL
    for (int a = 0; a < 3; a++)
        if (d + a < end) {
            __m256 v = widen(k, type, (size_t)(d + a) * KV_PAGE + (size_t)half, 8);
            UNROLL
            for (int i = 0; i < nq; i++)
                acc[i][a] = _mm256_fmadd_ps(_mm256_broadcast_ss(&q[i][d + a]), v, acc[i][a]);
        }
    UNROLL
    for (int i = 0; i < nq; i++)
        ret[i] = _mm256_add_ps(_mm256_add_ps(acc[i][0], acc[i][1]),
                               _mm256_add_ps(acc[i][2], acc[i][3]));
}

INLINE AVX2 void scores_nq(const void *k, enum kv_type type, int hd, float scale, int nq,
                           const float *const *q, float *const *s)
{
    for (int half = 0; half < KV_PAGE; half += 8) {
        __m256 sum[2], part[2];
        if (type != KV_Q8) {
            scores_part(k, type, 0, hd, nq, q, half, sum);
        } else {
            UNROLL
            for (int i = 0; i < nq; i++)
                sum[i] = _mm256_setzero_ps();
            for (int d = 0; d < hd; d += KV_Q8_BLOCK) {
                const __m256 c = scales(k, hd, d / KV_Q8_BLOCK, half);
                scores_part(k, type, d, d + KV_Q8_BLOCK < hd ? d + KV_Q8_BLOCK : hd, nq, q, half,
                            part);
                UNROLL
                for (int i = 0; i < nq; i++)
                    sum[i] = _mm256_fmadd_ps(part[i], c, sum[i]);
            }
        }
        UNROLL
        for (int i = 0; i < nq; i++)
            _mm256_storeu_ps(s[i] + half, _mm256_mul_ps(sum[i], _mm256_set1_ps(scale)));
    }
}

INLINE AVX2 void scores_type(const void *k, enum kv_type type, int hd, float scale, int nq,
                             const float *const *q, float *const *s)
{
    int i = 0;
    for (; i + 2 <= nq; i += 2)
        scores_nq(k, type, hd, scale, 2, q + i, s + i);
    if (i < nq)
        scores_nq(k, type, hd, scale, 1, q + i, s + i);
}

AVX2 void avx2_scores(const void *k, enum kv_type type, int hd, float scale, int nq,
                      const float *const *q, float *const *s)
{
    switch (type) {
    case KV_F16: scores_type(k, KV_F16, hd, scale, nq, q, s); break;
    case KV_F32: scores_type(k, KV_F32, hd, scale, nq, q, s); break;
    case KV_Q8: scores_type(k, KV_Q8, hd, scale, nq, q, s); break;
    }
}

AVX2 static float softmax(struct ops_softmax *m, float *s, int a, int b)
{
    const __m256 none = _mm256_set1_ps(-INFINITY);
    __m256 top = none;
    float lane[8], max = -INFINITY, fix = 1.0f;
    for (int j = 0; j < OPS_TILE; j += 8) { /* visible lanes: below b, and not below a */
        const __m256i seen = _mm256_andnot_si256(first(a - j), first(b - j));
        top = _mm256_max_ps(
            _mm256_blendv_ps(none, _mm256_loadu_ps(s + j), _mm256_castsi256_ps(seen)), top);
    }
    _mm256_storeu_ps(lane, top);
    for (int i = 0; i < 8; i++)
        max = lane[i] > max ? lane[i] : max;
    __m256 sum[2] = { _mm256_loadu_ps(m->sum), _mm256_loadu_ps(m->sum + 8) };
    if (max > m->max) {
        fix = _mm256_cvtss_f32(exp8(_mm256_set1_ps(m->max - max)));
        m->max = max;
        sum[0] = _mm256_mul_ps(sum[0], _mm256_set1_ps(fix));
        sum[1] = _mm256_mul_ps(sum[1], _mm256_set1_ps(fix));
    }
    const __m256 base = _mm256_set1_ps(m->max);
    for (int i = 0; i < OPS_TILE / 8; i++) {
        const int j = 8 * i;
        const __m256i seen = _mm256_andnot_si256(first(a - j), first(b - j));
        __m256 p = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + j), base));
        p = _mm256_and_ps(p, _mm256_castsi256_ps(seen));
        sum[i % 2] = _mm256_add_ps(sum[i % 2], p);
        _mm256_storeu_ps(s + j, p);
    }
    _mm256_storeu_ps(m->sum, sum[0]);
    _mm256_storeu_ps(m->sum + 8, sum[1]);
    return fix;
}

AVX2 void avx2_softmax(int nq, struct ops_softmax *const *m, float *const *s, const int *a,
                       const int *b, float *ret_fix)
{
    for (int i = 0; i < nq; i++)
        ret_fix[i] = softmax(m[i], s[i], a[i], b[i]);
}

/* `nv` vectors of the head from element d on, the last with `last` elements, for 1 or 2 queries.
 * They belong to one block of scales. */
INLINE AVX2 void values_part(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,
                             const float *const *p, float *const *out, int d, int nv, int last)
{
    __m256 acc[2][4], x[4];
    float weight[2][KV_PAGE];
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int e = 0; e < nv; e++)
            acc[i][e] = load(out[i] + d + 8 * e, e == nv - 1 ? last : 8);
    for (int page = a / KV_PAGE; page * KV_PAGE < b; page++) {
        const int begin_page = page * KV_PAGE, begin = a > begin_page ? a - begin_page : 0;
        const int end = b - begin_page < KV_PAGE ? b - begin_page : KV_PAGE;
        const float *w[2];
        UNROLL
        for (int i = 0; i < nq; i++) {
            w[i] = p[i] + begin_page;
            if (type != KV_Q8)
                continue;
            UNROLL
            for (int half = 0; half < KV_PAGE; half += 8)
                _mm256_storeu_ps(weight[i] + half,
                                 _mm256_mul_ps(_mm256_loadu_ps(w[i] + half),
                                               scales(v[page], hd, d / KV_Q8_BLOCK, half)));
            w[i] = weight[i];
        }
        for (int j = begin; j < end; j++) {
            const size_t at = (size_t)j * (size_t)hd + (size_t)d;
            UNROLL
            for (int e = 0; e < nv; e++)
                x[e] = widen(v[page], type, at + 8 * (size_t)e, e == nv - 1 ? last : 8);
            UNROLL
            for (int i = 0; i < nq; i++) {
                const __m256 c = _mm256_broadcast_ss(&w[i][j]);
                UNROLL
                for (int e = 0; e < nv; e++)
                    acc[i][e] = _mm256_fmadd_ps(c, x[e], acc[i][e]);
            }
        }
    }
    UNROLL
    for (int i = 0; i < nq; i++)
        UNROLL
        for (int e = 0; e < nv; e++)
            store(out[i] + d + 8 * e, e == nv - 1 ? last : 8, acc[i][e]);
}

INLINE AVX2 void values_nq(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,
                           const float *const *p, float *const *out)
{
    int d = 0;
    for (; d + 32 <= hd; d += 32)
        values_part(v, type, hd, a, b, nq, p, out, d, 4, 8);
    for (; d + 8 <= hd; d += 8)
        values_part(v, type, hd, a, b, nq, p, out, d, 1, 8);
    if (d < hd)
        values_part(v, type, hd, a, b, nq, p, out, d, 1, hd - d);
}

INLINE AVX2 void values_type(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,
                             const float *const *p, float *const *out)
{
    int i = 0;
    for (; i + 2 <= nq; i += 2)
        values_nq(v, type, hd, a, b, 2, p + i, out + i);
    if (i < nq)
        values_nq(v, type, hd, a, b, 1, p + i, out + i);
}

AVX2 void avx2_values(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,
                      const float *const *p, float *const *out)
{
    switch (type) {
    case KV_F16: values_type(v, KV_F16, hd, a, b, nq, p, out); break;
    case KV_F32: values_type(v, KV_F32, hd, a, b, nq, p, out); break;
    case KV_Q8: values_type(v, KV_Q8, hd, a, b, nq, p, out); break;
    }
}

AVX2 void avx2_to_q8(const float *x, int n, int8_t *codes, uint16_t *ret_scales)
{
    const __m256i size = _mm256_set1_epi32(0x7fffffff), most = _mm256_set1_epi32(127);
    const __m256i least = _mm256_set1_epi32(-127);
    int at = 0;
    for (; at + KV_Q8_BLOCK <= n; at += KV_Q8_BLOCK) {
        __m256i c[4], size_of = _mm256_setzero_si256();
        uint32_t lane[8], top = 0;
        UNROLL
        for (int i = 0; i < 4; i++) {
            c[i] = _mm256_loadu_si256((const __m256i *)(x + at + 8 * i));
            size_of = _mm256_max_epu32(size_of, _mm256_and_si256(c[i], size));
        }
        _mm256_storeu_si256((__m256i *)lane, size_of);
        for (int i = 0; i < 8; i++)
            top = lane[i] > top ? lane[i] : top;
        const __m256 times = _mm256_set1_ps(ops_q8_scale(top, ret_scales + at / KV_Q8_BLOCK));
        /* Where nothing is representable, times is 0 and x may be a NaN. */
        const __m256 keep = _mm256_cmp_ps(times, _mm256_setzero_ps(), _CMP_GT_OQ);
        UNROLL
        for (int i = 0; i < 4; i++) {
            c[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(c[i]), times));
            c[i] = _mm256_max_epi32(_mm256_min_epi32(c[i], most), least);
            c[i] = _mm256_and_si256(c[i], _mm256_castps_si256(keep));
        }
        /* Packing works on halves of 128 bits: words 0 1 4 5 8 9 12 13, then the others. */
        const __m256i b = _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]),
                                             _mm256_packs_epi32(c[2], c[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256((__m256i *)(codes + at), _mm256_permutevar8x32_epi32(b, order));
    }
    if (at < n)
        scalar_to_q8(x + at, n - at, codes + at, ret_scales + at / KV_Q8_BLOCK);
}
#endif
