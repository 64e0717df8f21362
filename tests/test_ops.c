/* test_ops.c - norms, rope, silu, exponential and attention: against fp64, and the vector code
 * against the scalar code bit for bit. */
#include "engine/attn.h"
#include "engine/num.h"
#include "engine/ops.h"
#include "engine/rope.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static uint32_t rng_state = 7;
static float rnd(float scale) /* [-scale, scale) */
{
    rng_state = rng_state * 1664525 + 1013904223;
    return ((float)(rng_state >> 8) * 0x1p-23f - 1) * scale;
}

static float *random_floats(size_t n, float scale)
{
    float *p = malloc((n + 1) * sizeof *p);
    assert_non_null(p);
    for (size_t i = 0; i < n; i++)
        p[i] = rnd(scale);
    return p;
}

/* The vector tables that this CPU can run; says so if one is missing.  NULL ends them. */
static const struct ops *const *vector_ops(void)
{
    static const char *const names[] = { "avx2", "avx512" };
    static const struct ops *found[3];
    enum isa isa;
    int n = 0;
    for (int i = 0; i < 2; i++) {
        if (isa_select(names[i], &isa, NULL) == ERR_OK)
            found[n++] = ops_for(isa);
        else
            fprintf(stderr, "SKIPPED: this CPU has no %s\n", names[i]);
    }
    found[n] = NULL;
    return found;
}

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

static void vector_operations_give_the_scalar_bits(void **state)
{
    (void)state;
    for (const struct ops *const *v = vector_ops(); *v != NULL; v++)
        check_against_scalar(*v);
}

/* --- attention ------------------------------------------------------------------------------------- */
struct scene {
    struct arch arch;
    struct kv_cache *kv;
    struct kv_seq seq;
    int T, rows; /* positions, and rows that ask (the last ones) */
    float *k, *v, *q;
};

static void fill_with_nan(const struct scene *s)
{
    struct kv_stats st;
    kv_stats(s->kv, &st);
    memset(kv_k(s->kv, 0, 0, 0), 0xff, (size_t)st.pages * st.page_bytes);
}

static void scene_open(struct scene *s, int G, int heads, int hd, int T, int rows, bool f32)
{
    static const uint8_t seed[32];
    *s = (struct scene){ .arch = { .L = 2, .G = G, .H = G * heads, .hd = hd }, .T = T,
                         .rows = rows };
    const size_t wide = (size_t)G * (size_t)hd, n = (size_t)T;
    int32_t *tokens = calloc(n, sizeof *tokens);
    size_t bytes = (n / 16 + 3) * kv_page_bytes(&s->arch, f32);
    assert_int_equal(kv_create(&s->arch, f32, bytes, &s->kv, NULL), ERR_OK);
    fill_with_nan(s); /* what a page held before must not matter */
    assert_int_equal(kv_open(s->kv, seed, tokens, T, &s->seq, NULL), ERR_OK);
    assert_true(kv_reserve(s->kv, &s->seq, T));
    free(tokens);
    s->k = random_floats(n * wide, 2);
    s->v = random_floats(n * wide, 2);
    s->q = random_floats((size_t)rows * wide * (size_t)heads, 2);
    for (int i = 0; i < T; i++)
        attn_store(&ops_scalar, s->kv, s->seq.pages, 1, G, hd, i, s->k + (size_t)i * wide,
                   s->v + (size_t)i * wide, hd);
}

static void scene_close(struct scene *s)
{
    kv_close(s->kv, &s->seq);
    kv_destroy(s->kv);
    free(s->k);
    free(s->v);
    free(s->q);
}

static float *scene_run(const struct scene *s, const struct ops *ops, int window, int chunk)
{
    const struct arch *a = &s->arch;
    float *out = random_floats((size_t)s->rows * (size_t)(a->H * a->hd), 1);
    struct attn_layer l = { .kv = s->kv, .layer = 1, .H = a->H, .G = a->G, .hd = a->hd,
                            .window = window, .scale = 1 / sqrtf((float)a->hd), .q = s->q,
                            .q_ld = a->H * a->hd, .q_step = a->hd, .out = out };
    for (int g = 0; g < a->G; g++)
        for (int r = 0; r < s->rows; r += chunk)
            attn_rows(ops, &l, s->seq.pages, s->T - s->rows + r, r,
                      s->rows - r < chunk ? s->rows - r : chunk, g);
    return out;
}

static double rounded(float x, bool f32) { return f32 ? x : f16_to_f32(f32_to_f16(x)); }

/* Plain softmax attention in fp64; returns the largest error. */
static double scene_error(const struct scene *s, const float *out, int window, bool f32)
{
    const struct arch *a = &s->arch;
    const int hd = a->hd, wide = a->G * hd;
    double *w = malloc((size_t)s->T * sizeof *w), worst = 0;
    for (int r = 0; r < s->rows; r++) {
        for (int h = 0; h < a->H; h++) {
            const int i = s->T - s->rows + r, g = h / (a->H / a->G);
            const int lo = window > 0 && i - window + 1 > 0 ? i - window + 1 : 0;
            const float *q = s->q + ((size_t)r * (size_t)a->H + (size_t)h) * (size_t)hd;
            double top = -INFINITY, sum = 0;
            for (int j = lo; j <= i; j++) {
                w[j] = 0;
                for (int d = 0; d < hd; d++)
                    w[j] += (double)q[d] * rounded(s->k[j * wide + g * hd + d], f32);
                w[j] /= sqrt(hd);
                top = w[j] > top ? w[j] : top;
            }
            for (int j = lo; j <= i; j++)
                sum += w[j] = exp(w[j] - top);
            for (int d = 0; d < hd; d++) {
                double want = 0;
                for (int j = lo; j <= i; j++)
                    want += w[j] / sum * rounded(s->v[j * wide + g * hd + d], f32);
                double off = fabs(want - out[(q - s->q) + d]);
                worst = off > worst ? off : worst;
            }
        }
    }
    free(w);
    return worst;
}

static const struct {
    int G, heads, hd, T, rows, window;
} cases[] = {
    { 1, 1, 8, 1, 1, 0 },       { 2, 1, 16, 16, 16, 0 },  { 2, 2, 20, 33, 33, 0 },
    { 1, 3, 64, 65, 20, 0 },    { 2, 4, 32, 130, 7, 0 },  { 1, 8, 64, 200, 5, 0 },
    { 1, 7, 80, 90, 9, 0 },     { 2, 1, 128, 257, 30, 0 },{ 1, 2, 6, 70, 70, 8 },
    { 2, 4, 16, 150, 40, 8 },   { 1, 1, 96, 300, 66, 64 },{ 1, 4, 48, 140, 33, 1 },
    { 1, 2, 64, 170, 170, 100 },{ 2, 5, 18, 81, 13, 17 },
};
enum { NCASES = sizeof cases / sizeof cases[0] };

static void attention_agrees_with_fp64_softmax(void **state)
{
    (void)state;
    for (int c = 0; c < NCASES; c++) {
        for (int f32 = 0; f32 < 2; f32++) {
            struct scene s;
            scene_open(&s, cases[c].G, cases[c].heads, cases[c].hd, cases[c].T, cases[c].rows,
                       f32 != 0);
            float *out = scene_run(&s, &ops_scalar, cases[c].window, cases[c].rows);
            double off = scene_error(&s, out, cases[c].window, f32 != 0);
            if (!(off < 5e-6))
                fail_msg("case %d, f32 %d: error %g", c, f32, off);
            free(out);
            scene_close(&s);
        }
    }
}

static void attention_has_the_same_bits_in_any_chunks_and_on_any_instruction_set(void **state)
{
    (void)state;
    const struct ops *const *vector = vector_ops();
    for (int c = 0; c < NCASES; c++) {
        for (int f32 = 0; f32 < 2; f32++) {
            struct scene s;
            scene_open(&s, cases[c].G, cases[c].heads, cases[c].hd, cases[c].T, cases[c].rows,
                       f32 != 0);
            const size_t bytes =
                (size_t)(s.rows * s.arch.H * s.arch.hd) * sizeof(float);
            float *all = scene_run(&s, &ops_scalar, cases[c].window, cases[c].rows);
            for (int chunk = 1; chunk <= 7; chunk += 2) {
                float *out = scene_run(&s, &ops_scalar, cases[c].window, chunk);
                assert_memory_equal(all, out, bytes);
                free(out);
                for (const struct ops *const *v = vector; *v != NULL; v++) {
                    out = scene_run(&s, *v, cases[c].window, chunk);
                    assert_memory_equal(all, out, bytes);
                    free(out);
                }
            }
            free(all);
            scene_close(&s);
        }
    }
}

/* Scores of thousands, of either sign: the running maximum must keep up without overflow. */
static void attention_stands_extreme_scores(void **state)
{
    (void)state;
    struct scene s;
    scene_open(&s, 1, 2, 32, 200, 3, true);
    for (int i = 0; i < s.rows * 64; i++)
        s.q[i] *= 4000;
    float *out = scene_run(&s, &ops_scalar, 0, 3);
    for (int i = 0; i < s.rows * 64; i++)
        assert_true(isfinite(out[i]));
    assert_true(scene_error(&s, out, 0, true) < 2e-2);
    free(out);
    scene_close(&s);
}

/* A later row of the chunk may hold infinite values: earlier rows do not see them. */
static void attention_is_untouched_by_what_it_must_not_see(void **state)
{
    (void)state;
    const struct ops *const *vector = vector_ops();
    for (const struct ops *ops = &ops_scalar; ops != NULL; ops = *vector++) {
        struct scene s;
        scene_open(&s, 1, 1, 32, 40, 8, true);
        float *clean = scene_run(&s, ops, 0, 8);
        float bad[32];
        for (int i = 0; i < 32; i++)
            bad[i] = i % 2 ? INFINITY : NAN;
        attn_store(&ops_scalar, s.kv, s.seq.pages, 1, 1, 32, 37, bad, bad, 32); /* row 5 of 8 */
        float *out = scene_run(&s, ops, 0, 8);
        assert_memory_equal(clean, out, 5 * 32 * sizeof *out);
        free(clean);
        free(out);
        scene_close(&s);
    }
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
        cmocka_unit_test(vector_operations_give_the_scalar_bits),
        cmocka_unit_test(attention_agrees_with_fp64_softmax),
        cmocka_unit_test(attention_has_the_same_bits_in_any_chunks_and_on_any_instruction_set),
        cmocka_unit_test(attention_stands_extreme_scores),
        cmocka_unit_test(attention_is_untouched_by_what_it_must_not_see),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
