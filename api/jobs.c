/* jobs.c - /v1/fine_tuning/jobs but for creation: lists, wishes, and what a run reports. */
#include "api/api_int.h"

#include <stdlib.h>
#include <string.h>

static int get_job(struct api_ctx *c, struct store_job *ret, struct err *err)
{
    return store_job_get(c->st, c->plan->tenant, c->plan->arg, ret, err);
}

/* Takes `data`; rc is what making it came to. */
static int respond(struct api_ctx *c, int rc, json_t *data, bool more, struct err *err)
{
    if (rc == ERR_OK)
        return respond_list(c, data, more, err);
    json_decref(data);
    return rc;
}

/* --- lists ----------------------------------------------------------------------------------- */
enum { PAIRS_MAX = 16, PAIR_BYTES = 2048 };

/* metadata[k]=v of the query, in memory of its own. */
struct pairs {
    struct store_pair pair[PAIRS_MAX];
    size_t n;
    char text[PAIRS_MAX][PAIR_BYTES];
    bool bad;
};

static bool take_pair(void *ud, const char *key, const char *value)
{
    struct pairs *p = ud;
    static const char head[] = "metadata[";
    const size_t len = strlen(key), nhead = sizeof head - 1;
    if (strncmp(key, head, nhead) != 0)
        return true;
    if (p->n == PAIRS_MAX || len < nhead + 2 || key[len - 1] != ']' ||
        len + strlen(value) + 2 > PAIR_BYTES) {
        p->bad = true;
        return false;
    }
    char *to = p->text[p->n];
    memcpy(to, key + nhead, len - nhead - 1);
    to[len - nhead - 1] = '\0';
    p->pair[p->n].key = to;
    to += strlen(to) + 1;
    memcpy(to, value, strlen(value) + 1);
    p->pair[p->n++].value = to;
    return true;
}

static int read_pairs(struct api_ctx *c, struct pairs **ret, struct err *err)
{
    struct pairs *p = calloc(1, sizeof *p);
    if (p == NULL)
        return err_nomem(err);
    c->req->query_each(c->req->ud, take_pair, p);
    if (p->bad) {
        free(p);
        return err_set_slug(err, ERR_INVALID, NULL, "metadata",
                            "a filter is metadata[KEY]=VALUE, at most %d of them", PAIRS_MAX);
    }
    *ret = p;
    return ERR_OK;
}

/* GET /v1/fine_tuning/jobs?after=&limit=&metadata[k]=v: newest first. */
int jobs_list(struct api_ctx *c, struct err *err)
{
    long limit = 20;
    struct pairs *p = NULL;
    struct store_job *j = NULL;
    size_t n = 0;
    int rc = query_int(c, "limit", 1, 1000, &limit, err);
    if (rc == ERR_OK)
        rc = read_pairs(c, &p, err);
    if (rc != ERR_OK)
        return rc;
    rc = store_job_list(c->st, c->plan->tenant, c->req->query(c->req->ud, "after"), (int)limit + 1,
                        p->pair, p->n, &j, &n, err);
    free(p);
    if (rc != ERR_OK)
        return rc;
    json_t *data = json_array();
    for (size_t i = 0; i < n && i < (size_t)limit; i++)
        if (json_array_append_new(data, job_json(c->api, &j[i])) != 0)
            rc = err_nomem(err);
    store_jobs_free(j, n);
    return respond(c, rc, data, n > (size_t)limit, err);
}

/* GET /v1/fine_tuning/jobs/{ref} */
int jobs_show(struct api_ctx *c, struct err *err)
{
    struct store_job j;
    int rc = get_job(c, &j, err);
    if (rc != ERR_OK)
        return rc;
    json_t *out = job_json(c->api, &j);
    store_job_free(&j);
    return resp_json(c, 200, out, err);
}

/* --- wishes ---------------------------------------------------------------------------------- */
typedef int (*wish_fn)(struct store *, int64_t, const char *, struct store_job *, struct err *);

/* POST .../{ref}/cancel, pause, resume: no body, or {}. */
static int wish(struct api_ctx *c, wish_fn fn, struct err *err)
{
    static const char *const known[] = { NULL };
    json_t *in = NULL;
    struct store_job j;
    int rc = body_json(c->req, true, &in, err);
    if (rc == ERR_OK)
        rc = json_only(in, known, err);
    json_decref(in);
    if (rc == ERR_OK)
        rc = fn(c->st, c->plan->tenant, c->plan->arg, &j, err);
    if (rc != ERR_OK)
        return rc;
    if (c->api->o.jobs_wake != NULL)
        c->api->o.jobs_wake(c->api->o.jobs_ud);
    json_t *out = job_json(c->api, &j);
    store_job_free(&j);
    return resp_json(c, 200, out, err);
}

int jobs_cancel(struct api_ctx *c, struct err *err) { return wish(c, store_job_cancel, err); }

int jobs_pause(struct api_ctx *c, struct err *err) { return wish(c, store_job_pause, err); }

int jobs_resume(struct api_ctx *c, struct err *err) { return wish(c, store_job_resume, err); }

/* DELETE /v1/fine_tuning/jobs/{ref}: ended ones; the version it made stays. */
int jobs_delete(struct api_ctx *c, struct err *err)
{
    int rc = store_job_delete(c->st, c->plan->tenant, c->plan->arg, err);
    if (rc != ERR_OK)
        return rc;
    return resp_json(c, 200, json_pack("{s:s, s:s, s:b}", "id", c->plan->arg, "object",
                                       "fine_tuning.job", "deleted", 1), err);
}

/* --- what a run reports ---------------------------------------------------------------------- */
/* ?after=ID of a list that runs from the newest down; 0: from the newest. */
static int read_after(struct api_ctx *c, const struct store_job *j, const char *prefix,
                      int64_t *ret, struct err *err)
{
    const char *after = c->req->query(c->req->ud, "after");
    *ret = 0;
    return after != NULL && after[0] != '\0' ? job_part_id(j, prefix, after, ret, err) : ERR_OK;
}

static bool wants_stream(struct api_ctx *c)
{
    const char *stream = c->req->query(c->req->ud, "stream");
    if (stream != NULL && (strcmp(stream, "true") == 0 || strcmp(stream, "1") == 0))
        return true;
    const char *accept = c->req->header(c->req->ud, "Accept");
    return accept != NULL && strstr(accept, "text/event-stream") != NULL;
}

/* Where a stream begins: after Last-Event-ID, which is what a client that lost it sends, or after
 * ?after=, or with the first event. */
static int stream_from(struct api_ctx *c, const struct store_job *j, int64_t after, struct err *err)
{
    const char *last = c->req->header(c->req->ud, "Last-Event-ID");
    if (last != NULL && last[0] != '\0') {
        const size_t len = strlen(last);
        if (len > 15 || strspn(last, "0123456789") != len)
            return err_set(err, ERR_INVALID, "Last-Event-ID must be the number of an event, not "
                           "\"%.40s\"", last);
        after = strtoll(last, NULL, 10);
    }
    return job_watch_stream(c, j, after, err);
}

static int list_events(struct api_ctx *c, const struct store_job *j, int64_t after, long limit,
                       struct err *err)
{
    struct store_event *e = NULL;
    size_t n = 0;
    int rc = store_event_list(c->st, j->id, after, (int)limit + 1, &e, &n, err);
    if (rc != ERR_OK)
        return rc;
    json_t *data = json_array();
    for (size_t i = 0; i < n && i < (size_t)limit; i++)
        if (json_array_append_new(data, job_event_json(j, &e[i])) != 0)
            rc = err_nomem(err);
    store_events_free(e, n);
    return respond(c, rc, data, n > (size_t)limit, err);
}

/* GET .../{ref}/events?after=&limit=: newest first; ?stream=true: oldest first, as they happen. */
int jobs_events(struct api_ctx *c, struct err *err)
{
    long limit = 20;
    int64_t after = 0;
    struct store_job j;
    int rc = get_job(c, &j, err);
    if (rc != ERR_OK)
        return rc;
    rc = query_int(c, "limit", 1, 1000, &limit, err);
    if (rc == ERR_OK)
        rc = read_after(c, &j, "ftevent-", &after, err);
    if (rc == ERR_OK)
        rc = wants_stream(c) ? stream_from(c, &j, after, err)
                             : list_events(c, &j, after, limit, err);
    store_job_free(&j);
    return rc;
}

static int list_checkpoints(struct api_ctx *c, const struct store_job *j, struct err *err)
{
    long limit = 10;
    int64_t after = 0;
    struct store_checkpoint *k = NULL;
    size_t n = 0;
    int rc = query_int(c, "limit", 1, 1000, &limit, err);
    if (rc == ERR_OK)
        rc = read_after(c, j, "ftckpt_", &after, err);
    if (rc == ERR_OK)
        rc = store_checkpoint_list(c->st, j->id, after, (int)limit + 1, &k, &n, err);
    if (rc != ERR_OK)
        return rc;
    json_t *data = json_array();
    for (size_t i = 0; i < n && i < (size_t)limit; i++)
        if (json_array_append_new(data, job_checkpoint_json(j, &k[i])) != 0)
            rc = err_nomem(err);
    free(k);
    return respond(c, rc, data, n > (size_t)limit, err);
}

/* GET .../{ref}/checkpoints?after=&limit=: newest first. */
int jobs_checkpoints(struct api_ctx *c, struct err *err)
{
    struct store_job j;
    int rc = get_job(c, &j, err);
    if (rc != ERR_OK)
        return rc;
    rc = list_checkpoints(c, &j, err);
    store_job_free(&j);
    return rc;
}

/* Changes of rank up to step `until`, and appended to `out`. */
static int add_ranks(struct api_ctx *c, int64_t job, int64_t since, int64_t until, json_t *out,
                     struct err *err)
{
    struct store_rank *r = NULL;
    size_t n = 0;
    int rc = store_rank_list(c->st, job, since, until, &r, &n, err);
    for (size_t i = 0; i < n && rc == ERR_OK; i++)
        if (json_array_append_new(out, json_pack("{s:I, s:i, s:s, s:i}", "step",
                                                 (json_int_t)r[i].step, "layer", r[i].layer,
                                                 "module", store_module_name(r[i].module), "rank",
                                                 r[i].rank)) != 0)
            rc = err_nomem(err);
    free(r);
    return rc;
}

static int list_metrics(struct api_ctx *c, const struct store_job *j, struct err *err)
{
    long limit = 1000, since = -1;
    struct store_metric *m = NULL;
    size_t n = 0;
    int rc = query_int(c, "limit", 1, 10000, &limit, err);
    if (rc == ERR_OK)
        rc = query_int(c, "since", -1, INT32_MAX, &since, err);
    if (rc == ERR_OK)
        rc = store_metric_list(c->st, j->id, since, (int)limit + 1, &m, &n, err);
    if (rc != ERR_OK)
        return rc;
    const bool more = n > (size_t)limit;
    const size_t shown = more ? (size_t)limit : n;
    json_t *data = json_array(), *ranks = json_array();
    for (size_t i = 0; i < shown; i++)
        if (json_array_append_new(data, job_metric_json(&m[i])) != 0)
            rc = err_nomem(err);
    /* With the last page also what came after its last step: nothing, or ranks without metrics. */
    if (rc == ERR_OK)
        rc = add_ranks(c, j->id, since, more ? m[shown - 1].step : INT64_MAX, ranks, err);
    free(m);
    if (rc != ERR_OK) {
        json_decref(data);
        json_decref(ranks);
        return rc;
    }
    return resp_json(c, 200, json_pack("{s:s, s:s, s:o, s:o, s:b}", "object",
                                       "fine_tuning.job.metrics", "fine_tuning_job_id", j->ref,
                                       "data", data, "ranks", ranks, "has_more", more), err);
}

/* GET .../{ref}/metrics?since=STEP&limit=: oldest first, steps after `since`; ranks where they
 * changed in those steps. */
int jobs_metrics(struct api_ctx *c, struct err *err)
{
    struct store_job j;
    int rc = get_job(c, &j, err);
    if (rc != ERR_OK)
        return rc;
    rc = list_metrics(c, &j, err);
    store_job_free(&j);
    return rc;
}
