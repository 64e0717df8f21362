/* adapters.c - /v1/adapters: listing, showing, versions, promotion, deletion, download. */
#include "api/api_int.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Where a trained version comes from, and how good it was found. */
static json_t *training_json(const struct store_version *v)
{
    return json_pack("{s:s?, s:s?, s:s?, s:o, s:o, s:o, s:o}", "job",
                     v->job[0] != '\0' ? v->job : NULL, "parent", v->parent, "data_sha256",
                     v->data_hash_hex[0] != '\0' ? v->data_hash_hex : NULL, "train_loss",
                     real_or_null(v->train_loss), "eval_loss", real_or_null(v->eval_loss),
                     "eval_loss_base", real_or_null(v->eval_loss_base), "eval_tokens",
                     int_or_null(v->eval_tokens));
}

/* What every route says about a version. */
json_t *version_json(const struct api *a, const struct store_version *v)
{
    char id[STORE_NAME_MAX + 16];
    snprintf(id, sizeof id, "%s@%d", v->name, v->version);
    const bool here = strcmp(v->base_hash_hex, a->o.base->hash_hex) == 0;
    json_t *base = json_pack("{s:s, s:s?, s:b, s:b}", "sha256", v->base_hash_hex, "name",
                             v->base_name, "claimed", v->base_claimed, "served_here", here);
    json_t *training = strcmp(v->origin, "upload") == 0 ? json_null() : training_json(v);
    return json_pack("{s:s, s:s, s:s, s:i, s:b, s:s, s:s, s:i, s:i, s:f, s:I, s:I, s:I, s:s, s:o, "
                     "s:s, s:o, s:I}",
                     "id", id, "object", "adapter", "name", v->name, "version", v->version, "live",
                     v->live, "tenant", v->tenant_name, "method", adapter_method_name(v->method),
                     "rank", v->rank_max, "rank_min", v->rank_min, "alpha", v->alpha, "parameters",
                     (json_int_t)v->params, "bytes", (json_int_t)v->bytes, "module_count",
                     (json_int_t)v->modules, "sha256", v->hash_hex, "base", base, "origin",
                     v->origin, "training", training, "created_at", (json_int_t)(v->created_ms / 1000));
}

int respond_list(struct api_ctx *c, json_t *data, bool more, struct err *err)
{
    const size_t n = json_array_size(data);
    const json_t *first = json_object_get(json_array_get(data, 0), "id");
    const json_t *last = n ? json_object_get(json_array_get(data, n - 1), "id") : NULL;
    return resp_json(c, 200,
                     json_pack("{s:s, s:O?, s:O?, s:b, s:o}", "object", "list", "first_id", first,
                               "last_id", last, "has_more", more, "data", data), err);
}

int query_int(struct api_ctx *c, const char *name, long lo, long hi, long *ret, struct err *err)
{
    const char *s = c->req->query(c->req->ud, name);
    if (s == NULL)
        return ERR_OK;
    char *end;
    const long n = strtol(s, &end, 10);
    if (*s == '\0' || *end != '\0' || n < lo || n > hi)
        return err_set_slug(err, ERR_INVALID, NULL, name,
                            "`%s` must be an integer from %ld to %ld, not \"%.40s\"", name, lo, hi,
                            s);
    *ret = n;
    return ERR_OK;
}

/* GET /v1/adapters?after=NAME&limit=N: one row per adapter, its live version. */
int adapters_list(struct api_ctx *c, struct err *err)
{
    long limit = 100;
    int rc = query_int(c, "limit", 1, 1000, &limit, err);
    if (rc != ERR_OK)
        return rc;
    const char *after = c->req->query(c->req->ud, "after");
    char name[STORE_NAME_MAX + 1];
    if (after != NULL) { /* an id of ours (NAME@V) is as good as a name */
        int version;
        rc = ref_parse(c, after, name, &version, err);
        if (rc != ERR_OK)
            return rc;
    }

    struct store_version *v = NULL;
    size_t n = 0;
    rc = store_adapter_list(c->st, c->plan->tenant, after ? name : NULL, (int)limit + 1, &v, &n,
                            err);
    if (rc != ERR_OK)
        return rc;
    json_t *data = json_array();
    for (size_t i = 0; i < n && i < (size_t)limit; i++)
        if (json_array_append_new(data, version_json(c->api, &v[i])) != 0)
            rc = err_nomem(err);
    store_versions_free(v, n);
    if (rc != ERR_OK) {
        json_decref(data);
        return rc;
    }
    return respond_list(c, data, n > (size_t)limit, err);
}

/* GET /v1/adapters/{ref}/versions, newest first as the store gives them. */
int adapters_versions(struct api_ctx *c, struct err *err)
{
    char name[STORE_NAME_MAX + 1];
    int version;
    struct store_version *v = NULL;
    size_t n = 0;
    int rc = ref_parse(c, c->plan->arg, name, &version, err);
    if (rc == ERR_OK && version != 0)
        rc = err_set(err, ERR_INVALID, "%s@%d is one version: ask for the versions of %s", name,
                     version, name);
    if (rc == ERR_OK)
        rc = store_version_list(c->st, c->plan->tenant, name, &v, &n, err);
    if (rc != ERR_OK)
        return rc;
    json_t *data = json_array();
    for (size_t i = 0; i < n; i++)
        if (json_array_append_new(data, version_json(c->api, &v[i])) != 0)
            rc = err_nomem(err);
    store_versions_free(v, n);
    if (rc != ERR_OK) {
        json_decref(data);
        return rc;
    }
    return respond_list(c, data, false, err);
}

/* --- one version in full --------------------------------------------------------------------- */

static const char *dtype_text(enum dtype t)
{
    return t == DT_F32    ? "f32"
           : t == DT_F16  ? "f16"
           : t == DT_BF16 ? "bf16"
           : t == DT_I32  ? "i32"
                          : "other";
}

static json_t *module_json(const struct adapter_src_module *m)
{
    json_t *j = json_pack("{s:s, s:i, s:i, s:i, s:f, s:f, s:i, s:i, s:s}", "path", m->path,
                          "layer", m->layer, "rank", m->rank, "init_rank", m->init_rank, "alpha",
                          m->alpha, "scaling", m->scaling, "in", m->in, "out", m->out, "dtype",
                          dtype_text(m->dtype));
    if (m->mask != NULL && j != NULL) { /* which of the initial triplets are left */
        json_t *kept = json_array();
        for (int i = 0; i < m->init_rank; i++)
            if (m->mask[i])
                json_array_append_new(kept, json_integer(i));
        json_object_set_new(j, "kept", kept);
    }
    if (m->importance != NULL && j != NULL) { /* of all initial triplets */
        json_t *list = json_array();
        for (int i = 0; i < m->init_rank; i++)
            json_array_append_new(list, isfinite(m->importance[i])
                                            ? json_real((double)m->importance[i])
                                            : json_null());
        json_object_set_new(j, "importance", list);
    }
    return j;
}

/* Tensors beside the factors: DoRA's magnitudes, biases, what replaces the base's own. */
static json_t *extras_json(const struct adapter_src *s)
{
    json_t *list = json_array();
    for (size_t i = 0; i < s->nextras; i++) {
        const struct adapter_src_extra *x = &s->extras[i];
        json_t *shape = json_pack("[i]", x->rows);
        if (x->cols > 0)
            json_array_append_new(shape, json_integer(x->cols));
        json_array_append_new(list, json_pack("{s:s, s:s, s:s, s:o}", "name", x->name, "kind",
                                              adapter_extra_name(x->kind), "dtype",
                                              dtype_text(x->dtype), "shape", shape));
    }
    return list;
}

/* AdaLoRA's schedule and what it left; null for the other methods. */
static json_t *pruning_json(const struct adapter_src *s)
{
    if (s->method != METHOD_ADALORA)
        return json_null();
    json_int_t before = 0, after = 0;
    for (size_t i = 0; i < s->nmodules; i++) {
        before += s->modules[i].init_rank;
        after += s->modules[i].rank;
    }
    return json_pack("{s:I, s:I, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:f}", "triplets_initial",
                     before, "triplets_kept", after, "init_r", s->init_r, "target_r", s->target_r,
                     "tinit", s->tinit, "tfinal", s->tfinal, "deltaT", s->deltaT, "total_step",
                     s->total_step, "beta1", s->beta1, "beta2", s->beta2, "orth_reg_weight",
                     s->orth_reg_weight);
}

/* GET /v1/adapters/{ref} */
int adapters_show(struct api_ctx *c, struct err *err)
{
    struct store_version v = { 0 };
    struct adapter_src *src = NULL;
    json_t *j = NULL;
    int rc = store_version_find(c->st, c->plan->tenant, c->plan->arg, &v, err);
    if (rc != ERR_OK)
        return rc;
    rc = store_version_modules(c->st, v.id, &src, err);
    if (rc != ERR_OK)
        goto done;
    j = version_json(c->api, &v);
    json_t *modules = json_array();
    for (size_t i = 0; i < src->nmodules; i++)
        json_array_append_new(modules, module_json(&src->modules[i]));
    json_object_set_new(j, "modules", modules);
    json_object_set_new(j, "extra_tensors", extras_json(src));
    json_object_set_new(j, "pruning", pruning_json(src));
    /* It was valid when it was uploaded. */
    json_t *config = src->config ? json_loadb(src->config, src->config_len, 0, NULL) : NULL;
    json_object_set_new(j, "config", config ? config : json_null());
    if (json_array_size(modules) != src->nmodules)
        rc = err_nomem(err);
done:
    adapter_src_free(src);
    store_version_free(&v);
    if (rc != ERR_OK) {
        json_decref(j);
        return rc;
    }
    return resp_json(c, 200, j, err);
}

/* --- changes ------------------------------------------------------------------------------------ */

/* POST /v1/adapters/{ref}/promote: NAME@V, or NAME and {"version": V}. */
int adapters_promote(struct api_ctx *c, struct err *err)
{
    static const char *const known[] = { "version", NULL };
    char name[STORE_NAME_MAX + 1], ref[STORE_NAME_MAX + 16];
    int version;
    int64_t said = 0;
    json_t *in = NULL;
    int rc = ref_parse(c, c->plan->arg, name, &version, err);
    if (rc == ERR_OK)
        rc = body_json(c->req, true, &in, err);
    if (rc == ERR_OK)
        rc = json_only(in, known, err);
    if (rc == ERR_OK)
        rc = json_get_int(in, "version", 1, INT32_MAX, &said, err);
    json_decref(in);
    if (rc != ERR_OK)
        return rc;
    if (said != 0 && version != 0 && said != version)
        return err_set_slug(err, ERR_INVALID, NULL, "version",
                            "the path says version %d, the body says %lld", version,
                            (long long)said);
    if (version == 0)
        version = (int)said;
    if (version == 0)
        return err_set_slug(err, ERR_INVALID, NULL, "version",
                            "which version? POST /v1/adapters/%s@V/promote, or {\"version\": V} as "
                            "the body", name);
    rc = store_adapter_promote(c->st, c->plan->tenant, name, version, err);
    if (rc != ERR_OK)
        return rc;

    struct store_version v = { 0 };
    snprintf(ref, sizeof ref, "%s@%d", name, version);
    rc = store_version_find(c->st, c->plan->tenant, ref, &v, err);
    if (rc != ERR_OK)
        return rc;
    json_t *j = version_json(c->api, &v);
    store_version_free(&v);
    return resp_json(c, 200, j, err);
}

/* DELETE /v1/adapters/{ref}: NAME with all its versions, or NAME@V alone. */
int adapters_delete(struct api_ctx *c, struct err *err)
{
    char name[STORE_NAME_MAX + 1];
    int version;
    int rc = ref_parse(c, c->plan->arg, name, &version, err);
    if (rc == ERR_OK)
        rc = version ? store_version_delete(c->st, c->plan->tenant, name, version, err)
                     : store_adapter_delete(c->st, c->plan->tenant, name, err);
    if (rc != ERR_OK)
        return rc;
    char id[STORE_NAME_MAX + 16];
    snprintf(id, sizeof id, version ? "%s@%d" : "%s", name, version);
    return resp_json(c, 200,
                     json_pack("{s:s, s:s, s:b}", "id", id, "object", "adapter", "deleted", 1),
                     err);
}

/* --- download -------------------------------------------------------------------------------------- */

/* The weights as a safetensors file in a spool, then the tar around it in another. */
static int pack(struct api_ctx *c, const struct adapter_src *src, struct spool **ret,
                struct err *err)
{
    struct spool *weights = NULL;
    const char *path;
    int rc = spool_open(c->api->o.db_path, 1, &weights, err); /* for its name: replaced below */
    if (rc == ERR_OK)
        rc = spool_done(weights, &path, err);
    if (rc == ERR_OK)
        rc = peft_write_weights(src, path, err);
    if (rc == ERR_OK)
        rc = tar_write_adapter(src->config, src->config_len, path, c->api->o.db_path, ret, err);
    spool_close(weights);
    return rc;
}

/* GET /v1/adapters/{ref}/download */
int adapters_download(struct api_ctx *c, struct err *err)
{
    struct store_version v = { 0 };
    struct adapter_src *src = NULL;
    int rc = store_version_find(c->st, c->plan->tenant, c->plan->arg, &v, err);
    if (rc != ERR_OK)
        return rc;
    rc = store_version_load(c->st, v.id, &src, err);
    if (rc == ERR_OK)
        rc = pack(c, src, &c->resp->file, err);
    if (rc == ERR_OK) {
        c->resp->status = 200;
        c->resp->type = "application/x-tar";
        api_resp_header(c->resp, "Content-Disposition", "attachment; filename=\"%s-%d.tar\"",
                        v.name, v.version);
        api_resp_header(c->resp, "X-Lorad-Adapter", "%s@%d %s", v.name, v.version, v.hash_hex);
    }
    adapter_src_free(src);
    store_version_free(&v);
    return rc;
}
