/* test_sched_lookup.c - prompt-lookup decoding guesses, and changes no bit of any result.
 *
 * What a request should get is what it gets without it, one thread, scalar code.  The model is
 * random (tests/support_model.h): left alone, greedy decoding soon repeats itself, so guesses are
 * right; penalties, adapters and misleading prompts make them wrong. */
#include "tests/support_lora.h"
#include "tests/support_model.h"
#include "tests/support_sched.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#if defined(__SANITIZE_THREAD__)
enum { SMALL = 1 };
#else
enum { SMALL = 0 };
#endif

static struct base *base;
static enum isa best, second;

static struct base *make(enum precision p)
{
    struct support_model m = support_model_default("llama");
    if (SMALL)
        m.D = m.F = 64, m.H = 2, m.G = m.L = 1;
    return support_base(&m, p == PREC_F32 ? "f32" : "nf4", NULL, p);
}

static int make_base(void **state)
{
    (void)state;
    base = make(PREC_FAST);
    if (isa_select("auto", &best, NULL) != ERR_OK)
        best = ISA_SCALAR;
    if (isa_select("avx2", &second, NULL) != ERR_OK)
        second = ISA_SCALAR;
    return 0;
}

static int free_base(void **state)
{
    (void)state;
    base_free(base);
    return 0;
}

static void open_rig(struct rig *r, const struct base *b, enum precision p, int threads,
                     enum isa isa, struct sched_opts o)
{
    o.kv_bytes = rig_pages(b, o.kv_bytes > 0 ? (int)o.kv_bytes : 64);
    rig_open(r, b, threads, isa, p, 64 << 20, o);
}

static void check_equal(const struct result *got, const struct result *want, const char *what,
                        int n)
{
    if (!result_equal(got, want))
        fail_msg("%s %d differs with prompt lookup", what, n);
}

/* --- every way to ask ---------------------------------------------------------------------- */
enum { CASES = 24, PROMPT_MAX = 100, OUTPUT_MAX = 70 };

struct cases {
    int32_t prompt[CASES][PROMPT_MAX];
    struct sample_bias bias[2];
    struct gen_request q[CASES];
};

static struct cases *make_cases(const struct base *b)
{
    struct cases *c = calloc(1, sizeof *c);
    assert_non_null(c);
    uint32_t x = 7;
    c->bias[0] = (struct sample_bias){ 40, 4 };
    c->bias[1] = (struct sample_bias){ 41, -100 };
    for (int i = 0; i < CASES; i++) {
        const int n = 1 + i * 29 % (PROMPT_MAX - 1), period = 2 + i % 9;
        for (int t = 0; t < n; t++) { /* random; periodic; periodic with a change now and then */
            x = x * 1664525u + 1013904223u;
            c->prompt[i][t] = i % 3 == 0 || (i % 3 == 2 && x >> 28 == 0)
                                  ? (int32_t)((x >> 8) % 300) + 3
                                  : 10 + t % period * 17;
        }
        struct gen_request *q = &c->q[i];
        *q = rig_request(c->prompt[i], n, 1 + i * 23 % OUTPUT_MAX);
        q->ignore_eos = i % 5 != 0;
        q->sample.repetition_penalty = i % 7 == 2 ? 1.1f : 1;
        q->sample.frequency_penalty = i % 7 == 3 ? 0.02f : 0;
        q->sample.presence_penalty = i % 7 == 4 ? 0.3f : 0;
        q->sample.top_logprobs = i % 4 == 3 ? 5 : i % 4 - 1;
        q->sample.top_k = i % 8 == 1 ? 1 : 0;
        q->echo_logprobs = i % 9 == 4;
        if (i % 6 == 4) {
            q->sample.bias = c->bias;
            q->sample.nbias = 2;
        }
        q->nadapters = i % 4 == 1 ? 1 : i % 8 == 6 ? 2 : 0;
        for (int k = 0; k < q->nadapters; k++)
            q->adapters[k] = rig_adapter(b, i + k, k == 0 ? 1 : -0.5f);
    }
    c->q[11].sample.temperature = 0.8f; /* is not guessed for */
    return c;
}

static void run_all(struct rig *r, const struct cases *c, struct result *ret)
{
    for (int i = 0; i < CASES; i++) {
        sched_forget(r->sched);
        ret[i] = rig_run(r, &c->q[i]);
    }
}

/* Adds what was guessed to *ret. */
static void compare_all(const struct base *b, enum precision p, int threads, enum isa isa,
                        struct sched_opts o, const struct cases *c, const struct result *want,
                        struct sched_stats *ret)
{
    struct rig r;
    struct result got[CASES];
    struct sched_stats st;
    open_rig(&r, b, p, threads, isa, o);
    run_all(&r, c, got);
    sched_stats(r.sched, &st);
    assert_int_equal(st.kv.used, 0);
    assert_true(st.guessed_right <= st.guessed);
    ret->guessed += st.guessed;
    ret->guessed_right += st.guessed_right;
    for (int i = 0; i < CASES; i++) {
        check_equal(&got[i], &want[i], "case", i);
        assert_int_equal(got[i].usage.completion_tokens, want[i].usage.completion_tokens);
        result_free(&got[i]);
    }
    rig_close(&r);
}

static void same_bits_in(enum precision p, struct sched_stats *ret)
{
    struct base *b = p == PREC_FAST ? base : make(p);
    struct cases *c = make_cases(b);
    struct result want[CASES];
    struct rig r;
    open_rig(&r, b, p, 1, ISA_SCALAR, (struct sched_opts){ .lookup = 0 });
    run_all(&r, c, want);
    struct sched_stats st;
    sched_stats(r.sched, &st);
    assert_int_equal(st.guessed, 0);
    rig_close(&r);
    const struct {
        int threads, lookup, step_tokens, max_seqs, pages;
        enum isa isa;
    } configs[] = {
        { 1, 8, 0, 0, 0, ISA_SCALAR }, { 2, 64, 0, 0, 0, best }, { 1, 1, 0, 1, 0, second },
        { 2, 16, 3, 2, 0, best },      { 1, 5, 40, 1, 11, best }, { 2, 4, 1, 1, 0, best },
    };
    const int n = SMALL || p != PREC_FAST ? 2 : (int)(sizeof configs / sizeof configs[0]);
    for (int i = 0; i < n; i++)
        compare_all(b, p, configs[i].threads, configs[i].isa,
                    (struct sched_opts){ .lookup = configs[i].lookup,
                                         .step_tokens = configs[i].step_tokens,
                                         .max_seqs = configs[i].max_seqs,
                                         .kv_bytes = (size_t)configs[i].pages },
                    c, want, ret);
    for (int i = 0; i < CASES; i++)
        result_free(&want[i]);
    free(c);
    if (b != base)
        base_free(b);
}

static void every_request_gets_the_same_bits(void **state)
{
    (void)state;
    static const enum precision precisions[] = { PREC_FAST, PREC_EXACT, PREC_F32 };
    for (int i = 0; i < 3; i++) {
        struct sched_stats st = { 0 };
        same_bits_in(precisions[i], &st);
        printf("%s: %d of %d guesses were right\n", precision_name(precisions[i]),
               (int)st.guessed_right, (int)st.guessed);
        assert_true(st.guessed_right > 100 && st.guessed_right + 100 < st.guessed);
    }
}

/* --- endings inside a run of right guesses --------------------------------------------------- */
/* A prompt that greedy decoding has begun to repeat itself in: what follows is guessed at once. */
static int repeating(struct rig *r, int32_t *t, int n, int more)
{
    struct gen_request q = rig_request(t, n, more);
    q.ignore_eos = true;
    struct result got = rig_run(r, &q);
    assert_int_equal(got.n, (size_t)more);
    for (int i = 0; i < more; i++)
        t[n + i] = got.tokens[i].token;
    result_free(&got);
    sched_forget(r->sched);
    return n + more;
}

struct pair {
    struct rig with, without;
};

static void open_pair(struct pair *p)
{
    open_rig(&p->with, base, PREC_FAST, 2, best, (struct sched_opts){ .lookup = 16 });
    open_rig(&p->without, base, PREC_FAST, 1, second, (struct sched_opts){ .lookup = 0 });
}

static void close_pair(struct pair *p)
{
    rig_close(&p->with);
    rig_close(&p->without);
}

/* Runs both; how many tokens came, and how many were guessed right. */
static size_t both(struct pair *p, const struct gen_request *q, const char *what, int n,
                   enum gen_finish *ret_finish, uint64_t *ret_right)
{
    struct sched_stats before, after;
    sched_stats(p->with.sched, &before);
    struct result got = rig_run(&p->with, q), want = rig_run(&p->without, q);
    sched_stats(p->with.sched, &after);
    check_equal(&got, &want, what, n);
    assert_int_equal(got.usage.cached_tokens, want.usage.cached_tokens);
    const size_t count = got.n;
    *ret_finish = got.finish;
    *ret_right = after.guessed_right - before.guessed_right;
    result_free(&got), result_free(&want);
    return count;
}

static void max_tokens_and_an_end_token_end_it_anywhere(void **state)
{
    (void)state;
    struct pair p;
    enum gen_finish f;
    uint64_t right;
    int32_t t[400] = { 5, 80, 33 };
    const int old_neos = base->arch.neos;
    open_pair(&p);
    const int n = repeating(&p.without, t, 3, 120), all = repeating(&p.without, t, n, 60);
    uint64_t guessed = 0;
    for (int max = 1; max < all - n; max++) { /* pages end in between, too */
        struct gen_request q = rig_request(t, n + max % 17, max);
        q.ignore_eos = true;
        assert_int_equal(both(&p, &q, "max_tokens", max, &f, &right), max);
        assert_int_equal(f, GEN_LENGTH);
        guessed += right;
    }
    assert_true(guessed > 300);

    guessed = 0;
    int ended = 0;
    for (int i = 0; i < 40; i++) { /* the end token is the i-th that comes, or an earlier one */
        struct gen_request q = rig_request(t, n, 60);
        q.sample.top_logprobs = 1;
        base->arch.eos[0] = t[n + i];
        base->arch.neos = 1;
        ended += both(&p, &q, "end token", i, &f, &right) > 1;
        assert_int_equal(f, GEN_STOP);
        guessed += right;
    }
    base->arch.neos = old_neos;
    assert_true(ended > 0 && guessed > 0);
    close_pair(&p);
}

static void a_stop_string_ends_it_anywhere(void **state)
{
    (void)state;
    struct pair p;
    enum gen_finish f;
    uint64_t right, guessed = 0;
    int32_t t[400] = { 5, 80, 33 };
    int stopped = 0;
    open_pair(&p);
    const int n = repeating(&p.without, t, 3, 120);
    struct gen_request q = rig_request(t, n, 60);
    q.ignore_eos = true;
    struct result whole = rig_run(&p.without, &q);
    sched_forget(p.without.sched);
    for (size_t at = 0; at + 12 < whole.text.len && at < 60; at++) {
        char stop[13] = { 0 };
        const size_t len = 1 + at % 12;
        memcpy(stop, whole.text.data + at, len);
        if (strlen(stop) != len)
            continue;
        q.nstop = 2;
        q.stop[0] = stop;
        q.stop[1] = "not in any text";
        both(&p, &q, "stop string", (int)at, &f, &right);
        stopped += f == GEN_STOP;
        guessed += right;
    }
    assert_true(stopped > 20 && guessed > 20);
    result_free(&whole);
    close_pair(&p);
}

/* --- company ------------------------------------------------------------------------------- */
static void who_comes_meanwhile_changes_nothing(void **state)
{
    (void)state;
    struct pair p;
    int32_t t[400] = { 5, 80, 33 }, other[20];
    open_pair(&p);
    const int n = repeating(&p.without, t, 3, 100);
    for (int i = 0; i < 20; i++)
        other[i] = 3 + i * 13 % 300;
    struct gen_request q = rig_request(t, n, 300), q2 = rig_request(other, 20, 40);
    q.ignore_eos = q2.ignore_eos = true;
    q.sample.top_logprobs = q2.sample.top_logprobs = 2;
    q2.nadapters = 1;
    q2.adapters[0] = rig_adapter(base, 4, 1);
    struct result want = rig_run(&p.without, &q), want2 = rig_run(&p.without, &q2);
    for (int i = 0; i < 6; i++) {
        struct gen *g = rig_submit(&p.with, &q);
        gen_wait(g, (size_t)i * 20);
        struct gen *g2 = rig_submit(&p.with, &q2);
        if (i % 2 == 1) {
            gen_wait(g2, 3);
            sched_preempt_one(p.with.sched);
        }
        struct result got2 = rig_finish(g2), got = rig_finish(g);
        check_equal(&got, &want, "the first, meeting", i);
        check_equal(&got2, &want2, "the second, meeting", i);
        result_free(&got), result_free(&got2);
    }
    struct sched_stats st;
    sched_stats(p.with.sched, &st);
    assert_true(st.guessed_right > 100);
    assert_int_equal(st.kv.used, 0);
    result_free(&want), result_free(&want2);
    close_pair(&p);
}

/* What follows is as it was without: pages that hold a wrong guess were never shared. */
static void the_prefix_cache_holds_what_was_chosen(void **state)
{
    (void)state;
    struct pair p;
    enum gen_finish f;
    uint64_t right;
    open_pair(&p);
    for (int i = 0; i < 12; i++) {
        int32_t t[300];
        int n = 12 + i;
        for (int k = 0; k < n; k++)
            t[k] = 3 + (i * 31 + k * 7) % 300;
        for (int round = 0; round < 4; round++) {
            struct gen_request q = rig_request(t, n, 30);
            q.ignore_eos = true;
            q.sample.repetition_penalty = i % 2 == 0 ? 1 : 1.2f;
            for (int again = 0; again < 2; again++)
                both(&p, &q, "conversation", i, &f, &right); /* cached_tokens too */
            struct result got = rig_run(&p.without, &q), same = rig_run(&p.with, &q);
            check_equal(&same, &got, "conversation", i);
            for (size_t k = 0; k < got.n; k++)
                t[n++] = got.tokens[k].token;
            result_free(&got), result_free(&same);
        }
    }
    close_pair(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_request_gets_the_same_bits),
        cmocka_unit_test(max_tokens_and_an_end_token_end_it_anywhere),
        cmocka_unit_test(a_stop_string_ends_it_anywhere),
        cmocka_unit_test(who_comes_meanwhile_changes_nothing),
        cmocka_unit_test(the_prefix_cache_holds_what_was_chosen),
    };
    return cmocka_run_group_tests(tests, make_base, free_base);
}
