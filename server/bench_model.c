/* bench_model.c - a synthetic model in the middle of serving: sequences with a past, a workspace. */
#include "server/bench_parts.h"

#include <string.h>

/* Pages of small fp16 numbers; a cache that was never written would be one page of zeros. */
static void fill_pages(const struct bench_model *m, const struct kv_seq *s)
{
    const struct arch *a = &m->base->arch;
    const size_t block = KV_PAGE * (size_t)a->hd * sizeof(uint16_t);
    for (int p = 0; p < s->npages; p++)
        for (int l = 0; l < a->L; l++)
            for (int g = 0; g < a->G; g++) {
                memset(kv_k(m->kv, s->pages[p], l, g), 0x2c, block); /* 0.065 */
                memset(kv_v(m->kv, s->pages[p], l, g), 0x2c, block);
            }
}

static int open_seq(struct bench_model *m, int i, int len, int reserve, struct kv_seq *s, struct err *err)
{
    const uint8_t seed[32] = { (uint8_t)(i + 1) };
    const int32_t first = 7;
    int32_t tokens[BENCH_CONTEXT];
    int rc = kv_open(m->kv, seed, &first, 1, s, err);
    if (rc != ERR_OK)
        return rc;
    if (!kv_reserve(m->kv, s, reserve))
        return err_set(err, ERR_INTERNAL, "the cache of a synthetic model has too few pages");
    fill_pages(m, s);
    for (int k = 0; k < BENCH_CONTEXT; k++)
        tokens[k] = 7;
    if (len > 0)
        kv_commit(m->kv, s, tokens, len);
    return ERR_OK;
}

static int open_seqs(struct bench_model *m, struct err *err)
{
    const struct arch *a = &m->base->arch;
    const int pages = BENCH_BATCH_MAX * kv_pages_for(BENCH_CONTEXT + 1) + kv_pages_for(BENCH_PROMPT_MAX);
    int rc = kv_create(a, KV_F16, (size_t)pages * kv_page_bytes(a, KV_F16), &m->kv, err);
    for (int i = 0; i < BENCH_BATCH_MAX && rc == ERR_OK; i++)
        rc = open_seq(m, i, BENCH_CONTEXT, BENCH_CONTEXT + 1, &m->seqs[i], err);
    return rc == ERR_OK ? open_seq(m, BENCH_BATCH_MAX, 0, BENCH_PROMPT_MAX, &m->fresh, err) : rc;
}

size_t bench_model_bytes(const struct synthetic_shape *s)
{
    const size_t kv = (size_t)(BENCH_BATCH_MAX * 2 * BENCH_CONTEXT + BENCH_PROMPT_MAX) * (size_t)s->L *
                      (size_t)s->G * (size_t)s->hd * 4;
    const size_t rows = (size_t)BENCH_PROMPT_MAX * (size_t)(8 * s->D + 4 * s->F) * 4;
    return synthetic_bytes(s) + kv + rows + (size_t)BENCH_BATCH_MAX * (size_t)s->V * 4;
}

int bench_model_open(struct bench *b, const char *shape, struct bench_model *ret, struct err *err)
{
    struct bench_model *m = ret;
    *m = (struct bench_model){ .b = b, .shape = synthetic_find(shape), .compute = b->compute };
    int rc = synthetic_base(m->shape, &m->base, err);
    if (rc == ERR_OK)
        rc = open_seqs(m, err);
    if (rc == ERR_OK)
        rc = forward_create(m->base, &m->compute, m->kv, BENCH_PROMPT_MAX, BENCH_PROMPT_MAX, BENCH_BATCH_MAX,
                            &m->forward, err);
    if (rc != ERR_OK) {
        bench_model_close(m);
        return rc;
    }
    /* Of the embedding a step reads a few rows. */
    const struct arch *a = &m->base->arch;
    m->read_bytes = m->base->bytes - (size_t)a->V * (size_t)a->D * 2;
    m->kv_bytes = (size_t)kv_pages_for(BENCH_CONTEXT + 1) * kv_page_bytes(a, KV_F16);
    return ERR_OK;
}

void bench_model_close(struct bench_model *m)
{
    forward_destroy(m->forward);
    if (m->kv != NULL) {
        for (int i = 0; i < BENCH_BATCH_MAX; i++)
            kv_close(m->kv, &m->seqs[i]);
        kv_close(m->kv, &m->fresh);
    }
    kv_destroy(m->kv);
    synthetic_free(m->base);
    memset(m, 0, sizeof *m);
}

void bench_model_step(struct bench_model *m, enum precision p, int batch, const struct lora_set *sets)
{
    static const struct lora_set none;
    static const int32_t token = 7;
    struct span spans[BENCH_BATCH_MAX];
    for (int i = 0; i < batch; i++)
        spans[i] = (struct span){ &m->seqs[i], BENCH_CONTEXT, 1, &token, sets != NULL ? &sets[i] : &none, 1 };
    m->compute.precision = p;
    forward_run(m->forward, spans, batch);
}

void bench_model_prompt(struct bench_model *m, enum precision p, int n)
{
    static const struct lora_set none;
    int32_t tokens[BENCH_PROMPT_MAX];
    for (int i = 0; i < n; i++)
        tokens[i] = (int32_t)((unsigned)i * 2654435761u % (unsigned)m->shape->V);
    const struct span span = { &m->fresh, 0, n, tokens, &none, 1 };
    m->compute.precision = p;
    forward_run(m->forward, &span, 1);
}
