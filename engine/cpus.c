/* cpus.c - how many CPUs this process may use: the affinity mask and the cgroup's quota.
 *
 * A quota is time per period, so 150 ms of every 100 ms are one and a half CPUs; rounded up to
 * two threads.  Limits of every group from our own up to the root apply; inside a container the
 * path in /proc/self/cgroup may not exist below the mount, then what is visible applies. */
#include "engine/cpus.h"

#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The first number of a file (-1: unlimited, missing or not a number); cpu.max has a second
 * one in the same line. */
static long long read_numbers(const char *dir, const char *name, long long *ret_second)
{
    char path[PATH_MAX + 32], line[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "re");
    if (f == NULL)
        return -1;
    bool got = fgets(line, sizeof line, f) != NULL;
    fclose(f);
    char *end;
    long long first = got ? strtoll(line, &end, 10) : -1;
    if (!got || end == line) /* "max" */
        return -1;
    if (ret_second != NULL)
        *ret_second = strtoll(end, NULL, 10);
    return first;
}

/* CPUs that one group may use, rounded up; INT_MAX without a quota. */
static int group_quota(const char *dir)
{
    long long period = 0, quota = read_numbers(dir, "cpu.max", &period);
    if (quota < 0) {
        quota = read_numbers(dir, "cpu.cfs_quota_us", NULL);
        period = read_numbers(dir, "cpu.cfs_period_us", NULL);
    }
    if (quota <= 0 || period <= 0)
        return INT_MAX;
    long long cpus = quota / period + (quota % period != 0);
    return cpus < INT_MAX ? (int)cpus : INT_MAX;
}

/* The least quota of mount + path and everything above it, the mount included. */
static int tree_quota(const char *mount, const char *path)
{
    char dir[PATH_MAX];
    int n = snprintf(dir, sizeof dir, "%s%s", mount, path);
    if (n < 0 || (size_t)n >= sizeof dir)
        return INT_MAX;
    int least = INT_MAX;
    for (const size_t top = strlen(mount);;) {
        int cpus = group_quota(dir);
        least = cpus < least ? cpus : least;
        char *slash = strrchr(dir, '/');
        if (strlen(dir) <= top || slash == NULL || (size_t)(slash - dir) < top)
            return least;
        *slash = '\0';
    }
}

static bool has_cpu(const char *controllers)
{
    for (const char *c = controllers; c != NULL; c = strchr(c, ',')) {
        c += *c == ',';
        if (strncmp(c, "cpu", 3) == 0 && (c[3] == ',' || c[3] == '\0'))
            return true;
    }
    return false;
}

int cpus_quota(const char *root)
{
    char path[PATH_MAX], line[PATH_MAX], mount[PATH_MAX];
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *f = fopen(path, "re");
    if (f == NULL)
        return 0;
    int least = INT_MAX;
    while (fgets(line, sizeof line, f) != NULL) {
        /* number:controllers:path, without controllers for version 2 */
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (group == NULL)
            continue;
        *group++ = '\0';
        controllers++;
        int n;
        if (*controllers == '\0')
            n = snprintf(mount, sizeof mount, "%s/sys/fs/cgroup", root);
        else if (has_cpu(controllers))
            n = snprintf(mount, sizeof mount, "%s/sys/fs/cgroup/%s", root, controllers);
        else
            continue;
        if (n < 0 || (size_t)n >= sizeof mount)
            continue;
        int cpus = tree_quota(mount, group);
        least = cpus < least ? cpus : least;
    }
    fclose(f);
    return least < INT_MAX ? least : 0;
}

int cpus_available(void)
{
    cpu_set_t set;
    /* A machine with more than CPU_SETSIZE CPUs makes this fail. */
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                        : (int)sysconf(_SC_NPROCESSORS_ONLN);
    int quota = cpus_quota("");
    if (quota > 0 && quota < n)
        n = quota;
    return n > 0 ? n : 1;
}
