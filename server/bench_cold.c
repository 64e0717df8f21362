/* bench_cold.c - the part `cold`: the first token of a request whose adapter lies in the database only,
 * against the same adapter in memory; and what its coming does to sequences that run meanwhile.
 *
 * The adapters have rank 16 on every linear layer and are asked for in turn through a cache that holds
 * fewer, so that each comes back when it has gone.  Each is asked for twice: cold, then warm.  The round
 * to warm up gives the first reading of some by this server (`unseen`), which hashes them. */
#include "server/bench_parts.h"

#include "server/bench_stage.h"

#include "engine/util.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { RANK = 16, RUNNING = 4, ADAPTERS = 16, CACHE = 8, PAIRS = 6, PROMPT = 1, PAIRS_MAX = 64 };

struct span_of_time {
    double from, to;
    bool cold;
};

struct cold {
    int port, tokens;        /* of the running sequences */
    double pause;            /* before what is asked for beside them: some of their steps */
    unsigned turn;           /* of the pauses' random numbers */
    int next;                /* adapter to ask for, above those of the running sequences */
    uint64_t seed, streams_seed; /* of what is asked for; of the running sequences */
    double warm, added;      /* of the round: means over its pairs */
    struct stage_samples first, again; /* cold and warm requests while others run */
    struct stage_samples unseen; /* added by adapters that this server reads for the first time; nothing runs */
    /* the running sequences of a round, and what was asked for beside them */
    struct stage_client running[RUNNING];
    struct stage_name names[RUNNING];
    atomic_bool ended;
    int rc;
    struct err err;
    struct span_of_time spans[2 * PAIRS_MAX];
    int nspans;
    double gap, quiet_gap, warm_gap, busy_added; /* of the round */
};

/* One token from one adapter: seconds until it came. */
static int ask(struct cold *k, int adapter, struct span_of_time *ret, struct err *err)
{
    const struct stage_name name = stage_name(adapter);
    struct stage_client c = { .model = name.s, .prompt_tokens = PROMPT, .max_tokens = 1 };
    int rc = stage_clients(k->port, &c, 1, ++k->seed, err);
    if (rc != ERR_OK)
        return rc;
    *ret = (struct span_of_time){ .from = c.sent, .to = c.at[0] };
    stage_clients_free(&c, 1);
    return ERR_OK;
}

/* Half of `pause` to three halves, so that what comes next comes anywhere in a step. */
static void wait_anywhere(struct cold *k, double pause)
{
    k->turn = k->turn * 1664525u + 1013904223u;
    const double seconds = pause * (0.5 + (double)(k->turn >> 8) / (1 << 24));
    nanosleep(&(struct timespec){ .tv_nsec = (long)(seconds * 1e9) }, NULL);
}

/* The next adapter cold, then warm. */
static int ask_pair(struct cold *k, double pause, struct span_of_time ret[2], struct err *err)
{
    const int adapter = RUNNING + k->next++ % (ADAPTERS - RUNNING);
    wait_anywhere(k, pause);
    int rc = ask(k, adapter, &ret[0], err);
    wait_anywhere(k, pause);
    if (rc == ERR_OK)
        rc = ask(k, adapter, &ret[1], err);
    ret[0].cold = true;
    return rc;
}

/* --- nothing else runs ---------------------------------------------------------------------------- */

static int measure_idle(void *arg, double *ret, struct err *err)
{
    struct cold *k = arg;
    double cold = 0, warm = 0;
    for (int i = 0; i < PAIRS; i++) {
        struct span_of_time s[2];
        int rc = ask_pair(k, 0, s, err);
        if (rc == ERR_OK && k->next <= ADAPTERS - RUNNING)
            rc = stage_sample(&k->unseen, (s[0].to - s[0].from) - (s[1].to - s[1].from), err);
        if (rc != ERR_OK)
            return rc;
        cold += s[0].to - s[0].from;
        warm += s[1].to - s[1].from;
    }
    k->warm = 1e3 * warm / PAIRS;
    k->added = 1e3 * (cold - warm) / PAIRS;
    *ret = 1e3 * cold / PAIRS;
    return ERR_OK;
}

static int measure_warm(void *arg, double *ret, struct err *err)
{
    (void)err;
    *ret = ((struct cold *)arg)->warm;
    return ERR_OK;
}

static int measure_added(void *arg, double *ret, struct err *err)
{
    (void)err;
    *ret = fmax(((struct cold *)arg)->added, 1e-3); /* of noise alone it may be less than nothing */
    return ERR_OK;
}

/* --- beside running sequences --------------------------------------------------------------------- */

static void *run_streams(void *arg)
{
    struct cold *k = arg;
    k->rc = stage_clients(k->port, k->running, RUNNING, k->streams_seed, &k->err);
    atomic_store(&k->ended, true);
    return NULL;
}

/* Pairs until the running sequences end. */
static int ask_beside(struct cold *k, struct err *err)
{
    int rc = ERR_OK;
    for (int i = 0; !atomic_load(&k->ended) && rc == ERR_OK; i++) {
        struct span_of_time s[2];
        rc = ask_pair(k, k->pause, s, err);
        for (int j = 0; j < 2 && rc == ERR_OK && k->nspans < 2 * PAIRS_MAX; j++)
            k->spans[k->nspans++] = s[j];
    }
    return rc;
}

/* What was asked for between two tokens; NULL: nothing. */
static const struct span_of_time *meanwhile(const struct cold *k, double from, double to)
{
    const struct span_of_time *found = NULL;
    for (int i = 0; i < k->nspans; i++)
        if (k->spans[i].from < to && k->spans[i].to > from && (found == NULL || k->spans[i].cold))
            found = &k->spans[i];
    return found;
}

/* Gaps between the tokens of a running sequence: the median and the longest while nothing comes, and the
 * longest while something comes. */
static int look_at_gaps(struct cold *k, double *ret_longest, struct err *err)
{
    struct stage_samples quiet = { 0 };
    const struct stage_client *c = &k->running[0];
    double longest[2] = { 0, 0 };
    int rc = ERR_OK;
    for (int i = 1; i < c->events && rc == ERR_OK; i++) {
        const double gap = c->at[i] - c->at[i - 1];
        const struct span_of_time *s = meanwhile(k, c->at[i - 1], c->at[i]);
        if (s == NULL)
            rc = stage_sample(&quiet, gap, err);
        else if (gap > longest[s->cold])
            longest[s->cold] = gap;
    }
    for (int i = 0; i < k->nspans && rc == ERR_OK; i++)
        rc = stage_sample(k->spans[i].cold ? &k->first : &k->again, k->spans[i].to - k->spans[i].from, err);
    k->gap = 1e3 * stage_percentile(&quiet, 50);
    k->quiet_gap = 1e3 * stage_percentile(&quiet, 100);
    k->warm_gap = 1e3 * longest[false];
    *ret_longest = 1e3 * longest[true];
    stage_samples_free(&quiet);
    return rc;
}

/* How much longer the first token of a cold adapter took than of the same one warm: mean of the pairs that
 * came while all sequences ran; 0: there was none. */
static double added_beside(const struct cold *k)
{
    double end = k->running[0].at[k->running[0].events - 1], sum = 0;
    int n = 0;
    for (int i = 1; i < RUNNING; i++)
        end = fmin(end, k->running[i].at[k->running[i].events - 1]);
    for (int i = 0; i + 1 < k->nspans; i += 2) {
        const struct span_of_time *cold = &k->spans[i], *warm = &k->spans[i + 1];
        if (warm->to > end)
            break;
        sum += (cold->to - cold->from) - (warm->to - warm->from);
        n++;
    }
    return n > 0 ? fmax(1e3 * sum / n, 1e-3) : 0; /* of noise alone it may be less than nothing */
}

/* 0: the running sequences ended before anything came, or it never was quiet. */
static int run_beside(struct cold *k, double *ret_longest, struct err *err)
{
    pthread_t thread;
    for (int i = 0; i < RUNNING; i++) {
        k->names[i] = stage_name(i);
        k->running[i] = (struct stage_client){ .model = k->names[i].s, .prompt_tokens = PROMPT,
                                               .max_tokens = k->tokens };
    }
    k->nspans = 0;
    k->streams_seed = 1000000 + k->seed;
    atomic_store(&k->ended, false);
    k->err = (struct err){ 0 };
    if (pthread_create(&thread, NULL, run_streams, k) != 0)
        return err_set(err, ERR_NOMEM, "no thread for the running sequences");
    int rc = ask_beside(k, err);
    pthread_join(thread, NULL);
    if (k->rc != ERR_OK) {
        *err = k->err;
        return k->rc;
    }
    if (rc == ERR_OK)
        rc = look_at_gaps(k, ret_longest, err);
    if (rc == ERR_OK)
        k->busy_added = added_beside(k);
    stage_clients_free(k->running, RUNNING);
    return rc;
}

static int measure_longest(void *arg, double *ret, struct err *err)
{
    enum { TRIES = 10 };
    struct cold *k = arg;
    for (int i = 0; i < TRIES; i++) {
        const int rc = run_beside(k, ret, err);
        if (rc != ERR_OK || (k->gap > 0 && *ret > 0 && k->busy_added > 0))
            return rc;
    }
    return err_set(err, ERR_INTERNAL, "the running sequences ended before a cold adapter came");
}

static int measure_gap(void *arg, double *ret, struct err *err)
{
    (void)err;
    *ret = ((struct cold *)arg)->gap;
    return ERR_OK;
}

static int measure_warm_gap(void *arg, double *ret, struct err *err)
{
    const struct cold *k = arg;
    (void)err;
    *ret = k->warm_gap > 0 ? k->warm_gap : k->gap;
    return ERR_OK;
}

static int measure_quiet_gap(void *arg, double *ret, struct err *err)
{
    (void)err;
    *ret = ((struct cold *)arg)->quiet_gap;
    return ERR_OK;
}

static int measure_busy_added(void *arg, double *ret, struct err *err)
{
    (void)err;
    *ret = ((struct cold *)arg)->busy_added;
    return ERR_OK;
}

/* --- the part --------------------------------------------------------------------------------------- */

static int tokens_running(const struct bench *b, const struct synthetic_shape *of)
{
    const int tokens = of->D >= 2048 ? 200 : of->D >= 512 ? 600 : 3000;
    return b->quick ? tokens / 2 : tokens;
}

static int measure(struct bench *b, const struct stage_server *v, const struct synthetic_shape *of,
                   struct err *err)
{
    static struct cold k;
    const char *shape = of->name;
    k = (struct cold){ .port = v->port, .tokens = tokens_running(b, of),
                       .pause = of->D >= 2048 ? 0.15 : of->D >= 512 ? 0.05 : 0.01,
                       .seed = (uint64_t)v->pid << 16 };
    struct bench_series s[] = {
        { .name = "ms cold", .unit = "ms", .measure = measure_idle, .arg = &k },
        { .name = "ms warm", .unit = "ms", .measure = measure_warm, .arg = &k },
        { .name = "ms added", .unit = "ms", .measure = measure_added, .arg = &k },
        { .name = "ms longest", .unit = "ms", .measure = measure_longest, .arg = &k },
        { .name = "ms median", .unit = "ms", .measure = measure_gap, .arg = &k },
        { .name = "ms warm", .unit = "ms", .measure = measure_warm_gap, .arg = &k },
        { .name = "ms added", .unit = "ms", .measure = measure_busy_added, .arg = &k },
        { .name = "ms quiet", .unit = "ms", .measure = measure_quiet_gap, .arg = &k },
    };
    int rc = bench_measure(b, s, 8, err);
    s[1].foreign = s[2].foreign = s[0].foreign; /* they are of the rounds that those measured */
    s[4].foreign = s[5].foreign = s[6].foreign = s[7].foreign = s[3].foreign;
    if (rc == ERR_OK)
        rc = bench_row(b, &s[0], &s[1], 1, err, "cold.%s.first", shape);
    if (rc == ERR_OK)
        rc = bench_row(b, &s[2], NULL, 1, err, "cold.%s.latency", shape);
    if (rc == ERR_OK)
        rc = bench_number(b, fmax(1e3 * stage_percentile(&k.unseen, 50), 1e-3), "ms", &s[0], err,
                          "cold.%s.unseen.latency", shape);
    if (rc == ERR_OK)
        rc = bench_row(b, &s[3], &s[4], 1, err, "cold.%s.stall", shape);
    if (rc == ERR_OK)
        rc = bench_row(b, &s[5], &s[4], 1, err, "cold.%s.stall.warm", shape);
    if (rc == ERR_OK)
        rc = bench_row(b, &s[7], &s[4], 1, err, "cold.%s.stall.quiet", shape);
    if (rc == ERR_OK)
        rc = bench_row(b, &s[6], NULL, 1, err, "cold.%s.busy.latency", shape);
    if (rc == ERR_OK)
        rc = bench_number(b, 1e3 * stage_percentile(&k.first, 50), "ms", &s[3], err, "cold.%s.busy.first", shape);
    if (rc == ERR_OK)
        rc = bench_number(b, 1e3 * stage_percentile(&k.again, 50), "ms", &s[3], err, "cold.%s.busy.first.warm",
                          shape);
    stage_samples_free(&k.first);
    stage_samples_free(&k.again);
    stage_samples_free(&k.unseen);
    return rc;
}

static int run_shape(struct bench *b, const struct stage *st, const struct synthetic_shape *shape,
                     struct err *err)
{
    const struct stage_path base = stage_path(st, "cold.base"), db = stage_path(st, "cold.db");
    struct adapter_src *one = NULL;
    struct stage_server v = { 0 };
    struct base *made = NULL;
    char cache[32], kv[32], context[16];
    const int longest = PROMPT + tokens_running(b, shape);
    int rc = stage_base(shape, base.s, &made, err);
    if (rc == ERR_OK)
        rc = stage_adapter(&made->arch, STAGE_ALL, RANK, 0, &one, err);
    if (rc == ERR_OK) {
        const size_t bytes = adapter_build_bytes(&made->arch, one);
        snprintf(cache, sizeof cache, "%zu", CACHE * bytes);
        snprintf(context, sizeof context, "%d", longest > STAGE_CONTEXT ? longest : STAGE_CONTEXT);
        snprintf(kv, sizeof kv, "%zu", stage_kv_bytes(&made->arch, RUNNING + 1, longest));
        rc = bench_number(b, (double)one->bytes / 1e6, "MB", NULL, err, "cold.%s.size", shape->name);
        adapter_src_free(one);
    }
    if (rc == ERR_OK)
        rc = stage_fill(made, db.s, STAGE_ALL, RANK, 0, ADAPTERS, err);
    synthetic_free(made);
    const char *more[] = { "--adapter-cache", cache, "--kv", kv, "--context", context, "--jobs", "off", NULL };
    if (rc == ERR_OK)
        rc = stage_serve(b, st, base.s, db.s, more, &v, err);
    if (rc == ERR_OK)
        rc = measure(b, &v, shape, err);
    stage_serve_end(b, &v);
    stage_remove_db(db.s);
    unlink(base.s);
    return rc;
}

static int run(struct bench *b, struct err *err)
{
    return stage_each_shape(b, 3, 3, (size_t)1 << 30, run_shape, err);
}

const struct bench_part bench_cold = { "cold", "adapters that come from the database", run };
