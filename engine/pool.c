/* pool.c - threads that share the pieces of a loop.
 *
 * A forward pass calls pool_run() hundreds of times, tens of microseconds apart, and between two
 * passes there are some hundreds for choosing tokens and handing them out, so a thread that has
 * nothing to do first spins for a while (WORKER_SPIN) and only then sleeps on a futex.  The caller,
 * who waits for threads inside a piece, spins shorter (CALLER_SPIN): what takes longer is a thread
 * that has lost its CPU to somebody, and the caller's may be what it needs.  A spinning thread that
 * notices a gap of LOST_CPU shares its CPU with somebody who has work to do, and leaves it to them.
 *
 * Everything turns on one 32-bit word, which is also the futex:
 *     number of the job (20 bits) | OPEN | number of threads inside (11 bits)
 * The caller fills in the job's fields, then publishes a new number with OPEN set.  A thread takes
 * part by adding itself with a compare-and-swap that only succeeds while OPEN is set, and leaves by
 * subtracting itself.  Pieces are taken from a queue, which is a counter: one for all, or one for
 * each thread, who goes to the others' when his own is empty.  When the caller finds no piece left, it
 * clears OPEN and waits until nobody is inside: so it waits for threads that are at work, never
 * for one that has not woken up yet, and the job's fields never change under anybody. */
#include "engine/compute.h"
#include "engine/cpus.h"
#include "engine/util.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { INSIDE = 0x7ff, OPEN = 0x800, JOB_SHIFT = 12, MAX_THREADS = 1024 };
/* Seconds.  With 50 us for both, workers slept between any two passes over a base of 1.1B (two sleeps a
 * token of one sequence); with 100 us and more they did not. */
static const double WORKER_SPIN = 200e-6, CALLER_SPIN = 50e-6, LOST_CPU = 20e-6;

struct worker {
    struct pool *pool;
    pthread_t thread;
    int number; /* 1 .. threads - 1 */
};

/* Grains [next, end) of a job; a cache line each. */
struct queue {
    _Alignas(64) _Atomic int64_t next;
    int64_t end;
};

struct pool {
    int threads; /* the caller included */
    struct worker *workers;
    /* The job; written by the caller while nobody is inside. */
    pool_fn fn;
    void *arg;
    int64_t n, grain;
    int nqueues;
    struct queue *queues; /* [threads] */
    /* Apart from the rest, so that nothing disturbs those who spin. */
    _Alignas(64) _Atomic uint32_t state;
    _Atomic int sleepers; /* threads in futex_wait, or about to be */
    _Atomic bool stop;
};

static void futex_wait(_Atomic uint32_t *word, uint32_t expected)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}

static void futex_wake_all(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void pause_a_moment(void)
{
    for (int i = 0; i < 16; i++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
}

/* Returns once `state` is not `old`; may return early. */
static void wait_for_change(struct pool *p, uint32_t old, double spin)
{
    const double start = now_mono();
    double before, now = start;
    do {
        before = now;
        pause_a_moment();
        if (atomic_load(&p->state) != old)
            return;
        now = now_mono();
    } while (now - start < spin && now - before < LOST_CPU);
    /* Counted before the kernel compares the word: whoever changes it after that comparison
     * sees the count and wakes us. */
    atomic_fetch_add(&p->sleepers, 1);
    futex_wait(&p->state, old);
    atomic_fetch_sub(&p->sleepers, 1);
}

static void wake_sleepers(struct pool *p)
{
    if (atomic_load(&p->sleepers) > 0)
        futex_wake_all(&p->state);
}

static void work(struct pool *p, int thread)
{
    for (int i = 0; i < p->nqueues; i++) {
        struct queue *q = &p->queues[(thread + i) % p->nqueues];
        for (;;) {
            const int64_t g = atomic_fetch_add_explicit(&q->next, 1, memory_order_relaxed);
            if (g >= q->end)
                break;
            const int64_t begin = g * p->grain, left = p->n - begin;
            p->fn(p->arg, begin, begin + (left < p->grain ? left : p->grain), thread);
        }
    }
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    struct pool *p = w->pool;
    uint32_t seen = 0; /* number of the last job this thread took part in */
    for (;;) {
        /* In this order: pool_destroy() sets stop before it changes the word. */
        uint32_t s = atomic_load(&p->state);
        if (atomic_load(&p->stop))
            return NULL;
        if (!(s & OPEN) || s >> JOB_SHIFT == seen) {
            wait_for_change(p, s, WORKER_SPIN);
            continue;
        }
        if (!atomic_compare_exchange_strong(&p->state, &s, s + 1))
            continue;
        seen = s >> JOB_SHIFT;
        work(p, w->number);
        s = atomic_fetch_sub(&p->state, 1) - 1;
        if (!(s & OPEN) && (s & INSIDE) == 0)
            wake_sleepers(p); /* the caller may be asleep, waiting for us */
    }
}

static void run(struct pool *p, int64_t n, int64_t grain, bool apart, pool_fn fn, void *arg)
{
    if (n <= 0)
        return;
    if (grain < 1)
        grain = 1;
    if (p == NULL || p->threads == 1 || n <= grain) {
        for (int64_t begin = 0; begin < n; begin += grain)
            fn(arg, begin, n - begin < grain ? n : begin + grain, 0);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    p->n = n;
    p->grain = grain;
    const int64_t grains = n / grain + (n % grain != 0);
    p->nqueues = apart ? p->threads : 1;
    for (int i = 0; i < p->nqueues; i++) {
        atomic_store_explicit(&p->queues[i].next, grains * i / p->nqueues, memory_order_relaxed);
        p->queues[i].end = grains * (i + 1) / p->nqueues;
    }
    const uint32_t job = (atomic_load(&p->state) >> JOB_SHIFT) + 1;
    atomic_store(&p->state, job << JOB_SHIFT | OPEN);
    wake_sleepers(p);

    work(p, 0);
    uint32_t s = atomic_fetch_and(&p->state, ~(uint32_t)OPEN) & ~(uint32_t)OPEN;
    while ((s & INSIDE) != 0) {
        wait_for_change(p, s, CALLER_SPIN);
        s = atomic_load(&p->state);
    }
}

void pool_run(struct pool *p, int64_t n, int64_t grain, pool_fn fn, void *arg)
{
    run(p, n, grain, false, fn, arg);
}

void pool_run_apart(struct pool *p, int64_t n, int64_t grain, pool_fn fn, void *arg)
{
    run(p, n, grain, true, fn, arg);
}

int pool_threads(const struct pool *p) { return p != NULL ? p->threads : 1; }

static int start_worker(struct pool *p, int number, struct err *err)
{
    struct worker *w = &p->workers[number - 1];
    *w = (struct worker){ .pool = p, .number = number };
    /* Signals are for the threads that asked for them. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&w->thread, NULL, worker_main, w);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc != 0)
        return err_set(err, ERR_UNAVAILABLE, "could not start compute thread %d: %s", number,
                       strerror(rc));
    pthread_setname_np(w->thread, "lorad-compute");
    return ERR_OK;
}

int pool_create(int nthreads, struct pool **ret, struct err *err)
{
    if (nthreads == 0) {
        nthreads = cpus_available();
        nthreads = nthreads < MAX_THREADS ? nthreads : MAX_THREADS;
    }
    if (nthreads < 1 || nthreads > MAX_THREADS)
        return err_set(err, ERR_INVALID, "%d compute threads: from 1 to %d are possible", nthreads,
                       MAX_THREADS);
    struct pool *p = aligned_alloc(64, sizeof *p);
    struct worker *workers = calloc((size_t)nthreads, sizeof *workers);
    struct queue *queues = aligned_alloc(64, (size_t)nthreads * sizeof *queues);
    if (p == NULL || workers == NULL || queues == NULL) {
        free(p);
        free(workers);
        free(queues);
        return err_nomem(err);
    }
    memset(p, 0, sizeof *p);
    memset(queues, 0, (size_t)nthreads * sizeof *queues);
    p->workers = workers;
    p->queues = queues;
    p->threads = 1;
    while (p->threads < nthreads) {
        int rc = start_worker(p, p->threads, err);
        if (rc != ERR_OK) {
            pool_destroy(p);
            return rc;
        }
        p->threads++;
    }
    *ret = p;
    return ERR_OK;
}

void pool_destroy(struct pool *p)
{
    if (p == NULL)
        return;
    atomic_store(&p->stop, true);
    /* A new job number that is not open: it changes the word, so nobody stays asleep. */
    atomic_fetch_add(&p->state, (uint32_t)1 << JOB_SHIFT);
    wake_sleepers(p);
    for (int i = 0; i < p->threads - 1; i++)
        pthread_join(p->workers[i].thread, NULL);
    free(p->workers);
    free(p->queues);
    free(p);
}
