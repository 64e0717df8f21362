/* test_delta.c - norms and differences of adapters' changes, against numbers worked out by hand and
 * against the products themselves, formed here in full. */
#include "engine/delta.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char q_path[] = "model.layers.0.self_attn.q_proj";
static char k_path[] = "model.layers.0.self_attn.k_proj";

static struct adapter_src_module module(enum module m, int rank, int in, int out, double scaling,
                                        const float *A, const float *B, const float *E)
{
    return (struct adapter_src_module){ .module = m, .path = m == MOD_Q ? q_path : k_path,
                                        .rank = rank, .init_rank = rank, .in = in, .out = out,
                                        .scaling = scaling, .dtype = DT_F32, .A = A, .B = B, .E = E };
}

static struct adapter_src adapter(struct adapter_src_module *m, size_t n)
{
    struct adapter_src a = { .method = n && m[0].E ? METHOD_ADALORA : METHOD_LORA, .nmodules = n,
                             .modules = m };
    for (size_t i = 0; i < n; i++) {
        a.rank_max = m[i].rank > a.rank_max ? m[i].rank : a.rank_max;
        a.params += (uint64_t)m[i].rank * (uint64_t)(m[i].in + m[i].out + (m[i].E != NULL));
    }
    return a;
}

/* --- by hand ----------------------------------------------------------------------------------- */
static void a_change_of_rank_one_has_the_norm_worked_out_by_hand(void **state)
{
    (void)state;
    /* 2 * [1; 2] [3 4] = [6 8; 12 16]: 36 + 64 + 144 + 256 = 500.  With E = -3 three times that. */
    const float A[] = { 3, 4 }, B[] = { 1, 2 }, E[] = { -3 };
    struct adapter_src_module m[2] = { module(MOD_Q, 1, 2, 2, 2, A, B, NULL),
                                       module(MOD_K, 0, 2, 2, 2, NULL, NULL, NULL) };
    struct adapter_src a = adapter(m, 2);
    double norm[2];
    assert_int_equal(delta_norms(&a, norm, NULL), ERR_OK);
    assert_float_equal(norm[0], sqrt(500), 1e-12);
    assert_float_equal(norm[1], 0, 0);
    m[0].E = E;
    a = adapter(m, 1);
    assert_int_equal(delta_norms(&a, norm, NULL), ERR_OK);
    assert_float_equal(norm[0], 3 * sqrt(500), 1e-11);
}

static void two_changes_compare_as_worked_out_by_hand(void **state)
{
    (void)state;
    /* first [1 0; 0 0], second rank 2: [1 1; 0 1].  Product 1, norms 1 and sqrt 3, difference
     * [0 -1; 0 -1]: sqrt 2, cosine 1 / sqrt 3. */
    const float A1[] = { 1, 0 }, B1[] = { 1, 0 };
    const float A2[] = { 1, 1, 0, 1 }, B2[] = { 1, 0, 0, 1 };
    struct adapter_src_module m1 = module(MOD_Q, 1, 2, 2, 1, A1, B1, NULL);
    struct adapter_src_module m2 = module(MOD_Q, 2, 2, 2, 1, A2, B2, NULL);
    struct adapter_src a = adapter(&m1, 1), b = adapter(&m2, 1);
    struct delta d;
    assert_int_equal(delta_compare(&a, &b, &d, NULL), ERR_OK);
    assert_int_equal(d.n, 1);
    assert_int_equal(d.rows[0].rank[0], 1);
    assert_int_equal(d.rows[0].rank[1], 2);
    assert_float_equal(d.rows[0].norm[1], sqrt(3), 1e-12);
    assert_float_equal(d.rows[0].diff, sqrt(2), 1e-12);
    assert_float_equal(d.rows[0].cosine, 1 / sqrt(3), 1e-12);
    assert_float_equal(d.all.cosine, 1 / sqrt(3), 1e-12);
    delta_free(&d);
}

static void opposite_and_perpendicular_changes_have_cosine_minus_one_and_zero(void **state)
{
    (void)state;
    const float A[] = { 1, 2, 3 }, B[] = { 1, -1 }, minus[] = { -1, 1 }, across[] = { 1, 1 };
    struct adapter_src_module m1 = module(MOD_Q, 1, 3, 2, 1, A, B, NULL), m2 = m1, m3 = m1;
    m2.B = minus;
    m3.B = across;
    struct adapter_src a = adapter(&m1, 1), b = adapter(&m2, 1), c = adapter(&m3, 1);
    struct delta d;
    assert_int_equal(delta_compare(&a, &b, &d, NULL), ERR_OK);
    assert_float_equal(d.all.cosine, -1, 1e-15);
    assert_float_equal(d.all.diff, 2 * d.all.norm[0], 1e-12);
    delta_free(&d);
    assert_int_equal(delta_compare(&a, &c, &d, NULL), ERR_OK);
    assert_float_equal(d.all.cosine, 0, 1e-15);
    delta_free(&d);
}

/* --- against the products ------------------------------------------------------------------------ */
enum { IN = 150, OUT = 70, RANK = 9 };

static uint32_t seed = 1;
static float noise(void)
{
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / 0x1p23f - 1.0f;
}

struct dense { float A[RANK * IN], B[OUT * RANK], E[RANK]; double W[OUT * IN]; };

static void fill(struct dense *d)
{
    for (int i = 0; i < RANK * IN; i++)
        d->A[i] = noise();
    for (int i = 0; i < RANK * OUT; i++)
        d->B[i] = noise();
    for (int i = 0; i < RANK; i++)
        d->E[i] = noise();
}

static void form(struct dense *d, const struct adapter_src_module *m)
{
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i < IN; i++) {
            double sum = 0;
            for (int j = 0; j < m->rank; j++)
                sum += (double)d->B[o * m->rank + j] * d->A[j * IN + i] * (m->E ? d->E[j] : 1);
            d->W[o * IN + i] = m->scaling * sum;
        }
}

static void check_against_products(int rank1, int rank2, bool ada)
{
    static struct dense x, y;
    fill(&x);
    fill(&y);
    struct adapter_src_module m = module(MOD_Q, rank1, IN, OUT, 0.75, x.A, x.B, ada ? x.E : NULL);
    struct adapter_src_module n = module(MOD_Q, rank2, IN, OUT, 1.5, y.A, y.B, NULL);
    form(&x, &m);
    form(&y, &n);
    double xx = 0, yy = 0, xy = 0, dd = 0;
    for (int i = 0; i < IN * OUT; i++) {
        xx += x.W[i] * x.W[i];
        yy += y.W[i] * y.W[i];
        xy += x.W[i] * y.W[i];
        dd += (x.W[i] - y.W[i]) * (x.W[i] - y.W[i]);
    }
    struct adapter_src a = adapter(&m, 1), b = adapter(&n, 1);
    struct delta d;
    assert_int_equal(delta_compare(&a, &b, &d, NULL), ERR_OK);
    assert_float_equal(d.rows[0].norm[0] / sqrt(xx), 1, 1e-12);
    assert_float_equal(d.rows[0].norm[1] / sqrt(yy), 1, 1e-12);
    assert_float_equal(d.rows[0].diff / sqrt(dd), 1, 1e-12);
    assert_float_equal(d.rows[0].cosine, xy / sqrt(xx * yy), 1e-12);
    delta_free(&d);
}

static void norms_and_differences_are_those_of_the_products_formed_in_full(void **state)
{
    (void)state;
    check_against_products(RANK, RANK, false);
    check_against_products(RANK, RANK, true);
    check_against_products(RANK, 4, true);
    check_against_products(1, RANK, false);
}

static void a_small_difference_between_large_changes_keeps_its_digits(void **state)
{
    (void)state;
    static struct dense x, y;
    fill(&x);
    y = x;
    /* one element of B off by 2^-20: the difference is that times a row of A */
    y.B[5 * RANK + 2] += 0x1p-20f;
    const double off = (double)y.B[5 * RANK + 2] - x.B[5 * RANK + 2];
    double row = 0;
    for (int i = 0; i < IN; i++)
        row += (double)x.A[2 * IN + i] * x.A[2 * IN + i];
    struct adapter_src_module m = module(MOD_Q, RANK, IN, OUT, 1, x.A, x.B, NULL), n = m;
    n.B = y.B;
    struct adapter_src a = adapter(&m, 1), b = adapter(&n, 1);
    struct delta d;
    assert_int_equal(delta_compare(&a, &b, &d, NULL), ERR_OK);
    assert_float_equal(d.all.diff / (fabs(off) * sqrt(row)), 1, 1e-9);
    delta_free(&d);
    assert_int_equal(delta_compare(&a, &a, &d, NULL), ERR_OK);
    assert_true(d.all.diff == 0);
    delta_free(&d);
}

/* --- edges ----------------------------------------------------------------------------------------- */
static void a_module_of_one_adapter_alone_counts_as_rank_zero_in_the_other(void **state)
{
    (void)state;
    const float A[] = { 3, 4 }, B[] = { 1, 0 };
    struct adapter_src_module q = module(MOD_Q, 1, 2, 2, 1, A, B, NULL);
    struct adapter_src_module k = module(MOD_K, 1, 2, 2, 1, A, B, NULL);
    struct adapter_src a = adapter(&q, 1), b = adapter(&k, 1), none = adapter(NULL, 0);
    struct delta d;
    assert_int_equal(delta_compare(&a, &b, &d, NULL), ERR_OK);
    assert_int_equal(d.n, 2);
    assert_string_equal(d.rows[0].path, q_path);
    assert_string_equal(d.rows[1].path, k_path);
    assert_int_equal(d.rows[0].rank[1], 0);
    assert_true(isnan(d.rows[0].cosine));
    assert_float_equal(d.rows[1].diff, 5, 1e-12);
    assert_float_equal(d.all.diff, sqrt(50), 1e-12);
    assert_float_equal(d.all.cosine, 0, 0);
    delta_free(&d);
    assert_int_equal(delta_compare(&a, &none, &d, NULL), ERR_OK);
    assert_true(isnan(d.all.cosine));
    delta_free(&d);
}

static void what_is_no_plain_change_of_weights_is_refused_by_name(void **state)
{
    (void)state;
    const float A[] = { 3, 4 }, B[] = { 1, 0 };
    struct adapter_src_module q = module(MOD_Q, 1, 2, 2, 1, A, B, NULL), wide = q;
    struct adapter_src a = adapter(&q, 1), more = a, b;
    struct err err = { 0 };
    struct delta d;
    more.params += 2; /* a bias, say */
    assert_int_equal(delta_check(&more, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "2 numbers beside its factors"));
    wide.in = 4;
    wide.out = 1;
    b = adapter(&wide, 1);
    err_clear(&err);
    assert_int_equal(delta_compare(&a, &b, &d, &err), ERR_CONFLICT);
    assert_non_null(strstr(err.msg, q_path));
    q.module = MOD_COUNT;
    err_clear(&err);
    assert_int_equal(delta_check(&a, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, q_path));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_change_of_rank_one_has_the_norm_worked_out_by_hand),
        cmocka_unit_test(two_changes_compare_as_worked_out_by_hand),
        cmocka_unit_test(opposite_and_perpendicular_changes_have_cosine_minus_one_and_zero),
        cmocka_unit_test(norms_and_differences_are_those_of_the_products_formed_in_full),
        cmocka_unit_test(a_small_difference_between_large_changes_keeps_its_digits),
        cmocka_unit_test(a_module_of_one_adapter_alone_counts_as_rank_zero_in_the_other),
        cmocka_unit_test(what_is_no_plain_change_of_weights_is_refused_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
