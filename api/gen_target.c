/* gen_target.c - which adapters a request means; from here on their versions are pinned. */
#include "api/gen.h"

#include <stdlib.h>
#include <string.h>

/* `field` is where the name stood. */
static int add(struct api_ctx *c, const char *ref, double weight, const char *field,
               struct gen_target *t, struct err *err)
{
    struct store_version v = { 0 };
    struct err why = { 0 };
    int rc = store_version_find(c->st, c->plan->tenant, ref, &v, &why);
    if (rc != ERR_OK) {
        why.param = field;
        if (why.code == ERR_INVALID) /* no such name is possible, so there is no such model */
            err_set_slug(err, ERR_NOT_FOUND, "model_not_found", field,
                         "there is no model \"%.140s\": GET /v1/models lists what there is", ref);
        else
            *err = why;
        return err->code;
    }
    rc = version_check_base(c->api, &v, err);
    if (rc == ERR_OK) {
        snprintf(t->item[t->n].id, sizeof t->item[0].id, "%s@%d", v.name, v.version);
        memcpy(t->item[t->n].hash, v.hash_hex, sizeof t->item[0].hash);
        struct gen_adapter *use = &t->item[t->n].use;
        memcpy(use->hash, v.hash, sizeof use->hash);
        use->version_id = v.id;
        /* The same tensors with B transposed, and per module a gain and a small struct. */
        use->bytes = (size_t)v.bytes + (size_t)v.modules * (4 * (size_t)v.rank_max + 256);
        use->weight = (float)weight;
        t->n++;
    }
    store_version_free(&v);
    return rc;
}

int gen_target_find(struct api_ctx *c, const struct gen_params *p, struct gen_target *ret,
                    struct err *err)
{
    struct gen_target t = { 0 };
    const char *base = c->api->o.base->name;
    const bool bare = p->model == NULL || is_base_name(c->api, p->model);
    int rc = ERR_OK;
    if (!bare && p->nadapters > 0)
        return err_set_slug(err, ERR_INVALID, NULL, "model",
                            "`model` names an adapter and so does `adapters`: leave `model` out or "
                            "make it %s", base);
    if (!bare)
        rc = add(c, p->model, 1, "model", &t, err);
    for (int i = 0; i < p->nadapters && rc == ERR_OK; i++)
        rc = add(c, p->adapters[i].name, p->adapters[i].weight, "adapters", &t, err);
    if (rc != ERR_OK)
        return rc;
    t.model = strdup(p->model ? p->model : base);
    if (t.model == NULL)
        return err_nomem(err);
    *ret = t;
    return ERR_OK;
}

void gen_target_free(struct gen_target *t)
{
    free(t->model);
    *t = (struct gen_target){ 0 };
}
