/* files.c - uploaded files.
 *
 * A file is 'pending' until its last chunk is there; what a killed process leaves pending is removed
 * after an hour (store_files_clean), when no upload can still be at it. */
#include "store/store_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "engine/util.h"

enum { PENDING_MS = 60 * 60 * 1000 };

/* Jobs that still need file f. */
#define IN_USE                                                                                   \
    "EXISTS (SELECT 1 FROM job j WHERE j.tenant_id = f.tenant_id AND j.status IN ('queued',"     \
    " 'validating_files', 'running', 'paused')"                                                  \
    " AND f.ref IN (j.training_file, j.validation_file, j.eval_file))"
/* A file that a client can see: ?1 tenant, ?2 now. */
#define SELECT_FILE                                                                              \
    "SELECT f.id, f.tenant_id, f.ref, f.name, f.purpose, f.bytes, f.hash, f.created_ms,"         \
    " coalesce(f.expires_ms, 0) FROM file f WHERE f.tenant_id = ?1 AND f.status = 'processed'"   \
    " AND (f.expires_ms IS NULL OR f.expires_ms > ?2 OR " IN_USE ") "

static void file_row(struct sql *q, struct store_file *ret)
{
    size_t len;
    *ret = (struct store_file){ .id = sql_col_int(q, 0), .tenant = sql_col_int(q, 1),
                                .bytes = sql_col_int(q, 5), .created_ms = sql_col_int(q, 7),
                                .expires_ms = sql_col_int(q, 8) };
    sql_col_copy(q, 2, ret->ref, sizeof ret->ref);
    sql_col_copy(q, 3, ret->name, sizeof ret->name);
    sql_col_copy(q, 4, ret->purpose, sizeof ret->purpose);
    const void *hash = sql_col_blob(q, 6, &len);
    if (hash != NULL && len == sizeof ret->hash)
        memcpy(ret->hash, hash, len);
}

static int no_file(const char *ref, struct err *err)
{
    return err_set_slug(err, ERR_NOT_FOUND, "file_not_found", "file_id",
                        "there is no file %.100s", ref);
}

int store_file_get(struct store *st, int64_t tenant, const char *ref, struct store_file *ret,
                   struct err *err)
{
    struct store_file f;
    struct sql q = sql_open(st, SELECT_FILE "AND f.ref = ?3", err);
    sql_int(&q, tenant);
    sql_int(&q, now_unix_ms());
    sql_text(&q, ref);
    const int row = sql_step(&q);
    if (row == 1)
        file_row(&q, &f);
    const int rc = sql_close(&q);
    if (rc != ERR_OK)
        return rc;
    if (row == 0)
        return no_file(ref, err);
    *ret = f;
    return ERR_OK;
}

/* --- adding ---------------------------------------------------------------------------------- */
static int add_row(struct store *st, const struct store_file *f, int64_t *ret_id, struct err *err)
{
    struct store_tenant t;
    int rc = store_tenant_get(st, f->tenant, &t, err);
    if (rc != ERR_OK)
        return rc;
    struct sql q = sql_open(st,
                            "INSERT INTO file (tenant_id, ref, name, purpose, status, bytes, hash,"
                            " created_ms, expires_ms) VALUES (?, ?, ?, ?, 'pending', ?, ?, ?, ?)",
                            err);
    sql_int(&q, f->tenant);
    sql_text(&q, f->ref);
    sql_text(&q, f->name);
    sql_text(&q, f->purpose);
    sql_int(&q, f->bytes);
    sql_blob(&q, f->hash, sizeof f->hash);
    sql_int(&q, f->created_ms);
    sql_int_or_null(&q, f->expires_ms);
    rc = sql_run(&q);
    *ret_id = sqlite3_last_insert_rowid(st->db);
    return rc;
}

static int add_done(struct store *st, const struct store_file *f, struct err *err)
{
    struct sql q = sql_open(st, "UPDATE file SET status = 'processed' WHERE id = ? RETURNING 1", err);
    sql_int(&q, f->id);
    const int row = sql_step(&q);
    int rc = sql_close(&q);
    if (rc == ERR_OK && row != 1) /* its tenant is gone */
        rc = err_set(err, ERR_CONFLICT, "the upload was removed while it was being written");
    if (rc == ERR_OK)
        rc = store_audit(st, f->tenant, "file.put", err, "%s %s", f->ref, f->name);
    return rc;
}

static int delete_row(struct store *st, int64_t id, struct err *err)
{
    struct sql q = sql_open(st, "DELETE FROM file WHERE id = ?", err);
    sql_int(&q, id);
    return sql_run(&q);
}

int store_file_add(struct store *st, int64_t tenant, const char *name, const char *purpose,
                   const void *data, size_t len, int64_t expires_ms, struct store_file *ret,
                   struct err *err)
{
    struct store_file f = { .tenant = tenant, .bytes = (int64_t)len, .created_ms = now_unix_ms(),
                            .expires_ms = expires_ms };
    if (name[0] == '\0' || strlen(name) > STORE_FILE_NAME_MAX)
        return err_set_slug(err, ERR_INVALID, NULL, "file",
                            "a file's name has 1 to %d bytes, not %zu", STORE_FILE_NAME_MAX,
                            strlen(name));
    snprintf(f.name, sizeof f.name, "%s", name);
    snprintf(f.purpose, sizeof f.purpose, "%s", purpose);
    sha256_of(data, len, f.hash);
    ref_make("file-", f.ref);

    int rc = store_begin(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, add_row(st, &f, &f.id, err), err);
    if (rc != ERR_OK)
        return rc;
    const struct chunk_dest d = {
        .sql = "INSERT INTO file_chunk (tenant_id, file_id, chunk, data) VALUES (?, ?, ?, ?)",
        .tenant = tenant, .owner = f.id, .gen = -1,
    };
    rc = chunks_put(st, &d, data, len, err);
    if (rc == ERR_OK)
        rc = store_begin(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, add_done(st, &f, err), err);
    if (rc != ERR_OK) {
        delete_row(st, f.id, NULL); /* if even that fails, store_files_clean() does it */
        return rc;
    }
    *ret = f;
    return ERR_OK;
}

/* --- reading --------------------------------------------------------------------------------- */
/* Where in the order a page begins: the id of `after`. */
static int after_id(struct store *st, int64_t tenant, const char *after, bool oldest_first,
                    int64_t *ret, struct err *err)
{
    struct store_file f;
    *ret = oldest_first ? 0 : INT64_MAX;
    if (after == NULL)
        return ERR_OK;
    int rc = store_file_get(st, tenant, after, &f, err);
    if (rc == ERR_OK)
        *ret = f.id;
    return rc;
}

int store_file_list(struct store *st, int64_t tenant, const char *purpose, const char *after,
                    int limit, bool oldest_first, struct store_file **ret, size_t *ret_n,
                    struct err *err)
{
    struct store_file *list = NULL;
    size_t n = 0, cap = 0;
    int64_t from = 0;
    int rc = after_id(st, tenant, after, oldest_first, &from, err);
    if (rc != ERR_OK)
        return rc;
    struct sql q = oldest_first ?
        sql_open(st, SELECT_FILE "AND f.id > ?3 AND (?4 IS NULL OR f.purpose = ?4)"
                 " ORDER BY f.id LIMIT ?5", err) :
        sql_open(st, SELECT_FILE "AND f.id < ?3 AND (?4 IS NULL OR f.purpose = ?4)"
                 " ORDER BY f.id DESC LIMIT ?5", err);
    sql_int(&q, tenant);
    sql_int(&q, now_unix_ms());
    sql_int(&q, from);
    sql_text(&q, purpose);
    sql_int(&q, limit > 0 ? limit : -1);
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
        file_row(&q, &list[n++]);
    }
    rc = sql_close(&q);
    if (rc != ERR_OK) {
        free(list);
        return rc;
    }
    *ret = list;
    *ret_n = n;
    return ERR_OK;
}

static int to_spool(void *ud, const void *data, size_t len, struct err *err)
{
    return spool_write(ud, data, len, err);
}

int store_file_read(struct store *st, int64_t tenant, const char *ref, struct spool *to,
                    struct err *err)
{
    struct store_file f;
    int rc = store_begin_read(st, err);
    if (rc != ERR_OK)
        return rc;
    rc = store_file_get(st, tenant, ref, &f, err);
    if (rc == ERR_OK) {
        struct sql q = sql_open(st,
                                "SELECT chunk, data FROM file_chunk WHERE file_id = ?"
                                " ORDER BY chunk", err);
        sql_int(&q, f.id);
        rc = chunks_get(&q, f.ref, f.bytes, f.hash, to_spool, to);
    }
    return store_end(st, rc, err);
}

/* --- deleting -------------------------------------------------------------------------------- */
static int delete_file(struct store *st, int64_t tenant, const char *ref, struct err *err)
{
    struct store_file f;
    int rc = store_file_get(st, tenant, ref, &f, err);
    if (rc != ERR_OK)
        return rc;
    struct sql q = sql_open(st, "SELECT " IN_USE " FROM file f WHERE f.id = ?", err);
    sql_int(&q, f.id);
    const bool used = sql_step(&q) == 1 && sql_col_int(&q, 0) != 0;
    rc = sql_close(&q);
    if (rc == ERR_OK && used)
        rc = err_set_slug(err, ERR_CONFLICT, "file_in_use", "file_id",
                          "a fine-tuning job that has not ended needs %s: cancel it first", ref);
    if (rc == ERR_OK)
        rc = delete_row(st, f.id, err);
    if (rc == ERR_OK)
        rc = store_audit(st, tenant, "file.delete", err, "%s %s", f.ref, f.name);
    return rc;
}

int store_file_delete(struct store *st, int64_t tenant, const char *ref, struct err *err)
{
    int rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    rc = store_end(st, delete_file(st, tenant, ref, err), err);
    if (rc == ERR_OK)
        store_shrink(st);
    return rc;
}

int store_files_clean(struct store *st, struct err *err)
{
    const int64_t now = now_unix_ms();
    struct sql q = sql_open(st,
                            "DELETE FROM file AS f WHERE (f.status = 'pending' AND f.created_ms < ?)"
                            " OR (f.expires_ms <= ? AND NOT " IN_USE ")", err);
    sql_int(&q, now - PENDING_MS);
    sql_int(&q, now);
    int rc = sql_run(&q);
    if (rc == ERR_OK && sqlite3_changes(st->db) > 0)
        store_shrink(st);
    return rc;
}
