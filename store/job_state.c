/* job_state.c - checkpoints: the resumable state, and adapters to be served.
 *
 * The state's bytes go in first, a few rows per transaction, under the next generation; the last
 * transaction makes that generation the job's, together with the step, the events up to it and the
 * servable adapter.  Rows of another generation are nobody's: the next checkpoint removes them. */
#include "store/store_int.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "engine/util.h"

/* Where the newest state is. */
struct state_at {
    int64_t gen, step, bytes; /* step -1: there is none */
    uint8_t hash[32];
};

static int state_at(struct store *st, int64_t job, struct state_at *ret, struct err *err)
{
    *ret = (struct state_at){ .step = -1 };
    struct sql q = sql_open(st,
                            "SELECT state_gen, coalesce(state_step, -1), coalesce(state_bytes, 0),"
                            " state_hash FROM job WHERE id = ?", err);
    sql_int(&q, job);
    if (sql_step(&q) == 1) {
        size_t len;
        ret->gen = sql_col_int(&q, 0);
        ret->step = sql_col_int(&q, 1);
        ret->bytes = sql_col_int(&q, 2);
        const void *hash = sql_col_blob(&q, 3, &len);
        if (hash != NULL && len == sizeof ret->hash)
            memcpy(ret->hash, hash, len);
    }
    return sql_close(&q);
}

/* Some of the rows of other generations than the job's; *ret_more false: that was all.  A few at a
 * time, for other writers' sake. */
static int drop_some(struct store *st, int64_t job, bool *ret_more, struct err *err)
{
    struct sql q = sql_open(st,
                            "DELETE FROM job_state_chunk WHERE id IN (SELECT c.id FROM"
                            " job_state_chunk c JOIN job j ON j.id = c.job_id WHERE j.id = ?"
                            " AND c.gen <> j.state_gen LIMIT ?)", err);
    sql_int(&q, job);
    sql_int(&q, CHUNKS_PER_COMMIT);
    int rc = sql_run(&q);
    *ret_more = rc == ERR_OK && sqlite3_changes(st->db) == CHUNKS_PER_COMMIT;
    return rc;
}

static int drop_others(struct store *st, int64_t job, struct err *err)
{
    bool more = true;
    int rc = ERR_OK;
    while (more && rc == ERR_OK)
        rc = drop_some(st, job, &more, err);
    return rc;
}

int job_drop_state(struct store *st, int64_t job, struct err *err)
{
    struct sql q = sql_open(st, "DELETE FROM job_state_chunk WHERE job_id = ?", err);
    sql_int(&q, job);
    int rc = sql_run(&q);
    if (rc != ERR_OK)
        return rc;
    q = sql_open(st,
                 "UPDATE job SET state_step = NULL, state_bytes = NULL, state_hash = NULL"
                 " WHERE id = ?", err);
    sql_int(&q, job);
    return sql_run(&q);
}

/* --- servable checkpoints -------------------------------------------------------------------- */
/* Versions of the hidden adapter that no checkpoint is any more. */
static int drop_unused(struct store *st, int64_t job, struct err *err)
{
    struct sql q = sql_open(st,
                            "DELETE FROM version WHERE adapter_id = (SELECT id FROM adapter WHERE"
                            " job_id = ?1) AND NOT EXISTS (SELECT 1 FROM job_checkpoint c"
                            " WHERE c.version_id = version.id)", err);
    sql_int(&q, job);
    return sql_run(&q);
}

/* The same step again (or a later one, from a run that was lost) takes the place of what is there. */
static int drop_from(struct store *st, int64_t job, int64_t step, struct err *err)
{
    struct sql q = sql_open(st, "DELETE FROM job_checkpoint WHERE job_id = ? AND step >= ?", err);
    sql_int(&q, job);
    sql_int(&q, step);
    int rc = sql_run(&q);
    return rc != ERR_OK ? rc : drop_unused(st, job, err);
}

static int drop_old(struct store *st, int64_t job, int keep, struct err *err)
{
    if (keep <= 0)
        return ERR_OK;
    struct sql q = sql_open(st,
                            "DELETE FROM job_checkpoint WHERE job_id = ?1 AND step NOT IN (SELECT"
                            " step FROM job_checkpoint WHERE job_id = ?1 ORDER BY step DESC LIMIT"
                            " ?2)", err);
    sql_int(&q, job);
    sql_int(&q, keep);
    int rc = sql_run(&q);
    return rc != ERR_OK ? rc : drop_unused(st, job, err);
}

static int put_row(struct store *st, const struct store_job *j,
                   const struct store_checkpoint_new *c, int64_t version, struct err *err)
{
    struct sql q = sql_open(st,
                            "INSERT INTO job_checkpoint (tenant_id, job_id, step, version_id,"
                            " created_ms, train_loss, train_accuracy, valid_loss, valid_accuracy)"
                            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", err);
    sql_int(&q, j->tenant);
    sql_int(&q, j->id);
    sql_int(&q, c->step);
    sql_int(&q, version);
    sql_int(&q, now_unix_ms());
    sql_real(&q, c->train_loss);
    sql_real(&q, c->train_accuracy);
    sql_real(&q, c->valid_loss);
    sql_real(&q, c->valid_accuracy);
    return sql_run(&q);
}

static int put_servable(struct store *st, const struct store_job *j, struct version_put *p,
                        const struct store_checkpoint_new *c, struct err *err)
{
    struct store_version v = { .id = 0 };
    bool is_new;
    int rc = drop_from(st, j->id, c->step, err);
    if (rc == ERR_OK)
        rc = version_put(st, p, &v, &is_new, err);
    if (rc == ERR_OK)
        rc = put_row(st, j, c, v.id, err);
    if (rc == ERR_OK)
        rc = drop_old(st, j->id, c->keep, err);
    store_version_free(&v);
    return rc;
}

/* --- the checkpoint -------------------------------------------------------------------------- */
/* The last transaction. */
static int put_all(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                   const struct store_checkpoint_new *c, struct version_put *p,
                   const struct state_at *at, struct err *err)
{
    struct store_job j;
    int rc = job_claimed(st, job, claim, &j, err);
    if (rc != ERR_OK)
        return rc;
    struct sql q = sql_open(st,
                            "UPDATE job SET cuts = 0, state_gen = ?, state_step = ?, state_bytes = ?,"
                            " state_hash = ? WHERE id = ?", err);
    sql_int(&q, at->gen);
    sql_int(&q, at->step);
    sql_int(&q, at->bytes);
    sql_blob(&q, at->hash, sizeof at->hash);
    sql_int(&q, job);
    rc = sql_run(&q);
    if (rc == ERR_OK && c->adapter != NULL)
        rc = put_servable(st, &j, p, c, err);
    if (rc == ERR_OK)
        rc = job_report(st, &j, r, err);
    store_job_free(&j);
    return rc;
}

/* Name and content of the servable version, before anything is written. */
static int prepare(struct store *st, int64_t job, int64_t claim,
                   const struct store_checkpoint_new *c, struct store_put_opts *o,
                   struct version_put *p, struct store_job *ret_job, struct err *err)
{
    int rc = job_claimed(st, job, claim, ret_job, err);
    if (rc != ERR_OK || c->adapter == NULL)
        return rc;
    *o = (struct store_put_opts){ .base_hash_hex = ret_job->base_hash_hex, .origin = "checkpoint" };
    *p = (struct version_put){ .tenant = ret_job->tenant, .src = c->adapter, .o = o, .job = job,
                               .parent = ret_job->from_version, .data_hash = ret_job->data_hash,
                               .checkpoint = (int)c->step };
    return version_put_check(p, err);
}

int store_job_checkpoint(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                         const struct store_checkpoint_new *c, struct err *err)
{
    struct store_job j = { .id = 0 };
    struct store_put_opts o;
    struct version_put p = { .tenant = 0 };
    struct state_at at;
    char name[STORE_NAME_MAX + 1];
    if (c->step < 1 || c->step > INT_MAX || c->state_len == 0)
        return err_set(err, ERR_INTERNAL, "a checkpoint at step %lld with %zu bytes of state",
                       (long long)c->step, c->state_len);
    int rc = prepare(st, job, claim, c, &o, &p, &j, err);
    if (rc == ERR_OK)
        rc = drop_others(st, job, err);
    if (rc == ERR_OK)
        rc = state_at(st, job, &at, err);
    if (rc == ERR_OK) {
        snprintf(name, sizeof name, "%s:ckpt", j.ref);
        p.name = name;
        at.gen++;
        at.step = c->step;
        at.bytes = (int64_t)c->state_len;
        sha256_of(c->state, c->state_len, at.hash);
        const struct chunk_dest d = {
            .sql = "INSERT INTO job_state_chunk (tenant_id, job_id, gen, chunk, data)"
                   " VALUES (?, ?, ?, ?, ?)",
            .tenant = j.tenant, .owner = job, .gen = at.gen,
        };
        rc = chunks_put(st, &d, c->state, c->state_len, err);
        if (rc == ERR_OK)
            rc = store_begin(st, err);
        if (rc == ERR_OK)
            rc = store_end(st, put_all(st, job, claim, r, c, &p, &at, err), err);
        /* The state before, or, after a failure, the bytes of this one.  What stays is removed by
         * the next checkpoint. */
        drop_others(st, job, NULL);
        store_shrink(st);
    }
    store_job_free(&j);
    return rc;
}

/* --- back again ------------------------------------------------------------------------------ */
static int add_to_buf(void *ud, const void *data, size_t len, struct err *err)
{
    return buf_add(ud, data, len) == ERR_OK ? ERR_OK : err_nomem(err);
}

static int read_state(struct store *st, int64_t job, struct buf *b, int64_t *ret_step,
                      struct err *err)
{
    struct state_at at;
    int rc = state_at(st, job, &at, err);
    if (rc != ERR_OK)
        return rc;
    if (at.step < 0)
        return err_set(err, ERR_NOT_FOUND, "job %lld has no state to go on from", (long long)job);
    char what[64];
    snprintf(what, sizeof what, "the state of job %lld", (long long)job);
    buf_init(b, (size_t)at.bytes + 1);
    struct sql q = sql_open(st,
                            "SELECT chunk, data FROM job_state_chunk WHERE job_id = ? AND gen = ?"
                            " ORDER BY chunk", err);
    sql_int(&q, job);
    sql_int(&q, at.gen);
    *ret_step = at.step;
    return chunks_get(&q, what, at.bytes, at.hash, add_to_buf, b);
}

int store_job_state(struct store *st, int64_t job, char **ret, size_t *ret_len, int64_t *ret_step,
                    struct err *err)
{
    struct buf b;
    int64_t step = 0;
    buf_init(&b, 0);
    int rc = store_begin_read(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, read_state(st, job, &b, &step, err), err);
    if (rc != ERR_OK) {
        buf_free(&b);
        return rc;
    }
    *ret_len = b.len;
    *ret_step = step;
    *ret = buf_take(&b);
    return ERR_OK;
}
