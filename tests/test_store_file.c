/* test_store_file.c - the file under the store: killed writers, full disks, two writers, strange
 * files, space given back. */
#include "engine/util.h"
#include "store/store_int.h"
#include "tests/support_model.h"
#include "tests/support_store.h"

#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

struct fixture {
    char dir[64], db[96];
};

static const struct store_put_opts live = { .activate = true, .base_hash_hex = support_base_1,
                                            .origin = "upload" };

static struct err err;

static void ok(int rc)
{
    if (rc != ERR_OK)
        fail_msg("error %d: %s", rc, err.msg);
}

static void expect(enum err_code code, const char *says, int rc)
{
    if (rc != (int)code || err.code != code || strstr(err.msg, says) == NULL)
        fail_msg("expected error %d saying \"%s\", got %d: %s", code, says, rc, err.msg);
}

#define FAILS(code, says, call) (err_clear(&err), expect(code, says, call))

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

static int put(struct store *st, const char *name, const struct adapter_src *a, struct err *why)
{
    struct store_version v;
    bool is_new;
    int rc = store_adapter_put(st, 1, name, a, &live, &v, &is_new, why);
    if (rc == ERR_OK)
        store_version_free(&v);
    return rc;
}

/* --- creation ------------------------------------------------------------------------------ */
static void a_new_file_has_the_settings_of_the_design(void **state)
{
    struct fixture *f = *state;
    struct store *st;
    ok(store_open(f->db, &st, &err));
    assert_int_equal(number(st, "PRAGMA page_size"), 16384);
    assert_int_equal(number(st, "PRAGMA auto_vacuum"), 2);
    assert_int_equal(number(st, "PRAGMA foreign_keys"), 1);
    assert_int_equal(number(st, "PRAGMA synchronous"), 2);
    assert_int_equal(number(st, "SELECT journal_mode = 'wal' FROM pragma_journal_mode"), 1);
    assert_int_equal(number(st, "SELECT count(*) FROM pragma_table_list WHERE schema = 'main'"
                                " AND type = 'table' AND name NOT LIKE 'sqlite_%' AND NOT strict"),
                     0);
    static const char *const files[] = { "", "-wal", "-shm" };
    for (size_t i = 0; i < 3; i++) {
        char path[128];
        struct stat sb;
        snprintf(path, sizeof path, "%s%s", f->db, files[i]);
        assert_int_equal(stat(path, &sb), 0);
        assert_int_equal(sb.st_mode & 07777, 0600);
    }
    store_close(st);
}

static void strange_files_are_refused_with_a_sentence(void **state)
{
    struct fixture *f = *state;
    struct store *st;
    char path[256];
    char junk[8192];
    memset(junk, 'x', sizeof junk);
    support_write_file(f->dir, "junk.db", junk, sizeof junk);
    snprintf(path, sizeof path, "%s/junk.db", f->dir);
    FAILS(ERR_DB, "is not a lorad database", store_open(path, &st, &err));
    FAILS(ERR_INVALID, "not a regular file", store_open(f->dir, &st, &err));
    snprintf(path, sizeof path, "%s/no/such/folder/a.db", f->dir);
    FAILS(ERR_IO, "No such file", store_open(path, &st, &err));
    FAILS(ERR_INVALID, "empty", store_open("", &st, &err));

    sqlite3 *other;
    snprintf(path, sizeof path, "%s/other.db", f->dir);
    assert_int_equal(sqlite3_open(path, &other), SQLITE_OK);
    assert_int_equal(sqlite3_exec(other, "CREATE TABLE cookies (x)", NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(other);
    FAILS(ERR_DB, "another program", store_open(path, &st, &err));

    /* half of a database */
    err_clear(&err);
    ok(store_open(f->db, &st, &err));
    store_close(st);
    assert_int_equal(truncate(f->db, 20000), 0);
    err_clear(&err);
    int rc = store_open(f->db, &st, &err);
    if (rc == ERR_OK) {
        rc = store_check(st, &err);
        store_close(st);
    }
    expect(ERR_DB, "damaged", rc);
}

static void a_read_only_folder_is_refused_with_a_sentence(void **state)
{
    struct fixture *f = *state;
    struct store *st;
    ok(store_open(f->db, &st, &err));
    store_close(st);
    assert_int_equal(chmod(f->db, 0666), 0);
    assert_int_equal(chmod(f->dir, 0555), 0);
    /* root may write anywhere: be nobody for a moment, in a process of its own */
    pid_t pid = fork();
    if (pid == 0) {
        char path[128];
        snprintf(path, sizeof path, "%s/new.db", f->dir);
        if (geteuid() == 0 && setuid(65534) != 0)
            _exit(9);
        struct err why = { .code = ERR_OK };
        if (store_open(path, &st, &why) != ERR_IO || strstr(why.msg, "Permission denied") == NULL)
            _exit(1);
        err_clear(&why);
        if (store_open(f->db, &st, &why) != ERR_DB || strstr(why.msg, "read-only") == NULL)
            _exit(2);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(chmod(f->dir, 0700), 0);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

static void a_locked_database_says_so(void **state)
{
    struct fixture *f = *state;
    struct store *a, *b;
    int64_t id;
    ok(store_open(f->db, &a, &err));
    ok(store_open(f->db, &b, &err));
    sqlite3_busy_timeout(b->db, 20);
    ok(store_begin(a, &err));
    FAILS(ERR_UNAVAILABLE, "locked", store_tenant_add(b, "acme", &id, &err));
    err_clear(&err);
    ok(store_end(a, ERR_OK, &err));
    ok(store_tenant_add(b, "acme", &id, &err));
    store_close(a);
    store_close(b);
}

static void data_version_tells_of_others_writes_only(void **state)
{
    struct fixture *f = *state;
    struct store *a, *b;
    int64_t v0, v1, id;
    ok(store_open(f->db, &a, &err));
    ok(store_open(f->db, &b, &err));
    ok(store_data_version(a, &v0, &err));
    ok(store_tenant_add(a, "mine", &id, &err));
    ok(store_data_version(a, &v1, &err));
    assert_int_equal(v0, v1);
    ok(store_tenant_add(b, "theirs", &id, &err));
    ok(store_data_version(a, &v1, &err));
    assert_int_not_equal(v0, v1);
    ok(store_tenant_find(a, "theirs", &id, &err));
    store_close(a);
    store_close(b);
}

/* --- full disk ----------------------------------------------------------------------------- */
static void a_full_disk_leaves_nothing_behind(void **state)
{
    struct fixture *f = *state;
    struct store *st;
    char pragma[64];
    ok(store_open(f->db, &st, &err));
    struct adapter_src *small = support_adapter(1, 1, 2, 8), *big = support_adapter(2, 4, 64, 2048);
    ok(put(st, "small", small, &err));
    snprintf(pragma, sizeof pragma, "PRAGMA max_page_count = %lld",
             (long long)number(st, "PRAGMA page_count") + 40);
    number(st, pragma);
    FAILS(ERR_UNAVAILABLE, "the disk is full", put(st, "big", big, &err));
    err_clear(&err);
    assert_int_equal(number(st, "SELECT count(*) FROM version"), 1);
    assert_int_equal(number(st, "SELECT count(*) FROM audit WHERE object LIKE 'big%'"), 0);
    ok(store_check(st, &err));
    /* and the connection goes on working */
    number(st, "PRAGMA max_page_count = 1000000");
    ok(put(st, "big", big, &err));
    ok(store_check(st, &err));
    adapter_src_free(small);
    adapter_src_free(big);
    store_close(st);
}

static void deleting_gives_space_back(void **state)
{
    struct fixture *f = *state;
    struct store *st;
    ok(store_open(f->db, &st, &err));
    struct adapter_src *big = support_adapter(2, 4, 64, 2048); /* 8 MiB */
    ok(put(st, "small", big, &err));
    int64_t before = number(st, "PRAGMA page_count");
    struct adapter_src *more = support_adapter(3, 8, 64, 2048); /* 16 MiB */
    ok(put(st, "more", more, &err));
    assert_true(number(st, "PRAGMA page_count") > before + 1000);
    ok(store_adapter_delete(st, 1, "more", &err));
    assert_true(number(st, "PRAGMA page_count") < before + 50);
    ok(store_check(st, &err));
    adapter_src_free(big);
    adapter_src_free(more);
    store_close(st);
}

/* --- kill -9 ------------------------------------------------------------------------------- */
/* Child: put versions until killed; each answered one is told through the pipe. */
static void put_until_killed(const char *db, int round, int to)
{
    struct store *st;
    if (store_open(db, &st, NULL) != ERR_OK)
        _exit(1);
    for (uint64_t i = 0;; i++) {
        struct adapter_src *a = support_adapter((uint64_t)round * 1000 + i, 2, 16, 1024);
        struct store_version v;
        bool is_new;
        if (store_adapter_put(st, 1, "a", a, &live, &v, &is_new, NULL) != ERR_OK)
            _exit(2);
        if (write(to, &v.version, sizeof v.version) != sizeof v.version)
            _exit(3);
        store_version_free(&v);
        adapter_src_free(a);
        if (i % 3 == 2)
            store_version_delete(st, 1, "a", 1 + (int)i / 2, NULL);
    }
}

static void a_killed_writer_leaves_whole_versions_or_none(void **state)
{
    struct fixture *f = *state;
    struct store *st;
    int answered = 0;
    unsigned random = 12345;
    for (int round = 0; round < 30; round++) {
        int p[2], version, newest = 0;
        assert_int_equal(pipe(p), 0);
        pid_t pid = fork();
        if (pid == 0) {
            close(p[0]);
            put_until_killed(f->db, round, p[1]);
        }
        close(p[1]);
        /* every other round is killed in its first put or before, the others in a later one */
        if (round % 2 == 1 && read(p[0], &version, sizeof version) == sizeof version) {
            newest = version;
            answered++;
        }
        random = random * 1103515245 + 12345;
        nanosleep(&(struct timespec){ .tv_nsec = (long)(random >> 8) % 40000000 }, NULL);
        kill(pid, SIGKILL);
        while (read(p[0], &version, sizeof version) == sizeof version) {
            newest = version;
            answered++;
        }
        close(p[0]);
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status)); /* it did not fail by itself */

        ok(store_open(f->db, &st, &err));
        ok(store_check(st, &err)); /* every version there is loads with its hash */
        if (newest > 0) {
            struct store_version v;
            char ref[32];
            snprintf(ref, sizeof ref, "a@%d", newest);
            ok(store_version_find(st, 1, ref, &v, &err)); /* what was answered is there */
            store_version_free(&v);
        }
        assert_int_equal(number(st, "SELECT count(*) FROM version v WHERE modules <> (SELECT"
                                    " count(*) FROM module m WHERE m.version_id = v.id)"), 0);
        assert_int_equal(number(st, "SELECT count(*) FROM tensor_chunk"),
                         8 * number(st, "SELECT count(*) FROM version"));
        store_close(st);
    }
    assert_true(answered >= 15);
}

/* --- two writers --------------------------------------------------------------------------- */
struct writer {
    const char *db;
    int id;
    pthread_barrier_t *start;
    struct err err;
    int rc;
};

static void *write_20(void *ud)
{
    struct writer *w = ud;
    struct store *st;
    pthread_barrier_wait(w->start);
    w->rc = store_open(w->db, &st, &w->err);
    for (int i = 0; i < 20 && w->rc == ERR_OK; i++) {
        struct adapter_src *a = support_adapter((uint64_t)(w->id * 100 + i), 1, 4, 64);
        w->rc = put(st, "shared", a, &w->err);
        adapter_src_free(a);
    }
    if (w->rc == ERR_OK)
        store_close(st);
    return NULL;
}

static void threads_write_side_by_side(void **state)
{
    struct fixture *f = *state;
    enum { N = 3 };
    struct writer w[N];
    pthread_t t[N];
    pthread_barrier_t start;
    struct store *st;
    assert_int_equal(pthread_barrier_init(&start, NULL, N), 0);
    for (int i = 0; i < N; i++) { /* they also race to create the file */
        w[i] = (struct writer){ .db = f->db, .id = i, .start = &start };
        assert_int_equal(pthread_create(&t[i], NULL, write_20, &w[i]), 0);
    }
    for (int i = 0; i < N; i++) {
        pthread_join(t[i], NULL);
        if (w[i].rc != ERR_OK)
            fail_msg("writer %d: %s", i, w[i].err.msg);
    }
    pthread_barrier_destroy(&start);
    ok(store_open(f->db, &st, &err));
    assert_int_equal(number(st, "SELECT count(*) FROM version"), 20 * N);
    assert_int_equal(number(st, "SELECT max(number) FROM version"), 20 * N);
    assert_int_equal(number(st, "SELECT count(*) FROM adapter"), 1);
    ok(store_check(st, &err));
    store_close(st);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(a_new_file_has_the_settings_of_the_design),
        T(strange_files_are_refused_with_a_sentence),
        T(a_read_only_folder_is_refused_with_a_sentence),
        T(a_locked_database_says_so),
        T(data_version_tells_of_others_writes_only),
        T(a_full_disk_leaves_nothing_behind),
        T(deleting_gives_space_back),
        T(a_killed_writer_leaves_whole_versions_or_none),
        T(threads_write_side_by_side),
    };
    return cmocka_run_group_tests_name("store_file", tests, NULL, NULL);
}
