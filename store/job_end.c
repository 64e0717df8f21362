/* job_end.c - how a claim ends: with a version, with a reason, or to be gone on with. */
#include "store/store_int.h"

#include <stdlib.h>
#include <string.h>

/* What clients wished for while the claim was ending: nobody would look at the wish again. */
static enum job_status as_wished(enum job_wanted wanted, enum job_status to)
{
    if (wanted == JOB_CANCEL && !job_ended(to))
        return JOB_CANCELLED;
    return wanted == JOB_PAUSE && to == JOB_QUEUED ? JOB_PAUSED : to;
}

/* The last report, and the new status, which is in *ret; all else of it is the job as it was. */
static int leave(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                 enum job_status to, struct store_job *ret, struct err *err)
{
    int rc = job_claimed(st, job, claim, ret, err);
    if (rc != ERR_OK)
        return rc;
    to = ret->status = as_wished(ret->wanted, to);
    rc = job_report(st, ret, r, err);
    if (rc == ERR_OK)
        rc = job_set_status(st, job, to, err);
    if (rc == ERR_OK && job_ended(to))
        rc = job_drop_state(st, job, err);
    return rc;
}

/* --- succeeded ------------------------------------------------------------------------------- */
static int set_result(struct store *st, int64_t job, const struct store_version *v,
                      struct err *err)
{
    struct sql q = sql_open(st,
                            "UPDATE job SET result_version_id = ?, result_number = ? WHERE id = ?",
                            err);
    sql_int(&q, v->id);
    sql_int(&q, v->version);
    sql_int(&q, job);
    return sql_run(&q);
}

/* `j` is to be filled; p->o points to its base_hash_hex. */
static int succeed(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                   struct version_put *p, struct store_job *j, struct store_version *ret,
                   struct err *err)
{
    bool is_new;
    int rc = leave(st, job, claim, r, JOB_SUCCEEDED, j, err);
    if (rc == ERR_OK) {
        p->tenant = j->tenant;
        p->name = j->name;
        p->job = job;
        p->parent = j->from_version;
        p->data_hash = j->data_hash;
        rc = version_put_check(p, err);
    }
    if (rc == ERR_OK)
        rc = version_put(st, p, ret, &is_new, err);
    if (rc == ERR_OK)
        rc = set_result(st, job, ret, err);
    char *name = rc == ERR_OK ? store_job_model_name(j, -1) : NULL;
    if (rc == ERR_OK && name == NULL)
        rc = err_nomem(err);
    if (rc == ERR_OK)
        rc = job_say(st, j, JOB_INFO, err, "New fine-tuned model created: %s (%s@%d%s)", name,
                     ret->name, ret->version, ret->live ? ", live" : "");
    if (rc == ERR_OK)
        rc = job_say(st, j, JOB_INFO, err, "The job has successfully completed");
    free(name);
    return rc;
}

int store_job_succeed(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                      const struct adapter_src *adapter, const struct store_quality *q,
                      bool activate, struct store_version *ret, struct err *err)
{
    struct store_job j = { .id = 0 };
    const struct store_put_opts o = { .activate = activate, .origin = "train",
                                      .base_hash_hex = j.base_hash_hex };
    struct version_put p = { .src = adapter, .o = &o, .quality = q };
    struct store_version v = { .id = 0 };
    int rc = store_begin(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, succeed(st, job, claim, r, &p, &j, &v, err), err);
    store_job_free(&j);
    if (rc != ERR_OK) {
        store_version_free(&v);
        return rc;
    }
    store_shrink(st);
    *ret = v;
    return ERR_OK;
}

/* --- the others ------------------------------------------------------------------------------ */
struct ending {
    enum job_status to;
    const char *code, *message, *param; /* of a failure */
    const char *reason;                 /* of a pause */
};

static int set_error(struct store *st, int64_t job, const struct ending *e, struct err *err)
{
    struct sql q = sql_open(st,
                            "UPDATE job SET error_code = ?, error_message = ?, error_param = ?"
                            " WHERE id = ?", err);
    sql_text(&q, e->code);
    sql_text(&q, e->message);
    sql_text(&q, e->param);
    sql_int(&q, job);
    return sql_run(&q);
}

static int set_reason(struct store *st, int64_t job, const char *reason, struct err *err)
{
    struct sql q = sql_open(st, "UPDATE job SET pause_reason = ? WHERE id = ?", err);
    sql_text(&q, reason);
    sql_int(&q, job);
    return sql_run(&q);
}

static int say_end(struct store *st, const struct store_job *j, const struct ending *e,
                   struct err *err)
{
    switch (j->status) {
    case JOB_FAILED:
        return job_say(st, j, JOB_ERROR, err, "The job failed: %s", e->message);
    case JOB_CANCELLED:
        return job_say(st, j, JOB_INFO, err, "The job was cancelled");
    case JOB_PAUSED:
        if (e->reason != NULL)
            return job_say(st, j, JOB_WARN, err, "The job was paused: %s", e->reason);
        return job_say(st, j, JOB_INFO, err, "The job was paused");
    default:
        return job_say(st, j, JOB_INFO, err, "The server is stopping: the job goes on when it runs"
                       " again");
    }
}

static int end_in(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                  const struct ending *e, struct err *err)
{
    struct store_job j = { .id = 0 };
    int rc = leave(st, job, claim, r, e->to, &j, err);
    if (rc == ERR_OK && e->to == JOB_FAILED)
        rc = set_error(st, job, e, err);
    if (rc == ERR_OK && e->reason != NULL && j.status == JOB_PAUSED)
        rc = set_reason(st, job, e->reason, err);
    if (rc == ERR_OK)
        rc = say_end(st, &j, e, err);
    store_job_free(&j);
    return rc;
}

static int end_job(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                   const struct ending *e, struct err *err)
{
    int rc = store_begin(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, end_in(st, job, claim, r, e, err), err);
    if (rc == ERR_OK && job_ended(e->to))
        store_shrink(st);
    return rc;
}

int store_job_fail(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                   const char *code, const char *message, const char *param, struct err *err)
{
    const struct ending e = { JOB_FAILED, code, message, param, NULL };
    return end_job(st, job, claim, r, &e, err);
}

int store_job_cancelled(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                        struct err *err)
{
    const struct ending e = { .to = JOB_CANCELLED };
    return end_job(st, job, claim, r, &e, err);
}

int store_job_paused(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                     const char *reason, struct err *err)
{
    const struct ending e = { .to = JOB_PAUSED, .reason = reason };
    return end_job(st, job, claim, r, &e, err);
}

int store_job_release(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                      struct err *err)
{
    const struct ending e = { .to = JOB_QUEUED };
    return end_job(st, job, claim, r, &e, err);
}
