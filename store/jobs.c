/* jobs.c - fine-tuning jobs: rows, creation, lists. */
#include "store/store_int.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "engine/util.h"

static const char *const status_names[] = {
    [JOB_QUEUED] = "queued", [JOB_VALIDATING] = "validating_files", [JOB_RUNNING] = "running",
    [JOB_PAUSED] = "paused", [JOB_SUCCEEDED] = "succeeded", [JOB_FAILED] = "failed",
    [JOB_CANCELLED] = "cancelled",
};
static const char *const wanted_names[] = { [JOB_GO_ON] = "run", [JOB_PAUSE] = "pause",
                                            [JOB_CANCEL] = "cancel" };

const char *job_status_name(enum job_status s) { return status_names[s]; }

/* Index of `name`, or 0. */
static int name_index(const char *const *names, int n, const char *name)
{
    for (int i = 0; i < n && name != NULL; i++)
        if (strcmp(names[i], name) == 0)
            return i;
    return 0;
}

void store_job_free(struct store_job *j)
{
    if (j == NULL)
        return;
    free(j->model);
    free(j->base_name);
    free(j->from_ref);
    free(j->params);
    free(j->method);
    free(j->hyperparameters);
    free(j->metadata);
    free(j->activate_if);
    free(j->error_code);
    free(j->error_message);
    free(j->error_param);
    free(j->pause_reason);
    *j = (struct store_job){ .id = 0 };
}

void store_jobs_free(struct store_job *j, size_t n)
{
    for (size_t i = 0; j != NULL && i < n; i++)
        store_job_free(&j[i]);
    free(j);
}

char *store_job_model_name(const struct store_job *j, int64_t step)
{
    char *name = NULL, tail[40] = "";
    if (step >= 0)
        snprintf(tail, sizeof tail, ":ckpt-step-%lld", (long long)step);
    return asprintf(&name, "ft:%s:%s:%s:%s%s", j->base_name, j->tenant_name, j->name,
                    j->ref + strlen("ftjob-"), tail) < 0 ? NULL : name;
}

/* --- rows ------------------------------------------------------------------------------------ */
static void hash_col(struct sql *q, int i, uint8_t ret[32])
{
    size_t len;
    const void *p = sql_col_blob(q, i, &len);
    memset(ret, 0, 32);
    if (p != NULL && len == 32)
        memcpy(ret, p, 32);
}

static void job_row(struct sql *q, struct store_job *j)
{
    uint8_t base[32];
    *j = (struct store_job){
        .id = sql_col_int(q, 0), .tenant = sql_col_int(q, 1),
        .status = (enum job_status)name_index(status_names, 7, sql_col_text(q, 4)),
        .wanted = (enum job_wanted)name_index(wanted_names, 3, sql_col_text(q, 5)),
        .from_version = sql_col_int(q, 10), .seed = sql_col_int(q, 15),
        .activate = sql_col_int(q, 20) != 0, .created_ms = sql_col_int(q, 22),
        .started_ms = sql_col_int(q, 23), .finished_ms = sql_col_int(q, 24),
        .step = sql_col_int(q, 25), .steps = sql_col_int(q, 26),
        .trained_tokens = sql_col_int(q, 27), .seconds_per_step = sql_col_real(q, 28),
        .result_version = sql_col_int(q, 33), .result_number = (int)sql_col_int(q, 34),
        .claim = sql_col_int(q, 35), .state_step = sql_col_int(q, 36),
    };
    sql_col_copy(q, 2, j->ref, sizeof j->ref);
    sql_col_copy(q, 3, j->tenant_name, sizeof j->tenant_name);
    j->model = sql_col_dup(q, 6);
    j->base_name = sql_col_dup(q, 7);
    hash_col(q, 8, base);
    hex32(base, j->base_hash_hex);
    sql_col_copy(q, 9, j->name, sizeof j->name);
    j->from_ref = sql_col_dup(q, 11);
    sql_col_copy(q, 12, j->training_file, sizeof j->training_file);
    sql_col_copy(q, 13, j->validation_file, sizeof j->validation_file);
    hash_col(q, 14, j->data_hash);
    j->params = sql_col_dup(q, 16);
    j->method = sql_col_dup(q, 17);
    j->hyperparameters = sql_col_dup(q, 18);
    j->metadata = sql_col_dup(q, 19);
    j->activate_if = sql_col_dup(q, 21);
    j->error_code = sql_col_dup(q, 29);
    j->error_message = sql_col_dup(q, 30);
    j->error_param = sql_col_dup(q, 31);
    j->pause_reason = sql_col_dup(q, 32);
}

int job_one(struct sql *q, struct store_job *ret)
{
    struct store_job j = { .id = 0 };
    const int row = sql_step(q);
    if (row == 1)
        job_row(q, &j);
    int rc = sql_close(q);
    if (rc == ERR_OK && row == 0)
        rc = ERR_NOT_FOUND;
    if (rc == ERR_OK)
        *ret = j;
    else
        store_job_free(&j);
    return rc;
}

int job_by_id(struct store *st, int64_t id, struct store_job *ret, struct err *err)
{
    struct sql q = sql_open(st, SELECT_JOB "WHERE j.id = ?", err);
    sql_int(&q, id);
    return job_one(&q, ret);
}

int store_job_get(struct store *st, int64_t tenant, const char *ref, struct store_job *ret,
                  struct err *err)
{
    struct sql q = sql_open(st, SELECT_JOB "WHERE j.tenant_id = ? AND j.ref = ?", err);
    sql_int(&q, tenant);
    sql_text(&q, ref);
    int rc = job_one(&q, ret);
    if (rc == ERR_NOT_FOUND)
        err_set_slug(err, rc, "job_not_found", "fine_tuning_job_id",
                     "there is no fine-tuning job %.100s", ref);
    return rc;
}

/* --- events ---------------------------------------------------------------------------------- */
int job_event(struct store *st, int64_t tenant, int64_t job, const struct store_event_new *e,
              struct err *err)
{
    static const char *const levels[] = { "info", "warn", "error" };
    struct sql q = sql_open(st,
                            "INSERT INTO job_event (tenant_id, job_id, seq, at_ms, level, type, step,"
                            " message, data) VALUES (?1, ?2, (SELECT coalesce(max(seq), 0) + 1"
                            " FROM job_event WHERE job_id = ?2), ?3, ?4, ?5, ?6, ?7, ?8)"
                            " ON CONFLICT (job_id, step) WHERE step IS NOT NULL DO NOTHING", err);
    sql_int(&q, tenant);
    sql_int(&q, job);
    sql_int(&q, now_unix_ms());
    sql_text(&q, levels[e->level]);
    sql_text(&q, e->metrics ? "metrics" : "message");
    if (e->metrics)
        sql_int(&q, e->step);
    else
        sql_null(&q);
    sql_text(&q, e->message);
    sql_text(&q, e->data);
    return sql_run(&q);
}

int job_say(struct store *st, const struct store_job *j, enum job_level level, struct err *err,
            const char *fmt, ...)
{
    char text[768];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    const struct store_event_new e = { .level = level, .message = text };
    return job_event(st, j->tenant, j->id, &e, err);
}

int job_set_status(struct store *st, int64_t job, enum job_status s, struct err *err)
{
    struct sql q = sql_open(st,
                            "UPDATE job SET status = ?2, wanted = 'run', pause_reason = NULL,"
                            " finished_ms = CASE WHEN ?3 THEN ?4 END WHERE id = ?1", err);
    sql_int(&q, job);
    sql_text(&q, status_names[s]);
    sql_int(&q, job_ended(s));
    sql_int(&q, now_unix_ms());
    return sql_run(&q);
}

/* --- creation -------------------------------------------------------------------------------- */
int store_job_of_key(struct store *st, int64_t tenant, const char *key, const uint8_t hash[32],
                     struct store_job *ret, struct err *err)
{
    uint8_t had[32] = { 0 };
    int64_t id = 0;
    struct sql q = sql_open(st,
                            "SELECT id, request_hash FROM job WHERE tenant_id = ?"
                            " AND idempotency_key = ?", err);
    sql_int(&q, tenant);
    sql_text(&q, key);
    if (sql_step(&q) == 1) {
        id = sql_col_int(&q, 0);
        hash_col(&q, 1, had);
    }
    int rc = sql_close(&q);
    if (rc != ERR_OK || id == 0)
        return rc != ERR_OK ? rc : ERR_NOT_FOUND;
    if (memcmp(hash, had, sizeof had) != 0)
        return err_set_slug(err, ERR_CONFLICT, "idempotency_conflict", NULL,
                            "the Idempotency-Key \"%.80s\" was used with another request: a new job"
                            " needs a new key", key);
    return job_by_id(st, id, ret, err);
}

static int check_room(struct store *st, int64_t tenant, int max, struct err *err)
{
    if (max <= 0)
        return ERR_OK;
    struct sql q = sql_open(st,
                            "SELECT count(*) FROM job WHERE tenant_id = ? AND status IN ('queued',"
                            " 'validating_files', 'running', 'paused')", err);
    sql_int(&q, tenant);
    const int64_t n = sql_step(&q) == 1 ? sql_col_int(&q, 0) : 0;
    int rc = sql_close(&q);
    if (rc == ERR_OK && n >= max)
        rc = err_set(err, ERR_BUSY, "%lld fine-tuning jobs have not ended, which is the limit: wait"
                     " for one, or cancel one", (long long)n);
    return rc;
}

/* Each file must be there; *ret is what the first of them is. */
static int check_files(struct store *st, int64_t tenant, const struct store_job_new *n,
                       struct store_file *ret, struct err *err)
{
    static const char *const params[] = { "training_file", "validation_file", "activate_if" };
    const char *refs[] = { n->training_file, n->validation_file, n->eval_file };
    for (int i = 0; i < 3; i++) {
        struct store_file f;
        struct err why = { .code = ERR_OK };
        if (refs[i] == NULL)
            continue;
        int rc = store_file_get(st, tenant, refs[i], &f, &why);
        if (rc == ERR_NOT_FOUND) /* a fault of the request */
            return err_set_slug(err, ERR_INVALID, "invalid_file", params[i],
                                "`%s`: there is no file %.100s", params[i], refs[i]);
        if (rc != ERR_OK)
            return err_set(err, rc, "%s", why.msg);
        if (i == 0)
            *ret = f;
    }
    return ERR_OK;
}

/* "support@3" of the version that training starts from. */
static int from_name(struct store *st, int64_t tenant, int64_t version, char ret[96],
                     struct err *err)
{
    ret[0] = '\0';
    if (version == 0)
        return ERR_OK;
    struct store_version v;
    int rc = version_get(st, version, &v, err);
    if (rc != ERR_OK)
        return rc;
    if (v.tenant != tenant)
        rc = err_set(err, ERR_INTERNAL, "a job may not start from another tenant's version");
    snprintf(ret, 96, "%s@%d", v.name, v.version);
    store_version_free(&v);
    return rc;
}

static int insert(struct store *st, int64_t tenant, const struct store_job_new *n,
                  const char *ref, const struct store_file *data, const char *from, int64_t *ret_id,
                  struct err *err)
{
    uint8_t base[32];
    char name[STORE_NAME_MAX + 1];
    if (!hex32_parse(n->base_hash_hex, base))
        return err_set(err, ERR_INTERNAL, "a job needs the hash of its base");
    snprintf(name, sizeof name, "ft-%s", ref + strlen("ftjob-"));
    struct sql q = sql_open(st,
                            "INSERT INTO job (tenant_id, ref, status, model, base_name, base_hash,"
                            " adapter_name, from_version_id, from_ref, training_file,"
                            " validation_file, eval_file, data_hash, seed, params, method,"
                            " hyperparameters, metadata, activate, activate_if, idempotency_key,"
                            " request_hash, created_ms) VALUES (?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?,"
                            " ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", err);
    sql_int(&q, tenant);
    sql_text(&q, ref);
    sql_text(&q, n->model);
    sql_text(&q, n->base_name);
    sql_blob(&q, base, sizeof base);
    sql_text(&q, n->name != NULL ? n->name : name);
    sql_int_or_null(&q, n->from_version);
    sql_text(&q, from[0] != '\0' ? from : NULL);
    sql_text(&q, n->training_file);
    sql_text(&q, n->validation_file);
    sql_text(&q, n->eval_file);
    sql_blob(&q, data->hash, sizeof data->hash);
    sql_int(&q, n->seed);
    sql_text(&q, n->params);
    sql_text(&q, n->method);
    sql_text(&q, n->hyperparameters);
    sql_text(&q, n->metadata);
    sql_int(&q, n->activate);
    sql_text(&q, n->activate_if);
    sql_text(&q, n->idempotency_key);
    sql_blob(&q, n->idempotency_key != NULL ? n->request_hash : NULL, sizeof n->request_hash);
    sql_int(&q, now_unix_ms());
    int rc = sql_run(&q);
    *ret_id = sqlite3_last_insert_rowid(st->db);
    return rc;
}

static int create(struct store *st, int64_t tenant, const struct store_job_new *n,
                  struct store_job *ret, bool *ret_new, struct err *err)
{
    struct store_tenant t;
    struct store_file data = { .id = 0 };
    char ref[STORE_ID_MAX + 1], from[96] = "";
    int64_t id = 0;
    *ret_new = false;
    int rc = store_tenant_get(st, tenant, &t, err);
    if (rc == ERR_OK && n->idempotency_key != NULL) {
        rc = store_job_of_key(st, tenant, n->idempotency_key, n->request_hash, ret, err);
        if (rc != ERR_NOT_FOUND)
            return rc;
        rc = ERR_OK;
    }
    if (rc == ERR_OK)
        rc = check_room(st, tenant, n->max_active, err);
    if (rc == ERR_OK)
        rc = check_files(st, tenant, n, &data, err);
    if (rc == ERR_OK)
        rc = from_name(st, tenant, n->from_version, from, err);
    ref_make("ftjob-", ref);
    if (rc == ERR_OK)
        rc = insert(st, tenant, n, ref, &data, from, &id, err);
    if (rc == ERR_OK)
        rc = job_by_id(st, id, ret, err);
    if (rc == ERR_OK)
        rc = job_say(st, ret, JOB_INFO, err, "Created fine-tuning job: %s", ref);
    if (rc == ERR_OK)
        rc = store_audit(st, tenant, "job.create", err, "%s", ref);
    *ret_new = true;
    return rc;
}

int store_job_create(struct store *st, int64_t tenant, const struct store_job_new *n,
                     struct store_job *ret, bool *ret_new, struct err *err)
{
    struct store_job j = { .id = 0 };
    bool is_new = false;
    int rc = n->name != NULL ? store_name_check("an adapter", n->name, err) : ERR_OK;
    if (rc == ERR_OK)
        rc = store_begin(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, create(st, tenant, n, &j, &is_new, err), err);
    if (rc != ERR_OK) {
        store_job_free(&j);
        return rc;
    }
    *ret = j;
    *ret_new = is_new;
    return ERR_OK;
}

/* --- lists ----------------------------------------------------------------------------------- */
/* The filter is in the query, so that a page is a page whatever it leaves out. */
static int list_query(struct store *st, size_t nmetadata, struct sql *ret, struct err *err)
{
    struct buf b;
    buf_init(&b, 1 << 16);
    int rc = buf_puts(&b, SELECT_JOB "WHERE j.tenant_id = ? AND j.id < ?");
    for (size_t i = 0; i < nmetadata && rc == ERR_OK; i++)
        rc = buf_puts(&b, " AND EXISTS (SELECT 1 FROM json_each(j.metadata) m WHERE m.key = ?"
                      " AND m.atom = ?)");
    if (rc == ERR_OK)
        rc = buf_puts(&b, " ORDER BY j.id DESC LIMIT ?");
    if (rc == ERR_OK)
        *ret = sql_open(st, b.data, err);
    else
        rc = err_nomem(err);
    buf_free(&b);
    return rc;
}

static int list_rows(struct sql *q, struct store_job **ret, size_t *ret_n)
{
    struct store_job *list = NULL;
    size_t n = 0, cap = 0;
    while (sql_step(q) == 1) {
        if (n == cap) {
            cap = cap ? cap * 2 : 16;
            void *p = realloc(list, cap * sizeof *list);
            if (p == NULL) {
                q->rc = SQLITE_NOMEM;
                break;
            }
            list = p;
        }
        job_row(q, &list[n++]);
    }
    int rc = sql_close(q);
    if (rc != ERR_OK) {
        store_jobs_free(list, n);
        return rc;
    }
    *ret = list;
    *ret_n = n;
    return ERR_OK;
}

int store_job_list(struct store *st, int64_t tenant, const char *after, int limit,
                   const struct store_pair *metadata, size_t nmetadata, struct store_job **ret,
                   size_t *ret_n, struct err *err)
{
    int64_t from = INT64_MAX;
    int rc;
    if (after != NULL) {
        struct store_job j;
        rc = store_job_get(st, tenant, after, &j, err);
        if (rc != ERR_OK)
            return rc;
        from = j.id;
        store_job_free(&j);
    }
    struct sql q;
    rc = list_query(st, nmetadata, &q, err);
    if (rc != ERR_OK)
        return rc;
    sql_int(&q, tenant);
    sql_int(&q, from);
    for (size_t i = 0; i < nmetadata; i++) {
        sql_text(&q, metadata[i].key);
        sql_text(&q, metadata[i].value);
    }
    sql_int(&q, limit > 0 ? limit : -1);
    return list_rows(&q, ret, ret_n);
}
