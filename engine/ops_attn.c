/* ops_attn.c - the leaves of attention that define what the vector ones must return. */
#include "engine/ops_attn_int.h"

#include "engine/num.h"

#include <math.h>
#include <stddef.h>

/* Without its scale. */
static float element(const void *p, enum kv_type type, size_t i)
{
    switch (type) {
    case KV_F16: return f16_to_f32(((const uint16_t *)p)[i]);
    case KV_F32: return ((const float *)p)[i];
    case KV_Q8: break;
    }
    return ((const int8_t *)p)[i];
}

static float block_scale(const void *p, int hd, int block, int j)
{
    const uint16_t *s = (const uint16_t *)((const int8_t *)p + (size_t)hd * KV_PAGE);
    return f16_to_f32(s[block * KV_PAGE + j]);
}

/* Position j: the sum over elements [begin, end). */
static float score_part(const void *k, enum kv_type type, int begin, int end, int j, const float *q)
{
    float acc[4] = { 0 };
    for (int d = begin; d < end; d++)
        acc[d % 4] = fmaf(q[d], element(k, type, (size_t)d * KV_PAGE + (size_t)j), acc[d % 4]);
    return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

static float score(const void *k, enum kv_type type, int hd, int j, const float *q)
{
    if (type != KV_Q8)
        return score_part(k, type, 0, hd, j, q);
    float sum = 0;
    for (int d = 0; d < hd; d += KV_Q8_BLOCK) {
        const int end = d + KV_Q8_BLOCK < hd ? d + KV_Q8_BLOCK : hd;
        sum = fmaf(score_part(k, type, d, end, j, q), block_scale(k, hd, d / KV_Q8_BLOCK, j), sum);
    }
    return sum;
}

void scalar_scores(const void *k, enum kv_type type, int hd, float scale, int nq,
                   const float *const *q, float *const *s)
{
    for (int i = 0; i < nq; i++)
        for (int j = 0; j < KV_PAGE; j++)
            s[i][j] = score(k, type, hd, j, q[i]) * scale;
}

static float softmax(struct ops_softmax *m, float *s, int a, int b)
{
    float top = -INFINITY, fix = 1.0f;
    for (int j = a; j < b; j++)
        top = s[j] > top ? s[j] : top;
    if (top > m->max) {
        fix = m->max - top;
        ops_scalar.exp(&fix, 1, &fix);
        m->max = top;
        for (int l = 0; l < 16; l++)
            m->sum[l] *= fix;
    }
    for (int j = a; j < b; j++)
        s[j] -= m->max;
    ops_scalar.exp(s + a, b - a, s + a);
    for (int j = 0; j < OPS_TILE; j++) {
        s[j] = j >= a && j < b ? s[j] : 0.0f;
        m->sum[j % 16] += s[j];
    }
    return fix;
}

void scalar_softmax(int nq, struct ops_softmax *const *m, float *const *s, const int *a,
                    const int *b, float *ret_fix)
{
    for (int i = 0; i < nq; i++)
        ret_fix[i] = softmax(m[i], s[i], a[i], b[i]);
}

void scalar_values(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,
                   const float *const *p, float *const *out)
{
    for (int i = 0; i < nq; i++)
        for (int j = a; j < b; j++) {
            const void *page = v[j / KV_PAGE];
            const int at = j % KV_PAGE;
            for (int d = 0; d < hd; d++) {
                float w = p[i][j];
                if (type == KV_Q8)
                    w *= block_scale(page, hd, d / KV_Q8_BLOCK, at);
                out[i][d] = fmaf(w, element(page, type, (size_t)at * (size_t)hd + (size_t)d),
                                 out[i][d]);
            }
        }
}

float ops_q8_scale(uint32_t top, uint16_t *ret_scale)
{
    enum { F16_INFINITE = 0x7c00, F16_NAN = 0x7e00 };
    const uint16_t h = f32_to_f16(bits_f32(top) / 127.0f);
    *ret_scale = (h & 0x7fff) >= F16_INFINITE ? F16_NAN : h;
    return *ret_scale == F16_NAN || h == 0 ? 0 : 1.0f / f16_to_f32(h);
}

void scalar_to_q8(const float *x, int n, int8_t *codes, uint16_t *scales)
{
    for (int at = 0; at < n; at += KV_Q8_BLOCK) {
        const int end = at + KV_Q8_BLOCK < n ? at + KV_Q8_BLOCK : n;
        uint32_t top = 0;
        for (int i = at; i < end; i++) {
            const uint32_t size = f32_bits(x[i]) & 0x7fffffff;
            top = size > top ? size : top;
        }
        const float times = ops_q8_scale(top, &scales[at / KV_Q8_BLOCK]);
        for (int i = at; i < end; i++) {
            long c = times > 0 ? lrintf(x[i] * times) : 0;
            codes[i] = (int8_t)(c > 127 ? 127 : c < -127 ? -127 : c);
        }
    }
}
