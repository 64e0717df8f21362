/* bench_machine.c - what the numbers were measured on, and who else used it meanwhile. */
#include "server/bench.h"

#include "engine/blas.h"
#include "engine/cpus.h"
#include "engine/mem.h"
#include "engine/util.h"
#include "server/cmd.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

/* The first line of `path` that begins with `key`, without it; false: there is none. */
static bool find_line(const char *path, const char *key, char *ret, size_t cap)
{
    FILE *f = fopen(path, "r");
    bool found = false;
    while (f != NULL && !found && fgets(ret, (int)cap, f) != NULL) {
        const size_t n = strlen(key);
        if (strncmp(ret, key, n) != 0)
            continue;
        found = true;
        memmove(ret, ret + n, strlen(ret + n) + 1);
        ret[strcspn(ret, "\n")] = '\0';
    }
    if (f != NULL)
        fclose(f);
    return found;
}

static double seconds_of(struct timeval t) { return (double)t.tv_sec + 1e-6 * (double)t.tv_usec; }

static double usage(int who)
{
    struct rusage u;
    return getrusage(who, &u) == 0 ? seconds_of(u.ru_utime) + seconds_of(u.ru_stime) : 0;
}

/* utime and stime are the 14th and 15th fields of /proc/PID/stat; the second may hold anything up to
 * the last parenthesis. */
static double process_seconds(pid_t pid)
{
    char path[64], line[1024];
    unsigned long long user, sys;
    snprintf(path, sizeof path, "/proc/%ld/stat", (long)pid);
    if (!find_line(path, "", line, sizeof line))
        return 0;
    const char *end = strrchr(line, ')');
    if (end == NULL || sscanf(end + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &user,
                              &sys) != 2)
        return 0;
    return (double)(user + sys) / (double)sysconf(_SC_CLK_TCK);
}

double bench_own_seconds(pid_t child)
{
    return usage(RUSAGE_SELF) + usage(RUSAGE_CHILDREN) + (child > 0 ? process_seconds(child) : 0);
}

/* user nice system idle iowait irq softirq steal: all but the two in the middle. */
double bench_busy_seconds(void)
{
    char line[512];
    unsigned long long v[8] = { 0 };
    if (!find_line("/proc/stat", "cpu ", line, sizeof line) ||
        sscanf(line, "%llu %llu %llu %llu %llu %llu %llu %llu", &v[0], &v[1], &v[2], &v[3], &v[4], &v[5],
               &v[6], &v[7]) < 4)
        return 0;
    return (double)(v[0] + v[1] + v[2] + v[5] + v[6] + v[7]) / (double)sysconf(_SC_CLK_TCK);
}

int bench_cpus_online(void)
{
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

size_t bench_memory_free(void)
{
    char line[128];
    if (!find_line("/proc/meminfo", "MemAvailable:", line, sizeof line))
        return mem_limit();
    return (size_t)strtoull(line, NULL, 10) << 10;
}

/* "[madvise]" of "always [madvise] never". */
static void chosen(char *text)
{
    const char *open = strchr(text, '['), *close = open != NULL ? strchr(open, ']') : NULL;
    if (close == NULL)
        return;
    const size_t n = (size_t)(close - open) - 1;
    memmove(text, open + 1, n);
    text[n] = '\0';
}

json_t *bench_machine(const struct bench *b)
{
    char cpu[256] = "unknown", huge[256] = "unknown", load[256] = "unknown";
    struct utsname u = { 0 };
    find_line("/proc/cpuinfo", "model name", cpu, sizeof cpu);
    find_line("/proc/loadavg", "", load, sizeof load);
    if (find_line("/sys/kernel/mm/transparent_hugepage/enabled", "", huge, sizeof huge))
        chosen(huge);
    uname(&u);
    const char *model = cpu + strspn(cpu, "\t :");
    return json_pack("{s:s, s:s, s:i, s:i, s:i, s:s, s:s, s:I, s:I, s:s, s:s, s:s, s:s}",
                     "lorad", lorad_version, "cpu", model, "cpus", bench_cpus_online(),
                     "cpus_available", cpus_available(), "threads", pool_threads(b->compute.pool),
                     "kernels", isa_name(b->compute.isa), "huge_pages", huge,
                     "memory", (json_int_t)mem_limit(), "memory_free", (json_int_t)bench_memory_free(),
                     "compiler",
#ifdef __clang__
                     __VERSION__,
#else
                     "gcc " __VERSION__,
#endif
                     "openblas", blas_core(), "kernel", u.release, "load", load);
}
