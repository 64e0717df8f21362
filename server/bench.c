/* bench.c - measuring in turn. */
#include "server/bench.h"

#include "engine/mem.h"
#include "engine/util.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

double bench_time(const struct bench *b, void (*fn)(void *arg), void *arg)
{
    const double start = now_mono();
    double now;
    int calls = 0;
    do {
        fn(arg);
        calls++;
        now = now_mono();
    } while (now - start < b->min_seconds);
    return (now - start) / calls;
}

static int measure_one(const struct bench *b, struct bench_series *s, bool keep, struct err *err)
{
    double value = 0;
    const double began = now_mono(), own = bench_own_seconds(b->child), busy = bench_busy_seconds();
    int rc = s->measure(s->arg, &value, err);
    if (rc != ERR_OK)
        return rc;
    if (!isfinite(value) || value <= 0)
        return err_set(err, ERR_INTERNAL, "%s: a round of part %s measured %g %s", s->name, b->part,
                       value, s->unit);
    if (!keep)
        return ERR_OK;
    s->v[s->n++] = value;
    s->began += now_mono() - began;
    s->own += bench_own_seconds(b->child) - own;
    s->busy += bench_busy_seconds() - busy;
    return ERR_OK;
}

int bench_measure(struct bench *b, struct bench_series *s, int n, struct err *err)
{
    int rc = ERR_OK;
    for (int i = 0; i < n; i++) {
        s[i].n = 0;
        s[i].began = s[i].own = s[i].busy = 0;
    }
    for (int round = -1; round < b->rounds; round++)
        for (int i = 0; i < n && rc == ERR_OK; i++)
            rc = measure_one(b, &s[i], round >= 0, err);
    for (int i = 0; i < n && rc == ERR_OK; i++) {
        const double all = s[i].began * bench_cpus_online();
        const double theirs = s[i].busy - s[i].own;
        s[i].foreign = all > 0 && theirs > 0 ? fmin(theirs / all, 1) : 0;
    }
    return rc;
}

struct bench_series bench_scaled(const struct bench_series *s, const char *unit, double factor)
{
    struct bench_series scaled = *s;
    scaled.unit = unit;
    for (int i = 0; i < s->n; i++)
        scaled.v[i] *= factor;
    return scaled;
}

bool bench_room(struct bench *b, const char *id, size_t bytes)
{
    char need[32], have[32];
    const size_t limit = mem_limit(), taken = mem_resident(), room = limit > taken ? limit - taken : 0;
    size_t left = bench_memory_free();
    left = room < left ? room : left;
    if (bytes <= left)
        return true;
    bench_skip(b, id, "needs %s of memory, and %s are free", human_bytes(bytes, need),
               human_bytes(left, have));
    return false;
}
