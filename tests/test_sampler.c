/* test_sampler.c - the next token: random numbers against published vectors, cuts and penalties
 * against distributions worked out by hand, exp and log against libm's long double. */
#include "engine/prob.h"
#include "engine/sampler.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* --- arithmetic ---------------------------------------------------------------------------- */
static uint32_t rng_state = 1;
static double rnd(void) /* [0, 1) */
{
    rng_state = rng_state * 1664525 + 1013904223;
    return (double)(rng_state >> 8) * 0x1p-24;
}

static double off_by(double got, long double want)
{
    return (double)(fabsl((long double)got - want) / fabsl(want));
}

static void exp_is_right_to_two_units_in_the_last_place(void **state)
{
    (void)state;
    for (int i = 0; i < 20000; i++) {
        float x = (float)(-700 * pow(rnd(), 3));
        double w;
        prob_exp(&x, 1, 0, 1, &w);
        assert_true(off_by(w, expl((long double)x)) <= 4.5e-16);
    }
    float edge[4] = { 0, -699.9f, -700.5f, -INFINITY };
    double w[4];
    prob_exp(edge, 4, 0, 1, w);
    assert_true(w[0] == 1.0);
    assert_true(w[1] > 0 && w[1] < 1e-303);
    assert_true(w[2] == 0 && w[3] == 0);
}

static void log_is_right_to_two_units_in_the_last_place(void **state)
{
    (void)state;
    assert_true(prob_log(1.0) == 0);
    for (int i = 0; i < 20000; i++) {
        double x = 1 + 200000 * pow(rnd(), 6);
        if (x > 1)
            assert_true(off_by(prob_log(x), logl((long double)x)) <= 4.5e-16);
    }
}

static void vector_and_plain_code_agree_to_the_bit(void **state)
{
    (void)state;
    float l[1000];
    double a[1000], b[1000];
    for (int i = 0; i < 1000; i++)
        l[i] = (float)(rnd() * 60 - 50);
    for (int n = 1; n <= 1000; n += n < 20 ? 1 : 61) {
        double sa = prob_exp(l, n, 10, 1.25, a), sb = prob_exp_plain(l, n, 10, 1.25, b);
        assert_memory_equal(&sa, &sb, sizeof sa);
        assert_memory_equal(a, b, (size_t)n * sizeof *a);
        double none = prob_exp(l, n, 10, 1.25, NULL);
        assert_memory_equal(&sa, &none, sizeof sa);
    }
}

static void a_maximum_needs_finite_logits(void **state)
{
    (void)state;
    float max;
    for (int at = 0; at < 9; at++) {
        float l[9] = { 1, 2, 3, 4, 5, 6, 7, 8, 9 };
        assert_true(prob_max(l, 9, &max) && max == 9);
        l[at] = 100;
        assert_true(prob_max(l, 9, &max) && max == 100);
        l[at] = -INFINITY;
        assert_true(prob_max(l, 9, &max));
        l[at] = NAN;
        assert_false(prob_max(l, 9, &max));
        l[at] = INFINITY;
        assert_false(prob_max(l, 9, &max));
    }
    float none[2] = { -INFINITY, -INFINITY };
    assert_false(prob_max(none, 2, &max));
}

/* The known-answer vectors published with the Random123 library. */
static void philox_gives_the_published_answers(void **state)
{
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], want[4];
    } cases[] = {
        { { 0, 0, 0, 0 }, { 0, 0 }, { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 } },
        { { 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff },
          { 0xffffffff, 0xffffffff },
          { 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd } },
        { { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344 },
          { 0xa4093822, 0x299f31d0 },
          { 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint32_t got[4];
        philox4x32(cases[i].counter, cases[i].key, got);
        assert_memory_equal(got, cases[i].want, sizeof got);
    }
}

/* --- choices ------------------------------------------------------------------------------- */
enum { V = 8, DRAWS = 4000 };
/* Probabilities 1/2, 1/4, 1/8, ... 1/128, 1/128, at scattered ids. */
static const int by_rank[V] = { 5, 2, 7, 0, 3, 6, 1, 4 };

static void halving(float *l)
{
    for (int r = 0; r < V; r++)
        l[by_rank[r]] = (float)(-(r < 7 ? r + 1 : 7) * log(2) + 3);
}

static int32_t choose(const struct sample_params *p, const float *logits, const int32_t *tokens,
                      int n, int nprompt, struct sample_result *ret)
{
    struct sampler *s;
    float l[V];
    memcpy(l, logits, sizeof l);
    assert_int_equal(sampler_create(V, &s, NULL), ERR_OK);
    assert_true(sampler_run(s, p, l, tokens, n, nprompt, ret));
    sampler_destroy(s);
    return ret->token;
}

/* How often each token comes, over positions 1..DRAWS. */
static void histogram(const struct sample_params *p, const float *logits, int count[V])
{
    static const int32_t tokens[DRAWS + 1];
    struct sample_result r;
    memset(count, 0, V * sizeof *count);
    for (int n = 1; n <= DRAWS; n++)
        count[choose(p, logits, tokens, n, n, &r)]++;
}

static void cuts_keep_what_they_promise(void **state)
{
    (void)state;
    static const struct {
        int top_k;
        float top_p, min_p, temperature;
        int kept; /* likeliest tokens that stay */
    } cases[] = {
        { 0, 1, 0, 1, 8 },
        { 1, 1, 0, 1, 1 },
        { 3, 1, 0, 1, 3 },
        { 8, 1, 0, 1, 8 },
        { 100, 1, 0, 1, 8 },
        { 0, 0.45f, 0, 1, 1 },
        { 0, 0.6f, 0, 1, 2 },
        { 0, 0.74f, 0, 1, 2 },
        { 0, 0.76f, 0, 1, 3 },
        { 0, 0.93f, 0, 1, 4 },
        { 0, 0.94f, 0, 1, 5 },
        { 0, 1e-6f, 0, 1, 1 },
        { 2, 0.65f, 0, 1, 1 },  /* of the two that top_k leaves, the first has 2/3 */
        { 2, 0.68f, 0, 1, 2 },
        { 0, 1, 0.26f, 1, 2 },  /* 1/4 of the maximum is the third */
        { 0, 1, 0.24f, 1, 3 },
        { 0, 1, 1, 1, 1 },
        { 5, 0.9f, 0.2f, 1, 3 },
        { 0, 1, 0.26f, 2, 4 },  /* at temperature 2 each is 0.707 of the one before */
        { 0, 0.6f, 0, 0.5f, 1 }, /* at temperature 1/2 the first has 3/4 */
    };
    float l[V];
    halving(l);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct sample_params p;
        sample_defaults(&p);
        p.top_k = cases[i].top_k;
        p.top_p = cases[i].top_p;
        p.min_p = cases[i].min_p;
        p.temperature = cases[i].temperature;
        p.seed = 7;
        int count[V];
        histogram(&p, l, count);
        double total = 0;
        for (int r = 0; r < cases[i].kept; r++)
            total += pow(r < 7 ? exp2(-r) : exp2(-6), 1 / (double)p.temperature);
        for (int r = 0; r < V; r++) {
            double want = r >= cases[i].kept ? 0
                        : pow(r < 7 ? exp2(-r) : exp2(-6), 1 / (double)p.temperature) / total;
            double got = (double)count[by_rank[r]] / DRAWS;
            double sigma = sqrt(want * (1 - want) / DRAWS);
            if (fabs(got - want) > 4.5 * sigma + 1e-12)
                fail_msg("case %zu, rank %d: %.4f of the draws, expected %.4f", i, r, got, want);
        }
    }
}

static void equal_tokens_are_cut_by_id(void **state)
{
    (void)state;
    float l[V] = { 1, 1, 1, 1, 1, 1, 1, 1 };
    int count[V];
    struct sample_params p;
    sample_defaults(&p);
    p.top_k = 3;
    histogram(&p, l, count);
    for (int i = 0; i < V; i++)
        assert_int_equal(count[i] > 0, i < 3);
    p.top_k = 0;
    p.top_p = 0.5f;
    histogram(&p, l, count);
    for (int i = 0; i < V; i++)
        assert_int_equal(count[i] > 0, i < 4);
    p.temperature = 0;
    histogram(&p, l, count);
    assert_int_equal(count[0], DRAWS);
}

/* A large vocabulary against sorting all of it. */
static int order_of(const void *a, const void *b, void *l)
{
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    float x = ((const float *)l)[i], y = ((const float *)l)[j];
    return x != y ? (x > y ? -1 : 1) : i - j;
}

static void cuts_of_a_large_vocabulary_agree_with_sorting_it(void **state)
{
    (void)state;
    enum { BIG = 50000 };
    float *l = malloc(BIG * sizeof *l), *copy = malloc(BIG * sizeof *l);
    int32_t *sorted = malloc(BIG * sizeof *sorted);
    uint8_t *kept = malloc(BIG);
    assert_true(l && copy && sorted && kept);
    for (int i = 0; i < BIG; i++) {
        l[i] = (float)(floor(rnd() * 400) / 100 + rnd() * (i % 3 == 0)); /* many ties */
        sorted[i] = i;
    }
    qsort_r(sorted, BIG, sizeof *sorted, order_of, l);
    struct sampler *s;
    assert_int_equal(sampler_create(BIG, &s, NULL), ERR_OK);
    static const struct { int k; float p; } cases[] = { { 40, 1 }, { 20000, 1 }, { 0, 0.5f },
                                                        { 0, 0.99f }, { 1000, 0.3f } };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        int k = cases[c].k ? cases[c].k : BIG, m = 0;
        long double total = 0, sum = 0;
        for (int i = 0; i < k; i++)
            total += expl(l[sorted[i]]);
        while (m < k && sum < (long double)cases[c].p * total)
            sum += expl(l[sorted[m++]]);
        memset(kept, 0, BIG);
        for (int i = 0; i < m; i++)
            kept[sorted[i]] = 1;
        struct sample_params p;
        sample_defaults(&p);
        p.top_k = cases[c].k;
        p.top_p = cases[c].p;
        int32_t tokens[1] = { 0 };
        for (uint64_t seed = 0; seed < 300; seed++) {
            struct sample_result r;
            memcpy(copy, l, BIG * sizeof *l);
            p.seed = seed;
            assert_true(sampler_run(s, &p, copy, tokens, 1, 1, &r));
            assert_true(kept[r.token]);
        }
    }
    sampler_destroy(s);
    free(l), free(copy), free(sorted), free(kept);
}

static void a_choice_depends_on_seed_choice_and_position_only(void **state)
{
    (void)state;
    float l[V] = { 0 };
    static const int32_t zeros[300], ones[300] = { 1, 1, 1 };
    struct sample_params p;
    struct sample_result a, b;
    sample_defaults(&p);
    int by_seed = 0, by_choice = 0, by_position = 0;
    for (int i = 1; i < 200; i++) {
        p.seed = 5;
        p.choice = 0;
        choose(&p, l, zeros, i, 1, &a);
        choose(&p, l, ones, i, i, &b);
        assert_int_equal(a.token, b.token);
        by_position += choose(&p, l, zeros, i + 1, 1, &b) != a.token;
        p.choice = 1;
        by_choice += choose(&p, l, zeros, i, 1, &b) != a.token;
        p.choice = 0;
        p.seed = 5 + (1ull << 32); /* the upper half counts */
        by_seed += choose(&p, l, zeros, i, 1, &b) != a.token;
    }
    assert_true(by_seed > 150 && by_choice > 150 && by_position > 150);
}

static void penalties_follow_their_formulas(void **state)
{
    (void)state;
    /* prompt 0 1 1, output 2 2 2 3: CTRL's rule divides 2.0 and multiplies -1.0 */
    static const int32_t tokens[] = { 0, 1, 1, 2, 2, 2, 3 };
    const float l[V] = { 2, -1, 2, -1, 0.5f, 0, -1, 1 };
    static const struct {
        float repetition, presence, frequency;
        float want[V];
    } cases[] = {
        { 1, 0, 0, { 2, -1, 2, -1, 0.5f, 0, -1, 1 } },
        { 2, 0, 0, { 1, -2, 1, -2, 0.5f, 0, -1, 1 } },
        { 1, 0.5f, 0, { 2, -1, 1.5f, -1.5f, 0.5f, 0, -1, 1 } },
        { 1, 0, 0.25f, { 2, -1, 1.25f, -1.25f, 0.5f, 0, -1, 1 } },
        { 2, 1, -0.5f, { 1, -2, 1.5f, -2.5f, 0.5f, 0, -1, 1 } },
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        struct sample_params p;
        struct sample_result r;
        sample_defaults(&p);
        p.temperature = 0;
        p.repetition_penalty = cases[c].repetition;
        p.presence_penalty = cases[c].presence;
        p.frequency_penalty = cases[c].frequency;
        p.top_logprobs = V;
        choose(&p, l, tokens, 7, 3, &r);
        double sum = 0;
        for (int i = 0; i < V; i++)
            sum += exp((double)cases[c].want[i]);
        assert_int_equal(r.ntop, V);
        for (int i = 0; i < V; i++)
            assert_float_equal(r.top[i].logprob, cases[c].want[r.top[i].token] - log(sum), 1e-6);
        assert_int_equal(r.token, r.top[0].token);
    }
}

static void penalties_leave_nothing_behind_for_the_next_row(void **state)
{
    (void)state;
    struct sampler *s;
    assert_int_equal(sampler_create(V, &s, NULL), ERR_OK);
    static const int32_t tokens[] = { 5, 5, 2 };
    struct sample_params p;
    struct sample_result r;
    float l[V];
    sample_defaults(&p);
    p.temperature = 0;
    p.repetition_penalty = 50;
    p.frequency_penalty = 2;
    for (int i = 0; i < 3; i++) {
        halving(l);
        assert_true(sampler_run(s, &p, l, tokens, 3, 1, &r));
        halving(l);
        int32_t none[1] = { 7 };
        assert_true(sampler_run(s, &p, l, none, 1, 1, &r));
        assert_int_equal(r.token, 5);
    }
    sampler_destroy(s);
}

static void bias_bans_and_forces(void **state)
{
    (void)state;
    float l[V];
    halving(l);
    struct sample_bias ban[] = { { 5, -100 }, { 2, -100 } }, force[] = { { 4, 100 } };
    struct sample_params p;
    int count[V];
    sample_defaults(&p);
    p.bias = ban;
    p.nbias = 2;
    histogram(&p, l, count);
    assert_int_equal(count[5] + count[2], 0);
    p.bias = force;
    p.nbias = 1;
    histogram(&p, l, count);
    assert_int_equal(count[4], DRAWS);
}

static void logprobs_are_of_the_distribution_before_temperature_and_cuts(void **state)
{
    (void)state;
    float l[V];
    halving(l);
    static const int32_t tokens[] = { 0 };
    struct sample_params p;
    struct sample_result r;
    sample_defaults(&p);
    p.temperature = 0.3f;
    p.top_k = 1;
    p.top_logprobs = 3;
    choose(&p, l, tokens, 1, 1, &r);
    assert_int_equal(r.token, 5);
    assert_int_equal(r.ntop, 3);
    assert_float_equal(r.logprob, log(0.5), 1e-6);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(r.top[i].token, by_rank[i]);
        assert_float_equal(r.top[i].logprob, -(i + 1) * log(2), 1e-6);
    }
    p.top_logprobs = 0;
    choose(&p, l, tokens, 1, 1, &r);
    assert_int_equal(r.ntop, 0);
    assert_float_equal(r.logprob, log(0.5), 1e-6);

    struct sampler *s;
    assert_int_equal(sampler_create(V, &s, NULL), ERR_OK);
    assert_true(sampler_score(s, l, 7, 2, &r));
    assert_int_equal(r.token, 7);
    assert_float_equal(r.logprob, log(0.125), 1e-6);
    assert_int_equal(r.top[1].token, 2);
    sampler_destroy(s);
}

static void logits_that_are_not_numbers_are_reported(void **state)
{
    (void)state;
    static const int32_t tokens[] = { 0 };
    struct sampler *s;
    struct sample_params p;
    struct sample_result r;
    sample_defaults(&p);
    assert_int_equal(sampler_create(V, &s, NULL), ERR_OK);
    for (int greedy = 0; greedy < 2; greedy++) {
        float bad[V] = { 0, 1, NAN }, worse[V];
        for (int i = 0; i < V; i++)
            worse[i] = -INFINITY;
        p.temperature = greedy ? 0 : 1;
        assert_false(sampler_run(s, &p, bad, tokens, 1, 1, &r));
        assert_false(sampler_run(s, &p, worse, tokens, 1, 1, &r));
        assert_false(sampler_score(s, bad, 0, 0, &r));
    }
    sampler_destroy(s);
}

static void settings_out_of_range_are_refused_by_name(void **state)
{
    (void)state;
    static const struct sample_bias far[] = { { V, 1 } }, big[] = { { 0, 101 } };
    struct sample_params ok;
    sample_defaults(&ok);
    assert_int_equal(sample_check(&ok, V, NULL), ERR_OK);
    struct { const char *field; struct sample_params p; } cases[24];
    int n = 0;
#define BAD(name, set) (cases[n].field = name, cases[n].p = ok, cases[n++].p.set)
    BAD("temperature", temperature = -0.1f);
    BAD("temperature", temperature = 2.1f);
    BAD("temperature", temperature = NAN);
    BAD("top_p", top_p = 0);
    BAD("top_p", top_p = 1.01f);
    BAD("top_p", top_p = NAN);
    BAD("min_p", min_p = -0.1f);
    BAD("min_p", min_p = 1.1f);
    BAD("top_k", top_k = -1);
    BAD("repetition_penalty", repetition_penalty = 0);
    BAD("repetition_penalty", repetition_penalty = INFINITY);
    BAD("presence_penalty", presence_penalty = 2.5f);
    BAD("presence_penalty", presence_penalty = NAN);
    BAD("frequency_penalty", frequency_penalty = -2.5f);
    BAD("top_logprobs", top_logprobs = 21);
    BAD("top_logprobs", top_logprobs = -2);
    BAD("logit_bias", nbias = 1025);
    BAD("logit_bias", nbias = 1), cases[n - 1].p.bias = far;
    BAD("logit_bias", nbias = 1), cases[n - 1].p.bias = big;
    for (int i = 0; i < n; i++) {
        struct err err = { 0 };
        assert_int_equal(sample_check(&cases[i].p, V, &err), ERR_INVALID);
        assert_string_equal(err.param, cases[i].field);
        assert_non_null(strstr(err.msg, cases[i].field));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exp_is_right_to_two_units_in_the_last_place),
        cmocka_unit_test(log_is_right_to_two_units_in_the_last_place),
        cmocka_unit_test(vector_and_plain_code_agree_to_the_bit),
        cmocka_unit_test(a_maximum_needs_finite_logits),
        cmocka_unit_test(philox_gives_the_published_answers),
        cmocka_unit_test(cuts_keep_what_they_promise),
        cmocka_unit_test(equal_tokens_are_cut_by_id),
        cmocka_unit_test(cuts_of_a_large_vocabulary_agree_with_sorting_it),
        cmocka_unit_test(a_choice_depends_on_seed_choice_and_position_only),
        cmocka_unit_test(penalties_follow_their_formulas),
        cmocka_unit_test(penalties_leave_nothing_behind_for_the_next_row),
        cmocka_unit_test(bias_bans_and_forces),
        cmocka_unit_test(logprobs_are_of_the_distribution_before_temperature_and_cuts),
        cmocka_unit_test(logits_that_are_not_numbers_are_reported),
        cmocka_unit_test(settings_out_of_range_are_refused_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
