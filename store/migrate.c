/* migrate.c - bring a database file up to the schema this program was built with.
 *
 * The files of migrations/ are compiled in, so an installed program needs nothing beside it.
 * PRAGMA user_version holds the number of the last one applied; it is part of the file and changes
 * in the same transaction as the tables, so a crash leaves the file either before or after a
 * migration, never between.  A file newer than the program is refused rather than guessed at.
 * Two programs may open an old file at once: the number is read again under the writer's lock. */
#include "store/store_int.h"

#include <stdio.h>

static const struct migration migrations[] = {
#include "migrations.inc"
};

static int user_version(struct store *st, int *ret, struct err *err)
{
    struct sql q = sql_open(st, "PRAGMA user_version", err);
    if (sql_step(&q) == 1)
        *ret = (int)sql_col_int(&q, 0);
    return sql_close(&q);
}

static int check_foreign_keys(struct store *st, const struct migration *m, struct err *err)
{
    struct sql q = sql_open(st, "PRAGMA foreign_key_check", err);
    bool bad = sql_step(&q) == 1;
    char table[64] = "";
    if (bad)
        sql_col_copy(&q, 0, table, sizeof table);
    int rc = sql_close(&q);
    if (rc == ERR_OK && bad)
        rc = err_set(err, ERR_DB, "migration %s of %s leaves rows of table %s without their parent",
                     m->name, st->path, table);
    return rc;
}

static int apply(struct store *st, const struct migration *m, struct err *err)
{
    char done[48];
    snprintf(done, sizeof done, "PRAGMA user_version = %d", m->version);

    int rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    int have = 0;
    rc = user_version(st, &have, err);
    if (rc == ERR_OK && have < m->version) {
        rc = sql_exec(st, m->sql, err);
        if (rc == ERR_OK)
            rc = check_foreign_keys(st, m, err);
        if (rc == ERR_OK)
            rc = sql_exec(st, done, err);
    }
    return store_end(st, rc, err);
}

int store_migrate_with(struct store *st, const struct migration *m, int n, struct err *err)
{
    int have = 0;
    int rc = user_version(st, &have, err);
    if (rc != ERR_OK)
        return rc;
    const int latest = m[n - 1].version;
    if (have > latest)
        return err_set(err, ERR_DB,
                       "the schema of %s is %d, this program knows up to %d: use a newer program",
                       st->path, have, latest);
    if (have == latest)
        return ERR_OK;

    /* A migration that rebuilds a table needs foreign keys off, and SQLite ignores that pragma
     * inside a transaction. */
    rc = sql_exec(st, "PRAGMA foreign_keys = OFF", err);
    for (int i = 0; i < n && rc == ERR_OK; i++)
        if (m[i].version > have)
            rc = apply(st, &m[i], err);
    int on = sql_exec(st, "PRAGMA foreign_keys = ON", rc == ERR_OK ? err : NULL);
    return rc != ERR_OK ? rc : on;
}

int store_migrate(struct store *st, struct err *err)
{
    return store_migrate_with(st, migrations, sizeof migrations / sizeof migrations[0], err);
}
