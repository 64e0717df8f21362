/* support_serve.h - the demo base with everything that answers requests, without or with sockets.
 *
 * Failures abort: a test without its server is worth nothing. */
#ifndef TESTS_SUPPORT_SERVE_H
#define TESTS_SUPPORT_SERVE_H

#include "api/api.h"

#include <jansson.h>
#include <pthread.h>

struct serve_opts {
    bool open_to_all;      /* not loopback: a key is always needed */
    int max_queue, max_seqs;
    size_t max_json, max_file;
    int max_jobs;
    double request_seconds;
    const char *chat_template; /* text; NULL: none */
};

struct serve {
    char dir[64], db_path[96];
    struct base *base;
    struct compute compute;
    struct tokenizer *tokenizer;
    struct adapter_cache *cache;
    struct chat_template *chat;
    struct sched *sched;
    struct store *load_store;  /* of the cache's loader thread */
    struct api *api;
    struct api_db *db;         /* of the test's thread */
    int jobs_woken;            /* calls of the api's jobs_wake */
    struct store *st;          /* another connection, for looking and preparing */
};
/* `o` may be NULL. */
struct serve *serve_open(const struct serve_opts *o);
void serve_close(struct serve *s);

/* One request without a socket. */
struct serve_req {
    const char *method, *path; /* the path may have ?key=value&... */
    const char *body;
    const char *headers[8];    /* "Name: value"; NULL ends */
    struct api_part *parts;
    size_t nparts;
    struct spool *upload;
};
struct serve_resp {
    int status;
    char *text;        /* body; of a stream: all of it */
    size_t len;
    json_t *json;      /* body parsed, or NULL */
    struct api_resp raw; /* headers only */
};
void serve_call(struct serve *s, const struct serve_req *req, struct serve_resp *ret);
void serve_resp_free(struct serve_resp *r);
const char *serve_header(const struct serve_resp *r, const char *name); /* NULL: none */
/* error.message, or "". */
const char *serve_message(const struct serve_resp *r);

/* Put a folder with a PEFT adapter into the store, as an upload would. */
void serve_add_adapter(struct serve *s, int64_t tenant, const char *name, const char *dir);
#define DEMO "examples/demo-base"
#define DEMO_ADAPTER(name) DEMO "/adapters/" name

/* Files in the spool folder. */
int serve_spooled(const struct serve *s);

#endif
