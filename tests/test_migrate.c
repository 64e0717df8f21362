/* test_migrate.c - old files are brought up to date, whole or not at all; newer ones are refused.
 *
 * tests/data/schema_NNNN.sql is a dump of a database as release NNNN of the schema made it, with
 * things in it.  Each is upgraded here and must end as a new file begins, with nothing lost.  When
 * a migration is added, `LORAD_WRITE_FIXTURE=FILE.db build/tests/test_migrate` makes the database to
 * dump for the next one (tests/data/README says how). */
#include "engine/util.h"
#include "store/store_int.h"
#include "tests/support_model.h"
#include "tests/support_store.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

struct fixture {
    char dir[64], db[96];
};

static struct err err;

static void ok(int rc)
{
    if (rc != ERR_OK)
        fail_msg("error %d: %s", rc, err.msg);
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    *state = f;
    err_clear(&err);
    support_tmpdir(f->dir);
    snprintf(f->db, sizeof f->db, "%s/a.db", f->dir);
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    support_remove(f->dir);
    free(f);
    return 0;
}

static int64_t number(struct store *st, const char *query)
{
    struct sql q = sql_open(st, query, &err);
    assert_int_equal(sql_step(&q), 1);
    int64_t n = sql_col_int(&q, 0);
    ok(sql_close(&q));
    return n;
}

/* Run SQL on a file without the store in between. */
static void raw(const char *db, const char *text)
{
    sqlite3 *c;
    char *why = NULL;
    assert_int_equal(sqlite3_open(db, &c), SQLITE_OK);
    if (sqlite3_exec(c, text, NULL, NULL, &why) != SQLITE_OK)
        fail_msg("%s", why);
    sqlite3_close(c);
}

/* Every table, index and view with its SQL; free() it. */
static char *schema_of(struct store *st)
{
    struct buf b;
    buf_init(&b, 1 << 20);
    struct sql q = sql_open(st,
                            "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL"
                            " AND name NOT LIKE 'sqlite_%' ORDER BY type, name", &err);
    while (sql_step(&q) == 1)
        assert_int_equal(buf_printf(&b, "%s %s\n%s\n", sql_col_text(&q, 0), sql_col_text(&q, 1),
                                    sql_col_text(&q, 2)), ERR_OK);
    ok(sql_close(&q));
    return buf_take(&b);
}

/* --- released schemas ---------------------------------------------------------------------- */
/* A file, and a job with a checkpoint that made a version. */
static void fill_jobs(struct store *st, int64_t tenant)
{
    struct store_file file;
    struct store_job j, run;
    struct store_version v;
    bool is_new;
    ok(store_file_add(st, tenant, "data.jsonl", "fine-tune", "{}\n", 3, 0, &file, &err));
    const struct store_job_new w = {
        .model = "base", .base_name = "base", .base_hash_hex = support_base_1, .name = "trained",
        .training_file = file.ref, .seed = 1, .params = "{}", .method = "{}",
        .hyperparameters = "{}", .metadata = "{\"k\":\"v\"}", .activate = true,
    };
    ok(store_job_create(st, tenant, &w, &j, &is_new, &err));
    ok(store_job_claim(st, support_base_1, "fixture", &run, &err));
    ok(store_job_started(st, run.id, run.claim, 2, &err));
    const struct store_metric m = { .step = 1, .loss = 2.5 };
    const struct store_rank k = { 1, 0, MOD_Q, 2 };
    const struct store_report r = { .step = 1, .trained_tokens = 9, .metrics = &m, .nmetrics = 1,
                                    .ranks = &k, .nranks = 1 };
    struct adapter_src *a = support_adapter(4, 1, 2, 8);
    const struct store_checkpoint_new c = { .step = 1, .state = "s", .state_len = 1, .adapter = a };
    ok(store_job_checkpoint(st, run.id, run.claim, &r, &c, &err));
    ok(store_job_succeed(st, run.id, run.claim, NULL, a, NULL, true, &v, &err));
    store_version_free(&v);
    adapter_src_free(a);
    store_job_free(&j);
    store_job_free(&run);
}

/* What every fixture holds: two tenants, a key, a LoRA with two versions, an AdaLoRA; and since
 * there are jobs, one. */
static void fill(struct store *st)
{
    int64_t acme, id;
    char key[STORE_KEY_LEN + 1];
    struct store_version v;
    bool is_new;
    const struct store_put_opts o = { .activate = true, .base_hash_hex = support_base_1,
                                      .base_claimed = true, .origin = "upload" };
    ok(store_tenant_add(st, "acme", &acme, &err));
    ok(store_key_create(st, acme, "laptop", key, &id, &err));
    struct adapter_src *a[3] = { support_adapter(1, 1, 2, 8), support_adapter(2, 1, 2, 8),
                                 support_adalora(3, 3, 8) };
    for (int i = 0; i < 3; i++) {
        ok(store_adapter_put(st, i < 2 ? 1 : acme, i < 2 ? "support" : "pruned", a[i], &o, &v,
                             &is_new, &err));
        store_version_free(&v);
        adapter_src_free(a[i]);
    }
    fill_jobs(st, acme);
}

enum { FIRST_WITH_JOBS = 3 };

static void check_jobs(struct store *st, int64_t tenant)
{
    struct store_version v;
    struct store_job *j;
    size_t n;
    ok(store_job_list(st, tenant, NULL, 0, NULL, 0, &j, &n, &err));
    assert_int_equal(n, 1);
    assert_int_equal(j[0].status, JOB_SUCCEEDED);
    char *name = store_job_model_name(&j[0], 1);
    ok(store_version_find(st, tenant, name, &v, &err));
    store_version_free(&v);
    ok(store_version_find(st, tenant, "trained", &v, &err));
    assert_string_equal(v.job, j[0].ref);
    store_version_free(&v);
    free(name);
    store_jobs_free(j, n);
    assert_int_equal(number(st, "SELECT count(*) FROM v_job_metric WHERE loss = 2.5"), 1);
    assert_int_equal(number(st, "SELECT count(*) FROM v_job_rank WHERE rank = 2"), 1);
    assert_int_equal(number(st, "SELECT count(*) FROM v_file WHERE bytes = 3"), 1);
}

static void check_filled(struct store *st, int schema)
{
    struct store_version v;
    struct adapter_src *a, *want;
    int64_t acme;
    ok(store_check(st, &err));
    ok(store_tenant_find(st, "acme", &acme, &err));
    ok(store_version_find(st, 1, "support", &v, &err));
    assert_int_equal(v.version, 2);
    store_version_free(&v);
    ok(store_version_find(st, acme, "pruned@1", &v, &err));
    ok(store_version_load(st, v.id, &a, &err));
    want = support_adalora(3, 3, 8);
    support_same_adapter(want, a, true);
    adapter_src_free(want);
    adapter_src_free(a);
    store_version_free(&v);
    assert_int_equal(number(st, "SELECT count(*) FROM v_key WHERE label = 'laptop'"), 1);
    const bool jobs = schema >= FIRST_WITH_JOBS;
    assert_int_equal(number(st, "SELECT count(*) FROM v_audit WHERE action = 'adapter.put'"),
                     jobs ? 4 : 3);
    if (jobs)
        check_jobs(st, acme);
}

static void upgrade_released(struct fixture *f, const char *path, int schema)
{
    char *dump;
    size_t len;
    struct store *st, *fresh;
    ok(file_read(path, 1 << 20, &dump, &len, &err));
    unlink(f->db);
    raw(f->db, dump);
    free(dump);
    ok(store_open(f->db, &st, &err));
    check_filled(st, schema);
    assert_int_equal(number(st, "SELECT count(*) FROM pragma_foreign_key_check"), 0);
    ok(store_open(":memory:", &fresh, &err));
    char *got = schema_of(st), *want = schema_of(fresh);
    assert_string_equal(got, want);
    assert_int_equal(number(st, "PRAGMA user_version"), number(fresh, "PRAGMA user_version"));
    assert_int_equal(number(st, "PRAGMA application_id"), number(fresh, "PRAGMA application_id"));
    free(got);
    free(want);
    store_close(fresh);
    store_close(st);
}

static void every_released_schema_ends_as_a_new_file_begins(void **state)
{
    struct store *st;
    ok(store_open(":memory:", &st, &err));
    int latest = (int)number(st, "PRAGMA user_version");
    store_close(st);
    assert_true(latest >= 1);
    for (int i = 1; i <= latest; i++) {
        char path[64];
        snprintf(path, sizeof path, "tests/data/schema_%04d.sql", i);
        if (!file_exists(path))
            fail_msg("%s is missing: every released schema has a fixture", path);
        upgrade_released(*state, path, i);
    }
}

/* --- the runner ---------------------------------------------------------------------------- */
static const struct migration good[] = {
    { 1, "0001_one", "CREATE TABLE one (id INTEGER PRIMARY KEY, x TEXT) STRICT;"
                     "INSERT INTO one VALUES (1, 'kept');"
                     "CREATE TABLE child (one_id INTEGER REFERENCES one (id)) STRICT;"
                     "INSERT INTO child VALUES (1);" },
    /* rebuilds a table that another one refers to */
    { 2, "0002_two", "CREATE TABLE one_new (id INTEGER PRIMARY KEY, x TEXT, y INTEGER) STRICT;"
                     "INSERT INTO one_new SELECT id, x, 2 FROM one; DROP TABLE one;"
                     "ALTER TABLE one_new RENAME TO one;" },
    { 3, "0003_three", "CREATE TABLE three (x) ;" },
};

/* A connection without any schema. */
static struct store *bare(const char *db)
{
    struct store *st = calloc(1, sizeof *st);
    assert_non_null(st);
    st->path = strdup(db);
    assert_int_equal(sqlite3_open_v2(db, &st->db,
                                     SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE |
                                         SQLITE_OPEN_EXRESCODE, NULL), SQLITE_OK);
    ok(sql_exec(st, "PRAGMA foreign_keys = ON", &err));
    return st;
}

static void migrations_run_in_order_and_once(void **state)
{
    struct fixture *f = *state;
    struct store *st = bare(f->db);
    ok(store_migrate_with(st, good, 1, &err));
    assert_int_equal(number(st, "PRAGMA user_version"), 1);
    ok(store_migrate_with(st, good, 3, &err));
    ok(store_migrate_with(st, good, 3, &err));
    assert_int_equal(number(st, "PRAGMA user_version"), 3);
    assert_int_equal(number(st, "SELECT y FROM one JOIN child ON one_id = id"), 2);
    assert_int_equal(number(st, "PRAGMA foreign_keys"), 1);
    store_close(st);
}

static void a_broken_migration_leaves_the_file_before_it(void **state)
{
    struct fixture *f = *state;
    struct store *st = bare(f->db);
    struct migration m[3];
    memcpy(m, good, sizeof m);
    m[2].sql = "CREATE TABLE three (x); INSERT INTO one VALUES (9, 'x', 9); SELECT nonsense;";
    assert_int_equal(store_migrate_with(st, m, 3, &err), ERR_DB);
    assert_int_equal(number(st, "PRAGMA user_version"), 2);
    assert_int_equal(number(st, "SELECT count(*) FROM sqlite_schema WHERE name = 'three'"), 0);
    assert_int_equal(number(st, "SELECT count(*) FROM one"), 1);
    assert_int_equal(number(st, "PRAGMA foreign_keys"), 1);
    /* rows left without their parent are refused too */
    m[2].sql = "DELETE FROM one;";
    err_clear(&err);
    assert_int_equal(store_migrate_with(st, m, 3, &err), ERR_DB);
    assert_non_null(strstr(err.msg, "0003_three"));
    assert_non_null(strstr(err.msg, "child"));
    assert_int_equal(number(st, "SELECT count(*) FROM one"), 1);
    store_close(st);
}

static void a_newer_file_is_refused_with_both_numbers(void **state)
{
    struct fixture *f = *state;
    struct store *st;
    ok(store_open(f->db, &st, &err));
    int latest = (int)number(st, "PRAGMA user_version");
    store_close(st);
    raw(f->db, "PRAGMA user_version = 4711");
    assert_int_equal(store_open(f->db, &st, &err), ERR_DB);
    char both[64];
    snprintf(both, sizeof both, "is 4711, this program knows up to %d", latest);
    if (strstr(err.msg, both) == NULL)
        fail_msg("%s", err.msg);
}

static int write_fixture(const char *path)
{
    struct store *st;
    if (store_open(path, &st, &err) != ERR_OK) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    fill(st);
    store_close(st);
    return 0;
}

int main(void)
{
    if (getenv("LORAD_WRITE_FIXTURE") != NULL)
        return write_fixture(getenv("LORAD_WRITE_FIXTURE"));
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(every_released_schema_ends_as_a_new_file_begins),
        T(migrations_run_in_order_and_once),
        T(a_broken_migration_leaves_the_file_before_it),
        T(a_newer_file_is_refused_with_both_numbers),
    };
    return cmocka_run_group_tests_name("migrate", tests, NULL, NULL);
}
