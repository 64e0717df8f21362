/* support_sched.c - a scheduler with all it needs, for tests. */
#include "tests/support_sched.h"

#include "tests/support_lora.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void need(int rc, const struct err *err)
{
    if (rc == ERR_OK)
        return;
    fprintf(stderr, "support_sched: %s\n", err->msg);
    abort();
}

/* --- adapters ------------------------------------------------------------------------------ */
int rig_rank(int64_t version) { return 1 + (int)(version * 7 % 23); }

static struct adapter *make(const struct base *base, int64_t version)
{
    return support_lora(&base->arch, (enum adapter_method)(version % 3), rig_rank(version), 0.5f,
                        (uint64_t)version);
}

static int load(void *ud, int64_t version, struct adapter **spare, struct adapter **ret, struct err *err)
{
    struct rig *r = ud;
    (void)spare;
    if (r->gated)
        while (sem_wait(&r->gate) != 0 && errno == EINTR)
            ;
    if (version == r->broken)
        return err_set(err, ERR_IO, "version %lld is unreadable", (long long)version);
    *ret = make(r->base, version);
    return ERR_OK;
}

struct gen_adapter rig_adapter(const struct base *base, int64_t version, float weight)
{
    struct adapter *a = make(base, version);
    struct gen_adapter g = { .version_id = version, .bytes = a->bytes, .weight = weight };
    memcpy(g.hash, a->hash, 32);
    adapter_free(a);
    return g;
}

/* --- the rig ------------------------------------------------------------------------------- */
size_t rig_pages(const struct base *base, int pages)
{
    return (size_t)pages * kv_page_bytes(&base->arch, kv_type_default(base->is_f32));
}

void rig_open(struct rig *r, const struct base *base, int threads, enum isa isa,
              enum precision precision, size_t cache_bytes, struct sched_opts o)
{
    struct err err = { 0 };
    memset(r, 0, sizeof *r);
    r->base = base;
    r->broken = -1;
    sem_init(&r->gate, 0, 0);
    r->compute = (struct compute){ .isa = isa, .precision = precision };
    need(pool_create(threads, &r->compute.pool, &err), &err);
    if (base->tokenizer_json != NULL)
        need(tokenizer_load(base->tokenizer_json, base->tokenizer_json_len, &r->tokenizer, &err),
             &err);
    if (cache_bytes > 0)
        need(adapter_cache_create(cache_bytes, load, r, &r->cache, &err), &err);
    o.base = base;
    if (o.kv_type == KV_F16)
        o.kv_type = kv_type_default(base->is_f32);
    o.tokenizer = r->tokenizer;
    o.compute = &r->compute;
    o.adapters = r->cache;
    need(sched_create(&o, &r->sched, &err), &err);
}

void rig_close(struct rig *r)
{
    sched_destroy(r->sched);
    adapter_cache_destroy(r->cache);
    tokenizer_free(r->tokenizer);
    pool_destroy(r->compute.pool);
    sem_destroy(&r->gate);
}

/* --- requests ------------------------------------------------------------------------------ */
struct gen_request rig_request(const int32_t *prompt, int nprompt, int max_tokens)
{
    struct gen_request q = { .tenant = 1, .prompt = prompt, .nprompt = nprompt,
                             .max_tokens = max_tokens };
    sample_defaults(&q.sample);
    q.sample.temperature = 0;
    return q;
}

struct gen *rig_submit(struct rig *r, const struct gen_request *q)
{
    struct err err = { 0 };
    struct gen *g = NULL;
    need(sched_submit(r->sched, q, &g, &err), &err);
    return g;
}

struct result rig_finish(struct gen *g)
{
    struct result r = { .finish = GEN_RUNNING };
    size_t cap = 0;
    buf_init(&r.text, 1 << 20);
    while (r.finish == GEN_RUNNING) {
        gen_wait(g, r.n);
        if (r.n + 16 > cap) {
            cap = 2 * cap + 64;
            r.tokens = realloc(r.tokens, cap * sizeof *r.tokens);
            if (r.tokens == NULL)
                abort();
        }
        r.n += gen_read(g, r.n, r.tokens + r.n, cap - r.n, r.text.len, &r.text, &r.finish);
    }
    gen_usage(g, &r.usage);
    gen_error(g, &r.err);
    gen_release(g);
    return r;
}

struct result rig_run(struct rig *r, const struct gen_request *q)
{
    return rig_finish(rig_submit(r, q));
}

void result_free(struct result *r)
{
    free(r->tokens);
    buf_free(&r->text);
}

static bool token_equal(const struct gen_token *a, const struct gen_token *b)
{
    bool same = a->token == b->token && memcmp(&a->logprob, &b->logprob, 4) == 0 &&
                a->prompt == b->prompt && a->text_begin == b->text_begin &&
                a->text_end == b->text_end && a->ntop == b->ntop;
    for (int i = 0; same && i < a->ntop; i++)
        same = a->top[i].token == b->top[i].token &&
               memcmp(&a->top[i].logprob, &b->top[i].logprob, 4) == 0;
    return same;
}

bool result_equal(const struct result *a, const struct result *b)
{
    size_t n = a->n < b->n ? a->n : b->n;
    for (size_t i = 0; i < n; i++)
        if (!token_equal(&a->tokens[i], &b->tokens[i])) {
            printf("token %zu differs: %d (%a) and %d (%a)\n", i, a->tokens[i].token,
                   (double)a->tokens[i].logprob, b->tokens[i].token,
                   (double)b->tokens[i].logprob);
            return false;
        }
    if (a->n != b->n || a->finish != b->finish) {
        printf("%zu tokens, reason %d and %zu tokens, reason %d\n", a->n, (int)a->finish, b->n,
               (int)b->finish);
        return false;
    }
    if (a->text.len != b->text.len ||
        (a->text.len > 0 && memcmp(a->text.data, b->text.data, a->text.len) != 0)) {
        printf("text differs: \"%s\" and \"%s\"\n", a->text.data, b->text.data);
        return false;
    }
    return true;
}
