/* bench_stats.c - medians and how far values lie apart. */
#include "server/bench.h"

#include <stdlib.h>
#include <string.h>

static int ascending(const void *a, const void *b)
{
    const double u = *(const double *)a, v = *(const double *)b;
    return (u > v) - (u < v);
}

static int sort(const double *v, int n, double sorted[BENCH_ROUNDS_MAX])
{
    n = n > BENCH_ROUNDS_MAX ? BENCH_ROUNDS_MAX : n;
    if (n < 1)
        return 0;
    memcpy(sorted, v, (size_t)n * sizeof *v);
    qsort(sorted, (size_t)n, sizeof *sorted, ascending);
    return n;
}

double bench_median(const double *v, int n)
{
    double s[BENCH_ROUNDS_MAX];
    n = sort(v, n, s);
    if (n == 0)
        return 0;
    return n % 2 == 1 ? s[n / 2] : (s[n / 2 - 1] + s[n / 2]) / 2;
}

double bench_spread(const double *v, int n)
{
    double s[BENCH_ROUNDS_MAX];
    const double m = bench_median(v, n);
    n = sort(v, n, s);
    return n == 0 || m == 0 ? 0 : (s[n - 1] - s[0]) / 2 / m;
}
