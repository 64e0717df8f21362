/* bench_train.c - one QLoRA step (rank 16, every linear layer, AdamW) on synthetic bases: tokens per
 * second and peak memory; beside PyTorch on the CPU where it is installed (bench_train_torch.py: the
 * same shapes in fp32), in alternation.
 *
 *     bench_train [SHAPE[:TOKENS]]...      default 1.1b:512; shapes in synthetic.h
 *
 * STEPS sets the steps that count (default 2, after one to warm up), PRECISION exact or fast, KEEP=0
 * computes every block again on the way back. */
#include "engine/train.h"

#include "engine/mem.h"
#include "engine/synthetic.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

enum { MAX_STEPS = 64 };

static int ascending(const void *a, const void *b)
{
    const double u = *(const double *)a, v = *(const double *)b;
    return (u > v) - (u < v);
}

/* A line of /proc/self/status in bytes. */
static size_t status(const char *key)
{
    char line[256];
    size_t kib = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (strncmp(line, key, strlen(key)) == 0)
            kib = strtoull(line + strlen(key), NULL, 10);
    if (f != NULL)
        fclose(f);
    return kib << 10;
}

static struct train_set one_example(int tokens, int V)
{
    static struct train_example e;
    int32_t *ids = malloc((size_t)tokens * sizeof *ids);
    uint8_t *learn = malloc((size_t)tokens);
    if (ids == NULL || learn == NULL)
        abort();
    for (int i = 0; i < tokens; i++) {
        ids[i] = (int32_t)((unsigned)i * 2654435761u % (unsigned)V);
        learn[i] = i > 0;
    }
    e = (struct train_example){ ids, learn, tokens };
    return (struct train_set){ .n = 1, .examples = &e, .tokens = (uint64_t)tokens,
                               .targets = (uint64_t)tokens - 1 };
}

/* Half of the memory that the base leaves. */
static size_t keep_room(const struct base *b)
{
    const size_t all = mem_limit();
    return all > b->bytes ? (all - b->bytes) / 2 : 0;
}

static void fail(const struct err *err)
{
    fprintf(stderr, "bench_train: %s\n", err->msg);
    exit(1);
}

/* Seconds per step by PyTorch, or 0 where there is none; *ret_rss its peak memory. */
static double torch_step(const struct synthetic_shape *s, int tokens, int threads, size_t *ret_rss)
{
    char command[512];
    double seconds = 0;
    snprintf(command, sizeof command,
             "/usr/bin/python3 tests/bench_train_torch.py %d %d %d %d %d %d %d %d %d 2>/dev/null",
             s->L, s->D, s->H, s->G, s->hd, s->F, s->V, tokens, threads);
    FILE *p = popen(command, "r");
    if (p == NULL || fscanf(p, "%lf %zu", &seconds, ret_rss) != 2)
        seconds = 0;
    if (p != NULL)
        pclose(p);
    return seconds;
}

static void bench(const struct synthetic_shape *s, int tokens, const struct compute *c, int steps)
{
    struct base *b = NULL;
    struct train_set data = one_example(tokens, s->V);
    struct train_opts o;
    struct train_estimate e;
    struct train *t;
    struct err err = { 0 };
    if (synthetic_base(s, &b, &err) != ERR_OK)
        fail(&err);
    double seconds[MAX_STEPS];
    char x[32], y[32], z[32];
    train_opts_init(&o);
    const char *keep = getenv("KEEP");
    o.max_steps = steps + 1;
    o.keep_bytes = keep != NULL && strcmp(keep, "0") == 0 ? 0 : keep_room(b);
    if (train_estimate(b, c, &o, &data, NULL, NULL, &e, &err) ||
        train_create(b, c, &o, &data, NULL, NULL, &t, &err))
        fail(&err);
    for (int i = 0; i <= steps; i++) {
        struct train_report r;
        if (train_step(t, NULL, NULL, &r, &err) != ERR_OK)
            fail(&err);
        seconds[i] = r.seconds;
    }
    qsort(seconds + 1, (size_t)steps, sizeof seconds[0], ascending);
    const double median = seconds[1 + steps / 2];
    const size_t peak = status("VmHWM:");
    printf("%-5s %d tokens, %s: %.2f s, %.1f tokens/s; peak memory %s (base %s, estimated beside it "
           "%s); estimated %.2f s\n", s->name, tokens, precision_name(c->precision), median,
           tokens / median, human_bytes(peak, x), human_bytes(b->bytes, y), human_bytes(e.bytes, z),
           e.seconds_per_step);
    fflush(stdout);
    train_destroy(t);
    synthetic_free(b);
    if (getenv("NO_TORCH") != NULL || s->D > 2048)
        return; /* 4 bytes per weight of a larger one do not fit an ordinary machine */
    size_t rss = 0;
    const double theirs = torch_step(s, tokens, pool_threads(c->pool), &rss);
    if (theirs > 0)
        printf("      PyTorch fp32: %.2f s, %.1f tokens/s, peak memory %s: %.2f times as fast in "
               "%.0f %% of the memory\n", theirs, tokens / theirs, human_bytes(rss, x),
               theirs / median, 100.0 * (double)peak / (double)rss);
    else
        printf("      PyTorch is not there (python3-torch): nothing to compare with\n");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static char usual[] = "1.1b:512", *fallback[] = { NULL, usual };
    const char *steps = getenv("STEPS"), *precision = getenv("PRECISION");
    struct compute c = { .precision = PREC_EXACT };
    struct err err = { 0 };
    int n = steps != NULL ? atoi(steps) : 2;
    n = n < 1 ? 1 : n > MAX_STEPS - 1 ? MAX_STEPS - 1 : n;
    if (isa_select("auto", &c.isa, &err) || pool_create(0, &c.pool, &err) ||
        (precision != NULL && precision_parse(precision, &c.precision, &err)))
        fail(&err);
    if (argc < 2) {
        argv = fallback;
        argc = 2;
    }
    printf("fine-tuning: rank 16, every linear layer, %s, %d threads\n", isa_name(c.isa),
           pool_threads(c.pool));
    for (int i = 1; i < argc; i++) {
        char *colon = strchr(argv[i], ':');
        const int tokens = colon != NULL ? atoi(colon + 1) : 512;
        if (colon != NULL)
            *colon = '\0';
        const struct synthetic_shape *s = synthetic_find(argv[i]);
        if (s == NULL || tokens < 2 || tokens > 4096) {
            fprintf(stderr, "bench_train: \"%s\" is no shape with 2 to 4096 tokens\n", argv[i]);
            return 2;
        }
        bench(s, tokens, &c, n);
    }
    pool_destroy(c.pool);
    return 0;
}
