/* api.c - read this first: every endpoint the server has, and how a request finds its handler. */
#include "api/api_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Who may call a route: anybody, or who shows a key (auth.c says when none is needed). */
enum access { ANYONE, KEY };
/* What a body may weigh: as the options say for JSON, adapters, or files of training data. */
enum limit { NOTHING, JSON, ADAPTER, DATA };

/* `{ref}` stands for one or more characters, slashes included, and the first row that matches
 * wins: rows with a longer tail come first.  `{web}` stands for a file that web/ has. */
static const struct api_route {
    const char *method, *path;
    enum access access;
    enum api_body body;
    enum limit limit;
    api_handler run;
} routes[] = {
    { "GET",    "/health",                        ANYONE, API_BODY_NONE,  NOTHING, health },
    { "GET",    "/ready",                         ANYONE, API_BODY_NONE,  NOTHING, ready },
    { "GET",    "/{web}",                         ANYONE, API_BODY_NONE,  NOTHING, web_page },
    { "GET",    "/metrics",                       KEY,    API_BODY_NONE,  NOTHING, metrics },

    { "GET",    "/v1/models",                     KEY,    API_BODY_NONE,  NOTHING, models_list },
    { "GET",    "/v1/models/{ref}",               KEY,    API_BODY_NONE,  NOTHING, models_show },
    { "POST",   "/v1/completions",                KEY,    API_BODY_JSON,  JSON,    completions },
    { "POST",   "/v1/chat/completions",           KEY,    API_BODY_JSON,  JSON,    chat_completions },
    { "POST",   "/apply-template",                KEY,    API_BODY_JSON,  JSON,    apply_template },
    { "POST",   "/tokenize",                      KEY,    API_BODY_JSON,  JSON,    tokenize },
    { "POST",   "/detokenize",                    KEY,    API_BODY_JSON,  JSON,    detokenize },

    { "GET",    "/v1/adapters",                   KEY,    API_BODY_NONE,  NOTHING, adapters_list },
    { "POST",   "/v1/adapters",                   KEY,    API_BODY_FORM,  ADAPTER, adapters_create },
    { "GET",    "/v1/adapters/{ref}/versions",    KEY,    API_BODY_NONE,  NOTHING, adapters_versions },
    { "GET",    "/v1/adapters/{ref}/download",    KEY,    API_BODY_NONE,  NOTHING, adapters_download },
    { "GET",    "/v1/adapters/{ref}/diff",        KEY,    API_BODY_NONE,  NOTHING, adapters_diff },
    { "POST",   "/v1/adapters/{ref}/promote",     KEY,    API_BODY_JSON,  JSON,    adapters_promote },
    { "GET",    "/v1/adapters/{ref}",             KEY,    API_BODY_NONE,  NOTHING, adapters_show },
    { "PUT",    "/v1/adapters/{ref}",             KEY,    API_BODY_SPOOL, ADAPTER, adapters_put },
    { "DELETE", "/v1/adapters/{ref}",             KEY,    API_BODY_NONE,  NOTHING, adapters_delete },

    { "POST",   "/v1/files",                      KEY,    API_BODY_FORM,  DATA,    files_create },
    { "GET",    "/v1/files",                      KEY,    API_BODY_NONE,  NOTHING, files_list },
    { "GET",    "/v1/files/{ref}/content",        KEY,    API_BODY_NONE,  NOTHING, files_content },
    { "GET",    "/v1/files/{ref}",                KEY,    API_BODY_NONE,  NOTHING, files_show },
    { "DELETE", "/v1/files/{ref}",                KEY,    API_BODY_NONE,  NOTHING, files_delete },

    { "POST",   "/v1/fine_tuning/jobs",           KEY,    API_BODY_JSON,  JSON,    jobs_create },
    { "GET",    "/v1/fine_tuning/jobs",           KEY,    API_BODY_NONE,  NOTHING, jobs_list },
    { "POST",   "/v1/fine_tuning/jobs/{ref}/cancel", KEY, API_BODY_JSON,  JSON,    jobs_cancel },
    { "POST",   "/v1/fine_tuning/jobs/{ref}/pause", KEY,  API_BODY_JSON,  JSON,    jobs_pause },
    { "POST",   "/v1/fine_tuning/jobs/{ref}/resume", KEY, API_BODY_JSON,  JSON,    jobs_resume },
    { "GET",    "/v1/fine_tuning/jobs/{ref}/events", KEY, API_BODY_NONE,  NOTHING, jobs_events },
    { "GET",    "/v1/fine_tuning/jobs/{ref}/checkpoints", KEY, API_BODY_NONE, NOTHING,
      jobs_checkpoints },
    { "GET",    "/v1/fine_tuning/jobs/{ref}/metrics", KEY, API_BODY_NONE, NOTHING, jobs_metrics },
    { "GET",    "/v1/fine_tuning/jobs/{ref}",     KEY,    API_BODY_NONE,  NOTHING, jobs_show },
    { "DELETE", "/v1/fine_tuning/jobs/{ref}",     KEY,    API_BODY_NONE,  NOTHING, jobs_delete },
};
enum { NROUTES = sizeof routes / sizeof routes[0] };

/* Forms: the field that goes to a file, and what there is beside it. */
static const struct { const char *file, *says; } forms[] = {
    [ADAPTER] = { "weights", "the fields name, config and weights; a tar file goes to PUT "
                             "/v1/adapters/NAME" },
    [DATA] = { "file", "the fields file and purpose" },
};

/* Does `path` match `pattern`?  Copies what {ref} stands for. */
static bool match(const char *pattern, const char *path, char arg[API_ARG_MAX + 1])
{
    arg[0] = '\0';
    if (strcmp(pattern, "/{web}") == 0)
        return web_has(path);
    const char *open = strchr(pattern, '{');
    if (open == NULL)
        return strcmp(pattern, path) == 0;

    const size_t head = (size_t)(open - pattern), len = strlen(path);
    const char *tail = strchr(open, '}') + 1;
    const size_t ntail = strlen(tail);
    if (len <= head + ntail || len - head - ntail > API_ARG_MAX ||
        strncmp(pattern, path, head) != 0 || strcmp(path + len - ntail, tail) != 0)
        return false;
    memcpy(arg, path + head, len - head - ntail);
    arg[len - head - ntail] = '\0';
    return true;
}

/* HEAD is GET without the body, which the server leaves out. */
static bool same_method(const char *route, const char *asked)
{
    return strcmp(route, asked) == 0 ||
           (strcmp(asked, "HEAD") == 0 && strcmp(route, "GET") == 0);
}

/* Nothing matched method and path: 405 if the path is known, else 404. */
static int no_route(const struct api_req *req, struct api_resp *resp, struct err *err)
{
    char allow[64] = "", arg[API_ARG_MAX + 1];
    size_t n = 0;
    for (int i = 0; i < NROUTES && n < sizeof allow; i++) {
        if (!match(routes[i].path, req->path, arg) || strstr(allow, routes[i].method) != NULL)
            continue;
        const char *method = routes[i].method;
        n += (size_t)snprintf(allow + n, sizeof allow - n, "%s%s%s", n ? ", " : "", method,
                              strcmp(method, "GET") == 0 ? ", HEAD" : "");
    }
    if (allow[0] == '\0')
        return err_set(err, ERR_NOT_FOUND, "there is nothing at %.200s; GET /v1/models lists what "
                       "can be asked", req->path);
    api_resp_header(resp, "Allow", "%s", allow);
    return err_set_slug(err, ERR_INVALID, "method_not_allowed", NULL,
                        "%.16s is not possible at %.200s: use %s", req->method, req->path, allow);
}

/* Bodies come in the form that the route reads.  JSON is taken under any name (curl -d says
 * x-www-form-urlencoded), except a form with parts. */
static int check_type(const struct api_route *r, const struct api_req *req, struct err *err)
{
    const char *type = req->header(req->ud, "Content-Type");
    const bool form = type != NULL && strncasecmp(type, "multipart/form-data", 19) == 0;
    if (r->body == API_BODY_FORM && !form)
        return err_set_slug(err, ERR_INVALID, "unsupported_media_type", NULL,
                            "%s takes multipart/form-data with %s", r->path,
                            forms[r->limit].says);
    if (r->body == API_BODY_JSON && form)
        return err_set_slug(err, ERR_INVALID, "unsupported_media_type", NULL,
                            "%s takes a JSON body (Content-Type: application/json), not "
                            "multipart/form-data", r->path);
    if (r->body == API_BODY_SPOOL && form)
        return err_set_slug(err, ERR_INVALID, "unsupported_media_type", NULL,
                            "PUT %s takes a tar file as its body (curl -T); multipart/form-data "
                            "goes to POST /v1/adapters", r->path);
    return ERR_OK;
}

static int begin(struct api *a, struct api_db *db, const struct api_req *req,
                 struct api_plan *plan, struct api_resp *resp, struct err *err)
{
    const struct api_route *r = NULL;
    for (int i = 0; i < NROUTES && r == NULL; i++)
        if (same_method(routes[i].method, req->method) &&
            match(routes[i].path, req->path, plan->arg))
            r = &routes[i];

    int rc = auth_check(a, db, req, r == NULL || r->access == ANYONE, plan, err);
    if (rc != ERR_OK)
        return rc;
    if (r == NULL)
        return no_route(req, resp, err);
    rc = check_type(r, req, err);
    if (rc != ERR_OK)
        return rc;

    plan->route = r;
    plan->body = r->body;
    plan->spool_part = r->body == API_BODY_FORM ? forms[r->limit].file : NULL;
    plan->max_body = r->limit == JSON ? a->o.max_json_bytes : 0;
    /* with room for the tar's or the form's own bytes */
    const size_t room = API_PARTS_MAX * (size_t)API_PART_BYTES;
    if (r->limit == ADAPTER) {
        plan->max_body = a->o.max_adapter_bytes + room;
        plan->max_option = "--max-upload";
    } else if (r->limit == DATA) {
        plan->max_body = a->o.max_file_bytes + room;
        plan->max_option = "--max-file";
    }
    return ERR_OK;
}

bool api_begin(struct api *a, struct api_db *db, const struct api_req *req,
               struct api_plan *ret_plan, struct api_resp *ret)
{
    struct err err = { 0 };
    *ret_plan = (struct api_plan){ 0 };
    if (begin(a, db, req, ret_plan, ret, &err) == ERR_OK)
        return true;
    api_resp_error(ret, &err);
    return false;
}

bool api_dispatch(struct api *a, struct api_db *db, const struct api_plan *plan,
                  const struct api_req *req, void (*wake)(void *ud), void *wake_ud,
                  struct api_resp *ret, struct api_call **ret_call)
{
    struct api_ctx c = { .api = a, .st = db->st, .plan = plan, .req = req,
                         .wake = wake, .wake_ud = wake_ud, .resp = ret };
    struct err err = { 0 };
    store_actor(db->st, plan->key_id); /* the connection served somebody else before */
    if (plan->route->run(&c, &err) != ERR_OK) {
        api_resp_error(ret, &err);
        return true;
    }
    if (c.call == NULL)
        return true;
    /* It may have ended before we got here. */
    if (api_continue(c.call, ret))
        return true;
    *ret_call = c.call;
    return false;
}

int api_create(const struct api_opts *o, struct api **ret, struct err *err)
{
    struct api *a = calloc(1, sizeof *a);
    if (a == NULL)
        return err_nomem(err);
    a->o = *o;
    a->started = now_unix_ms() / 1000;
    atomic_init(&a->draining, false);
    atomic_init(&a->keys_seen, false);
    int rc = job_watch_create(a, &a->watch, err);
    if (rc != ERR_OK) {
        free(a);
        return rc;
    }
    *ret = a;
    return ERR_OK;
}

void api_destroy(struct api *a)
{
    if (a == NULL)
        return;
    job_watch_destroy(a->watch);
    free(a);
}

void api_set_draining(struct api *a) { atomic_store(&a->draining, true); }

int api_db_open(struct api *a, struct api_db **ret, struct err *err)
{
    struct api_db *db = calloc(1, sizeof *db);
    if (db == NULL)
        return err_nomem(err);
    db->api = a;
    int rc = store_open(a->o.db_path, &db->st, err);
    if (rc != ERR_OK) {
        free(db);
        return rc;
    }
    *ret = db;
    return ERR_OK;
}

void api_db_close(struct api_db *db)
{
    if (db == NULL)
        return;
    store_close(db->st);
    free(db);
}
