/* sql.c - the statement wrapper, and SQLite's results as our errors. */
#include "store/store_int.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A write that found no room; SQLite says SQLITE_FULL for the database and the log, but only an
 * I/O error for the shared-memory file. */
static bool disk_full(struct store *st, int rc)
{
    if ((rc & 0xff) == SQLITE_FULL)
        return true;
    int sys = sqlite3_system_errno(st->db);
    return (rc & 0xff) == SQLITE_IOERR && (sys == ENOSPC || sys == EDQUOT);
}

/* Translate SQLite's result once, here, so that nobody above sees its codes. */
int sql_fail(struct store *st, int rc, struct err *err)
{
    if (rc == SQLITE_CONSTRAINT_UNIQUE || rc == SQLITE_CONSTRAINT_PRIMARYKEY)
        return ERR_CONFLICT;
    if (disk_full(st, rc))
        return err_set(err, ERR_UNAVAILABLE, "the disk is full: %s could not be written", st->path);
    switch (rc & 0xff) {
    case SQLITE_NOMEM:
        return err_nomem(err);
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return err_set(err, ERR_UNAVAILABLE,
                       "the database %s is locked by another program, try again", st->path);
    case SQLITE_NOTADB:
        return err_set(err, ERR_DB, "%s is not a lorad database", st->path);
    case SQLITE_CORRUPT:
        return err_set(err, ERR_DB, "the database %s is damaged: %s", st->path,
                       sqlite3_errmsg(st->db));
    case SQLITE_READONLY:
    case SQLITE_CANTOPEN:
    case SQLITE_PERM:
        return err_set(err, ERR_DB,
                       "the database %s cannot be written: it, or its folder, is read-only or not"
                       " yours (%s)", st->path, sqlite3_errmsg(st->db));
    case SQLITE_TOOBIG:
        return err_set(err, ERR_TOO_LARGE, "a value is too large for the database");
    default:
        return err_set(err, ERR_DB, "database %s: %s", st->path, sqlite3_errmsg(st->db));
    }
}

struct sql sql_open(struct store *st, const char *text, struct err *err)
{
    struct sql q = { .st = st, .err = err, .next = 1 };
    q.rc = sqlite3_prepare_v2(st->db, text, -1, &q.stmt, NULL);
    return q;
}

void sql_int(struct sql *q, int64_t v)
{
    if (q->rc == SQLITE_OK)
        q->rc = sqlite3_bind_int64(q->stmt, q->next++, v);
}

void sql_real(struct sql *q, double v)
{
    if (q->rc == SQLITE_OK)
        q->rc = sqlite3_bind_double(q->stmt, q->next++, v);
}

void sql_null(struct sql *q)
{
    if (q->rc == SQLITE_OK)
        q->rc = sqlite3_bind_null(q->stmt, q->next++);
}

void sql_int_or_null(struct sql *q, int64_t v)
{
    if (v == 0)
        sql_null(q);
    else
        sql_int(q, v);
}

void sql_text(struct sql *q, const char *v)
{
    if (v == NULL)
        sql_null(q);
    else
        sql_text_n(q, v, strlen(v));
}

void sql_text_n(struct sql *q, const char *v, size_t len)
{
    if (q->rc == SQLITE_OK)
        q->rc = sqlite3_bind_text64(q->stmt, q->next++, v, len, SQLITE_STATIC, SQLITE_UTF8);
}

void sql_blob(struct sql *q, const void *v, size_t len)
{
    if (q->rc == SQLITE_OK)
        q->rc = sqlite3_bind_blob64(q->stmt, q->next++, v, len, SQLITE_STATIC);
}

int sql_step(struct sql *q)
{
    if (q->rc == SQLITE_OK) {
        int rc = sqlite3_step(q->stmt);
        if (rc == SQLITE_ROW)
            return 1;
        if (rc == SQLITE_DONE)
            return 0;
        q->rc = rc;
    }
    sql_fail(q->st, q->rc, q->err);
    return -1;
}

void sql_reset(struct sql *q)
{
    if (q->rc == SQLITE_OK)
        sqlite3_reset(q->stmt);
    q->next = 1;
}

int64_t sql_col_int(struct sql *q, int i) { return sqlite3_column_int64(q->stmt, i); }

double sql_col_real(struct sql *q, int i) { return sqlite3_column_double(q->stmt, i); }

double sql_col_nan(struct sql *q, int i)
{
    return sqlite3_column_type(q->stmt, i) == SQLITE_NULL ? NAN : sql_col_real(q, i);
}

const char *sql_col_text(struct sql *q, int i)
{
    return (const char *)sqlite3_column_text(q->stmt, i);
}

const void *sql_col_blob(struct sql *q, int i, size_t *ret_len)
{
    const void *p = sqlite3_column_blob(q->stmt, i);
    *ret_len = (size_t)sqlite3_column_bytes(q->stmt, i);
    return p;
}

char *sql_col_dup(struct sql *q, int i)
{
    if (sqlite3_column_type(q->stmt, i) == SQLITE_NULL)
        return NULL;
    const char *text = sql_col_text(q, i);
    char *copy = text != NULL ? strdup(text) : NULL;
    if (copy == NULL && q->rc == SQLITE_OK)
        q->rc = SQLITE_NOMEM;
    return copy;
}

void sql_col_copy(struct sql *q, int i, char *ret, size_t cap)
{
    const char *text = sql_col_text(q, i);
    snprintf(ret, cap, "%s", text != NULL ? text : "");
}

int sql_close(struct sql *q)
{
    int code = q->rc == SQLITE_OK ? ERR_OK : sql_fail(q->st, q->rc, q->err);
    sqlite3_finalize(q->stmt);
    q->stmt = NULL;
    return code;
}

int sql_run(struct sql *q)
{
    sql_step(q);
    return sql_close(q);
}

int sql_exec(struct store *st, const char *text, struct err *err)
{
    int rc = sqlite3_exec(st->db, text, NULL, NULL, NULL);
    return rc == SQLITE_OK ? ERR_OK : sql_fail(st, rc, err);
}
