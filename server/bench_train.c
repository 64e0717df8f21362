/* bench_train.c - one QLoRA step: rank 16 on every linear layer, AdamW, 512 tokens, in exact precision
 * as `lorad train` does; with the values that fit kept for the way back, and with none. */
#include "server/bench_parts.h"

#include "engine/mem.h"
#include "engine/train.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Peak memory is that of so many steps, as tests/bench_train_torch.py takes PyTorch's. */
enum { TOKENS = 512, TOKENS_QUICK = 64, MEMORY_STEPS = 2 };

struct learner {
    struct train_set data;
    struct train_example example;
    struct train *train;
    int tokens;
};

static int step(void *arg, double *ret, struct err *err)
{
    const struct learner *l = arg;
    struct train_report r;
    int rc = train_step(l->train, NULL, NULL, &r, err);
    *ret = rc == ERR_OK ? l->tokens / r.seconds : 0;
    return rc;
}

static void close_learner(struct learner *l)
{
    train_destroy(l->train);
    free((void *)l->example.tokens);
    free((void *)l->example.learn);
    *l = (struct learner){ 0 };
}

/* One example of arbitrary tokens, learned whole. */
static int open_learner(struct bench *b, const struct base *base, size_t keep, struct learner *l, struct err *err)
{
    struct train_opts o;
    l->tokens = b->quick ? TOKENS_QUICK : TOKENS;
    int32_t *ids = malloc((size_t)l->tokens * sizeof *ids);
    uint8_t *learn = malloc((size_t)l->tokens);
    l->example = (struct train_example){ ids, learn, l->tokens };
    if (ids == NULL || learn == NULL)
        return err_nomem(err);
    for (int i = 0; i < l->tokens; i++) {
        ids[i] = (int32_t)((unsigned)i * 2654435761u % (unsigned)base->arch.V);
        learn[i] = i > 0;
    }
    l->data = (struct train_set){ .n = 1, .examples = &l->example, .tokens = (uint64_t)l->tokens,
                                  .targets = (uint64_t)l->tokens - 1 };
    train_opts_init(&o);
    o.max_steps = MEMORY_STEPS + 1 + BENCH_ROUNDS_MAX;
    o.keep_bytes = keep;
    return train_create(base, &b->compute, &o, &l->data, NULL, NULL, &l->train, err);
}

/* --- memory ------------------------------------------------------------------------------------------ */
/* Forget the largest resident size so far; false: the kernel does not let us. */
static bool peak_reset(void)
{
    FILE *f = fopen("/proc/self/clear_refs", "w");
    if (f == NULL)
        return false;
    const bool written = fputs("5", f) != EOF;
    return fclose(f) == 0 && written;
}

/* VmHWM in bytes; 0: not known. */
static size_t peak(void)
{
    char line[256];
    size_t kib = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (strncmp(line, "VmHWM:", 6) == 0)
            kib = strtoull(line + 6, NULL, 10);
    if (f != NULL)
        fclose(f);
    return kib << 10;
}

/* Half of what the base leaves, as `lorad train` allows itself. */
static size_t keep_room(void)
{
    const size_t limit = mem_limit(), resident = mem_resident(), left = limit > resident ? limit - resident : 0;
    const size_t now = bench_memory_free();
    return (left < now ? left : now) / 2;
}

/* --- a shape ------------------------------------------------------------------------------------------ */
static int measure(struct bench *b, const char *shape, struct base *base, struct err *err)
{
    struct learner kept = { 0 }, again = { 0 };
    const char *precision = precision_name(b->compute.precision);
    const bool known = peak_reset();
    double ignored;
    char id[BENCH_ID_MAX];
    snprintf(id, sizeof id, "train.%s.memory", shape);
    int rc = open_learner(b, base, keep_room(), &kept, err);
    for (int i = 0; i < MEMORY_STEPS && rc == ERR_OK; i++)
        rc = step(&kept, &ignored, err);
    const size_t memory = known ? peak() : 0;
    if (rc == ERR_OK)
        rc = open_learner(b, base, 0, &again, err);
    struct bench_series s[] = {
        { .name = "tokens/s, values kept", .unit = "tokens/s", .measure = step, .arg = &kept },
        { .name = "tokens/s, nothing kept", .unit = "tokens/s", .measure = step, .arg = &again },
    };
    if (rc == ERR_OK)
        rc = bench_measure(b, s, 2, err);
    if (rc == ERR_OK)
        rc = bench_row(b, &s[0], NULL, 0, err, "train.%s.%s", shape, precision);
    if (rc == ERR_OK)
        rc = bench_row(b, &s[1], &s[0], 1, err, "train.%s.%s.keep0", shape, precision);
    if (rc == ERR_OK && memory > 0)
        rc = bench_number(b, (double)memory / (double)(1 << 20), "MiB", NULL, err, "%s", id);
    if (rc == ERR_OK && memory == 0)
        bench_skip(b, id, "the kernel does not reset the peak of resident memory");
    close_learner(&kept);
    close_learner(&again);
    return rc;
}

static int run(struct bench *b, struct err *err)
{
    const enum precision was = b->compute.precision;
    int rc = ERR_OK;
    b->compute.precision = b->precisions[PREC_EXACT] ? PREC_EXACT : PREC_FAST;
    for (int i = 0; i < b->nshapes && rc == ERR_OK; i++) {
        const struct synthetic_shape *s = synthetic_find(b->shapes[i]);
        struct base *base = NULL;
        char id[BENCH_ID_MAX];
        snprintf(id, sizeof id, "train.%s", s->name);
        if (!bench_room(b, id, 3 * synthetic_bytes(s)))
            continue;
        rc = synthetic_base(s, &base, err);
        if (rc == ERR_OK)
            rc = measure(b, s->name, base, err);
        synthetic_free(base);
    }
    b->compute.precision = was;
    return rc;
}

const struct bench_part bench_train = { "train", "a fine-tuning step of 512 tokens: QLoRA of rank 16, every "
                                        "linear layer", run };
