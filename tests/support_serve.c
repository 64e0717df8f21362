/* support_serve.c - the demo base with everything that answers requests. */
#include "tests/support_serve.h"
#include "tests/support_model.h"

#include <dirent.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static void must(int rc, const struct err *err, const char *what)
{
    if (rc == ERR_OK)
        return;
    fprintf(stderr, "%s: %s\n", what, err->msg);
    abort();
}

static int load(void *ud, int64_t version_id, struct adapter **spare, struct adapter **ret, struct err *err)
{
    struct serve *s = ud;
    const int rc = s->load_store ? ERR_OK : store_open(s->db_path, &s->load_store, err);
    return rc == ERR_OK ? store_version_build(s->load_store, version_id, s->base, spare, ret, err) : rc;
}

static void count_wake(void *ud) { ((struct serve *)ud)->jobs_woken++; }

struct serve *serve_open(const struct serve_opts *o)
{
    static const struct serve_opts none;
    struct err err = { 0 };
    struct serve *s = calloc(1, sizeof *s);
    o = o ? o : &none;
    support_tmpdir(s->dir);
    snprintf(s->db_path, sizeof s->db_path, "%s/test.db", s->dir);
    s->base = support_base_dir(DEMO, "nf4", NULL, PREC_FAST);
    must(isa_select("auto", &s->compute.isa, &err), &err, "isa");
    s->compute.precision = PREC_FAST;
    must(pool_create(1, &s->compute.pool, &err), &err, "pool");
    must(tokenizer_load(s->base->tokenizer_json, s->base->tokenizer_json_len, &s->tokenizer, &err),
         &err, "tokenizer");
    must(adapter_cache_create((size_t)64 << 20, load, s, &s->cache, &err), &err, "cache");
    const struct sched_opts so = { .base = s->base, .tokenizer = s->tokenizer,
                                   .compute = &s->compute, .adapters = s->cache,
                                   .kv_bytes = (size_t)64 << 20,
                                   .kv_type = kv_type_default(s->base->is_f32),
                                   .max_seqs = o->max_seqs ? o->max_seqs : 64, .step_tokens = 256,
                                   .max_queue = o->max_queue ? o->max_queue : 256 };
    must(sched_create(&so, &s->sched, &err), &err, "sched");
    if (o->chat_template != NULL)
        must(chat_template_open("the test's template", o->chat_template, s->base->tokenizer_config,
                                &s->chat, &err), &err, "template");
    const struct api_opts ao = { .base = s->base, .chat_template = s->chat, .tokenizer = s->tokenizer, .sched = s->sched,
                                 .adapters = s->cache, .compute = &s->compute,
                                 .db_path = s->db_path, .version = "test",
                                 .loopback = !o->open_to_all,
                                 .max_adapter_bytes = (size_t)16 << 20,
                                 .max_file_bytes = o->max_file ? o->max_file : 1 << 20,
                                 .max_jobs = o->max_jobs, .jobs_wake = count_wake, .jobs_ud = s,
                                 .max_json_bytes = o->max_json ? o->max_json : 1 << 20,
                                 .request_seconds = o->request_seconds };
    must(api_create(&ao, &s->api, &err), &err, "api");
    must(api_db_open(s->api, &s->db, &err), &err, "database");
    must(store_open(s->db_path, &s->st, &err), &err, "database");
    return s;
}

void serve_close(struct serve *s)
{
    sched_destroy(s->sched);
    adapter_cache_destroy(s->cache);
    store_close(s->load_store);
    api_db_close(s->db);
    store_close(s->st);
    api_destroy(s->api);
    chat_template_free(s->chat);
    tokenizer_free(s->tokenizer);
    base_free(s->base);
    pool_destroy(s->compute.pool);
    support_remove(s->dir);
    free(s);
}

/* --- requests without sockets --------------------------------------------------------------------- */

struct asked {
    const struct serve_req *req;
    char path[512];
    char *query; /* "a=b&c=d" or NULL */
    char value[256];
};

static const char *header(void *ud, const char *key)
{
    const struct asked *a = ud;
    for (int i = 0; a->req->headers[i] != NULL; i++) {
        const size_t n = strlen(key);
        if (strncasecmp(a->req->headers[i], key, n) == 0 && a->req->headers[i][n] == ':')
            return a->req->headers[i] + n + 1 + strspn(a->req->headers[i] + n + 1, " ");
    }
    return NULL;
}

static const char *query(void *ud, const char *key)
{
    struct asked *a = ud;
    const size_t n = strlen(key);
    for (const char *p = a->query; p != NULL && *p != '\0'; p += strcspn(p, "&"), p += *p == '&')
        if (strncmp(p, key, n) == 0 && p[n] == '=') {
            snprintf(a->value, sizeof a->value, "%.*s", (int)strcspn(p + n + 1, "&"), p + n + 1);
            return a->value;
        }
    return NULL;
}

static void query_each(void *ud, bool (*fn)(void *fn_ud, const char *key, const char *value),
                       void *fn_ud)
{
    struct asked *a = ud;
    char key[256], value[256];
    for (const char *p = a->query; p != NULL && *p != '\0'; p += strcspn(p, "&"), p += *p == '&') {
        const size_t all = strcspn(p, "&"), n = strcspn(p, "=&");
        snprintf(key, sizeof key, "%.*s", (int)n, p);
        snprintf(value, sizeof value, "%.*s", n < all ? (int)(all - n - 1) : 0, p + n + 1);
        if (!fn(fn_ud, key, value))
            return;
    }
}

static void post(void *ud) { sem_post(ud); }

static void drain(struct api_resp *r, sem_t *sem, struct buf *out)
{
    for (;;) {
        const size_t before = out->len;
        if (!r->stream.next(r->stream.ud, out))
            break;
        if (out->len == before)
            sem_wait(sem);
    }
    r->stream.close(r->stream.ud);
    r->stream = (struct api_stream){ 0 };
}

static void take_body(struct api_resp *r, sem_t *sem, struct serve_resp *ret)
{
    struct buf b;
    buf_init(&b, (size_t)64 << 20);
    if (r->stream.next != NULL) {
        drain(r, sem, &b);
    } else if (r->file != NULL) {
        const char *path;
        struct err err = { 0 };
        must(spool_done(r->file, &path, &err), &err, "spool");
        must(file_read(path, (size_t)64 << 20, &b.data, &b.len, &err), &err, "spool");
    } else {
        buf_add(&b, r->static_body ? r->static_body : r->body ? r->body : "",
                r->static_body || r->body ? r->body_len : 0);
    }
    ret->len = b.len;
    ret->text = buf_take(&b);
    ret->json = ret->text ? json_loadb(ret->text, ret->len, JSON_ALLOW_NUL, NULL) : NULL;
}

void serve_call(struct serve *s, const struct serve_req *req, struct serve_resp *ret)
{
    struct asked a = { .req = req };
    snprintf(a.path, sizeof a.path, "%s", req->path);
    a.query = strchr(a.path, '?');
    if (a.query != NULL)
        *a.query++ = '\0';
    struct api_req r = { .method = req->method, .path = a.path, .query = query,
                         .query_each = query_each, .header = header,
                         .ud = &a, .body = req->body, .body_len = req->body ? strlen(req->body) : 0,
                         .upload = req->upload, .parts = req->parts, .nparts = req->nparts };
    sem_t sem;
    sem_init(&sem, 0, 0);
    struct api_plan plan;
    struct api_resp resp = { 0 };
    struct api_call *call = NULL;
    if (api_begin(s->api, s->db, &r, &plan, &resp) &&
        !api_dispatch(s->api, s->db, &plan, &r, post, &sem, &resp, &call))
        do
            sem_wait(&sem);
        while (!api_continue(call, &resp));
    *ret = (struct serve_resp){ .status = resp.status };
    take_body(&resp, &sem, ret);
    ret->raw = resp;
    ret->raw.body = NULL;
    ret->raw.file = NULL;
    api_resp_free(&resp);
    sem_destroy(&sem);
}

void serve_resp_free(struct serve_resp *r)
{
    free(r->text);
    json_decref(r->json);
    *r = (struct serve_resp){ 0 };
}

const char *serve_header(const struct serve_resp *r, const char *name)
{
    for (int i = 0; i < r->raw.nheaders; i++)
        if (strcasecmp(r->raw.header[i].name, name) == 0)
            return r->raw.header[i].value;
    return NULL;
}

const char *serve_message(const struct serve_resp *r)
{
    const char *m =
        json_string_value(json_object_get(json_object_get(r->json, "error"), "message"));
    return m ? m : "";
}

void serve_add_adapter(struct serve *s, int64_t tenant, const char *name, const char *dir)
{
    struct err err = { 0 };
    struct adapter_src *src;
    must(peft_load_dir(&s->base->arch, dir, &src, &err), &err, dir);
    const struct store_put_opts o = { .activate = true, .base_hash_hex = s->base->hash_hex,
                                      .base_claimed = true, .origin = "upload" };
    struct store_version v;
    bool is_new;
    must(store_adapter_put(s->st, tenant, name, src, &o, &v, &is_new, &err), &err, name);
    store_version_free(&v);
    adapter_src_free(src);
}

int serve_spooled(const struct serve *s)
{
    char path[128];
    snprintf(path, sizeof path, "%s.spool", s->db_path);
    DIR *d = opendir(path);
    int n = 0;
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;)
        n += e->d_name[0] != '.';
    if (d != NULL)
        closedir(d);
    return n;
}
