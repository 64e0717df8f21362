/* job_run.c - the runner's claims and reports. */
#include "store/store_int.h"

#include "engine/util.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

/* So often in a row may a process that runs a job end before a checkpoint. */
enum { CUTS_MAX = 10 };

/* --- one runner per file --------------------------------------------------------------------- */
struct runner_lock {
    int fd; /* -1: ":memory:" */
};

int store_runner_lock(const char *db_path, struct runner_lock **ret, struct err *err)
{
    struct runner_lock *l = calloc(1, sizeof *l);
    char *path = NULL;
    int rc = ERR_OK;
    if (l == NULL || asprintf(&path, "%s.runner", db_path) < 0) {
        free(l);
        return err_nomem(err);
    }
    l->fd = -1;
    if (strcmp(db_path, ":memory:") != 0) {
        l->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (l->fd < 0)
            rc = err_set(err, ERR_IO, "cannot make %s: %s", path, strerror(errno));
        else if (flock(l->fd, LOCK_EX | LOCK_NB) != 0)
            rc = err_set(err, errno == EWOULDBLOCK ? ERR_BUSY : ERR_IO,
                         "the jobs of %s are run by another process", db_path);
    }
    free(path);
    if (rc != ERR_OK) {
        store_runner_unlock(l);
        return rc;
    }
    *ret = l;
    return ERR_OK;
}

void store_runner_unlock(struct runner_lock *l)
{
    if (l == NULL)
        return;
    if (l->fd >= 0)
        close(l->fd); /* the file stays: removing it could take it from under the next holder */
    free(l);
}

/* --- claims ---------------------------------------------------------------------------------- */
int job_claimed(struct store *st, int64_t job, int64_t claim, struct store_job *ret,
                struct err *err)
{
    struct sql q = sql_open(st, SELECT_JOB "WHERE j.id = ? AND j.claim = ?"
                            " AND j.status IN ('validating_files', 'running')", err);
    sql_int(&q, job);
    sql_int(&q, claim);
    int rc = job_one(&q, ret);
    if (rc == ERR_NOT_FOUND)
        rc = err_set_slug(err, ERR_CONFLICT, "claim_lost", NULL,
                          "job %lld is not claimed under number %lld any more", (long long)job,
                          (long long)claim);
    return rc;
}

/* Once more cut off; how often without progress. */
static int count_cut(struct store *st, const struct store_job *j, int64_t *ret, struct err *err)
{
    struct sql q = sql_open(st, "UPDATE job SET cuts = cuts + 1 WHERE id = ? RETURNING cuts", err);
    sql_int(&q, j->id);
    *ret = sql_step(&q) == 1 ? sql_col_int(&q, 0) : 0;
    return sql_close(&q);
}

/* A job that takes the process down with it would do so at every start: it waits for somebody to
 * look. */
static int give_up(struct store *st, const struct store_job *j, struct err *err)
{
    char why[128];
    snprintf(why, sizeof why, "the process that ran it ended %d times in a row before a checkpoint "
             "was reached", CUTS_MAX);
    struct sql q = sql_open(st, "UPDATE job SET pause_reason = ?, cuts = 0 WHERE id = ?", err);
    sql_text(&q, why);
    sql_int(&q, j->id);
    int rc = sql_run(&q);
    return rc != ERR_OK ? rc : job_say(st, j, JOB_ERROR, err, "The job is paused: %s", why);
}

/* One orphan: where it was going, without its runner. */
static int requeue_one(struct store *st, const struct store_job *j, struct err *err)
{
    int64_t cuts;
    int rc = count_cut(st, j, &cuts, err);
    if (rc != ERR_OK)
        return rc;
    const bool hopeless = cuts >= CUTS_MAX && j->wanted == JOB_GO_ON;
    const enum job_status to = j->wanted == JOB_CANCEL ? JOB_CANCELLED :
                               j->wanted == JOB_PAUSE || hopeless ? JOB_PAUSED : JOB_QUEUED;
    rc = job_set_status(st, j->id, to, err);
    if (rc == ERR_OK && to == JOB_CANCELLED)
        rc = job_drop_state(st, j->id, err);
    if (rc != ERR_OK)
        return rc;
    if (hopeless)
        return give_up(st, j, err);
    if (to == JOB_CANCELLED)
        return job_say(st, j, JOB_INFO, err, "The job was cancelled");
    if (to == JOB_PAUSED)
        return job_say(st, j, JOB_INFO, err, "The job was paused");
    if (j->state_step < 0)
        return job_say(st, j, JOB_WARN, err, "The run was cut off: it starts again");
    return job_say(st, j, JOB_WARN, err, "The run was cut off: it goes on after step %lld",
                   (long long)j->state_step);
}

/* All of them, inside the caller's transaction. */
static int requeue(struct store *st, int64_t *ret_n, struct err *err)
{
    for (;;) {
        struct store_job j;
        struct sql q = sql_open(st, SELECT_JOB "WHERE j.status IN ('validating_files', 'running')"
                                " ORDER BY j.id LIMIT 1", err);
        int rc = job_one(&q, &j);
        if (rc == ERR_NOT_FOUND)
            return ERR_OK;
        if (rc != ERR_OK)
            return rc;
        rc = requeue_one(st, &j, err);
        store_job_free(&j);
        if (rc != ERR_OK)
            return rc;
        (*ret_n)++;
    }
}

int store_jobs_requeue(struct store *st, int64_t *ret_n, struct err *err)
{
    int64_t n = 0;
    int rc = store_begin(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, requeue(st, &n, err), err);
    if (rc == ERR_OK)
        *ret_n = n;
    return rc;
}

/* Claims are numbered over all tenants, so that the smallest last number is the longest wait. */
static int take_claim(struct store *st, const struct store_job *j, const char *who,
                      struct err *err)
{
    struct sql q = sql_open(st,
                            "UPDATE tenant SET last_claim = (SELECT max(last_claim) + 1 FROM tenant)"
                            " WHERE id = ?", err);
    sql_int(&q, j->tenant);
    int rc = sql_run(&q);
    if (rc != ERR_OK)
        return rc;
    q = sql_open(st,
                 "UPDATE job SET status = 'validating_files', wanted = 'run', claimed_by = ?2,"
                 " heartbeat_ms = ?3, step = coalesce(state_step, 0),"
                 " claim = (SELECT last_claim FROM tenant WHERE id = tenant_id) WHERE id = ?1", err);
    sql_int(&q, j->id);
    sql_text(&q, who);
    sql_int(&q, now_unix_ms());
    return sql_run(&q);
}

static int claim(struct store *st, const uint8_t base[32], const char *who, struct store_job *ret,
                 struct err *err)
{
    struct store_job j;
    struct sql q = sql_open(st, SELECT_JOB "WHERE j.status = 'queued' AND j.base_hash = ?"
                            " ORDER BY t.last_claim, j.id LIMIT 1", err);
    sql_blob(&q, base, 32);
    int rc = job_one(&q, &j);
    if (rc != ERR_OK)
        return rc;
    rc = take_claim(st, &j, who, err);
    if (rc == ERR_OK && j.state_step < 0)
        rc = job_say(st, &j, JOB_INFO, err, "Validating training file: %s", j.training_file);
    if (rc == ERR_OK)
        rc = job_by_id(st, j.id, ret, err);
    store_job_free(&j);
    return rc;
}

int store_job_claim(struct store *st, const char *base_hash_hex, const char *who,
                    struct store_job *ret, struct err *err)
{
    uint8_t base[32];
    struct store_job j = { .id = 0 };
    if (!hex32_parse(base_hash_hex, base))
        return err_set(err, ERR_INTERNAL, "a runner needs the hash of its base");
    int rc = store_begin(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, claim(st, base, who, &j, err), err);
    if (rc == ERR_OK)
        *ret = j;
    else
        store_job_free(&j);
    return rc;
}

static int started(struct store *st, int64_t job, int64_t number, int64_t steps, struct err *err)
{
    struct store_job j;
    int rc = job_claimed(st, job, number, &j, err);
    if (rc != ERR_OK)
        return rc;
    const int64_t now = now_unix_ms();
    struct sql q = sql_open(st,
                            "UPDATE job SET status = 'running', steps = ?2, heartbeat_ms = ?3,"
                            " started_ms = coalesce(started_ms, ?3) WHERE id = ?1", err);
    sql_int(&q, job);
    sql_int(&q, steps);
    sql_int(&q, now);
    rc = sql_run(&q);
    if (rc == ERR_OK && j.state_step < 0)
        rc = job_say(st, &j, JOB_INFO, err, "Fine-tuning job started: %lld steps",
                     (long long)steps);
    else if (rc == ERR_OK)
        rc = job_say(st, &j, JOB_INFO, err, "The job goes on: step %lld of %lld is done",
                     (long long)j.state_step, (long long)steps);
    store_job_free(&j);
    return rc;
}

int store_job_started(struct store *st, int64_t job, int64_t claim_number, int64_t steps,
                      struct err *err)
{
    int rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    return store_end(st, started(st, job, claim_number, steps, err), err);
}

int store_job_wanted(struct store *st, int64_t job, int64_t claim_number, enum job_wanted *ret,
                     struct err *err)
{
    enum job_wanted w = JOB_GO_ON;
    struct sql q = sql_open(st,
                            "SELECT wanted FROM job WHERE id = ? AND claim = ?"
                            " AND status IN ('validating_files', 'running')", err);
    sql_int(&q, job);
    sql_int(&q, claim_number);
    const int row = sql_step(&q);
    const char *name = row == 1 ? sql_col_text(&q, 0) : NULL;
    if (name != NULL)
        w = strcmp(name, "cancel") == 0 ? JOB_CANCEL :
            strcmp(name, "pause") == 0  ? JOB_PAUSE : JOB_GO_ON;
    int rc = sql_close(&q);
    if (rc == ERR_OK && row == 0)
        rc = err_set_slug(err, ERR_CONFLICT, "claim_lost", NULL,
                          "job %lld is not claimed under number %lld any more", (long long)job,
                          (long long)claim_number);
    if (rc == ERR_OK)
        *ret = w;
    return rc;
}

/* --- reports --------------------------------------------------------------------------------- */
static int put_metrics(struct store *st, const struct store_job *j, const struct store_report *r,
                       struct err *err)
{
    if (r->nmetrics == 0)
        return ERR_OK;
    struct sql q = sql_open(st,
                            "INSERT OR REPLACE INTO job_metric (tenant_id, job_id, step, at_ms,"
                            " epoch, loss, valid_loss, accuracy, valid_accuracy, lr, grad_norm,"
                            " tokens_per_s, tokens, targets, orth, threshold, budget, kept) VALUES"
                            " (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, nullif(?, -1), nullif(?, -1), ?,"
                            " ?, nullif(?, -1), nullif(?, -1))", err);
    for (size_t i = 0; i < r->nmetrics; i++) {
        const struct store_metric *m = &r->metrics[i];
        const double d[] = { m->epoch, m->loss, m->valid_loss, m->accuracy, m->valid_accuracy,
                             m->lr, m->grad_norm, m->tokens_per_s };
        sql_reset(&q);
        sql_int(&q, j->tenant);
        sql_int(&q, j->id);
        sql_int(&q, m->step);
        sql_int(&q, now_unix_ms());
        for (size_t k = 0; k < sizeof d / sizeof d[0]; k++)
            sql_real(&q, d[k]);
        sql_int(&q, m->tokens);
        sql_int(&q, m->targets);
        sql_real(&q, m->orth);
        sql_real(&q, m->threshold);
        sql_int(&q, m->budget);
        sql_int(&q, m->kept);
        if (sql_step(&q) != 0)
            break; /* sticks in q */
    }
    return sql_close(&q);
}

/* A row whose rank is that of the row before is no news. */
static int put_ranks(struct store *st, const struct store_job *j, const struct store_report *r,
                     struct err *err)
{
    if (r->nranks == 0)
        return ERR_OK;
    struct sql q = sql_open(st,
                            "INSERT OR REPLACE INTO job_rank (tenant_id, job_id, layer, module,"
                            " step, rank) SELECT ?1, ?2, ?3, ?4, ?5, ?6 WHERE ?6 IS NOT"
                            " (SELECT rank FROM job_rank WHERE job_id = ?2 AND layer = ?3 AND"
                            " module = ?4 AND step < ?5 ORDER BY step DESC LIMIT 1)", err);
    int rc = ERR_OK;
    for (size_t i = 0; i < r->nranks; i++) {
        const struct store_rank *k = &r->ranks[i];
        const char *module = store_module_name(k->module);
        if (module == NULL) {
            rc = err_set(err, ERR_INTERNAL, "there is no module number %d", k->module);
            break;
        }
        sql_reset(&q);
        sql_int(&q, j->tenant);
        sql_int(&q, j->id);
        sql_int(&q, k->layer);
        sql_text(&q, module);
        sql_int(&q, k->step);
        sql_int(&q, k->rank);
        if (sql_step(&q) != 0)
            break; /* sticks in q */
    }
    const int rq = sql_close(&q);
    return rc != ERR_OK ? rc : rq;
}

int job_report(struct store *st, const struct store_job *j, const struct store_report *r,
               struct err *err)
{
    if (r == NULL)
        return ERR_OK;
    struct sql q = sql_open(st,
                            "UPDATE job SET heartbeat_ms = ?2,"
                            " step = CASE WHEN ?3 >= 0 THEN ?3 ELSE step END,"
                            " trained_tokens = CASE WHEN ?4 >= 0 THEN ?4 ELSE trained_tokens END,"
                            " seconds_per_step = CASE WHEN ?5 > 0 THEN ?5 ELSE seconds_per_step END"
                            " WHERE id = ?1", err);
    sql_int(&q, j->id);
    sql_int(&q, now_unix_ms());
    sql_int(&q, r->step);
    sql_int(&q, r->trained_tokens);
    sql_real(&q, r->seconds_per_step);
    int rc = sql_run(&q);
    if (rc == ERR_OK)
        rc = put_metrics(st, j, r, err);
    if (rc == ERR_OK)
        rc = put_ranks(st, j, r, err);
    for (size_t i = 0; i < r->nevents && rc == ERR_OK; i++)
        rc = job_event(st, j->tenant, j->id, &r->events[i], err);
    return rc;
}

static int report(struct store *st, int64_t job, int64_t number, const struct store_report *r,
                  struct err *err)
{
    struct store_job j;
    int rc = job_claimed(st, job, number, &j, err);
    if (rc != ERR_OK)
        return rc;
    rc = job_report(st, &j, r, err);
    store_job_free(&j);
    return rc;
}

int store_job_report(struct store *st, int64_t job, int64_t claim_number,
                     const struct store_report *r, struct err *err)
{
    int rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    return store_end(st, report(st, job, claim_number, r, err), err);
}
