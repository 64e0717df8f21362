/* job_read.c - what a run left: events, metrics, ranks, checkpoints. */
#include "store/store_int.h"

#include <stdlib.h>
#include <string.h>

const char *store_module_name(int module)
{
    return module >= 0 && module < MOD_SLOTS ? tensors_module_name(module) : NULL;
}

/* `list` with room for one more of `size` bytes; out of memory sticks in q and changes nothing. */
static void *grow(struct sql *q, void *list, size_t n, size_t *cap, size_t size)
{
    if (n < *cap)
        return list;
    const size_t more = *cap ? *cap * 2 : 32;
    void *p = realloc(list, more * size);
    if (p == NULL) {
        q->rc = SQLITE_NOMEM;
        return list;
    }
    *cap = more;
    return p;
}

/* The next row, with room for it at list[n]. */
#define NEXT_ROW(q, list, n, cap)                                                                \
    (sql_step(q) == 1 && ((list) = grow(q, list, n, &(cap), sizeof *(list)), (q)->rc == SQLITE_OK))

/* Ends a list of plain rows, which is gone if the query failed. */
static int done(struct sql *q, void *list)
{
    int rc = sql_close(q);
    if (rc != ERR_OK)
        free(list);
    return rc;
}

static int64_t limit_of(int limit) { return limit > 0 ? limit : -1; }

/* --- events ---------------------------------------------------------------------------------- */
void store_events_free(struct store_event *e, size_t n)
{
    for (size_t i = 0; e != NULL && i < n; i++) {
        free(e[i].message);
        free(e[i].data);
    }
    free(e);
}

static void event_row(struct sql *q, struct store_event *e)
{
    const char *level = sql_col_text(q, 2), *type = sql_col_text(q, 3);
    *e = (struct store_event){ .seq = sql_col_int(q, 0), .at_ms = sql_col_int(q, 1),
                               .level = JOB_INFO };
    if (level != NULL && strcmp(level, "warn") == 0)
        e->level = JOB_WARN;
    if (level != NULL && strcmp(level, "error") == 0)
        e->level = JOB_ERROR;
    e->metrics = type != NULL && strcmp(type, "metrics") == 0;
    e->message = sql_col_dup(q, 4);
    e->data = sql_col_dup(q, 5);
}

static int event_rows(struct sql *q, struct store_event **ret, size_t *ret_n)
{
    struct store_event *list = NULL;
    size_t n = 0, cap = 0;
    while (NEXT_ROW(q, list, n, cap))
        event_row(q, &list[n++]);
    int rc = sql_close(q);
    if (rc != ERR_OK) {
        store_events_free(list, n);
        return rc;
    }
    *ret = list;
    *ret_n = n;
    return ERR_OK;
}

#define SELECT_EVENT "SELECT seq, at_ms, level, type, message, data FROM job_event WHERE job_id = ? "

int store_event_list(struct store *st, int64_t job, int64_t before, int limit,
                     struct store_event **ret, size_t *ret_n, struct err *err)
{
    struct sql q = sql_open(st, SELECT_EVENT "AND seq < ? ORDER BY seq DESC LIMIT ?", err);
    sql_int(&q, job);
    sql_int(&q, before > 0 ? before : INT64_MAX);
    sql_int(&q, limit_of(limit));
    return event_rows(&q, ret, ret_n);
}

static int tail(struct store *st, int64_t job, int64_t after, int limit, struct store_event **ret,
                size_t *ret_n, enum job_status *ret_status, struct err *err)
{
    struct store_job j;
    int rc = job_by_id(st, job, &j, err);
    if (rc == ERR_NOT_FOUND)
        return err_set_slug(err, rc, "job_not_found", NULL, "the fine-tuning job was deleted");
    if (rc != ERR_OK)
        return rc;
    *ret_status = j.status;
    store_job_free(&j);
    struct sql q = sql_open(st, SELECT_EVENT "AND seq > ? ORDER BY seq LIMIT ?", err);
    sql_int(&q, job);
    sql_int(&q, after);
    sql_int(&q, limit_of(limit));
    return event_rows(&q, ret, ret_n);
}

int store_event_tail(struct store *st, int64_t job, int64_t after, int limit,
                     struct store_event **ret, size_t *ret_n, enum job_status *ret_status,
                     struct err *err)
{
    int rc = store_begin_read(st, err);
    if (rc != ERR_OK)
        return rc;
    return store_end(st, tail(st, job, after, limit, ret, ret_n, ret_status, err), err);
}

/* --- metrics --------------------------------------------------------------------------------- */
static int64_t int_or_none(struct sql *q, int i)
{
    return sqlite3_column_type(q->stmt, i) == SQLITE_NULL ? -1 : sql_col_int(q, i);
}

static void metric_row(struct sql *q, struct store_metric *m)
{
    *m = (struct store_metric){
        .step = sql_col_int(q, 0), .epoch = sql_col_nan(q, 1), .loss = sql_col_nan(q, 2),
        .valid_loss = sql_col_nan(q, 3), .accuracy = sql_col_nan(q, 4),
        .valid_accuracy = sql_col_nan(q, 5), .lr = sql_col_nan(q, 6),
        .grad_norm = sql_col_nan(q, 7), .tokens_per_s = sql_col_nan(q, 8),
        .tokens = int_or_none(q, 9), .targets = int_or_none(q, 10), .orth = sql_col_nan(q, 11),
        .threshold = sql_col_nan(q, 12), .budget = int_or_none(q, 13), .kept = int_or_none(q, 14),
    };
}

int store_metric_list(struct store *st, int64_t job, int64_t since, int limit,
                      struct store_metric **ret, size_t *ret_n, struct err *err)
{
    struct store_metric *list = NULL;
    size_t n = 0, cap = 0;
    struct sql q = sql_open(st,
                            "SELECT step, epoch, loss, valid_loss, accuracy, valid_accuracy, lr,"
                            " grad_norm, tokens_per_s, tokens, targets, orth, threshold, budget,"
                            " kept FROM job_metric WHERE job_id = ? AND step > ? ORDER BY step"
                            " LIMIT ?", err);
    sql_int(&q, job);
    sql_int(&q, since);
    sql_int(&q, limit_of(limit));
    while (NEXT_ROW(&q, list, n, cap))
        metric_row(&q, &list[n++]);
    int rc = done(&q, list);
    if (rc == ERR_OK) {
        *ret = list;
        *ret_n = n;
    }
    return rc;
}

int store_rank_list(struct store *st, int64_t job, int64_t since, int64_t until,
                    struct store_rank **ret, size_t *ret_n, struct err *err)
{
    struct store_rank *list = NULL;
    size_t n = 0, cap = 0;
    struct sql q = sql_open(st,
                            "SELECT step, layer, module, rank FROM job_rank WHERE job_id = ?"
                            " AND step > ? AND step <= ? ORDER BY step, layer", err);
    sql_int(&q, job);
    sql_int(&q, since);
    sql_int(&q, until);
    while (NEXT_ROW(&q, list, n, cap)) {
        const char *name = sql_col_text(&q, 2);
        struct store_rank *r = &list[n];
        *r = (struct store_rank){ .step = sql_col_int(&q, 0), .layer = (int)sql_col_int(&q, 1),
                                  .rank = (int)sql_col_int(&q, 3) };
        n += name != NULL && tensors_module_parse(name, &r->module);
    }
    int rc = done(&q, list);
    if (rc == ERR_OK) {
        *ret = list;
        *ret_n = n;
    }
    return rc;
}

int store_checkpoint_list(struct store *st, int64_t job, int64_t before, int limit,
                          struct store_checkpoint **ret, size_t *ret_n, struct err *err)
{
    struct store_checkpoint *list = NULL;
    size_t n = 0, cap = 0;
    struct sql q = sql_open(st,
                            "SELECT step, created_ms, version_id, train_loss, train_accuracy,"
                            " valid_loss, valid_accuracy FROM job_checkpoint WHERE job_id = ?"
                            " AND step < ? ORDER BY step DESC LIMIT ?", err);
    sql_int(&q, job);
    sql_int(&q, before > 0 ? before : INT64_MAX);
    sql_int(&q, limit_of(limit));
    while (NEXT_ROW(&q, list, n, cap))
        list[n++] = (struct store_checkpoint){
            .step = sql_col_int(&q, 0), .created_ms = sql_col_int(&q, 1),
            .version_id = sql_col_int(&q, 2), .train_loss = sql_col_nan(&q, 3),
            .train_accuracy = sql_col_nan(&q, 4), .valid_loss = sql_col_nan(&q, 5),
            .valid_accuracy = sql_col_nan(&q, 6),
        };
    int rc = done(&q, list);
    if (rc == ERR_OK) {
        *ret = list;
        *ret_n = n;
    }
    return rc;
}
