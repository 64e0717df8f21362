/* test_mem.c - large blocks are usable and returned, limits are found, plans add up. */
#include "engine/mem.h"
#include "engine/mem_ahead.h"
#include "tests/support_mem.h"

#include "engine/util.h"

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#define MIB ((size_t)1 << 20)
#define GIB ((size_t)1 << 30)

static void memory_of_any_size_is_zeroed_and_aligned(void **state)
{
    (void)state;
    const size_t sizes[] = { 0, 1, 63, 64, 65, 4096, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 5 * MIB };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        size_t n = sizes[i];
        unsigned char *p = mem_alloc(n);
        assert_non_null(p);
        assert_int_equal((uintptr_t)p % (n >= 2 * MIB ? 2 * MIB : 64), 0);
        for (size_t k = 0; k < n; k += 1 + n / 5000)
            assert_int_equal(p[k], 0);
        memset(p, 0xa5, n); /* all of it may be written */
        mem_free(p, n);
        assert_true(mem_footprint(n) >= n);
        assert_true(mem_footprint(n) < n + 65536);
    }
    mem_free(NULL, 100);
}

static void more_memory_than_there_is_gives_null(void **state)
{
    (void)state;
    assert_null(mem_alloc(SIZE_MAX));
    assert_null(mem_alloc(SIZE_MAX - 4096));
    assert_null(mem_alloc(SIZE_MAX / 2));
}

static void freed_memory_goes_back(void **state)
{
    (void)state;
    size_t before = mem_resident();
    assert_true(before > 0);
    char *p = mem_alloc(64 * MIB);
    assert_non_null(p);
    memset(p, 1, 64 * MIB);
    size_t during = mem_resident();
    mem_free(p, 64 * MIB);
    size_t after = mem_resident();
    assert_true(during >= before + 60 * MIB);
    assert_true(after + 60 * MIB <= during);
}

static void memory_is_made_ready_ahead_and_what_it_holds_stays(void **state)
{
    (void)state;
    if (!support_can_populate())
        skip();
    assert_null(mem_ahead_start(NULL, MIB)); /* no huge pages in it */
    mem_ahead_reach(NULL, 1);
    mem_ahead_end(NULL);
    char *p = mem_alloc(16 * MIB);
    assert_non_null(p);
    struct mem_ahead *a = mem_ahead_start(p, 16 * MIB);
    assert_non_null(a);
    assert_true(support_stays_absent(p, 16 * MIB));
    p[MIB] = 7;
    mem_ahead_reach(a, 5 * MIB);
    assert_true(support_wait_resident(p, 6 * MIB)); /* huge pages, whole */
    for (size_t i = 0; i < 6 * MIB; i++)
        assert_int_equal(p[i], i == MIB ? 7 : 0);
    mem_ahead_reach(a, MIB); /* less than before: nothing to do */
    assert_true(support_stays_absent(p + 6 * MIB, 10 * MIB));
    mem_ahead_reach(a, SIZE_MAX);
    assert_true(support_wait_resident(p, 16 * MIB));
    mem_ahead_end(a);
    mem_free(p, 16 * MIB);
}

/* --- limits, from a made-up /proc and /sys ------------------------------------------------ */

struct made_up_file {
    const char *path, *text;
};

static void put(const char *root, const char *path, const char *text)
{
    char full[PATH_MAX];
    snprintf(full, sizeof full, "%s%s", root, path);
    for (char *p = full + strlen(root) + 1; (p = strchr(p, '/')) != NULL; p++) {
        *p = '\0';
        mkdir(full, 0700);
        *p = '/';
    }
    FILE *f = fopen(full, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

#define MEMINFO "MemTotal:       16777216 kB\nMemFree: 1 kB\n"
#define MOUNT_V2 "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
#define MOUNT_V1 "33 23 0:28 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
#define MOUNT_CPU "34 23 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"

static const struct {
    const char *what;
    size_t want;
    struct made_up_file files[8];
} machines[] = {
    { "nothing at all", 0, { { "/x", "" } } },
    { "no groups", 16 * GIB, { { "/proc/meminfo", MEMINFO } } },
    { "v2, limit on our own group",
      3 * GIB,
      { { "/proc/meminfo", MEMINFO },
        { "/proc/self/cgroup", "0::/a.slice/b\n" },
        { "/proc/self/mountinfo", MOUNT_V2 },
        { "/sys/fs/cgroup/a.slice/b/memory.max", "3221225472\n" },
        { "/sys/fs/cgroup/a.slice/memory.max", "max\n" } } },
    { "v2, limit further up",
      2 * GIB,
      { { "/proc/meminfo", MEMINFO },
        { "/proc/self/cgroup", "0::/a.slice/b\n" },
        { "/proc/self/mountinfo", MOUNT_V2 },
        { "/sys/fs/cgroup/a.slice/b/memory.max", "max\n" },
        { "/sys/fs/cgroup/a.slice/memory.max", "2147483648\n" } } },
    { "v2, a limit above physical memory",
      16 * GIB,
      { { "/proc/meminfo", MEMINFO },
        { "/proc/self/cgroup", "0::/a\n" },
        { "/proc/self/mountinfo", MOUNT_V2 },
        { "/sys/fs/cgroup/a/memory.max", "99999999999999\n" } } },
    { "v2 in a container, where our group is the top",
      1 * GIB,
      { { "/proc/meminfo", MEMINFO },
        { "/proc/self/cgroup", "0::/\n" },
        { "/proc/self/mountinfo", MOUNT_V2 },
        { "/sys/fs/cgroup/memory.max", "1073741824\n" } } },
    { "v2, a path outside of what is mounted",
      1 * GIB,
      { { "/proc/meminfo", MEMINFO },
        { "/proc/self/cgroup", "0::/../../other\n" },
        { "/proc/self/mountinfo", MOUNT_V2 },
        { "/sys/fs/cgroup/memory.max", "1073741824\n" } } },
    { "v1, unlimited number on top",
      4 * GIB,
      { { "/proc/meminfo", MEMINFO },
        { "/proc/self/cgroup", "8:cpu,cpuacct:/\n4:memory:/docker/ab\n0::/\n" },
        { "/proc/self/mountinfo", MOUNT_CPU MOUNT_V1 },
        { "/sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes", "4294967296\n" },
        { "/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n" } } },
    { "v1 in a container, which mounts its own group",
      5 * GIB,
      { { "/proc/meminfo", MEMINFO },
        { "/proc/self/cgroup", "4:memory:/docker/ab\n" },
        { "/proc/self/mountinfo",
          "33 23 0:28 /docker/ab /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" },
        { "/sys/fs/cgroup/memory/memory.limit_in_bytes", "5368709120\n" } } },
};

static void the_least_limit_is_found_in_both_kinds_of_groups(void **state)
{
    (void)state;
    for (size_t m = 0; m < sizeof machines / sizeof machines[0]; m++) {
        char root[] = "/tmp/lorad-mem-XXXXXX", cmd[64];
        assert_non_null(mkdtemp(root));
        for (const struct made_up_file *f = machines[m].files; f->path != NULL; f++)
            put(root, f->path, f->text);
        size_t got = mem_limit_below(root);
        snprintf(cmd, sizeof cmd, "rm -rf %s", root);
        assert_int_equal(system(cmd), 0);
        if (got != machines[m].want)
            fail_msg("%s: %zu, not %zu", machines[m].what, got, machines[m].want);
    }
}

static void this_process_has_a_limit_and_is_within_it(void **state)
{
    (void)state;
    assert_true(mem_limit() > 16 * MIB);
    assert_true(mem_resident() < mem_limit());
}

/* --- the plan ----------------------------------------------------------------------------- */

static void a_plan_adds_up_and_keeps_what_is_asked_for(void **state)
{
    (void)state;
    /* budget, base, work, kv_min, kv, adapters -> kv, adapters; all in MiB */
    const size_t t[][8] = {
        { 1000, 500, 100, 10, 0, 0, 300, 100 }, /* a quarter of what is left for adapters */
        { 1000, 500, 100, 10, 50, 0, 50, 350 },
        { 1000, 500, 100, 10, 0, 50, 350, 50 },
        { 1000, 500, 100, 10, 20, 30, 20, 30 },
        { 1000, 500, 100, 390, 0, 0, 390, 10 }, /* one sequence goes before adapters */
        { 1000, 500, 100, 400, 0, 0, 400, 0 },
    };
    for (size_t i = 0; i < sizeof t / sizeof t[0]; i++) {
        struct mem_plan p;
        struct err err = { 0 };
        int rc = mem_plan(t[i][0] * MIB, t[i][1] * MIB, t[i][2] * MIB, t[i][3] * MIB, t[i][4] * MIB,
                          t[i][5] * MIB, &p, &err);
        if (rc != ERR_OK)
            fail_msg("case %zu: %s", i, err.msg);
        assert_int_equal(p.total, t[i][0] * MIB);
        assert_int_equal(p.base, t[i][1] * MIB);
        assert_int_equal(p.work, t[i][2] * MIB);
        assert_int_equal(p.kv, t[i][6] * MIB);
        assert_int_equal(p.adapters, t[i][7] * MIB);
        assert_true(p.base + p.work + p.kv + p.adapters <= p.total);
    }
}

static void a_plan_that_does_not_fit_says_the_numbers(void **state)
{
    (void)state;
    const size_t t[][6] = {
        { 1000, 1001, 0, 0, 0, 0 },       { 1000, 500, 501, 0, 0, 0 },
        { 1000, 500, 100, 401, 0, 0 },    { 1000, 500, 100, 10, 401, 0 },
        { 1000, 500, 100, 10, 5, 0 },     { 1000, 500, 100, 10, 0, 391 },
        { 1000, 500, 100, 10, 200, 201 },
    };
    for (size_t i = 0; i < sizeof t / sizeof t[0]; i++) {
        struct mem_plan p = { .total = 7 };
        struct err err = { 0 };
        int rc = mem_plan(t[i][0] * MIB, t[i][1] * MIB, t[i][2] * MIB, t[i][3] * MIB, t[i][4] * MIB,
                          t[i][5] * MIB, &p, &err);
        if (rc != ERR_INVALID || strstr(err.msg, "MiB") == NULL)
            fail_msg("case %zu: %d \"%s\"", i, rc, err.msg);
        assert_int_equal(p.total, 7);
    }
    struct err err = { 0 };
    struct mem_plan p;
    assert_int_equal(mem_plan(GIB, SIZE_MAX, SIZE_MAX, SIZE_MAX, 0, SIZE_MAX, &p, &err),
                     ERR_INVALID);
}

static void no_budget_means_four_fifths_of_the_limit(void **state)
{
    (void)state;
    struct mem_plan p;
    struct err err = { 0 };
    assert_int_equal(mem_plan(0, 0, 0, 0, 0, 0, &p, &err), ERR_OK);
    assert_int_equal(p.total, mem_limit() / 5 * 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_of_any_size_is_zeroed_and_aligned),
        cmocka_unit_test(more_memory_than_there_is_gives_null),
        cmocka_unit_test(freed_memory_goes_back),
        cmocka_unit_test(memory_is_made_ready_ahead_and_what_it_holds_stays),
        cmocka_unit_test(the_least_limit_is_found_in_both_kinds_of_groups),
        cmocka_unit_test(this_process_has_a_limit_and_is_within_it),
        cmocka_unit_test(a_plan_adds_up_and_keeps_what_is_asked_for),
        cmocka_unit_test(a_plan_that_does_not_fit_says_the_numbers),
        cmocka_unit_test(no_budget_means_four_fifths_of_the_limit),
    };
    return cmocka_run_group_tests_name("mem", tests, NULL, NULL);
}
