/* adapters_diff.c - GET /v1/adapters/{ref}/diff: how far two versions are apart. */
#include "api/api_int.h"
#include "api/delta_json.h"

#include <math.h>

/* Multiply-adds that one request may take of a worker: about ten seconds.  The command line has no
 * such limit. */
static const double cost_max = 1e10;

static json_t *row_json(const struct delta_row *r)
{
    /* A cosine with a change of size 0 is not a number, and JSON has none either. */
    return json_pack("{s:[i,i], s:[f,f], s:f, s:o}", "rank", r->rank[0], r->rank[1], "norm",
                     r->norm[0], r->norm[1], "diff", r->diff, "cosine",
                     isnan(r->cosine) ? json_null() : json_real(r->cosine));
}

json_t *delta_json(const struct delta *d)
{
    json_t *j = row_json(&d->all), *modules = json_array();
    for (size_t i = 0; i < d->n; i++) {
        json_t *row = row_json(&d->rows[i]);
        json_object_set_new(row, "path", json_string(d->rows[i].path));
        json_object_set_new(row, "layer", json_integer(d->rows[i].layer));
        json_array_append_new(modules, row);
    }
    if (j == NULL || json_array_size(modules) != d->n) {
        json_decref(j);
        json_decref(modules);
        return NULL;
    }
    json_object_set_new(j, "modules", modules);
    return j;
}

static int compare(struct api_ctx *c, const struct store_version *a, const struct store_version *b,
                   json_t **ret, struct err *err)
{
    struct adapter_src *sa = NULL, *sb = NULL;
    struct delta d = { 0 };
    int rc = store_version_modules(c->st, a->id, &sa, err);
    if (rc == ERR_OK)
        rc = store_version_modules(c->st, b->id, &sb, err);
    if (rc == ERR_OK && delta_cost(sa, sb) > cost_max)
        rc = err_set(err, ERR_TOO_LARGE,
                     "comparing %s@%d with %s@%d takes %.0f billion multiply-adds, more than the "
                     "%.0f that a request may take: use lorad adapter diff",
                     a->name, a->version, b->name, b->version, delta_cost(sa, sb) / 1e9,
                     cost_max / 1e9);
    adapter_src_free(sa);
    adapter_src_free(sb);
    sa = sb = NULL;
    if (rc == ERR_OK)
        rc = store_version_load(c->st, a->id, &sa, err);
    if (rc == ERR_OK)
        rc = store_version_load(c->st, b->id, &sb, err);
    if (rc == ERR_OK)
        rc = delta_compare(sa, sb, &d, err);
    if (rc == ERR_OK && (*ret = delta_json(&d)) == NULL)
        rc = err_nomem(err);
    delta_free(&d);
    adapter_src_free(sa);
    adapter_src_free(sb);
    return rc;
}

/* GET /v1/adapters/{ref}/diff?with=REF */
int adapters_diff(struct api_ctx *c, struct err *err)
{
    struct store_version a = { 0 }, b = { 0 };
    json_t *j = NULL;
    const char *with = c->req->query(c->req->ud, "with");
    if (with == NULL || with[0] == '\0')
        return err_set_slug(err, ERR_INVALID, NULL, "with",
                            "compare with which adapter? /v1/adapters/%.80s/diff?with=NAME[@V]",
                            c->plan->arg);
    int rc = store_version_find(c->st, c->plan->tenant, c->plan->arg, &a, err);
    if (rc == ERR_OK)
        rc = store_version_find(c->st, c->plan->tenant, with, &b, err);
    if (rc == ERR_OK)
        rc = compare(c, &a, &b, &j, err);
    if (rc == ERR_OK) {
        char id[2][STORE_NAME_MAX + 16];
        snprintf(id[0], sizeof id[0], "%s@%d", a.name, a.version);
        snprintf(id[1], sizeof id[1], "%s@%d", b.name, b.version);
        json_object_set_new(j, "object", json_string("adapter.diff"));
        json_object_set_new(j, "adapters", json_pack("[s,s]", id[0], id[1]));
        json_object_set_new(j, "same_base",
                            json_boolean(strcmp(a.base_hash_hex, b.base_hash_hex) == 0));
    }
    store_version_free(&a);
    store_version_free(&b);
    return rc == ERR_OK ? resp_json(c, 200, j, err) : rc;
}
