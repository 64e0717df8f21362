/* bench_http.c - the part `http`: streaming clients of a real server, without adapters, all on one, each
 * on its own; and the same beside a fine-tuning job.
 *
 * In a round all clients of a case send a request at once and read to the end.  Tokens per second are all
 * tokens over the time from the first request to the last token.  The time to the first token counts from
 * each client's request.  The time between tokens is looked at where it is steady: from when every client
 * has its first token to when the first of them is done.  Prompts differ, so nothing comes from the
 * prefix cache. */
#include "server/bench_parts.h"

#include "server/bench_stage.h"

#include "engine/util.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { CLIENTS_MAX = 16, RANK = 16, PROMPT = 32, JOB_CLIENTS = 8 };
enum mode { NONE, SHARED, OWN, MODES };
static const char *const mode_names[MODES] = { ".none", ".shared", "" };
static const int client_counts[] = { 1, 8, 16 };
enum { COUNTS = sizeof client_counts / sizeof client_counts[0] };

struct http_case {
    const char *base;        /* its name, for NONE */
    int port, clients, tokens;
    enum mode mode;
    uint64_t *seed;          /* of the next round */
    bool warm;               /* it was measured once: from now on it counts */
    struct stage_samples first, gap;
};

/* --- a round ------------------------------------------------------------------------------------ */

static int keep_times(struct http_case *h, const struct stage_client *c, struct err *err)
{
    double from = 0, to = 1e300;
    int rc = ERR_OK;
    for (int i = 0; i < h->clients; i++) {
        from = c[i].at[0] > from ? c[i].at[0] : from;
        to = c[i].at[c[i].events - 1] < to ? c[i].at[c[i].events - 1] : to;
    }
    for (int i = 0; i < h->clients && rc == ERR_OK; i++) {
        rc = stage_sample(&h->first, c[i].at[0] - c[i].sent, err);
        for (int k = 1; k < c[i].events && rc == ERR_OK; k++)
            if (c[i].at[k - 1] >= from && c[i].at[k] <= to)
                rc = stage_sample(&h->gap, c[i].at[k] - c[i].at[k - 1], err);
    }
    return rc;
}

static int measure_case(void *arg, double *ret, struct err *err)
{
    struct http_case *h = arg;
    struct stage_client c[CLIENTS_MAX];
    struct stage_name names[CLIENTS_MAX];
    for (int i = 0; i < h->clients; i++) {
        names[i] = stage_name(h->mode == SHARED ? 0 : i);
        c[i] = (struct stage_client){ .model = h->mode == NONE ? h->base : names[i].s,
                                      .prompt_tokens = PROMPT, .max_tokens = h->tokens };
    }
    int rc = stage_clients(h->port, c, h->clients, ++*h->seed, err);
    if (rc != ERR_OK)
        return rc;
    double end = 0;
    for (int i = 0; i < h->clients; i++)
        end = c[i].at[c[i].events - 1] > end ? c[i].at[c[i].events - 1] : end;
    *ret = h->clients * h->tokens / (end - c[0].sent);
    rc = h->warm ? keep_times(h, c, err) : ERR_OK;
    h->warm = true;
    stage_clients_free(c, h->clients);
    return rc;
}

/* --- rows --------------------------------------------------------------------------------------- */

/* p50, p95 and p99 in milliseconds. */
static int put_percentiles(struct bench *b, struct stage_samples *s, const struct bench_series *of,
                           const char *id, const char *what, struct err *err)
{
    static const int percent[] = { 50, 95, 99 };
    int rc = ERR_OK;
    for (int i = 0; i < 3 && rc == ERR_OK; i++)
        rc = bench_number(b, 1e3 * stage_percentile(s, percent[i]), "ms", of, err, "%s.%s.p%d", id, what,
                          percent[i]);
    return rc;
}

static int put_case(struct bench *b, struct http_case *h, const struct bench_series *s,
                    const struct bench_series *none, const char *shape, struct err *err)
{
    char id[BENCH_ID_MAX];
    snprintf(id, sizeof id, "http.%s.c%d%s", shape, h->clients, mode_names[h->mode]);
    int rc = bench_row(b, s, h->mode == NONE ? NULL : none, 1, err, "%s", id);
    if (rc == ERR_OK)
        rc = put_percentiles(b, &h->first, s, id, "first", err);
    if (rc == ERR_OK && h->gap.n > 0)
        rc = put_percentiles(b, &h->gap, s, id, "gap", err);
    const double p50 = stage_percentile(&h->gap, 50);
    if (rc == ERR_OK && p50 > 0)
        rc = bench_number(b, stage_percentile(&h->gap, 95) / p50, "x", s, err, "%s.steady", id);
    return rc;
}

static int measure_clients(struct bench *b, const struct stage_server *v, const char *shape, int tokens,
                           struct err *err)
{
    static struct http_case cases[COUNTS][MODES];
    struct bench_series s[COUNTS][MODES];
    const int ncounts = b->quick ? 2 : COUNTS;
    uint64_t seed = (uint64_t)v->pid << 16;
    for (int i = 0; i < ncounts; i++)
        for (int m = 0; m < MODES; m++) {
            cases[i][m] = (struct http_case){ .base = shape, .port = v->port, .clients = client_counts[i],
                                              .tokens = tokens, .mode = (enum mode)m, .seed = &seed };
            s[i][m] = (struct bench_series){ .name = m == NONE ? "no adapter" : "adapters",
                                             .unit = "tokens/s", .measure = measure_case,
                                             .arg = &cases[i][m] };
        }
    int rc = bench_measure(b, &s[0][0], ncounts * MODES, err);
    for (int i = 0; i < ncounts; i++)
        for (int m = 0; m < MODES; m++) {
            if (rc == ERR_OK)
                rc = put_case(b, &cases[i][m], &s[i][m], &s[i][NONE], shape, err);
            stage_samples_free(&cases[i][m].first);
            stage_samples_free(&cases[i][m].gap);
        }
    return rc;
}

/* --- beside a job --------------------------------------------------------------------------------- */

struct job {
    int port;
    char id[STORE_ID_MAX + 1];
    bool running;            /* whether it is to run */
    struct http_case load;
};

/* A member of a JSON answer as a string; false: it has none. */
static bool string_in(const char *json, const char *object, const char *key, char *ret, size_t cap)
{
    json_t *j = json_loads(json, 0, NULL);
    const json_t *o = object != NULL ? json_object_get(j, object) : j;
    const char *s = json_string_value(json_object_get(o, key));
    const bool found = s != NULL && strlen(s) < cap;
    if (found)
        snprintf(ret, cap, "%s", s);
    json_decref(j);
    return found;
}

static int ask_string(int port, const char *method, const char *path, const char *type, const char *body,
                      const char *object, const char *key, char *ret, size_t cap, struct err *err)
{
    char *answer = NULL;
    int rc = stage_ask(port, method, path, type, body, NULL, &answer, err);
    if (rc == ERR_OK && !string_in(answer, object, key, ret, cap))
        rc = err_set(err, ERR_IO, "%s %s: there is no %s in the answer", method, path, key);
    free(answer);
    return rc;
}

/* Its status, and how many steps it says it has done (it says so once a second at most). */
static int look_at(const struct job *j, char *ret_status, size_t cap, long long *ret_step, struct err *err)
{
    char path[128], *answer = NULL;
    snprintf(path, sizeof path, "/v1/fine_tuning/jobs/%s", j->id);
    int rc = stage_ask(j->port, "GET", path, NULL, NULL, NULL, &answer, err);
    if (rc != ERR_OK)
        return rc;
    json_t *all = json_loads(answer, 0, NULL), *own = json_object_get(all, "lorad");
    const char *status = json_string_value(json_object_get(own, "status"));
    const json_t *step = json_object_get(own, "step");
    if (status != NULL && json_is_integer(step)) {
        snprintf(ret_status, cap, "%s", status);
        *ret_step = json_integer_value(step);
    } else {
        rc = err_set(err, ERR_IO, "GET %s: the job has no status or no step", path);
    }
    json_decref(all);
    free(answer);
    return rc;
}

static void nap(void) { nanosleep(&(struct timespec){ .tv_nsec = 50 * 1000 * 1000 }, NULL); }

/* Pause or resume it, and wait until it is so. */
static int turn(struct job *j, bool run, struct err *err)
{
    char path[128], status[32];
    long long step;
    if (j->running != run) {
        snprintf(path, sizeof path, "/v1/fine_tuning/jobs/%s/%s", j->id, run ? "resume" : "pause");
        int rc = ask_string(j->port, "POST", path, "application/json", "", NULL, "id", status,
                            sizeof status, err);
        if (rc != ERR_OK)
            return rc;
        j->running = run;
    }
    for (int i = 0; i < 600; i++) {
        int rc = look_at(j, status, sizeof status, &step, err);
        if (rc != ERR_OK || strcmp(status, run ? "running" : "paused") == 0)
            return rc;
        nap();
    }
    return err_set(err, ERR_IO, "the job does not get %s: it is %s", run ? "going" : "to a stop", status);
}

/* How many steps it has done; it has to run. */
static int step_of(const struct job *j, long long *ret, struct err *err)
{
    char status[32];
    const int rc = look_at(j, status, sizeof status, ret, err);
    if (rc == ERR_OK && strcmp(status, "running") != 0)
        return err_set(err, ERR_INTERNAL, "the job does not run any more: it is %s after step %lld", status, *ret);
    return rc;
}

/* Let it run, and wait until it has done a step: now it is at work. */
static int get_going(struct job *j, long long *ret_step, struct err *err)
{
    enum { WAIT_SECONDS = 120 };
    long long first = 0;
    int rc = turn(j, true, err);
    if (rc == ERR_OK)
        rc = step_of(j, &first, err);
    const double began = now_mono();
    for (*ret_step = first; rc == ERR_OK && *ret_step == first; rc = step_of(j, ret_step, err)) {
        if (now_mono() - began > WAIT_SECONDS)
            return err_set(err, ERR_INTERNAL, "the job did no step for %d s", WAIT_SECONDS);
        nap();
    }
    return rc;
}

static int measure_beside(void *arg, double *ret, struct err *err)
{
    struct job *j = arg;
    long long step;
    int rc = get_going(j, &step, err);
    if (rc == ERR_OK)
        rc = measure_case(&j->load, ret, err);
    return rc == ERR_OK ? step_of(j, &step, err) : rc; /* it still runs */
}

/* Its steps per second, with clients or alone, over some steps: from when one was seen until the last was,
 * which with clients is seen between their rounds.  0: it did none.  *ret_load: what others took meanwhile. */
static int measure_steps(const struct bench *b, struct job *j, bool clients, double *ret,
                         struct bench_series *ret_load, struct err *err)
{
    const int wanted = b->quick ? 1 : 4;
    const double most = b->quick ? 30 : 60; /* seconds */
    long long first, now;
    double tokens;
    int rc = get_going(j, &first, err);
    const double own = bench_own_seconds(b->child), busy = bench_busy_seconds(), began = now_mono();
    for (now = first; rc == ERR_OK && now < first + wanted && now_mono() - began < most;) {
        if (clients)
            rc = measure_case(&j->load, &tokens, err);
        else
            nap();
        if (rc == ERR_OK)
            rc = step_of(j, &now, err);
    }
    const double seconds = now_mono() - began;
    const double theirs = bench_busy_seconds() - busy - (bench_own_seconds(b->child) - own);
    *ret = rc == ERR_OK && seconds > 0 ? (double)(now - first) / seconds : 0;
    *ret_load = (struct bench_series){ .n = 0 };
    if (seconds > 0 && theirs > 0)
        ret_load->foreign = fmin(theirs / (seconds * bench_cpus_online()), 1);
    return rc;
}

static int measure_alone(void *arg, double *ret, struct err *err)
{
    struct job *j = arg;
    const int rc = turn(j, false, err);
    return rc == ERR_OK ? measure_case(&j->load, ret, err) : rc;
}

/* Lines of words, as a form with the file. */
static int put_file(int port, char *ret_id, size_t cap, struct err *err)
{
    struct buf b;
    buf_init(&b, 1 << 20);
    int rc = buf_puts(&b, "--lorad\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n"
                      "--lorad\r\nContent-Disposition: form-data; name=\"file\"; filename=\"t.jsonl\"\r\n\r\n");
    for (int line = 0; line < 64 && rc == ERR_OK; line++) {
        rc = buf_puts(&b, "{\"text\": \"");
        for (int k = 0; k < 40 && rc == ERR_OK; k++)
            rc = buf_printf(&b, "%cw%d", k > 0 ? ' ' : 'A', (line * 7 + k) % 97);
        if (rc == ERR_OK)
            rc = buf_puts(&b, "\"}\n");
    }
    if (rc == ERR_OK)
        rc = buf_puts(&b, "\r\n--lorad--\r\n");
    rc = rc == ERR_OK ? ask_string(port, "POST", "/v1/files", "multipart/form-data; boundary=lorad", b.data,
                                   NULL, "id", ret_id, cap, err)
                      : err_nomem(err);
    buf_free(&b);
    return rc;
}

static int start_job(struct job *j, const char *shape, struct err *err)
{
    char file[STORE_ID_MAX + 1], body[512];
    int rc = put_file(j->port, file, sizeof file, err);
    if (rc != ERR_OK)
        return rc;
    snprintf(body, sizeof body,
             "{\"model\": \"%s\", \"training_file\": \"%s\", \"method\": {\"type\": \"lora\", \"lora\": "
             "{\"max_steps\": 100000, \"checkpoint_every\": 100000, \"batch_size\": 8}}}", shape, file);
    j->running = true;
    return ask_string(j->port, "POST", "/v1/fine_tuning/jobs", "application/json", body, NULL, "id", j->id,
                      sizeof j->id, err);
}

static int measure_job(struct bench *b, const struct stage_server *v, const char *shape, int tokens,
                       struct err *err)
{
    static struct job j;
    uint64_t seed = (uint64_t)v->pid << 24;
    j = (struct job){ .port = v->port, .load = { .base = shape, .port = v->port, .clients = JOB_CLIENTS,
                                                 .tokens = tokens, .mode = OWN, .seed = &seed } };
    struct bench_series s[] = {
        { .name = "with a job", .unit = "tokens/s", .measure = measure_beside, .arg = &j },
        { .name = "alone", .unit = "tokens/s", .measure = measure_alone, .arg = &j },
    };
    int rc = start_job(&j, shape, err);
    if (rc == ERR_OK)
        rc = bench_measure(b, s, 2, err);
    double beside = 0, alone = 0;
    struct bench_series load[2];
    if (rc == ERR_OK)
        rc = measure_steps(b, &j, true, &beside, &load[0], err);
    if (rc == ERR_OK)
        rc = measure_steps(b, &j, false, &alone, &load[1], err);
    if (rc == ERR_OK && beside > 0)
        rc = bench_row(b, &s[0], &s[1], 1, err, "serving.job");
    else if (rc == ERR_OK) /* serving alone, measured twice */
        bench_skip(b, "serving.job", "the job did no step while clients were served");
    if (rc == ERR_OK)
        rc = bench_number(b, beside, "steps/s", &load[0], err, "serving.job.steps");
    if (rc == ERR_OK)
        rc = bench_number(b, alone, "steps/s", &load[1], err, "serving.job.steps.alone");
    stage_samples_free(&j.load.first);
    stage_samples_free(&j.load.gap);
    return rc;
}

/* --- the part -------------------------------------------------------------------------------------- */

static int run_shape(struct bench *b, const struct stage *st, const struct synthetic_shape *shape,
                     struct err *err)
{
    const bool large = shape->D >= 2048;
    const int tokens = b->quick ? 32 : large ? 64 : 128;
    struct stage_path base = stage_path(st, "http.base"), db = stage_path(st, "http.db");
    char cache[32], kv[32], context[16];
    const char *more[] = { "--adapter-cache", cache, "--kv", kv, "--context", context, NULL };
    struct adapter_src *one = NULL;
    struct stage_server v = { 0 };
    struct base *made = NULL;
    int rc = stage_base(shape, base.s, &made, err);
    if (rc == ERR_OK)
        rc = stage_adapter(&made->arch, STAGE_ALL, RANK, 0, &one, err);
    if (rc == ERR_OK) {
        const size_t least = (size_t)1 << 30, all = CLIENTS_MAX * adapter_build_bytes(&made->arch, one);
        snprintf(cache, sizeof cache, "%zu", all > least ? all : least);
        snprintf(kv, sizeof kv, "%zu", stage_kv_bytes(&made->arch, CLIENTS_MAX, PROMPT + tokens));
        snprintf(context, sizeof context, "%d", STAGE_CONTEXT);
        adapter_src_free(one);
    }
    if (rc == ERR_OK)
        rc = stage_fill(made, db.s, STAGE_ALL, RANK, 0, CLIENTS_MAX, err);
    synthetic_free(made);
    if (rc == ERR_OK)
        rc = stage_serve(b, st, base.s, db.s, more, &v, err);
    if (rc == ERR_OK)
        rc = measure_clients(b, &v, shape->name, tokens, err);
    if (rc == ERR_OK && strcmp(shape->name, "135m") == 0)
        rc = measure_job(b, &v, shape->name, tokens, err);
    stage_serve_end(b, &v);
    stage_remove_db(db.s);
    unlink(base.s);
    return rc;
}

static int run(struct bench *b, struct err *err)
{
    return stage_each_shape(b, 3, 2, (size_t)2 << 30, run_shape, err);
}

const struct bench_part bench_http = { "http", "streaming clients of a real server", run };
