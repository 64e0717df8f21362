/* test_sched.c - a request gets the same bits whatever runs beside it; nothing is lost, nothing
 * waits for ever, nothing is shared that must not be.
 *
 * The model is random (tests/support_model.h); what a request should get is what it gets when it
 * is alone in a scheduler with one thread and scalar code. */
#include "tests/support_lora.h"
#include "tests/support_model.h"
#include "tests/support_sched.h"

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

/* Threads are what the thread sanitizer is for, and it makes arithmetic 30 times slower. */
#if defined(__SANITIZE_THREAD__)
enum { SMALL = 1 };
#else
enum { SMALL = 0 };
#endif

static struct base *base; /* NF4, fast */
static enum isa best, second; /* of this CPU; AVX-512 and AVX2 where it has them */

static int make_base(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    if (SMALL)
        m.D = m.F = 64, m.H = 2, m.G = m.L = 1;
    base = support_base(&m, "nf4", NULL, PREC_FAST);
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

static void open_rig(struct rig *r, struct sched_opts o)
{
    if (o.kv_bytes == 0)
        o.kv_bytes = rig_pages(base, 256);
    rig_open(r, base, 2, best, PREC_FAST, 64 << 20, o);
}

/* --- the promise --------------------------------------------------------------------------- */
enum { CROWD = 20, WITH_ADAPTER = 16, LONGEST = 96, PROMPT_MAX = 90 };

struct crowd {
    int32_t prompt[CROWD][PROMPT_MAX];
    struct sample_bias bias[2];
    struct gen_request q[CROWD];
};

/* Prompts of 3 to 90 tokens, every third with a common beginning; every way to sample. */
static struct crowd *make_crowd(void)
{
    struct crowd *c = calloc(1, sizeof *c);
    assert_non_null(c);
    uint32_t x = 99;
    c->bias[0] = (struct sample_bias){ 40, 3 };
    c->bias[1] = (struct sample_bias){ 41, -100 };
    for (int i = 0; i < CROWD; i++) {
        int n = 3 + i * 37 % (PROMPT_MAX - 2);
        for (int t = 0; t < n; t++) {
            x = x * 1664525u + 1013904223u;
            c->prompt[i][t] = i % 3 == 0 ? 3 + t * 11 % 300 : (int32_t)((x >> 8) % 317) + 3;
        }
        struct gen_request *q = &c->q[i];
        *q = rig_request(c->prompt[i], n, 10 + i * 5 % 29);
        q->ignore_eos = i % 4 != 0;
        q->sample.temperature = i % 2 ? 0.9f : 0;
        q->sample.seed = (uint64_t)i * 77;
        q->sample.choice = (uint32_t)i % 3;
        q->sample.top_p = i % 5 == 1 ? 0.8f : 1;
        q->sample.top_k = i % 5 == 3 ? 20 : 0;
        q->sample.min_p = i % 7 == 5 ? 0.05f : 0;
        q->sample.repetition_penalty = i % 6 == 2 ? 1.3f : 1;
        q->sample.frequency_penalty = i % 6 == 3 ? 0.7f : 0;
        q->sample.top_logprobs = i % 4 - 1 + (i % 4 == 3) * 3;
        if (i % 6 == 4) {
            q->sample.bias = c->bias;
            q->sample.nbias = 2;
        }
        q->echo_logprobs = i % 9 == 2;
        if (i < WITH_ADAPTER) {
            q->nadapters = i % 8 == 7 ? 2 : 1;
            q->adapters[0] = rig_adapter(base, i, i % 3 ? 1 : 0.75f);
            if (q->nadapters == 2)
                q->adapters[1] = rig_adapter(base, i - 1, -0.5f);
        }
    }
    return c;
}

static void run_alone(const struct crowd *c, enum kv_type type, struct result *ret)
{
    struct rig r;
    rig_open(&r, base, 1, ISA_SCALAR, PREC_FAST, 64 << 20,
             (struct sched_opts){ .kv_type = type, .kv_bytes = rig_pages(base, 64) });
    for (int i = 0; i < CROWD; i++) {
        sched_forget(r.sched);
        ret[i] = rig_run(&r, &c->q[i]);
        assert_int_equal(ret[i].usage.cached_tokens, 0);
    }
    rig_close(&r);
}

/* Of one that was cancelled only the beginning is there. */
static void check_beginning(const struct result *got, const struct result *want)
{
    assert_int_equal(got->finish, GEN_CANCELLED);
    assert_true(got->n >= 3 && got->n < want->n);
    for (size_t i = 0; i < got->n; i++)
        assert_int_equal(got->tokens[i].token, want->tokens[i].token);
}

static void run_together(const struct crowd *c, const struct result *want, int threads,
                         enum isa isa, struct sched_opts o, int *ret_preempted)
{
    enum { VICTIM = 19 }; /* no adapter; cancelled after three tokens */
    struct rig r;
    rig_open(&r, base, threads, isa, PREC_FAST, 64 << 20, o);
    struct gen *g[CROWD];
    for (int i = 0; i < CROWD; i++) {
        struct gen_request q = c->q[i];
        if (i == VICTIM)
            q.max_tokens = 400;
        g[i] = rig_submit(&r, &q);
        if (i == 9) { /* somebody certainly runs */
            gen_wait(g[0], 0);
            sched_preempt_one(r.sched);
            sched_forget(r.sched);
        }
    }
    gen_wait(g[VICTIM], 2);
    gen_cancel(g[VICTIM]);
    int preempted = 0;
    for (int i = 0; i < CROWD; i++) {
        struct result got = rig_finish(g[i]);
        preempted += got.usage.preemptions;
        assert_int_equal(got.usage.prompt_tokens, c->q[i].nprompt);
        if (i == VICTIM)
            check_beginning(&got, &want[i]);
        else if (!result_equal(&got, &want[i]))
            fail_msg("request %d of the crowd differs from the same request alone", i);
        result_free(&got);
    }
    struct sched_stats st;
    sched_stats(r.sched, &st);
    assert_int_equal(st.kv.used, 0);
    assert_int_equal(st.preempted, preempted);
    assert_int_equal(st.finished, CROWD - 1);
    assert_int_equal(st.cancelled, 1);
    struct adapter_cache_stats ac;
    adapter_cache_stats(r.cache, &ac);
    assert_int_equal(ac.pinned, 0);
    *ret_preempted += preempted;
    rig_close(&r);
}

static void twenty_at_once_get_the_same_bits_as_each_alone(void **state)
{
    (void)state;
    struct crowd *c = make_crowd();
    struct result want[CROWD];
    c->q[19].max_tokens = 400; /* the one that is cancelled */
    c->q[19].ignore_eos = true;
    run_alone(c, KV_F16, want);
    const struct {
        int threads, max_seqs, step_tokens, pages;
        enum isa isa;
    } configs[] = {
        { 1, 20, 512, 256, ISA_SCALAR }, { 2, 20, 64, 256, ISA_SCALAR },
        { 1, 20, 33, 256, second },      { 2, 20, 512, 256, best },
        { 2, 3, 7, 256, best },          { 2, 20, 128, 36, best }, /* too few pages for all */
    };
    int preempted = 0;
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++)
        run_together(c, want, configs[i].threads, configs[i].isa,
                     (struct sched_opts){ .max_seqs = configs[i].max_seqs,
                                          .step_tokens = configs[i].step_tokens,
                                          .kv_bytes = rig_pages(base, configs[i].pages) },
                     &preempted);
    assert_true(preempted >= 6);
    for (int i = 0; i < CROWD; i++)
        result_free(&want[i]);
    free(c);
}

/* Keys of 8 bits: shared, given up and computed again like others, and twice as many. */
static void with_keys_of_8_bits_it_is_the_same(void **state)
{
    (void)state;
    struct crowd *c = make_crowd();
    struct result want[CROWD];
    c->q[19].max_tokens = 400;
    c->q[19].ignore_eos = true;
    run_alone(c, KV_Q8, want);
    int preempted = 0;
    struct sched_opts o = { .kv_type = KV_Q8, .max_seqs = 20, .step_tokens = 33 };
    o.kv_bytes = 256 * kv_page_bytes(&base->arch, KV_Q8);
    run_together(c, want, 2, best, o, &preempted);
    o.kv_bytes = 36 * kv_page_bytes(&base->arch, KV_Q8); /* too few for all */
    o.step_tokens = 128;
    run_together(c, want, 1, second, o, &preempted);
    assert_true(preempted >= 2);
    for (int i = 0; i < CROWD; i++)
        result_free(&want[i]);
    free(c);
}

/* --- shared prefixes ----------------------------------------------------------------------- */
static void count_up(int32_t *t, int n)
{
    for (int i = 0; i < n; i++)
        t[i] = 3 + i * 5 % 300;
}

static void a_shared_prefix_is_counted_and_changes_no_bit(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[100];
    open_rig(&r, (struct sched_opts){ .step_tokens = 40 });
    count_up(t, 100);
    struct gen_request q = rig_request(t, 100, 20);
    q.sample.top_logprobs = 5;
    q.nadapters = 1;
    q.adapters[0] = rig_adapter(base, 4, 1);
    struct result first = rig_run(&r, &q), again = rig_run(&r, &q);
    assert_int_equal(first.usage.cached_tokens, 0);
    assert_int_equal(again.usage.cached_tokens, 96);
    assert_true(result_equal(&first, &again));
    result_free(&again);

    t[70] = 9; /* four pages are still the same */
    struct result other = rig_run(&r, &q);
    assert_int_equal(other.usage.cached_tokens, 64);
    sched_forget(r.sched);
    again = rig_run(&r, &q);
    assert_int_equal(again.usage.cached_tokens, 0);
    assert_true(result_equal(&other, &again));
    result_free(&first), result_free(&again), result_free(&other);
    rig_close(&r);
}

static void other_tenants_adapters_or_weights_share_nothing(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[64];
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    count_up(t, 64);
    struct gen_request q = rig_request(t, 64, 2);
    for (int kind = 0; kind < 5; kind++) {
        q.tenant = kind == 1 ? 2 : 1;
        q.nadapters = kind >= 2;
        if (kind >= 2)
            q.adapters[0] = rig_adapter(base, kind == 3 ? 5 : 4, kind == 4 ? 0.5f : 1);
        struct result got = rig_run(&r, &q);
        assert_int_equal(got.usage.cached_tokens, 0);
        result_free(&got);
        got = rig_run(&r, &q);
        assert_int_equal(got.usage.cached_tokens, 48);
        result_free(&got);
    }
    rig_close(&r);
}

static void the_order_of_combined_adapters_does_not_matter(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 12);
    struct adapter *a = support_lora(&base->arch, METHOD_LORA, 8, 0.7f, 50);
    struct adapter *b = support_lora(&base->arch, METHOD_ADALORA, 5, 0.7f, 51);
    q.sample.top_logprobs = 3;
    q.nadapters = 2;
    q.adapters[0] = (struct gen_adapter){ .resident = a, .weight = 0.6f };
    q.adapters[1] = (struct gen_adapter){ .resident = b, .weight = 1.5f };
    struct result one = rig_run(&r, &q);
    struct gen_adapter swap = q.adapters[0];
    q.adapters[0] = q.adapters[1];
    q.adapters[1] = swap;
    struct result two = rig_run(&r, &q);
    assert_true(result_equal(&one, &two));
    assert_int_equal(two.usage.cached_tokens, 16); /* the same pages, even */
    q.nadapters = 0;
    struct result none = rig_run(&r, &q);
    assert_int_equal(none.usage.cached_tokens, 0);
    assert_true(memcmp(&none.tokens[0].logprob, &one.tokens[0].logprob, 4) != 0);
    result_free(&one), result_free(&two), result_free(&none);
    rig_close(&r);
    adapter_free(a);
    adapter_free(b);
}

/* --- admission ----------------------------------------------------------------------------- */
static void a_cold_adapter_is_waited_for_by_nobody_else(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    r.gated = true;
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 8), cold = q;
    cold.nadapters = 1;
    cold.adapters[0] = rig_adapter(base, 4, 1);
    struct gen *slow = rig_submit(&r, &cold);
    for (int i = 0; i < 3; i++) {
        struct result got = rig_run(&r, &q);
        assert_int_equal(got.n, 8);
        result_free(&got);
    }
    struct gen_usage u;
    gen_usage(slow, &u);
    assert_int_equal(u.completion_tokens, 0);
    r.gated = false;
    sem_post(&r.gate);
    struct result got = rig_finish(slow);
    assert_int_equal(got.n, 8);
    assert_true(got.usage.queued > 0 && got.usage.first_token >= got.usage.queued &&
                got.usage.total >= got.usage.first_token);
    result_free(&got);
    rig_close(&r);
}

/* Holds the engine thread at a token until it is let go. */
struct hold {
    sem_t held, go;
    bool once;
};

static void on_hold(void *ud)
{
    struct hold *h = ud;
    if (h->once)
        return;
    h->once = true;
    sem_post(&h->held);
    while (sem_wait(&h->go) != 0)
        ;
}

static void a_cold_adapter_is_read_while_a_step_is_under_way(void **state)
{
    (void)state;
    struct rig r;
    struct hold h = { .once = false };
    int32_t t[20];
    struct adapter_cache_stats st;
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    sem_init(&h.held, 0, 0);
    sem_init(&h.go, 0, 0);
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 8), cold = q;
    q.wake = on_hold;
    q.wake_ud = &h;
    cold.nadapters = 1;
    cold.adapters[0] = rig_adapter(base, 4, 1);
    struct gen *first = rig_submit(&r, &q);
    while (sem_wait(&h.held) != 0)
        ;
    struct gen *other = rig_submit(&r, &cold);
    do { /* for ever, if the engine thread were needed */
        usleep(1000);
        adapter_cache_stats(r.cache, &st);
    } while (st.loads == 0);
    assert_int_equal(st.misses, 1);
    assert_int_equal(st.pinned, 0);
    sem_post(&h.go);
    struct result got[2] = { rig_finish(first), rig_finish(other) };
    for (int i = 0; i < 2; i++) {
        assert_int_equal(got[i].n, 8);
        result_free(&got[i]);
    }
    adapter_cache_stats(r.cache, &st);
    assert_int_equal(st.loads, 1);
    assert_int_equal(st.misses, 1);
    assert_int_equal(st.hits, 0);
    rig_close(&r);
}

static void a_failed_load_ends_its_requests_with_its_reason(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    r.broken = 4;
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 8);
    q.nadapters = 1;
    q.adapters[0] = rig_adapter(base, 4, 1);
    struct gen *g[3];
    for (int i = 0; i < 3; i++)
        g[i] = rig_submit(&r, &q);
    for (int i = 0; i < 3; i++) {
        struct result got = rig_finish(g[i]);
        assert_int_equal(got.finish, GEN_ERROR);
        assert_int_equal(got.err.code, ERR_IO);
        assert_string_equal(got.err.msg, "version 4 is unreadable");
        result_free(&got);
    }
    r.broken = -1;
    struct result got = rig_run(&r, &q);
    assert_int_equal(got.finish, GEN_LENGTH);
    result_free(&got);
    rig_close(&r);
}

/* Every request wants two adapters, and the cache holds two: whoever has one of its two and waits
 * for the other must not keep everybody from going on. */
static void requests_that_compete_for_adapters_all_finish(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    size_t largest = 0;
    struct gen_adapter a[8];
    for (int i = 0; i < 8; i++) {
        a[i] = rig_adapter(base, 23 * i, 1); /* all of rank 1, some in fp32 */
        largest = a[i].bytes > largest ? a[i].bytes : largest;
    }
    rig_open(&r, base, 2, best, PREC_FAST, 2 * largest,
             (struct sched_opts){ .kv_bytes = rig_pages(base, 64) });
    count_up(t, 20);
    struct gen *g[24];
    for (int i = 0; i < 24; i++) {
        struct gen_request q = rig_request(t, 5 + i % 7, 6);
        q.nadapters = 2;
        q.adapters[0] = a[i % 8];
        q.adapters[1] = a[(i * 3 + 1) % 8];
        if (i % 8 == (i * 3 + 1) % 8)
            q.nadapters = 1;
        g[i] = rig_submit(&r, &q);
    }
    for (int i = 0; i < 24; i++) {
        struct result got = rig_finish(g[i]);
        if (got.finish == GEN_ERROR)
            fail_msg("request %d: %s", i, got.err.msg);
        result_free(&got);
    }
    struct adapter_cache_stats st;
    adapter_cache_stats(r.cache, &st);
    assert_true(st.evictions > 0 && st.bytes <= st.budget);
    assert_int_equal(st.pinned, 0);
    rig_close(&r);
}

static void a_full_queue_is_busy(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_seqs = 1, .max_queue = 2 });
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 400);
    q.ignore_eos = true;
    struct gen *g[3], *more;
    g[0] = rig_submit(&r, &q);
    gen_wait(g[0], 0); /* running now */
    g[1] = rig_submit(&r, &q);
    g[2] = rig_submit(&r, &q);
    struct err err = { 0 };
    assert_int_equal(sched_submit(r.sched, &q, &more, &err), ERR_BUSY);
    assert_string_equal(err.slug, "queue_full");
    gen_cancel(g[1]); /* one that waits */
    struct result got = rig_finish(g[1]);
    assert_int_equal(got.finish, GEN_CANCELLED);
    assert_int_equal(got.n, 0);
    result_free(&got);
    g[1] = rig_submit(&r, &q); /* its place is free */
    struct sched_stats st;
    sched_stats(r.sched, &st);
    assert_int_equal(st.rejected, 1);
    assert_int_equal(st.running, 1);
    assert_int_equal(st.waiting, 2);
    for (int i = 0; i < 3; i++)
        gen_release(g[i]);
    rig_close(&r);
}

static void a_request_that_can_never_fit_is_refused(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[600];
    open_rig(&r, (struct sched_opts){ .kv_bytes = rig_pages(base, 6) });
    assert_int_equal(sched_max_context(r.sched), 96); /* of the model's 512 */
    count_up(t, 600);
    struct gen *g;
    struct err err = { 0 };
    struct gen_request q = rig_request(t, 96, 1);
    assert_int_equal(sched_submit(r.sched, &q, &g, &err), ERR_INVALID);
    assert_string_equal(err.slug, "context_length_exceeded");
    assert_non_null(strstr(err.msg, "96 tokens, but the context holds 96"));
    q.nprompt = 90;
    q.max_tokens = 1000;
    q.ignore_eos = true;
    struct result got = rig_run(&r, &q); /* cut to what the context leaves */
    assert_int_equal(got.n, 6);
    assert_int_equal(got.finish, GEN_LENGTH);
    result_free(&got);

    q.nadapters = 1;
    q.adapters[0] = rig_adapter(base, 4, 1);
    q.adapters[0].bytes = (size_t)65 << 20;
    err_clear(&err);
    assert_int_equal(sched_submit(r.sched, &q, &g, &err), ERR_INVALID);
    assert_string_equal(err.slug, "adapter_too_large");
    rig_close(&r);
}

static void bad_requests_are_refused_by_field(void **state)
{
    (void)state;
    struct rig r;
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    static const int32_t good[3] = { 5, 6, 7 }, high[2] = { 5, 320 }, low[1] = { -1 };
    static char long_stop[GEN_STOP_LEN + 2];
    memset(long_stop, 'x', GEN_STOP_LEN + 1);
    const struct gen_request ok = rig_request(good, 3, 4);
    struct { const char *param; struct gen_request q; } cases[10];
    int n = 0;
#define BAD(name, set) (cases[n].param = name, cases[n].q = ok, cases[n++].q.set)
    BAD("prompt", nprompt = 0);
    BAD("prompt", prompt = high), cases[n - 1].q.nprompt = 2;
    BAD("prompt", prompt = low), cases[n - 1].q.nprompt = 1;
    BAD("max_tokens", max_tokens = 0);
    BAD("stop", nstop = GEN_STOP_MAX + 1);
    BAD("stop", nstop = 1), cases[n - 1].q.stop[0] = "";
    BAD("stop", nstop = 1), cases[n - 1].q.stop[0] = long_stop;
    BAD("adapters", nadapters = 9);
    BAD("adapters", nadapters = 1), cases[n - 1].q.adapters[0].weight = NAN;
    BAD("temperature", sample.temperature = -1);
    for (int i = 0; i < n; i++) {
        struct gen *g;
        struct err err = { 0 };
        assert_int_equal(sched_submit(r.sched, &cases[i].q, &g, &err), ERR_INVALID);
        assert_string_equal(err.param, cases[i].param);
    }
    rig_close(&r);
}

/* --- endings ------------------------------------------------------------------------------- */
static void a_cancelled_generation_frees_its_pages_within_two_steps(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 480);
    q.ignore_eos = true;
    struct sched_stats before, after;
    struct gen *g = rig_submit(&r, &q);
    gen_wait(g, 3);
    gen_cancel(g);
    sched_stats(r.sched, &before);
    struct result got = rig_finish(g);
    sched_stats(r.sched, &after);
    assert_int_equal(got.finish, GEN_CANCELLED);
    assert_true(got.n >= 4 && got.n < 480);
    assert_true(after.steps <= before.steps + 2);
    assert_int_equal(after.kv.used, 0);
    assert_int_equal(after.running, 0);
    assert_int_equal(after.cancelled, 1);
    result_free(&got);
    rig_close(&r);
}

static void a_deadline_ends_what_runs_and_what_waits(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 480);
    q.deadline = now_mono() - 1;
    struct result got = rig_run(&r, &q);
    assert_int_equal(got.finish, GEN_DEADLINE);
    result_free(&got);
    r.gated = true; /* waits for an adapter that does not come, and nothing else happens */
    q.nadapters = 1;
    q.adapters[0] = rig_adapter(base, 4, 1);
    q.deadline = now_mono() + 0.05;
    got = rig_run(&r, &q);
    assert_int_equal(got.finish, GEN_DEADLINE);
    assert_int_equal(got.n, 0);
    result_free(&got);
    r.gated = false;
    sem_post(&r.gate);
    rig_close(&r);
}

static void draining_lets_work_finish_and_takes_no_more(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_seqs = 2 });
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 10);
    q.ignore_eos = true;
    struct gen *g[4], *more;
    for (int i = 0; i < 4; i++)
        g[i] = rig_submit(&r, &q);
    sched_drain(r.sched, 600);
    for (int i = 0; i < 4; i++) {
        struct result got = rig_finish(g[i]);
        assert_int_equal(got.finish, GEN_LENGTH);
        assert_int_equal(got.n, 10);
        result_free(&got);
    }
    struct err err = { 0 };
    assert_int_equal(sched_submit(r.sched, &q, &more, &err), ERR_UNAVAILABLE);
    rig_close(&r);
}

static uint64_t times(const struct histogram_stats *h)
{
    uint64_t n = 0;
    for (int i = 0; i <= HISTOGRAM_BOUNDS; i++)
        n += h->bucket[i];
    return n;
}

static void steps_and_gaps_between_tokens_are_timed(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .kv_bytes = rig_pages(base, 12) }); /* too few for three */
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 100);
    q.ignore_eos = true;
    struct gen *g[3];
    for (int i = 0; i < 3; i++)
        g[i] = rig_submit(&r, &q);
    for (int i = 0; i < 3; i++) {
        struct result got = rig_finish(g[i]);
        result_free(&got);
    }
    struct sched_stats st;
    sched_drain(r.sched, 60);
    sched_stats(r.sched, &st);
    assert_int_equal(times(&st.step), st.steps);
    assert_true(times(&st.between) > 0 && times(&st.between) < st.steps);
    assert_int_equal(times(&st.gap), 3 * 99);
    assert_true(st.preempted > 0); /* twice before a token, or before the first, is no gap more */
    assert_true(times(&st.running_gap) < 3 * 99);
    assert_true(times(&st.running_gap) >= 3 * 99 - st.preempted);
    assert_true(st.step.max > 0 && st.step.sum >= st.step.max);
    assert_true(st.decode_step_max > 0 && st.decode_step_max <= st.step.max + 1e-8);
    assert_true(st.running_gap.max <= st.gap.max && st.gap.sum >= st.running_gap.sum);
    rig_close(&r);
}

static void draining_without_time_cancels(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_seqs = 2 });
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 490);
    q.ignore_eos = true;
    struct gen *g[4];
    for (int i = 0; i < 4; i++)
        g[i] = rig_submit(&r, &q);
    gen_wait(g[0], 0);
    sched_drain(r.sched, 0);
    struct sched_stats st;
    sched_stats(r.sched, &st);
    assert_int_equal(st.running + st.waiting, 0);
    assert_int_equal(st.cancelled, 4);
    for (int i = 0; i < 4; i++) {
        struct result got = rig_finish(g[i]);
        assert_int_equal(got.finish, GEN_CANCELLED);
        result_free(&got);
    }
    rig_close(&r);
}

static void a_generation_outlives_its_scheduler(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 490);
    q.ignore_eos = true;
    struct gen *g = rig_submit(&r, &q);
    gen_wait(g, 1);
    rig_close(&r);
    gen_cancel(g);
    struct result got = rig_finish(g);
    assert_int_equal(got.finish, GEN_CANCELLED);
    assert_true(got.n >= 2);
    result_free(&got);
}

/* An adapter so large that its output is infinite ruins its own request only. */
static void numbers_that_overflow_end_one_request_with_an_error(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    count_up(t, 20);
    struct gen_request q = rig_request(t, 20, 30), bad = q;
    q.ignore_eos = true;
    struct result want = rig_run(&r, &q);
    struct adapter *a = support_lora(&base->arch, METHOD_LORA, 4, 1e30f, 3);
    bad.nadapters = 1;
    bad.adapters[0] = (struct gen_adapter){ .resident = a, .weight = 1e30f };
    struct gen *good = rig_submit(&r, &q), *sick = rig_submit(&r, &bad);
    struct result got = rig_finish(sick);
    assert_int_equal(got.finish, GEN_ERROR);
    assert_non_null(strstr(got.err.msg, "not a number"));
    result_free(&got);
    got = rig_finish(good);
    assert_true(result_equal(&got, &want));
    result_free(&got), result_free(&want);
    rig_close(&r);
    adapter_free(a);
}

/* --- waking -------------------------------------------------------------------------------- */
struct waker {
    _Atomic int calls;
    _Atomic bool released;
};

static void on_wake(void *ud)
{
    struct waker *w = ud;
    if (w->released)
        abort();
    w->calls++;
}

static void there_is_a_wake_for_every_token_and_none_after_release(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[20];
    open_rig(&r, (struct sched_opts){ .max_queue = 0 });
    count_up(t, 20);
    struct waker w[4] = { { 0 } };
    struct gen_request q = rig_request(t, 20, 40);
    q.ignore_eos = true;
    q.wake = on_wake;
    struct gen *g[4];
    for (int i = 0; i < 4; i++) {
        q.wake_ud = &w[i];
        g[i] = rig_submit(&r, &q);
    }
    for (int i = 1; i < 4; i++) {
        gen_wait(g[i], (size_t)i * 3);
        gen_release(g[i]);
        w[i].released = true;
    }
    struct gen_token token[64];
    enum gen_finish f;
    while (gen_read(g[0], 0, token, 64, 0, NULL, &f), f == GEN_RUNNING)
        gen_wait(g[0], 39);
    sched_drain(r.sched, 600); /* the last wake follows the last token */
    assert_int_equal(w[0].calls, 40);
    gen_release(g[0]);
    rig_close(&r);
}

/* --- long prompts beside running sequences ------------------------------------------------------ */
struct rows_watch {
    struct rig *r;
    uint64_t last, most;
    int chunks; /* steps that had a whole chunk */
};

enum { CHUNK = 24 };

/* Rows since the sequence's last token, on the engine thread. */
static void on_rows(void *ud)
{
    struct rows_watch *w = ud;
    struct sched_stats st;
    sched_stats(w->r->sched, &st);
    const uint64_t rows = st.rows - w->last;
    if (w->last > 0 && rows > w->most)
        w->most = rows;
    w->chunks += w->last > 0 && rows == CHUNK + 1;
    w->last = st.rows;
}

static void a_long_prompt_delays_a_running_sequence_by_one_chunk_at_most(void **state)
{
    (void)state;
    struct rig r;
    int32_t t[400];
    open_rig(&r, (struct sched_opts){ .chunk_tokens = CHUNK });
    struct rows_watch w = { .r = &r };
    count_up(t, 400);
    struct gen_request q = rig_request(t, 4, 490), p = rig_request(t + 7, 390, 1);
    q.ignore_eos = true;
    q.wake = on_rows;
    q.wake_ud = &w;
    struct gen *g = rig_submit(&r, &q);
    gen_wait(g, 2);
    struct result got = rig_run(&r, &p);
    assert_int_equal(got.n, 1);
    result_free(&got);
    gen_cancel(g);
    got = rig_finish(g);
    assert_int_equal(w.most, CHUNK + 1);
    assert_int_equal(w.chunks, 390 / CHUNK);
    result_free(&got);

    struct sched_stats before, after; /* alone: in one step */
    p.prompt = t + 9;
    sched_stats(r.sched, &before);
    got = rig_run(&r, &p);
    sched_stats(r.sched, &after);
    assert_int_equal(after.steps - before.steps, 1);
    result_free(&got);
    rig_close(&r);
}

/* Many threads submit, read, cancel and let go at once. */
struct client {
    struct rig *r;
    int id;
};

static void *client_main(void *ud)
{
    const struct client *c = ud;
    int32_t t[40];
    for (int i = 0; i < 12; i++) {
        for (int k = 0; k < 40; k++)
            t[k] = 3 + (k * (c->id + 1) + i) % 300;
        struct gen_request q = rig_request(t, 4 + (i * 5 + c->id) % 36, 12);
        q.nadapters = i % 3 == 0;
        if (q.nadapters)
            q.adapters[0] = rig_adapter(c->r->base, (c->id + i) % 5, 1);
        struct gen *g;
        if (sched_submit(c->r->sched, &q, &g, NULL) != ERR_OK)
            continue;
        if (i % 4 == 1)
            gen_wait(g, 2);
        if (i % 4 < 2) {
            gen_release(g);
            continue;
        }
        struct result got = rig_finish(g);
        result_free(&got);
    }
    return NULL;
}

static void many_clients_leave_nothing_behind(void **state)
{
    (void)state;
    struct rig r;
    open_rig(&r, (struct sched_opts){ .max_seqs = 6, .max_queue = 8, .step_tokens = 50,
                                      .kv_bytes = rig_pages(base, 12) });
    pthread_t t[4];
    struct client c[4];
    for (int i = 0; i < 4; i++) {
        c[i] = (struct client){ &r, i };
        assert_int_equal(pthread_create(&t[i], NULL, client_main, &c[i]), 0);
    }
    for (int i = 0; i < 20; i++) {
        struct sched_stats st;
        sched_stats(r.sched, &st);
        assert_true(st.kv.used <= st.kv.pages && st.running <= 6);
        if (i % 5 == 0)
            sched_preempt_one(r.sched);
        usleep(2000);
    }
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    sched_drain(r.sched, 600);
    struct sched_stats st;
    sched_stats(r.sched, &st);
    assert_int_equal(st.running + st.waiting + st.kv.used, 0);
    assert_int_equal(st.finished + st.cancelled + st.rejected, 4 * 12);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(twenty_at_once_get_the_same_bits_as_each_alone),
        cmocka_unit_test(with_keys_of_8_bits_it_is_the_same),
        cmocka_unit_test(a_shared_prefix_is_counted_and_changes_no_bit),
        cmocka_unit_test(other_tenants_adapters_or_weights_share_nothing),
        cmocka_unit_test(the_order_of_combined_adapters_does_not_matter),
        cmocka_unit_test(a_cold_adapter_is_waited_for_by_nobody_else),
        cmocka_unit_test(a_cold_adapter_is_read_while_a_step_is_under_way),
        cmocka_unit_test(a_failed_load_ends_its_requests_with_its_reason),
        cmocka_unit_test(requests_that_compete_for_adapters_all_finish),
        cmocka_unit_test(a_full_queue_is_busy),
        cmocka_unit_test(a_request_that_can_never_fit_is_refused),
        cmocka_unit_test(bad_requests_are_refused_by_field),
        cmocka_unit_test(a_cancelled_generation_frees_its_pages_within_two_steps),
        cmocka_unit_test(a_deadline_ends_what_runs_and_what_waits),
        cmocka_unit_test(draining_lets_work_finish_and_takes_no_more),
        cmocka_unit_test(steps_and_gaps_between_tokens_are_timed),
        cmocka_unit_test(draining_without_time_cancels),
        cmocka_unit_test(a_generation_outlives_its_scheduler),
        cmocka_unit_test(numbers_that_overflow_end_one_request_with_an_error),
        cmocka_unit_test(there_is_a_wake_for_every_token_and_none_after_release),
        cmocka_unit_test(a_long_prompt_delays_a_running_sequence_by_one_chunk_at_most),
        cmocka_unit_test(many_clients_leave_nothing_behind),
    };
    return cmocka_run_group_tests(tests, make_base, free_base);
}
