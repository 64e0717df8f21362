/* bench_registry.c - the part `registry`: what 10,000 adapters in one file cost a server: its start, a
 * name's look-up, a page of the list, memory.
 *
 * The adapters are small (rank 1 on q and v of the 135M shape), because their number is the point; each is
 * put by the store's own function, in a transaction of its own. */
#include "server/bench_parts.h"

#include "server/bench_stage.h"

#include "engine/util.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { RANK = 1, ADAPTERS = 10000, ADAPTERS_QUICK = 500, LOOKUPS = 1000, PAGE = 100, HTTP_LOOKUPS = 100 };
enum { CACHE_BYTES = 32 << 20 };

struct registry {
    struct bench *b;
    const struct stage *st;
    char id[32];             /* what its rows begin with */
    struct stage_path base, db, empty;
    int n;
    size_t adapter_bytes;    /* of the tensors */
    struct store *store;
    struct stage_server server;
    unsigned turn;           /* for names in no order */
    struct stage_samples lookup, missing, http;
};

static int any(struct registry *r)
{
    r->turn = r->turn * 1664525u + 1013904223u;
    return (int)((r->turn >> 8) % (unsigned)r->n);
}

/* --- the store ---------------------------------------------------------------------------------- */

static int measure_open(void *arg, double *ret, struct err *err)
{
    const struct registry *r = arg;
    struct store *st;
    int64_t n = 0;
    const double began = now_mono();
    int rc = store_open(r->db.s, &st, err);
    if (rc != ERR_OK)
        return rc;
    *ret = 1e3 * (now_mono() - began);
    rc = store_adapter_count(st, 0, &n, err);
    store_close(st);
    return rc == ERR_OK && n != r->n ? err_set(err, ERR_INTERNAL, "%lld adapters are in the file, not %d",
                                               (long long)n, r->n)
                                     : rc;
}

/* The mean of many; each goes to the samples. */
static int measure_lookup(void *arg, double *ret, struct err *err)
{
    struct registry *r = arg;
    double all = 0;
    for (int i = 0; i < LOOKUPS; i++) {
        const struct stage_name name = stage_name(any(r));
        struct store_version v = { 0 };
        const double began = now_mono();
        int rc = store_version_find(r->store, STORE_TENANT_DEFAULT, name.s, &v, err);
        const double took = now_mono() - began;
        store_version_free(&v);
        if (rc == ERR_OK)
            rc = stage_sample(&r->lookup, took, err);
        if (rc != ERR_OK)
            return rc;
        all += took;
    }
    *ret = 1e3 * all / LOOKUPS;
    return ERR_OK;
}

static int measure_missing(void *arg, double *ret, struct err *err)
{
    struct registry *r = arg;
    double all = 0;
    for (int i = 0; i < LOOKUPS; i++) {
        const struct stage_name name = stage_name(r->n + i);
        struct store_version v = { 0 };
        struct err none = { 0 };
        const double began = now_mono();
        int rc = store_version_find(r->store, STORE_TENANT_DEFAULT, name.s, &v, &none);
        const double took = now_mono() - began;
        if (rc != ERR_NOT_FOUND) {
            store_version_free(&v);
            return err_set(err, ERR_INTERNAL, "%s should not be there", name.s);
        }
        rc = stage_sample(&r->missing, took, err);
        if (rc != ERR_OK)
            return rc;
        all += took;
    }
    *ret = 1e3 * all / LOOKUPS;
    return ERR_OK;
}

/* --- the server --------------------------------------------------------------------------------- */

static int serve(const struct registry *r, const char *db, struct stage_server *ret, struct err *err)
{
    char cache[32];
    snprintf(cache, sizeof cache, "%d", CACHE_BYTES);
    const char *more[] = { "--adapter-cache", cache, "--kv", "128M", "--jobs", "off", NULL };
    return stage_serve(r->b, r->st, r->base.s, db, more, ret, err);
}

static int measure_start_of(const struct registry *r, const char *db, double *ret, struct err *err)
{
    struct stage_server v;
    const int rc = serve(r, db, &v, err);
    if (rc != ERR_OK)
        return rc;
    *ret = 1e3 * v.start_seconds;
    stage_serve_end(r->b, &v);
    return ERR_OK;
}

static int measure_start(void *arg, double *ret, struct err *err)
{
    const struct registry *r = arg;
    return measure_start_of(r, r->db.s, ret, err);
}

static int measure_start_empty(void *arg, double *ret, struct err *err)
{
    const struct registry *r = arg;
    return measure_start_of(r, r->empty.s, ret, err);
}

/* GET a name: the mean, each to the samples. */
static int measure_http(void *arg, double *ret, struct err *err)
{
    struct registry *r = arg;
    double all = 0;
    for (int i = 0; i < HTTP_LOOKUPS; i++) {
        char path[128], *answer = NULL;
        snprintf(path, sizeof path, "/v1/models/%s", stage_name(any(r)).s);
        const double began = now_mono();
        int rc = stage_ask(r->server.port, "GET", path, NULL, NULL, NULL, &answer, err);
        const double took = now_mono() - began;
        free(answer);
        if (rc == ERR_OK)
            rc = stage_sample(&r->http, took, err);
        if (rc != ERR_OK)
            return rc;
        all += took;
    }
    *ret = 1e3 * all / HTTP_LOOKUPS;
    return ERR_OK;
}

/* Names on a page of the list; the last of them to ret_last, "" when it is the last page. */
static int take_page(const char *answer, size_t *ret_n, char ret_last[128], struct err *err)
{
    json_t *j = json_loads(answer, 0, NULL);
    const char *last = json_string_value(json_object_get(j, "last_id"));
    int rc = ERR_OK;
    if (last == NULL || strlen(last) >= 128)
        rc = err_set(err, ERR_IO, "a page of the list is no list");
    else
        snprintf(ret_last, 128, "%s", json_is_true(json_object_get(j, "has_more")) ? last : "");
    *ret_n = json_array_size(json_object_get(j, "data"));
    json_decref(j);
    return rc;
}

/* The whole list in pages: milliseconds a page. */
static int measure_pages(void *arg, double *ret, struct err *err)
{
    struct registry *r = arg;
    char path[256], last[128] = "";
    size_t all = 0;
    int pages = 0, rc;
    double seconds = 0;
    do {
        char *answer = NULL;
        size_t n = 0;
        snprintf(path, sizeof path, "/v1/adapters?limit=%d%s%s", PAGE, last[0] ? "&after=" : "", last);
        const double began = now_mono();
        rc = stage_ask(r->server.port, "GET", path, NULL, NULL, NULL, &answer, err);
        seconds += now_mono() - began;
        if (rc == ERR_OK)
            rc = take_page(answer, &n, last, err);
        free(answer);
        all += n;
        pages++;
    } while (rc == ERR_OK && last[0] != '\0');
    if (rc == ERR_OK && all != (size_t)r->n)
        rc = err_set(err, ERR_INTERNAL, "the pages of the list have %zu adapters, not %d", all, r->n);
    *ret = 1e3 * seconds / pages;
    return rc;
}

/* n requests for one token, so many at a time: each of another adapter, or all of the first. */
static int use_adapters(struct registry *r, int n, bool all, struct err *err)
{
    enum { AT_ONCE = 16 };
    struct stage_client c[AT_ONCE];
    struct stage_name names[AT_ONCE];
    int rc = ERR_OK;
    for (int first = 0; first < n && rc == ERR_OK; first += AT_ONCE) {
        const int now = n - first < AT_ONCE ? n - first : AT_ONCE;
        for (int i = 0; i < now; i++) {
            names[i] = stage_name(all ? first + i : 0);
            c[i] = (struct stage_client){ .model = names[i].s, .prompt_tokens = 1, .max_tokens = 1 };
        }
        rc = stage_clients(r->server.port, c, now, (uint64_t)first, err);
        if (rc == ERR_OK)
            stage_clients_free(c, now);
    }
    return rc;
}

/* How much the server grows while several times the cache's budget of adapters pass through it.  What as
 * many requests take whatever the adapter (pages of the KV cache are touched for the first time) they have
 * taken before, with one adapter. */
static int measure_memory(struct registry *r, struct err *err)
{
    const int through = (int)(4u * CACHE_BYTES / r->adapter_bytes);
    const int n = through < r->n ? through : r->n;
    struct bench_series grown = { .name = "grown", .unit = "MiB", .n = 1 };
    struct bench_series budget = { .name = "MiB of cache", .unit = "MiB", .n = 1 };
    int rc = use_adapters(r, n, false, err);
    const size_t before = stage_serve_resident(&r->server);
    if (rc == ERR_OK)
        rc = use_adapters(r, n, true, err);
    const size_t after = stage_serve_resident(&r->server);
    grown.v[0] = after > before ? (double)(after - before) / (1 << 20) : 0.01;
    budget.v[0] = (double)CACHE_BYTES / (1 << 20);
    if (rc == ERR_OK)
        rc = bench_number(r->b, (double)n * (double)r->adapter_bytes / (1 << 20), "MiB", NULL, err,
                          "%s.memory.through", r->id);
    if (rc == ERR_OK)
        rc = bench_number(r->b, (double)after / (1 << 20), "MiB", NULL, err, "%s.memory.resident",
                          r->id);
    return rc == ERR_OK ? bench_row(r->b, &grown, &budget, 1, err, "%s.memory", r->id) : rc;
}

/* --- the part ------------------------------------------------------------------------------------- */

static int put_lookups(struct registry *r, struct bench_series *s, struct stage_samples *all, const char *what,
                       struct err *err)
{
    int rc = bench_row(r->b, s, NULL, 1, err, "%s.%s.mean", r->id, what);
    if (rc == ERR_OK)
        rc = bench_number(r->b, 1e3 * stage_percentile(all, 50), "ms", s, err, "%s.%s.p50", r->id, what);
    if (rc == ERR_OK)
        rc = bench_number(r->b, 1e3 * stage_percentile(all, 99), "ms", s, err, "%s.%s", r->id, what);
    return rc;
}

static int measure_store(struct registry *r, struct err *err)
{
    struct bench_series s[] = {
        { .name = "ms empty", .unit = "ms", .measure = measure_start_empty, .arg = r },
        { .name = "ms", .unit = "ms", .measure = measure_start, .arg = r },
        { .name = "ms", .unit = "ms", .measure = measure_open, .arg = r },
        { .name = "ms", .unit = "ms", .measure = measure_lookup, .arg = r },
        { .name = "ms", .unit = "ms", .measure = measure_missing, .arg = r },
    };
    int rc = store_open(r->db.s, &r->store, err);
    if (rc == ERR_OK)
        rc = bench_measure(r->b, s, 5, err);
    if (rc == ERR_OK)
        rc = bench_row(r->b, &s[1], &s[0], 1, err, "%s.start", r->id);
    if (rc == ERR_OK)
        rc = bench_row(r->b, &s[2], NULL, 1, err, "%s.open", r->id);
    if (rc == ERR_OK)
        rc = put_lookups(r, &s[3], &r->lookup, "lookup", err);
    if (rc == ERR_OK)
        rc = put_lookups(r, &s[4], &r->missing, "missing", err);
    store_close(r->store);
    return rc;
}

static int measure_server(struct registry *r, struct err *err)
{
    struct bench_series s[] = {
        { .name = "ms", .unit = "ms", .measure = measure_http, .arg = r },
        { .name = "ms", .unit = "ms", .measure = measure_pages, .arg = r },
    };
    int rc = serve(r, r->db.s, &r->server, err);
    if (rc != ERR_OK)
        return rc;
    rc = bench_measure(r->b, s, 2, err);
    if (rc == ERR_OK)
        rc = put_lookups(r, &s[0], &r->http, "http", err);
    if (rc == ERR_OK)
        rc = bench_row(r->b, &s[1], NULL, 1, err, "%s.page", r->id);
    if (rc == ERR_OK)
        rc = measure_memory(r, err);
    stage_serve_end(r->b, &r->server);
    return rc;
}

/* The base and the adapters; how fast those went in. */
static int make(struct registry *r, struct err *err)
{
    struct base *base = NULL;
    struct adapter_src *one = NULL;
    struct stat sb;
    int rc = stage_base(synthetic_find(r->b->quick ? "tiny" : "135m"), r->base.s, &base, err);
    if (rc == ERR_OK)
        rc = stage_adapter(&base->arch, STAGE_QV, RANK, 0, &one, err);
    const double began = now_mono();
    if (rc == ERR_OK) {
        r->adapter_bytes = one->bytes;
        rc = stage_fill(base, r->db.s, STAGE_QV, RANK, 0, r->n, err);
    }
    const double took = now_mono() - began;
    adapter_src_free(one);
    synthetic_free(base);
    if (rc == ERR_OK)
        rc = bench_number(r->b, r->n / took, "puts/s", NULL, err, "%s.put", r->id);
    if (rc == ERR_OK && stat(r->db.s, &sb) == 0)
        rc = bench_number(r->b, (double)sb.st_size / (1 << 20), "MiB", NULL, err, "%s.file",
                          r->id);
    return rc;
}

static int run(struct bench *b, struct err *err)
{
    static struct registry r;
    struct stage st;
    int rc = stage_open(&st, err);
    if (rc != ERR_OK)
        return rc;
    r = (struct registry){ .b = b, .st = &st, .n = b->quick ? ADAPTERS_QUICK : ADAPTERS, .turn = 1,
                           .base = stage_path(&st, "registry.base"), .db = stage_path(&st, "registry.db"),
                           .empty = stage_path(&st, "empty.db") };
    if (b->quick)
        snprintf(r.id, sizeof r.id, "registry.a%d", ADAPTERS_QUICK);
    else
        snprintf(r.id, sizeof r.id, "registry");
    if (stage_room(b, &st, "registry", (size_t)(b->quick ? 1 : 6) << 30, (size_t)1 << 30)) {
        rc = make(&r, err);
        if (rc == ERR_OK)
            rc = measure_store(&r, err);
        if (rc == ERR_OK)
            rc = measure_server(&r, err);
    }
    stage_samples_free(&r.lookup);
    stage_samples_free(&r.missing);
    stage_samples_free(&r.http);
    stage_close(&st);
    return rc;
}

const struct bench_part bench_registry = { "registry", "10,000 adapters in one file", run };
