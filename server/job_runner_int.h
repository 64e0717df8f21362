/* job_runner_int.h - shared by the files of the runner.
 *
 *   job_runner.c   the runner's thread: the queue
 *   job_run.c      one job, in the runner's thread: what it starts from, its end
 *   job_work.c     one job, in the thread that trains
 *   job_report.c   what a run reports, gathered */
#ifndef SERVER_JOB_RUNNER_INT_H
#define SERVER_JOB_RUNNER_INT_H

#include "engine/dataset.h"
#include "engine/train.h"
#include "server/job_runner.h"
#include "store/jobs.h"

#include <pthread.h>
#include <stdatomic.h>

struct job_runner {
    struct job_runner_opts o;
    pthread_t thread;
    pthread_mutex_t lock;       /* woken; and the members of struct job_run that say so */
    pthread_cond_t news;        /* for the runner's thread */
    pthread_cond_t answered;    /* for the thread that trains */
    bool woken;
    atomic_bool stopping;
    /* of the runner's thread */
    struct store *st;
    struct runner_lock *owner;  /* NULL: another process runs the jobs */
    int64_t version;            /* of the data that was looked at */
};
/* Waits for news, at most so long; what woke it is forgotten. */
void job_runner_wait(struct job_runner *r, int ms);

/* --- reports (job_report.c) ----------------------------------------------------------------------- */
struct job_report {
    struct store_metric *metrics;
    size_t nmetrics, metrics_cap;
    struct store_rank *ranks;
    size_t nranks, ranks_cap;
    struct store_event_new *events; /* messages and data are owned */
    size_t nevents, events_cap;
    int *known;                 /* ranks as they were reported last; [nknown] */
    size_t nknown;
    int64_t step, trained_tokens;
    double seconds_per_step;
    double sent;                /* when (now_mono) */
};
int job_report_step(struct job_report *p, struct train *t, const struct train_report *r,
                    const struct train_valid *v, struct err *err);
int job_report_event(struct job_report *p, enum job_level level, struct err *err, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* As the store wants it; borrowed. */
struct store_report job_report_view(const struct job_report *p);
void job_report_sent(struct job_report *p); /* it was written */
void job_report_free(struct job_report *p);

/* --- one job --------------------------------------------------------------------------------------- */
enum job_end { JOB_END_DONE, JOB_END_PAUSED, JOB_END_CANCELLED, JOB_END_FAILED };

struct job_run {
    struct job_runner *r;
    const struct store_job *job;
    /* under r->lock: what the training thread wants done */
    int (*ask)(struct job_run *run, void *arg, struct err *err); /* NULL: nothing */
    void *ask_arg;
    struct err *ask_err;
    int ask_rc;
    bool finished;              /* the training thread has ended */
    _Atomic int wanted;         /* enum train_event */
    bool lost;                  /* the claim is somebody else's, or the job is gone */

    /* what it starts from: made by the runner's thread before the other one starts */
    struct train_opts opts;
    struct spool *files[3];     /* enum job_file; NULL: none */
    struct adapter_src *from;   /* NULL: a new adapter */
    char *state;                /* NULL: from the beginning */
    size_t state_len;
    double max_loss;            /* NAN: no gate */

    /* of the training thread, and of the runner's once that has ended */
    struct compute compute;
    struct train_set *sets[3];
    struct train *train;
    struct job_report report;
    int64_t kept_step;          /* of the newest state in the store */
    bool stepped;               /* a step has just been reported: its checkpoint is to be served */
    struct adapter_src *result;
    struct store_quality quality;
    enum job_end end;
    struct err err;             /* JOB_END_FAILED */
    const char *error_param;
};
enum job_file { JOB_FILE_TRAIN, JOB_FILE_VALID, JOB_FILE_EVAL };

/* Runs it to some end, and writes that end; false: it could not be written, and the job is nobody's
 * (job_run.c). */
bool job_run(struct job_runner *r, const struct store_job *job);
/* The training thread (job_work.c). */
void *job_work(void *run);
/* For the training thread: have the runner's thread call fn. */
int job_ask(struct job_run *run, int (*fn)(struct job_run *run, void *arg, struct err *err), void *arg,
            struct err *err);

#endif
