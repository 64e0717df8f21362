/* test_adalora.c - AdaLoRA's pieces against the traces of PEFT's RankAllocator, as far as they can
 * be had without a forward pass, and against the formulas in double. */
#include "engine/adalora.h"
#include "engine/train_rand.h"
#include "tests/support_golden.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const struct compute alone = { 0 }; /* a NULL pool: everything in the caller */

static const char *const traces[] = { "adalora_nf4", "adalora_nf4_lr1e-2", "adalora_bloom_f32",
                                      "adalora_deltaT3_from1" };
enum { TRACES = sizeof traces / sizeof traces[0] };

/* --- a trace ------------------------------------------------------------------------------------
 */
struct trace {
    const char *name;
    json_t *json;
    const json_t *steps;
    struct adalora_opts o;
    struct golden p, g; /* parameters and gradients */
    size_t n;
    struct adalora_module *modules;
    char (*paths)[192]; /* without ".lora_A" */
    struct adalora *a;
};

static void make(struct trace *t)
{
    struct err err = { 0 };
    if (adalora_create(&t->o, t->modules, t->n, &t->a, &err) != ERR_OK)
        fail_msg("%s", err.msg);
}

static struct trace trace_open(const char *name, const char *params, const char *grads)
{
    struct trace t = { .name = name, .json = golden_trace(name) };
    const json_t *c = json_object_get(t.json, "config");
    t.steps = json_object_get(t.json, "steps");
    t.o = (struct adalora_opts){ .target_r = (int)golden_number(c, "target_r"),
                                 .tinit = (int64_t)golden_number(c, "tinit"),
                                 .tfinal = (int64_t)golden_number(c, "tfinal"),
                                 .deltaT = (int64_t)golden_number(c, "deltaT"),
                                 .total_step = (int64_t)golden_number(c, "total_step"),
                                 .beta1 = golden_number(c, "beta1"),
                                 .beta2 = golden_number(c, "beta2"),
                                 .orth_reg_weight = golden_number(c, "orth_reg_weight") };
    t.p = golden_load(name, params);
    t.g = golden_load(name, grads);
    t.modules = calloc(t.p.n / 3, sizeof *t.modules);
    t.paths = calloc(t.p.n / 3, sizeof *t.paths);
    for (size_t i = 0; i + 2 < t.p.n; i += 3, t.n++) { /* A, B, E of a module follow each other */
        const struct golden_tensor *A = &t.p.tensors[i], *B = A + 1, *E = A + 2;
        t.modules[t.n] = (struct adalora_module){ .A = A->data,
                                                  .B = B->data,
                                                  .E = E->data,
                                                  .gA = golden_find(&t.g, A->name)->data,
                                                  .gB = golden_find(&t.g, B->name)->data,
                                                  .gE = golden_find(&t.g, E->name)->data,
                                                  .r = A->rows,
                                                  .in = A->cols,
                                                  .out = B->rows };
        assert_int_equal(B->cols, A->rows);
        assert_int_equal(E->n, A->rows);
        snprintf(t.paths[t.n], sizeof t.paths[0], "%.*s", (int)strlen(A->name) - 7, A->name);
    }
    make(&t);
    return t;
}

static void trace_close(struct trace *t)
{
    adalora_destroy(t->a);
    free(t->modules);
    free(t->paths);
    golden_free(&t->p);
    golden_free(&t->g);
    json_decref(t->json);
}

/* The record of a step, or NULL. */
static const json_t *step_of(const struct trace *t, int64_t step)
{
    for (size_t i = 0; i < json_array_size(t->steps); i++) {
        const json_t *s = json_array_get(t->steps, i);
        if ((int64_t)golden_number(s, "global_step") == step)
            return s;
    }
    return NULL;
}

static int64_t first_step(const struct trace *t)
{
    return (int64_t)golden_number(t->json, "first_step");
}

static size_t ranks(const struct trace *t)
{
    size_t n = 0;
    for (size_t i = 0; i < t->n; i++)
        n += (size_t)t->modules[i].r;
    return n;
}

/* `pattern`: {path.lora_E: [bool]} */
static void assert_pattern(const struct trace *t, const json_t *pattern, const uint8_t *mask)
{
    size_t at = 0;
    assert_int_equal(json_object_size(pattern), t->n);
    for (size_t i = 0; i < t->n; i++) {
        char key[224];
        snprintf(key, sizeof key, "%s.lora_E", t->paths[i]);
        const json_t *want = json_object_get(pattern, key);
        assert_int_equal(json_array_size(want), t->modules[i].r);
        for (int j = 0; j < t->modules[i].r; j++)
            assert_int_equal(mask[at++], json_is_true(json_array_get(want, (size_t)j)));
    }
}

/* --- orthogonality --------------------------------------------------------------------------- */
static void zero_gradients(struct trace *t)
{
    for (size_t i = 0; i < t->g.n; i++)
        memset(t->g.tensors[i].data, 0, t->g.tensors[i].n * sizeof(float));
}

static void the_term_is_that_of_the_trace(void **state)
{
    (void)state;
    static const struct {
        const char *file;
        size_t step; /* whose loss these parameters give */
    } points[] = { { "init", 0 }, { "after_step1", 1 }, { "after_step5", 5 } };
    for (int i = 0; i < TRACES; i++)
        for (int k = 0; k < 3; k++) {
            struct trace t = trace_open(traces[i], points[k].file, "grads_step1");
            const double want = golden_number(json_array_get(t.steps, points[k].step), "loss_orth");
            const double got = adalora_orth(t.a, &alone, 0);
            assert_float_equal(got, want, 1e-6);
            trace_close(&t);
        }
}

/* While E is 0 the cross entropy gives A and B no gradient: all of it is the term's. */
static void its_gradient_is_all_that_A_and_B_get_at_first(void **state)
{
    (void)state;
    size_t compared = 0;
    for (int i = 0; i < TRACES; i++) {
        struct trace t = trace_open(traces[i], "init", "grads_step1");
        struct golden want = golden_load(traces[i], "grads_step1");
        for (size_t k = 0; k < t.n; k++)
            for (int j = 0; j < t.modules[k].r; j++)
                assert_true(t.modules[k].E[j] == 0.0f);
        zero_gradients(&t);
        adalora_orth(t.a, &alone, 0.25); /* as four micro-batches would */
        for (int k = 0; k < 3; k++)
            adalora_orth(t.a, &alone, 0.25);
        for (size_t k = 0; k < want.n; k++) {
            const struct golden_tensor *w = &want.tensors[k];
            const float *got = golden_find(&t.g, w->name)->data;
            float most = 0;
            for (size_t e = 0; e < w->n; e++)
                most = fmaxf(most, fabsf(w->data[e]));
            if (w->name[strlen(w->name) - 1] == 'E')
                continue; /* not the term's */
            for (size_t e = 0; e < w->n; e++)
                assert_float_equal(got[e], w->data[e], 1e-5 * (double)most);
            compared++;
        }
        golden_free(&want);
        trace_close(&t);
    }
    assert_true(compared > 50);
}

enum { R = 3, IN = 7, OUT = 70 };

struct toy {
    float A[R * IN], gA[R * IN], B[OUT * R], gB[OUT * R], E[R], gE[R];
};

static struct adalora_module toy_module(struct toy *t)
{
    return (struct adalora_module){ t->A, t->gA, t->B, t->gB, t->E, t->gE, R, IN, OUT };
}

static void toy_fill(struct toy *t, uint64_t seed)
{
    train_rand_normal(seed, 1, 0.5f, t->A, R * IN);
    train_rand_normal(seed, 2, 0.5f, t->B, OUT * R);
    train_rand_normal(seed, 3, 0.5f, t->E, R);
    train_rand_normal(seed, 4, 0.1f, t->gA, R * IN);
    train_rand_normal(seed, 5, 0.1f, t->gB, OUT * R);
    train_rand_normal(seed, 6, 0.1f, t->gE, R);
}

static const struct adalora_opts toy_opts = { .target_r = 1,
                                              .tinit = 2,
                                              .tfinal = 3,
                                              .deltaT = 1,
                                              .total_step = 12,
                                              .beta1 = 0.85,
                                              .beta2 = 0.7,
                                              .orth_reg_weight = 0.5 };

/* ||X X^T - I|| of X [r][n] in double, where X[i][k] lies at i * si + k * sk. */
static double distance_from_orthogonal(const double *X, int r, int n, int si, int sk)
{
    double sum = 0;
    for (int i = 0; i < r; i++)
        for (int j = 0; j < r; j++) {
            double dot = i == j ? -1 : 0;
            for (int k = 0; k < n; k++)
                dot += X[i * si + k * sk] * X[j * si + k * sk];
            sum += dot * dot;
        }
    return sqrt(sum);
}

static void its_gradient_is_the_slope(void **state)
{
    (void)state;
    struct toy t;
    struct adalora *a = NULL;
    toy_fill(&t, 9);
    const struct adalora_module m = toy_module(&t);
    assert_int_equal(adalora_create(&toy_opts, &m, 1, &a, NULL), ERR_OK);
    double A[R * IN], B[OUT * R];
    for (int i = 0; i < R * IN; i++)
        A[i] = (double)t.A[i];
    for (int i = 0; i < OUT * R; i++)
        B[i] = (double)t.B[i];
    memset(t.gA, 0, sizeof t.gA);
    memset(t.gB, 0, sizeof t.gB);
    const double term = adalora_orth(a, &alone, 1);
    assert_float_equal(term,
                       0.25 * (distance_from_orthogonal(A, R, IN, IN, 1) +
                               distance_from_orthogonal(B, R, OUT, 1, R)),
                       1e-12);
    const double h = 1e-5;
    for (int i = 0; i < R * IN + OUT * R; i++) {
        double *x = i < R * IN ? &A[i] : &B[i - R * IN], was = *x, f[2];
        for (int side = 0; side < 2; side++) {
            *x = was + (side ? h : -h);
            f[side] = 0.25 * (distance_from_orthogonal(A, R, IN, IN, 1) +
                              distance_from_orthogonal(B, R, OUT, 1, R));
        }
        *x = was;
        assert_float_equal(i < R * IN ? t.gA[i] : t.gB[i - R * IN], (f[1] - f[0]) / (2 * h), 1e-7);
    }
    adalora_destroy(a);
}

static void orthogonal_factors_have_no_gradient(void **state)
{
    (void)state;
    struct toy t = { 0 };
    struct adalora *a = NULL;
    for (int i = 0; i < R; i++)
        t.A[i * IN + i] = t.B[i * R + i] = 1;
    t.gA[0] = 5;
    const struct adalora_module m = toy_module(&t);
    assert_int_equal(adalora_create(&toy_opts, &m, 1, &a, NULL), ERR_OK);
    assert_true(adalora_orth(a, &alone, 1) == 0);
    assert_true(t.gA[0] == 5 && t.gA[1] == 0 && t.gB[0] == 0);
    adalora_destroy(a);
}

/* --- budget ---------------------------------------------------------------------------------- */
static void budgets_are_those_of_the_traces(void **state)
{
    (void)state;
    for (int i = 0; i < TRACES; i++) {
        struct trace t = trace_open(traces[i], "init", "grads_step1");
        assert_int_equal(golden_number(t.json, "init_bgt"), ranks(&t));
        for (size_t s = 0; s < json_array_size(t.steps); s++) {
            const json_t *step = json_array_get(t.steps, s);
            assert_int_equal(adalora_budget(t.a, (int64_t)golden_number(step, "global_step")),
                             (int64_t)golden_number(step, "budget"));
        }
        trace_close(&t);
    }
}

/* The cube is truncated, so its last bit counts: libm's pow(), which Python uses, says the same. */
static void budgets_are_truncated_as_python_does(void **state)
{
    (void)state;
    static float none[1];
    for (int r = 2; r <= 128; r += 7)
        for (int span = 1; span <= 250; span += 3)
            for (int target = 1; target <= r; target += 1 + r / 9) {
                struct adalora_module m[3];
                for (int i = 0; i < 3; i++)
                    m[i] = (struct adalora_module){ none, none, none, none, none, none, r, 1, 1 };
                struct adalora_opts o = toy_opts;
                o.target_r = target;
                o.tinit = 5;
                o.tfinal = 4;
                o.total_step = 9 + span;
                struct adalora *a = NULL;
                assert_int_equal(adalora_create(&o, m, 3, &a, NULL), ERR_OK);
                const double begin = 3.0 * r, end = 3.0 * target;
                for (int64_t s = 0; s <= o.total_step; s++) {
                    const double x = 1 - (double)(s - 5) / span;
                    const double want = s <= 5          ? begin
                                        : s >= 5 + span ? end
                                                        : trunc((begin - end) * pow(x, 3) + end);
                    assert_int_equal(adalora_budget(a, s), (int64_t)want);
                }
                adalora_destroy(a);
            }
}

/* int(729 * (1 - 1/9)**3 + 9) is 520 in Python, though 729 (8/9)^3 = 512. */
static void a_budget_just_below_an_integer_is_cut(void **state)
{
    (void)state;
    static float none[1];
    struct adalora_module m[9];
    for (int i = 0; i < 9; i++)
        m[i] = (struct adalora_module){ none, none, none, none, none, none, 82, 1, 1 };
    struct adalora_opts o = toy_opts;
    struct adalora *a = NULL;
    o.tinit = 0;
    o.tfinal = 0;
    o.total_step = 9;
    assert_int_equal(adalora_create(&o, m, 9, &a, NULL), ERR_OK);
    assert_int_equal(adalora_budget(a, 1), 520);
    adalora_destroy(a);
}

/* --- importance ------------------------------------------------------------------------------ */
/* Gradients of the first step and the parameters after it give the averages that the trace has for
 * two modules, and so their scores. */
static void first_scores_come_from_the_averages_of_the_trace(void **state)
{
    (void)state;
    size_t modules = 0;
    for (int i = 0; i < TRACES; i++) {
        struct trace t = trace_open(traces[i], "after_step1", "grads_step1");
        struct golden s = golden_load(traces[i], "scores");
        struct adalora_report report;
        const int64_t first = first_step(&t);
        size_t n, at = 0;
        adalora_update(t.a, &alone, first, &report);
        assert_false(report.masked);
        const float *scores = adalora_scores(t.a, &n);
        assert_int_equal(n, ranks(&t));
        for (size_t k = 0; k < t.n; at += (size_t)t.modules[k++].r) {
            const struct golden_tensor *ipt[3], *unc[3];
            const char *part = "ABE";
            bool there = true;
            for (int x = 0; x < 3; x++) {
                char name[2][256];
                snprintf(name[0], sizeof name[0], "step%d.exp_avg_ipt.%s.lora_%c", (int)first,
                         t.paths[k], part[x]);
                snprintf(name[1], sizeof name[1], "step%d.exp_avg_unc.%s.lora_%c", (int)first,
                         t.paths[k], part[x]);
                for (size_t e = 0; e < s.n; e++) {
                    if (strcmp(s.tensors[e].name, name[0]) == 0)
                        break;
                    if (e + 1 == s.n)
                        there = false;
                }
                if (!there)
                    break;
                ipt[x] = golden_find(&s, name[0]);
                unc[x] = golden_find(&s, name[1]);
            }
            if (!there)
                continue;
            const int r = t.modules[k].r, in = t.modules[k].in, out = t.modules[k].out;
            for (int j = 0; j < r; j++) {
                double want = (double)ipt[2]->data[j] * (double)unc[2]->data[j];
                for (int x = 0; x < in; x++)
                    want +=
                        (double)ipt[0]->data[j * in + x] * (double)unc[0]->data[j * in + x] / in;
                for (int x = 0; x < out; x++)
                    want += (double)ipt[1]->data[x * r + j] * (double)unc[1]->data[x * r + j] / out;
                assert_float_equal((double)scores[at + (size_t)j], want, 1e-4 * want);
            }
            modules++;
        }
        golden_free(&s);
        trace_close(&t);
    }
    print_message("%zu modules\n", modules);
    assert_int_equal(modules, 7); /* of bloom there is one */
}

/* Several steps with gradients of all sizes, beside the formulas in double. */
static void scores_follow_the_formula(void **state)
{
    (void)state;
    enum { STEPS = 9, ALL = R * IN + OUT * R + R };
    struct toy t;
    double m[ALL] = { 0 }, u[ALL] = { 0 };
    toy_fill(&t, 1);
    const struct adalora_module module = toy_module(&t);
    struct adalora *a = NULL;
    assert_int_equal(adalora_create(&toy_opts, &module, 1, &a, NULL), ERR_OK);
    size_t n;
    assert_null(adalora_scores(a, &n));
    for (int step = 0; step < STEPS; step++) {
        struct adalora_report report;
        toy_fill(&t, 100 + (uint64_t)step);
        double s[R] = { 0 };
        for (int e = 0; e < ALL; e++) {
            const int b = e - R * IN, x = b - OUT * R;
            const float p = b < 0 ? t.A[e] : x < 0 ? t.B[b] : t.E[x];
            const float g = b < 0 ? t.gA[e] : x < 0 ? t.gB[b] : t.gE[x];
            const double now = fabs((double)p * (double)g);
            m[e] = 0.85 * m[e] + 0.15 * now;
            u[e] = 0.7 * u[e] + 0.3 * fabs(now - m[e]);
            s[b < 0 ? e / IN : x < 0 ? b % R : x] += m[e] * u[e] / (b < 0 ? IN : x < 0 ? OUT : 1);
        }
        adalora_update(a, &alone, step, &report);
        const float *scores = adalora_scores(a, &n);
        assert_int_equal(n, R);
        for (int i = 0; i < R; i++)
            assert_float_equal((double)scores[i], s[i], 1e-5 * s[i]);
    }
    adalora_destroy(a);
}

/* --- masks ----------------------------------------------------------------------------------- */
/* Gradients and parameters that give these scores in the first update: with A and B zero, M = (1 -
 * beta1) |E g|, U = (1 - beta2) beta1 |E g|, S = M U. */
static void wish(struct trace *t, const struct golden *scores, int64_t step)
{
    const double c = (1 - t->o.beta1) * (1 - t->o.beta2) * t->o.beta1;
    for (size_t i = 0; i < t->n; i++) {
        const struct adalora_module *m = &t->modules[i];
        char name[256];
        snprintf(name, sizeof name, "step%d.score.%s.lora_E", (int)step, t->paths[i]);
        const struct golden_tensor *s = golden_find(scores, name);
        memset(m->gA, 0, (size_t)m->r * (size_t)m->in * sizeof(float));
        memset(m->gB, 0, (size_t)m->r * (size_t)m->out * sizeof(float));
        for (int j = 0; j < m->r; j++) {
            m->E[j] = 1;
            m->gE[j] = (float)sqrt((double)s->data[j] / c);
        }
    }
}

static bool has_scores(const struct golden *s, int64_t step)
{
    char begin[32];
    snprintf(begin, sizeof begin, "step%d.score.", (int)step);
    for (size_t i = 0; i < s->n; i++)
        if (strncmp(s->tensors[i].name, begin, strlen(begin)) == 0)
            return true;
    return false;
}

static void nonzero(const struct trace *t, uint8_t *ret)
{
    for (size_t i = 0; i < t->n; i++)
        for (int j = 0; j < t->modules[i].r; j++)
            *ret++ = t->modules[i].E[j] != 0.0f;
}

/* PEFT's scores of a step give its threshold and exactly its zeros. */
static void scores_of_the_trace_give_its_masks(void **state)
{
    (void)state;
    size_t steps = 0;
    for (int i = 0; i < TRACES; i++) {
        struct trace t = trace_open(traces[i], "init", "grads_step1");
        struct golden s = golden_load(traces[i], "scores");
        const int64_t end = t.o.total_step - t.o.tfinal;
        uint8_t *got = malloc(ranks(&t));
        for (int64_t step = t.o.tinit + 1; step <= end; step++) {
            const json_t *want = step_of(&t, step);
            if (want == NULL || !has_scores(&s, step))
                continue;
            struct adalora_report report;
            adalora_destroy(t.a);
            make(&t);
            wish(&t, &s, step);
            if (step == end) { /* nothing is averaged any more: these are the scores of before */
                adalora_update(t.a, &alone, step - 1, &report);
                wish(&t, &s, step);
            }
            adalora_update(t.a, &alone, step, &report);
            assert_int_equal(report.budget, (int64_t)golden_number(want, "budget"));
            assert_int_equal(report.masked, json_is_true(json_object_get(want, "masked_now")));
            nonzero(&t, got);
            assert_pattern(&t, json_object_get(want, "nonzero_E"), got);
            assert_int_equal(report.kept, (int64_t)golden_number(want, "active"));
            if (json_is_number(json_object_get(want, "threshold"))) {
                const double threshold = golden_number(want, "threshold");
                assert_float_equal(report.threshold, threshold, 1e-3 * threshold);
                assert_int_equal(report.k, (int64_t)golden_number(want, "k"));
                steps++;
            }
            assert_int_equal(report.final, step == end);
            size_t n;
            if (step == end)
                assert_pattern(&t, json_object_get(t.json, "final_rank_pattern"),
                               adalora_mask(t.a, &n));
            else
                assert_null(adalora_mask(t.a, &n));
        }
        free(got);
        golden_free(&s);
        trace_close(&t);
    }
    print_message("%zu steps\n", steps);
    assert_true(steps >= 8);
}

/* Every step of every trace in turn, on other numbers: when E is masked, how many are to go, and
 * what stays, are the trace's (ties apart, which these numbers have not). */
static void masks_come_when_the_trace_has_them(void **state)
{
    (void)state;
    for (int i = 0; i < TRACES; i++) {
        struct trace t = trace_open(traces[i], "after_step5", "grads_step4");
        uint8_t *final = NULL;
        size_t n;
        for (size_t s = 0; s < json_array_size(t.steps); s++) {
            const json_t *want = json_array_get(t.steps, s);
            const int64_t step = (int64_t)golden_number(want, "global_step");
            struct adalora_report report;
            for (size_t k = 0; k < t.n; k++) { /* what the optimiser would bring back */
                train_rand_uniform((uint64_t)step, k, 0.1f, 1, t.modules[k].E,
                                   (size_t)t.modules[k].r);
                train_rand_normal((uint64_t)step, 100 + k, 1, t.modules[k].gE,
                                  (size_t)t.modules[k].r);
            }
            adalora_update(t.a, &alone, step, &report);
            assert_int_equal(report.budget, (int64_t)golden_number(want, "budget"));
            assert_int_equal(report.masked, json_is_true(json_object_get(want, "masked_now")));
            assert_int_equal(report.kept, (int64_t)golden_number(want, "active"));
            if (json_is_number(json_object_get(want, "k")))
                assert_int_equal(report.k, (int64_t)golden_number(want, "k"));
            else
                assert_int_equal(report.k, 0);
            assert_int_equal(isnan(report.threshold),
                             !json_is_number(json_object_get(want, "threshold")));
            const uint8_t *mask = adalora_mask(t.a, &n);
            assert_int_equal(mask != NULL, step >= t.o.total_step - t.o.tfinal);
            if (mask != NULL && final == NULL) {
                final = malloc(n);
                memcpy(final, mask, n);
            }
            if (mask != NULL) {
                uint8_t now[512];
                assert_memory_equal(mask, final, n);
                nonzero(&t, now);
                assert_memory_equal(now, final, n);
            }
        }
        assert_non_null(final);
        free(final);
        trace_close(&t);
    }
}

static void nothing_goes_where_nothing_has_to(void **state)
{
    (void)state;
    struct toy t;
    struct adalora *a = NULL;
    struct adalora_opts o = toy_opts;
    struct adalora_report report;
    size_t n;
    toy_fill(&t, 1);
    const struct adalora_module m = toy_module(&t);
    o.target_r = R; /* k = 0 */
    assert_int_equal(adalora_create(&o, &m, 1, &a, NULL), ERR_OK);
    for (int64_t step = 0; step <= 12; step++) {
        adalora_update(a, &alone, step, &report);
        assert_int_equal(report.kept, R);
        assert_int_equal(report.k, 0);
        assert_true(isnan(report.threshold));
    }
    assert_true(report.final);
    const uint8_t *mask = adalora_mask(a, &n);
    assert_true(n == R && mask[0] && mask[1] && mask[2]);
    adalora_destroy(a);

    o = (struct adalora_opts){ .keep_all = true, .orth_reg_weight = 0.5 };
    assert_int_equal(adalora_create(&o, &m, 1, &a, NULL), ERR_OK);
    assert_non_null(adalora_mask(a, &n));
    assert_true(adalora_orth(a, &alone, 0) > 0);
    adalora_update(a, &alone, 0, &report);
    assert_true(report.final && report.kept == R && report.budget == R);
    adalora_destroy(a);

    /* One step is too few to rank anything: the masks are final, and all stays. */
    o = toy_opts;
    o.tinit = 0;
    o.tfinal = 0;
    o.total_step = 1;
    assert_int_equal(adalora_create(&o, &m, 1, &a, NULL), ERR_OK);
    adalora_update(a, &alone, 1, &report);
    assert_true(report.final && report.kept == R);
    adalora_destroy(a);
}

static void ties_go_together(void **state)
{
    (void)state;
    struct toy t = { 0 };
    struct adalora *a = NULL;
    struct adalora_report report;
    const struct adalora_module m = toy_module(&t);
    for (int i = 0; i < R; i++)
        t.E[i] = t.gE[i] = 1;
    assert_int_equal(adalora_create(&toy_opts, &m, 1, &a, NULL), ERR_OK);
    adalora_update(a, &alone, 8, &report);
    assert_int_equal(report.budget, 1);
    assert_int_equal(report.k, 2);
    assert_int_equal(report.kept, 0);
    adalora_destroy(a);
}

static void senseless_schedules_are_refused(void **state)
{
    (void)state;
    struct toy t = { 0 };
    const struct adalora_module m = toy_module(&t);
    struct adalora_opts bad[8];
    for (int i = 0; i < 8; i++)
        bad[i] = toy_opts;
    bad[0].tinit = 9; /* = total_step - tfinal */
    bad[1].tfinal = 13;
    bad[2].total_step = 0;
    bad[3].deltaT = 0;
    bad[4].beta1 = 1;
    bad[5].beta2 = (double)NAN;
    bad[6].target_r = R + 1;
    bad[7].target_r = 0;
    for (int i = 0; i < 8; i++) {
        struct adalora *a = NULL;
        struct err err = { 0 };
        assert_int_equal(adalora_create(&bad[i], &m, 1, &a, &err), ERR_INVALID);
        assert_null(a);
        assert_true(strncmp(err.msg, "AdaLoRA: ", 9) == 0);
    }
}

/* --- threads, and saved state ----------------------------------------------------------------- */
static void threads_change_no_bit(void **state)
{
    (void)state;
    struct compute many = { 0 };
    assert_int_equal(pool_create(3, &many.pool, NULL), ERR_OK);
    struct trace t[2];
    for (int i = 0; i < 2; i++) {
        struct adalora_report report;
        t[i] = trace_open("adalora_nf4", "after_step5", "grads_step4");
        for (int64_t step = 0; step < 4; step++) {
            adalora_orth(t[i].a, i ? &many : &alone, 1);
            adalora_update(t[i].a, i ? &many : &alone, step, &report);
        }
    }
    struct buf buf[2];
    for (int i = 0; i < 2; i++) {
        buf_init(&buf[i], 1 << 24);
        assert_int_equal(adalora_save(t[i].a, &buf[i], NULL), ERR_OK);
    }
    assert_memory_equal(buf[0].data, buf[1].data, buf[0].len);
    for (size_t i = 0; i < t[0].g.n; i++)
        assert_memory_equal(t[0].g.tensors[i].data, t[1].g.tensors[i].data,
                            t[0].g.tensors[i].n * sizeof(float));
    for (int i = 0; i < 2; i++) {
        buf_free(&buf[i]);
        trace_close(&t[i]);
    }
    pool_destroy(many.pool);
}

static int try_restore(struct adalora *a, const void *data, size_t len)
{
    struct err err = { 0 };
    const void *at = data;
    size_t left = len;
    const int rc = adalora_restore(a, &at, &left, &err);
    if (rc != ERR_OK) {
        assert_true(err.msg[0] != '\0');
        assert_ptr_equal(at, data);
        assert_int_equal(left, len);
    }
    return rc;
}

/* Saved after every step, restored into a new one: the rest of the run is the same. */
static void a_restored_run_goes_on_the_same(void **state)
{
    (void)state;
    struct toy t[2];
    struct adalora_module m[2];
    struct adalora *a = NULL, *b = NULL;
    for (int i = 0; i < 2; i++)
        m[i] = toy_module(&t[i]);
    for (int64_t stop = 0; stop <= 11; stop++) {
        struct buf buf;
        struct adalora_report report[2] = { 0 };
        buf_init(&buf, 1 << 20);
        assert_int_equal(adalora_create(&toy_opts, &m[0], 1, &a, NULL), ERR_OK);
        assert_int_equal(adalora_create(&toy_opts, &m[1], 1, &b, NULL), ERR_OK);
        for (int64_t step = 0; step <= 11; step++) {
            if (step == stop) {
                assert_int_equal(buf_add(&buf, "x", 1), ERR_OK); /* not aligned */
                assert_int_equal(adalora_save(a, &buf, NULL), ERR_OK);
                assert_int_equal(buf.len, 1 + adalora_state_bytes(a));
                for (size_t len = 0; len < buf.len - 1; len += 1 + len / 50)
                    assert_int_equal(try_restore(b, buf.data + 1, len), ERR_INVALID);
                assert_int_equal(try_restore(b, buf.data + 1, buf.len - 1), ERR_OK);
            }
            for (int i = 0; i < (step >= stop ? 2 : 1); i++) {
                toy_fill(&t[i], (uint64_t)step);
                adalora_update(i ? b : a, &alone, step, &report[i]);
            }
            if (step >= stop) {
                assert_memory_equal(&t[0], &t[1], sizeof t[0]);
                assert_int_equal(report[0].kept, report[1].kept);
                assert_true(report[0].threshold == report[1].threshold ||
                            (isnan(report[0].threshold) && isnan(report[1].threshold)));
            }
        }
        /* And back from a finished run to one under way. */
        assert_int_equal(try_restore(a, buf.data + 1, buf.len - 1), ERR_OK);
        assert_int_equal(adalora_state_bytes(a), buf.len - 1);
        buf_free(&buf);
        adalora_destroy(a);
        adalora_destroy(b);
    }
}

static void damaged_state_changes_nothing(void **state)
{
    (void)state;
    struct toy t, u;
    struct adalora *a = NULL, *two = NULL;
    struct adalora_report report;
    struct buf good, again;
    toy_fill(&t, 3);
    toy_fill(&u, 4);
    const struct adalora_module m[2] = { toy_module(&t), toy_module(&u) };
    buf_init(&good, 1 << 20);
    buf_init(&again, 1 << 20);
    assert_int_equal(adalora_create(&toy_opts, m, 1, &a, NULL), ERR_OK);
    assert_int_equal(adalora_create(&toy_opts, m, 2, &two, NULL), ERR_OK);
    adalora_update(a, &alone, 0, &report);
    assert_int_equal(adalora_save(a, &good, NULL), ERR_OK);
    assert_int_equal(try_restore(two, good.data, good.len), ERR_INVALID);

    char *bad = malloc(good.len);
    static const size_t spoiled[] = { 0, 4, 8, 16, 24, 33, 41 };
    for (size_t i = 0; i < sizeof spoiled / sizeof spoiled[0]; i++) {
        memcpy(bad, good.data, good.len);
        bad[spoiled[i]] ^= 3;
        assert_int_equal(try_restore(a, bad, good.len), ERR_INVALID);
    }
    memcpy(bad, good.data, good.len);
    memset(bad + good.len - 4, 0xff, 4); /* an average that is not a number */
    assert_int_equal(try_restore(a, bad, good.len), ERR_INVALID);
    assert_int_equal(adalora_save(a, &again, NULL), ERR_OK);
    assert_int_equal(good.len, again.len);
    assert_memory_equal(good.data, again.data, good.len);

    struct buf small;
    buf_init(&small, good.len - 1);
    assert_int_equal(adalora_save(a, &small, NULL), ERR_TOO_LARGE);
    assert_int_equal(small.len, 0);
    buf_free(&small);
    buf_free(&good);
    buf_free(&again);
    free(bad);
    adalora_destroy(a);
    adalora_destroy(two);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_term_is_that_of_the_trace),
        cmocka_unit_test(its_gradient_is_all_that_A_and_B_get_at_first),
        cmocka_unit_test(its_gradient_is_the_slope),
        cmocka_unit_test(orthogonal_factors_have_no_gradient),
        cmocka_unit_test(budgets_are_those_of_the_traces),
        cmocka_unit_test(budgets_are_truncated_as_python_does),
        cmocka_unit_test(a_budget_just_below_an_integer_is_cut),
        cmocka_unit_test(first_scores_come_from_the_averages_of_the_trace),
        cmocka_unit_test(scores_follow_the_formula),
        cmocka_unit_test(scores_of_the_trace_give_its_masks),
        cmocka_unit_test(masks_come_when_the_trace_has_them),
        cmocka_unit_test(nothing_goes_where_nothing_has_to),
        cmocka_unit_test(ties_go_together),
        cmocka_unit_test(senseless_schedules_are_refused),
        cmocka_unit_test(threads_change_no_bit),
        cmocka_unit_test(a_restored_run_goes_on_the_same),
        cmocka_unit_test(damaged_state_changes_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
