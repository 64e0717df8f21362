/* tenants.c - owners of everything else. */
#include "store/store_int.h"

#include <stdlib.h>
#include <string.h>
#include "engine/util.h"

#define SELECT_TENANT                                                                            \
    "SELECT t.id, t.name, t.created_ms,"                                                         \
    " (SELECT count(*) FROM adapter a WHERE a.tenant_id = t.id AND a.job_id IS NULL),"           \
    " (SELECT count(*) FROM access_key k WHERE k.tenant_id = t.id AND k.revoked_ms = 0)"         \
    " FROM tenant t "

static void tenant_row(struct sql *q, struct store_tenant *ret)
{
    *ret = (struct store_tenant){ .id = sql_col_int(q, 0), .created_ms = sql_col_int(q, 2),
                                  .nadapters = sql_col_int(q, 3), .nkeys = sql_col_int(q, 4) };
    sql_col_copy(q, 1, ret->name, sizeof ret->name);
}

int store_tenant_add(struct store *st, const char *name, int64_t *ret_id, struct err *err)
{
    int rc = store_name_check("a tenant", name, err);
    if (rc != ERR_OK)
        return rc;
    rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    struct sql q = sql_open(st, "INSERT INTO tenant (name, created_ms) VALUES (?, ?)", err);
    sql_text(&q, name);
    sql_int(&q, now_unix_ms());
    rc = sql_run(&q);
    if (rc == ERR_CONFLICT)
        err_set(err, rc, "there is a tenant %s already", name);
    int64_t id = sqlite3_last_insert_rowid(st->db);
    if (rc == ERR_OK)
        rc = store_audit(st, id, "tenant.add", err, "%s", name);
    rc = store_end(st, rc, err);
    if (rc == ERR_OK)
        *ret_id = id;
    return rc;
}

int store_tenant_find(struct store *st, const char *name, int64_t *ret_id, struct err *err)
{
    struct sql q = sql_open(st, "SELECT id FROM tenant WHERE name = ?", err);
    sql_text(&q, name);
    int row = sql_step(&q);
    int64_t id = row == 1 ? sql_col_int(&q, 0) : 0;
    int rc = sql_close(&q);
    if (rc == ERR_OK && row == 0)
        rc = err_set(err, ERR_NOT_FOUND, "there is no tenant %.100s", name);
    if (rc == ERR_OK)
        *ret_id = id;
    return rc;
}

int store_tenant_get(struct store *st, int64_t id, struct store_tenant *ret, struct err *err)
{
    struct sql q = sql_open(st, SELECT_TENANT "WHERE t.id = ?", err);
    sql_int(&q, id);
    struct store_tenant t = { .id = 0 };
    int row = sql_step(&q);
    if (row == 1)
        tenant_row(&q, &t);
    int rc = sql_close(&q);
    if (rc == ERR_OK && row == 0)
        rc = err_set(err, ERR_NOT_FOUND, "there is no tenant number %lld", (long long)id);
    if (rc == ERR_OK)
        *ret = t;
    return rc;
}

int store_tenant_list(struct store *st, struct store_tenant **ret, size_t *ret_n, struct err *err)
{
    struct store_tenant *list = NULL;
    size_t n = 0, cap = 0;
    struct sql q = sql_open(st, SELECT_TENANT "ORDER BY t.name", err);
    while (sql_step(&q) == 1) {
        if (n == cap) {
            cap = cap ? cap * 2 : 16;
            void *p = realloc(list, cap * sizeof *list);
            if (p == NULL) {
                q.rc = SQLITE_NOMEM;
                break;
            }
            list = p;
        }
        tenant_row(&q, &list[n++]);
    }
    int rc = sql_close(&q);
    if (rc != ERR_OK) {
        free(list);
        return rc;
    }
    *ret = list;
    *ret_n = n;
    return ERR_OK;
}

/* Jobs that have ended, with their checkpoints, and files go with the tenant. */
static int remove_jobs(struct store *st, int64_t id, const char *name, struct err *err)
{
    struct sql q = sql_open(st,
                            "SELECT count(*) FROM job WHERE tenant_id = ? AND status IN ('queued',"
                            " 'validating_files', 'running', 'paused')", err);
    sql_int(&q, id);
    const int64_t n = sql_step(&q) == 1 ? sql_col_int(&q, 0) : 0;
    int rc = sql_close(&q);
    if (rc == ERR_OK && n > 0)
        rc = err_set(err, ERR_CONFLICT, "tenant %s still has %lld fine-tuning job%s that %s not"
                     " ended", name, (long long)n, n == 1 ? "" : "s", n == 1 ? "has" : "have");
    static const char *const all[] = { "DELETE FROM job WHERE tenant_id = ?",
                                       "DELETE FROM file WHERE tenant_id = ?" };
    for (int i = 0; i < 2 && rc == ERR_OK; i++) {
        q = sql_open(st, all[i], err);
        sql_int(&q, id);
        rc = sql_run(&q);
    }
    return rc;
}

/* Inside the caller's transaction. */
static int remove_row(struct store *st, const char *name, struct err *err)
{
    int64_t id;
    struct store_tenant t;
    int rc = store_tenant_find(st, name, &id, err);
    if (rc == ERR_OK)
        rc = store_tenant_get(st, id, &t, err);
    if (rc != ERR_OK)
        return rc;
    if (id == STORE_TENANT_DEFAULT)
        return err_set(err, ERR_CONFLICT, "tenant %s cannot be removed", name);
    if (t.nadapters > 0)
        return err_set(err, ERR_CONFLICT, "tenant %s still has %lld adapter%s", name,
                       (long long)t.nadapters, t.nadapters == 1 ? "" : "s");
    rc = remove_jobs(st, id, name, err);
    if (rc != ERR_OK)
        return rc;
    struct sql q = sql_open(st, "DELETE FROM tenant WHERE id = ?", err);
    sql_int(&q, id);
    rc = sql_run(&q);
    if (rc == ERR_OK)
        rc = store_audit(st, id, "tenant.remove", err, "%s", name);
    return rc;
}

int store_tenant_remove(struct store *st, const char *name, struct err *err)
{
    int rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    return store_end(st, remove_row(st, name, err), err);
}
