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

/* Sum of a[i] * b[i] * c[i]. */
static float sum3(const float *a, const float *b, const float *c, int n)
{
    float lane[LANES] = { 0 };
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++)
            lane[l] += a[i + l] * b[i + l] * c[i + l];
    for (int l = 0; i + l < n; l++)
        lane[l] += a[i + l] * b[i + l] * c[i + l];
    return dot_tree(lane);
}

/* With s = 1 / sqrt(mean(x^2) + eps):  dx = s (w dy - x s^2 mean(w dy x)). */
void grad_rmsnorm(const struct ops *ops, const float *x, const float *w, float eps, int n,
                  const float *dy, float *dx)
{
    (void)ops;
    float lane[LANES] = { 0 };
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++)
            lane[l] += x[i + l] * x[i + l];
    for (int l = 0; i + l < n; l++)
        lane[l] += x[i + l] * x[i + l];
    const float s = 1.0f / sqrtf(dot_tree(lane) / (float)n + eps);
    const float back = sum3(x, w, dy, n) / (float)n * s * s * s;
    for (i = 0; i < n; i++)
        dx[i] += w[i] * dy[i] * s - x[i] * back;
}

/* With u = (x - mean(x)) s and g = w dy:  dx = s (g - mean(g) - u mean(g u)). */
void grad_layernorm(const struct ops *ops, const float *x, const float *w, float eps, int n,
                    const float *dy, float *dx)
{
    (void)ops;
    float lane[LANES] = { 0 }, square[LANES] = { 0 }, sum[LANES] = { 0 }, cross[LANES] = { 0 };
    for (int i = 0; i < n; i++)
        lane[i % LANES] += x[i];
    const float mean = dot_tree(lane) / (float)n;
    for (int i = 0; i < n; i++) {
        const float d = x[i] - mean, g = w[i] * dy[i];
        square[i % LANES] += d * d;
        sum[i % LANES] += g;
        cross[i % LANES] += g * d;
    }
    const float s = 1.0f / sqrtf(dot_tree(square) / (float)n + eps);
    const float mean_g = dot_tree(sum) / (float)n;
    const float back = dot_tree(cross) / (float)n * s * s;
    for (int i = 0; i < n; i++)
        dx[i] += (w[i] * dy[i] - mean_g - (x[i] - mean) * back) * s;
}

static float clamp(float x, float limit)
{
    return x < -limit ? -limit : x > limit ? limit : x;
}

/* --- activations ----------------------------------------------------------------------------
 * In blocks: `slope` gets act'(gate), then both results follow; so either may overwrite its input.
 * Beyond the limits below act' is 0 or 1 to the last bit that matters, and e stays finite. */
static void finish(const float *up, const float *dy, const float *slope, const float *value, int n,
                   float *dgate, float *dup)
{
    if (up == NULL) {
        for (int i = 0; i < n; i++)
            dgate[i] = dy[i] * slope[i];
        return;
    }
    for (int i = 0; i < n; i++) {
        const float u = up[i];
        dup[i] = dy[i] * value[i];
        dgate[i] = dy[i] * u * slope[i];
    }
}

/* act = x p with p = 1 / (1 + e), e = exp(-x), 1 - p = e p:  act' = p + x p e p. */
static void silu_block(const struct ops *ops, const float *x, int n, float *slope, float *value)
{
    for (int i = 0; i < n; i++)
        slope[i] = -clamp(x[i], 80);
    ops->exp(slope, n, slope);
    for (int i = 0; i < n; i++) {
        const float c = clamp(x[i], 80), e = slope[i], p = 1.0f / (1.0f + e);
        value[i] = (x[i] > 0 ? x[i] : c) * p;
        slope[i] = p + c * (e * p) * p;
    }
}

/* The same with e = exp(-2z), whose derivative by x is e * (a + 3 b x^2); see OPS_GELU_A. */
static void gelu_tanh_block(const struct ops *ops, const float *x, int n, float *slope,
                            float *value)
{
    for (int i = 0; i < n; i++) {
        const float c = clamp(x[i], 9);
        slope[i] = c * (c * c * OPS_GELU_B + OPS_GELU_A);
    }
    ops->exp(slope, n, slope);
    for (int i = 0; i < n; i++) {
        const float c = clamp(x[i], 9), e = slope[i], p = 1.0f / (1.0f + e);
        value[i] = (x[i] > 0 ? x[i] : c) * p;
        slope[i] = p - c * (e * p) * p * (3 * OPS_GELU_B * (c * c) + OPS_GELU_A);
    }
}

/* act' = Phi(x) + x phi(x), Phi(x) = act(x) / x. */
static void gelu_erf_block(const struct ops *ops, const float *x, int n, float *slope, float *value)
{
    const float inv_sqrt_2pi = 0x1.988454p-2f;
    for (int i = 0; i < n; i++)
        slope[i] = clamp(x[i], 14) * clamp(x[i], 14) * -0.5f;
    ops->exp(slope, n, slope);
    ops->gelu_erf(x, NULL, n, value);
    for (int i = 0; i < n; i++) {
        const float half = fabsf(x[i]) < 1e-30f ? 0.5f : value[i] / x[i];
        slope[i] = half + clamp(x[i], 14) * slope[i] * inv_sqrt_2pi;
    }
}

typedef void (*block_fn)(const struct ops *ops, const float *x, int n, float *slope, float *value);

static void grad_act(const struct ops *ops, block_fn fn, const float *gate, const float *up,
                     const float *dy, int n, float *dgate, float *dup)
{
    float slope[BLOCK], value[BLOCK];
    for (int i = 0; i < n; i += BLOCK) {
        const int m = imin(BLOCK, n - i);
        fn(ops, gate + i, m, slope, value);
        finish(up != NULL ? up + i : NULL, dy + i, slope, value, m, dgate + i,
               up != NULL ? dup + i : NULL);
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
