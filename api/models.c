/* models.c - /v1/models, and what the name of a model means.
 *
 * A model is the base, by its name, or an adapter: NAME for the live version, NAME@V for a pinned
 * one, OWNER/NAME[@V] with the tenant spelled out.  The base's name wins; uploads may not take
 * it. */
#include "api/api_int.h"
#include "engine/mem.h"

#include <stdlib.h>
#include <string.h>

bool is_base_name(const struct api *a, const char *ref) { return strcmp(ref, a->o.base->name) == 0; }

int ref_parse(struct api_ctx *c, const char *ref, char name[STORE_NAME_MAX + 1], int *ret_v,
              struct err *err)
{
    const char *slash = strchr(ref, '/');
    if (slash != NULL) {
        struct store_tenant t;
        int rc = store_tenant_get(c->st, c->plan->tenant, &t, err);
        if (rc != ERR_OK)
            return rc;
        if (strlen(t.name) != (size_t)(slash - ref) || strncmp(ref, t.name, strlen(t.name)) != 0)
            return err_set_slug(err, ERR_NOT_FOUND, "model_not_found", NULL,
                                "there is no adapter %.140s", ref);
        ref = slash + 1;
    }
    const size_t n = strcspn(ref, "@");
    int version = 0;
    if (ref[n] == '@') {
        char *end;
        const long v = strtol(ref + n + 1, &end, 10);
        if (ref[n + 1] < '1' || ref[n + 1] > '9' || *end != '\0' || v > INT32_MAX)
            return err_set(err, ERR_INVALID, "%.140s: what follows @ must be a version's number",
                           ref);
        version = (int)v;
    }
    if (n == 0 || n > STORE_NAME_MAX)
        return err_set(err, ERR_INVALID, "an adapter's name has 1 to %d characters, not %zu",
                       STORE_NAME_MAX, n);
    memcpy(name, ref, n);
    name[n] = '\0';
    *ret_v = version;
    return ERR_OK;
}

int version_check_base(const struct api *a, const struct store_version *v, struct err *err)
{
    if (strcmp(v->base_hash_hex, a->o.base->hash_hex) == 0)
        return ERR_OK;
    return err_set_slug(err, ERR_CONFLICT, "base_mismatch", "model",
                        "%s@%d was made for the base with hash %.12s..., but this server runs %s "
                        "with hash %.12s...: serve it on its own base, or train it again on this "
                        "one", v->name, v->version, v->base_hash_hex, a->o.base->name,
                        a->o.base->hash_hex);
}

/* Bytes: of the base, what KV cache and adapters may take, and what the process holds now.  Not
 * how full they are: that would tell a tenant about the others. */
static json_t *memory_json(const struct api *a)
{
    struct sched_stats s;
    struct adapter_cache_stats cache = { 0 };
    sched_stats(a->o.sched, &s);
    if (a->o.adapters != NULL)
        adapter_cache_stats(a->o.adapters, &cache);
    return json_pack("{s:I, s:I, s:I, s:I}", "base", (json_int_t)a->o.base->bytes, "kv",
                     (json_int_t)s.kv.page_bytes * s.kv.pages, "adapters",
                     (json_int_t)cache.budget, "resident", (json_int_t)mem_resident());
}

static json_t *base_card(const struct api *a)
{
    const struct base *b = a->o.base;
    return json_pack("{s:s, s:s, s:I, s:s, s:s, s:n, s:i, s:{s:s, s:s, s:s, s:s, s:i, s:o}}", "id",
                     b->name, "object", "model", "created", (json_int_t)a->started, "owned_by",
                     "lorad", "root", b->name, "parent", "max_model_len",
                     sched_max_context(a->o.sched), "lorad", "kind", "base", "sha256", b->hash_hex,
                     "precision", precision_name(a->o.compute->precision), "family",
                     b->arch.family, "layers", b->arch.L, "memory", memory_json(a));
}

/* An adapter; `id` is how it was asked for. */
static json_t *adapter_card(const struct api *a, const char *id, const struct store_version *v)
{
    char root[STORE_NAME_MAX + 16];
    snprintf(root, sizeof root, "%s@%d", v->name, v->version);
    return json_pack("{s:s, s:s, s:I, s:s, s:s, s:s, s:i, s:{s:s, s:s, s:i, s:s, s:b}}", "id", id,
                     "object", "model", "created", (json_int_t)(v->created_ms / 1000), "owned_by",
                     v->tenant_name, "root", root, "parent", a->o.base->name, "max_model_len",
                     sched_max_context(a->o.sched), "lorad", "kind", "adapter", "sha256",
                     v->hash_hex, "version", v->version, "method", adapter_method_name(v->method),
                     "servable", strcmp(v->base_hash_hex, a->o.base->hash_hex) == 0);
}

/* GET /v1/models[?limit=N]: the base, then the adapters that have a live version, by name. */
int models_list(struct api_ctx *c, struct err *err)
{
    enum { PAGE = 500 };
    long limit = INT32_MAX;
    int rc = query_int(c, "limit", 1, INT32_MAX, &limit, err);
    if (rc != ERR_OK)
        return rc;
    json_t *data = json_array();
    json_array_append_new(data, base_card(c->api));
    char after[STORE_NAME_MAX + 1] = "";
    size_t n = PAGE;
    while (rc == ERR_OK && n == PAGE && json_array_size(data) < (size_t)limit) {
        struct store_version *v = NULL;
        n = 0;
        rc = store_adapter_list(c->st, c->plan->tenant, after[0] ? after : NULL, PAGE, &v, &n,
                                err);
        for (size_t i = 0; i < n && rc == ERR_OK && json_array_size(data) < (size_t)limit; i++) {
            if (v[i].live && json_array_append_new(data, adapter_card(c->api, v[i].name, &v[i])))
                rc = err_nomem(err);
            memcpy(after, v[i].name, sizeof after);
        }
        store_versions_free(v, n);
    }
    if (rc != ERR_OK) {
        json_decref(data);
        return rc;
    }
    return resp_json(c, 200, json_pack("{s:s, s:o}", "object", "list", "data", data), err);
}

/* GET /v1/models/{ref} */
int models_show(struct api_ctx *c, struct err *err)
{
    const char *ref = c->plan->arg;
    if (is_base_name(c->api, ref))
        return resp_json(c, 200, base_card(c->api), err);
    struct store_version v = { 0 };
    int rc = store_version_find(c->st, c->plan->tenant, ref, &v, err);
    if (rc != ERR_OK)
        return rc;
    json_t *card = adapter_card(c->api, ref, &v);
    store_version_free(&v);
    return resp_json(c, 200, card, err);
}
