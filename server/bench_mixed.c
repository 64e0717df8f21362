/* bench_mixed.c - one step of 16 sequences that use none, one, or several adapters: what adapters
 * cost beside the bare base.
 *
 * Adapters are bf16 on every linear layer.  They all hold the same small numbers, each in memory of its
 * own, so that the reading is as with different ones. */
#include "server/bench_parts.h"

#include "engine/adapter.h"

#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 16 };
static const int ranks[] = { 8, 16, 64 }, counts[] = { 0, 1, 4, 8, 16 };
enum { NRANKS = sizeof ranks / sizeof ranks[0], NCOUNTS = sizeof counts / sizeof counts[0] };

struct adapters {
    struct adapter *a[BATCH];
};

/* BATCH adapters of rank r for the model. */
static int make_adapters(const struct bench_model *m, int r, struct adapters *ret, struct err *err)
{
    const struct arch *a = &m->base->arch;
    const size_t widest = (size_t)r * (size_t)(a->F > a->D ? a->F : a->D);
    struct adapter_src_module *mods = calloc((size_t)a->L * MOD_COUNT, sizeof *mods);
    uint16_t *numbers = malloc(widest * sizeof *numbers);
    struct adapter_src src = { .modules = mods, .rank_max = r, .rank_min = r };
    int rc = mods != NULL && numbers != NULL ? ERR_OK : err_nomem(err);
    for (size_t i = 0; i < widest && rc == ERR_OK; i++)
        numbers[i] = (uint16_t)(0x3c00 | (i * 40503u & 0x807f)); /* around +-0.01 */
    for (int l = 0; l < a->L && rc == ERR_OK; l++)
        for (int mod = 0; mod < MOD_COUNT; mod++)
            if (arch_has_module(a, (enum module)mod))
                mods[src.nmodules++] = (struct adapter_src_module){
                    .layer = l, .module = (enum module)mod, .rank = r, .init_rank = r, .scaling = 1,
                    .in = arch_in(a, (enum module)mod), .out = arch_out(a, (enum module)mod),
                    .dtype = DT_BF16, .A = numbers, .B = numbers,
                };
    for (int i = 0; i < BATCH && rc == ERR_OK; i++) {
        src.hash[0] = (uint8_t)(i + 1);
        rc = adapter_build(a, &src, 0, NULL, &ret->a[i], err);
    }
    free(numbers);
    free(mods);
    return rc;
}

static void free_adapters(struct adapters *a)
{
    for (int i = 0; i < BATCH; i++)
        adapter_free(a->a[i]);
}

/* --- steps ------------------------------------------------------------------------------------------ */
struct step {
    struct bench_model *m;
    enum precision precision;
    int count; /* different adapters; neighbours share one */
    struct lora_set sets[BATCH];
};

static void run_step(void *arg)
{
    const struct step *s = arg;
    bench_model_step(s->m, s->precision, BATCH, s->sets);
}

static int tokens_per_second(void *arg, double *ret, struct err *err)
{
    const struct step *s = arg;
    (void)err;
    *ret = BATCH / bench_time(s->m->b, run_step, arg);
    return ERR_OK;
}

static void make_steps(struct bench_model *m, enum precision p, const struct adapters *a,
                       struct step steps[NCOUNTS], struct bench_series *series)
{
    for (int i = 0; i < NCOUNTS; i++) {
        struct step *s = &steps[i];
        *s = (struct step){ .m = m, .precision = p, .count = counts[i] };
        for (int row = 0; row < BATCH && s->count > 0; row++)
            s->sets[row] = (struct lora_set){ 1, { { a->a[row * s->count / BATCH], 1 } } };
        series[i] = (struct bench_series){ .name = "tokens/s without", .unit = "tokens/s",
                                           .measure = tokens_per_second, .arg = s };
    }
}

static int report(struct bench_model *m, const struct step *steps, const struct bench_series *s, int rank,
                  const struct bench_series *read, size_t adapter_bytes, struct err *err)
{
    struct bench *b = m->b;
    const char *precision = precision_name(steps[0].precision);
    int rc = ERR_OK;
    for (int i = 0; i < NCOUNTS && rc == ERR_OK; i++) {
        rc = bench_row(b, &s[i], i == 0 ? NULL : &s[0], 1, err, "mixed.%s.%s.r%d.a%d", m->shape->name,
                       precision, rank, counts[i]);
        if (rc != ERR_OK || (counts[i] != 0 && counts[i] != BATCH))
            continue;
        const size_t bytes = m->read_bytes + BATCH * m->kv_bytes + (size_t)counts[i] * adapter_bytes;
        const struct bench_series rate = bench_scaled(&s[i], "GB/s", 1e-9 * (double)bytes / BATCH);
        rc = bench_row(b, &rate, read, 1, err, "mixed.%s.%s.r%d.a%d.read", m->shape->name, precision, rank,
                       counts[i]);
    }
    return rc;
}

static int run_rank(struct bench_model *m, int rank, struct bench_reader *reader, struct err *err)
{
    struct bench *b = m->b;
    struct adapters a = { { NULL } };
    struct step steps[2][NCOUNTS];
    struct bench_series s[2 * NCOUNTS + 1];
    int n = 0;
    int rc = make_adapters(m, rank, &a, err);
    s[n++] = bench_reader_series(reader);
    for (int p = PREC_FAST; p <= PREC_EXACT && rc == ERR_OK; p++)
        if (b->precisions[p]) {
            make_steps(m, (enum precision)p, &a, steps[(n - 1) / NCOUNTS], &s[n]);
            n += NCOUNTS;
        }
    if (rc == ERR_OK)
        rc = bench_measure(b, s, n, err);
    for (int i = 1; i < n && rc == ERR_OK; i += NCOUNTS)
        rc = report(m, steps[(i - 1) / NCOUNTS], &s[i], rank, &s[0], a.a[0]->bytes, err);
    free_adapters(&a);
    return rc;
}

/* Numbers in one adapter of that rank, in bf16. */
static size_t adapter_bytes(const struct synthetic_shape *s, int rank)
{
    const size_t D = (size_t)s->D, q = (size_t)s->H * (size_t)s->hd, kv = (size_t)s->G * (size_t)s->hd;
    return 2 * (size_t)rank * (size_t)s->L * (2 * (D + q) + 2 * (D + kv) + 3 * (D + (size_t)s->F));
}

static int run_shape(struct bench *b, const char *shape, struct bench_reader *reader, struct err *err)
{
    const struct synthetic_shape *s = synthetic_find(shape);
    struct bench_model m;
    char id[BENCH_ID_MAX];
    snprintf(id, sizeof id, "mixed.%s", shape);
    if (!bench_room(b, id, bench_model_bytes(s)))
        return ERR_OK;
    int rc = bench_model_open(b, shape, &m, err);
    if (rc != ERR_OK)
        return rc;
    for (int i = 0; i < NRANKS && rc == ERR_OK; i++) {
        snprintf(id, sizeof id, "mixed.%s.r%d", shape, ranks[i]);
        if (bench_room(b, id, BATCH * adapter_bytes(s, ranks[i])))
            rc = run_rank(&m, ranks[i], reader, err);
    }
    bench_model_close(&m);
    return rc;
}

static int run(struct bench *b, struct err *err)
{
    struct bench_reader reader;
    int rc = bench_reader_open(b, false, false, &reader, err);
    if (rc != ERR_OK)
        return rc;
    for (int i = 0; i < b->nshapes && rc == ERR_OK; i++)
        rc = run_shape(b, b->shapes[i], &reader, err);
    bench_reader_close(&reader);
    return rc;
}

const struct bench_part bench_mixed = { "mixed", "16 sequences with 0 to 16 different adapters of rank 8, 16, "
                                        "64: share of the bare base's tokens/s", run };
