/* store_int.h - for the files of store/ only: the connection, statements, transactions. */
#ifndef STORE_STORE_INT_H
#define STORE_STORE_INT_H

#include "store/store.h"

#include <sqlite3.h>

struct store {
    sqlite3 *db;
    char *path;       /* as given: messages, and DB.pepper */
    int64_t actor;    /* key id for the audit table; 0: none */
    bool has_pepper;  /* pepper[] is read (keys.c) */
    uint8_t pepper[32];
};

/* --- statements (sql.c) ---------------------------------------------------------------------
 * One prepared statement in use.  Parameters are bound in order.  A failure sticks: later calls do
 * nothing and sql_step() reports it, so a query reads as its SQL, its parameters and one check. */
struct sql {
    sqlite3_stmt *stmt;
    struct store *st;
    struct err *err;
    int rc;   /* first SQLite error, SQLITE_OK so far */
    int next; /* index of the next parameter */
};

struct sql sql_open(struct store *st, const char *text, struct err *err);
void sql_int(struct sql *q, int64_t v);
void sql_real(struct sql *q, double v);
void sql_null(struct sql *q);
/* Borrowed until sql_close() or sql_reset(); NULL is SQL's NULL. */
void sql_text(struct sql *q, const char *v);
void sql_text_n(struct sql *q, const char *v, size_t len);
void sql_blob(struct sql *q, const void *v, size_t len);
/* 1: a row is ready.  0: no more rows.  -1: failed, q->err is set (a clash of keys sets no text:
 * only the caller knows what the row stands for). */
int sql_step(struct sql *q);
/* Use the statement again with new parameters. */
void sql_reset(struct sql *q);
int64_t sql_col_int(struct sql *q, int i);
double sql_col_real(struct sql *q, int i);
/* Valid until the next step; NULL for SQL's NULL. */
const char *sql_col_text(struct sql *q, int i);
const void *sql_col_blob(struct sql *q, int i, size_t *ret_len);
/* A copy for the caller to free(); NULL for SQL's NULL.  Out of memory sticks. */
char *sql_col_dup(struct sql *q, int i);
/* Into a fixed field, cut if it is longer. */
void sql_col_copy(struct sql *q, int i, char *ret, size_t cap);
/* Finish with the statement.  Returns 0 or the ERR_ code of the failure. */
int sql_close(struct sql *q);

/* sql_step() for a statement without rows, and sql_close(). */
int sql_run(struct sql *q);
/* Statements without parameters or rows. */
int sql_exec(struct store *st, const char *text, struct err *err);
/* The ERR_ code and sentence for an SQLite result. */
int sql_fail(struct store *st, int rc, struct err *err);

/* --- transactions (store.c) ----------------------------------------------------------------- */
/* The writer's lock at once, so that what is read inside stays true until the end. */
int store_begin(struct store *st, struct err *err);
/* One unchanging view of the file for several reads. */
int store_begin_read(struct store *st, struct err *err);
/* Commits if rc is 0, else rolls back.  Returns rc, or why the commit failed. */
int store_end(struct store *st, int rc, struct err *err);
/* One row of the audit table, inside the caller's transaction. */
int store_audit(struct store *st, int64_t tenant, const char *action, struct err *err,
                const char *fmt, ...) __attribute__((format(printf, 5, 6)));
/* Give pages of deleted things back to the file system, a bounded number; failures are nobody's
 * business (the pages are used again anyway). */
void store_shrink(struct store *st);

/* --- migrations (migrate.c) ----------------------------------------------------------------- */
struct migration {
    int version;
    const char *name;
    const char *sql;
};
int store_migrate(struct store *st, struct err *err);
int store_migrate_with(struct store *st, const struct migration *m, int n, struct err *err);

/* --- versions (versions.c) ------------------------------------------------------------------ */
/* What version_row() reads; add WHERE or ORDER.  Aliases: v version, a adapter, t tenant. */
#define SELECT_VERSION                                                                           \
    "SELECT v.id, v.adapter_id, v.tenant_id, a.name, t.name, v.number, a.live IS v.number,"      \
    " v.method, v.rank_min, v.rank_max, v.alpha, v.params, v.bytes, v.modules, v.hash,"          \
    " v.base_hash, v.base_claimed, v.base_name, v.origin, v.created_ms"                          \
    " FROM version v JOIN adapter a ON a.id = v.adapter_id JOIN tenant t ON t.id = v.tenant_id "

void version_row(struct sql *q, struct store_version *ret);
/* Every row of a SELECT_VERSION, and closes q. */
int version_rows(struct sql *q, struct store_version **ret, size_t *ret_n);
int version_get(struct store *st, int64_t id, struct store_version *ret, struct err *err);

/* --- tensors (tensors.c) -------------------------------------------------------------------- */
/* Modules and chunk rows of a new version, inside the caller's transaction. */
int tensors_put(struct store *st, int64_t tenant, int64_t version_id,
                const struct adapter_src *src, struct err *err);
/* a->modules and a->extras of the version; with `data` also the tensors, into a->own. */
int tensors_get(struct store *st, int64_t version_id, bool data, struct adapter_src *a,
                struct err *err);
/* A tensor's data in chunk rows: `part` is NULL for extra tensors.  Failures stick in q. */
void tensors_put_chunks(struct sql *q, int64_t tenant, int64_t version_id, size_t seq,
                        const char *part, const void *data, size_t bytes);
int tensors_damaged(struct store *st, int64_t version_id, const char *kind, size_t seq,
                    const char *what, struct err *err);
const char *tensors_dtype_name(enum dtype t); /* NULL if none that is stored */
bool tensors_dtype_parse(const char *name, enum dtype *ret);
const char *tensors_module_name(int module);  /* below MOD_SLOTS */
bool tensors_module_parse(const char *name, int *ret);
enum { TENSOR_CHUNK = 4 << 20, TENSOR_MAX_WIDTH = 1 << 24 };

/* --- extra tensors and weight norms (extras.c) ------------------------------------------------ */
int extras_put(struct store *st, int64_t tenant, int64_t version_id, const struct adapter_src *src,
               struct err *err);
/* a->extras without their data, and that data into memory that is theirs. */
int extras_get(struct store *st, int64_t version_id, struct adapter_src *a, struct err *err);
int extras_get_data(struct store *st, int64_t version_id, struct adapter_src *a, struct err *err);

#endif
