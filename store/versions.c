/* versions.c - finding, listing and loading versions. */
#include "store/store_int.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include "engine/util.h"

void store_version_free(struct store_version *v)
{
    if (v == NULL)
        return;
    free(v->base_name);
    free(v->parent);
    v->base_name = v->parent = NULL;
}

void store_versions_free(struct store_version *v, size_t n)
{
    for (size_t i = 0; v != NULL && i < n; i++)
        store_version_free(&v[i]);
    free(v);
}

/* A hash column; any other length cannot be there (the schema checks it). */
static void col_hash(struct sql *q, int i, uint8_t ret[32])
{
    size_t len;
    const void *p = sql_col_blob(q, i, &len);
    memset(ret, 0, 32);
    if (p != NULL && len == 32)
        memcpy(ret, p, 32);
}

/* A method that this program does not know was written by another one. */
static void col_method(struct sql *q, int i, enum adapter_method *ret)
{
    const char *name = sql_col_text(q, i);
    if (name != NULL && !adapter_method_parse(name, ret)) {
        err_set(q->err, ERR_DB, "%s holds an adapter of method %.40s, which this program does not"
                " know", q->st->path, name);
        q->rc = SQLITE_MISMATCH;
    }
}

void version_row(struct sql *q, struct store_version *ret)
{
    uint8_t base[32];
    *ret = (struct store_version){
        .id = sql_col_int(q, 0), .adapter = sql_col_int(q, 1), .tenant = sql_col_int(q, 2),
        .version = (int)sql_col_int(q, 5), .live = sql_col_int(q, 6) != 0,
        .rank_min = (int)sql_col_int(q, 8), .rank_max = (int)sql_col_int(q, 9),
        .alpha = sql_col_real(q, 10), .params = (uint64_t)sql_col_int(q, 11),
        .bytes = sql_col_int(q, 12), .modules = sql_col_int(q, 13),
        .base_claimed = sql_col_int(q, 16) != 0, .created_ms = sql_col_int(q, 19),
    };
    sql_col_copy(q, 3, ret->name, sizeof ret->name);
    sql_col_copy(q, 4, ret->tenant_name, sizeof ret->tenant_name);
    col_method(q, 7, &ret->method);
    col_hash(q, 14, ret->hash);
    hex32(ret->hash, ret->hash_hex);
    col_hash(q, 15, base);
    hex32(base, ret->base_hash_hex);
    ret->base_name = sql_col_dup(q, 17);
    sql_col_copy(q, 18, ret->origin, sizeof ret->origin);
    ret->parent = sql_col_dup(q, 20);
    sql_col_copy(q, 21, ret->job, sizeof ret->job);
    if (sqlite3_column_type(q->stmt, 22) != SQLITE_NULL) {
        col_hash(q, 22, base);
        hex32(base, ret->data_hash_hex);
    }
    ret->train_loss = sql_col_nan(q, 23);
    ret->eval_loss = sql_col_nan(q, 24);
    ret->eval_loss_base = sql_col_nan(q, 25);
    ret->eval_tokens = sqlite3_column_type(q->stmt, 26) == SQLITE_NULL ? -1 : sql_col_int(q, 26);
}

int version_rows(struct sql *q, struct store_version **ret, size_t *ret_n)
{
    struct store_version *list = NULL;
    size_t n = 0, cap = 0;
    while (sql_step(q) == 1) {
        if (n == cap) {
            cap = cap ? cap * 2 : 16;
            void *p = realloc(list, cap * sizeof *list);
            if (p == NULL) {
                q->rc = SQLITE_NOMEM;
                break;
            }
            list = p;
        }
        version_row(q, &list[n++]);
    }
    int rc = sql_close(q);
    if (rc != ERR_OK) {
        store_versions_free(list, n);
        return rc;
    }
    *ret = list;
    *ret_n = n;
    return ERR_OK;
}

/* The one row of q or ERR_NOT_FOUND without a sentence; closes q. */
static int version_one(struct sql *q, struct store_version *ret)
{
    struct store_version v = { .id = 0 };
    int row = sql_step(q);
    if (row == 1)
        version_row(q, &v);
    int rc = sql_close(q);
    if (rc == ERR_OK && row == 0)
        rc = ERR_NOT_FOUND;
    if (rc == ERR_OK)
        *ret = v;
    else
        store_version_free(&v);
    return rc;
}

int version_get(struct store *st, int64_t id, struct store_version *ret, struct err *err)
{
    struct sql q = sql_open(st, SELECT_VERSION "WHERE v.id = ?", err);
    sql_int(&q, id);
    int rc = version_one(&q, ret);
    if (rc == ERR_NOT_FOUND)
        err_set(err, rc, "there is no version with the id %lld", (long long)id);
    return rc;
}

/* --- references ---------------------------------------------------------------------------- */
struct ref {
    char owner[STORE_NAME_MAX + 1]; /* "": not given */
    char name[STORE_NAME_MAX + 1];
    int version;                    /* 0: the live one */
};

static bool copy_name(char *ret, const char *from, size_t len)
{
    if (len == 0 || len > STORE_NAME_MAX)
        return false;
    memcpy(ret, from, len);
    ret[len] = '\0';
    return true;
}

/* [OWNER/]NAME[@V]; V is a plain number without a sign or leading zeros. */
static bool ref_parse(const char *text, struct ref *ret)
{
    *ret = (struct ref){ .version = 0 };
    const char *slash = strchr(text, '/');
    if (slash != NULL) {
        if (!copy_name(ret->owner, text, (size_t)(slash - text)))
            return false;
        text = slash + 1;
    }
    const char *at = strchr(text, '@');
    if (!copy_name(ret->name, text, at != NULL ? (size_t)(at - text) : strlen(text)))
        return false;
    if (at == NULL)
        return true;
    const char *p = at + 1;
    if (*p < '1' || *p > '9')
        return false;
    int64_t v = 0;
    for (; *p >= '0' && *p <= '9' && v <= INT_MAX; p++)
        v = v * 10 + (*p - '0');
    ret->version = (int)v;
    return *p == '\0' && v <= INT_MAX;
}

/* Cut what follows the last ':' off `text`; NULL if there is none. */
static char *cut_last(char *text)
{
    char *colon = strrchr(text, ':');
    if (colon == NULL)
        return NULL;
    *colon = '\0';
    return colon + 1;
}

/* ft:BASE:TENANT:NAME:JOB[:ckpt-step-N], from the right, because a base may have any name. */
struct trained_ref {
    char *own;                      /* what the others point into */
    const char *base, *tenant, *name, *job;
    int64_t step;                   /* -1: what the job made */
};

static bool trained_parse(const char *text, struct trained_ref *r)
{
    static const char step[] = "ckpt-step-";
    *r = (struct trained_ref){ .step = -1, .own = strdup(text) };
    if (r->own == NULL)
        return false;
    r->job = cut_last(r->own);
    if (r->job != NULL && strncmp(r->job, step, sizeof step - 1) == 0) {
        const char *n = r->job + sizeof step - 1;
        const size_t len = strlen(n);
        if (len == 0 || len > 15 || strspn(n, "0123456789") != len || (n[0] == '0' && len > 1))
            return false;
        r->step = strtoll(n, NULL, 10);
        r->job = cut_last(r->own);
    }
    r->name = r->job != NULL ? cut_last(r->own) : NULL;
    r->tenant = r->name != NULL ? cut_last(r->own) : NULL;
    r->base = r->tenant != NULL ? r->own + 3 : NULL;
    return r->base != NULL && strlen(r->own) > 3;
}

/* ERR_NOT_FOUND without a sentence if there is none. */
static int find_trained(struct store *st, int64_t tenant, const char *text,
                        struct store_version *ret, struct err *err)
{
    struct trained_ref r;
    if (!trained_parse(text, &r)) {
        const bool nomem = r.own == NULL;
        free(r.own);
        return nomem ? err_nomem(err) : ERR_NOT_FOUND;
    }
    struct sql q = r.step < 0 ?
        sql_open(st, SELECT_VERSION "JOIN job j ON j.result_version_id = v.id"
                 " WHERE j.tenant_id = ? AND j.ref = 'ftjob-' || ? AND j.base_name = ?"
                 " AND j.adapter_name = ? AND t.name = ?", err) :
        sql_open(st, SELECT_VERSION "JOIN job_checkpoint c ON c.version_id = v.id"
                 " JOIN job j ON j.id = c.job_id"
                 " WHERE j.tenant_id = ? AND j.ref = 'ftjob-' || ? AND j.base_name = ?"
                 " AND j.adapter_name = ? AND t.name = ? AND c.step = ?", err);
    sql_int(&q, tenant);
    sql_text(&q, r.job);
    sql_text(&q, r.base);
    sql_text(&q, r.name);
    sql_text(&q, r.tenant);
    if (r.step >= 0)
        sql_int(&q, r.step);
    int rc = version_one(&q, ret);
    free(r.own);
    return rc;
}

static int no_model(const char *ref, struct err *err)
{
    return err_set_slug(err, ERR_NOT_FOUND, "model_not_found", "model",
                        "there is no model or adapter %.150s", ref);
}

/* The live version is asked for and there is none: say what could be asked for instead. */
static int no_live(struct store *st, int64_t tenant, const char *ref, const struct ref *r,
                   struct err *err)
{
    struct sql q = sql_open(st,
                            "SELECT max(v.number) FROM adapter a JOIN version v"
                            " ON v.adapter_id = a.id WHERE a.tenant_id = ? AND a.name = ?", err);
    sql_int(&q, tenant);
    sql_text(&q, r->name);
    int newest = sql_step(&q) == 1 ? (int)sql_col_int(&q, 0) : 0;
    int rc = sql_close(&q);
    if (rc != ERR_OK)
        return rc;
    if (newest == 0)
        return no_model(ref, err);
    return err_set_slug(err, ERR_NOT_FOUND, "model_not_found", "model",
                        "adapter %s has no live version: ask for %s@%d, or promote one", r->name,
                        r->name, newest);
}

int store_version_find(struct store *st, int64_t tenant, const char *ref,
                       struct store_version *ret, struct err *err)
{
    struct ref r;
    if (strncmp(ref, "ft:", 3) == 0) {
        int found = find_trained(st, tenant, ref, ret, err);
        return found == ERR_NOT_FOUND ? no_model(ref, err) : found;
    }
    if (!ref_parse(ref, &r))
        return no_model(ref, err);
    struct sql q = sql_open(st, SELECT_VERSION
                            "WHERE a.tenant_id = ?1 AND a.name = ?2"
                            " AND v.number = coalesce(nullif(?3, 0), a.live)"
                            " AND (?4 = '' OR t.name = ?4)", err);
    sql_int(&q, tenant);
    sql_text(&q, r.name);
    sql_int(&q, r.version);
    sql_text(&q, r.owner);
    int rc = version_one(&q, ret);
    if (rc == ERR_NOT_FOUND && r.version == 0 && r.owner[0] == '\0')
        return no_live(st, tenant, ref, &r, err);
    if (rc == ERR_NOT_FOUND)
        return no_model(ref, err);
    return rc;
}

int store_version_list(struct store *st, int64_t tenant, const char *name,
                       struct store_version **ret, size_t *ret_n, struct err *err)
{
    struct sql q = sql_open(st, SELECT_VERSION "WHERE a.tenant_id = ? AND a.name = ?"
                            " AND a.job_id IS NULL ORDER BY v.number", err);
    sql_int(&q, tenant);
    sql_text(&q, name);
    struct store_version *list;
    size_t n;
    int rc = version_rows(&q, &list, &n);
    if (rc != ERR_OK)
        return rc;
    if (n == 0) { /* an adapter always has a version */
        store_versions_free(list, n);
        return no_model(name, err);
    }
    *ret = list;
    *ret_n = n;
    return ERR_OK;
}

/* --- loading ------------------------------------------------------------------------------- */
static void read_facts(struct sql *q, struct adapter_src *a)
{
    col_method(q, 0, &a->method);
    a->rank_min = (int)sql_col_int(q, 1);
    a->rank_max = (int)sql_col_int(q, 2);
    a->alpha = sql_col_real(q, 3);
    a->params = (uint64_t)sql_col_int(q, 4);
    a->bytes = (size_t)sql_col_int(q, 5);
    col_hash(q, 6, a->hash);
    a->base_name = sql_col_dup(q, 7);
    a->config = sql_col_dup(q, 8);
    a->config_len = a->config != NULL ? strlen(a->config) : 0;
    a->init_r = (int)sql_col_int(q, 9);
    a->target_r = (int)sql_col_int(q, 10);
    a->tinit = (int)sql_col_int(q, 11);
    a->tfinal = (int)sql_col_int(q, 12);
    a->deltaT = (int)sql_col_int(q, 13);
    a->total_step = (int)sql_col_int(q, 14);
    a->beta1 = sql_col_real(q, 15);
    a->beta2 = sql_col_real(q, 16);
    a->orth_reg_weight = sql_col_real(q, 17);
}

static int load_facts(struct store *st, int64_t version_id, struct adapter_src *a, struct err *err)
{
    struct sql q = sql_open(st,
                            "SELECT method, rank_min, rank_max, alpha, params, bytes, hash,"
                            " base_name, config, init_r, target_r, tinit, tfinal, delta_t,"
                            " total_step, beta1, beta2, orth_reg_weight"
                            " FROM version WHERE id = ?", err);
    sql_int(&q, version_id);
    int row = sql_step(&q);
    if (row == 1)
        read_facts(&q, a);
    int rc = sql_close(&q);
    if (rc == ERR_OK && row == 0)
        rc = err_set(err, ERR_NOT_FOUND, "there is no version with the id %lld",
                     (long long)version_id);
    return rc;
}

/* Reads what is there.  *ret is set unless memory is out, also after a failure. */
static int read_version(struct store *st, int64_t version_id, struct verify *v, struct room *room,
                        struct adapter_src **ret, struct err *err)
{
    struct adapter_src *a = *ret = calloc(1, sizeof *a);
    if (a == NULL)
        return err_nomem(err);
    int rc = store_begin_read(st, err);
    if (rc == ERR_OK) {
        rc = load_facts(st, version_id, a, err);
        if (rc == ERR_OK)
            rc = tensors_get(st, version_id, v, room, a, err);
        rc = store_end(st, rc, err);
    }
    return rc;
}

/* Waits for the hash of what was read with `rc`. */
static int check_hash(struct store *st, int64_t version_id, struct verify *v, int rc, struct err *err)
{
    const bool same = verify_end(v, rc == ERR_OK);
    if (rc == ERR_OK && !same)
        rc = err_set(err, ERR_DB,
                     "the database %s is damaged: the tensors of version id %lld are not what was"
                     " put in", st->path, (long long)version_id);
    return rc;
}

int store_version_load(struct store *st, int64_t version_id, struct adapter_src **ret,
                       struct err *err)
{
    struct verify v = { .src = NULL };
    struct adapter_src *a;
    int rc = read_version(st, version_id, &v, NULL, &a, err);
    rc = check_hash(st, version_id, &v, rc, err);
    if (rc != ERR_OK) {
        adapter_src_free(a);
        return rc;
    }
    *ret = a;
    return ERR_OK;
}

enum { ROOM_MOST = 64 << 20 }; /* bytes that are kept: the kernel clears all that it gives anew */

int store_version_build(struct store *st, int64_t version_id, const struct base *base,
                        struct adapter **spare, struct adapter **ret, struct err *err)
{
    struct verify v = { .slot = verify_slot(st, version_id), .version_id = version_id };
    struct err wrong = { 0 };
    struct adapter_src *a;
    struct adapter *built = NULL;
    int rc = read_version(st, version_id, &v, &st->room, &a, err);
    /* norms are stored, so they are computed from what was checked */
    const bool norms = rc == ERR_OK && a->method == METHOD_DORA;
    int made = ERR_OK;
    if (rc == ERR_OK && !norms)
        made = adapter_build(&base->arch, a, version_id, spare, &built, &wrong);
    rc = check_hash(st, version_id, &v, rc, err);
    if (rc == ERR_OK && norms)
        made = extras_add_norms(st, version_id, base, a, &wrong);
    if (rc == ERR_OK && norms && made == ERR_OK)
        made = adapter_build(&base->arch, a, version_id, spare, &built, &wrong);
    if (rc == ERR_OK && made != ERR_OK) {
        rc = made;
        if (err != NULL)
            *err = wrong;
    }
    adapter_src_free(a);
    if (st->room.bytes > ROOM_MOST) {
        free(st->room.p);
        st->room = (struct room){ .p = NULL };
    }
    if (rc != ERR_OK) {
        adapter_free(built);
        return rc;
    }
    *ret = built;
    return ERR_OK;
}

int store_version_modules(struct store *st, int64_t version_id, struct adapter_src **ret,
                          struct err *err)
{
    struct adapter_src *a;
    const int rc = read_version(st, version_id, NULL, NULL, &a, err);
    if (rc != ERR_OK) {
        adapter_src_free(a);
        return rc;
    }
    *ret = a;
    return ERR_OK;
}
