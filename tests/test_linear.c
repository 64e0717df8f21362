/* test_linear.c - linear layers: hand-made numbers, double precision, and every kernel against the
 * scalar definition bit for bit, whatever the number of rows, outputs and threads. */
#include "engine/dot.h"
#include "engine/linear_int.h"
#include "engine/nf4.h"
#include "tests/support_linear.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static void multiply(const struct compute *c, const struct matrix *w, const float *x, int M,
                     int ldx, const float *bias, float *y, int ldy)
{
    struct act a;
    act_init(&a);
    assert_int_equal(act_reserve(&a, M, w->K, NULL), ERR_OK);
    act_pack(c, &a, x, M, w->K, ldx);
    matmul(c, w, &a, bias, y, ldy);
    act_free(&a);
}

/* --- dot products ------------------------------------------------------------------------ */

static void dot_products_follow_the_stated_tree(void **state)
{
    (void)state;
    /* 2^24 + 1 is lost in fp32, so the order shows: lane 0 is 2^24, lanes 1 and 9 are 1 each. */
    float x[16] = { 0x1p24f, 1.0f }, one[16];
    x[9] = 1.0f;
    for (int i = 0; i < 16; i++)
        one[i] = 1.0f;
    FOR_EACH_ISA(ISA_SCALAR, isa)
    {
        /* 1 and 9 meet first and survive; 1 and 0 alone would not. */
        assert_true(dot_ops(isa)->dot_f32(x, one, 16) == 0x1p24f + 2.0f);
        assert_true(dot_ops(isa)->dot_f32(x, one, 2) == 0x1p24f);
        assert_true(dot_ops(isa)->dot_f32(x, one, 0) == 0.0f);
    }
}

static void vector_dot_products_equal_the_scalar_ones(void **state)
{
    (void)state;
    announce_missing();
    const struct dot_ops *s = dot_ops(ISA_SCALAR);
    enum { MAX = 150 };
    float x[MAX], w[MAX], start[MAX], ys[MAX], yv[MAX], lanes[2][16];
    uint16_t bf[MAX], hf[MAX];
    gauss_seed = 1;
    for (size_t n = 0; n <= MAX; n++) {
        for (size_t i = 0; i < MAX; i++) {
            x[i] = gauss();
            /* some products underflow: minus zero must not differ either */
            w[i] = i % 5 == 0 ? 1e-44f * gauss() : gauss();
            bf[i] = f32_to_bf16(w[i]);
            hf[i] = f32_to_f16(w[i]);
            start[i] = gauss();
        }
        FOR_EACH_ISA(ISA_AVX2, isa)
        {
            const struct dot_ops *v = dot_ops(isa);
            assert_int_equal(f32_bits(s->dot_f32(x, w, n)), f32_bits(v->dot_f32(x, w, n)));
            assert_int_equal(f32_bits(s->dot_bf16(x, bf, n)), f32_bits(v->dot_bf16(x, bf, n)));
            assert_int_equal(f32_bits(s->dot_f16(x, hf, n)), f32_bits(v->dot_f16(x, hf, n)));
            memcpy(lanes[0], x, sizeof lanes[0]);
            memcpy(lanes[1], x, sizeof lanes[1]);
            s->lanes_f32(x, w, n, lanes[0]);
            v->lanes_f32(x, w, n, lanes[1]);
            assert_memory_equal(lanes[0], lanes[1], sizeof lanes[0]);
            memcpy(ys, start, sizeof ys);
            memcpy(yv, start, sizeof yv);
            s->axpy_f32(0.3f, w, ys, n);
            v->axpy_f32(0.3f, w, yv, n);
            s->axpy_bf16(-1.7f, bf, ys, n);
            v->axpy_bf16(-1.7f, bf, yv, n);
            s->axpy_f16(0.1f, hf, ys, n);
            v->axpy_f16(0.1f, hf, yv, n);
            assert_memory_equal(ys, yv, sizeof ys);
        }
    }
}

/* dots() of many rows is dot() of each pair, in every instruction set. */
static void blocks_of_dot_products_equal_single_ones(void **state)
{
    (void)state;
    enum { M = 7, N = 6, K = 45, LDX = 50, LDW = 47, LDY = 9 };
    float x[M * LDX], w[N * LDW], y[M * LDY];
    uint16_t bf[N * LDW], hf[N * LDW];
    gauss_seed = 2;
    for (int i = 0; i < M * LDX; i++)
        x[i] = gauss();
    for (int i = 0; i < N * LDW; i++) {
        w[i] = gauss();
        bf[i] = f32_to_bf16(w[i]);
        hf[i] = f32_to_f16(w[i]);
    }
    const struct dot_ops *one = dot_ops(ISA_SCALAR);
    FOR_EACH_ISA(ISA_SCALAR, isa)
    {
        const struct dot_ops *ops = dot_ops(isa);
        ops->dots_f32(x, LDX, M, w, LDW, N, K, y, LDY);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++)
                assert_true(y[m * LDY + n] == one->dot_f32(x + m * LDX, w + n * LDW, K));
        ops->dots_bf16(x, LDX, M, bf, LDW, N, K, y, LDY);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++)
                assert_true(y[m * LDY + n] == one->dot_bf16(x + m * LDX, bf + n * LDW, K));
        ops->dots_f16(x, LDX, M, hf, LDW, N, K, y, LDY);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++)
                assert_true(y[m * LDY + n] == one->dot_f16(x + m * LDX, hf + n * LDW, K));
    }
}

/* --- what is computed -------------------------------------------------------------------- */

/* One row, one output, worked out by hand: weights 1 and -1 at the ends of the block with scale
 * 0.5, activations 4 and 1: y = 0.5 * (1 * 4 - 1 * 1) + bias.  Both codes of x are exact only
 * for 4 (the largest); 1 becomes round(127 / 4) = 32 or round(4095 / 4) = 1024 steps. */
static void quantised_product_of_two_numbers_is_as_on_paper(void **state)
{
    (void)state;
    float w[64] = { 0.0f }, x[64] = { 0.0f }, absmax, y;
    uint8_t packed[32], *codes = get_aligned(512);
    uint16_t s16[16];
    w[0] = 0.5f;
    w[63] = -0.5f;
    x[0] = 4.0f;
    x[63] = 1.0f;
    q4_quantize(Q4_NF4, w, 64, packed, &absmax);
    p16_pack(packed, 1, 64, codes);
    p16_scales_from(&absmax, 1, 64, s16, NULL);
    const struct matrix m = { MAT_NF4_P16, 1, 64, codes, s16, NULL };
    const float bias = 10.0f;
    struct compute c = { NULL, ISA_SCALAR, PREC_FAST };
    multiply(&c, &m, x, 1, 64, &bias, &y, 1);
    assert_float_equal(y, 10.0 + 0.5 * (4.0 - 32.0 * 4.0 / 127.0), 2e-6);
    c.precision = PREC_EXACT;
    multiply(&c, &m, x, 1, 64, &bias, &y, 1);
    assert_float_equal(y, 10.0 + 0.5 * (4.0 - 1024.0 * 4.0 / 4095.0), 2e-6);
    c.precision = PREC_F32;
    multiply(&c, &m, x, 1, 64, &bias, &y, 1);
    assert_true(y == 11.5f);
    free(codes);
}

/* Frobenius error of y relative to the product in double precision with the exact weights. */
static double relative_error(const struct weights *w, const float *x, int M, const float *y)
{
    double err = 0.0, all = 0.0;
    const int N = w->m.N, K = w->m.K;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            double want = 0.0;
            for (int k = 0; k < K; k++)
                want += (double)x[m * K + k] * w->exact[(size_t)n * (size_t)K + (size_t)k];
            const double d = (double)y[m * N + n] - want;
            err += d * d;
            all += want * want;
        }
    return sqrt(err / all);
}

/* Limits: the errors of these roundings when the design was chosen (fast 8.4e-3; exact 2.0e-4, and
 * 1.7e-4 from scales in fp16), rounded up. */
static void errors_stay_below_the_stated_ones(void **state)
{
    (void)state;
    static const struct {
        enum mat_type type;
        int K;
        double fast, exact, f32;
    } cases[] = {
        { MAT_F32, 1024, 1e-6, 1e-6, 1e-6 },     { MAT_BF16, 1024, 1e-6, 1e-6, 1e-6 },
        { MAT_F16, 1024, 1e-6, 1e-6, 1e-6 },
        { MAT_NF4_P16, 1024, 9e-3, 3e-4, 1e-6 }, { MAT_NF4_FLAT, 1000, 1e-6, 1e-6, 1e-6 },
        { MAT_Q8_P16, 1024, 1e-2, 8e-3, 8e-3 },
    };
    enum { M = 3, N = 200 };
    gauss_seed = 3;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct weights w = make_weights(cases[i].type, N, cases[i].K);
        float *x = random_rows(M, cases[i].K), *y = get_aligned(M * N * sizeof *y);
        for (int p = PREC_FAST; p <= PREC_F32; p++) {
            const struct compute c = { NULL, ISA_SCALAR, (enum precision)p };
            multiply(&c, &w.m, x, M, cases[i].K, NULL, y, N);
            const double got = relative_error(&w, x, M, y);
            const double most = p == PREC_FAST    ? cases[i].fast
                                : p == PREC_EXACT ? cases[i].exact
                                                  : cases[i].f32;
            print_message("  %-8s %-5s relative error %.2e (limit %.1e)\n",
                          type_names[cases[i].type], precision_name((enum precision)p), got, most);
            assert_true(got < most);
        }
        free(x);
        free(y);
        free_weights(&w);
    }
}

static void outlier_channels_do_not_ruin_a_row(void **state)
{
    (void)state;
    enum { M = 2, N = 200, K = 1024 };
    gauss_seed = 4;
    struct weights w = make_weights(MAT_NF4_P16, N, K);
    float *x = random_rows(M, K), *y = get_aligned(M * N * sizeof *y);
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 8; i++)
            x[m * K + 131 * i] *= 50.0f;
    struct compute c = { NULL, ISA_SCALAR, PREC_FAST };
    multiply(&c, &w.m, x, M, K, NULL, y, N);
    assert_true(relative_error(&w, x, M, y) < 2.2e-2);
    c.precision = PREC_EXACT;
    multiply(&c, &w.m, x, M, K, NULL, y, N);
    assert_true(relative_error(&w, x, M, y) < 7e-4);
    free(x);
    free(y);
    free_weights(&w);
}

/* matrix_row() is W itself: multiplying by unit vectors in PREC_F32 gives it back. */
static void matrix_rows_are_the_weights(void **state)
{
    (void)state;
    gauss_seed = 5;
    for (int t = 0; t < TYPES; t++) {
        enum { N = 19, K = 128 };
        struct weights w = make_weights(all_types[t], N, K);
        float row[K], x[K], y[N];
        const struct compute c = { NULL, ISA_SCALAR, PREC_F32 };
        for (int n = 0; n < N; n++) {
            matrix_row(&w.m, n, row);
            for (int k = 0; k < K; k++) {
                const double want = w.exact[n * K + k];
                assert_float_equal(row[k], want, all_types[t] == MAT_Q8_P16 ? 5e-4 : 1e-9);
            }
        }
        memset(x, 0, sizeof x);
        x[77] = 1.0f;
        multiply(&c, &w.m, x, 1, K, NULL, y, N);
        for (int n = 0; n < N; n++) {
            matrix_row(&w.m, n, row);
            assert_true(y[n] == row[77]);
        }
        free_weights(&w);
    }
}

/* --- bit for bit ------------------------------------------------------------------------- */

static void fill_nasty(float *x, int M, int K)
{
    for (int m = 0; m < M; m++)
        for (int b = 0; b + 64 <= K; b += 64) {
            float *block = x + m * K + b;
            switch ((m + b / 64) % 9) {
            case 1:
                memset(block, 0, 64 * sizeof *block);
                break;
            case 2:
                block[63] = NAN;
                break;
            case 3:
                block[5] = -INFINITY;
                break;
            case 4:
                for (int k = 0; k < 64; k++)
                    block[k] *= 1e-38f;
                break;
            case 5:
                for (int k = 0; k < 64; k++)
                    block[k] *= 5e37f;
                break;
            case 6:
                for (int k = 0; k < 64; k++) /* ties between codes */
                    block[k] = (float)(k - 32) * 0.5f + (k == 63 ? 127.0f - 15.5f : 0.0f);
                break;
            case 7:
                memset(block, 0, 64 * sizeof *block);
                block[17] = -1e-44f;
                break;
            default:
                break;
            }
        }
}

/* AVX-512 keeps 16-bit codes in an order of its own: put them in order of k. */
static void codes_in_order(enum isa isa, enum precision p, void *packed, int n)
{
    static const uint8_t order[8] = ACT16_ORDER;
    if (isa != ISA_AVX512 || p != PREC_EXACT)
        return;
    for (int16_t *group = packed; n > 0; n -= 8, group += 8) {
        int16_t own[8];
        memcpy(own, group, sizeof own);
        for (int i = 0; i < 8; i++)
            group[order[i]] = own[i];
    }
}

static void packing_is_the_same_in_every_instruction_set(void **state)
{
    (void)state;
    announce_missing();
    enum { M = 37, K = 9 * 64 };
    gauss_seed = 6;
    float *x = random_rows(M, K);
    fill_nasty(x, M, K);
    for (int p = PREC_FAST; p <= PREC_EXACT; p++) {
        struct act a, want;
        struct compute c = { NULL, ISA_SCALAR, (enum precision)p };
        act_init(&a);
        act_init(&want);
        assert_int_equal(act_reserve(&a, M, K, NULL), ERR_OK);
        assert_int_equal(act_reserve(&want, M, K, NULL), ERR_OK);
        act_pack(&c, &want, x, M, K, K);
        FOR_EACH_ISA(ISA_AVX2, isa)
        {
            c.isa = isa;
            memset(a.packed, 0, a.packed_cap);
            act_pack(&c, &a, x, M, K, K);
            codes_in_order(isa, c.precision, a.packed, M * K);
            assert_memory_equal(a.packed, want.packed, a.packed_cap);
        }
        act_free(&a);
        act_free(&want);
    }
    free(x);
}

static void assert_same_bits(const float *got, const float *want, size_t n, const char *what,
                             const char *precision, int M, int N, int K)
{
    for (size_t i = 0; i < n; i++)
        if (f32_bits(got[i]) != f32_bits(want[i]) && !(isnan(got[i]) && isnan(want[i])))
            fail_msg("%s %s M=%d N=%d K=%d: y[%zu] is %.9g, not %.9g", what, precision, M, N, K, i,
                     (double)got[i], (double)want[i]);
}

static void vector_kernels_equal_the_scalar_ones(void **state)
{
    (void)state;
    announce_missing();
    const int Ns[] = { 1, 15, 16, 17, 40, 67 }, Ks[] = { 64, 192, 640 };
    gauss_seed = 7;
    for (int t = 0; t < TYPES; t++)
        for (size_t ni = 0; ni < sizeof Ns / sizeof Ns[0]; ni++)
            for (size_t ki = 0; ki < sizeof Ks / sizeof Ks[0]; ki++) {
                const int N = Ns[ni], K = Ks[ki], top = 35;
                struct weights w = make_weights(all_types[t], N, K);
                float *x = random_rows(top, K), *bias = random_rows(1, N);
                float *y = get_aligned((size_t)(top * N) * 4), *want = get_aligned((size_t)(top * N) * 4);
                if (ki == 2)
                    fill_nasty(x, top, K);
                for (int p = PREC_FAST; p <= PREC_F32; p++) {
                    struct compute c = { NULL, ISA_SCALAR, (enum precision)p };
                    const float *b = N % 2 ? bias : NULL;
                    multiply(&c, &w.m, x, top, K, b, want, N);
                    FOR_EACH_ISA(ISA_AVX2, isa)
                    {
                        c.isa = isa;
                        for (int M = 1; M <= top; M = M < 18 ? M + 1 : M + 17) {
                            multiply(&c, &w.m, x, M, K, b, y, N);
                            assert_same_bits(y, want, (size_t)(M * N), type_names[t],
                                             precision_name(c.precision), M, N, K);
                        }
                    }
                }
                free(x);
                free(y);
                free(bias);
                free(want);
                free_weights(&w);
            }
}

static void flat_matrices_may_have_any_width(void **state)
{
    (void)state;
    gauss_seed = 8;
    for (int K = 1; K < 1100; K += 171) {
        enum { N = 9, M = 18 };
        struct weights w = make_weights(MAT_NF4_FLAT, N, K);
        float *x = random_rows(M, K), y[M * N], want[M * N];
        struct compute c = { NULL, ISA_SCALAR, PREC_FAST };
        multiply(&c, &w.m, x, M, K, NULL, want, N);
        assert_true(relative_error(&w, x, M, want) < 1e-6);
        FOR_EACH_ISA(ISA_AVX2, isa)
        {
            c.isa = isa;
            multiply(&c, &w.m, x, M, K, NULL, y, N);
            assert_same_bits(y, want, M * N, "flat", "fast", M, N, K);
        }
        free(x);
        free_weights(&w);
    }
}

/* The promise of compute.h: neighbours, chunks and threads change nothing. */
static void a_row_does_not_depend_on_company_or_threads(void **state)
{
    (void)state;
    enum { M = 300, N = 210, K = 1024 };
    enum isa isa;
    assert_int_equal(isa_select("auto", &isa, NULL), ERR_OK);
    gauss_seed = 9;
    struct pool *pool[2];
    assert_int_equal(pool_create(2, &pool[0], NULL), ERR_OK);
    assert_int_equal(pool_create(5, &pool[1], NULL), ERR_OK);
    float *x = random_rows(M, K), *y = get_aligned(M * N * sizeof *y), alone[N];
    for (int t = 0; t < TYPES; t++) {
        struct weights w = make_weights(all_types[t], N, K);
        for (int p = PREC_FAST; p <= PREC_EXACT; p++) {
            struct compute c = { NULL, isa, (enum precision)p };
            for (int i = 0; i < 2; i++) {
                c.pool = pool[i];
                memset(y, 0xff, M * N * sizeof *y);
                multiply(&c, &w.m, x, M, K, NULL, y, N);
                c.pool = NULL;
                for (int m = 0; m < M; m += 23) {
                    multiply(&c, &w.m, x + m * K, 1, K, NULL, alone, N);
                    assert_same_bits(y + m * N, alone, N, type_names[t],
                                     precision_name(c.precision), M, N, K);
                }
            }
        }
        free_weights(&w);
    }
    free(x);
    free(y);
    pool_destroy(pool[0]);
    pool_destroy(pool[1]);
}

/* --- epilogues --------------------------------------------------------------------------- */

enum { EPI_M = 300, EPI_N = 70 };
static const int epi_n[PRODUCTS_MAX] = { EPI_N, 33, 48 };

/* What an epilogue found: how often it was asked for an output, and what y was then. */
struct seen {
    const struct mat_product *p;
    int times[PRODUCTS_MAX][EPI_M * EPI_N];
    float y[PRODUCTS_MAX][EPI_M * EPI_N];
};

static void note(void *arg, const struct y_part *part)
{
    struct seen *s = arg;
    const struct mat_product *p = &s->p[part->product];
    for (int m = part->row; m < part->row + part->rows; m++)
        for (int n = part->first; n < part->first + part->outputs; n++) {
            float *y = &p->y[m * p->ldy + n];
            s->times[part->product][m * EPI_N + n]++;
            s->y[part->product][m * EPI_N + n] = *y;
            *y += 1;
        }
}

static int want_many(void *arg, const struct y_part *part, int64_t piece, int64_t pieces,
                     struct lines *ret)
{
    const struct seen *s = arg;
    if (piece < 0 || piece >= pieces || part->rows > 16 || part->outputs > 32)
        abort(); /* cmocka's failures are for the main thread */
    for (int i = 0; i < EPILOGUE_LINES; i++)
        ret[i] = (struct lines){ (const char *)s->y[i % PRODUCTS_MAX] + 64 * piece, i % 5 };
    return EPILOGUE_LINES;
}

/* Products of several types at once, each as it is alone, and each output is handed over once. */
static void epilogues_get_every_output_once(void **state)
{
    (void)state;
    enum { K = 128 };
    static const enum mat_type types[][PRODUCTS_MAX] = {
        { MAT_NF4_P16, MAT_NF4_P16, MAT_NF4_P16 },
        { MAT_NF4_P16, MAT_Q8_P16, MAT_F32 },
        { MAT_BF16, MAT_NF4_P16, MAT_NF4_P16 },
    };
    static const int rows[] = { 1, 3, 8, 13, 16, 33, EPI_M };
    struct pool *pool;
    struct seen *s = malloc(sizeof *s);
    float *x = random_rows(EPI_M, K), *y = get_aligned(EPI_M * EPI_N * sizeof *y), *ys[PRODUCTS_MAX];
    assert_int_equal(pool_create(3, &pool, NULL), ERR_OK);
    for (int i = 0; i < PRODUCTS_MAX; i++)
        ys[i] = get_aligned(EPI_M * EPI_N * sizeof *y);
    for (size_t t = 0; t < sizeof types / sizeof types[0]; t++) {
        struct weights w[PRODUCTS_MAX];
        struct mat_product p[PRODUCTS_MAX];
        for (int i = 0; i < PRODUCTS_MAX; i++) {
            w[i] = make_weights(types[t][i], epi_n[i], K);
            p[i] = (struct mat_product){ &w[i].m, i == 1 ? x : NULL, ys[i], EPI_N };
        }
        FOR_EACH_ISA(ISA_SCALAR, isa)
        for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++)
            for (int precision = PREC_FAST; precision <= PREC_F32; precision++) {
                const struct compute c = { pool, isa, (enum precision)precision };
                const struct epilogue e = { s, note, want_many };
                struct act a;
                act_init(&a);
                assert_int_equal(act_reserve(&a, rows[r], K, NULL), ERR_OK);
                act_pack(&c, &a, x, rows[r], K, K);
                memset(s, 0, sizeof *s);
                s->p = p;
                matmul_all(&c, &a, p, PRODUCTS_MAX, &e);
                for (int i = 0; i < PRODUCTS_MAX; i++) {
                    matmul(&c, p[i].w, &a, p[i].bias, y, EPI_N);
                    for (int m = 0; m < rows[r]; m++)
                        for (int n = 0; n < epi_n[i]; n++) {
                            const int at = m * EPI_N + n;
                            assert_int_equal(s->times[i][at], 1);
                            assert_true(s->y[i][at] == y[at] && ys[i][at] == y[at] + 1);
                        }
                }
                act_free(&a);
            }
        for (int i = 0; i < PRODUCTS_MAX; i++)
            free_weights(&w[i]);
    }
    for (int i = 0; i < PRODUCTS_MAX; i++)
        free(ys[i]);
    free(x);
    free(y);
    free(s);
    pool_destroy(pool);
}

/* --- edges ------------------------------------------------------------------------------- */

static void a_nan_spoils_its_own_row_and_no_other(void **state)
{
    (void)state;
    enum { M = 17, N = 33, K = 128 };
    enum isa isa;
    assert_int_equal(isa_select("auto", &isa, NULL), ERR_OK);
    gauss_seed = 10;
    for (int t = 0; t < TYPES; t++)
        for (int p = PREC_FAST; p <= PREC_F32; p++) {
            struct weights w = make_weights(all_types[t], N, K);
            const struct compute c = { NULL, isa, (enum precision)p };
            float *x = random_rows(M, K), y[M * N], want[M * N];
            multiply(&c, &w.m, x, M, K, NULL, want, N);
            x[3 * K + 70] = NAN;
            x[9 * K] = INFINITY;
            multiply(&c, &w.m, x, M, K, NULL, y, N);
            for (int m = 0; m < M; m++)
                for (int n = 0; n < N; n++) {
                    if (m == 3)
                        assert_true(isnan(y[m * N + n]));
                    else if (m == 9)
                        assert_false(isfinite(y[m * N + n]));
                    else
                        assert_true(y[m * N + n] == want[m * N + n]);
                }
            free(x);
            free_weights(&w);
        }
}

static void strides_are_honoured_and_nothing_else_is_written(void **state)
{
    (void)state;
    enum { M = 9, N = 21, K = 64, LDX = K + 3, LDY = N + 5 };
    enum isa isa;
    assert_int_equal(isa_select("auto", &isa, NULL), ERR_OK);
    gauss_seed = 11;
    for (int t = 0; t < TYPES; t++)
        for (int p = PREC_FAST; p <= PREC_F32; p++) {
            struct weights w = make_weights(all_types[t], N, K);
            const struct compute c = { NULL, isa, (enum precision)p };
            float *x = random_rows(M, LDX), tight[M * K], y[M * LDY], want[M * N];
            for (int m = 0; m < M; m++)
                memcpy(tight + m * K, x + m * LDX, K * sizeof *x);
            for (int i = 0; i < M * LDY; i++)
                y[i] = -777.0f;
            multiply(&c, &w.m, tight, M, K, NULL, want, N);
            multiply(&c, &w.m, x, M, LDX, NULL, y, LDY);
            for (int m = 0; m < M; m++)
                for (int n = 0; n < LDY; n++)
                    assert_true(y[m * LDY + n] == (n < N ? want[m * N + n] : -777.0f));
            free(x);
            free_weights(&w);
        }
}

static void zero_rows_are_no_work(void **state)
{
    (void)state;
    struct weights w = make_weights(MAT_NF4_P16, 16, 64);
    const struct compute c = { NULL, ISA_SCALAR, PREC_FAST };
    float x = 0.0f, y = 5.0f;
    multiply(&c, &w.m, &x, 0, 64, NULL, &y, 16);
    assert_true(y == 5.0f);
    free_weights(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dot_products_follow_the_stated_tree),
        cmocka_unit_test(vector_dot_products_equal_the_scalar_ones),
        cmocka_unit_test(blocks_of_dot_products_equal_single_ones),
        cmocka_unit_test(quantised_product_of_two_numbers_is_as_on_paper),
        cmocka_unit_test(errors_stay_below_the_stated_ones),
        cmocka_unit_test(outlier_channels_do_not_ruin_a_row),
        cmocka_unit_test(matrix_rows_are_the_weights),
        cmocka_unit_test(packing_is_the_same_in_every_instruction_set),
        cmocka_unit_test(vector_kernels_equal_the_scalar_ones),
        cmocka_unit_test(flat_matrices_may_have_any_width),
        cmocka_unit_test(a_row_does_not_depend_on_company_or_threads),
        cmocka_unit_test(epilogues_get_every_output_once),
        cmocka_unit_test(a_nan_spoils_its_own_row_and_no_other),
        cmocka_unit_test(strides_are_honoured_and_nothing_else_is_written),
        cmocka_unit_test(zero_rows_are_no_work),
    };
    return cmocka_run_group_tests_name("linear", tests, NULL, NULL);
}
