/* test_lora.c - adapters of mixed batches: against fp64, and the same bits however rows are grouped,
 * split over threads, or computed. */
#include "engine/lora.h"
#include "engine/num.h"
#include "tests/support_linear.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static uint32_t rng_state = 11;
static float rnd(float scale)
{
    rng_state = rng_state * 1664525 + 1013904223;
    return ((float)(rng_state >> 8) * 0x1p-23f - 1) * scale;
}

/* --- random adapters, as adapter_build() would make them --------------------------------------- */
static void *random_tensor(enum dtype t, size_t n, float scale)
{
    char *p = malloc(n * 4 + 4);
    assert_non_null(p);
    for (size_t i = 0; i < n; i++) {
        float x = rnd(scale);
        uint16_t h = t == DT_F16 ? f32_to_f16(x) : f32_to_bf16(x);
        memcpy(p + i * dtype_size(t), t == DT_F32 ? (void *)&x : (void *)&h, dtype_size(t));
    }
    return p;
}

static double element(enum dtype t, const void *p, size_t i)
{
    if (t == DT_F32)
        return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return t == DT_F16 ? f16_to_f32(h) : bf16_to_f32(h);
}

enum { IN = 70, IN_64 = 128, OUT_Q = 600, OUT_K = 33, OUT_V = 40, NMODS = 3, NADAPTERS = 5, ROWS = 45, L = 2 };
static const enum module mods[NMODS] = { MOD_Q, MOD_K, MOD_V };
static const int outs[NMODS] = { OUT_Q, OUT_K, OUT_V };

struct made {
    struct adapter adapter;
    struct lora_module modules[L * MOD_SLOTS];
};

static void make(struct made *m, const int rank[NMODS], enum dtype t, int in)
{
    memset(m, 0, sizeof *m);
    for (int i = 0; i < NMODS; i++) {
        const size_t r = (size_t)rank[i];
        if (r == 0)
            continue; /* stays all zero, shapes too */
        m->modules[MOD_SLOTS + (int)mods[i]] = (struct lora_module){
            .rank = rank[i], .in = in, .out = outs[i], .dtype = t,
            .A = random_tensor(t, r * (size_t)in, 1), .B = random_tensor(t, r * (size_t)outs[i], 1),
            .gain = random_tensor(DT_F32, r, 2),
        };
    }
    m->adapter.L = L;
    m->adapter.modules = m->modules;
}

static void unmake(struct made *m)
{
    for (int i = 0; i < L * MOD_SLOTS; i++) {
        free((void *)(uintptr_t)m->modules[i].A);
        free((void *)(uintptr_t)m->modules[i].B);
        free((void *)(uintptr_t)m->modules[i].gain);
    }
}

/* Ranks that differ per module, none at all, more than a pass takes at once, every type. */
static struct made made[NADAPTERS], made_64[NADAPTERS];
static struct lora_set sets[7], sets_64[7];
static float x[ROWS * IN];

static void make_sets(struct lora_set ret[7], const struct made m[NADAPTERS])
{
    for (int i = 0; i < NADAPTERS; i++)
        ret[i] = (struct lora_set){ 1, { { &m[i].adapter, 1.0f } } };
    ret[5] = (struct lora_set){ 0 };
    ret[6] = (struct lora_set){ 3, { { &m[2].adapter, 1 }, { &m[3].adapter, -0.5f },
                                     { &m[0].adapter, 0.25f } } };
}

static int set_up(void **state)
{
    (void)state;
    static const int ranks[NADAPTERS][NMODS] = {
        { 8, 8, 8 }, { 1, 0, 12 }, { 0, 0, 0 }, { 300, 5, 17 }, { 0, 64, 3 }
    };
    static const enum dtype types[NADAPTERS] = { DT_BF16, DT_F32, DT_F32, DT_F16, DT_F32 };
    for (int i = 0; i < NADAPTERS; i++) {
        make(&made[i], ranks[i], types[i], IN);
        make(&made_64[i], ranks[i], types[i], IN_64);
    }
    make_sets(sets, made);
    make_sets(sets_64, made_64);
    for (int i = 0; i < ROWS * IN; i++)
        x[i] = rnd(1);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    for (int i = 0; i < NADAPTERS; i++) {
        unmake(&made[i]);
        unmake(&made_64[i]);
    }
    return 0;
}

/* Row r of the mixed batch below has set row_set(r). */
static const struct { int end, set; } layout[] = {
    { 1, 0 }, { 2, 5 }, { 3, 3 }, { 22, 0 }, { 25, 1 }, { 26, 2 }, { 31, 6 }, { 38, 5 }, { 43, 4 },
    { 45, 3 },
};
enum { NGROUPS = sizeof layout / sizeof layout[0] };

struct result {
    float y[NMODS][ROWS * OUT_Q];
};

static void apply(const struct compute *c, const struct lora_group *groups, int n,
                  struct result *r)
{
    int ldy[NMODS];
    float *y[NMODS], *scratch = malloc(lora_scratch(ROWS) * sizeof *scratch);
    for (int m = 0; m < NMODS; m++) {
        y[m] = r->y[m];
        ldy[m] = OUT_Q;
    }
    lora_apply(c, groups, n, &(struct lora_where){ 1, mods, NMODS }, x, IN, y, ldy, scratch);
    free(scratch);
}

static void start(struct result *r)
{
    for (int m = 0; m < NMODS; m++)
        for (int i = 0; i < ROWS * OUT_Q; i++)
            r->y[m][i] = (float)(i % 13) - 6 + (float)m;
}

static struct result *mixed(enum isa isa, int threads)
{
    struct lora_group groups[NGROUPS];
    struct compute c = { .isa = isa };
    struct result *r = malloc(sizeof *r);
    assert_int_equal(pool_create(threads, &c.pool, NULL), ERR_OK);
    for (int g = 0; g < NGROUPS; g++)
        groups[g] = (struct lora_group){ g > 0 ? layout[g - 1].end : 0, layout[g].end,
                                         &sets[layout[g].set] };
    start(r);
    apply(&c, groups, NGROUPS, r);
    pool_destroy(c.pool);
    return r;
}

/* The instruction sets beside scalar; says so if this CPU lacks one. */
static int vector_isas(enum isa ret[2])
{
    static const char *const names[] = { "avx2", "avx512" };
    int n = 0;
    for (int i = 0; i < 2; i++) {
        if (isa_select(names[i], &ret[n], NULL) == ERR_OK)
            n++;
        else
            fprintf(stderr, "SKIPPED: this CPU has no %s\n", names[i]);
    }
    return n;
}

/* --- tests ------------------------------------------------------------------------------------- */
static double want_share(const struct lora_set *set, int m, int row, int o)
{
    double y = 0;
    for (int i = 0; i < set->n; i++) {
        const struct lora_module *mod = adapter_module(set->item[i].adapter, 1, mods[m]);
        for (int j = 0; j < mod->rank; j++) {
            double u = 0;
            for (int k = 0; k < IN; k++)
                u += x[row * IN + k] *
                     element(mod->dtype, mod->A, (size_t)j * IN + (size_t)k);
            y += u * mod->gain[j] * set->item[i].weight *
                 element(mod->dtype, mod->B, lora_b_index(mod, o, j));
        }
    }
    return y;
}

static void a_mixed_batch_agrees_with_fp64(void **state)
{
    (void)state;
    struct result *r = mixed(ISA_SCALAR, 1), *before = malloc(sizeof *before);
    start(before);
    for (int g = 0, row = 0; g < NGROUPS; g++) {
        for (; row < layout[g].end; row++) {
            for (int m = 0; m < NMODS; m++) {
                for (int o = 0; o < OUT_Q; o++) {
                    const int at = row * OUT_Q + o;
                    double share = o < outs[m] ? want_share(&sets[layout[g].set], m, row, o) : 0;
                    if (share == 0) /* no adapter here: not touched at all */
                        assert_true(r->y[m][at] == before->y[m][at]);
                    double want = before->y[m][at] + share;
                    assert_true(fabs(r->y[m][at] - want) < 2e-4);
                }
            }
        }
    }
    free(before);
    free(r);
}

static void the_bits_depend_on_neither_threads_nor_instruction_set(void **state)
{
    (void)state;
    enum isa isas[2];
    struct result *one = mixed(ISA_SCALAR, 1), *three = mixed(ISA_SCALAR, 3);
    assert_memory_equal(one, three, sizeof *one);
    free(three);
    for (int n = vector_isas(isas); n > 0; n--) {
        for (int threads = 1; threads <= 3; threads++) {
            struct result *v = mixed(isas[n - 1], threads);
            assert_memory_equal(one, v, sizeof *one);
            free(v);
        }
    }
    free(one);
}

static void a_row_alone_has_the_bits_of_the_row_in_a_batch(void **state)
{
    (void)state;
    enum isa isas[2];
    struct result *all = mixed(ISA_SCALAR, 1), *alone = malloc(sizeof *alone);
    const int n = vector_isas(isas);
    struct compute c = { .isa = n > 0 ? isas[n - 1] : ISA_SCALAR };
    start(alone);
    for (int g = 0, row = 0; g < NGROUPS; g++) {
        for (; row < layout[g].end; row++) {
            struct lora_group group = { row, row + 1, &sets[layout[g].set] };
            apply(&c, &group, 1, alone);
        }
    }
    assert_memory_equal(all, alone, sizeof *all);
    free(all);
    free(alone);
}

/* Beside products of the base, as forward() does it: what comes of the products and then of
 * lora_apply(). */
static void an_epilogue_adds_the_same_bits(void **state)
{
    (void)state;
    const struct lora_where where = { 1, mods, NMODS };
    struct lora_group groups[NGROUPS];
    struct weights weights[NMODS];
    struct result *want = malloc(sizeof *want), *got = malloc(sizeof *got);
    float *in = random_rows(ROWS, IN_64), *scratch = malloc(lora_scratch(ROWS) * sizeof *scratch);
    int ldy[NMODS];
    for (int g = 0; g < NGROUPS; g++)
        groups[g] = (struct lora_group){ g > 0 ? layout[g - 1].end : 0, layout[g].end,
                                         &sets_64[layout[g].set] };
    for (int m = 0; m < NMODS; m++) {
        weights[m] = make_weights(MAT_NF4_P16, outs[m], IN_64);
        ldy[m] = OUT_Q;
    }
    FOR_EACH_ISA(ISA_SCALAR, isa)
    for (int p = PREC_FAST; p <= PREC_F32; p++)
        for (int threads = 1; threads <= 3; threads++) {
            struct compute c = { .isa = isa, .precision = (enum precision)p };
            struct mat_product products[NMODS];
            struct lora_work w;
            struct act a;
            float *y[NMODS];
            assert_int_equal(pool_create(threads, &c.pool, NULL), ERR_OK);
            act_init(&a);
            assert_int_equal(act_reserve(&a, ROWS, IN_64, NULL), ERR_OK);
            act_pack(&c, &a, in, ROWS, IN_64, IN_64);
            start(want);
            start(got);
            for (int m = 0; m < NMODS; m++) {
                y[m] = want->y[m];
                matmul(&c, &weights[m].m, &a, in, y[m], OUT_Q);
            }
            lora_apply(&c, groups, NGROUPS, &where, in, IN_64, y, ldy, scratch);
            for (int m = 0; m < NMODS; m++) {
                y[m] = got->y[m];
                products[m] = (struct mat_product){ &weights[m].m, in, y[m], OUT_Q };
            }
            lora_begin(&w, &c, groups, NGROUPS, &where, &where, in, IN_64, y, ldy, scratch);
            matmul_all(&c, &a, products, NMODS, lora_epilogue(&w));
            lora_end(&w);
            assert_memory_equal(want, got, sizeof *want);
            act_free(&a);
            pool_destroy(c.pool);
        }
    for (int m = 0; m < NMODS; m++)
        free_weights(&weights[m]);
    free(scratch);
    free(in);
    free(got);
    free(want);
}

/* With A and B all ones and one input of 1, each of r columns adds gain * weight. */
static void gains_and_weights_multiply_what_an_adapter_adds(void **state)
{
    (void)state;
    enum { N = 4, RANK = 3 };
    float ones[RANK * N], gain[RANK] = { 1, 0.5f, 2 }, in[N] = { 1, 0, 0, 0 }, out[N] = { 10, 10, 10, 10 };
    for (int i = 0; i < RANK * N; i++)
        ones[i] = 1;
    struct lora_module modules[MOD_SLOTS] = { 0 };
    modules[MOD_DOWN] = (struct lora_module){ .rank = RANK, .in = N, .out = N, .dtype = DT_F32,
                                              .A = ones, .B = ones, .gain = gain };
    struct adapter a = { .L = 1, .modules = modules };
    struct lora_set set = { 2, { { &a, 1.0f }, { &a, -0.25f } } };
    struct lora_group group = { 0, 1, &set };
    struct compute c = { .isa = ISA_SCALAR };
    const enum module down = MOD_DOWN;
    float *y = out, *scratch = malloc(lora_scratch(1) * sizeof *scratch);
    lora_apply(&c, &group, 1, &(struct lora_where){ 0, &down, 1 }, in, N, &y, &(int){ N }, scratch);
    for (int i = 0; i < N; i++)
        assert_true(out[i] == 10 + 3.5f - 0.875f);
    free(scratch);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_mixed_batch_agrees_with_fp64),
        cmocka_unit_test(the_bits_depend_on_neither_threads_nor_instruction_set),
        cmocka_unit_test(a_row_alone_has_the_bits_of_the_row_in_a_batch),
        cmocka_unit_test(an_epilogue_adds_the_same_bits),
        cmocka_unit_test(gains_and_weights_multiply_what_an_adapter_adds),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
