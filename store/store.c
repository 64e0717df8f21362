/* store.c - opening the file, transactions, the audit table, checking.
 *
 * What is set at creation and cannot change later: pages of 16 KiB (tensors are large; fewer
 * overflow pages to follow) and incremental auto-vacuum (deleted adapters give their space back).
 *
 * Write-ahead log with synchronous = FULL: a commit is on the disk before it is acknowledged, so
 * an upload that was answered survives kill -9 and loss of power alike.  NORMAL would survive only
 * the first; the price, one fsync for each upload or change of a key, is small beside the upload.
 *
 * The file itself is made with mknod(), not open(): closing a descriptor drops every lock this
 * process holds on that file, those of other connections too. */
#include "store/store_int.h"

#include <errno.h>
#include <sodium.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include "engine/util.h"

enum {
    APPLICATION_ID = 0x4c4f5241,
    BUSY_MS = 10000,      /* longer than any write of ours */
    SHRINK_PAGES = 2048,  /* 32 MiB given back per delete */
};

/* Make the file, readable by its owner only; SQLite gives its -wal and -shm files the same mode. */
static int create_file(const char *path, struct err *err)
{
    if (mknod(path, S_IFREG | 0600, 0) == 0)
        return ERR_OK;
    struct stat sb;
    int why = errno;
    if (stat(path, &sb) == 0) {
        if (S_ISREG(sb.st_mode))
            return ERR_OK;
        return err_set(err, ERR_INVALID, "%s is not a regular file", path);
    }
    return err_set(err, ERR_IO, "cannot make the database %s: %s", path, strerror(why));
}

static int pragma_int(struct store *st, const char *text, int64_t *ret, struct err *err)
{
    struct sql q = sql_open(st, text, err);
    if (sql_step(&q) == 1)
        *ret = sql_col_int(&q, 0);
    return sql_close(&q);
}

/* Somebody else's SQLite file is left alone. */
static int check_ours(struct store *st, struct err *err)
{
    int64_t id = 0, tables = 0;
    int rc = pragma_int(st, "SELECT count(*) FROM sqlite_schema", &tables, err);
    if (rc == ERR_OK)
        rc = pragma_int(st, "PRAGMA application_id", &id, err);
    if (rc == ERR_OK && tables > 0 && id != APPLICATION_ID)
        rc = err_set(err, ERR_DB, "%s is a database of another program", st->path);
    return rc;
}

/* Entering WAL mode needs the file to oneself for a moment, and SQLite does not wait for that by
 * itself when two connections try at once. */
static int enter_wal(struct store *st, struct err *err)
{
    char mode[16] = "";
    for (int ms = 0;; ms += 10) {
        struct sql q = sql_open(st, "PRAGMA journal_mode = WAL", NULL);
        if (sql_step(&q) == 1)
            sql_col_copy(&q, 0, mode, sizeof mode);
        int rc = q.rc;
        sql_close(&q);
        if (rc == SQLITE_OK)
            break;
        if ((rc & 0xff) != SQLITE_BUSY || ms >= BUSY_MS)
            return sql_fail(st, rc, err);
        nanosleep(&(struct timespec){ .tv_nsec = 10 * 1000 * 1000 }, NULL);
    }
    if (strcmp(mode, "wal") != 0 && strcmp(st->path, ":memory:") != 0)
        return err_set(err, ERR_DB, "%s cannot use a write-ahead log here (mode %s)", st->path,
                       mode);
    return ERR_OK;
}

static int configure(struct store *st, struct err *err)
{
    sqlite3_busy_timeout(st->db, BUSY_MS);
    sqlite3_db_config(st->db, SQLITE_DBCONFIG_DEFENSIVE, 1, NULL);
    sqlite3_db_config(st->db, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, NULL);
    int rc = check_ours(st, err);
    if (rc == ERR_OK)
        rc = sql_exec(st, "PRAGMA page_size = 16384; PRAGMA auto_vacuum = INCREMENTAL", err);
    if (rc == ERR_OK)
        rc = enter_wal(st, err);
    if (rc == ERR_OK)
        rc = sql_exec(st,
                      "PRAGMA synchronous = FULL;"
                      "PRAGMA foreign_keys = ON;"
                      "PRAGMA temp_store = MEMORY;"
                      "PRAGMA journal_size_limit = 67108864", err);
    return rc;
}

int store_open(const char *path, struct store **ret, struct err *err)
{
    int rc;
    char *file = NULL;
    if (path[0] == '\0')
        return err_set(err, ERR_INVALID, "the name of the database is empty");
    struct store *st = calloc(1, sizeof *st);
    if (st == NULL || (st->path = strdup(path)) == NULL || sodium_init() < 0) {
        rc = err_nomem(err);
        goto fail;
    }
    if (strcmp(path, ":memory:") != 0) {
        rc = create_file(path, err);
        if (rc != ERR_OK)
            goto fail;
        /* "./" so that no name is taken for an address ("file:...") or another special word. */
        file = path[0] == '/' ? strdup(path) : path_join(".", path);
        if (file == NULL) {
            rc = err_nomem(err);
            goto fail;
        }
    }
    const int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE;
    int lite = sqlite3_open_v2(file != NULL ? file : ":memory:", &st->db, flags, NULL);
    if (lite != SQLITE_OK) {
        rc = st->db != NULL ? sql_fail(st, lite, err) : err_nomem(err);
        goto fail;
    }
    rc = configure(st, err);
    if (rc == ERR_OK)
        rc = store_migrate(st, err);
    if (rc != ERR_OK)
        goto fail;
    free(file);
    *ret = st;
    return ERR_OK;

fail:
    free(file);
    store_close(st);
    return rc;
}

void store_close(struct store *st)
{
    if (st == NULL)
        return;
    sqlite3_close(st->db);
    sodium_memzero(st->pepper, sizeof st->pepper);
    free(st->verified);
    free(st->room.p);
    free(st->path);
    free(st);
}

void store_actor(struct store *st, int64_t key_id) { st->actor = key_id; }

int store_data_version(struct store *st, int64_t *ret, struct err *err)
{
    return pragma_int(st, "PRAGMA data_version", ret, err);
}

int store_name_check(const char *what, const char *name, struct err *err)
{
    size_t n = strlen(name);
    static const char first[] = "abcdefghijklmnopqrstuvwxyz0123456789";
    static const char rest[] = "abcdefghijklmnopqrstuvwxyz0123456789._-";
    if (n >= 1 && n <= STORE_NAME_MAX && strspn(name, first) >= 1 && strspn(name, rest) == n)
        return ERR_OK;
    return err_set_slug(err, ERR_INVALID, "invalid_name", NULL,
                        "\"%.100s\" cannot be the name of %s: 1 to 64 of a-z 0-9 . _ - and a letter"
                        " or digit first", name, what);
}

/* --- transactions -------------------------------------------------------------------------- */
int store_begin(struct store *st, struct err *err) { return sql_exec(st, "BEGIN IMMEDIATE", err); }

int store_begin_read(struct store *st, struct err *err) { return sql_exec(st, "BEGIN", err); }

int store_end(struct store *st, int rc, struct err *err)
{
    if (rc == ERR_OK)
        rc = sql_exec(st, "COMMIT", err);
    /* After some failures (a full disk) SQLite has rolled back by itself. */
    if (rc != ERR_OK && !sqlite3_get_autocommit(st->db))
        sql_exec(st, "ROLLBACK", NULL);
    return rc;
}

int store_audit(struct store *st, int64_t tenant, const char *action, struct err *err,
                const char *fmt, ...)
{
    char object[160];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(object, sizeof object, fmt, ap);
    va_end(ap);
    struct sql q = sql_open(st,
                            "INSERT INTO audit (tenant_id, at_ms, key_id, action, object)"
                            " VALUES (?, ?, nullif(?, 0), ?, ?)", err);
    sql_int(&q, tenant);
    sql_int(&q, now_unix_ms());
    sql_int(&q, st->actor);
    sql_text(&q, action);
    sql_text(&q, object);
    return sql_run(&q);
}

void store_shrink(struct store *st)
{
    char text[64];
    snprintf(text, sizeof text, "PRAGMA incremental_vacuum(%d)", SHRINK_PAGES);
    sql_exec(st, text, NULL);
}

/* --- checking ------------------------------------------------------------------------------ */
static int check_pragma(struct store *st, const char *text, const char *good, struct err *err)
{
    struct sql q = sql_open(st, text, err);
    char first[256] = "";
    bool bad = false;
    if (sql_step(&q) == 1) {
        sql_col_copy(&q, 0, first, sizeof first);
        bad = strcmp(first, good) != 0;
    }
    int rc = sql_close(&q);
    if (rc == ERR_OK && bad)
        rc = err_set(err, ERR_DB, "the database %s is damaged: %s: %s", st->path, text + 7, first);
    return rc;
}

/* Loading a version checks its hash.  One at a time by id, so that no reader keeps the log from
 * being written back while this runs. */
static int check_versions(struct store *st, struct err *err)
{
    int64_t id = 0;
    for (;;) {
        struct sql q = sql_open(st, "SELECT id FROM version WHERE id > ? ORDER BY id LIMIT 1", err);
        sql_int(&q, id);
        int row = sql_step(&q);
        if (row == 1)
            id = sql_col_int(&q, 0);
        int rc = sql_close(&q);
        if (rc != ERR_OK || row == 0)
            return rc;
        struct adapter_src *src;
        struct err why = { .code = ERR_OK };
        rc = store_version_load(st, id, &src, &why);
        if (rc == ERR_OK)
            adapter_src_free(src);
        else if (rc != ERR_NOT_FOUND) /* deleted meanwhile */
            return err_set(err, rc, "%s", why.msg);
    }
}

int store_check(struct store *st, struct err *err)
{
    int rc = check_pragma(st, "PRAGMA integrity_check(1)", "ok", err);
    if (rc == ERR_OK)
        rc = check_pragma(st, "PRAGMA foreign_key_check", "", err);
    if (rc == ERR_OK)
        rc = check_versions(st, err);
    return rc;
}
