/* support_sched.h - a base, threads, an adapter cache and a scheduler for tests, and the whole
 * result of a generation in one struct.  Failures abort or fail the test. */
#ifndef TESTS_SUPPORT_SCHED_H
#define TESTS_SUPPORT_SCHED_H

#include "engine/sched.h"

#include <semaphore.h>
#include <stdatomic.h>

/* Adapter version v: random, of method v % 3 and of rank rig_rank(v). */
int rig_rank(int64_t version);

struct rig {
    const struct base *base; /* borrowed */
    struct tokenizer *tokenizer;
    struct compute compute;
    struct adapter_cache *cache;
    struct sched *sched;
    /* The loader waits at `gate` before each load while `gated`. */
    sem_t gate;
    _Atomic bool gated;
    _Atomic int64_t broken; /* this version cannot be loaded */
};

/* threads, isa and the options that matter; base, tokenizer, compute and cache are filled in.
 * `cache_bytes` 0: no cache. */
void rig_open(struct rig *r, const struct base *base, int threads, enum isa isa,
              enum precision precision, size_t cache_bytes, struct sched_opts o);
void rig_close(struct rig *r);
size_t rig_pages(const struct base *base, int pages); /* kv_bytes for so many pages */
/* What a request for `version` says. */
struct gen_adapter rig_adapter(const struct base *base, int64_t version, float weight);

/* Defaults: greedy, no adapters. */
struct gen_request rig_request(const int32_t *prompt, int nprompt, int max_tokens);
struct gen *rig_submit(struct rig *r, const struct gen_request *q);

struct result {
    struct gen_token *tokens;
    size_t n;
    struct buf text;
    enum gen_finish finish;
    struct gen_usage usage;
    struct err err;
};
/* Read to the end and release. */
struct result rig_finish(struct gen *g);
struct result rig_run(struct rig *r, const struct gen_request *q);
void result_free(struct result *r);
/* Same tokens, log-probabilities, alternatives, text, ranges and reason, to the bit; if not, says
 * where. */
bool result_equal(const struct result *a, const struct result *b);

#endif
