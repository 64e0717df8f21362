/* test_ops_grad.c - derivatives of norms, activations, softcap and rope against central differences
 * of fp64 code, and the loss. */
#include "engine/ops_grad.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static uint32_t rng_state = 11;
static float rnd(float scale) /* [-scale, scale) */
{
    rng_state = rng_state * 1664525 + 1013904223;
    return ((float)(rng_state >> 8) * 0x1p-23f - 1) * scale;
}

static float *random_floats(int n, float scale)
{
    float *p = malloc((size_t)n * sizeof *p + 1);
    assert_non_null(p);
    for (int i = 0; i < n; i++)
        p[i] = rnd(scale);
    return p;
}

static float *copy_of(const float *x, int n)
{
    float *p = malloc((size_t)n * sizeof *p + 1);
    assert_non_null(p);
    memcpy(p, x, (size_t)n * sizeof *p);
    return p;
}

static const int sizes[] = { 1, 2, 7, 16, 17, 31, 64, 100, 172, 255, 256, 257, 600 };
enum { NSIZES = sizeof sizes / sizeof sizes[0] };

/* Every table that this CPU can run. */
static int tables(const struct ops **ret)
{
    int n = 0;
    for (int i = 0; i < ISA_COUNT; i++) {
        enum isa isa;
        if (isa_select(isa_name((enum isa)i), &isa, NULL) == ERR_OK)
            ret[n++] = ops_for(isa);
        else
            fprintf(stderr, "SKIPPED: this CPU has no %s\n", isa_name((enum isa)i));
    }
    return n;
}

/* --- fp64 forward operations ---------------------------------------------------------------------- */
struct op {
    int n;
    const double *w; /* norms */
    double eps, c;
    bool gated;      /* x is gate, then up */
};
/* y [n] of x [n], or [2n] */
typedef void (*forward_fn)(const struct op *op, const double *x, double *y);

static void rms64(const struct op *op, const double *x, double *y)
{
    double sum = 0;
    for (int i = 0; i < op->n; i++)
        sum += x[i] * x[i];
    for (int i = 0; i < op->n; i++)
        y[i] = x[i] / sqrt(sum / op->n + op->eps) * op->w[i];
}

static void layernorm64(const struct op *op, const double *x, double *y)
{
    double mean = 0, var = 0;
    for (int i = 0; i < op->n; i++)
        mean += x[i] / op->n;
    for (int i = 0; i < op->n; i++)
        var += (x[i] - mean) * (x[i] - mean) / op->n;
    for (int i = 0; i < op->n; i++)
        y[i] = (x[i] - mean) / sqrt(var + op->eps) * op->w[i];
}

static double up64(const struct op *op, const double *x, int i)
{
    return op->gated ? x[op->n + i] : 1;
}

static void silu64(const struct op *op, const double *x, double *y)
{
    for (int i = 0; i < op->n; i++)
        y[i] = x[i] / (1 + exp(-x[i])) * up64(op, x, i);
}

static void gelu_tanh64(const struct op *op, const double *x, double *y)
{
    for (int i = 0; i < op->n; i++) {
        double z = sqrt(2 / acos(-1)) * (x[i] + 0.044715 * x[i] * x[i] * x[i]);
        y[i] = 0.5 * x[i] * (1 + tanh(z)) * up64(op, x, i);
    }
}

static void gelu_erf64(const struct op *op, const double *x, double *y)
{
    for (int i = 0; i < op->n; i++)
        y[i] = 0.5 * x[i] * erfc(-x[i] / sqrt(2)) * up64(op, x, i);
}

static void softcap64(const struct op *op, const double *x, double *y)
{
    for (int i = 0; i < op->n; i++)
        y[i] = op->c * tanh(x[i] / op->c);
}

/* The turn of rope at one angle per pair, as ops.h defines it. */
static void rope64(const struct op *op, const double *x, double *y)
{
    for (int i = 0; i < op->n / 2; i++) {
        double a = x[i], b = x[i + op->n / 2], t = op->w[i];
        y[i] = a * cos(t) - b * sin(t);
        y[i + op->n / 2] = b * cos(t) + a * sin(t);
    }
}

static void rope_pairs64(const struct op *op, const double *x, double *y)
{
    for (int i = 0; i < op->n / 2; i++) {
        double a = x[2 * i], b = x[2 * i + 1], t = op->w[i];
        y[2 * i] = a * cos(t) - b * sin(t);
        y[2 * i + 1] = b * cos(t) + a * sin(t);
    }
}

static double weighted(const struct op *op, forward_fn fn, const double *x, const float *dy,
                       double *y)
{
    double sum = 0;
    fn(op, x, y);
    for (int i = 0; i < op->n; i++)
        sum += y[i] * (double)dy[i];
    return sum;
}

/* Is got[nx] the derivative of sum(dy fn(x)) by x, within 1e-5 of its largest component? */
static void check_gradient(const struct op *op, forward_fn fn, const float *x, int nx,
                           const float *dy, const float *got, const char *what)
{
    double *x64 = malloc((size_t)nx * sizeof *x64 + 1), *y = malloc((size_t)op->n * sizeof *y + 1);
    double *want = malloc((size_t)nx * sizeof *want + 1), largest = 0;
    assert_true(x64 != NULL && y != NULL && want != NULL);
    for (int i = 0; i < nx; i++)
        x64[i] = (double)x[i];
    for (int i = 0; i < nx; i++) {
        const double h = 1e-5, at = x64[i];
        x64[i] = at + h;
        double plus = weighted(op, fn, x64, dy, y);
        x64[i] = at - h;
        double minus = weighted(op, fn, x64, dy, y);
        x64[i] = at;
        want[i] = (plus - minus) / (2 * h);
        largest = fmax(largest, fabs(want[i]));
    }
    for (int i = 0; i < nx; i++)
        if (!(fabs((double)got[i] - want[i]) <= 1e-5 * largest + 1e-8))
            fail_msg("%s, n %d, component %d: %.9g, central difference %.9g, largest %.3g", what,
                     op->n, i, (double)got[i], want[i], largest);
    free(x64);
    free(y);
    free(want);
}

/* --- norms ------------------------------------------------------------------------------------- */
typedef void (*norm_fn)(const struct ops *ops, const float *x, const float *w, float eps, int n,
                        const float *dy, float *dx);

static void check_norm(norm_fn fn, forward_fn forward, int n, float offset, const char *what)
{
    float *x = random_floats(n, 3), *w = random_floats(n, 2), *dy = random_floats(n, 1);
    float *was = random_floats(n, 1), *dx = copy_of(was, n);
    double *w64 = malloc((size_t)n * sizeof *w64);
    assert_non_null(w64);
    for (int i = 0; i < n; i++) {
        x[i] += offset;
        w64[i] = (double)w[i];
    }
    memset(dx, 0, (size_t)n * sizeof *dx);
    /* Of few numbers, nearly all that is left of the derivative comes from eps. */
    const float eps = n < 16 ? 1.0f : 1e-3f;
    fn(&ops_scalar, x, w, eps, n, dy, dx);
    const struct op op = { .n = n, .w = w64, .eps = (double)eps };
    check_gradient(&op, forward, x, n, dy, dx, what);
    /* It is added, not put. */
    float *sum = copy_of(was, n);
    fn(&ops_scalar, x, w, eps, n, dy, sum);
    for (int i = 0; i < n; i++)
        assert_true(fabsf(sum[i] - (was[i] + dx[i])) <= 1e-6f * (1 + fabsf(dx[i])));
    free(x);
    free(w);
    free(dy);
    free(was);
    free(dx);
    free(w64);
    free(sum);
}

static void derivatives_of_norms_are_central_differences(void **state)
{
    (void)state;
    for (int i = 0; i < NSIZES; i++) {
        check_norm(grad_rmsnorm, rms64, sizes[i], 0, "rmsnorm");
        check_norm(grad_rmsnorm, rms64, sizes[i], 2, "rmsnorm");
        if (sizes[i] == 1)
            continue; /* one number is its own mean: y is 0 whatever x is */
        check_norm(grad_layernorm, layernorm64, sizes[i], 0, "layernorm");
        check_norm(grad_layernorm, layernorm64, sizes[i], 2, "layernorm");
    }
}

static void layernorm_of_one_number_has_no_derivative(void **state)
{
    (void)state;
    float x = 3, w = 2, dy = 5, dx = 0.5f;
    grad_layernorm(&ops_scalar, &x, &w, 1e-5f, 1, &dy, &dx);
    assert_true(dx == 0.5f);
}

/* --- activations --------------------------------------------------------------------------------- */
typedef void (*act_fn)(const struct ops *ops, const float *gate, const float *up, const float *dy,
                       int n, float *dgate, float *dup);
static const struct {
    const char *name;
    act_fn fn;
    forward_fn forward;
    bool plain; /* exists without a gate */
} acts[] = {
    { "silu", grad_silu_mul, silu64, false },
    { "gelu with tanh", grad_gelu_tanh, gelu_tanh64, true },
    { "gelu with erf", grad_gelu_erf, gelu_erf64, true },
};
enum { NACTS = sizeof acts / sizeof acts[0] };

static void check_act(int which, const struct ops *ops, int n, float size, bool gated)
{
    float *x = random_floats(2 * n, size), *dy = random_floats(n, 1), *d = random_floats(2 * n, 1);
    float *up = gated ? x + n : NULL, *dup = gated ? d + n : NULL;
    acts[which].fn(ops, x, up, dy, n, d, dup);
    const struct op op = { .n = n, .gated = gated };
    check_gradient(&op, acts[which].forward, x, gated ? 2 * n : n, dy, d, acts[which].name);
    /* In place. */
    float *in = copy_of(x, 2 * n);
    acts[which].fn(ops, in, gated ? in + n : NULL, dy, n, in, gated ? in + n : NULL);
    assert_memory_equal(in, d, (size_t)(gated ? 2 * n : n) * sizeof *in);
    free(x);
    free(dy);
    free(d);
    free(in);
}

static void derivatives_of_activations_are_central_differences(void **state)
{
    (void)state;
    const struct ops *ops[ISA_COUNT];
    const int n = tables(ops);
    for (int t = 0; t < n; t++)
        for (int w = 0; w < NACTS; w++)
            for (int i = 0; i < NSIZES; i++)
                for (int size = 1; size <= 16; size *= 4) {
                    check_act(w, ops[t], sizes[i], (float)size, true);
                    if (acts[w].plain)
                        check_act(w, ops[t], sizes[i], (float)size, false);
                }
}

static void derivatives_of_activations_hold_at_the_edges(void **state)
{
    (void)state;
    static const float x[] = { 0, -0.0f, 1e-38f, -1e-38f, 1e-44f, 1e-31f, 100, 1e4f, 1e20f, 3e38f,
                               -100, -1e4f, -1e20f, -3e38f };
    enum { N = sizeof x / sizeof x[0] };
    for (int w = 0; w < NACTS; w++) {
        float up[N], dy[N], dgate[N], dup[N];
        for (int i = 0; i < N; i++)
            up[i] = dy[i] = 1;
        acts[w].fn(&ops_scalar, x, up, dy, N, dgate, dup);
        for (int i = 0; i < N; i++) {
            const float slope = fabsf(x[i]) < 1 ? 0.5f : x[i] > 0 ? 1.0f : 0.0f;
            const float value = fabsf(x[i]) < 1 ? x[i] / 2 : x[i] > 0 ? x[i] : 0.0f;
            assert_true(fabsf(dgate[i] - slope) < 1e-6f);
            assert_true(fabsf(dup[i] - value) <= 1e-6f * fabsf(value) + 1e-27f);
        }
    }
}

static void derivative_of_softcap_is_the_central_difference(void **state)
{
    (void)state;
    for (int i = 0; i < NSIZES; i++) {
        const int n = sizes[i];
        float *x = random_floats(n, 60), *y = copy_of(x, n), *dy = random_floats(n, 1);
        float *d = copy_of(dy, n);
        ops_scalar.softcap(30, n, y);
        grad_softcap(30, y, n, d);
        const struct op op = { .n = n, .c = 30 };
        check_gradient(&op, softcap64, x, n, dy, d, "softcap");
        free(x);
        free(y);
        free(dy);
        free(d);
    }
}

static void derivative_of_rope_is_rope_with_the_sine_negated(void **state)
{
    (void)state;
    enum { N = 64 };
    double angle[N / 2];
    float c[N / 2], s[N / 2];
    for (int i = 0; i < N / 2; i++) {
        angle[i] = (double)rnd(3);
        c[i] = (float)cos(angle[i]);
        s[i] = (float)-sin(angle[i]);
    }
    float *x = random_floats(N, 1), *dy = random_floats(N, 1), *d = copy_of(dy, N);
    const struct op op = { .n = N, .w = angle };
    ops_scalar.rope(d, c, s, N);
    check_gradient(&op, rope64, x, N, dy, d, "rope");
    memcpy(d, dy, N * sizeof *d);
    ops_scalar.rope_pairs(d, c, s, N);
    check_gradient(&op, rope_pairs64, x, N, dy, d, "rope of pairs");
    free(x);
    free(dy);
    free(d);
}

static void instruction_sets_give_the_same_bits(void **state)
{
    (void)state;
    enum { N = 333 };
    const struct ops *ops[ISA_COUNT];
    const int n = tables(ops);
    float *x = random_floats(2 * N, 8), *dy = random_floats(N, 1);
    for (int t = 1; t < n; t++) {
        for (int w = 0; w < NACTS; w++) {
            float a[2 * N], b[2 * N];
            acts[w].fn(ops[0], x, x + N, dy, N, a, a + N);
            acts[w].fn(ops[t], x, x + N, dy, N, b, b + N);
            assert_memory_equal(a, b, sizeof a);
        }
        float *a = copy_of(x, N), *b = copy_of(x, N);
        bool hit;
        double loss = grad_cross_entropy(ops[0], a, N, 7, 0.25f, &hit);
        assert_true(grad_cross_entropy(ops[t], b, N, 7, 0.25f, &hit) == loss);
        assert_memory_equal(a, b, N * sizeof *a);
        free(a);
        free(b);
    }
    free(x);
    free(dy);
}

/* --- the loss ------------------------------------------------------------------------------------- */
static double loss64(const float *x, int V, int target, double *grad)
{
    double max = -INFINITY, sum = 0;
    for (int i = 0; i < V; i++)
        max = fmax(max, (double)x[i]);
    for (int i = 0; i < V; i++)
        sum += exp((double)x[i] - max);
    for (int i = 0; i < V; i++)
        grad[i] = exp((double)x[i] - max) / sum - (i == target);
    return log(sum) + max - (double)x[target];
}

static void cross_entropy_agrees_with_fp64(void **state)
{
    (void)state;
    static const int vocab[] = { 1, 2, 9, 256, 257, 512, 1000, 32003 };
    for (size_t v = 0; v < sizeof vocab / sizeof vocab[0]; v++)
        for (int size = 1; size <= 100; size *= 10) {
            const int V = vocab[v], target = V * 2 / 3;
            float *x = random_floats(V, (float)size), *d = copy_of(x, V);
            double *want = malloc((size_t)V * sizeof *want), largest = 0;
            assert_non_null(want);
            double loss = loss64(x, V, target, want);
            bool hit, hit2;
            double got = grad_cross_entropy(&ops_scalar, d, V, target, 0.125f, &hit);
            assert_true(fabs(got - loss) <= 1e-7 * (1 + loss));
            assert_true(loss_cross_entropy(&ops_scalar, x, V, target, &hit2) == got);
            assert_true(hit == hit2);
            for (int i = 0; i < V; i++)
                largest = fmax(largest, fabs(want[i]));
            for (int i = 0; i < V; i++)
                assert_true(fabs((double)d[i] - want[i] / 8) <= 1e-6 * largest);
            free(x);
            free(d);
            free(want);
        }
}

static void cross_entropy_of_extreme_logits_is_finite_and_right(void **state)
{
    (void)state;
    bool hit;
    float a[3] = { 1e4f, -1e4f, 0 };
    assert_true(grad_cross_entropy(&ops_scalar, a, 3, 1, 2, &hit) == 2e4);
    assert_true(!hit && a[0] == 2 && a[1] == -2 && a[2] == 0);
    float b[3] = { 1e4f, -1e4f, 0 };
    assert_true(grad_cross_entropy(&ops_scalar, b, 3, 0, 2, &hit) == 0);
    assert_true(hit && b[0] == 0 && b[1] == 0 && b[2] == 0);
    float c[2] = { 3e38f, -3e38f };
    double loss = grad_cross_entropy(&ops_scalar, c, 2, 1, 1, &hit);
    assert_true(isfinite(loss) && loss > 5.9e38 && c[0] == 1 && c[1] == -1);
    /* A nearly certain target keeps its small derivative. */
    float d[2] = { 0, -30 };
    loss = grad_cross_entropy(&ops_scalar, d, 2, 0, 1, &hit);
    assert_true(fabs(loss - exp(-30)) < 1e-2 * exp(-30));
    assert_true(fabs((double)d[0] + exp(-30)) < 1e-2 * exp(-30));
    float e[3] = { 0, NAN, 1 }, f[3] = { 0, INFINITY, 1 };
    assert_true(isnan(grad_cross_entropy(&ops_scalar, e, 3, 0, 1, &hit)));
    assert_true(isnan(loss_cross_entropy(&ops_scalar, f, 3, 0, &hit)));
}

static void a_hit_is_the_lowest_of_the_most_probable(void **state)
{
    (void)state;
    float x[40] = { 0 };
    bool hit;
    x[20] = x[33] = 5;
    loss_cross_entropy(&ops_scalar, x, 40, 20, &hit);
    assert_true(hit);
    loss_cross_entropy(&ops_scalar, x, 40, 33, &hit);
    assert_false(hit);
    loss_cross_entropy(&ops_scalar, x, 40, 0, &hit);
    assert_false(hit);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(derivatives_of_norms_are_central_differences),
        cmocka_unit_test(layernorm_of_one_number_has_no_derivative),
        cmocka_unit_test(derivatives_of_activations_are_central_differences),
        cmocka_unit_test(derivatives_of_activations_hold_at_the_edges),
        cmocka_unit_test(derivative_of_softcap_is_the_central_difference),
        cmocka_unit_test(derivative_of_rope_is_rope_with_the_sine_negated),
        cmocka_unit_test(instruction_sets_give_the_same_bits),
        cmocka_unit_test(cross_entropy_agrees_with_fp64),
        cmocka_unit_test(cross_entropy_of_extreme_logits_is_finite_and_right),
        cmocka_unit_test(a_hit_is_the_lowest_of_the_most_probable),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
