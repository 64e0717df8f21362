/* api_int.h - what the files of api/ share. */
#ifndef API_API_INT_H
#define API_API_INT_H

#include "api/api.h"
#include "store/files.h"
#include "store/jobs.h"
#include "engine/json_kind.h"

#include <jansson.h>

struct api {
    struct api_opts o;
    atomic_bool draining;
    atomic_bool keys_seen; /* there was a key once: from then on one is needed */
    int64_t started;     /* unix seconds */
    struct job_watch *watch; /* streams of events (job_watch.c) */
};

struct api_db {
    struct api *api;
    struct store *st;
    int64_t version;     /* PRAGMA data_version when `keys` was read */
    bool known;
    bool keys;           /* there is at least one key in the file */
};

/* One request on its way through a handler. */
struct api_ctx {
    struct api *api;
    struct store *st;
    const struct api_plan *plan;
    const struct api_req *req;
    void (*wake)(void *ud);
    void *wake_ud;
    struct api_resp *resp;
    struct api_call *call; /* set by a handler whose answer comes later */
};

/* Fills c->resp, or sets c->call, or fails. */
typedef int (*api_handler)(struct api_ctx *c, struct err *err);

/* --- resp.c ---------------------------------------------------------------------------- */
/* Takes the reference of `j`; NULL is out of memory. */
int resp_json(struct api_ctx *c, int status, json_t *j, struct err *err);
int resp_json_to(struct api_resp *r, int status, json_t *j, struct err *err);
/* {"error":{...}} of a failure, for the middle of a stream; a new reference or NULL. */
json_t *error_json(const struct err *err);

/* --- auth.c ---------------------------------------------------------------------------- */
/* Who asks?  Checks the key, or where none is needed that no foreign web page is behind it. */
int auth_check(struct api *a, struct api_db *db, const struct api_req *req, bool public_route,
               struct api_plan *plan, struct err *err);

/* --- json.c: reading bodies, writing text ------------------------------------------------ */
enum { JSON_DEPTH_MAX = 32 };
/* An object, or ERR_INVALID.  Duplicate keys and more than JSON_DEPTH_MAX levels are refused.
 * An empty body is an empty object if `optional`. */
int body_json(const struct api_req *req, bool optional, json_t **ret, struct err *err);
/* The first member that is not in the list (NULL-terminated) is refused by name. */
int json_only(json_t *obj, const char *const *known, struct err *err);
/* Members; absent and null leave *ret alone.  Wrong types name the field (`name` is static). */
int json_get_bool(json_t *obj, const char *name, bool *ret, struct err *err);
int json_get_int(json_t *obj, const char *name, int64_t lo, int64_t hi, int64_t *ret,
                 struct err *err);
/* Borrowed from `obj`; no NUL inside. */
int json_get_str(json_t *obj, const char *name, const char **ret, struct err *err);
/* A string from any bytes: what is not UTF-8 becomes U+FFFD. */
json_t *json_text(const char *s, size_t len);
/* Code points of valid UTF-8. */
size_t utf8_count(const char *s, size_t len);

/* --- models.c: which adapter a name means ------------------------------------------------ */
/* NAME[@V] or OWNER/NAME[@V] for calls of the store that take a name: copies NAME, sets *ret_v
 * to V or 0.  Another owner is ERR_NOT_FOUND. */
int ref_parse(struct api_ctx *c, const char *ref, char name[STORE_NAME_MAX + 1], int *ret_v,
              struct err *err);
bool is_base_name(const struct api *a, const char *ref);
/* Is this version made for the base that runs?  ERR_CONFLICT "base_mismatch" if not. */
int version_check_base(const struct api *a, const struct store_version *v, struct err *err);

/* --- adapters.c -------------------------------------------------------------------------- */
/* OpenAI's list, with first_id and last_id; takes `data`. */
int respond_list(struct api_ctx *c, json_t *data, bool more, struct err *err);
json_t *version_json(const struct api *a, const struct store_version *v);

/* --- upload.c ---------------------------------------------------------------------------- */
/* The spool's bytes, which are not none; munmap() them.  `what` is in the sentences. */
int spool_map(struct spool *s, const char *param, const char *what, void **ret, size_t *ret_len,
              struct err *err);
/* ?name=N; *ret is left alone if it is absent. */
int query_int(struct api_ctx *c, const char *name, long lo, long hi, long *ret, struct err *err);
/* part[k] becomes the form's part called names[k], or stays NULL; at most one of each.  `takes` lists
 * them in the sentence about any other. */
int form_parts(const struct api_req *req, int n, const char *const names[], const char *takes,
               const struct api_part *part[], struct err *err);
int adapters_create(struct api_ctx *c, struct err *err);
int adapters_put(struct api_ctx *c, struct err *err);

/* --- jobs_json.c: shapes of fine-tuning ----------------------------------------------------- */
json_t *job_json(const struct api *a, const struct store_job *j);
json_t *job_event_json(const struct store_job *j, const struct store_event *e);
json_t *job_checkpoint_json(const struct store_job *j, const struct store_checkpoint *c);
json_t *job_metric_json(const struct store_metric *m);
/* The number at the end of an id of an event or checkpoint of this job; ERR_INVALID if it is none. */
int job_part_id(const struct store_job *j, const char *prefix, const char *id, int64_t *ret,
                struct err *err);
/* A number, or null for NAN and infinities; and for -1. */
json_t *real_or_null(double v);
json_t *int_or_null(int64_t v);

/* --- job_watch.c: events as they happen ------------------------------------------------------ */
/* One thread with a connection of its own looks for news at most once a second, and only while
 * somebody listens. */
int job_watch_create(struct api *a, struct job_watch **ret, struct err *err);
void job_watch_destroy(struct job_watch *w); /* no stream is left; NULL is fine */
/* c->resp becomes a stream of the events after `after`. */
int job_watch_stream(struct api_ctx *c, const struct store_job *j, int64_t after, struct err *err);

/* --- tar.c ------------------------------------------------------------------------------- */
/* An adapter folder in a tar file: the config in memory, the weights in a new spool. */
struct tar_adapter {
    char *config;
    size_t config_len;
    struct spool *weights;
};
int tar_read_adapter(const char *path, const char *db_path, size_t max, struct tar_adapter *ret,
                     struct err *err);
void tar_adapter_free(struct tar_adapter *t);
/* The same as a tar file in a new spool; `weights_path` is a safetensors file. */
int tar_write_adapter(const char *config, size_t config_len, const char *weights_path,
                      const char *db_path, struct spool **ret, struct err *err);

/* --- the handlers, one file per subject --------------------------------------------------- */
int health(struct api_ctx *c, struct err *err);
int ready(struct api_ctx *c, struct err *err);
int metrics(struct api_ctx *c, struct err *err);
int web_page(struct api_ctx *c, struct err *err);
bool web_has(const char *path); /* of a file in web/, or "/" */
int models_list(struct api_ctx *c, struct err *err);
int models_show(struct api_ctx *c, struct err *err);
int completions(struct api_ctx *c, struct err *err);
int chat_completions(struct api_ctx *c, struct err *err);
int apply_template(struct api_ctx *c, struct err *err);
int tokenize(struct api_ctx *c, struct err *err);
int detokenize(struct api_ctx *c, struct err *err);
int adapters_list(struct api_ctx *c, struct err *err);
int adapters_show(struct api_ctx *c, struct err *err);
int adapters_versions(struct api_ctx *c, struct err *err);
int adapters_download(struct api_ctx *c, struct err *err);
int adapters_diff(struct api_ctx *c, struct err *err);
int adapters_promote(struct api_ctx *c, struct err *err);
int adapters_delete(struct api_ctx *c, struct err *err);
int files_create(struct api_ctx *c, struct err *err);
int files_list(struct api_ctx *c, struct err *err);
int files_show(struct api_ctx *c, struct err *err);
int files_content(struct api_ctx *c, struct err *err);
int files_delete(struct api_ctx *c, struct err *err);
int jobs_create(struct api_ctx *c, struct err *err);
int jobs_list(struct api_ctx *c, struct err *err);
int jobs_show(struct api_ctx *c, struct err *err);
int jobs_cancel(struct api_ctx *c, struct err *err);
int jobs_pause(struct api_ctx *c, struct err *err);
int jobs_resume(struct api_ctx *c, struct err *err);
int jobs_delete(struct api_ctx *c, struct err *err);
int jobs_events(struct api_ctx *c, struct err *err);
int jobs_checkpoints(struct api_ctx *c, struct err *err);
int jobs_metrics(struct api_ctx *c, struct err *err);

#endif
