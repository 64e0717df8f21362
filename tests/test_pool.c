/* test_pool.c - the thread pool hands out every piece once, and the CPU count reads its limits.
 * Worth most under ThreadSanitizer: make tsan. */
#include "engine/compute.h"
#include "engine/cpus.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

enum { CELLS = 5000 };

struct tally {
    int64_t grain;
    int threads;
    int hits[CELLS]; /* plain: two threads in one piece would be a race */
    _Atomic int out_of_range;
};

static void count(void *arg, int64_t begin, int64_t end, int thread)
{
    struct tally *t = arg;
    if (end <= begin || end - begin > t->grain || thread < 0 || thread >= t->threads)
        atomic_fetch_add(&t->out_of_range, 1);
    for (int64_t i = begin; i < end; i++)
        t->hits[i]++;
}

static void every_piece_is_done_exactly_once(void **state)
{
    (void)state;
    const int64_t sizes[] = { 0, 1, 2, 63, 1000, CELLS }, grains[] = { -1, 1, 7, 64, CELLS + 1 };
    struct tally *t = calloc(1, sizeof *t);
    for (int threads = 1; threads <= 5; threads += 2) {
        struct pool *p;
        assert_int_equal(pool_create(threads, &p, NULL), ERR_OK);
        assert_int_equal(pool_threads(p), threads);
        for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++)
            for (size_t g = 0; g < sizeof grains / sizeof grains[0]; g++) {
                memset(t, 0, sizeof *t);
                t->grain = grains[g] < 1 ? 1 : grains[g];
                t->threads = threads;
                pool_run(p, sizes[s], grains[g], count, t);
                pool_run_apart(p, sizes[s], grains[g], count, t);
                assert_int_equal(t->out_of_range, 0);
                for (int64_t i = 0; i < CELLS; i++)
                    assert_int_equal(t->hits[i], i < sizes[s] ? 2 : 0);
            }
        pool_destroy(p);
    }
    free(t);
}

struct stuck {
    _Atomic int64_t done;
    int64_t n;
    _Atomic bool gave_up;
};

/* The first piece waits until all others are done. */
static void wait_for_the_others(void *arg, int64_t begin, int64_t end, int thread)
{
    struct stuck *s = arg;
    (void)end;
    (void)thread;
    for (int ms = 0; begin == 0 && atomic_load(&s->done) < s->n - 1; ms++) {
        if (ms == 10000) {
            atomic_store(&s->gave_up, true);
            return;
        }
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    }
    atomic_fetch_add(&s->done, 1);
}

static void threads_that_begin_apart_help_one_that_is_held_up(void **state)
{
    (void)state;
    struct pool *p;
    assert_int_equal(pool_create(3, &p, NULL), ERR_OK);
    struct stuck s = { .n = 100 };
    pool_run_apart(p, s.n, 1, wait_for_the_others, &s);
    assert_false(s.gave_up);
    assert_int_equal(s.done, s.n);
    pool_destroy(p);
}

static void results_are_visible_after_many_short_runs(void **state)
{
    (void)state;
    struct pool *p;
    assert_int_equal(pool_create(3, &p, NULL), ERR_OK);
    struct tally *t = calloc(1, sizeof *t);
    t->grain = 1;
    t->threads = 3;
    const int runs = 2000;
    for (int r = 0; r < runs; r++)
        pool_run(p, 8, 1, count, t);
    for (int i = 0; i < 8; i++)
        assert_int_equal(t->hits[i], runs);
    free(t);
    pool_destroy(p);
}

/* Long enough apart that every thread has gone to sleep in between. */
static void sleeping_threads_wake_up_for_work(void **state)
{
    (void)state;
    struct pool *p;
    assert_int_equal(pool_create(3, &p, NULL), ERR_OK);
    struct tally *t = calloc(1, sizeof *t);
    t->grain = 1;
    t->threads = 3;
    for (int r = 0; r < 20; r++) {
        nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
        pool_run(p, 100, 1, count, t);
    }
    for (int i = 0; i < 100; i++)
        assert_int_equal(t->hits[i], 20);
    nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
    free(t);
    pool_destroy(p); /* returns although they sleep */
}

static void mark(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)begin;
    (void)end;
    atomic_fetch_or((_Atomic int *)arg, 1 << thread);
    nanosleep(&(struct timespec){ .tv_nsec = 5000000 }, NULL);
}

static void more_than_one_thread_takes_part(void **state)
{
    (void)state;
    struct pool *p;
    assert_int_equal(pool_create(2, &p, NULL), ERR_OK);
    _Atomic int who = 0;
    pool_run(p, 40, 1, mark, &who);
    assert_int_equal(who, 3);
    pool_destroy(p);
}

static void pools_come_and_go(void **state)
{
    (void)state;
    for (int i = 0; i < 50; i++) {
        struct pool *p;
        assert_int_equal(pool_create(4, &p, NULL), ERR_OK);
        pool_destroy(p);
    }
    pool_destroy(NULL);
}

static void no_pool_means_the_caller_does_it(void **state)
{
    (void)state;
    struct tally *t = calloc(1, sizeof *t);
    t->grain = 7;
    t->threads = 1;
    pool_run(NULL, CELLS, 7, count, t);
    assert_int_equal(t->out_of_range, 0);
    for (int i = 0; i < CELLS; i++)
        assert_int_equal(t->hits[i], 1);
    assert_int_equal(pool_threads(NULL), 1);
    free(t);
}

static void zero_threads_means_what_is_available(void **state)
{
    (void)state;
    struct pool *p;
    assert_int_equal(pool_create(0, &p, NULL), ERR_OK);
    assert_int_equal(pool_threads(p), cpus_available());
    pool_destroy(p);
    struct err err = { 0 };
    assert_int_equal(pool_create(-1, &p, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "-1"));
    assert_int_equal(pool_create(100000, &p, NULL), ERR_INVALID);
}

/* --- quotas ------------------------------------------------------------------------------ */

static void make_file(const char *root, const char *path, const char *text)
{
    char full[512];
    snprintf(full, sizeof full, "%s%s", root, path);
    for (char *s = full + strlen(root) + 1; (s = strchr(s, '/')) != NULL; s++) {
        *s = '\0';
        mkdir(full, 0700);
        *s = '/';
    }
    FILE *f = fopen(full, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static void the_least_quota_up_the_tree_counts(void **state)
{
    (void)state;
    static const struct {
        const char *cgroup, *path[3], *text[3];
        int cpus;
    } cases[] = {
        { "0::/a/b\n", { "/sys/fs/cgroup/a/b/cpu.max" }, { "max 100000\n" }, 0 },
        { "0::/a/b\n", { "/sys/fs/cgroup/a/b/cpu.max" }, { "150000 100000\n" }, 2 },
        { "0::/a/b\n",
          { "/sys/fs/cgroup/a/b/cpu.max", "/sys/fs/cgroup/a/cpu.max" },
          { "400000 100000\n", "300000 100000\n" },
          3 },
        { "0::/not/visible\n", { "/sys/fs/cgroup/cpu.max" }, { "10000 100000\n" }, 1 },
        { "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
          { "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us",
            "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us" },
          { "500000\n", "100000\n" },
          5 },
        { "3:cpuset:/x\n",
          { "/sys/fs/cgroup/cpuset/x/cpu.cfs_quota_us",
            "/sys/fs/cgroup/cpuset/x/cpu.cfs_period_us" },
          { "500000\n", "100000\n" },
          0 },
        { "2:cpu:/\n",
          { "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us" },
          { "-1\n", "100000\n" },
          0 },
        { "nonsense\n", { NULL }, { NULL }, 0 },
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        char root[] = "/tmp/lorad-test-XXXXXX", command[64];
        assert_non_null(mkdtemp(root));
        make_file(root, "/proc/self/cgroup", cases[c].cgroup);
        for (int i = 0; i < 3 && cases[c].path[i] != NULL; i++)
            make_file(root, cases[c].path[i], cases[c].text[i]);
        int got = cpus_quota(root);
        snprintf(command, sizeof command, "rm -r %s", root);
        assert_int_equal(system(command), 0);
        if (got != cases[c].cpus)
            fail_msg("case %zu: %d CPUs, not %d", c, got, cases[c].cpus);
    }
}

static void names_are_checked(void **state)
{
    (void)state;
    enum isa isa;
    enum precision precision;
    struct err err = { 0 };
    assert_int_equal(isa_select("auto", &isa, NULL), ERR_OK);
    assert_int_equal(isa_select("scalar", &isa, NULL), ERR_OK);
    assert_int_equal(isa, ISA_SCALAR);
    assert_int_equal(isa_select("avx9000", &isa, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "avx9000"));
    err_clear(&err);
    static const char *const names[] = { "fast", "exact", "f32" };
    for (int i = 0; i < 3; i++) {
        assert_int_equal(precision_parse(names[i], &precision, NULL), ERR_OK);
        assert_string_equal(precision_name(precision), names[i]);
    }
    assert_int_equal(precision_parse("Fast", &precision, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "Fast"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_piece_is_done_exactly_once),
        cmocka_unit_test(threads_that_begin_apart_help_one_that_is_held_up),
        cmocka_unit_test(results_are_visible_after_many_short_runs),
        cmocka_unit_test(sleeping_threads_wake_up_for_work),
        cmocka_unit_test(more_than_one_thread_takes_part),
        cmocka_unit_test(pools_come_and_go),
        cmocka_unit_test(no_pool_means_the_caller_does_it),
        cmocka_unit_test(zero_threads_means_what_is_available),
        cmocka_unit_test(the_least_quota_up_the_tree_counts),
        cmocka_unit_test(names_are_checked),
    };
    return cmocka_run_group_tests_name("pool", tests, NULL, NULL);
}
