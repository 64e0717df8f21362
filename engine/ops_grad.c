/* ops_grad.c - derivatives of norms, activations and the loss.
 *
 * Loops have fixed inner lengths of 16, which compilers turn into vectors of whatever width without
 * changing a bit; nothing here is fused (no fmaf), for the same reason. */
#include "engine/ops_grad.h"

#include "engine/dot.h"

#include <math.h>
#include <string.h>

enum { LANES = 16, BLOCK = 256 };

static int imin(int a, int b) { return a < b ? a : b; }

/* With s = 1 / sqrt(mean(x^2) + eps):  dx = s (w dy - x s^2 mean(w dy x)). */
void grad_rmsnorm(const struct ops *ops, const float *restrict x, const float *restrict w,
                  float eps, int n, const float *restrict dy, float *restrict dx)
{
    (void)ops;
    float square[LANES] = { 0 }, cross[LANES] = { 0 };
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) {
            square[l] += x[i + l] * x[i + l];
            cross[l] += x[i + l] * w[i + l] * dy[i + l];
        }
    for (int l = 0; i + l < n; l++) {
        square[l] += x[i + l] * x[i + l];
        cross[l] += x[i + l] * w[i + l] * dy[i + l];
    }
    const float s = 1.0f / sqrtf(dot_tree(square) / (float)n + eps);
    const float back = dot_tree(cross) / (float)n * s * s * s;
    for (i = 0; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++)
            dx[i + l] += w[i + l] * dy[i + l] * s - x[i + l] * back;
    for (; i < n; i++)
        dx[i] += w[i] * dy[i] * s - x[i] * back;
}

static float mean_of(const float *x, int n)
{
    float lane[LANES] = { 0 };
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++)
            lane[l] += x[i + l];
    for (int l = 0; i + l < n; l++)
        lane[l] += x[i + l];
    return dot_tree(lane) / (float)n;
}

/* What layernorm's derivative sums, lane l. */
struct layernorm_sums {
    float square[LANES], g[LANES], cross[LANES];
};

static inline void layernorm_add(struct layernorm_sums *t, int l, float d, float g)
{
    t->square[l] += d * d;
    t->g[l] += g;
    t->cross[l] += g * d;
}

/* With u = (x - mean(x)) s and g = w dy:  dx = s (g - mean(g) - u mean(g u)). */
void grad_layernorm(const struct ops *ops, const float *restrict x, const float *restrict w,
                    float eps, int n, const float *restrict dy, float *restrict dx)
{
    (void)ops;
    struct layernorm_sums sums = { 0 };
    const float mean = mean_of(x, n);
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++)
            layernorm_add(&sums, l, x[i + l] - mean, w[i + l] * dy[i + l]);
    for (int l = 0; i + l < n; l++)
        layernorm_add(&sums, l, x[i + l] - mean, w[i + l] * dy[i + l]);
    const float s = 1.0f / sqrtf(dot_tree(sums.square) / (float)n + eps);
    const float mean_g = dot_tree(sums.g) / (float)n;
    const float back = dot_tree(sums.cross) / (float)n * s * s;
    for (i = 0; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++)
            dx[i + l] += (w[i + l] * dy[i + l] - mean_g - (x[i + l] - mean) * back) * s;
    for (; i < n; i++)
        dx[i] += (w[i] * dy[i] - mean_g - (x[i] - mean) * back) * s;
}

/* --- activations ----------------------------------------------------------------------------
 * All are act(x) = x p(x) with p from 0 to 1.  They work on copies of BLOCK numbers, filled up to whole
 * vectors, so that a result may overwrite an input. */
struct block {
    _Alignas(64) float x[BLOCK], up[BLOCK], dy[BLOCK];
    _Alignas(64) float c[BLOCK]; /* x where act'(x) is neither 0 nor 1; never 0 */
    _Alignas(64) float p[BLOCK], slope[BLOCK]; /* p(c), act'(c) */
};

/* c from x.  Below -limit x p is 0 but for what rounding leaves, and x is cut for its sake. */
static void clip(struct block *b, float limit, int n)
{
    const float tiny = 1e-30f;
    for (int i = 0; i < n; i += LANES)
        for (int l = i; l < i + LANES; l++)
            b->x[l] = b->x[l] < -limit ? -limit : b->x[l];
    for (int i = 0; i < n; i += LANES)
        for (int l = i; l < i + LANES; l++)
            b->c[l] = b->x[l] > limit ? limit : b->x[l];
    for (int i = 0; i < n; i += LANES)
        for (int l = i; l < i + LANES; l++)
            b->c[l] = fabsf(b->c[l]) < tiny ? tiny : b->c[l];
}

/* p = 1 / (1 + e), e = exp(-x), 1 - p = e p:  act' = p + x p e p. */
static void silu_block(const struct ops *ops, struct block *b, int n)
{
    clip(b, 80, n);
    for (int i = 0; i < n; i += LANES)
        for (int l = i; l < i + LANES; l++)
            b->slope[l] = -b->c[l];
    ops->exp(b->slope, n, b->slope);
    for (int i = 0; i < n; i += LANES)
        for (int l = i; l < i + LANES; l++) {
            const float c = b->c[l], e = b->slope[l], p = 1.0f / (1.0f + e);
            b->p[l] = p;
            b->slope[l] = p + c * (e * p) * p;
        }
}

/* The same with e = exp(-2z), whose derivative by x is e * (a + 3 b x^2); see OPS_GELU_A. */
static void gelu_tanh_block(const struct ops *ops, struct block *b, int n)
{
    clip(b, 9, n);
    for (int i = 0; i < n; i += LANES)
        for (int l = i; l < i + LANES; l++)
            b->slope[l] = b->c[l] * (b->c[l] * b->c[l] * OPS_GELU_B + OPS_GELU_A);
    ops->exp(b->slope, n, b->slope);
    for (int i = 0; i < n; i += LANES)
        for (int l = i; l < i + LANES; l++) {
            const float c = b->c[l], e = b->slope[l], p = 1.0f / (1.0f + e);
            b->p[l] = p;
            b->slope[l] = p - c * (e * p) * p * (3 * OPS_GELU_B * (c * c) + OPS_GELU_A);
        }
}

/* p = Phi(x) = act(x) / x:  act' = p + x phi(x). */
static void gelu_erf_block(const struct ops *ops, struct block *b, int n)
{
    const float inv_sqrt_2pi = 0x1.988454p-2f;
    clip(b, 14, n);
    for (int i = 0; i < n; i += LANES)
        for (int l = i; l < i + LANES; l++)
            b->slope[l] = b->c[l] * b->c[l] * -0.5f;
    ops->exp(b->slope, n, b->slope);
    ops->gelu_erf(b->c, NULL, n, b->p);
    for (int i = 0; i < n; i += LANES)
        for (int l = i; l < i + LANES; l++) {
            b->p[l] /= b->c[l];
            b->slope[l] = b->p[l] + b->c[l] * b->slope[l] * inv_sqrt_2pi;
        }
}

static void fill(float *to, const float *from, int n, int whole)
{
    memcpy(to, from, (size_t)n * sizeof *to);
    memset(to + n, 0, (size_t)(whole - n) * sizeof *to);
}

typedef void (*block_fn)(const struct ops *ops, struct block *b, int n);

static void grad_act(const struct ops *ops, block_fn fn, const float *gate, const float *up,
                     const float *dy, int n, float *dgate, float *dup)
{
    struct block b;
    for (int at = 0; at < n; at += BLOCK) {
        const int m = imin(BLOCK, n - at), whole = (m + LANES - 1) / LANES * LANES;
        fill(b.x, gate + at, m, whole);
        fill(b.dy, dy + at, m, whole);
        fn(ops, &b, whole);
        for (int i = 0; i < whole; i += LANES)
            for (int l = i; l < i + LANES; l++)
                b.slope[l] *= b.dy[l];
        if (up != NULL) {
            fill(b.up, up + at, m, whole);
            for (int i = 0; i < whole; i += LANES)
                for (int l = i; l < i + LANES; l++) {
                    b.slope[l] *= b.up[l];
                    b.x[l] *= b.p[l] * b.dy[l];
                }
            memcpy(dup + at, b.x, (size_t)m * sizeof *dup);
        }
        memcpy(dgate + at, b.slope, (size_t)m * sizeof *dgate);
    }
}

void grad_silu_mul(const struct ops *ops, const float *gate, const float *up, const float *dy,
                   int n, float *dgate, float *dup)
{
    grad_act(ops, silu_block, gate, up, dy, n, dgate, dup);
}

void grad_gelu_tanh(const struct ops *ops, const float *gate, const float *up, const float *dy,
                    int n, float *dgate, float *dup)
{
    grad_act(ops, gelu_tanh_block, gate, up, dy, n, dgate, dup);
}

void grad_gelu_erf(const struct ops *ops, const float *gate, const float *up, const float *dy,
                   int n, float *dgate, float *dup)
{
    grad_act(ops, gelu_erf_block, gate, up, dy, n, dgate, dup);
}

void grad_softcap(float c, const float *y, int n, float *dy)
{
    const float inv = 1.0f / c;
    for (int i = 0; i < n; i++) {
        const float t = y[i] * inv;
        dy[i] *= 1.0f - t * t;
    }
}

/* --- the loss --------------------------------------------------------------------------------- */
static float max_of(const float *x, int n)
{
    float lane[LANES], max = x[0];
    for (int l = 0; l < LANES; l++)
        lane[l] = x[0];
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++)
            lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    for (; i < n; i++)
        max = x[i] > max ? x[i] : max;
    for (int l = 0; l < LANES; l++)
        max = lane[l] > max ? lane[l] : max;
    return max;
}

/* e = exp(x - max), kept if `e` is not NULL (it may be x); returns the sum, in 8 lanes. */
static double exp_sum(const struct ops *ops, const float *x, int n, float max, float *e)
{
    enum { SUMS = 8 };
    double lane[SUMS] = { 0 };
    float block[BLOCK];
    for (int i = 0; i < n; i += BLOCK) {
        const int m = imin(BLOCK, n - i);
        for (int j = 0; j < m; j++)
            block[j] = x[i + j] - max;
        ops->exp(block, m, block);
        for (int j = m; j % SUMS != 0; j++)
            block[j] = 0;
        for (int j = 0; j < m; j += SUMS)
            for (int l = 0; l < SUMS; l++)
                lane[l] += (double)block[j + l];
        if (e != NULL)
            memcpy(e + i, block, (size_t)m * sizeof *e);
    }
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

static double cross_entropy(const struct ops *ops, const float *x, int V, int32_t target, float *e,
                            double *ret_sum, bool *hit)
{
    const float max = max_of(x, V), at = x[target];
    *hit = at == max;
    for (int i = 0; i < target && *hit; i++)
        *hit = x[i] < max;
    *ret_sum = exp_sum(ops, x, V, max, e);
    return log(*ret_sum) + ((double)max - (double)at);
}

double grad_cross_entropy(const struct ops *ops, float *logits, int V, int32_t target, float scale,
                          bool *hit)
{
    double sum;
    const double loss = cross_entropy(ops, logits, V, target, logits, &sum, hit);
    /* 1 - softmax as a quotient: nothing cancels when the target is nearly certain. */
    const double rest = (sum - (double)logits[target]) / sum;
    ops->scale((float)((double)scale / sum), V, logits);
    logits[target] = (float)(-rest * (double)scale);
    return loss;
}

double loss_cross_entropy(const struct ops *ops, const float *logits, int V, int32_t target,
                          bool *hit)
{
    double sum;
    return cross_entropy(ops, logits, V, target, NULL, &sum, hit);
}
