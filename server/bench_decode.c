/* bench_decode.c - tokens per second of the bare base: sequences being continued, and prompts. */
#include "server/bench_parts.h"

#include <stdio.h>

static const int batches[] = { 1, 2, 4, 8, 16, 32 }, prompts[] = { 128, 512 };
enum { NBATCHES = sizeof batches / sizeof batches[0], NPROMPTS = sizeof prompts / sizeof prompts[0] };

/* One row: a batch of sequences, or a prompt. */
struct pass {
    struct bench_model *m;
    enum precision precision;
    int n;
    bool prompt;
};

static void run_pass(void *arg)
{
    const struct pass *p = arg;
    if (p->prompt)
        bench_model_prompt(p->m, p->precision, p->n);
    else
        bench_model_step(p->m, p->precision, p->n, NULL);
}

static int tokens_per_second(void *arg, double *ret, struct err *err)
{
    const struct pass *p = arg;
    (void)err;
    *ret = p->n / bench_time(p->m->b, run_pass, arg);
    return ERR_OK;
}

/* All rows of a shape in turn, the reading of memory among them. */
enum { MAX_PASSES = 2 * NBATCHES };

static int report(struct bench_model *m, const struct pass *p, const struct bench_series *s, int n,
                  const struct bench_series *read, struct err *err)
{
    struct bench *b = m->b;
    const char *shape = m->shape->name;
    int rc = ERR_OK;
    for (int i = 0; i < n && rc == ERR_OK; i++) {
        const char *precision = precision_name(p[i].precision);
        if (p[i].prompt) {
            rc = bench_row(b, &s[i], NULL, 0, err, "prompt.%s.%s.t%d", shape, precision, p[i].n);
            continue;
        }
        const struct bench_series *one = &s[i - i % NBATCHES]; /* the first of this precision */
        rc = bench_row(b, &s[i], one == &s[i] ? NULL : one, 1, err, "decode.%s.%s.b%d", shape, precision,
                       p[i].n);
        if (rc == ERR_OK && p[i].n == 1) {
            const struct bench_series bytes =
                bench_scaled(&s[i], "GB/s", 1e-9 * (double)(m->read_bytes + m->kv_bytes));
            rc = bench_row(b, &bytes, read, 1, err, "decode.%s.%s.b1.read", shape, precision);
        }
    }
    return rc;
}

static int run_shape(struct bench *b, const char *shape, bool prompt, struct err *err)
{
    struct bench_model m;
    struct bench_reader r = { .regions = NULL };
    struct pass passes[MAX_PASSES];
    struct bench_series s[MAX_PASSES + 1];
    char id[BENCH_ID_MAX];
    int n = 0;
    snprintf(id, sizeof id, "%s.%s", b->part, shape);
    if (!bench_room(b, id, bench_model_bytes(synthetic_find(shape))))
        return ERR_OK;
    int rc = bench_model_open(b, shape, &m, err);
    if (rc != ERR_OK)
        return rc;
    for (int p = PREC_FAST; p <= PREC_EXACT; p++)
        for (int i = 0; b->precisions[p] && i < (prompt ? NPROMPTS : NBATCHES); i++, n++) {
            passes[n] = (struct pass){ &m, (enum precision)p, prompt ? prompts[i] : batches[i], prompt };
            s[n] = (struct bench_series){ .name = prompt ? "tokens/s, first length" : "tokens/s, batch 1",
                                          .unit = "tokens/s", .measure = tokens_per_second,
                                          .arg = &passes[n] };
        }
    rc = bench_reader_of_base(b, m.base, &r, err);
    s[n] = bench_reader_series(&r);
    if (rc == ERR_OK)
        rc = bench_measure(b, s, prompt ? n : n + 1, err);
    if (rc == ERR_OK)
        rc = report(&m, passes, s, n, &s[n], err);
    bench_reader_close(&r);
    bench_model_close(&m);
    return rc;
}

static int run(struct bench *b, bool prompt, struct err *err)
{
    int rc = ERR_OK;
    for (int i = 0; i < b->nshapes && rc == ERR_OK; i++)
        rc = run_shape(b, b->shapes[i], prompt, err);
    return rc;
}

static int run_decode(struct bench *b, struct err *err) { return run(b, false, err); }
static int run_prompt(struct bench *b, struct err *err) { return run(b, true, err); }

const struct bench_part bench_decode = { "decode", "tokens/s of 1 to 32 sequences being continued, without "
                                         "adapters", run_decode };
const struct bench_part bench_prompt = { "prompt", "tokens/s of prompts of 128 and 512 tokens", run_prompt };
