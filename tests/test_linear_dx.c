/* test_linear_dx.c - the backward pass of frozen layers against double precision with the weights
 * that matrix_row() gives, for every type of matrix, instruction set and number of threads. */
#include "engine/linear_dx.h"
#include "engine/num.h"
#include "tests/support_linear.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* What the header promises. */
#define F32_ERROR 2e-6
#define QUICK_ERROR 3e-3

enum { PAD = 5, MAX_THREADS = 3 };
static const int row_counts[] = { 1, 2, 3, 7, 16, 33, 512 };

static struct pool *pools[MAX_THREADS + 1]; /* by number of threads */

static int start_pools(void **state)
{
    (void)state;
    for (int t = 1; t <= MAX_THREADS; t++)
        if (pool_create(t, &pools[t], NULL) != ERR_OK)
            return -1;
    return 0;
}

static int stop_pools(void **state)
{
    (void)state;
    for (int t = 1; t <= MAX_THREADS; t++)
        pool_destroy(pools[t]);
    return 0;
}

static void backward(const struct compute *c, const struct matrix *w, const float *dy, int M,
                     int lddy, float *dx, int lddx, bool add)
{
    const size_t bytes = matmul_dx_scratch(c, w, M);
    uint8_t *scratch = get_aligned(bytes + 64);
    memset(scratch, 0xff, bytes + 64); /* NaNs, which nobody may read */
    matmul_dx(c, w, dy, M, lddy, dx, lddx, add, scratch);
    for (int i = 0; i < 64; i++)
        assert_int_equal(scratch[bytes + (size_t)i], 0xff);
    free(scratch);
}

/* dY W in double precision, [M][K]. */
static double *reference(const struct matrix *w, const float *dy, int M, int lddy)
{
    const size_t K = (size_t)w->K;
    double *dx = get_aligned((size_t)M * K * sizeof *dx);
    float *row = get_aligned(K * sizeof *row);
    memset(dx, 0, (size_t)M * K * sizeof *dx);
    for (int n = 0; n < w->N; n++) {
        matrix_row(w, n, row);
        for (int m = 0; m < M; m++) {
            const double d = (double)dy[m * lddy + n];
            for (size_t k = 0; k < K; k++)
                dx[(size_t)m * K + k] += d * (double)row[k];
        }
    }
    free(row);
    return dx;
}

/* Largest error of an element over the root mean square of its row; and the error of the whole in
 * the Frobenius norm, relative. */
static void errors(const double *want, const float *dx, int M, int K, int lddx, double *ret_most,
                   double *ret_rms)
{
    double error = 0.0, size = 0.0;
    *ret_most = 0.0;
    for (int m = 0; m < M; m++) {
        double most = 0.0, row = 0.0;
        for (int k = 0; k < K; k++) {
            const double e = fabs((double)dx[m * lddx + k] - want[m * K + k]);
            assert_true(isfinite(dx[m * lddx + k]));
            most = fmax(most, e);
            error += e * e;
            row += want[m * K + k] * want[m * K + k];
        }
        *ret_most = fmax(*ret_most, most / sqrt(row / K));
        size += row;
    }
    *ret_rms = sqrt(error / size);
}

/* One matrix, one way to compute: accuracy, and the same bits for every M and number of threads. */
static void check(const struct matrix *w, enum isa isa, enum precision p, const float *dy,
                  const double *want)
{
    const int top = 512, K = w->K, lddy = w->N + PAD, lddx = K + PAD;
    const size_t bytes = (size_t)top * (size_t)lddx * sizeof(float);
    float *all = get_aligned(bytes), *dx = get_aligned(bytes);
    struct compute c = { .pool = pools[1], .isa = isa, .precision = p };
    backward(&c, w, dy, top, lddy, all, lddx, false);
    double most, rms;
    errors(want, all, top, K, lddx, &most, &rms);
    if (p == PREC_F32 ? !(most <= F32_ERROR) : !(rms <= QUICK_ERROR))
        fail_msg("type %d, %d x %d, %s, %s: most %g, rms %g", (int)w->type, w->N, w->K,
                 isa_name(isa), precision_name(p), most, rms);
    for (int t = 1; t <= MAX_THREADS; t++)
        for (size_t i = 0; i < sizeof row_counts / sizeof row_counts[0]; i++) {
            const int M = row_counts[i];
            c.pool = pools[t];
            for (size_t j = 0; j < bytes / sizeof(float); j++)
                dx[j] = 7.0f;
            backward(&c, w, dy, M, lddy, dx, lddx, false);
            for (int m = 0; m < top; m++) {
                const float *row = dx + (size_t)m * (size_t)lddx;
                if (m < M)
                    assert_memory_equal(row, all + (size_t)m * (size_t)lddx, (size_t)K * 4);
                for (int k = m < M ? K : 0; k < lddx; k++)
                    assert_true(row[k] == 7.0f);
            }
        }
    free(all);
    free(dx);
}

static void every_way_agrees_with_double_precision(void **state)
{
    (void)state;
    announce_missing();
    static const struct {
        int N, K;
        bool panels; /* fit for the packed layouts */
    } shapes[] = { { 16, 64, true },
                   { 37, 128, true },
                   { 300, 192, true },
                   { 37, 50, false },
                   { 131, 99, false } };
    gauss_seed = 1;
    for (int i = 0; i < TYPES; i++)
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
            const enum mat_type type = all_types[i];
            const bool needs_panels = type == MAT_NF4_P16 || type == MAT_Q8_P16;
            if (needs_panels && !shapes[s].panels)
                continue;
            struct weights w = make_weights(type, shapes[s].N, shapes[s].K);
            float *dy = random_rows(512, w.m.N + PAD);
            /* With scales in fp16 alone, as a base that serves has them, and in fp32. */
            for (int half = 0; half < (type == MAT_NF4_P16 ? 2 : 1); half++) {
                w.m.scales32 = half ? NULL : w.s32;
                double *want = reference(&w.m, dy, 512, w.m.N + PAD);
                FOR_EACH_ISA(ISA_SCALAR, isa)
                for (int p = PREC_EXACT; p <= PREC_F32; p++)
                    check(&w.m, isa, (enum precision)p, dy, want);
                free(want);
            }
            free(dy);
            free_weights(&w);
        }
}

/* Longer than a stretch of rows of W, and more rows than a group. */
static void long_sums_and_many_rows_are_cut_in_silence(void **state)
{
    (void)state;
    static const struct {
        int N, K, M;
    } shapes[] = { { 16500, 64, 3 }, { 48, 64, 1031 } };
    gauss_seed = 2;
    for (size_t s = 0; s < 2; s++) {
        const int N = shapes[s].N, K = shapes[s].K, M = shapes[s].M;
        struct weights w = make_weights(MAT_Q8_P16, N, K);
        float *dy = random_rows(M, N), *dx = get_aligned((size_t)M * (size_t)K * 4);
        double *want = reference(&w.m, dy, M, N), most, rms;
        FOR_EACH_ISA(ISA_SCALAR, isa)
        for (int p = PREC_EXACT; p <= PREC_F32; p++) {
            const struct compute c = { pools[2], isa, (enum precision)p };
            backward(&c, &w.m, dy, M, N, dx, K, false);
            errors(want, dx, M, K, K, &most, &rms);
            assert_true(p == PREC_F32 ? most <= F32_ERROR : rms <= QUICK_ERROR);
        }
        free(want);
        free(dy);
        free(dx);
        free_weights(&w);
    }
}

static void add_adds_to_what_is_there(void **state)
{
    (void)state;
    enum { N = 77, K = 128, M = 19 };
    gauss_seed = 3;
    for (int i = 0; i < TYPES; i++) {
        struct weights w = make_weights(all_types[i], N, K);
        float *dy = random_rows(M, N), *before = random_rows(M, K), *dx = random_rows(M, K),
              *plain = random_rows(M, K);
        FOR_EACH_ISA(ISA_SCALAR, isa)
        for (int p = PREC_EXACT; p <= PREC_F32; p++) {
            const struct compute c = { pools[2], isa, (enum precision)p };
            memcpy(dx, before, (size_t)M * K * sizeof *dx);
            backward(&c, &w.m, dy, M, N, plain, K, false);
            backward(&c, &w.m, dy, M, N, dx, K, true);
            for (int j = 0; j < M * K; j++)
                assert_true(dx[j] == before[j] + plain[j]);
        }
        free(dy);
        free(before);
        free(dx);
        free(plain);
        free_weights(&w);
    }
}

static double inner(const float *a, const float *b, int n)
{
    double sum = 0.0;
    for (int i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

/* <dY, X W^T> = <dY W, X>: backward is the adjoint of the forward pass that serves. */
static void it_is_the_adjoint_of_matmul(void **state)
{
    (void)state;
    enum { N = 203, K = 320, M = 24 };
    gauss_seed = 4;
    for (int i = 0; i < TYPES; i++) {
        struct weights w = make_weights(all_types[i], N, K);
        float *dy = random_rows(M, N), *x = random_rows(M, K), *y = random_rows(M, N),
              *dx = random_rows(M, K);
        FOR_EACH_ISA(ISA_SCALAR, isa)
        for (int p = PREC_EXACT; p <= PREC_F32; p++) {
            const struct compute c = { pools[2], isa, (enum precision)p };
            struct act a;
            act_init(&a);
            assert_int_equal(act_reserve(&a, M, K, NULL), ERR_OK);
            act_pack(&c, &a, x, M, K, K);
            matmul(&c, &w.m, &a, NULL, y, N);
            act_free(&a);
            backward(&c, &w.m, dy, M, N, dx, K, false);
            /* both are sums of M * N * K products of random signs */
            const double there = inner(dy, y, M * N), back = inner(dx, x, M * K);
            const double size = 0.02 * sqrt((double)M * N * K);
            assert_true(fabs(there - back) <= (p == PREC_F32 ? 1e-6 : QUICK_ERROR) * size);
        }
        free(dy);
        free(x);
        free(y);
        free(dx);
        free_weights(&w);
    }
}

static void what_is_not_finite_stays_in_its_row(void **state)
{
    (void)state;
    enum { N = 40, K = 128, M = 9 };
    gauss_seed = 5;
    for (int i = 0; i < TYPES; i++) {
        struct weights w = make_weights(all_types[i], N, K);
        float *dy = random_rows(M, N), *dx = random_rows(M, K), *clean = random_rows(M, K);
        FOR_EACH_ISA(ISA_SCALAR, isa)
        for (int p = PREC_EXACT; p <= PREC_F32; p++) {
            const struct compute c = { pools[1], isa, (enum precision)p };
            const float kept[2] = { dy[2 * N + 39], dy[7 * N] };
            backward(&c, &w.m, dy, M, N, clean, K, false);
            dy[2 * N + 39] = INFINITY;
            dy[7 * N] = NAN;
            backward(&c, &w.m, dy, M, N, dx, K, false);
            for (int m = 0; m < M; m++)
                for (int k = 0; k < K; k++)
                    if (m == 7)
                        assert_true(isnan(dx[m * K + k]));
                    else if (m == 2)
                        assert_false(isfinite(dx[m * K + k]));
                    else
                        assert_true(dx[m * K + k] == clean[m * K + k]);
            dy[2 * N + 39] = kept[0];
            dy[7 * N] = kept[1];
        }
        free(dy);
        free(dx);
        free(clean);
        free_weights(&w);
    }
}

static void scratch_is_bounded(void **state)
{
    (void)state;
    for (int i = 0; i < TYPES; i++)
        for (int p = PREC_FAST; p <= PREC_F32; p++) {
            const struct compute c = { pools[2], ISA_SCALAR, (enum precision)p };
            const struct matrix w = { .type = all_types[i], .N = 256 << 10, .K = 8192 };
            assert_true(matmul_dx_scratch(&c, &w, 4096) <= (20 << 20) + 2 * (150 << 10));
            assert_true(matmul_dx_scratch(&c, &w, 1) <= matmul_dx_scratch(&c, &w, 512));
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_way_agrees_with_double_precision),
        cmocka_unit_test(long_sums_and_many_rows_are_cut_in_silence),
        cmocka_unit_test(add_adds_to_what_is_there),
        cmocka_unit_test(it_is_the_adjoint_of_matmul),
        cmocka_unit_test(what_is_not_finite_stays_in_its_row),
        cmocka_unit_test(scratch_is_bounded),
    };
    return cmocka_run_group_tests(tests, start_pools, stop_pools);
}
