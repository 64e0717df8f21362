/* test_spool.c - temporary files of uploads. */
#include "engine/util.h"
#include "store/store.h"
#include "tests/support_model.h"

#include <dirent.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

struct fixture {
    char dir[64], db[96], folder[112];
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
    snprintf(f->folder, sizeof f->folder, "%s.spool", f->db);
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    support_remove(f->dir);
    free(f);
    return 0;
}

static int files_in(const char *folder)
{
    int n = 0;
    DIR *d = opendir(folder);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;)
        n += e->d_name[0] != '.';
    if (d != NULL)
        closedir(d);
    return n;
}

static void bytes_come_back_and_the_file_goes(void **state)
{
    struct fixture *f = *state;
    struct spool *s;
    const char *path;
    char *data;
    size_t len;
    struct stat sb;
    ok(spool_open(f->db, 1000, &s, &err));
    ok(spool_write(s, "hello ", 6, &err));
    ok(spool_write(s, "", 0, &err));
    ok(spool_write(s, "world", 5, &err));
    assert_int_equal(spool_size(s), 11);
    ok(spool_done(s, &path, &err));
    ok(file_read(path, 100, &data, &len, &err));
    assert_int_equal(len, 11);
    assert_memory_equal(data, "hello world", 11);
    free(data);
    assert_int_equal(stat(path, &sb), 0);
    assert_int_equal(sb.st_mode & 07777, 0600);
    assert_int_equal(stat(f->folder, &sb), 0);
    assert_int_equal(sb.st_mode & 07777, 0700);
    assert_int_equal(files_in(f->folder), 1);
    spool_close(s);
    assert_int_equal(files_in(f->folder), 0);
    spool_close(NULL);
}

static void not_a_byte_over_the_limit(void **state)
{
    struct fixture *f = *state;
    struct spool *s;
    static const char ten[10];
    ok(spool_open(f->db, 25, &s, &err));
    ok(spool_write(s, ten, 10, &err));
    ok(spool_write(s, ten, 10, &err));
    assert_int_equal(spool_write(s, ten, 6, &err), ERR_TOO_LARGE);
    assert_non_null(strstr(err.msg, "25 B"));
    assert_int_equal(spool_size(s), 20);
    err_clear(&err);
    ok(spool_write(s, ten, 5, &err));
    assert_int_equal(spool_write(s, ten, 1, &err), ERR_TOO_LARGE);
    assert_int_equal(spool_write(s, ten, SIZE_MAX, NULL), ERR_TOO_LARGE);
    spool_close(s);
}

static void many_spools_do_not_mix(void **state)
{
    struct fixture *f = *state;
    struct spool *s[10];
    const char *path;
    char *data;
    size_t len;
    for (int i = 0; i < 10; i++) {
        ok(spool_open(f->db, 100, &s[i], &err));
        ok(spool_write(s[i], &i, sizeof i, &err));
    }
    assert_int_equal(files_in(f->folder), 10);
    for (int i = 0; i < 10; i++) {
        ok(spool_done(s[i], &path, &err));
        ok(file_read(path, 100, &data, &len, &err));
        assert_int_equal(len, sizeof i);
        assert_memory_equal(data, &i, sizeof i);
        free(data);
        spool_close(s[i]);
    }
}

static void cleaning_takes_what_the_dead_left_and_nothing_else(void **state)
{
    struct fixture *f = *state;
    struct spool *mine;
    int ready[2];
    ok(spool_clean(f->db, &err)); /* no folder yet */
    ok(spool_open(f->db, 100, &mine, &err));
    assert_int_equal(pipe(ready), 0);
    pid_t pid = fork();
    if (pid == 0) { /* a server that is killed in an upload */
        struct spool *s;
        if (spool_open(f->db, 100, &s, NULL) == ERR_OK && spool_write(s, "x", 1, NULL) == ERR_OK &&
            write(ready[1], "r", 1) == 1)
            pause();
        _exit(1);
    }
    char c;
    assert_int_equal(read(ready[0], &c, 1), 1);
    ok(spool_clean(f->db, &err)); /* alive: its file is in use */
    assert_int_equal(files_in(f->folder), 2);
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    close(ready[0]);
    close(ready[1]);
    ok(spool_clean(f->db, &err));
    assert_int_equal(files_in(f->folder), 1);
    ok(spool_write(mine, "still here", 10, &err));
    spool_close(mine);
    ok(spool_clean(f->db, &err));
    assert_int_equal(files_in(f->folder), 0);
}

static void what_is_in_the_way_is_named(void **state)
{
    struct fixture *f = *state;
    struct spool *s;
    support_write_file(f->dir, "a.db.spool", "x", 1);
    assert_int_equal(spool_open(f->db, 10, &s, &err), ERR_IO);
    assert_non_null(strstr(err.msg, "a.db.spool is in the way"));
    err_clear(&err);
    assert_int_equal(spool_open("/no/such/folder/a.db", 10, &s, &err), ERR_IO);
    assert_non_null(strstr(err.msg, "/no/such/folder/a.db.spool"));
    assert_int_equal(spool_open("/no/such/folder/a.db", 10, &s, NULL), ERR_IO);
    /* a link to somewhere else is no folder of ours */
    assert_int_equal(unlink(f->folder), 0);
    assert_int_equal(symlink("/tmp", f->folder), 0);
    err_clear(&err);
    assert_int_equal(spool_open(f->db, 10, &s, &err), ERR_IO);
}

static void a_full_disk_says_so(void **state)
{
    (void)state;
    struct spool *s;
    if (access("/dev/full", W_OK) != 0)
        skip();
    /* /dev/full answers every write with ENOSPC: put it where the spool's file is */
    struct fixture *f = *state;
    const char *path;
    ok(spool_open(f->db, 100, &s, &err));
    ok(spool_done(s, &path, &err));
    spool_close(s);
    ok(spool_open(f->db, 100, &s, &err));
    int full = open("/dev/full", O_WRONLY);
    /* the spool's descriptor is the highest below `full` */
    assert_true(full > 0);
    assert_int_equal(dup2(full, full - 1), full - 1);
    assert_int_equal(spool_write(s, "x", 1, &err), ERR_UNAVAILABLE);
    assert_non_null(strstr(err.msg, "the disk is full"));
    close(full);
    spool_close(s);
}

static void without_a_file_the_spool_lies_in_tmpdir(void **state)
{
    struct fixture *f = *state;
    struct spool *s;
    const char *path;
    setenv("TMPDIR", f->dir, 1);
    ok(spool_clean(":memory:", &err));
    ok(spool_open(":memory:", 10, &s, &err));
    ok(spool_done(s, &path, &err));
    assert_memory_equal(path, f->dir, strlen(f->dir));
    spool_close(s);
    unsetenv("TMPDIR");
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(bytes_come_back_and_the_file_goes),
        T(not_a_byte_over_the_limit),
        T(many_spools_do_not_mix),
        T(cleaning_takes_what_the_dead_left_and_nothing_else),
        T(what_is_in_the_way_is_named),
        T(a_full_disk_says_so),
        T(without_a_file_the_spool_lies_in_tmpdir),
    };
    return cmocka_run_group_tests_name("spool", tests, NULL, NULL);
}
