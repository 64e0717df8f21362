/* adapters.c - names, version numbers, and which version is live. */
#include "store/store_int.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "engine/util.h"

/* *ret 0 if there is none. */
static int adapter_id(struct store *st, int64_t tenant, const char *name, int64_t *ret,
                      struct err *err)
{
    struct sql q = sql_open(st,
                            "SELECT id FROM adapter WHERE tenant_id = ? AND name = ?"
                            " AND job_id IS NULL", err);
    sql_int(&q, tenant);
    sql_text(&q, name);
    *ret = sql_step(&q) == 1 ? sql_col_int(&q, 0) : 0;
    return sql_close(&q);
}

static int adapter_need(struct store *st, int64_t tenant, const char *name, int64_t *ret,
                        struct err *err)
{
    int rc = adapter_id(st, tenant, name, ret, err);
    if (rc == ERR_OK && *ret == 0)
        rc = err_set_slug(err, ERR_NOT_FOUND, "model_not_found", NULL,
                          "there is no adapter %.100s", name);
    return rc;
}

static int set_live(struct store *st, int64_t adapter, int version, struct err *err)
{
    struct sql q = sql_open(st, "UPDATE adapter SET live = ? WHERE id = ?", err);
    sql_int(&q, version);
    sql_int(&q, adapter);
    return sql_run(&q);
}

/* --- put ----------------------------------------------------------------------------------- */
/* The hidden adapter of p->job; 0 if it has none yet. */
static int hidden_id(struct store *st, struct version_put *p, struct err *err)
{
    struct sql q = sql_open(st, "SELECT id FROM adapter WHERE tenant_id = ? AND job_id = ?", err);
    sql_int(&q, p->tenant);
    sql_int(&q, p->job);
    p->adapter = sql_step(&q) == 1 ? sql_col_int(&q, 0) : 0;
    return sql_close(&q);
}

/* The same content for the same base; version_id 0 if there is none. */
static int put_find_same(struct store *st, struct version_put *p, struct err *err)
{
    struct sql q = sql_open(st,
                            "SELECT id, number FROM version"
                            " WHERE adapter_id = ? AND hash = ? AND base_hash = ?", err);
    sql_int(&q, p->adapter);
    sql_blob(&q, p->src->hash, 32);
    sql_blob(&q, p->base_hash, 32);
    if (sql_step(&q) == 1) {
        p->version_id = sql_col_int(&q, 0);
        p->version = (int)sql_col_int(&q, 1);
    }
    return sql_close(&q);
}

static int put_adapter(struct store *st, struct version_put *p, struct err *err)
{
    struct sql q = sql_open(st,
                            "INSERT INTO adapter (tenant_id, name, created_ms, job_id)"
                            " VALUES (?, ?, ?, ?)", err);
    sql_int(&q, p->tenant);
    sql_text(&q, p->name);
    sql_int(&q, now_unix_ms());
    sql_int_or_null(&q, p->checkpoint > 0 ? p->job : 0);
    int rc = sql_run(&q);
    p->adapter = sqlite3_last_insert_rowid(st->db);
    return rc;
}

/* Take the next number of this name, which goes on counting when the adapter is deleted. */
static int put_number(struct store *st, struct version_put *p, struct err *err)
{
    p->version = p->checkpoint;
    if (p->checkpoint > 0)
        return ERR_OK;
    struct sql q = sql_open(st,
                            "INSERT INTO adapter_number (tenant_id, name, next) VALUES (?, ?, 2)"
                            " ON CONFLICT DO UPDATE SET next = next + 1 RETURNING next - 1", err);
    sql_int(&q, p->tenant);
    sql_text(&q, p->name);
    int64_t n = sql_step(&q) == 1 ? sql_col_int(&q, 0) : 0;
    int rc = sql_close(&q);
    if (rc == ERR_OK && n > INT_MAX)
        rc = err_set(err, ERR_CONFLICT, "adapter %s has no version numbers left", p->name);
    p->version = (int)n;
    return rc;
}

/* Where it comes from and how good it is. */
static void bind_training(struct sql *q, const struct version_put *p)
{
    const struct store_quality *u = p->quality;
    sql_int_or_null(q, p->parent);
    sql_int_or_null(q, p->job);
    if (p->data_hash != NULL)
        sql_blob(q, p->data_hash, 32);
    else
        sql_null(q);
    sql_real(q, u != NULL ? u->train_loss : NAN);
    sql_real(q, u != NULL ? u->eval_loss : NAN);
    sql_real(q, u != NULL ? u->eval_loss_base : NAN);
    if (u != NULL && u->eval_tokens >= 0)
        sql_int(q, u->eval_tokens);
    else
        sql_null(q);
}

static void bind_schedule(struct sql *q, const struct adapter_src *a)
{
    if (a->method != METHOD_ADALORA) {
        for (int i = 0; i < 9; i++)
            sql_null(q);
        return;
    }
    sql_int(q, a->init_r);
    sql_int(q, a->target_r);
    sql_int(q, a->tinit);
    sql_int(q, a->tfinal);
    sql_int(q, a->deltaT);
    sql_int(q, a->total_step);
    sql_real(q, a->beta1);
    sql_real(q, a->beta2);
    sql_real(q, a->orth_reg_weight);
}

static int put_version(struct store *st, struct version_put *p, struct err *err)
{
    const struct adapter_src *a = p->src;
    struct sql q = sql_open(st,
                            "INSERT INTO version (tenant_id, adapter_id, number, method, rank_min,"
                            " rank_max, alpha, params, bytes, modules, hash, base_hash,"
                            " base_claimed, base_name, config, origin, created_ms, init_r, target_r,"
                            " tinit, tfinal, delta_t, total_step, beta1, beta2, orth_reg_weight,"
                            " parent_id, job_id, data_hash, train_loss, eval_loss, eval_loss_base,"
                            " eval_tokens)"
                            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?,"
                            " ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", err);
    sql_int(&q, p->tenant);
    sql_int(&q, p->adapter);
    sql_int(&q, p->version);
    sql_text(&q, adapter_method_name(a->method));
    sql_int(&q, a->rank_min);
    sql_int(&q, a->rank_max);
    sql_real(&q, a->alpha);
    sql_int(&q, (int64_t)a->params);
    sql_int(&q, (int64_t)a->bytes);
    sql_int(&q, (int64_t)a->nmodules);
    sql_blob(&q, a->hash, 32);
    sql_blob(&q, p->base_hash, 32);
    sql_int(&q, p->o->base_claimed);
    sql_text(&q, a->base_name);
    sql_text_n(&q, a->config != NULL ? a->config : "", a->config_len);
    sql_text(&q, p->o->origin);
    sql_int(&q, now_unix_ms());
    bind_schedule(&q, a);
    bind_training(&q, p);
    int rc = sql_run(&q);
    p->version_id = sqlite3_last_insert_rowid(st->db);
    return rc;
}

/* Everything of a new version but which one is live. */
static int put_new(struct store *st, struct version_put *p, struct err *err)
{
    int rc = p->adapter == 0 ? put_adapter(st, p, err) : ERR_OK;
    if (rc == ERR_OK)
        rc = put_number(st, p, err);
    if (rc == ERR_OK)
        rc = put_version(st, p, err);
    if (rc == ERR_OK)
        rc = tensors_put(st, p->tenant, p->version_id, p->src, err);
    if (rc == ERR_OK && p->checkpoint == 0)
        rc = store_audit(st, p->tenant, "adapter.put", err, "%s@%d", p->name, p->version);
    return rc;
}

int version_put(struct store *st, struct version_put *p, struct store_version *ret, bool *ret_new,
                struct err *err)
{
    struct store_tenant t;
    int rc = store_tenant_get(st, p->tenant, &t, err);
    if (rc == ERR_OK)
        rc = p->checkpoint > 0 ? hidden_id(st, p, err)
                               : adapter_id(st, p->tenant, p->name, &p->adapter, err);
    if (rc == ERR_OK && p->adapter != 0)
        rc = put_find_same(st, p, err);
    const bool is_new = p->version_id == 0;
    if (rc == ERR_OK && is_new)
        rc = put_new(st, p, err);
    if (rc == ERR_OK)
        rc = version_get(st, p->version_id, ret, err);
    if (rc == ERR_OK && p->o->activate && !ret->live) {
        ret->live = true;
        rc = set_live(st, p->adapter, p->version, err);
        if (rc == ERR_OK)
            rc = store_audit(st, p->tenant, "adapter.promote", err, "%s@%d", p->name, p->version);
    }
    *ret_new = is_new;
    return rc;
}

int version_put_check(struct version_put *p, struct err *err)
{
    const struct adapter_src *src = p->src;
    if (p->o->base_hash_hex == NULL || !hex32_parse(p->o->base_hash_hex, p->base_hash))
        return err_set(err, ERR_INTERNAL, "an adapter needs the hash of its base");
    if (src->config != NULL && memchr(src->config, '\0', src->config_len) != NULL)
        return err_set(err, ERR_INVALID, "adapter_config.json has a zero byte");
    /* A hash that does not belong to the content would make every later load fail. */
    uint8_t hash[32];
    adapter_src_hash(src, hash);
    if (memcmp(hash, src->hash, sizeof hash) != 0)
        return err_set(err, ERR_INTERNAL, "the content of adapter %s is not what its hash says",
                       p->name);
    return ERR_OK;
}

int store_adapter_put(struct store *st, int64_t tenant, const char *name,
                      const struct adapter_src *src, const struct store_put_opts *o,
                      struct store_version *ret, bool *ret_new, struct err *err)
{
    struct version_put p = { .tenant = tenant, .name = name, .src = src, .o = o,
                             .parent = o->parent, .data_hash = o->data_hash,
                             .quality = o->quality };
    struct store_version v = { .id = 0 };
    bool is_new = false;
    int rc = store_name_check("an adapter", name, err);
    if (rc == ERR_OK)
        rc = version_put_check(&p, err);
    if (rc == ERR_OK)
        rc = store_begin(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, version_put(st, &p, &v, &is_new, err), err);
    if (rc != ERR_OK) {
        store_version_free(&v);
        return rc;
    }
    *ret = v;
    *ret_new = is_new;
    return ERR_OK;
}

/* --- lists --------------------------------------------------------------------------------- */
int store_adapter_list(struct store *st, int64_t tenant, const char *after, int limit,
                       struct store_version **ret, size_t *ret_n, struct err *err)
{
    struct sql q = sql_open(st, SELECT_VERSION
                            "WHERE a.tenant_id = ? AND a.name > ? AND a.job_id IS NULL"
                            " AND v.number = coalesce(a.live,"
                            " (SELECT max(w.number) FROM version w WHERE w.adapter_id = a.id))"
                            " ORDER BY a.name LIMIT ?", err);
    sql_int(&q, tenant);
    sql_text(&q, after != NULL ? after : "");
    sql_int(&q, limit > 0 ? limit : -1);
    return version_rows(&q, ret, ret_n);
}

int store_adapter_count(struct store *st, int64_t tenant, int64_t *ret, struct err *err)
{
    struct sql q = sql_open(st,
                            "SELECT count(*) FROM adapter WHERE (?1 = 0 OR tenant_id = ?1)"
                            " AND job_id IS NULL", err);
    sql_int(&q, tenant);
    int64_t n = sql_step(&q) == 1 ? sql_col_int(&q, 0) : 0;
    int rc = sql_close(&q);
    if (rc == ERR_OK)
        *ret = n;
    return rc;
}

/* --- promote and delete -------------------------------------------------------------------- */
static int version_id(struct store *st, int64_t adapter, const char *name, int version,
                      int64_t *ret, bool *ret_live, struct err *err)
{
    struct sql q = sql_open(st,
                            "SELECT v.id, a.live IS v.number FROM version v"
                            " JOIN adapter a ON a.id = v.adapter_id"
                            " WHERE v.adapter_id = ? AND v.number = ?", err);
    sql_int(&q, adapter);
    sql_int(&q, version);
    int row = sql_step(&q);
    if (row == 1) {
        *ret = sql_col_int(&q, 0);
        *ret_live = sql_col_int(&q, 1) != 0;
    }
    int rc = sql_close(&q);
    if (rc == ERR_OK && row == 0)
        rc = err_set_slug(err, ERR_NOT_FOUND, "model_not_found", NULL,
                          "adapter %s has no version %d", name, version);
    return rc;
}

static int promote(struct store *st, int64_t tenant, const char *name, int version,
                   struct err *err)
{
    int64_t adapter = 0, id = 0;
    bool live = false;
    int rc = adapter_need(st, tenant, name, &adapter, err);
    if (rc == ERR_OK)
        rc = version_id(st, adapter, name, version, &id, &live, err);
    if (rc != ERR_OK || live)
        return rc;
    rc = set_live(st, adapter, version, err);
    if (rc == ERR_OK)
        rc = store_audit(st, tenant, "adapter.promote", err, "%s@%d", name, version);
    return rc;
}

int store_adapter_promote(struct store *st, int64_t tenant, const char *name, int version,
                          struct err *err)
{
    int rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    return store_end(st, promote(st, tenant, name, version, err), err);
}

static int delete_adapter(struct store *st, int64_t tenant, int64_t adapter, const char *name,
                          struct err *err)
{
    struct sql q = sql_open(st, "DELETE FROM adapter WHERE id = ?", err);
    sql_int(&q, adapter);
    int rc = sql_run(&q);
    if (rc == ERR_OK)
        rc = store_audit(st, tenant, "adapter.delete", err, "%s", name);
    return rc;
}

int store_adapter_delete(struct store *st, int64_t tenant, const char *name, struct err *err)
{
    int64_t adapter;
    int rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    rc = adapter_need(st, tenant, name, &adapter, err);
    if (rc == ERR_OK)
        rc = delete_adapter(st, tenant, adapter, name, err);
    rc = store_end(st, rc, err);
    if (rc == ERR_OK)
        store_shrink(st);
    return rc;
}

static int delete_version(struct store *st, int64_t tenant, const char *name, int version,
                          struct err *err)
{
    int64_t adapter = 0, id = 0;
    bool live = false;
    int rc = adapter_need(st, tenant, name, &adapter, err);
    if (rc == ERR_OK)
        rc = version_id(st, adapter, name, version, &id, &live, err);
    if (rc == ERR_OK && live)
        rc = err_set(err, ERR_CONFLICT,
                     "version %d of adapter %s is live: promote another one first, or delete the"
                     " whole adapter", version, name);
    if (rc != ERR_OK)
        return rc;
    struct sql q = sql_open(st, "DELETE FROM version WHERE id = ?", err);
    sql_int(&q, id);
    rc = sql_run(&q);
    if (rc == ERR_OK)
        rc = store_audit(st, tenant, "version.delete", err, "%s@%d", name, version);
    if (rc != ERR_OK)
        return rc;
    /* An adapter always has a version; the counter of its name stays. */
    q = sql_open(st,
                 "DELETE FROM adapter WHERE id = ?1"
                 " AND NOT EXISTS (SELECT 1 FROM version WHERE adapter_id = ?1)", err);
    sql_int(&q, adapter);
    return sql_run(&q);
}

int store_version_delete(struct store *st, int64_t tenant, const char *name, int version,
                         struct err *err)
{
    int rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    rc = store_end(st, delete_version(st, tenant, name, version, err), err);
    if (rc == ERR_OK)
        store_shrink(st);
    return rc;
}
