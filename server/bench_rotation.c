/* bench_rotation.c - the part `rotation`: requests per second through scheduler, adapter cache and store
 * while 5 to 2,000 adapters take turns, with the popularity mixes of Punica (Chen et al., arXiv 2310.18547,
 * section 7):
 *
 *   distinct    every request another adapter, in turn
 *   uniform     each adapter as likely as any other
 *   skewed      Zipf with exponent 1.5: the i-th most popular with probability proportional to i^-1.5
 *   identical   all requests the same adapter: a control, which never sees more than one
 *
 * `distinct` goes through its adapters in steps of a prime, on from where the last round ended: the 48
 * requests of a round come from all over the database, and none returns before all others had their turn.
 *
 * There the number of adapters follows from the number of requests; here it is what varies.  (Punica's own
 * skew halves twice as fast; this tail is longer, which is harder on a cache.)  The scheduler runs 16
 * sequences and always has 16 more waiting.  Each request's adapter is looked up by its name first.
 *
 * Twice: with a cache that holds all adapters, which are in it before anything is timed; and with one that
 * holds a tenth, where the others come from the database. */
#include "server/bench_parts.h"

#include "server/adapter_loader.h"
#include "server/bench_stage.h"

#include "engine/sched.h"
#include "engine/util.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STRIDE = 797 }; /* prime, and no divisor of a number of adapters */
enum { RANK = 8, RUNNING = 16, IN_FLIGHT = 32, PROMPT = 16, TOKENS_MIN = 24, TOKENS_MAX = 40 };
enum { COUNTS = 4, SETTINGS = 3, ADAPTERS_MAX = 2000 };
enum mix { DISTINCT, UNIFORM, SKEWED, IDENTICAL, MIXES };
static const char *const mix_names[MIXES] = { "distinct", "uniform", "skewed", "identical" };
static const int counts_full[COUNTS] = { 5, 100, 1000, 2000 }, counts_quick[COUNTS] = { 5, 200, 0, 0 };
static const double zipf = 1.5;

/* A scheduler with a cache of its own. */
struct setting {
    size_t budget;
    struct adapter_loader loader;
    struct adapter_cache *cache;
    struct sched *sched;
};

struct rotation {
    struct bench *b;
    struct compute compute;
    struct stage_path db;
    struct base *base;
    struct store *store;
    const int *counts;
    int ncounts, requests;   /* requests: of a round */
    size_t adapter_bytes;    /* in memory */
    struct setting settings[SETTINGS]; /* all; a tenth of the largest count, of the one before */
    double likely[ADAPTERS_MAX]; /* sums of i^-1.5 */
};

struct rotation_case {
    struct rotation *r;
    struct setting *s;
    enum mix mix;
    int n;                   /* adapters in turn */
    uint64_t state, next;    /* random numbers; how many DISTINCT took, in all rounds */
    uint64_t loads, requests; /* so far, the first round not counted */
    bool warm;
};

/* --- which adapter --------------------------------------------------------------------------------- */

static uint64_t random_bits(struct rotation_case *c)
{
    c->state ^= c->state << 13;
    c->state ^= c->state >> 7;
    c->state ^= c->state << 17;
    return c->state;
}

static int zipf_of(struct rotation_case *c)
{
    const double at = (double)(random_bits(c) >> 11) * 0x1p-53 * c->r->likely[c->n - 1];
    int low = 0, high = c->n - 1;
    while (low < high) {
        const int mid = (low + high) / 2;
        if (c->r->likely[mid] < at)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static int choose(struct rotation_case *c)
{
    switch (c->mix) {
    case DISTINCT:
        return (int)(c->next++ * STRIDE % (uint64_t)c->n);
    case UNIFORM:
        return (int)(random_bits(c) % (uint64_t)c->n);
    case SKEWED:
        return zipf_of(c);
    default:
        return 0;
    }
}

/* --- requests ---------------------------------------------------------------------------------------- */

static int submit(struct rotation *r, struct setting *s, int adapter, uint64_t number, int max_tokens,
                  struct gen **ret, struct err *err)
{
    struct store_version v = { 0 };
    int32_t prompt[PROMPT];
    int rc = store_version_find(r->store, STORE_TENANT_DEFAULT, stage_name(adapter).s, &v, err);
    if (rc != ERR_OK)
        return rc;
    for (int i = 0; i < PROMPT; i++) /* a prompt that nobody else has */
        prompt[i] = (int32_t)((number * 2654435761u + (uint64_t)i * 40503u) % (uint64_t)r->base->arch.V);
    struct gen_request q = { .tenant = v.tenant, .prompt = prompt, .nprompt = PROMPT, .max_tokens = max_tokens,
                             .nadapters = 1, .ignore_eos = true };
    sample_defaults(&q.sample);
    q.sample.top_logprobs = -1;
    q.sample.seed = number;
    memcpy(q.adapters[0].hash, v.hash, sizeof q.adapters[0].hash);
    q.adapters[0].version_id = v.id;
    q.adapters[0].bytes = r->adapter_bytes;
    q.adapters[0].weight = 1;
    store_version_free(&v);
    return sched_submit(s->sched, &q, ret, err);
}

/* Until it has ended. */
static int finish(struct gen *g, struct err *err)
{
    struct gen_token t[64];
    enum gen_finish how = GEN_RUNNING;
    size_t n = 0;
    gen_wait(g, SIZE_MAX);
    while (how == GEN_RUNNING)
        n += gen_read(g, n, t, sizeof t / sizeof t[0], 0, NULL, &how);
    int rc = ERR_OK;
    if (how != GEN_LENGTH) {
        gen_error(g, err);
        rc = err_set(err, ERR_INTERNAL, "a request ended in an odd way");
    }
    gen_release(g);
    return rc;
}

typedef int (*choose_fn)(void *ud);

/* n requests, IN_FLIGHT at a time. */
static int run_requests(struct rotation *r, struct setting *s, int n, bool short_ones, choose_fn which, void *ud,
                        struct err *err)
{
    static uint64_t number;
    struct gen *flight[IN_FLIGHT] = { NULL };
    uint64_t lengths = 12345;
    int rc = ERR_OK;
    for (int i = 0; i < n + IN_FLIGHT; i++) {
        struct gen **slot = &flight[i % IN_FLIGHT];
        if (*slot != NULL) {
            const int bad = finish(*slot, rc == ERR_OK ? err : NULL);
            rc = rc == ERR_OK ? bad : rc;
            *slot = NULL;
        }
        if (i >= n || rc != ERR_OK)
            continue;
        lengths = lengths * 6364136223846793005u + 1;
        const int tokens = TOKENS_MIN + (int)((lengths >> 33) % (TOKENS_MAX - TOKENS_MIN + 1));
        rc = submit(r, s, which(ud), ++number, short_ones ? 1 : tokens, slot, err);
    }
    return rc;
}

static int choose_of_case(void *ud) { return choose(ud); }

static int measure_case(void *arg, double *ret, struct err *err)
{
    struct rotation_case *c = arg;
    struct adapter_cache_stats before, after;
    adapter_cache_stats(c->s->cache, &before);
    const double began = now_mono();
    const int rc = run_requests(c->r, c->s, c->r->requests, false, choose_of_case, c, err);
    *ret = c->r->requests / (now_mono() - began);
    adapter_cache_stats(c->s->cache, &after);
    if (c->warm) {
        c->loads += after.loads - before.loads;
        c->requests += (uint64_t)c->r->requests;
    }
    c->warm = true;
    return rc;
}

/* --- settings ---------------------------------------------------------------------------------------- */

static int open_setting(struct rotation *r, struct setting *s, size_t budget, struct err *err)
{
    s->budget = budget;
    s->loader = (struct adapter_loader){ .db_path = r->db.s, .base = r->base };
    int rc = adapter_cache_create(budget, adapter_loader_load, &s->loader, &s->cache, err);
    const struct sched_opts o = { .base = r->base, .compute = &r->compute, .adapters = s->cache,
                                  .kv_bytes = (size_t)128 << 20, .max_seqs = RUNNING, .max_context = 512 };
    return rc == ERR_OK ? sched_create(&o, &s->sched, err) : rc;
}

static void close_setting(struct setting *s)
{
    sched_destroy(s->sched);
    if (s->cache != NULL)
        adapter_cache_destroy(s->cache);
    adapter_loader_close(&s->loader);
}

static int next_of(void *ud) { return (*(int *)ud)++; }

static int open_settings(struct rotation *r, struct err *err)
{
    const int most = r->counts[r->ncounts - 1];
    int first = 0;
    int rc = open_setting(r, &r->settings[0], (size_t)most * r->adapter_bytes, err);
    for (int i = 1; i < SETTINGS && r->ncounts - i > 0 && rc == ERR_OK; i++)
        rc = open_setting(r, &r->settings[i], (size_t)(r->counts[r->ncounts - i] / 10) * r->adapter_bytes, err);
    return rc == ERR_OK ? run_requests(r, &r->settings[0], most, true, next_of, &first, err) : rc;
}

/* --- rows -------------------------------------------------------------------------------------------- */

static int put_case(struct rotation *r, const struct rotation_case *c, const struct bench_series *s,
                    const struct bench_series *ref, struct err *err)
{
    const char *end = c->s == &r->settings[0] ? "" : ".tenth";
    int rc = bench_row(r->b, s, ref, 1, err, "rotation.%s.a%d%s", mix_names[c->mix], c->n, end);
    if (rc == ERR_OK && end[0] != '\0')
        rc = bench_number(r->b, (double)c->loads / (double)c->requests, "loads/req", NULL, err,
                          "rotation.%s.a%d%s.loads", mix_names[c->mix], c->n, end);
    return rc;
}

/* Cases of a mix are neighbours, the one with the fewest adapters first. */
static int measure(struct rotation *r, struct err *err)
{
    enum { CASES_MAX = MIXES * (COUNTS + SETTINGS - 1) };
    static struct rotation_case cases[CASES_MAX];
    static struct bench_series s[CASES_MAX];
    char names[COUNTS][32];
    int first[MIXES], n = 0;
    for (int m = 0; m < MIXES; m++) {
        first[m] = n;
        for (int i = 0; i < r->ncounts; i++, n++)
            cases[n] = (struct rotation_case){ .s = &r->settings[0], .mix = (enum mix)m, .n = r->counts[i] };
        for (int i = 1; i < SETTINGS && r->settings[i].sched != NULL && m != IDENTICAL; i++, n++)
            cases[n] = (struct rotation_case){ .s = &r->settings[i], .mix = (enum mix)m,
                                               .n = r->counts[r->ncounts - i] };
    }
    for (int i = 0; i < r->ncounts; i++)
        snprintf(names[i], sizeof names[i], "with %d", r->counts[i]);
    for (int i = 0; i < n; i++) {
        cases[i].r = r;
        cases[i].state = 88172645463325252u;
        s[i] = (struct bench_series){ .name = names[0], .unit = "requests/s", .measure = measure_case,
                                      .arg = &cases[i] };
    }
    s[first[IDENTICAL]].name = "identical";
    int rc = bench_measure(r->b, s, n, err);
    for (int i = 0; i < n && rc == ERR_OK; i++) {
        const int few = first[cases[i].mix], same = first[IDENTICAL];
        const struct bench_series *ref = i != few ? &s[few] : i != same ? &s[same] : NULL;
        rc = put_case(r, &cases[i], &s[i], ref, err);
    }
    return rc;
}

/* --- the part ------------------------------------------------------------------------------------------ */

static int put_sizes(struct rotation *r, size_t tensors, struct err *err)
{
    int rc = bench_number(r->b, (double)r->counts[r->ncounts - 1] * (double)tensors / 1e6, "MB", NULL, err,
                          "rotation.state");
    if (rc == ERR_OK)
        rc = bench_number(r->b, (double)r->settings[0].budget / 1e6, "MB", NULL, err, "rotation.cache");
    for (int i = 1; i < SETTINGS && r->settings[i].sched != NULL && rc == ERR_OK; i++)
        rc = bench_number(r->b, (double)r->settings[i].budget / 1e6, "MB", NULL, err, "rotation.cache.a%d.tenth",
                          r->counts[r->ncounts - i]);
    return rc;
}

static int run_in(struct rotation *r, const struct stage *st, const struct synthetic_shape *shape,
                  struct err *err)
{
    struct adapter_src *one = NULL;
    int rc = synthetic_base(shape, &r->base, err);
    if (rc == ERR_OK)
        rc = stage_adapter(&r->base->arch, STAGE_ATTENTION, RANK, 0, &one, err);
    if (rc != ERR_OK)
        return rc;
    const size_t tensors = one->bytes;
    const int most = r->counts[r->ncounts - 1];
    r->adapter_bytes = adapter_build_bytes(&r->base->arch, one);
    adapter_src_free(one);
    if (!stage_room(r->b, st, "rotation", (size_t)most * tensors / 2 * 3,
                    (size_t)most * r->adapter_bytes / 8 * 9 + ((size_t)1 << 30)))
        return ERR_OK;
    rc = stage_fill(r->base, r->db.s, STAGE_ATTENTION, RANK, 0, most, err);
    if (rc == ERR_OK)
        rc = store_open(r->db.s, &r->store, err);
    if (rc == ERR_OK)
        rc = open_settings(r, err);
    if (rc == ERR_OK)
        rc = put_sizes(r, tensors, err);
    return rc == ERR_OK ? measure(r, err) : rc;
}

static int run(struct bench *b, struct err *err)
{
    static struct rotation r;
    struct stage st;
    int rc = stage_open(&st, err);
    if (rc != ERR_OK)
        return rc;
    r = (struct rotation){ .b = b, .compute = b->compute, .db = stage_path(&st, "rotation.db"),
                           .counts = b->quick ? counts_quick : counts_full, .ncounts = b->quick ? 2 : COUNTS,
                           .requests = 48 };
    r.compute.precision = b->precisions[PREC_FAST] ? PREC_FAST : PREC_EXACT;
    for (int i = 0; i < ADAPTERS_MAX; i++)
        r.likely[i] = (i > 0 ? r.likely[i - 1] : 0) + pow(i + 1, -zipf);
    rc = run_in(&r, &st, synthetic_find(b->quick ? "tiny" : "135m"), err);
    for (int i = 0; i < SETTINGS; i++)
        close_setting(&r.settings[i]);
    store_close(r.store);
    synthetic_free(r.base);
    stage_close(&st);
    return rc;
}

const struct bench_part bench_rotation = { "rotation", "many adapters in turn, four mixes of popularity", run };
