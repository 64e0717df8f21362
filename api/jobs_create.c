/* jobs_create.c - POST /v1/fine_tuning/jobs: OpenAI's request, and ours in it.
 *
 * Every field is checked here, so that what is queued can run: the model, the files, the options of
 * the trainer (train_params.c), the gate.  Whether the data fits the base is known when it is read,
 * which is the runner's first step. */
#include "api/api_int.h"
#include "api/train_params.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { KEY_MAX = 255, META_PAIRS = 16, META_KEY = 64, META_VALUE = 512 };

/* A request on its way into the store. */
struct order {
    json_t *in;                /* the body; strings below are its own */
    struct store_job_new job;
    struct train_opts opts;
    const char *model;
    enum adapter_method from_method; /* of the version to go on from */
    int from_rank;
    double from_alpha;
    bool supervised;           /* asked for in OpenAI's words */
    char *params, *method, *hyper, *metadata, *activate_if; /* JSON text */
};

static void order_free(struct order *o)
{
    train_opts_free(&o->opts);
    free(o->params);
    free(o->method);
    free(o->hyper);
    free(o->metadata);
    free(o->activate_if);
    json_decref(o->in);
}

/* Takes j. */
static int dump(json_t *j, char **ret, struct err *err)
{
    *ret = j != NULL ? json_dumps(j, JSON_COMPACT | JSON_REAL_PRECISION(17)) : NULL;
    json_decref(j);
    return *ret != NULL ? ERR_OK : err_nomem(err);
}

/* --- model: the base, or a version to go on from --------------------------------------------- */
static int read_model(struct api_ctx *c, struct order *o, struct err *err)
{
    const struct base *base = c->api->o.base;
    int rc = json_get_str(o->in, "model", &o->model, err);
    if (rc == ERR_OK && o->model == NULL)
        rc = err_set_slug(err, ERR_INVALID, NULL, "model", "`model` is missing: the base %s, or an "
                          "adapter to go on from", base->name);
    if (rc != ERR_OK)
        return rc;
    o->job.model = o->model;
    o->job.base_name = base->name;
    o->job.base_hash_hex = base->hash_hex;
    if (is_base_name(c->api, o->model))
        return ERR_OK;
    struct store_version v;
    rc = store_version_find(c->st, c->plan->tenant, o->model, &v, err);
    if (rc != ERR_OK)
        return rc;
    rc = version_check_base(c->api, &v, err);
    o->job.from_version = v.id;
    o->from_method = v.method;
    o->from_rank = v.rank_max;
    o->from_alpha = v.alpha;
    store_version_free(&v);
    return rc;
}

/* --- options --------------------------------------------------------------------------------- */
/* Top-level hyperparameters are OpenAI's old way: where the method has settings they may say
 * nothing. */
static int read_hyper(struct order *o, json_t *method, struct err *err)
{
    json_t *hyper = json_object_get(o->in, "hyperparameters");
    const char *type = json_string_value(json_object_get(method, "type"));
    const bool plain = type == NULL || (strcmp(type, "supervised") == 0 &&
                                        json_object_get(json_object_get(method, "supervised"),
                                                        "hyperparameters") == NULL);
    if (plain)
        return api_train_hyperparameters(hyper, &o->opts, err);
    struct train_opts d, e;
    train_opts_init(&d);
    train_opts_init(&e);
    int rc = api_train_hyperparameters(hyper, &e, err);
    if (rc == ERR_OK && (e.batch != d.batch || e.lr != d.lr || e.epochs != d.epochs))
        rc = err_set_slug(err, ERR_INVALID, NULL, "hyperparameters",
                          "`method` has settings of its own: put those of `hyperparameters` there");
    train_opts_free(&d);
    train_opts_free(&e);
    return rc;
}

static int read_seed(struct order *o, json_t *method, struct err *err)
{
    int64_t seed = -1;
    const char *type = json_string_value(json_object_get(method, "type"));
    json_t *own = type != NULL ? json_object_get(json_object_get(method, type), "seed") : NULL;
    int rc = json_get_int(o->in, "seed", 0, INT32_MAX, &seed, err);
    if (rc == ERR_OK && seed >= 0 && own != NULL && !json_is_null(own) &&
        o->opts.seed != (uint64_t)seed)
        rc = err_set_slug(err, ERR_INVALID, NULL, "seed", "`seed` is %lld, but that of `method` is "
                          "%llu", (long long)seed, (unsigned long long)o->opts.seed);
    if (rc == ERR_OK && seed >= 0)
        o->opts.seed = (uint64_t)seed;
    o->job.seed = (int64_t)o->opts.seed;
    return rc;
}

/* A version has its method, ranks and modules already. */
static int go_on_from(struct order *o, json_t *method, struct err *err)
{
    if (o->job.from_version == 0)
        return ERR_OK;
    const char *fixed = api_train_params_fixed(method);
    if (fixed != NULL)
        return err_set_slug(err, ERR_INVALID, NULL, "method",
                            "`method`: `%s` is decided by %.100s, from which training goes on", fixed,
                            o->model);
    if (!o->supervised && o->opts.method != o->from_method)
        return err_set_slug(err, ERR_INVALID, NULL, "method",
                            "%.100s is %s: training cannot go on as %s", o->model,
                            adapter_method_name(o->from_method),
                            adapter_method_name(o->opts.method));
    o->opts.method = o->from_method;
    o->opts.rank = o->from_rank > 0 ? o->from_rank : 1;
    o->opts.alpha = o->from_alpha;
    return ERR_OK;
}

static int write_options(struct order *o, json_t *method, struct err *err)
{
    int rc = dump(api_train_params_json(&o->opts), &o->params, err);
    if (rc == ERR_OK)
        rc = dump(api_train_hyperparameters_json(&o->opts), &o->hyper, err);
    if (rc != ERR_OK)
        return rc;
    json_t *hyper = api_train_hyperparameters_json(&o->opts);
    json_t *echo = o->supervised ? json_pack("{s:s, s:{s:o}}", "type", "supervised", "supervised",
                                             "hyperparameters", hyper)
                                 : json_incref(method);
    if (!o->supervised)
        json_decref(hyper);
    rc = dump(echo, &o->method, err);
    o->job.params = o->params;
    o->job.hyperparameters = o->hyper;
    o->job.method = o->method;
    return rc;
}

static int read_options(struct order *o, struct err *err)
{
    json_t *method = json_object_get(o->in, "method");
    if (json_is_null(method))
        method = NULL;
    int rc = api_train_params(method, &o->opts, err);
    if (rc != ERR_OK)
        return rc;
    o->supervised = method == NULL ||
                    strcmp(json_string_value(json_object_get(method, "type")), "supervised") == 0;
    rc = read_hyper(o, method, err);
    if (rc == ERR_OK)
        rc = read_seed(o, method, err);
    if (rc == ERR_OK)
        rc = go_on_from(o, method, err);
    if (rc == ERR_OK)
        rc = train_opts_check(&o->opts, err);
    if (rc == ERR_OK && o->opts.eval_every > 0 && o->job.validation_file == NULL)
        rc = err_set_slug(err, ERR_INVALID, NULL, "validation_file",
                          "`eval_every` needs a `validation_file`");
    return rc == ERR_OK ? write_options(o, method, err) : rc;
}

/* --- files ----------------------------------------------------------------------------------- */
/* Of this purpose, or any if NULL. */
static int check_file(struct api_ctx *c, const char *param, const char *ref, const char *purpose,
                      struct err *err)
{
    struct store_file f;
    struct err why = { 0 };
    int rc = store_file_get(c->st, c->plan->tenant, ref, &f, &why);
    if (rc == ERR_NOT_FOUND)
        return err_set_slug(err, ERR_INVALID, "invalid_file", param, "`%s`: there is no file %.80s",
                            param, ref);
    if (rc != ERR_OK)
        return err_set(err, rc, "%s", why.msg);
    if (purpose != NULL && strcmp(f.purpose, purpose) != 0)
        return err_set_slug(err, ERR_INVALID, "invalid_file", param,
                            "`%s`: the purpose of %s is %s, not %s", param, f.ref, f.purpose,
                            purpose);
    return ERR_OK;
}

static int read_files(struct api_ctx *c, struct order *o, struct err *err)
{
    int rc = json_get_str(o->in, "training_file", &o->job.training_file, err);
    if (rc == ERR_OK && o->job.training_file == NULL)
        rc = err_set_slug(err, ERR_INVALID, NULL, "training_file",
                          "`training_file` is missing: POST /v1/files makes one");
    if (rc == ERR_OK)
        rc = json_get_str(o->in, "validation_file", &o->job.validation_file, err);
    if (rc == ERR_OK)
        rc = check_file(c, "training_file", o->job.training_file, "fine-tune", err);
    if (rc == ERR_OK && o->job.validation_file != NULL)
        rc = check_file(c, "validation_file", o->job.validation_file, NULL, err);
    return rc;
}

/* --- what becomes of it ---------------------------------------------------------------------- */
static int read_suffix(struct api_ctx *c, struct order *o, struct err *err)
{
    int rc = json_get_str(o->in, "suffix", &o->job.name, err);
    if (rc != ERR_OK || o->job.name == NULL)
        return rc;
    struct err why = { 0 };
    if (store_name_check("an adapter", o->job.name, &why) != ERR_OK)
        return err_set_slug(err, ERR_INVALID, "invalid_name", "suffix", "`suffix`: %s", why.msg);
    if (is_base_name(c->api, o->job.name))
        return err_set_slug(err, ERR_CONFLICT, NULL, "suffix",
                            "%s is the name of the base: an adapter needs another", o->job.name);
    return ERR_OK;
}

/* {"max_loss": x, "file": "file-..."}: the file is optional. */
static int read_gate(struct api_ctx *c, struct order *o, struct err *err)
{
    static const char *const known[] = { "max_loss", "file", NULL };
    json_t *gate = json_object_get(o->in, "activate_if");
    o->job.activate = true;
    int rc = json_get_bool(o->in, "activate", &o->job.activate, err);
    if (rc != ERR_OK || gate == NULL || json_is_null(gate))
        return rc;
    if (!json_is_object(gate))
        return err_set_slug(err, ERR_INVALID, NULL, "activate_if",
                            "`activate_if` must be an object, not %s", json_kind(gate));
    if (!o->job.activate)
        return err_set_slug(err, ERR_INVALID, NULL, "activate_if",
                            "`activate_if` says when the version goes live, `activate` is false");
    rc = json_only(gate, known, err);
    if (rc != ERR_OK) {
        err->param = "activate_if";
        return rc;
    }
    const json_t *max = json_object_get(gate, "max_loss");
    if (!json_is_number(max) || !(json_number_value(max) > 0))
        return err_set_slug(err, ERR_INVALID, NULL, "activate_if",
                            "`activate_if` needs a `max_loss` above 0");
    rc = json_get_str(gate, "file", &o->job.eval_file, err);
    if (rc == ERR_OK && o->job.eval_file == NULL && o->job.validation_file == NULL)
        rc = err_set_slug(err, ERR_INVALID, NULL, "activate_if",
                          "`activate_if` needs something to measure the loss on: a `file`, or the "
                          "job's `validation_file`");
    if (rc == ERR_OK && o->job.eval_file != NULL)
        rc = check_file(c, "activate_if", o->job.eval_file, NULL, err);
    if (rc == ERR_OK)
        rc = dump(json_incref(gate), &o->activate_if, err);
    o->job.activate_if = o->activate_if;
    return rc;
}

static int read_metadata(struct order *o, struct err *err)
{
    json_t *meta = json_object_get(o->in, "metadata"), *v;
    const char *key;
    if (meta == NULL || json_is_null(meta))
        return ERR_OK;
    if (!json_is_object(meta) || json_object_size(meta) > META_PAIRS)
        return err_set_slug(err, ERR_INVALID, NULL, "metadata",
                            "`metadata` must be an object of at most %d strings", META_PAIRS);
    json_object_foreach(meta, key, v)
        if (!json_is_string(v) || utf8_count(key, strlen(key)) > META_KEY ||
            strlen(json_string_value(v)) != json_string_length(v) ||
            utf8_count(json_string_value(v), json_string_length(v)) > META_VALUE)
            return err_set_slug(err, ERR_INVALID, NULL, "metadata",
                                "`metadata`: \"%.80s\" must have a string of at most %d characters, "
                                "and a name of at most %d", key, META_VALUE, META_KEY);
    int rc = dump(json_incref(meta), &o->metadata, err);
    o->job.metadata = o->metadata;
    return rc;
}

static int refuse_integrations(struct order *o, struct err *err)
{
    const json_t *list = json_object_get(o->in, "integrations");
    if (list == NULL || json_is_null(list) || (json_is_array(list) && json_array_size(list) == 0))
        return ERR_OK;
    const char *type = json_string_value(json_object_get(json_array_get(list, 0), "type"));
    return err_set_slug(err, ERR_INVALID, NULL, "integrations",
                        "`integrations`: %.40s cannot be reported to from here; GET "
                        "/v1/fine_tuning/jobs/ID/metrics has the numbers", type ? type : "nothing");
}

/* --- idempotency ----------------------------------------------------------------------------- */
/* The same request is the same JSON, however its members are ordered and spaced. */
static int read_key(struct api_ctx *c, struct order *o, struct err *err)
{
    const char *key = c->req->header(c->req->ud, "Idempotency-Key");
    if (key == NULL)
        return ERR_OK;
    const size_t len = strlen(key);
    bool plain = len >= 1 && len <= KEY_MAX;
    for (size_t i = 0; i < len; i++)
        plain = plain && key[i] > 0x20 && key[i] < 0x7f;
    if (!plain)
        return err_set(err, ERR_INVALID, "an Idempotency-Key has 1 to %d printable characters",
                       KEY_MAX);
    char *text = json_dumps(o->in, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    if (text == NULL)
        return err_nomem(err);
    sha256_of(text, strlen(text), o->job.request_hash);
    free(text);
    o->job.idempotency_key = key;
    return ERR_OK;
}

/* The body and its key; *ret_known: *ret is the job that this very request made before. */
static int read_body(struct api_ctx *c, struct order *o, struct store_job *ret, bool *ret_known,
                     struct err *err)
{
    static const char *const known[] = { "model", "training_file", "validation_file", "suffix",
                                         "seed", "hyperparameters", "method", "integrations",
                                         "metadata", "activate", "activate_if", NULL };
    int rc = body_json(c->req, false, &o->in, err);
    if (rc == ERR_OK)
        rc = json_only(o->in, known, err);
    if (rc == ERR_OK)
        rc = read_key(c, o, err);
    if (rc != ERR_OK || o->job.idempotency_key == NULL)
        return rc;
    rc = store_job_of_key(c->st, c->plan->tenant, o->job.idempotency_key, o->job.request_hash, ret,
                          err);
    *ret_known = rc == ERR_OK;
    return rc == ERR_NOT_FOUND ? ERR_OK : rc;
}

static int read_order(struct api_ctx *c, struct order *o, struct err *err)
{
    int rc = read_model(c, o, err);
    if (rc == ERR_OK)
        rc = read_files(c, o, err);
    if (rc == ERR_OK)
        rc = read_options(o, err);
    if (rc == ERR_OK)
        rc = read_suffix(c, o, err);
    if (rc == ERR_OK)
        rc = read_gate(c, o, err);
    if (rc == ERR_OK)
        rc = read_metadata(o, err);
    if (rc == ERR_OK)
        rc = refuse_integrations(o, err);
    return rc;
}

int jobs_create(struct api_ctx *c, struct err *err)
{
    struct order o = { .job = { .max_active = c->api->o.max_jobs } };
    struct store_job j = { 0 };
    bool known = false, is_new;
    int rc = read_body(c, &o, &j, &known, err);
    if (rc == ERR_OK && !known)
        rc = read_order(c, &o, err);
    if (rc == ERR_OK && !known)
        rc = store_job_create(c->st, c->plan->tenant, &o.job, &j, &is_new, err);
    order_free(&o);
    if (rc != ERR_OK)
        return rc;
    if (c->api->o.jobs_wake != NULL)
        c->api->o.jobs_wake(c->api->o.jobs_ud);
    json_t *out = job_json(c->api, &j);
    store_job_free(&j);
    return resp_json(c, 200, out, err);
}
