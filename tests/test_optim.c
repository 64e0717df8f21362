/* test_optim.c - AdamW against PyTorch's steps of the traces, its 8-bit moments against their
 * definition and beside fp32, saved state, learning rates. */
#include "engine/nf4.h"
#include "engine/num.h"
#include "engine/optim.h"
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

static struct optim *make(const struct optim_tensor *t, size_t n, enum train_moments m, double wd)
{
    struct optim *o = NULL;
    struct err err = { 0 };
    if (optim_create(t, n, m, 0.9, 0.999, 1e-8, wd, &o, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return o;
}

/* --- PyTorch's steps ------------------------------------------------------------------------- */
/* Initial parameters and the gradients of step 1 (clipped where the recipe clips) give the
 * parameters after it. */
static void check_trace(const char *name)
{
    json_t *trace = golden_trace(name);
    struct golden p = golden_load(name, "init"), g = golden_load(name, "grads_step1");
    struct golden want = golden_load(name, "after_step1");
    const json_t *first = json_array_get(json_object_get(trace, "steps"), 0);
    const json_t *lr = json_object_get(first, "lr"), *norm = json_object_get(first, "grad_norm");
    const double rate = lr != NULL ? json_number_value(lr) : golden_number(trace, "lr");
    const double clip = json_number_value(json_object_get(trace, "clip"));

    struct optim_tensor *t = calloc(p.n, sizeof *t);
    for (size_t i = 0; i < p.n; i++)
        t[i] = (struct optim_tensor){ p.tensors[i].data, golden_find(&g, p.tensors[i].name)->data,
                                      p.tensors[i].n, 1 };
    struct optim *o = make(t, p.n, TRAIN_MOMENTS_F32, golden_number(trace, "weight_decay"));
    if (norm != NULL) {
        const double before = json_number_value(norm);
        const double expected = clip > 0 ? clip * before / (before + 1e-6) : before;
        assert_float_equal(optim_grad_norm(o), expected, 1e-5 * expected);
    }
    optim_step(o, &alone, rate);
    double worst = 0;
    for (size_t i = 0; i < p.n; i++) {
        const struct golden_tensor *w = golden_find(&want, p.tensors[i].name);
        for (size_t k = 0; k < w->n; k++)
            worst = fmax(worst, fabs((double)p.tensors[i].data[k] - (double)w->data[k]));
    }
    print_message("%-24s worst difference of a parameter %.1e\n", name, worst);
    assert_true(worst < 2e-7);
    optim_destroy(o);
    free(t);
    golden_free(&p);
    golden_free(&g);
    golden_free(&want);
    json_decref(trace);
}

static void steps_are_those_of_pytorch(void **state)
{
    (void)state;
    static const char *const traces[] = {
        "lora_f32",
        "lora_nf4",
        "lora_nf4_randB",
        "lora_bloom_nf4",
        "lora_chatglm_nf4",
        "lora_qwen3_nf4",
        "rslora_nf4_wd",
        "qlora_recipe_clip_accum",
        "dora_nf4",
        "adalora_nf4",
        "adalora_nf4_lr1e-2",
        "adalora_bloom_f32",
        "adalora_deltaT3_from1",
    };
    for (size_t i = 0; i < sizeof traces / sizeof traces[0]; i++)
        check_trace(traces[i]);
}

/* --- against the formula in double ------------------------------------------------------------ */
static void fill_normal(uint64_t stream, float sd, float *x, size_t n)
{
    train_rand_normal(1, stream, sd, x, n);
}

static void many_steps_follow_the_formula(void **state)
{
    (void)state;
    enum { N = 300, STEPS = 60 };
    float p[2][N], g[2][N];
    double q[2][N], m[2][N] = { { 0 } }, v[2][N] = { { 0 } };
    const double ratio[2] = { 1, 16 }, wd = 0.02;
    struct optim_tensor t[2];
    for (int i = 0; i < 2; i++) {
        fill_normal((uint64_t)i, 1, p[i], N);
        for (int k = 0; k < N; k++)
            q[i][k] = (double)p[i][k];
        t[i] = (struct optim_tensor){ p[i], g[i], N, ratio[i] };
    }
    struct optim *o = make(t, 2, TRAIN_MOMENTS_F32, wd);
    for (int step = 1; step <= STEPS; step++) {
        const double lr = 1e-3 / step;
        for (int i = 0; i < 2; i++) {
            fill_normal(100 + 2 * (uint64_t)step + (uint64_t)i, 0.1f, g[i], N);
            for (int k = 0; k < N; k++) {
                const double x = (double)g[i][k], rate = lr * ratio[i];
                m[i][k] = 0.9 * m[i][k] + 0.1 * x;
                v[i][k] = 0.999 * v[i][k] + 0.001 * x * x;
                q[i][k] -= rate * wd * q[i][k];
                q[i][k] -= rate * m[i][k] / (1 - pow(0.9, step)) /
                           (sqrt(v[i][k] / (1 - pow(0.999, step))) + 1e-8);
            }
        }
        optim_step(o, &alone, lr);
    }
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < N; k++)
            assert_float_equal((double)p[i][k], q[i][k], 2e-6 * (1 + fabs(q[i][k])));
    optim_destroy(o);
}

static void gradients_are_measured_scaled_and_zeroed(void **state)
{
    (void)state;
    enum { N = 40003 };
    float *g = malloc(sizeof(float) * N), *p = calloc(N, sizeof(float)), one = 3.0f, q = 0;
    fill_normal(5, 2, g, N);
    const struct optim_tensor t[2] = { { p, g, N, 1 }, { &q, &one, 1, 1 } };
    struct optim *o = make(t, 2, TRAIN_MOMENTS_F32, 0);
    double sum = 9;
    for (int i = 0; i < N; i++)
        sum += (double)g[i] * (double)g[i];
    assert_float_equal(optim_grad_norm(o), sqrt(sum), 1e-9 * sqrt(sum));
    optim_scale_grads(o, 0.5f);
    assert_float_equal(optim_grad_norm(o), sqrt(sum) / 2, 1e-9 * sqrt(sum));
    assert_true(one == 1.5f);
    g[N - 1] = NAN;
    assert_true(isnan(optim_grad_norm(o)));
    g[N - 1] = -INFINITY;
    assert_true(isinf(optim_grad_norm(o)));
    optim_zero_grads(o);
    assert_true(optim_grad_norm(o) == 0);
    optim_destroy(o);
    free(g);
    free(p);
}

/* --- 8 bits ---------------------------------------------------------------------------------- */
static void the_unsigned_map_follows_its_rule(void **state)
{
    (void)state;
    float map[256];
    optim_unsigned_map(map);
    assert_true(map[0] == 0.0f && map[255] == 1.0f);
    int at = 1;
    for (int d = 0; d < 7; d++) {
        const int parts = 2 << d;
        for (int i = 0; i < parts; i++, at++) {
            const double want = pow(10, d - 6) * (0.1 + 0.9 * (i + 0.5) / parts);
            assert_float_equal((double)map[at], want, 2e-7 * want);
            assert_true(map[at] > map[at - 1]);
        }
    }
    assert_int_equal(at, 255);
    /* Its decade of 64 lies a tenth below the signed map's, whose bits are the reference's. */
    for (int i = 0; i < 64; i++)
        assert_true(map[63 + i] == 0.1f * nf4_dynamic8[191 + i]);
}

static float nearest(const float map[256], double x)
{
    float best = map[0];
    for (int i = 1; i < 256; i++)
        if (fabs((double)map[i] - x) < fabs((double)best - x))
            best = map[i];
    return best;
}

enum { N8 = 5000, BLOCKS8 = (N8 + OPTIM_BLOCK - 1) / OPTIM_BLOCK };

/* Gradients over six decades, so that every part of the maps is met. */
static void wide(float *g, size_t n)
{
    fill_normal(77, 1, g, n);
    for (size_t i = 0; i < n; i++)
        g[i] *= powf(10.0f, -(float)(i % 7));
    memset(g + OPTIM_BLOCK, 0, OPTIM_BLOCK * sizeof *g); /* a block without gradient */
}

/* What was kept of m after a step shows in the next one: without gradient and with an eps that
 * drowns v, it changes p by -lr beta1 m' / ((1 - beta1^2) eps). */
static void first_moments_keep_the_nearest_code(void **state)
{
    (void)state;
    float *p = calloc(N8, sizeof *p), *g = malloc(N8 * sizeof *g), *m = malloc(N8 * sizeof *m);
    wide(g, N8);
    const struct optim_tensor t = { p, g, N8, 1 };
    struct optim *o = NULL;
    assert_int_equal(optim_create(&t, 1, TRAIN_MOMENTS_8BIT, 0.9, 0.999, 1e20, 0, &o, NULL), 0);
    optim_step(o, &alone, 0);
    for (int i = 0; i < N8; i++)
        m[i] = 0.1f * g[i];
    optim_zero_grads(o);
    optim_step(o, &alone, 1e20);
    for (int b = 0; b < BLOCKS8; b++) {
        const int end = b + 1 < BLOCKS8 ? (b + 1) * OPTIM_BLOCK : N8;
        double most = 0;
        for (int i = b * OPTIM_BLOCK; i < end; i++)
            most = fmax(most, fabs((double)m[i]));
        for (int i = b * OPTIM_BLOCK; i < end; i++) {
            double want = most > 0 ? (double)nearest(nf4_dynamic8, (double)m[i] / most) : 0;
            if (want == 0 && m[i] < 0)
                want = (double)nf4_dynamic8[126];
            want *= -most * 0.9 / (1 - 0.81);
            assert_float_equal((double)p[i], want, 1e-5 * fabs(want) + 1e-30);
        }
    }
    optim_destroy(o);
    free(p);
    free(g);
    free(m);
}

/* And what was kept of v: with beta1 = 0 and a gradient that is small beside it, p changes by
 * -lr g / sqrt(beta2 v' / (1 - beta2^2)). */
static void second_moments_keep_the_nearest_code_above_zero(void **state)
{
    (void)state;
    float *p = calloc(N8, sizeof *p), *g = malloc(N8 * sizeof *g), *v = malloc(N8 * sizeof *v);
    float map[256];
    optim_unsigned_map(map);
    wide(g, N8);
    const struct optim_tensor t = { p, g, N8, 1 };
    struct optim *o = NULL;
    assert_int_equal(optim_create(&t, 1, TRAIN_MOMENTS_8BIT, 0, 0.5, 0, 0, &o, NULL), 0);
    for (int i = 0; i < N8; i++) {
        g[i] += i < 2 * OPTIM_BLOCK && i >= OPTIM_BLOCK ? 1e-6f : 0; /* eps is 0 here */
        v[i] = 0.5f * g[i] * g[i];
    }
    optim_step(o, &alone, 0);
    for (int i = 0; i < N8; i++)
        g[i] = 1e-18f;
    optim_step(o, &alone, 1e18);
    for (int b = 0; b < BLOCKS8; b++) {
        const int end = b + 1 < BLOCKS8 ? (b + 1) * OPTIM_BLOCK : N8;
        double most = 0;
        for (int i = b * OPTIM_BLOCK; i < end; i++)
            most = fmax(most, (double)v[i]);
        for (int i = b * OPTIM_BLOCK; i < end; i++) {
            double want = (double)nearest(map, (double)v[i] / most);
            if (want == 0)
                want = (double)map[1];
            want = -1 / sqrt(0.5 * want * most / (1 - 0.25));
            assert_float_equal((double)p[i], want, 1e-4 * fabs(want));
        }
    }
    optim_destroy(o);
    free(p);
    free(g);
    free(v);
}

/* Minimise sum c_i (p_i - t_i)^2 / 2, c = 1, 0.1, ... in turn, with noise in the gradient. */
static double quadratic(enum train_moments moments, int decades)
{
    enum { N = 3 * 4096 + 100, STEPS = 400 };
    float *p = calloc(N, sizeof *p), *g = malloc(N * sizeof *g), *noise = malloc(N * sizeof *g);
    float *goal = malloc(N * sizeof *g);
    fill_normal(31, 1, goal, N);
    const struct optim_tensor t = { p, g, N, 1 };
    struct optim *o = make(&t, 1, moments, 0);
    for (int step = 1; step <= STEPS; step++) {
        fill_normal(1000 + (uint64_t)step, 0.05f, noise, N);
        for (int i = 0; i < N; i++)
            g[i] = powf(10.0f, -(float)(i % decades)) * (p[i] - goal[i] + noise[i]);
        optim_step(o, &alone, 0.05 * (1 - (step - 1.0) / STEPS));
    }
    double loss = 0;
    for (int i = 0; i < N; i++)
        loss += pow((double)p[i] - (double)goal[i], 2) / N;
    optim_destroy(o);
    free(p);
    free(g);
    free(noise);
    free(goal);
    return loss;
}

static void eight_bits_converge_beside_fp32(void **state)
{
    (void)state;
    const double f32 = quadratic(TRAIN_MOMENTS_F32, 3), q8 = quadratic(TRAIN_MOMENTS_8BIT, 3);
    print_message("mean squared distance: fp32 %.2e, 8 bits %.2e (at the start 1)\n", f32, q8);
    assert_true(f32 < 1e-4 && q8 < 2e-4);
}

/* Gradients of 1/10000 beside the largest of their block: the square is below what a code can say.
 * They come on more slowly, and do not run away. */
static void eight_bits_are_stable_with_very_unequal_gradients(void **state)
{
    (void)state;
    const double q8 = quadratic(TRAIN_MOMENTS_8BIT, 5);
    print_message("mean squared distance: %.2e (at the start 1)\n", q8);
    assert_true(q8 < 0.03);
}

static void small_tensors_keep_fp32(void **state)
{
    (void)state;
    assert_int_equal(optim_moment_bytes(TRAIN_MOMENTS_8BIT, 4095), 4095 * 8);
    assert_int_equal(optim_moment_bytes(TRAIN_MOMENTS_8BIT, 4096), 4096 * 2 + 16 * 8);
    assert_int_equal(optim_moment_bytes(TRAIN_MOMENTS_8BIT, 4097), 4097 * 2 + 17 * 8);
    assert_int_equal(optim_moment_bytes(TRAIN_MOMENTS_F32, 4096), 4096 * 8);
    float p[2][64], g[64];
    fill_normal(1, 1, p[0], 64);
    memcpy(p[1], p[0], sizeof p[0]);
    for (int kind = 0; kind < 2; kind++) {
        const struct optim_tensor t = { p[kind], g, 64, 1 };
        struct optim *o = make(&t, 1, kind ? TRAIN_MOMENTS_8BIT : TRAIN_MOMENTS_F32, 0.1);
        for (uint64_t step = 0; step < 5; step++) {
            fill_normal(50 + step, 1, g, 64);
            optim_step(o, &alone, 0.01);
        }
        optim_destroy(o);
    }
    assert_memory_equal(p[0], p[1], sizeof p[0]);
}

/* --- threads, and saved state ----------------------------------------------------------------- */
enum { SIZES = 4 };
static const size_t sizes[SIZES] = { 50001, 1, 4096, 33000 };

struct run {
    float *p[SIZES], *g[SIZES];
    struct optim *o;
};

static struct run run_create(enum train_moments moments)
{
    struct run r;
    struct optim_tensor t[SIZES];
    for (int i = 0; i < SIZES; i++) {
        r.p[i] = malloc(sizes[i] * sizeof(float));
        r.g[i] = malloc(sizes[i] * sizeof(float));
        fill_normal(900 + (uint64_t)i, 1, r.p[i], sizes[i]);
        t[i] = (struct optim_tensor){ r.p[i], r.g[i], sizes[i], i % 2 ? 4 : 1 };
    }
    r.o = make(t, SIZES, moments, 0.01);
    return r;
}

static void run_free(struct run *r)
{
    optim_destroy(r->o);
    for (int i = 0; i < SIZES; i++) {
        free(r->p[i]);
        free(r->g[i]);
    }
}

static void run_steps(struct run *r, const struct compute *c, int first, int last)
{
    for (int step = first; step <= last; step++) {
        for (int i = 0; i < SIZES; i++)
            fill_normal((uint64_t)step * SIZES + (uint64_t)i, 0.3f, r->g[i], sizes[i]);
        optim_step(r->o, c, 1e-2);
    }
}

static void assert_same(const struct run *a, const struct run *b)
{
    for (int i = 0; i < SIZES; i++)
        assert_memory_equal(a->p[i], b->p[i], sizes[i] * sizeof(float));
}

static const enum train_moments kinds[] = { TRAIN_MOMENTS_F32, TRAIN_MOMENTS_8BIT };

static void threads_change_no_bit(void **state)
{
    (void)state;
    struct compute many = { 0 };
    assert_int_equal(pool_create(3, &many.pool, NULL), ERR_OK);
    for (int k = 0; k < 2; k++) {
        struct run a = run_create(kinds[k]), b = run_create(kinds[k]);
        run_steps(&a, &alone, 1, 4);
        run_steps(&b, &many, 1, 4);
        assert_same(&a, &b);
        run_free(&a);
        run_free(&b);
    }
    pool_destroy(many.pool);
}

static void a_restored_run_goes_on_bit_for_bit(void **state)
{
    (void)state;
    for (int k = 0; k < 2; k++) {
        struct run a = run_create(kinds[k]), b = run_create(kinds[k]);
        struct buf buf;
        buf_init(&buf, 1 << 24);
        run_steps(&a, &alone, 1, 3);
        assert_int_equal(buf_add(&buf, "before", 6), ERR_OK);
        assert_int_equal(optim_save(a.o, &buf, NULL), ERR_OK);
        assert_int_equal(buf.len, 6 + optim_state_bytes(a.o));
        assert_int_equal(buf_add(&buf, "after", 5), ERR_OK);
        for (int i = 0; i < SIZES; i++)
            memcpy(b.p[i], a.p[i], sizes[i] * sizeof(float));
        const void *at = buf.data + 6; /* not aligned */
        size_t left = buf.len - 6;
        assert_int_equal(optim_restore(b.o, &at, &left, NULL), ERR_OK);
        assert_int_equal(left, 5);
        assert_memory_equal(at, "after", 5);
        run_steps(&a, &alone, 4, 6);
        run_steps(&b, &alone, 4, 6);
        assert_same(&a, &b);
        buf_free(&buf);
        run_free(&a);
        run_free(&b);
    }
}

static int try_restore(struct optim *o, const void *data, size_t len)
{
    struct err err = { 0 };
    const void *at = data;
    size_t left = len;
    const int rc = optim_restore(o, &at, &left, &err);
    if (rc != ERR_OK) {
        assert_int_equal(rc, ERR_INVALID);
        assert_true(err.msg[0] != '\0');
        assert_ptr_equal(at, data);
        assert_int_equal(left, len);
    }
    return rc;
}

static void damaged_state_changes_nothing(void **state)
{
    (void)state;
    struct run a = run_create(TRAIN_MOMENTS_8BIT), f32 = run_create(TRAIN_MOMENTS_F32);
    struct buf good, now;
    buf_init(&good, 1 << 24);
    buf_init(&now, 1 << 24);
    run_steps(&a, &alone, 1, 2);
    assert_int_equal(optim_save(a.o, &good, NULL), ERR_OK);
    run_steps(&a, &alone, 3, 3);
    assert_int_equal(optim_save(a.o, &now, NULL), ERR_OK);

    for (size_t len = 0; len < good.len; len += len < 200 ? 1 : 997)
        assert_int_equal(try_restore(a.o, good.data, len), ERR_INVALID);
    char *bad = malloc(good.len);
    memcpy(bad, good.data, good.len);
    bad[0] ^= 1;
    assert_int_equal(try_restore(a.o, bad, good.len), ERR_INVALID);
    memcpy(bad, good.data, good.len);
    bad[16]++; /* number of tensors */
    assert_int_equal(try_restore(a.o, bad, good.len), ERR_INVALID);
    memcpy(bad, good.data, good.len);
    bad[24]++; /* size of the first */
    assert_int_equal(try_restore(a.o, bad, good.len), ERR_INVALID);
    memcpy(bad, good.data, good.len);
    memset(bad + good.len - 4, 0xff, 4); /* a largest v that is not a number */
    assert_int_equal(try_restore(a.o, bad, good.len), ERR_INVALID);
    assert_int_equal(try_restore(f32.o, good.data, good.len), ERR_INVALID);

    struct buf again;
    buf_init(&again, 1 << 24);
    assert_int_equal(optim_save(a.o, &again, NULL), ERR_OK);
    assert_int_equal(again.len, now.len);
    assert_memory_equal(again.data, now.data, now.len);
    assert_int_equal(try_restore(a.o, good.data, good.len), ERR_OK);

    struct buf small; /* no room: nothing is left behind */
    buf_init(&small, good.len - 1);
    assert_int_equal(optim_save(a.o, &small, NULL), ERR_TOO_LARGE);
    assert_int_equal(small.len, 0);
    buf_free(&small);
    buf_free(&again);
    buf_free(&good);
    buf_free(&now);
    free(bad);
    run_free(&a);
    run_free(&f32);
}

/* --- learning rates -------------------------------------------------------------------------- */
static void the_rates_are_those_of_the_trace(void **state)
{
    (void)state;
    json_t *trace = golden_trace("qlora_recipe_clip_accum");
    const json_t *steps = json_object_get(trace, "steps");
    const struct train_opts o = { .lr = golden_number(trace, "lr"),
                                  .warmup = golden_number(trace, "warmup"),
                                  .schedule = TRAIN_CONSTANT };
    const int64_t n = (int64_t)json_array_size(steps);
    assert_true(n >= 5);
    for (int64_t s = 1; s <= n; s++)
        assert_float_equal(optim_lr(&o, s, n),
                           golden_number(json_array_get(steps, (size_t)s - 1), "lr"), 1e-18);
    json_decref(trace);
}

static void schedules_follow_their_formulas(void **state)
{
    (void)state;
    struct train_opts o = { .lr = 1, .warmup = 0.03, .schedule = TRAIN_LINEAR };
    /* 3 steps of 100 */
    assert_float_equal(optim_lr(&o, 1, 100), 1.0 / 3, 1e-15);
    assert_true(optim_lr(&o, 3, 100) == 1 && optim_lr(&o, 4, 100) == 1);
    assert_float_equal(optim_lr(&o, 5, 100), 96.0 / 97, 1e-15);
    assert_float_equal(optim_lr(&o, 100, 100), 1.0 / 97, 1e-15);
    assert_true(optim_lr(&o, 101, 100) == 0);
    assert_true(optim_lr(&o, 1, 1) == 1); /* a part of one step is one */
    o.warmup = 0;
    assert_true(optim_lr(&o, 1, 10) == 1);
    assert_float_equal(optim_lr(&o, 10, 10), 0.1, 1e-15);
    o.warmup = 1e9; /* all of it is warm-up */
    assert_float_equal(optim_lr(&o, 7, 10), 0.7, 1e-15);

    o.schedule = TRAIN_COSINE;
    o.warmup = 10;
    o.lr = 3e-4;
    for (int64_t s = 11; s <= 1000; s++) {
        const double want = 3e-4 * 0.5 * (1 + cos(acos(-1.0) * (double)(s - 1 - 10) / 990.0));
        assert_float_equal(optim_lr(&o, s, 1000), want, 1e-19);
        assert_true(optim_lr(&o, s, 1000) > 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_are_those_of_pytorch),
        cmocka_unit_test(many_steps_follow_the_formula),
        cmocka_unit_test(gradients_are_measured_scaled_and_zeroed),
        cmocka_unit_test(the_unsigned_map_follows_its_rule),
        cmocka_unit_test(first_moments_keep_the_nearest_code),
        cmocka_unit_test(second_moments_keep_the_nearest_code_above_zero),
        cmocka_unit_test(eight_bits_converge_beside_fp32),
        cmocka_unit_test(eight_bits_are_stable_with_very_unequal_gradients),
        cmocka_unit_test(small_tensors_keep_fp32),
        cmocka_unit_test(threads_change_no_bit),
        cmocka_unit_test(a_restored_run_goes_on_bit_for_bit),
        cmocka_unit_test(damaged_state_changes_nothing),
        cmocka_unit_test(the_rates_are_those_of_the_trace),
        cmocka_unit_test(schedules_follow_their_formulas),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
