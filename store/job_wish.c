/* job_wish.c - what clients may wish of a job: cancel, pause, resume, delete.
 *
 * Nobody is running a queued or paused job, so it changes at once.  A running one belongs to the
 * runner: the wish is left in `wanted`, which the runner asks for often. */
#include "store/store_int.h"

static int set_wanted(struct store *st, int64_t job, enum job_wanted w, struct err *err)
{
    struct sql q = sql_open(st, "UPDATE job SET wanted = ? WHERE id = ?", err);
    sql_text(&q, w == JOB_CANCEL ? "cancel" : w == JOB_PAUSE ? "pause" : "run");
    sql_int(&q, job);
    return sql_run(&q);
}

static int end_by_wish(struct store *st, const struct store_job *j, struct err *err)
{
    int rc = job_set_status(st, j->id, JOB_CANCELLED, err);
    if (rc == ERR_OK)
        rc = job_drop_state(st, j->id, err);
    if (rc == ERR_OK)
        rc = job_say(st, j, JOB_INFO, err, "The job was cancelled");
    return rc;
}

static int wish_cancel(struct store *st, const struct store_job *j, struct err *err)
{
    switch (j->status) {
    case JOB_QUEUED:
    case JOB_PAUSED:
        return end_by_wish(st, j, err);
    case JOB_VALIDATING:
    case JOB_RUNNING:
        return set_wanted(st, j->id, JOB_CANCEL, err);
    case JOB_CANCELLED:
        return ERR_OK;
    default:
        return err_set_slug(err, ERR_CONFLICT, "job_ended", NULL, "%s has %s: there is nothing to"
                            " cancel", j->ref, job_status_name(j->status));
    }
}

static int wish_pause(struct store *st, const struct store_job *j, struct err *err)
{
    int rc;
    switch (j->status) {
    case JOB_QUEUED:
        rc = job_set_status(st, j->id, JOB_PAUSED, err);
        return rc != ERR_OK ? rc : job_say(st, j, JOB_INFO, err, "The job was paused");
    case JOB_PAUSED:
        return ERR_OK;
    case JOB_VALIDATING:
    case JOB_RUNNING:
        if (j->wanted == JOB_CANCEL)
            return err_set_slug(err, ERR_CONFLICT, "job_ended", NULL, "%s is being cancelled",
                                j->ref);
        return set_wanted(st, j->id, JOB_PAUSE, err);
    default:
        return err_set_slug(err, ERR_CONFLICT, "job_ended", NULL, "%s has %s: it cannot be paused",
                            j->ref, job_status_name(j->status));
    }
}

static int wish_resume(struct store *st, const struct store_job *j, struct err *err)
{
    int rc;
    switch (j->status) {
    case JOB_QUEUED:
        return ERR_OK;
    case JOB_PAUSED:
        rc = job_set_status(st, j->id, JOB_QUEUED, err);
        if (rc != ERR_OK)
            return rc;
        if (j->state_step < 0)
            return job_say(st, j, JOB_INFO, err, "The job was resumed");
        return job_say(st, j, JOB_INFO, err, "The job was resumed: it goes on after step %lld",
                       (long long)j->state_step);
    case JOB_VALIDATING:
    case JOB_RUNNING:
        if (j->wanted == JOB_CANCEL)
            return err_set_slug(err, ERR_CONFLICT, "job_ended", NULL, "%s is being cancelled",
                                j->ref);
        return set_wanted(st, j->id, JOB_GO_ON, err);
    default:
        return err_set_slug(err, ERR_CONFLICT, "job_ended", NULL, "%s has %s: it cannot be resumed",
                            j->ref, job_status_name(j->status));
    }
}

static int wish_in(struct store *st, int64_t tenant, const char *ref, const char *action,
                   int (*wish)(struct store *, const struct store_job *, struct err *),
                   struct store_job *ret, struct err *err)
{
    struct store_job j;
    int rc = store_job_get(st, tenant, ref, &j, err);
    if (rc != ERR_OK)
        return rc;
    rc = wish(st, &j, err);
    if (rc == ERR_OK)
        rc = store_audit(st, tenant, action, err, "%s", ref);
    store_job_free(&j);
    if (rc == ERR_OK)
        rc = store_job_get(st, tenant, ref, ret, err);
    return rc;
}

static int wish_do(struct store *st, int64_t tenant, const char *ref, const char *action,
                   int (*wish)(struct store *, const struct store_job *, struct err *),
                   struct store_job *ret, struct err *err)
{
    struct store_job j = { .id = 0 };
    int rc = store_begin(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, wish_in(st, tenant, ref, action, wish, &j, err), err);
    if (rc == ERR_OK)
        *ret = j;
    else
        store_job_free(&j);
    return rc;
}

int store_job_cancel(struct store *st, int64_t tenant, const char *ref, struct store_job *ret,
                     struct err *err)
{
    return wish_do(st, tenant, ref, "job.cancel", wish_cancel, ret, err);
}

int store_job_pause(struct store *st, int64_t tenant, const char *ref, struct store_job *ret,
                    struct err *err)
{
    return wish_do(st, tenant, ref, "job.pause", wish_pause, ret, err);
}

int store_job_resume(struct store *st, int64_t tenant, const char *ref, struct store_job *ret,
                     struct err *err)
{
    return wish_do(st, tenant, ref, "job.resume", wish_resume, ret, err);
}

static int delete_job(struct store *st, int64_t tenant, const char *ref, struct err *err)
{
    struct store_job j;
    int rc = store_job_get(st, tenant, ref, &j, err);
    if (rc != ERR_OK)
        return rc;
    if (!job_ended(j.status))
        rc = err_set_slug(err, ERR_CONFLICT, "job_active", NULL, "%s is %s: cancel it first", ref,
                          job_status_name(j.status));
    if (rc == ERR_OK) {
        struct sql q = sql_open(st, "DELETE FROM job WHERE id = ?", err);
        sql_int(&q, j.id);
        rc = sql_run(&q);
    }
    if (rc == ERR_OK)
        rc = store_audit(st, tenant, "job.delete", err, "%s", ref);
    store_job_free(&j);
    return rc;
}

int store_job_delete(struct store *st, int64_t tenant, const char *ref, struct err *err)
{
    int rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    rc = store_end(st, delete_job(st, tenant, ref, err), err);
    if (rc == ERR_OK)
        store_shrink(st);
    return rc;
}
