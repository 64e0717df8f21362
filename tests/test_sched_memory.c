/* test_sched_memory.c - no memory is taken while sequences are being decoded.
 *
 * This program's own malloc() and friends count and pass on.  Everything is counted, in whatever
 * thread, from the moment all sequences have some tokens until the first has nearly all of its:
 * the only other thread, this test's, sleeps meanwhile. */
#include "tests/support_lora.h"
#include "tests/support_model.h"
#include "tests/support_sched.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__GLIBC__)
enum { COUNTING = 0 }; /* sanitizers have a malloc() of their own */
static _Atomic bool counting;
static _Atomic int calls;
#else
enum { COUNTING = 1 };
static _Atomic bool counting;
static _Atomic int calls;

/* glibc's own, under the names that it exports for this. */
void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t align, size_t n);

static void count(void)
{
    if (atomic_load_explicit(&counting, memory_order_relaxed))
        atomic_fetch_add(&calls, 1);
}

void *malloc(size_t n)
{
    count();
    return __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
    count();
    return __libc_calloc(n, size);
}

void *realloc(void *p, size_t n)
{
    count();
    return __libc_realloc(p, n);
}

void *aligned_alloc(size_t align, size_t n)
{
    count();
    return __libc_memalign(align, n);
}

int posix_memalign(void **ret, size_t align, size_t n)
{
    count();
    *ret = __libc_memalign(align, n);
    return *ret != NULL ? 0 : ENOMEM;
}
#endif

enum { SEQS = 8, TOKENS = 300, FIRST = 4 };

/* Shared by the wakes of all sequences, on the engine thread. */
static struct {
    int n;
    _Atomic(struct gen *) gen[SEQS]; /* NULL: not submitted yet */
    bool held, began, ended;
    sem_t go, done;
} watch;

static void on_wake(void *ud)
{
    (void)ud;
    if (watch.ended) /* they may be gone */
        return;
    while (!watch.held && sem_wait(&watch.go) != 0) /* so that all run side by side */
        continue;
    watch.held = true;
    int least = TOKENS, most = 0;
    for (int i = 0; i < watch.n; i++) {
        struct gen_usage u = { .completion_tokens = 0 };
        if (watch.gen[i] != NULL)
            gen_usage(watch.gen[i], &u);
        least = u.completion_tokens < least ? u.completion_tokens : least;
        most = u.completion_tokens > most ? u.completion_tokens : most;
    }
    if (least >= FIRST && !watch.began) {
        watch.began = true;
        atomic_store(&counting, true);
    }
    if (most >= TOKENS - FIRST) {
        watch.ended = true;
        atomic_store(&counting, false);
        sem_post(&watch.done);
    }
}

static void check(const struct base *base, int nseqs, int lookup)
{
    struct rig r;
    int32_t t[40];
    enum isa isa;
    assert_int_equal(isa_select("auto", &isa, NULL), ERR_OK);
    rig_open(&r, base, 2, isa, PREC_FAST, 64 << 20,
             (struct sched_opts){ .kv_bytes = rig_pages(base, 256), .lookup = lookup });
    static struct sample_bias bias = { 9, 2 };
    memset(&watch, 0, sizeof watch);
    watch.n = nseqs;
    sem_init(&watch.go, 0, 0);
    sem_init(&watch.done, 0, 0);
    atomic_store(&calls, 0);
    for (int i = 0; i <= nseqs; i++) { /* into the cache */
        struct gen_request q = rig_request(t, 1, 1);
        t[0] = 5;
        q.nadapters = 1;
        q.adapters[0] = rig_adapter(base, i, 1);
        struct result got = rig_run(&r, &q);
        result_free(&got);
    }
    for (int i = 0; i < nseqs; i++) {
        for (int k = 0; k < 40; k++)
            t[k] = 3 + (i * 31 + k * 7) % 300;
        struct gen_request q = rig_request(t, 20 + i, TOKENS);
        q.ignore_eos = true;
        q.wake = on_wake;
        q.sample.temperature = i % 2 ? 1 : 0;
        q.sample.top_p = i % 4 == 1 ? 0.9f : 1;
        q.sample.top_k = i % 4 == 3 ? 20 : 0;
        q.sample.repetition_penalty = i % 3 == 1 ? 1.1f : 1;
        q.sample.frequency_penalty = i % 3 == 2 ? 0.1f : 0;
        q.sample.top_logprobs = i % 5 - 1;
        q.sample.bias = &bias;
        q.sample.nbias = i == 6;
        q.nstop = i % 2;
        q.stop[0] = "a text that does not come";
        q.nadapters = i % 3;
        for (int a = 0; a < q.nadapters; a++)
            q.adapters[a] = rig_adapter(base, i + a, 0.5f);
        watch.gen[i] = rig_submit(&r, &q);
    }
    sem_post(&watch.go);
    while (sem_wait(&watch.done) != 0)
        assert_int_equal(errno, EINTR);
    assert_true(watch.began);
    const int seen = calls;
    for (int i = 0; i < nseqs; i++) {
        struct result got = rig_finish(watch.gen[i]);
        assert_int_equal(got.finish, GEN_LENGTH);
        assert_int_equal(got.n, TOKENS);
        result_free(&got);
    }
    rig_close(&r);
    sem_destroy(&watch.go);
    sem_destroy(&watch.done);
    assert_int_equal(seen, 0);
}

static void a_step_takes_no_memory(void **state)
{
    (void)state;
    if (!COUNTING) {
        printf("SKIPPED: memory is not counted under a sanitizer\n");
        skip();
    }
    atomic_store(&counting, true); /* is anything counted? */
    void *volatile p = malloc(10);
    atomic_store(&counting, false);
    free(p);
    assert_true(calls > 0);

    const struct support_model m = support_model_default("llama");
    struct base *base = support_base(&m, "nf4", NULL, PREC_FAST);
    check(base, 1, 0);
    check(base, 1, 16);
    check(base, SEQS, 0);
    base_free(base);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_step_takes_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
