/* api.h - requests and answers, without sockets.
 *
 * server/http.c turns a connection into a `struct api_req`, calls api_begin() when the headers are
 * there and api_dispatch() when the body is, both on one of its worker threads, and sends the
 * `struct api_resp`.  The route table is at the top of api.c: read that first.  Every route says
 * who may call it; a handler gets the tenant that was found.
 *
 * An answer that has to wait for the engine is a `struct api_call`: the server calls
 * api_continue() after each wake until it is complete.  A streamed answer is a `struct
 * api_stream`, which the server drains as fast as the client reads; between two calls of `next`
 * nothing grows here (the engine's log of a generation is bounded by its max_tokens).
 *
 * Threads: a `struct api` is shared by all.  A `struct api_db` is one worker's connection to the
 * database and belongs to that thread.  A call or stream is used by one thread at a time, any
 * thread; nothing in api_continue() or `next` blocks.  `wake` may come from any thread. */
#ifndef API_API_H
#define API_API_H

#include "engine/adapter_cache.h"
#include "engine/base.h"
#include "engine/chat_template.h"
#include "engine/sched.h"
#include "engine/tokenizer.h"
#include "store/store.h"

#include <stdatomic.h>

/* Everything is borrowed and must outlive the api. */
struct api_opts {
    const struct base *base;
    const struct tokenizer *tokenizer;
    const struct chat_template *chat_template; /* NULL: messages become plain lines */
    struct sched *sched;
    struct adapter_cache *adapters;
    const struct compute *compute;
    const char *db_path;
    const char *version;        /* of the program */
    bool loopback;              /* only this machine can connect: no keys in the file means no
                                 * key is needed; elsewhere every /v1 route needs one always */
    size_t max_adapter_bytes;   /* an upload's limit */
    size_t max_file_bytes;      /* the same of a file of training data */
    size_t max_json_bytes;      /* any other body's limit */
    int max_jobs;               /* of a tenant that have not ended; 0: no limit */
    void (*jobs_wake)(void *ud); /* there is something new to run or to stop; may be NULL */
    void *jobs_ud;
    double request_seconds;     /* deadline of a generation; 0: none */
};
struct api;
int api_create(const struct api_opts *o, struct api **ret, struct err *err);
void api_destroy(struct api *a); /* NULL is fine */
void api_set_draining(struct api *a); /* /ready answers 503 from now on */

/* One thread's connection. */
struct api_db;
int api_db_open(struct api *a, struct api_db **ret, struct err *err);
void api_db_close(struct api_db *db); /* NULL is fine */

/* One part of multipart/form-data, in the order they came. */
struct api_part {
    char *name;            /* form field */
    char *filename;        /* as the client says; or NULL */
    struct spool *spool;   /* the part that the plan wants in a file, or NULL */
    char *value;           /* any other; NUL-terminated */
    size_t len;
};

struct api_req {
    const char *method;
    const char *path;            /* decoded, without the query */
    const char *(*query)(void *ud, const char *key);   /* NULL if absent */
    /* Every key=value of the query; stops when fn returns false. */
    void (*query_each)(void *ud, bool (*fn)(void *fn_ud, const char *key, const char *value),
                       void *fn_ud);
    const char *(*header)(void *ud, const char *key);
    void *ud;
    const char *body;            /* whole body of a JSON route, NUL-terminated, or NULL */
    size_t body_len;
    struct spool *upload;        /* whole body of an API_BODY_SPOOL route */
    const struct api_part *parts; /* API_BODY_FORM */
    size_t nparts;
};

/* How a route wants its body: decided from the headers before the body is read. */
enum api_body { API_BODY_NONE, API_BODY_JSON, API_BODY_SPOOL, API_BODY_FORM };
enum { API_ARG_MAX = 255, API_PARTS_MAX = 16, API_PART_BYTES = 1 << 20 };
struct api_route;
struct api_plan {
    const struct api_route *route;
    enum api_body body;
    size_t max_body;         /* more is 413 */
    const char *max_option;  /* of the command line, which set it; or NULL */
    const char *spool_part;  /* API_BODY_FORM: this field goes to a file, others stay in memory
                              * with at most API_PART_BYTES */
    int64_t tenant;          /* who asks */
    int64_t key_id;          /* 0: none */
    char arg[API_ARG_MAX + 1]; /* what {...} of the route's pattern matched */
};

/* A body that is produced over time. */
struct api_stream {
    /* Append what is ready to `out`.  Returns true while more may come (out may be empty: wait for
     * the wake). */
    bool (*next)(void *ud, struct buf *out);
    /* The client has gone or everything was sent.  No wake comes after it returns. */
    void (*close)(void *ud);
    void *ud;
};

enum { API_HEADERS_MAX = 24 };
struct api_resp {
    int status;
    const char *type;            /* content type, static */
    struct { char name[40]; char value[256]; } header[API_HEADERS_MAX];
    int nheaders;
    char *body;                  /* malloc()ed, or NULL */
    size_t body_len;
    const void *static_body;     /* instead of body: lives for ever (web files) */
    struct spool *file;          /* instead of body */
    struct api_stream stream;    /* instead of body, when next is not NULL */
};
/* Frees what was not taken out (closes a stream). */
void api_resp_free(struct api_resp *r);
void api_resp_header(struct api_resp *r, const char *name, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* OpenAI's error body with the status that belongs to err->code.  What a client should not read
 * (ERR_DB, ERR_IO, ERR_INTERNAL) goes to stderr instead. */
void api_resp_error(struct api_resp *r, const struct err *err);

/* First half, on headers alone: route, key, limits.  Returns true if the request may go on; else
 * the answer is *ret and nothing of the body is read.  *ret starts zeroed, here and below. */
bool api_begin(struct api *a, struct api_db *db, const struct api_req *req,
               struct api_plan *ret_plan, struct api_resp *ret);

/* Second half.  Returns true when *ret is complete (a stream counts); false when the answer is not
 * ready: call api_continue() on *ret_call after a wake.  `wake(wake_ud)` may come before this
 * returns, and comes after it for a stream that returned no bytes and for a call. */
struct api_call;
bool api_dispatch(struct api *a, struct api_db *db, const struct api_plan *plan,
                  const struct api_req *req, void (*wake)(void *ud), void *wake_ud,
                  struct api_resp *ret, struct api_call **ret_call);
/* True when *ret is complete; the call is gone then. */
bool api_continue(struct api_call *c, struct api_resp *ret);
/* The client has gone: cancels what runs, frees the call.  No wake comes afterwards. */
void api_abandon(struct api_call *c);

#endif
