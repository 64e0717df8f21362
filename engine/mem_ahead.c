/* mem_ahead.c - see mem_ahead.h.
 *
 * The thread sleeps on a semaphore.  It asks for one huge page at a time, because the kernel keeps the
 * process's map locked meanwhile, and memory that others map or give back has to wait for that; and between
 * two it rests as long as one took, because its CPU may be one that a step waits for.  With two CPUs, two
 * threads that compute, steps of 12 ms and 4 ms a page, the longest step took 42 and 43 ms beside a
 * thread that did not rest, and 32 to 38 beside this one.  Four times the rest made it no shorter (29 to 38),
 * and spreads the same work over more steps. */
#include "engine/mem_ahead.h"

#include "engine/mem.h"
#include "engine/util.h"

#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

struct mem_ahead {
    char *p;
    size_t bytes, done;
    _Atomic size_t wanted;
    atomic_bool stop;
    sem_t more;
    pthread_t thread;
};

static void rest(double seconds)
{
    const double most = 0.1; /* what mem_ahead_end() may have to wait, beside a page */
    nanosleep(&(struct timespec){ .tv_nsec = (long)(1e9 * (seconds < most ? seconds : most)) }, NULL);
}

static void *ahead_main(void *arg)
{
    struct mem_ahead *a = arg;
    while (!atomic_load(&a->stop)) {
        if (a->done >= atomic_load(&a->wanted)) {
            sem_wait(&a->more);
            continue;
        }
        const size_t left = a->bytes - a->done, n = left < MEM_HUGE_PAGE ? left : MEM_HUGE_PAGE;
        const double began = now_mono();
        mem_populate(a->p + a->done, n);
        a->done += n;
        rest(now_mono() - began);
    }
    return NULL;
}

struct mem_ahead *mem_ahead_start(void *p, size_t bytes)
{
    if (bytes < MEM_HUGE_PAGE)
        return NULL;
    struct mem_ahead *a = calloc(1, sizeof *a);
    if (a == NULL)
        return NULL;
    a->p = p;
    a->bytes = bytes;
    sem_init(&a->more, 0, 0);
    sigset_t all, old; /* signals are for the threads that asked for them */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    const bool started = pthread_create(&a->thread, NULL, ahead_main, a) == 0;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!started) {
        sem_destroy(&a->more);
        free(a);
        return NULL;
    }
    pthread_setname_np(a->thread, "lorad-memory");
    return a;
}

void mem_ahead_reach(struct mem_ahead *a, size_t bytes)
{
    if (a == NULL)
        return;
    bytes = bytes < a->bytes ? bytes : a->bytes;
    if (bytes <= atomic_load(&a->wanted))
        return;
    atomic_store(&a->wanted, bytes);
    sem_post(&a->more);
}

void mem_ahead_end(struct mem_ahead *a)
{
    if (a == NULL)
        return;
    atomic_store(&a->stop, true);
    sem_post(&a->more);
    pthread_join(a->thread, NULL);
    sem_destroy(&a->more);
    free(a);
}
