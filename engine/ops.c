/* ops.c - the scalar operations, which define what the vector ones must return.
 *
 * Read this for the orders and roundings; it is written to be read, not to be fast. */
#include "engine/ops.h"

#include "engine/dot.h"
#include "engine/num.h"

#include <math.h>

/* Scaling by 2^n in two exact-or-last steps, so that subnormal results are rounded once. */
static float times_2n(float x, int n)
{
    int half = n / 2;
    return x * bits_f32((uint32_t)(127 + half) << 23) * bits_f32((uint32_t)(127 + n - half) << 23);
}

static float exp1(float x)
{
    if (isnan(x))
        return x;
    x = x < OPS_EXP_MIN ? OPS_EXP_MIN : x > OPS_EXP_MAX ? OPS_EXP_MAX : x;
    float n = (x * OPS_LOG2E + OPS_ROUND) - OPS_ROUND;
    float r = fmaf(n, -OPS_LN2_HI, x);
    r = fmaf(n, -OPS_LN2_LO, r);
    float q = fmaf(OPS_EXP_Q5, r, OPS_EXP_Q4);
    q = fmaf(q, r, OPS_EXP_Q3);
    q = fmaf(q, r, OPS_EXP_Q2);
    q = fmaf(q, r, OPS_EXP_Q1);
    q = fmaf(q, r, OPS_EXP_Q0);
    return times_2n(fmaf(r * r, q, r) + 1.0f, (int)n);
}

static void rmsnorm(const float *x, const float *w, float eps, int n, float *y)
{
    float lane[16] = { 0 };
    for (int i = 0; i < n; i++)
        lane[i % 16] = fmaf(x[i], x[i], lane[i % 16]);
    float scale = 1.0f / sqrtf(dot_tree(lane) / (float)n + eps);
    for (int i = 0; i < n; i++)
        y[i] = x[i] * scale * w[i];
}

static void rope(float *x, const float *cos, const float *sin, int hd)
{
    int half = hd / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = fmaf(a, cos[i], -(b * sin[i]));
        x[i + half] = fmaf(b, cos[i], a * sin[i]);
    }
}

static void silu_mul(const float *gate, const float *up, int n, float *y)
{
    for (int i = 0; i < n; i++)
        y[i] = gate[i] / (1.0f + exp1(-gate[i])) * up[i];
}

static void add(const float *x, int n, float *y)
{
    for (int i = 0; i < n; i++)
        y[i] += x[i];
}

static void exp_n(const float *x, int n, float *y)
{
    for (int i = 0; i < n; i++)
        y[i] = exp1(x[i]);
}

static void to_f16(const float *x, int n, uint16_t *y)
{
    for (int i = 0; i < n; i++)
        y[i] = f32_to_f16(x[i]);
}

static float element(const void *p, bool f32, size_t i)
{
    return f32 ? ((const float *)p)[i] : f16_to_f32(((const uint16_t *)p)[i]);
}

static void scores(const void *k, bool f32, int hd, float scale, int nq, const float *const *q,
                   float *const *s)
{
    for (int i = 0; i < nq; i++) {
        for (int j = 0; j < KV_PAGE; j++) {
            float acc[4] = { 0 };
            for (int d = 0; d < hd; d++)
                acc[d % 4] = fmaf(q[i][d], element(k, f32, (size_t)d * KV_PAGE + (size_t)j),
                                  acc[d % 4]);
            s[i][j] = ((acc[0] + acc[1]) + (acc[2] + acc[3])) * scale;
        }
    }
}

static float softmax(struct ops_softmax *m, float *s, int a, int b)
{
    float top = -INFINITY, fix = 1.0f;
    for (int j = a; j < b; j++)
        top = s[j] > top ? s[j] : top;
    if (top > m->max) {
        fix = exp1(m->max - top);
        m->max = top;
        for (int l = 0; l < 16; l++)
            m->sum[l] *= fix;
    }
    for (int j = 0; j < OPS_TILE; j++) {
        s[j] = j >= a && j < b ? exp1(s[j] - m->max) : 0.0f;
        m->sum[j % 16] += s[j];
    }
    return fix;
}

static void values(const void *v, bool f32, int hd, int a, int b, int nq, const float *const *p,
                   float *const *out)
{
    for (int i = 0; i < nq; i++)
        for (int j = a; j < b; j++)
            for (int d = 0; d < hd; d++)
                out[i][d] = fmaf(p[i][j], element(v, f32, (size_t)j * (size_t)hd + (size_t)d),
                                 out[i][d]);
}

static void scale_n(float c, int n, float *y)
{
    for (int i = 0; i < n; i++)
        y[i] *= c;
}

const struct ops ops_scalar = {
    .rmsnorm = rmsnorm, .rope = rope,     .silu_mul = silu_mul, .add = add,
    .exp = exp_n,       .to_f16 = to_f16, .scores = scores,     .softmax = softmax,
    .values = values,   .scale = scale_n,
};

const struct ops *ops_for(enum isa isa)
{
#if defined(__x86_64__)
    if (isa == ISA_AVX2)
        return &ops_avx2;
    if (isa == ISA_AVX512)
        return &ops_avx512;
#endif
    (void)isa;
    return &ops_scalar;
}
