/* api.h - requests and answers, without sockets.
 *
 * server/http.c turns a connection into a `struct api_req`, calls api_dispatch() on one of its
 * worker threads, and sends the `struct api_resp`.  The route table is at the top of api.c: read
 * that first.  Every route says there who may call it; a handler gets the tenant that was found.
 *
 * Threads: api_dispatch() runs on a worker thread with that thread's own store connection.  A
 * stream's functions are called by one thread at a time, any thread; `next` never blocks. */
#ifndef API_API_H
#define API_API_H

#include "engine/base.h"
#include "engine/sched.h"
#include "engine/tokenizer.h"
#include "store/store.h"

#include <jansson.h>

struct api_opts {
    const struct base *base;
    const struct tokenizer *tokenizer;
    struct sched *sched;
    struct adapter_cache *adapters;
    const struct compute *compute;
    const char *db_path;
    const char *version;        /* of the program */
    bool require_key;           /* false: loopback, everything is tenant `default` */
    size_t max_adapter_bytes;   /* an upload's limit */
    size_t max_json_bytes;      /* any other body's limit */
    double request_seconds;     /* deadline of a generation; 0: none */
};
struct api;
int api_create(const struct api_opts *o, struct api **ret, struct err *err);
void api_destroy(struct api *a);
void api_set_draining(struct api *a); /* /ready answers 503 from now on */

/* One uploaded part of multipart/form-data. */
struct api_part {
    const char *name;      /* form field */
    const char *filename;  /* or NULL */
    struct spool *spool;   /* big fields (files) */
    char *value;           /* small fields; NUL-terminated */
    size_t len;
};

struct api_req {
    const char *method;
    const char *path;            /* decoded, without the query */
    const char *(*query)(void *ud, const char *key);   /* NULL if absent */
    const char *(*header)(void *ud, const char *key);
    void *ud;
    const char *body;            /* whole body of a JSON route, NUL-terminated, or NULL */
    size_t body_len;
    struct spool *upload;        /* whole body of an upload route that is not multipart */
    struct api_part *parts;      /* multipart */
    size_t nparts;
};

/* How a route wants its body: decided from the headers before the body is read. */
enum api_body { API_BODY_NONE, API_BODY_JSON, API_BODY_SPOOL, API_BODY_FORM };
struct api_plan {
    const struct api_route *route;
    enum api_body body;
    size_t max_body;     /* more is 413 */
    int64_t tenant;      /* who asks */
    int64_t key_id;      /* 0: none */
};
/* First half, on headers alone: route, key, limits.  On failure the answer is *ret and nothing of
 * the body is read.  Returns true if the request may go on. */
struct api_resp;
bool api_begin(struct api *a, struct store *st, const struct api_req *req, struct api_plan *ret_plan,
               struct api_resp *ret);

/* A body that is produced over time. */
struct api_stream {
    /* Append what is ready to `out`.  Returns true while more may come (out may be empty: wait for
     * the wake). */
    bool (*next)(void *ud, struct buf *out);
    /* The client has gone or everything was sent. */
    void (*close)(void *ud);
    void *ud;
};

enum { API_HEADERS_MAX = 16 };
struct api_resp {
    int status;
    const char *type;            /* content type */
    struct { char name[40]; char value[160]; } header[API_HEADERS_MAX];
    int nheaders;
    char *body;                  /* free()d by the server */
    size_t body_len;
    const void *static_body;     /* instead of body: lives for ever (web files) */
    struct spool *file;          /* instead of body: sent and closed by the server */
    struct api_stream stream;    /* instead of body, when next is not NULL */
};
void api_resp_free(struct api_resp *r);
void api_resp_header(struct api_resp *r, const char *name, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* OpenAI's error body with the status that belongs to err->code. */
void api_resp_error(struct api_resp *r, const struct err *err);

/* Second half.  `wake(wake_ud)` may be called from any thread, also before this returns, when an
 * unfinished answer or its stream has news.  Returns true when *ret is complete (a stream counts);
 * false when the answer is not ready: call api_continue() after a wake. */
struct api_call;
bool api_dispatch(struct api *a, struct store *st, const struct api_plan *plan,
                  const struct api_req *req, void (*wake)(void *ud), void *wake_ud,
                  struct api_resp *ret, struct api_call **ret_call);
/* True when *ret is complete; frees the call. */
bool api_continue(struct api_call *c, struct api_resp *ret);
/* The client has gone: cancels what runs, frees the call.  No wake comes afterwards. */
void api_abandon(struct api_call *c);

#endif
