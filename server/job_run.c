/* job_run.c - one job in the runner's thread: reads what it starts from, serves the thread that trains,
 * writes how it ended. */
#include "server/job_runner_int.h"

#include "api/train_params.h"
#include "engine/util.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    WANTED_MS = 250, /* between two looks at what clients want of the job */
    AGAIN_MS = 1000, /* before an end that could not be written is tried again */
    DONE_TRIES = 5,
};

/* --- what it starts from ----------------------------------------------------------------------------------- */
static int read_params(struct job_run *run, struct err *err)
{
    json_t *j = json_loads(run->job->params, 0, NULL);
    int rc = j != NULL ? api_train_params(j, &run->opts, err)
                       : err_set(err, ERR_DB, "the options of job %s are damaged", run->job->ref);
    json_decref(j);
    return rc;
}

static int read_gate(struct job_run *run, char file[STORE_ID_MAX + 1], struct err *err)
{
    run->max_loss = NAN;
    file[0] = '\0';
    if (run->job->activate_if == NULL)
        return ERR_OK;
    json_t *j = json_loads(run->job->activate_if, 0, NULL);
    const json_t *max = json_object_get(j, "max_loss");
    const char *name = json_string_value(json_object_get(j, "file"));
    int rc = ERR_OK;
    if (!json_is_number(max))
        rc = err_set(err, ERR_DB, "the condition of job %s is damaged", run->job->ref);
    else
        run->max_loss = json_number_value(max);
    if (name != NULL)
        snprintf(file, STORE_ID_MAX + 1, "%s", name);
    json_decref(j);
    return rc;
}

static int read_file(struct job_run *run, enum job_file which, const char *ref, struct err *err)
{
    if (ref[0] == '\0')
        return ERR_OK;
    const size_t any = (size_t)1 << 62;
    int rc = spool_open(run->r->o.db_path, any, &run->files[which], err);
    if (rc == ERR_OK)
        rc = store_file_read(run->r->st, run->job->tenant, ref, run->files[which], err);
    return rc;
}

static int read_from(struct job_run *run, struct err *err)
{
    if (run->job->from_ref == NULL)
        return ERR_OK;
    if (run->job->from_version == 0)
        return err_set_slug(err, ERR_NOT_FOUND, "model_not_found", "model",
                            "%s, from which the job goes on, is not there any more",
                            run->job->from_ref);
    return store_version_load(run->r->st, run->job->from_version, &run->from, err);
}

/* Tokens and loss of the steps up to the state: those after it are done again. */
static int count_tokens(struct job_run *run, struct err *err)
{
    enum { AT_ONCE = 4096 };
    int64_t since = 0, sum = 0;
    for (size_t n = AT_ONCE; n == AT_ONCE && since < run->job->state_step;) {
        struct store_metric *m = NULL;
        int rc = store_metric_list(run->r->st, run->job->id, since, AT_ONCE, &m, &n, err);
        if (rc != ERR_OK)
            return rc;
        for (size_t i = 0; i < n; i++) {
            since = m[i].step;
            if (since > run->job->state_step)
                break;
            sum += m[i].tokens > 0 ? m[i].tokens : 0;
            run->quality.train_loss = m[i].loss;
        }
        free(m);
    }
    run->report.trained_tokens = sum;
    return ERR_OK;
}

static int read_state(struct job_run *run, struct err *err)
{
    int64_t step;
    run->report.step = run->kept_step = 0;
    if (run->job->state_step < 0)
        return ERR_OK;
    run->report.step = run->kept_step = run->job->state_step;
    int rc = store_job_state(run->r->st, run->job->id, &run->state, &run->state_len, &step, err);
    return rc == ERR_OK ? count_tokens(run, err) : rc;
}

static int read_all(struct job_run *run, struct err *err)
{
    char eval[STORE_ID_MAX + 1];
    int rc = read_params(run, err);
    if (rc == ERR_OK)
        rc = read_gate(run, eval, err);
    if (rc == ERR_OK)
        rc = read_file(run, JOB_FILE_TRAIN, run->job->training_file, err);
    if (rc == ERR_OK)
        rc = read_file(run, JOB_FILE_VALID, run->job->validation_file, err);
    if (rc == ERR_OK)
        rc = read_file(run, JOB_FILE_EVAL, eval, err);
    if (rc == ERR_OK)
        rc = read_from(run, err);
    return rc == ERR_OK ? read_state(run, err) : rc;
}

/* --- while the other thread trains ------------------------------------------------------------------------ */
int job_ask(struct job_run *run, int (*fn)(struct job_run *run, void *arg, struct err *err), void *arg,
            struct err *err)
{
    struct job_runner *r = run->r;
    pthread_mutex_lock(&r->lock);
    run->ask = fn;
    run->ask_arg = arg;
    run->ask_err = err;
    r->woken = true;
    pthread_cond_signal(&r->news);
    while (run->ask != NULL)
        pthread_cond_wait(&r->answered, &r->lock);
    const int rc = run->ask_rc;
    pthread_mutex_unlock(&r->lock);
    return rc;
}

/* Does what was asked for.  False: the training thread has ended. */
static bool answer(struct job_run *run)
{
    struct job_runner *r = run->r;
    pthread_mutex_lock(&r->lock);
    const bool go_on = !run->finished || run->ask != NULL;
    int (*fn)(struct job_run *, void *, struct err *) = run->ask;
    pthread_mutex_unlock(&r->lock);
    if (fn == NULL)
        return go_on;
    const int rc = fn(run, run->ask_arg, run->ask_err);
    pthread_mutex_lock(&r->lock);
    run->ask_rc = rc;
    run->ask = NULL;
    pthread_cond_signal(&r->answered);
    pthread_mutex_unlock(&r->lock);
    return true;
}

static void look_wanted(struct job_run *run)
{
    enum job_wanted w = JOB_GO_ON;
    struct err err = { 0 };
    const int rc = store_job_wanted(run->r->st, run->job->id, run->job->claim, &w, &err);
    if (rc == ERR_CONFLICT) /* a database that fails now will fail where it matters */
        run->lost = true;
    if (run->lost || w == JOB_CANCEL)
        atomic_store(&run->wanted, TRAIN_CANCEL);
    else if (w == JOB_PAUSE || atomic_load(&run->r->stopping))
        atomic_store(&run->wanted, TRAIN_PAUSE);
}

static int train_it(struct job_run *run, struct err *err)
{
    pthread_t thread;
    double looked = 0;
    const int rc = pthread_create(&thread, NULL, job_work, run); /* signals are blocked here already */
    if (rc != 0)
        return err_set(err, ERR_UNAVAILABLE, "could not start the thread that trains: %s",
                       strerror(rc));
    while (answer(run)) {
        if (now_mono() - looked > WANTED_MS / 1e3 || atomic_load(&run->r->stopping)) {
            look_wanted(run);
            looked = now_mono();
        }
        job_runner_wait(run->r, WANTED_MS);
    }
    pthread_join(thread, NULL);
    return ERR_OK;
}

/* --- the end ------------------------------------------------------------------------------------------------ */
static int write_done(struct job_run *run, const struct store_report *rep, struct err *err)
{
    const struct store_job *j = run->job;
    struct store_version v = { 0 };
    const bool good = isnan(run->max_loss) || run->quality.eval_loss <= run->max_loss;
    int rc = store_job_succeed(run->r->st, j->id, j->claim, rep, run->result, &run->quality,
                               j->activate && good, &v, err);
    store_version_free(&v);
    return rc;
}

static const char *code_of(const struct err *e)
{
    if (e->slug != NULL)
        return e->slug;
    switch (e->code) {
    case ERR_INVALID: return "invalid_request";
    case ERR_NOMEM: return "out_of_memory";
    case ERR_TOO_LARGE: return "too_large";
    default: return "server_error";
    }
}

static int write_failed(struct job_run *run, const struct store_report *rep, struct err *err)
{
    const struct store_job *j = run->job;
    const struct err *why = &run->err;
    char text[sizeof why->msg + 80];
    if (why->code == ERR_UNAVAILABLE) { /* most likely the disk is full: somebody makes room */
        snprintf(text, sizeof text, "%s; resume it when that is over, it goes on after step %lld",
                 why->msg, (long long)run->kept_step);
        return store_job_paused(run->r->st, j->id, j->claim, rep, text, err);
    }
    if (why->code == ERR_DB || why->code == ERR_IO || why->code == ERR_INTERNAL) {
        fprintf(stderr, "lorad: job %s: %s\n", j->ref, why->msg); /* not for the client */
        return store_job_fail(run->r->st, j->id, j->claim, rep, code_of(why),
                              "the server failed; its log says how", NULL, err);
    }
    return store_job_fail(run->r->st, j->id, j->claim, rep, code_of(why), why->msg,
                          why->param != NULL ? why->param : run->error_param, err);
}

static int write_end(struct job_run *run, struct err *err)
{
    const struct store_job *j = run->job;
    const struct store_report rep = job_report_view(&run->report);
    struct store *st = run->r->st;
    switch (run->end) {
    case JOB_END_DONE: return write_done(run, &rep, err);
    case JOB_END_CANCELLED: return store_job_cancelled(st, j->id, j->claim, &rep, err);
    case JOB_END_FAILED: return write_failed(run, &rep, err);
    default: break;
    }
    enum job_wanted w = JOB_GO_ON;
    int rc = store_job_wanted(st, j->id, j->claim, &w, err);
    if (rc != ERR_OK)
        return rc;
    return w == JOB_GO_ON ? store_job_release(st, j->id, j->claim, &rep, err)
                          : store_job_paused(st, j->id, j->claim, &rep, NULL, err);
}

/* An end that finds no room is written when there is some; a job that is left without one goes on from its
 * last state.  False: it was. */
static bool end_it(struct job_run *run)
{
    for (int tries = 1;; tries++) {
        struct err err = { 0 };
        const int rc = run->lost ? ERR_OK : write_end(run, &err);
        const bool lost = err.slug != NULL && strcmp(err.slug, "claim_lost") == 0;
        if (rc == ERR_OK || (rc == ERR_CONFLICT && lost))
            return true;
        if (tries == 1)
            fprintf(stderr, "lorad: job %s: %s\n", run->job->ref, err.msg);
        if ((rc != ERR_UNAVAILABLE && run->end == JOB_END_FAILED) || atomic_load(&run->r->stopping))
            return false;
        if (rc != ERR_UNAVAILABLE || (run->end == JOB_END_DONE && tries == DONE_TRIES)) {
            run->end = JOB_END_FAILED; /* no room: it is paused, and its state has all of it */
            run->err = err;
        }
        job_runner_wait(run->r, AGAIN_MS);
    }
}

static void run_free(struct job_run *run)
{
    for (int i = 0; i < 3; i++)
        spool_close(run->files[i]);
    adapter_src_free(run->from);
    adapter_src_free(run->result);
    train_opts_free(&run->opts);
    job_report_free(&run->report);
    free(run->state);
}

bool job_run(struct job_runner *r, const struct store_job *job)
{
    struct job_run run = { .r = r, .job = job, .max_loss = NAN, .end = JOB_END_FAILED,
                           .quality = { NAN, NAN, NAN, -1 } };
    int rc = read_all(&run, &run.err);
    if (rc == ERR_OK)
        rc = train_it(&run, &run.err);
    if (rc != ERR_OK)
        run.end = JOB_END_FAILED;
    const bool ended = end_it(&run);
    run_free(&run);
    return ended;
}
