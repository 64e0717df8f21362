/* ops.c - the scalar operations, which define what the vector ones must return.
 *
 * Read this for the orders and roundings; it is written to be read, not to be fast. */
#include "engine/ops_attn_int.h"

#include "engine/dot.h"
#include "engine/num.h"

#include <math.h>

/* Scaling by 2^n in two exact-or-last steps, so that subnormal results are rounded once. */
static float times_2n(float x, int n)
{
    int half = n / 2;
    return x * bits_f32((uint32_t)(127 + half) << 23) * bits_f32((uint32_t)(127 + n - half) << 23);
}

/* exp(x) = 2^n (1 + p); returns p. */
static float exp_parts(float x, float *ret_n)
{
    float n = (x * OPS_LOG2E + OPS_ROUND) - OPS_ROUND;
    float r = fmaf(n, -OPS_LN2_HI, x);
    r = fmaf(n, -OPS_LN2_LO, r);
    float q = fmaf(OPS_EXP_Q5, r, OPS_EXP_Q4);
    q = fmaf(q, r, OPS_EXP_Q3);
    q = fmaf(q, r, OPS_EXP_Q2);
    q = fmaf(q, r, OPS_EXP_Q1);
    q = fmaf(q, r, OPS_EXP_Q0);
    *ret_n = n;
    return fmaf(r * r, q, r);
}

static float exp1(float x)
{
    if (isnan(x))
        return x;
    float n, p = exp_parts(x < OPS_EXP_MIN ? OPS_EXP_MIN : x > OPS_EXP_MAX ? OPS_EXP_MAX : x, &n);
    return times_2n(p + 1.0f, (int)n);
}

static float tanh1(float x)
{
    if (isnan(x))
        return x;
    x = x < -OPS_TANH_MAX ? -OPS_TANH_MAX : x > OPS_TANH_MAX ? OPS_TANH_MAX : x;
    float n, p = exp_parts(2.0f * x, &n);
    float two_n = times_2n(1.0f, (int)n), m = fmaf(p, two_n, two_n - 1.0f);
    return m / (m + 2.0f);
}

static float gelu_tanh1(float u)
{
    float z = u * fmaf(u * u, OPS_GELU_B, OPS_GELU_A); /* -2z, in fact */
    return u / (1.0f + exp1(z));
}

static float gelu_erf1(float u)
{
    static const float c[OPS_ERFC_DEGREE + 1] = OPS_ERFC_P;
    float a = fabsf(u), t = 1.0f / fmaf(a, 0.25f, 1.0f), p = c[OPS_ERFC_DEGREE];
    for (int i = OPS_ERFC_DEGREE - 1; i >= 0; i--)
        p = fmaf(p, t, c[i]);
    float h = u * (p * exp1(a * a * -0.5f));
    return u < 0 ? h : u - h;
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

static void layernorm(const float *x, const float *w, const float *bias, float eps, int n, float *y)
{
    float lane[16] = { 0 }, square[16] = { 0 };
    for (int i = 0; i < n; i++)
        lane[i % 16] += x[i];
    const float mean = dot_tree(lane) / (float)n;
    for (int i = 0; i < n; i++)
        square[i % 16] = fmaf(x[i] - mean, x[i] - mean, square[i % 16]);
    const float scale = 1.0f / sqrtf(dot_tree(square) / (float)n + eps);
    for (int i = 0; i < n; i++)
        y[i] = fmaf((x[i] - mean) * scale, w[i], bias[i]);
}

static void rope(float *x, const float *cos, const float *sin, int n)
{
    int half = n / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = fmaf(a, cos[i], -(b * sin[i]));
        x[i + half] = fmaf(b, cos[i], a * sin[i]);
    }
}

static void rope_pairs(float *x, const float *cos, const float *sin, int n)
{
    for (int i = 0; i < n / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = fmaf(a, cos[i], -(b * sin[i]));
        x[2 * i + 1] = fmaf(b, cos[i], a * sin[i]);
    }
}

static void silu_mul(const float *gate, const float *up, int n, float *y)
{
    for (int i = 0; i < n; i++)
        y[i] = gate[i] / (1.0f + exp1(-gate[i])) * up[i];
}

static void gelu_tanh(const float *gate, const float *up, int n, float *y)
{
    for (int i = 0; i < n; i++)
        y[i] = up ? gelu_tanh1(gate[i]) * up[i] : gelu_tanh1(gate[i]);
}

static void gelu_erf(const float *gate, const float *up, int n, float *y)
{
    for (int i = 0; i < n; i++)
        y[i] = up ? gelu_erf1(gate[i]) * up[i] : gelu_erf1(gate[i]);
}

static void softcap(float c, int n, float *y)
{
    for (int i = 0; i < n; i++)
        y[i] = c * tanh1(y[i] / c);
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

static void scale_n(float c, int n, float *y)
{
    for (int i = 0; i < n; i++)
        y[i] *= c;
}

static float softmax_row(int n, float *s)
{
    float max = s[0], lane[16] = { 0 };
    for (int i = 1; i < n; i++)
        max = s[i] > max ? s[i] : max;
    for (int i = 0; i < n; i++) {
        s[i] = exp1(s[i] - max);
        lane[i % 16] += s[i];
    }
    return dot_tree(lane);
}

static void softmax_grad(float c, float dot, int n, float *p, float *d)
{
    for (int i = 0; i < n; i++) {
        p[i] *= c;
        d[i] = p[i] * (d[i] - dot);
    }
}

const struct ops ops_scalar = {
    .rmsnorm = rmsnorm, .rope = rope,     .silu_mul = silu_mul, .add = add,
    .exp = exp_n,       .to_f16 = to_f16, .scores = scalar_scores,     .softmax = scalar_softmax,
    .values = scalar_values,   .scale = scale_n,
    .layernorm = layernorm, .rope_pairs = rope_pairs, .gelu_tanh = gelu_tanh,
    .gelu_erf = gelu_erf,   .softcap = softcap,
    .to_q8 = scalar_to_q8,
    .softmax_row = softmax_row, .softmax_grad = softmax_grad,
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
