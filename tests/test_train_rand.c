/* test_train_rand.c - the random numbers of training against published answers and their own
 * distributions; first values of the factors. */
#include "engine/train_init.h"
#include "engine/train_rand.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* The three lines "philox4x32 10" of Random123's tests/kat_vectors. */
static void philox_gives_the_published_answers(void **state)
{
    (void)state;
    static const struct {
        uint64_t counter, stream, seed;
        uint32_t want[4];
    } known[] = {
        { 0, 0, 0, { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 } },
        { UINT64_MAX, UINT64_MAX, UINT64_MAX, { 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd } },
        { 0x85a308d3243f6a88,
          0x0370734413198a2e,
          0x299f31d0a4093822,
          { 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 } },
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        uint32_t got[4];
        train_rand_u32x4(known[i].seed, known[i].stream, known[i].counter, got);
        assert_memory_equal(got, known[i].want, sizeof got);
    }
}

static void streams_of_different_uses_differ(void **state)
{
    (void)state;
    assert_true(train_stream(TRAIN_STREAM_INIT, 7) != train_stream(TRAIN_STREAM_SHUFFLE, 7));
    assert_true(train_stream(TRAIN_STREAM_INIT, 7) != train_stream(TRAIN_STREAM_INIT, 8));
    /* What is too large for the rest does not change the use. */
    assert_int_equal(train_stream(TRAIN_STREAM_DROPOUT, UINT64_MAX) >> 56, TRAIN_STREAM_DROPOUT);
}

enum { MANY = 1 << 20 };

struct moments {
    double mean, sd, skew, kurtosis, lowest, highest;
};

static struct moments moments_of(const float *x, size_t n)
{
    struct moments m = { .lowest = INFINITY, .highest = -INFINITY };
    for (size_t i = 0; i < n; i++)
        m.mean += (double)x[i] / (double)n;
    double m2 = 0, m3 = 0, m4 = 0;
    for (size_t i = 0; i < n; i++) {
        const double d = (double)x[i] - m.mean;
        m2 += d * d / (double)n;
        m3 += d * d * d / (double)n;
        m4 += d * d * d * d / (double)n;
        m.lowest = fmin(m.lowest, (double)x[i]);
        m.highest = fmax(m.highest, (double)x[i]);
    }
    m.sd = sqrt(m2);
    m.skew = m3 / pow(m2, 1.5);
    m.kurtosis = m4 / (m2 * m2);
    return m;
}

static void uniform_numbers_are_uniform(void **state)
{
    (void)state;
    float *x = malloc(MANY * sizeof *x);
    train_rand_uniform(42, train_stream(TRAIN_STREAM_INIT, 1), -2.0f, 6.0f, x, MANY);
    const struct moments m = moments_of(x, MANY);
    assert_true(m.lowest >= -2 && m.lowest < -1.999 && m.highest <= 6 && m.highest > 5.999);
    assert_float_equal(m.mean, 2.0, 5 * 8 / sqrt(12.0 * MANY));
    assert_float_equal(m.sd, 8 / sqrt(12.0), 0.01);
    /* 256 equal parts: chi-square with 255 degrees of freedom, within 6 of its own sd. */
    size_t hits[256] = { 0 };
    for (size_t i = 0; i < MANY; i++)
        hits[(int)fminf((x[i] + 2.0f) * 32.0f, 255.0f)]++;
    double chi2 = 0;
    for (int i = 0; i < 256; i++)
        chi2 += pow((double)hits[i] - MANY / 256.0, 2) / (MANY / 256.0);
    assert_float_equal(chi2, 255, 6 * sqrt(2.0 * 255));
    free(x);
}

static void normal_numbers_are_normal(void **state)
{
    (void)state;
    float *x = malloc(MANY * sizeof *x);
    train_rand_normal(7, train_stream(TRAIN_STREAM_INIT, 2), 1.0f, x, MANY);
    const struct moments m = moments_of(x, MANY);
    assert_float_equal(m.mean, 0, 5 / sqrt((double)MANY));
    assert_float_equal(m.sd, 1, 5 / sqrt(2.0 * MANY));
    assert_float_equal(m.skew, 0, 5 * sqrt(6.0 / MANY));
    assert_float_equal(m.kurtosis, 3, 5 * sqrt(24.0 / MANY));
    assert_true(m.highest > 4 && m.highest < 6.4 && m.lowest < -4 && m.lowest > -6.4);
    /* The largest distance between the two distribution functions (Kolmogorov): libm's erfc is the
     * other source. */
    size_t hits[801] = { 0 };
    for (size_t i = 0; i < MANY; i++)
        hits[(int)ceilf(fminf(fmaxf(x[i], -4.0f), 4.0f) * 100.0f) + 400]++;
    size_t below = 0;
    for (int i = 0; i < 800; i++) {
        below += hits[i];
        const double want = 0.5 * erfc(-(i - 400) / 100.0 / sqrt(2.0));
        assert_float_equal((double)below / MANY, want, 2.2 / sqrt((double)MANY));
    }
    free(x);
}

/* Word by word against libm: Phi(z) is the uniform number that z was made from. */
static void normal_numbers_are_quantiles_of_the_uniform_ones(void **state)
{
    (void)state;
    enum { N = 20000 };
    float *z = malloc(N * sizeof *z);
    train_rand_normal(3, 4, 1.0f, z, N);
    for (size_t i = 0; i < N; i++) {
        uint32_t w[4];
        train_rand_u32x4(3, 4, i / 4, w);
        const double u = (w[i % 4] + 0.5) / 4294967296.0, x = (double)z[i];
        const double tail = u < 0.5 ? u : 1 - u;
        /* 2e-7 of z, seen through the slope of the tail */
        assert_float_equal(0.5 * erfc(fabs(x) / sqrt(2.0)), tail, 2e-7 * (1 + x * x) * tail);
        assert_true((x < 0) == (u < 0.5));
    }
    free(z);
}

static void permutations_hold_every_number_once(void **state)
{
    (void)state;
    static const size_t sizes[] = { 0, 1, 2, 3, 5, 1000, 65537 };
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        const size_t n = sizes[s];
        uint32_t *p = malloc((n + 1) * sizeof *p);
        uint8_t *seen = calloc(n + 1, 1);
        train_rand_permutation(5, s, p, n);
        for (size_t i = 0; i < n; i++) {
            assert_true(p[i] < n);
            assert_int_equal(seen[p[i]]++, 0);
        }
        free(p);
        free(seen);
    }
}

/* All 24 of 4 elements, equally often: chi-square with 23 degrees of freedom. */
static void permutations_are_equally_probable(void **state)
{
    (void)state;
    enum { TIMES = 240000 };
    size_t hits[256] = { 0 };
    for (uint64_t s = 0; s < TIMES; s++) {
        uint32_t p[4];
        train_rand_permutation(11, s, p, 4);
        hits[p[0] << 6 | p[1] << 4 | p[2] << 2 | p[3]]++;
    }
    double chi2 = 0;
    int kinds = 0;
    for (int i = 0; i < 256; i++)
        if (hits[i] > 0) {
            kinds++;
            chi2 += pow((double)hits[i] - TIMES / 24.0, 2) / (TIMES / 24.0);
        }
    assert_int_equal(kinds, 24);
    assert_float_equal(chi2, 23, 6 * sqrt(2.0 * 23));
}

/* --- dropout --------------------------------------------------------------------------------- */
enum { ROWS = 37, COLS = 517, LD = 530 };

static void dropout_keeps_the_expectation(void **state)
{
    (void)state;
    static const double ps[] = { 0, 0.05, 0.1, 0.5, 0.9 };
    float *x = malloc(sizeof(float) * ROWS * LD), *y = malloc(sizeof(float) * ROWS * LD);
    for (int i = 0; i < ROWS * LD; i++)
        x[i] = 1.0f;
    for (size_t t = 0; t < sizeof ps / sizeof ps[0]; t++) {
        const double p = ps[t];
        train_dropout(1, t, p, 0, x, ROWS, COLS, LD, y, LD);
        size_t dropped = 0;
        for (int r = 0; r < ROWS; r++)
            for (int k = 0; k < COLS; k++) {
                const float got = y[r * LD + k];
                assert_true(got == 0.0f || got == (float)(1.0 / (1.0 - p)));
                dropped += got == 0.0f;
            }
        const double n = ROWS * COLS;
        assert_float_equal((double)dropped, n * p, 5 * sqrt(n * p * (1 - p)));
    }
    free(x);
    free(y);
}

static void dropout_drops_the_same_on_the_way_back(void **state)
{
    (void)state;
    float *x = malloc(sizeof(float) * ROWS * LD), *y = malloc(sizeof(float) * ROWS * LD);
    float *dy = malloc(sizeof(float) * ROWS * COLS), *dx = malloc(sizeof(float) * ROWS * LD);
    for (int i = 0; i < ROWS * LD; i++)
        x[i] = 1.0f + (float)i;
    for (int i = 0; i < ROWS * COLS; i++)
        dy[i] = 3.0f;
    for (int i = 0; i < ROWS * LD; i++)
        dx[i] = 10.0f;
    train_dropout(9, 8, 0.25, 5, x, ROWS, COLS, LD, y, LD);
    train_dropout_back(9, 8, 0.25, 5, dy, ROWS, COLS, COLS, dx, LD);
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < LD; k++) {
            if (k >= COLS) /* beyond the row nothing is touched */
                assert_true(dx[r * LD + k] == 10.0f);
            else
                assert_true(dx[r * LD + k] ==
                            (y[r * LD + k] == 0.0f ? 10.0f : 10.0f + 3.0f * (float)(1 / 0.75)));
        }
    /* Rows in pieces, in place: the same mask. */
    train_dropout(9, 8, 0.25, 5, x, 10, COLS, LD, x, LD);
    train_dropout(9, 8, 0.25, 15, x + 10 * LD, ROWS - 10, COLS, LD, x + 10 * LD, LD);
    for (int r = 0; r < ROWS; r++)
        assert_memory_equal(x + r * LD, y + r * LD, COLS * sizeof(float));
    /* Another stream, another mask. */
    train_dropout(9, 9, 0.25, 5, x, ROWS, COLS, LD, dx, LD);
    size_t differ = 0;
    for (int i = 0; i < COLS; i++)
        differ += (dx[i] == 0.0f) != (x[i] == 0.0f);
    assert_true(differ > COLS / 20);
    free(x);
    free(y);
    free(dy);
    free(dx);
}

/* --- first values ---------------------------------------------------------------------------- */
static void assert_all_zero(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        assert_true(x[i] == 0.0f);
}

static void factors_start_as_peft_starts_them(void **state)
{
    (void)state;
    enum { R = 16, IN = 4096, OUT = 2048 };
    float *A = malloc(sizeof(float) * R * IN), *B = malloc(sizeof(float) * R * OUT), E[R];
    struct moments m;
    const double n = R * (double)IN;

    memset(B, 1, sizeof(float) * R * OUT);
    train_init_module(METHOD_LORA, TRAIN_INIT_DEFAULT, 42, 3, 2, R, IN, OUT, A, B, NULL);
    m = moments_of(A, R * IN);
    assert_true(m.highest <= 1.0 / 64 && m.lowest >= -1.0 / 64 && m.highest > 0.99 / 64);
    assert_float_equal(m.mean, 0, 5.0 / 64 / sqrt(3 * n));
    assert_float_equal(m.sd, 1.0 / 64 / sqrt(3), 1e-4);
    assert_float_equal(m.kurtosis, 1.8, 0.02);
    assert_all_zero(B, R * OUT);

    memset(B, 1, sizeof(float) * R * OUT);
    train_init_module(METHOD_DORA, TRAIN_INIT_GAUSSIAN, 42, 3, 2, R, IN, OUT, A, B, NULL);
    m = moments_of(A, R * IN);
    assert_float_equal(m.sd, 1.0 / R, 5.0 / R / sqrt(2 * n));
    assert_float_equal(m.kurtosis, 3, 0.1);
    assert_all_zero(B, R * OUT);

    memset(B, 1, sizeof(float) * R * OUT);
    train_init_module(METHOD_RSLORA, TRAIN_INIT_NORMAL, 42, 3, 2, R, IN, OUT, A, B, NULL);
    m = moments_of(A, R * IN);
    assert_float_equal(m.sd, 1.0, 5.0 / sqrt(2 * n));
    assert_float_equal(m.mean, 0, 5.0 / sqrt(n));
    assert_all_zero(B, R * OUT);

    memset(E, 1, sizeof E);
    train_init_module(METHOD_ADALORA, TRAIN_INIT_DEFAULT, 42, 3, 2, R, IN, OUT, A, B, E);
    assert_float_equal(moments_of(A, R * IN).sd, 0.02, 5 * 0.02 / sqrt(2 * n));
    m = moments_of(B, R * OUT);
    assert_float_equal(m.sd, 0.02, 5 * 0.02 / sqrt(n));
    assert_float_equal(m.kurtosis, 3, 0.15);
    assert_all_zero(E, R);
    assert_true(A[0] != B[0]);
    free(A);
    free(B);
}

static void every_module_starts_with_its_own_numbers(void **state)
{
    (void)state;
    float a[4][64], b[64];
    train_init_module(METHOD_LORA, TRAIN_INIT_DEFAULT, 1, 0, 1, 4, 16, 16, a[0], b, NULL);
    train_init_module(METHOD_LORA, TRAIN_INIT_DEFAULT, 1, 1, 0, 4, 16, 16, a[1], b, NULL);
    train_init_module(METHOD_LORA, TRAIN_INIT_DEFAULT, 2, 0, 1, 4, 16, 16, a[2], b, NULL);
    train_init_module(METHOD_LORA, TRAIN_INIT_DEFAULT, 1, 0, 1, 4, 16, 16, a[3], b, NULL);
    assert_memory_equal(a[0], a[3], sizeof a[0]);
    assert_memory_not_equal(a[0], a[1], sizeof a[0]);
    assert_memory_not_equal(a[0], a[2], sizeof a[0]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(philox_gives_the_published_answers),
        cmocka_unit_test(streams_of_different_uses_differ),
        cmocka_unit_test(uniform_numbers_are_uniform),
        cmocka_unit_test(normal_numbers_are_normal),
        cmocka_unit_test(normal_numbers_are_quantiles_of_the_uniform_ones),
        cmocka_unit_test(permutations_hold_every_number_once),
        cmocka_unit_test(permutations_are_equally_probable),
        cmocka_unit_test(dropout_keeps_the_expectation),
        cmocka_unit_test(dropout_drops_the_same_on_the_way_back),
        cmocka_unit_test(factors_start_as_peft_starts_them),
        cmocka_unit_test(every_module_starts_with_its_own_numbers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
