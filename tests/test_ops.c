/* test_ops.c - norms, rope, silu, exponential: against fp64, and the vector code
 * against the scalar code bit for bit. */
#include "engine/num.h"
#include "engine/ops.h"
#include "engine/rope.h"
#include "tests/support_ops.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static double ulps(float got, double want)
{
    int e;
    frexp(want, &e);
    return fabs((double)got - want) / ldexp(1, (e < -125 ? -125 : e) - 24);
}

/* --- exponential ----------------------------------------------------------------------------- */
static void exp_is_within_one_and_a_half_ulp(void **state)
{
    (void)state;
    double worst = 0;
    for (int i = 0; i <= 400000; i++) {
        float x = -104.0f + 193.0f * (float)i / 400000, y;
        ops_scalar.exp(&x, 1, &y);
        double want = exp((double)x);
        if (want > 0x1.fffffep127)
            continue;
        double u = ulps(y, want);
        worst = u > worst ? u : worst;
    }
    printf("exp: worst error %.3f ulp\n", worst);
    assert_true(worst < 1.5);
}

static void exp_is_right_at_its_edges(void **state)
{
    (void)state;
    const struct ops *const *vector = vector_ops();
    for (const struct ops *ops = &ops_scalar; ops != NULL; ops = *vector++) {
        float x[8] = { 0, -0.0f, -INFINITY, -1e30f, INFINITY, 1e30f, NAN, 88.72f }, y[8];
        ops->exp(x, 8, y);
        assert_true(y[0] == 1 && y[1] == 1);
        assert_true(y[2] == 0 && y[3] == 0);
        assert_true(isinf(y[4]) && isinf(y[5]));
        assert_true(isnan(y[6]));
        assert_true(isfinite(y[7]) && y[7] > 3.39e38f);
    }
}

/* --- one row ----------------------------------------------------------------------------------- */
static const int sizes[] = { 1, 2, 7, 15, 16, 17, 31, 32, 33, 47, 64, 65, 100, 172, 2048, 2051 };
enum { NSIZES = sizeof sizes / sizeof sizes[0] };

static void rmsnorm_silu_and_add_agree_with_fp64(void **state)
{
    (void)state;
    for (int s = 0; s < NSIZES; s++) {
        const int n = sizes[s];
        float *x = random_floats((size_t)n, 3), *w = random_floats((size_t)n, 2);
        float *y = random_floats((size_t)n, 1);
        double sum = 0;
        for (int i = 0; i < n; i++)
            sum += (double)x[i] * x[i];
        ops_scalar.rmsnorm(x, w, 1e-5f, n, y);
        for (int i = 0; i < n; i++) {
            double want = x[i] / sqrt(sum / n + 1e-5) * w[i];
            assert_true(fabs(y[i] - want) <= 4e-7 * fabs(want));
        }
        ops_scalar.silu_mul(x, w, n, y);
        for (int i = 0; i < n; i++) {
            double want = x[i] / (1 + exp(-(double)x[i])) * w[i];
            assert_true(fabs(y[i] - want) <= 4e-7 * fabs(want));
        }
        float *z = random_floats((size_t)n, 1);
        memcpy(z, y, (size_t)n * sizeof *z);
        ops_scalar.add(x, n, z);
        for (int i = 0; i < n; i++)
            assert_true(z[i] == x[i] + y[i]);
        free(x);
        free(w);
        free(y);
        free(z);
    }
}

static double gelu_tanh_64(double u)
{
    return 0.5 * u * (1 + tanh(sqrt(2 / acos(-1)) * (u + 0.044715 * u * u * u)));
}

static double gelu_erf_64(double u) { return 0.5 * u * erfc(-u / sqrt(2)); }

/* The largest error of gelu(u) over |u|, for u in [-12, 12]. */
static double gelu_error(void (*fn)(const float *, const float *, int, float *),
                         double (*want)(double))
{
    double worst = 0;
    for (int i = 1; i <= 200000; i++) {
        const float u = 12.0f * (float)i / 200000;
        for (int sign = -1; sign <= 1; sign += 2) {
            float x = (float)sign * u, y;
            fn(&x, NULL, 1, &y);
            const double e = fabs(y - want(x)) / u;
            worst = e > worst ? e : worst;
        }
    }
    return worst;
}

static void gelu_has_six_digits_of_both_kinds(void **state)
{
    (void)state;
    const double t = gelu_error(ops_scalar.gelu_tanh, gelu_tanh_64);
    const double e = gelu_error(ops_scalar.gelu_erf, gelu_erf_64);
    printf("gelu: worst error over |u| %.2e with tanh, %.2e with erf\n", t, e);
    assert_true(t < 3e-7 && e < 2.5e-7);
    const float x[4] = { 0, -0.0f, 1e30f, -1e30f }, up[4] = { 2, 2, 2, 2 };
    float y[4];
    ops_scalar.gelu_erf(x, up, 4, y);
    assert_true(y[0] == 0 && y[1] == 0 && y[2] == 2e30f && y[3] == 0);
    ops_scalar.gelu_tanh(x, up, 4, y);
    assert_true(y[0] == 0 && y[1] == 0 && y[2] == 2e30f && y[3] == 0);
}

static void softcap_is_a_hyperbolic_tangent_of_full_precision(void **state)
{
    (void)state;
    double worst = 0;
    for (int i = 1; i <= 200000; i++) {
        float x = (float)exp(-20.0 + 30.0 * i / 200000), y = x; /* 2e-9 to 2e4 */
        ops_scalar.softcap(30, 1, &y);
        double want = 30 * tanh((double)x / 30);
        worst = fabs(y - want) / want > worst ? fabs(y - want) / want : worst;
        float z = -x;
        ops_scalar.softcap(30, 1, &z);
        assert_true(fabs(z + want) <= 4e-7 * want);
    }
    printf("softcap: worst relative error %.2e\n", worst);
    assert_true(worst < 4e-7);
}

static void layernorm_and_rope_in_pairs_agree_with_fp64(void **state)
{
    (void)state;
    for (int s = 0; s < NSIZES; s++) {
        const int n = sizes[s];
        float *x = random_floats((size_t)n, 3), *w = random_floats((size_t)n, 2);
        float *b = random_floats((size_t)n, 1), *y = random_floats((size_t)n, 1);
        double mean = 0, square = 0;
        for (int i = 0; i < n; i++)
            mean += (x[i] += 5) / (double)n;
        for (int i = 0; i < n; i++)
            square += (x[i] - mean) * (x[i] - mean) / n;
        ops_scalar.layernorm(x, w, b, 1e-5f, n, y);
        for (int i = 0; i < n; i++)
            assert_true(fabs(y[i] - ((x[i] - mean) / sqrt(square + 1e-5) * w[i] + b[i])) < 3e-5);
        memcpy(y, x, (size_t)n * sizeof *y);
        ops_scalar.rope_pairs(y, w, b, n / 2 * 2); /* any numbers do for cos and sin */
        for (int i = 0; i < n / 2; i++) {
            const double even = x[2 * i], odd = x[2 * i + 1];
            assert_true(fabs(y[2 * i] - (even * w[i] - odd * b[i])) < 2e-6);
            assert_true(fabs(y[2 * i + 1] - (odd * w[i] + even * b[i])) < 2e-6);
        }
        free(x);
        free(w);
        free(b);
        free(y);
    }
}

static void check_against_scalar(const struct ops *v)
{
    for (int s = 0; s < NSIZES; s++) {
        const int n = sizes[s];
        const size_t bytes = (size_t)n * sizeof(float);
        float *x = random_floats((size_t)n, 90), *w = random_floats((size_t)n, 2);
        float *a = random_floats((size_t)n, 1), *b = random_floats((size_t)n, 1);
        uint16_t *h = malloc(bytes), *k = malloc(bytes);
        int8_t *code = malloc((size_t)n), *code2 = malloc((size_t)n);
        x[n / 2] = s % 3 ? x[n / 2] : INFINITY; /* of which a block has no scale */
        ops_scalar.to_q8(x, n, code, h);
        v->to_q8(x, n, code2, k);
        assert_memory_equal(code, code2, (size_t)n);
        assert_memory_equal(h, k, (size_t)((n + 31) / 32) * sizeof *h);
        x[n / 2] = 1;
        free(code);
        free(code2);
        ops_scalar.rmsnorm(x, w, 1e-6f, n, a);
        v->rmsnorm(x, w, 1e-6f, n, b);
        assert_memory_equal(a, b, bytes);
        ops_scalar.silu_mul(x, w, n, a);
        v->silu_mul(x, w, n, b);
        assert_memory_equal(a, b, bytes);
        ops_scalar.layernorm(x, w, w, 1e-6f, n, a);
        v->layernorm(x, w, w, 1e-6f, n, b);
        assert_memory_equal(a, b, bytes);
        for (int k2 = 0; k2 < 2; k2++) {
            const float *up = k2 ? w : NULL;
            const float scale = k2 ? 1 : 0.05f; /* both ends and the middle */
            memcpy(a, x, bytes);
            ops_scalar.scale(scale, n, a);
            memcpy(b, a, bytes);
            ops_scalar.gelu_tanh(a, up, n, a);
            v->gelu_tanh(b, up, n, b);
            assert_memory_equal(a, b, bytes);
            memcpy(a, x, bytes);
            ops_scalar.scale(scale, n, a);
            memcpy(b, a, bytes);
            ops_scalar.gelu_erf(a, up, n, a);
            v->gelu_erf(b, up, n, b);
            assert_memory_equal(a, b, bytes);
            memcpy(a, x, bytes);
            memcpy(b, x, bytes);
            ops_scalar.softcap(k2 ? 50 : 0.5f, n, a);
            v->softcap(k2 ? 50 : 0.5f, n, b);
            assert_memory_equal(a, b, bytes);
        }
        if (n % 2 == 0) {
            ops_scalar.rope_pairs(a, w, w + n / 2, n);
            v->rope_pairs(b, w, w + n / 2, n);
            assert_memory_equal(a, b, bytes);
        }
        ops_scalar.add(x, n, a);
        v->add(x, n, b);
        assert_memory_equal(a, b, bytes);
        ops_scalar.scale(0.3f, n, a);
        v->scale(0.3f, n, b);
        assert_memory_equal(a, b, bytes);
        memcpy(a, x, bytes);
        memcpy(b, x, bytes);
        assert_true(ops_scalar.softmax_row(n, a) == v->softmax_row(n, b));
        assert_memory_equal(a, b, bytes);
        float *d = random_floats((size_t)n, 1), *e = malloc(bytes);
        memcpy(e, d, bytes);
        ops_scalar.softmax_grad(0.7f, 0.3f, n, a, d);
        v->softmax_grad(0.7f, 0.3f, n, b, e);
        assert_memory_equal(a, b, bytes);
        assert_memory_equal(d, e, bytes);
        free(d);
        free(e);
        for (int i = 0; i < n; i++)
            x[i] *= 1.4f; /* past both ends, and subnormal results */
        ops_scalar.exp(x, n, a);
        v->exp(x, n, b);
        assert_memory_equal(a, b, bytes);
        ops_scalar.to_f16(x, n, h);
        v->to_f16(x, n, k);
        assert_memory_equal(h, k, bytes / 2);
        if (n % 2 == 0) {
            memcpy(a, x, bytes);
            memcpy(b, x, bytes);
            ops_scalar.rope(a, w, w + n / 2, n);
            v->rope(b, w, w + n / 2, n);
            assert_memory_equal(a, b, bytes);
        }
        free(x);
        free(w);
        free(a);
        free(b);
        free(h);
        free(k);
    }
}

/* Every number is within half a step of what its code stands for, as far as fp16 has such steps. */
static void codes_of_8_bits_are_within_half_a_step(void **state)
{
    (void)state;
    enum { N = 45 };
    static const float sizes_of[] = { 0, 1e-9f, 1e-6f, 3e-4f, 1, 700, 8e6f };
    for (size_t i = 0; i < sizeof sizes_of / sizeof sizes_of[0]; i++) {
        float *x = random_floats(N, sizes_of[i]);
        int8_t codes[N];
        uint16_t scales[2];
        ops_scalar.to_q8(x, N, codes, scales);
        for (int b = 0; b < 2; b++) {
            float top = 0;
            for (int j = 32 * b; j < N && j < 32 * b + 32; j++)
                top = fabsf(x[j]) > top ? fabsf(x[j]) : top;
            const float scale = f16_to_f32(scales[b]);
            const float half = scale / 2 + fabsf(scale * 127 - top) * 1.001f + top * 1e-6f;
            for (int j = 32 * b; j < N && j < 32 * b + 32; j++)
                if (!(fabsf((float)codes[j] * scale - x[j]) <= half))
                    fail_msg("%g became %d times %g", x[j], codes[j], scale);
        }
        free(x);
    }
    /* What has no codes shows: all of the block becomes NaN. */
    static const float bad[] = { NAN, -NAN, INFINITY, -INFINITY, 9e6f, -FLT_MAX };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        float x[N] = { [1] = 3, [40] = 5 };
        int8_t codes[N];
        uint16_t scales[2];
        x[7] = bad[i];
        ops_scalar.to_q8(x, N, codes, scales);
        assert_true(isnan(f16_to_f32(scales[0])));
        assert_int_equal(codes[1], 0);
        assert_int_equal(codes[40], 127);
    }
}

static void vector_operations_give_the_scalar_bits(void **state)
{
    (void)state;
    for (const struct ops *const *v = vector_ops(); *v != NULL; v++)
        check_against_scalar(*v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exp_is_within_one_and_a_half_ulp),
        cmocka_unit_test(exp_is_right_at_its_edges),
        cmocka_unit_test(rmsnorm_silu_and_add_agree_with_fp64),
        cmocka_unit_test(gelu_has_six_digits_of_both_kinds),
        cmocka_unit_test(softcap_is_a_hyperbolic_tangent_of_full_precision),
        cmocka_unit_test(layernorm_and_rope_in_pairs_agree_with_fp64),
        cmocka_unit_test(codes_of_8_bits_are_within_half_a_step),
        cmocka_unit_test(vector_operations_give_the_scalar_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
