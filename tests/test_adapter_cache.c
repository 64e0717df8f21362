/* test_adapter_cache.c - the byte budget holds, what is in use stays, the least recently used
 * goes, failures are told to everybody who waited. */
#include "engine/adapter_cache.h"
#include "tests/support_lora.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static const struct arch shape = { .family = "llama", .L = 2, .D = 64, .H = 2, .G = 2, .hd = 32,
                                   .F = 64, .V = 64, .max_positions = 64 };
enum { KINDS = 12 };
static uint8_t hash[KINDS][32];
static size_t size_of[KINDS]; /* all the same: rank 4, F32 */

/* A source of adapters: version i is adapter i.  The test decides when a load may finish. */
struct source {
    sem_t go, ready;
    bool gated;
    _Atomic int loads, fail; /* fail: version that cannot be loaded, or -1 */
    int64_t spare; /* version whose memory was offered to the last load, or -1 */
    int64_t order[64];
};

static int load(void *ud, int64_t version, struct adapter **spare, struct adapter **ret, struct err *err)
{
    struct source *s = ud;
    s->order[s->loads++ % 64] = version;
    s->spare = *spare != NULL ? (*spare)->version_id : -1;
    if (s->gated)
        while (sem_wait(&s->go) != 0 && errno == EINTR)
            ;
    if (version == s->fail)
        return err_set(err, ERR_IO, "version %d is unreadable", (int)version);
    *ret = support_lora(&shape, METHOD_LORA, 4, 1, 3 * (uint64_t)version);
    return ERR_OK;
}

static void on_ready(void *ud) { sem_post(&((struct source *)ud)->ready); }

static void wait_ready(struct source *s)
{
    while (sem_wait(&s->ready) != 0 && errno == EINTR)
        ;
}

static struct adapter_cache *make(struct source *s, size_t budget, bool gated)
{
    struct adapter_cache *c;
    memset(s, 0, sizeof *s);
    sem_init(&s->go, 0, 0);
    sem_init(&s->ready, 0, 0);
    s->gated = gated;
    s->fail = -1;
    assert_int_equal(adapter_cache_create(budget, load, s, &c, NULL), ERR_OK);
    adapter_cache_on_ready(c, on_ready, s);
    return c;
}

static enum adapter_state ask(struct adapter_cache *c, int i, uint64_t *ticket,
                              const struct adapter **ret)
{
    return adapter_cache_acquire(c, hash[i], i, size_of[i], ticket, ret, NULL);
}

/* Load and pin, waiting for it. */
static const struct adapter *get(struct adapter_cache *c, struct source *s, int i)
{
    const struct adapter *a;
    uint64_t ticket = 0;
    while (ask(c, i, &ticket, &a) != ADAPTER_READY)
        wait_ready(s);
    assert_int_equal(ticket, 0);
    assert_memory_equal(a->hash, hash[i], 32);
    return a;
}

static bool resident(struct adapter_cache *c, int i)
{
    const struct adapter *a;
    uint64_t ticket = 0;
    bool yes = ask(c, i, &ticket, &a) == ADAPTER_READY;
    if (yes)
        adapter_cache_release(c, a);
    else
        adapter_cache_abandon(c, hash[i], &ticket);
    return yes;
}

static int make_kinds(void **state)
{
    (void)state;
    for (int i = 0; i < KINDS; i++) {
        struct adapter *a = support_lora(&shape, METHOD_LORA, 4, 1, 3 * (uint64_t)i);
        memcpy(hash[i], a->hash, 32);
        size_of[i] = a->bytes;
        assert_int_equal(size_of[i], size_of[0]);
        adapter_free(a);
    }
    return 0;
}

static void a_miss_loads_once_and_a_hit_loads_nothing(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, 10 * size_of[0], false);
    const struct adapter *a = get(c, &s, 1), *b = get(c, &s, 1);
    assert_ptr_equal(a, b);
    assert_int_equal(s.loads, 1);
    struct adapter_cache_stats st;
    adapter_cache_stats(c, &st);
    assert_int_equal(st.resident, 1);
    assert_int_equal(st.pinned, 1);
    assert_int_equal(st.bytes, size_of[0]);
    assert_int_equal(st.hits, 1);
    assert_int_equal(st.misses, 1);
    adapter_cache_release(c, a);
    adapter_cache_release(c, b);
    adapter_cache_stats(c, &st);
    assert_int_equal(st.pinned, 0);
    assert_int_equal(st.resident, 1);
    adapter_cache_destroy(c);
}

static void expect(struct adapter_cache *c, int i) { adapter_cache_expect(c, hash[i], i, size_of[i]); }

static void what_is_expected_is_read_before_anybody_asks_and_stands_in_nobodys_way(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache_stats st;
    struct adapter_cache *c = make(&s, 2 * size_of[0], true);
    expect(c, 1);
    expect(c, 1);
    sem_post(&s.go);
    wait_ready(&s);
    const struct adapter *a = get(c, &s, 1);
    adapter_cache_stats(c, &st);
    assert_int_equal(st.loads, 1);
    assert_int_equal(st.misses, 1);
    assert_int_equal(st.hits, 0);

    /* asked for while it is being read; another is expected meanwhile, and a third is not: one waits */
    uint64_t ticket = 0, none = 0;
    const struct adapter *b;
    expect(c, 2);
    assert_int_equal(ask(c, 2, &ticket, &b), ADAPTER_LOADING);
    while (s.loads < 2)
        usleep(1000);
    assert_int_equal(ask(c, 3, &none, &b), ADAPTER_NO_ROOM);
    expect(c, 4);
    sem_post(&s.go);
    wait_ready(&s);
    assert_int_equal(ask(c, 2, &ticket, &b), ADAPTER_READY);
    /* 1 and 2 are in use: no room for 3, nor for what is expected */
    adapter_cache_abandon(c, hash[3], &none);
    expect(c, 4);
    adapter_cache_stats(c, &st);
    assert_int_equal(st.loading, 0);
    assert_int_equal(st.misses, 3);
    assert_int_equal(s.loads, 2);

    /* a failure is nobody's; who asks then is told */
    adapter_cache_release(c, b);
    s.fail = 4;
    expect(c, 4);
    sem_post(&s.go);
    wait_ready(&s);
    adapter_cache_stats(c, &st);
    assert_int_equal(st.failures, 1);
    assert_int_equal(st.loading, 0);
    assert_int_equal(ask(c, 4, &none, &b), ADAPTER_LOADING);
    sem_post(&s.go);
    wait_ready(&s);
    assert_int_equal(ask(c, 4, &none, &b), ADAPTER_FAILED);
    adapter_cache_release(c, a);
    adapter_cache_destroy(c);
}

static void what_is_expected_and_does_not_fit_is_given_up(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache_stats st;
    struct adapter_cache *c = make(&s, 2 * size_of[0], false);
    uint64_t ticket = 0;
    const struct adapter *a, *b = get(c, &s, 0);
    adapter_cache_release(c, b);
    s.gated = true;
    assert_int_equal(ask(c, 1, &ticket, &a), ADAPTER_LOADING);
    while (s.loads < 2)
        usleep(1000);
    expect(c, 2); /* in the place of 0, which nobody uses */
    adapter_cache_stats(c, &st);
    assert_int_equal(st.loading, 2);
    b = get(c, &s, 0); /* but now somebody does */
    sem_post(&s.go);
    wait_ready(&s);
    do {
        usleep(1000);
        adapter_cache_stats(c, &st);
    } while (st.loading > 0);
    assert_int_equal(s.loads, 2);
    assert_int_equal(st.resident, 2);
    assert_int_equal(ask(c, 1, &ticket, &a), ADAPTER_READY);
    adapter_cache_release(c, a);
    adapter_cache_release(c, b);
    adapter_cache_destroy(c);
}

static void the_least_recently_used_leaves_and_the_pinned_stays(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, 3 * size_of[0] + 7, false);
    const struct adapter *pinned = get(c, &s, 0);
    for (int i = 1; i <= 2; i++)
        adapter_cache_release(c, get(c, &s, i));
    assert_true(resident(c, 1)); /* and so used later than 2 */
    assert_int_equal(s.spare, -1);
    adapter_cache_release(c, get(c, &s, 3));
    assert_int_equal(s.spare, 3 * 2); /* the memory of 2, whose place it takes */
    struct adapter_cache_stats st;
    adapter_cache_stats(c, &st);
    assert_int_equal(st.evictions, 1);
    assert_int_equal(st.bytes, 3 * size_of[0]);
    assert_true(resident(c, 0) && resident(c, 1) && resident(c, 3));
    adapter_cache_release(c, pinned);
    adapter_cache_destroy(c);
}

static void a_load_waits_while_everything_is_pinned(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, 2 * size_of[0], false);
    const struct adapter *a = get(c, &s, 0), *b = get(c, &s, 1), *d;
    uint64_t ticket = 0;
    for (int i = 0; i < 3; i++)
        assert_int_equal(ask(c, 2, &ticket, &d), ADAPTER_NO_ROOM);
    assert_int_not_equal(ticket, 0);
    assert_int_equal(s.loads, 2);
    adapter_cache_release(c, a);
    wait_ready(&s);
    assert_int_equal(ask(c, 2, &ticket, &d), ADAPTER_READY);
    assert_false(resident(c, 0));
    adapter_cache_release(c, b);
    adapter_cache_release(c, d);
    adapter_cache_destroy(c);
}

static void what_was_loaded_for_a_ticket_waits_for_its_holder(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, 1 * size_of[0], false);
    const struct adapter *a;
    uint64_t first = 0, second = 0;
    assert_int_equal(ask(c, 0, &first, &a), ADAPTER_LOADING);
    wait_ready(&s);
    assert_int_equal(ask(c, 1, &second, &a), ADAPTER_NO_ROOM);
    assert_int_equal(ask(c, 0, &first, &a), ADAPTER_READY);
    adapter_cache_release(c, a);
    wait_ready(&s);
    assert_int_equal(ask(c, 1, &second, &a), ADAPTER_READY);
    adapter_cache_release(c, a);
    adapter_cache_destroy(c);
}

static void an_abandoned_load_makes_way_for_the_next(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, 2 * size_of[0], false);
    const struct adapter *a = get(c, &s, 0), *b;
    uint64_t big = 0, small = 0;
    /* a large one at the head of the queue is not overtaken */
    assert_int_equal(adapter_cache_acquire(c, hash[1], 1, 2 * size_of[1], &big, &b, NULL),
                     ADAPTER_NO_ROOM);
    assert_int_equal(ask(c, 2, &small, &b), ADAPTER_NO_ROOM);
    adapter_cache_abandon(c, hash[1], &big);
    assert_int_equal(big, 0);
    wait_ready(&s);
    assert_int_equal(ask(c, 2, &small, &b), ADAPTER_READY);
    adapter_cache_release(c, a);
    adapter_cache_release(c, b);

    s.gated = true; /* abandoned while it is being read: kept, but evictable */
    assert_int_equal(ask(c, 3, &small, &b), ADAPTER_LOADING);
    while (s.loads < 3)
        sched_yield();
    adapter_cache_abandon(c, hash[3], &small);
    sem_post(&s.go);
    wait_ready(&s);
    assert_true(resident(c, 3));
    adapter_cache_destroy(c);
}

static void an_adapter_larger_than_the_budget_is_refused_with_both_sizes(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, 3 << 20, false);
    const struct adapter *a;
    struct err err = { 0 };
    uint64_t ticket = 0;
    assert_int_equal(adapter_cache_acquire(c, hash[0], 0, 5 << 20, &ticket, &a, &err),
                     ADAPTER_FAILED);
    assert_int_equal(ticket, 0);
    assert_int_equal(err.code, ERR_INVALID);
    assert_non_null(strstr(err.msg, "5.0 MiB"));
    assert_non_null(strstr(err.msg, "3.0 MiB"));
    assert_int_equal(s.loads, 0);
    adapter_cache_destroy(c);
}

static void a_failure_reaches_every_waiter_and_the_next_try_is_new(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, 4 * size_of[0], true);
    s.fail = 5;
    const struct adapter *a;
    uint64_t t[3] = { 0 }, fresh = 0;
    for (int i = 0; i < 3; i++)
        assert_int_equal(ask(c, 5, &t[i], &a), ADAPTER_LOADING);
    sem_post(&s.go);
    wait_ready(&s);
    s.fail = -1;
    assert_int_equal(ask(c, 5, &fresh, &a), ADAPTER_LOADING); /* a new load */
    for (int i = 0; i < 2; i++) {
        struct err err = { 0 };
        assert_int_equal(adapter_cache_acquire(c, hash[5], 5, size_of[5], &t[i], &a, &err),
                         ADAPTER_FAILED);
        assert_int_equal(err.code, ERR_IO);
        assert_string_equal(err.msg, "version 5 is unreadable");
        assert_int_equal(t[i], 0);
    }
    adapter_cache_abandon(c, hash[5], &t[2]);
    sem_post(&s.go);
    wait_ready(&s);
    assert_int_equal(ask(c, 5, &fresh, &a), ADAPTER_READY);
    adapter_cache_release(c, a);
    struct adapter_cache_stats st;
    adapter_cache_stats(c, &st);
    assert_int_equal(st.failures, 1);
    assert_int_equal(st.loads, 1);
    assert_int_equal(s.loads, 2);
    adapter_cache_destroy(c);
}

static void other_content_than_asked_for_is_a_failure(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, 4 * size_of[0], false);
    const struct adapter *a;
    struct err err = { 0 };
    uint64_t ticket = 0;
    while (adapter_cache_acquire(c, hash[1], 2, size_of[1], &ticket, &a, &err) == ADAPTER_LOADING)
        wait_ready(&s);
    assert_int_equal(err.code, ERR_INTERNAL);
    adapter_cache_destroy(c);
}

/* The size that is announced is about right, on either side. */
static void memory_of_about_the_announced_size_is_offered(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        struct source s;
        struct adapter_cache *c = make(&s, size_of[0] + 1000, false);
        adapter_cache_release(c, get(c, &s, 0));
        const size_t announced = i == 0 ? size_of[1] - 1000 : i == 1 ? size_of[1] + 1000 : 0;
        uint64_t ticket = 0;
        const struct adapter *a;
        while (adapter_cache_acquire(c, hash[1], 1, announced, &ticket, &a, NULL) != ADAPTER_READY)
            wait_ready(&s);
        assert_int_equal(s.spare, i < 2 ? 0 : -1); /* room for nothing is there: nothing goes for it */
        adapter_cache_release(c, a);
        adapter_cache_destroy(c);
    }
}

/* What has gone for it is gone, but not lost: sanitizers would see it. */
static void the_memory_offered_to_a_load_that_fails_is_given_back(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, size_of[0], false);
    adapter_cache_release(c, get(c, &s, 0));
    s.fail = 1;
    uint64_t ticket = 0;
    const struct adapter *a;
    enum adapter_state got;
    while ((got = ask(c, 1, &ticket, &a)) == ADAPTER_LOADING)
        wait_ready(&s);
    assert_int_equal(got, ADAPTER_FAILED);
    assert_int_equal(s.spare, 0);
    struct adapter_cache_stats st;
    adapter_cache_stats(c, &st);
    assert_int_equal(st.bytes, 0);
    adapter_cache_destroy(c);
}

static void a_wrong_size_is_corrected_without_passing_the_budget(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, 2 * size_of[0], false);
    struct adapter_cache_stats st;
    const struct adapter *pinned = get(c, &s, 0), *a;
    adapter_cache_release(c, get(c, &s, 1));
    uint64_t ticket = 0; /* says it needs nothing: the idle one has to go in the end */
    while (adapter_cache_acquire(c, hash[2], 2, 0, &ticket, &a, NULL) != ADAPTER_READY)
        wait_ready(&s);
    adapter_cache_stats(c, &st);
    assert_int_equal(st.bytes, 2 * size_of[0]);
    assert_int_equal(st.evictions, 1);
    const struct adapter *b; /* now everything is pinned: it waits for room with its true size */
    enum adapter_state got;
    while ((got = adapter_cache_acquire(c, hash[3], 3, 0, &ticket, &b, NULL)) == ADAPTER_LOADING)
        wait_ready(&s);
    assert_int_equal(got, ADAPTER_NO_ROOM);
    adapter_cache_stats(c, &st);
    assert_int_equal(st.bytes, 2 * size_of[0]);
    assert_int_equal(st.failures, 0);
    adapter_cache_release(c, a);
    while (adapter_cache_acquire(c, hash[3], 3, 0, &ticket, &b, NULL) != ADAPTER_READY)
        wait_ready(&s);
    adapter_cache_stats(c, &st);
    assert_int_equal(st.bytes, 2 * size_of[0]);
    adapter_cache_release(c, pinned);
    adapter_cache_release(c, b);
    adapter_cache_destroy(c);
}

/* Several threads take and give back at random; the budget is watched all the while. */
struct crowd {
    struct adapter_cache *c;
    unsigned seed;
    _Atomic bool *stop;
};

static void *mill(void *ud)
{
    struct crowd *w = ud;
    unsigned r = w->seed;
    for (int round = 0; round < 300; round++) {
        r = r * 1664525u + 1013904223u;
        int i = (int)(r >> 16) % KINDS;
        const struct adapter *a;
        uint64_t ticket = 0;
        bool patient = r >> 28 != 0;
        enum adapter_state st;
        while ((st = ask(w->c, i, &ticket, &a)) != ADAPTER_READY && patient) {
            if (st == ADAPTER_FAILED)
                ticket = 0;
            sched_yield();
        }
        if (st != ADAPTER_READY) {
            adapter_cache_abandon(w->c, hash[i], &ticket);
            continue;
        }
        if (memcmp(a->hash, hash[i], 32) != 0)
            abort();
        sched_yield();
        adapter_cache_release(w->c, a);
    }
    return NULL;
}

static void *watch(void *ud)
{
    struct crowd *w = ud;
    while (!*w->stop) {
        struct adapter_cache_stats st;
        adapter_cache_stats(w->c, &st);
        if (st.bytes > st.budget || st.pinned > st.resident)
            abort();
        sched_yield();
    }
    return NULL;
}

static void the_budget_holds_under_many_threads(void **state)
{
    (void)state;
    struct source s;
    struct adapter_cache *c = make(&s, 5 * size_of[0], false);
    _Atomic bool stop = false;
    struct crowd w[4];
    pthread_t t[4], watcher;
    for (unsigned i = 0; i < 4; i++) {
        w[i] = (struct crowd){ .c = c, .seed = i + 1, .stop = &stop };
        assert_int_equal(pthread_create(&t[i], NULL, mill, &w[i]), 0);
    }
    assert_int_equal(pthread_create(&watcher, NULL, watch, &w[0]), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    stop = true;
    pthread_join(watcher, NULL);
    struct adapter_cache_stats st;
    adapter_cache_stats(c, &st);
    assert_int_equal(st.pinned, 0);
    assert_true(st.evictions > 0);
    adapter_cache_destroy(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_miss_loads_once_and_a_hit_loads_nothing),
        cmocka_unit_test(what_is_expected_is_read_before_anybody_asks_and_stands_in_nobodys_way),
        cmocka_unit_test(what_is_expected_and_does_not_fit_is_given_up),
        cmocka_unit_test(the_least_recently_used_leaves_and_the_pinned_stays),
        cmocka_unit_test(a_load_waits_while_everything_is_pinned),
        cmocka_unit_test(what_was_loaded_for_a_ticket_waits_for_its_holder),
        cmocka_unit_test(an_abandoned_load_makes_way_for_the_next),
        cmocka_unit_test(an_adapter_larger_than_the_budget_is_refused_with_both_sizes),
        cmocka_unit_test(a_failure_reaches_every_waiter_and_the_next_try_is_new),
        cmocka_unit_test(other_content_than_asked_for_is_a_failure),
        cmocka_unit_test(memory_of_about_the_announced_size_is_offered),
        cmocka_unit_test(the_memory_offered_to_a_load_that_fails_is_given_back),
        cmocka_unit_test(a_wrong_size_is_corrected_without_passing_the_budget),
        cmocka_unit_test(the_budget_holds_under_many_threads),
    };
    return cmocka_run_group_tests(tests, make_kinds, NULL);
}
