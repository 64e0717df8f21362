/* job_runner.c - the runner's thread: one database, one job at a time. */
#include "server/job_runner_int.h"

#include "engine/util.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    LOOK_MS = 500,      /* between two looks for jobs that another process made */
    OWNER_MS = 2000,    /* while another process runs the jobs */
    TROUBLE_MS = 5000,  /* after the database failed */
    CLEAN_MS = 600000,  /* between two looks for files that expired */
};

void job_runner_wait(struct job_runner *r, int ms)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += ms / 1000;
    t.tv_nsec += (long)(ms % 1000) * 1000000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&r->lock);
    while (!r->woken && pthread_cond_timedwait(&r->news, &r->lock, &t) != ETIMEDOUT)
        continue;
    r->woken = false;
    pthread_mutex_unlock(&r->lock);
}

void job_runner_wake(void *runner)
{
    struct job_runner *r = runner;
    pthread_mutex_lock(&r->lock);
    r->woken = true;
    pthread_cond_signal(&r->news);
    pthread_mutex_unlock(&r->lock);
}

/* --- the queue ----------------------------------------------------------------------------------------- */
/* Connection and ownership; ERR_BUSY: another process has it. */
static int own(struct job_runner *r, struct err *err)
{
    int64_t n = 0;
    int rc = r->st != NULL ? ERR_OK : store_open(r->o.db_path, &r->st, err);
    if (rc != ERR_OK || r->owner != NULL)
        return rc;
    rc = store_runner_lock(r->o.db_path, &r->owner, err);
    if (rc == ERR_OK)
        rc = store_jobs_requeue(r->st, &n, err);
    if (rc != ERR_OK) {
        store_runner_unlock(r->owner);
        r->owner = NULL;
    }
    return rc;
}

/* One job, if there is one.  ERR_NOT_FOUND: none. */
static int next(struct job_runner *r, struct err *err)
{
    struct store_job job;
    char who[64];
    int rc = own(r, err);
    if (rc == ERR_OK) /* before the look: what comes later is news */
        rc = store_data_version(r->st, &r->version, err);
    if (rc != ERR_OK)
        return rc;
    snprintf(who, sizeof who, "process %ld", (long)getpid());
    rc = store_job_claim(r->st, r->o.base->hash_hex, who, &job, err);
    if (rc != ERR_OK)
        return rc;
    const bool ended = job_run(r, &job);
    store_job_free(&job);
    if (ended)
        return ERR_OK;
    store_runner_unlock(r->owner); /* whoever takes the jobs next finds it, as after a crash */
    r->owner = NULL;
    return err_set(err, ERR_DB, "the end of a job could not be written: it is run again");
}

static bool news(struct job_runner *r)
{
    int64_t now;
    return store_data_version(r->st, &now, NULL) != ERR_OK || now != r->version;
}

static void clean(struct job_runner *r, double *last)
{
    if (r->owner == NULL || (*last > 0 && now_mono() - *last < CLEAN_MS / 1e3))
        return;
    store_files_clean(r->st, NULL); /* what fails now is done next time */
    *last = now_mono();
}

static void *runner_main(void *arg)
{
    struct job_runner *r = arg;
    double cleaned = 0;
    bool complained = false;
    pthread_setname_np(pthread_self(), "lorad-jobs");
    while (!atomic_load(&r->stopping)) {
        struct err err = { 0 };
        const int rc = next(r, &err);
        clean(r, &cleaned);
        if (rc == ERR_OK || rc == ERR_NOT_FOUND)
            complained = false;
        else if (rc != ERR_BUSY && !complained)
            fprintf(stderr, "lorad: fine-tuning jobs: %s\n", err.msg);
        complained = complained || (rc != ERR_OK && rc != ERR_NOT_FOUND && rc != ERR_BUSY);
        if (rc == ERR_NOT_FOUND)
            do
                job_runner_wait(r, LOOK_MS);
            while (!atomic_load(&r->stopping) && !news(r));
        else if (rc != ERR_OK)
            job_runner_wait(r, rc == ERR_BUSY ? OWNER_MS : TROUBLE_MS);
    }
    return NULL;
}

/* --- starting and stopping ------------------------------------------------------------------------------ */
static void runner_free(struct job_runner *r)
{
    store_runner_unlock(r->owner);
    store_close(r->st);
    pthread_cond_destroy(&r->answered);
    pthread_cond_destroy(&r->news);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

int job_runner_start(const struct job_runner_opts *o, struct job_runner **ret, struct err *err)
{
    struct job_runner *r = calloc(1, sizeof *r);
    if (r == NULL)
        return err_nomem(err);
    r->o = *o;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->news, &attr);
    pthread_cond_init(&r->answered, NULL);
    pthread_condattr_destroy(&attr);
    /* Signals are for the thread that waits for them. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&r->thread, NULL, runner_main, r);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc != 0) {
        runner_free(r);
        return err_set(err, ERR_UNAVAILABLE, "could not start the thread that runs jobs: %s",
                       strerror(rc));
    }
    *ret = r;
    return ERR_OK;
}

void job_runner_ask_stop(struct job_runner *r)
{
    if (r == NULL)
        return;
    atomic_store(&r->stopping, true);
    job_runner_wake(r);
}

void job_runner_stop(struct job_runner *r)
{
    if (r == NULL)
        return;
    job_runner_ask_stop(r);
    pthread_join(r->thread, NULL);
    runner_free(r);
}
