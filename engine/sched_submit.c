/* sched_submit.c - requests coming in, figures going out: what other threads call. */
#include "engine/sched_int.h"

#include <math.h>

/* --- checks -------------------------------------------------------------------------------- */
static int check_prompt(const struct sched *s, const struct gen_request *r, struct err *err)
{
    if (r->nprompt < 1)
        return err_set_slug(err, ERR_INVALID, "invalid_value", "prompt",
                            "the prompt has no tokens: give at least one");
    if (r->nprompt >= s->max_context)
        return err_set_slug(err, ERR_INVALID, "context_length_exceeded", "prompt",
                            "the prompt has %d tokens, but the context holds %d tokens including "
                            "at least one of output", r->nprompt, s->max_context);
    for (int i = 0; i < r->nprompt; i++)
        if (r->prompt[i] < 0 || r->prompt[i] >= s->base->arch.V)
            return err_set_slug(err, ERR_INVALID, "invalid_value", "prompt",
                                "token %d of the prompt is %d, but tokens run from 0 to %d", i,
                                (int)r->prompt[i], s->base->arch.V - 1);
    if (r->max_tokens < 1)
        return err_set_slug(err, ERR_INVALID, "invalid_value", "max_tokens",
                            "max_tokens must be at least 1, not %d", r->max_tokens);
    return ERR_OK;
}

static int check_adapters(const struct sched *s, const struct gen_request *r, struct err *err)
{
    size_t bytes = 0;
    if (r->nadapters < 0 || r->nadapters > LORA_SET_MAX)
        return err_set_slug(err, ERR_INVALID, "invalid_value", "adapters",
                            "%d adapters are asked for, at most %d can be combined", r->nadapters,
                            LORA_SET_MAX);
    for (int i = 0; i < r->nadapters; i++) {
        const struct gen_adapter *a = &r->adapters[i];
        if (!isfinite(a->weight))
            return err_set_slug(err, ERR_INVALID, "invalid_value", "adapters",
                                "the weight of adapter %d is not a finite number", i + 1);
        if (a->resident != NULL)
            continue;
        if (s->adapters == NULL)
            return err_set(err, ERR_INVALID, "this engine has no adapter cache");
        bytes = a->bytes > SIZE_MAX - bytes ? SIZE_MAX : bytes + a->bytes;
    }
    if (bytes > 0 && bytes > adapter_cache_budget(s->adapters)) {
        char need[32], have[32];
        return err_set_slug(err, ERR_INVALID, "adapter_too_large", "adapters",
                            "the request's adapters take %s in memory, but the adapter cache is "
                            "limited to %s", human_bytes(bytes, need),
                            human_bytes(adapter_cache_budget(s->adapters), have));
    }
    return ERR_OK;
}

static int check(const struct sched *s, const struct gen_request *r, struct err *err)
{
    if (r->nstop < 0 || r->nstop > GEN_STOP_MAX)
        return err_set_slug(err, ERR_INVALID, "invalid_value", "stop",
                            "%d stop strings are given, at most %d are allowed", r->nstop,
                            GEN_STOP_MAX);
    if (r->nstop > 0 && s->tokenizer == NULL)
        return err_set_slug(err, ERR_INVALID, "invalid_value", "stop",
                            "stop strings need a tokenizer, and this base has none");
    int rc = check_prompt(s, r, err);
    if (rc == ERR_OK)
        rc = check_adapters(s, r, err);
    return rc != ERR_OK ? rc : sample_check(&r->sample, s->base->arch.V, err);
}

/* --- submitting ---------------------------------------------------------------------------- */
/* The lock is held. */
static int enqueue(struct sched *s, struct gen *g, struct err *err)
{
    if (s->draining)
        return err_set_slug(err, ERR_UNAVAILABLE, "shutting_down", NULL,
                            "the server is shutting down");
    if (s->queued >= s->max_queue)
        return err_set_slug(err, ERR_BUSY, "queue_full", NULL,
                            "%d requests are waiting already: try again later", s->queued);
    g->number = ++s->last_number;
    g->refs = 2;
    list_insert(&s->inbox, g);
    s->active++;
    s->queued++;
    s->poked = true;
    pthread_cond_signal(&s->work);
    return ERR_OK;
}

/* The engine thread looks at new requests between two steps only; a cold adapter is read meanwhile. */
static void expect_adapters(struct sched *s, const struct gen_request *r)
{
    for (int i = 0; i < r->nadapters; i++) {
        const struct gen_adapter *a = &r->adapters[i];
        if (a->resident == NULL)
            adapter_cache_expect(s->adapters, a->hash, a->version_id, a->bytes);
    }
}

int sched_submit(struct sched *s, const struct gen_request *r, struct gen **ret, struct err *err)
{
    struct gen *g = NULL;
    int rc = check(s, r, err);
    if (rc == ERR_OK)
        rc = gen_create(s, r, &g, err);
    if (rc == ERR_OK) {
        pthread_mutex_lock(&s->lock);
        rc = enqueue(s, g, err);
        const int queued = s->queued;
        pthread_mutex_unlock(&s->lock);
        if (rc != ERR_OK)
            gen_unref(g);
        else if (queued <= SCHED_LOOKAHEAD)
            expect_adapters(s, r);
    }
    if (rc != ERR_OK) {
        atomic_fetch_add(&s->rejected, 1);
        return rc;
    }
    *ret = g;
    return ERR_OK;
}

/* --- figures and orders -------------------------------------------------------------------- */
void sched_stats(struct sched *s, struct sched_stats *ret)
{
    pthread_mutex_lock(&s->lock);
    int inbox = s->inbox.n;
    pthread_mutex_unlock(&s->lock);
    *ret = (struct sched_stats){
        .running = atomic_load(&s->nrunning),
        .waiting = inbox + atomic_load(&s->nwaiting),
        .max_seqs = s->max_seqs,
        .steps = atomic_load(&s->steps),
        .rows = atomic_load(&s->rows),
        .prompt_tokens = atomic_load(&s->prompt_tokens),
        .generated_tokens = atomic_load(&s->generated_tokens),
        .finished = atomic_load(&s->finished),
        .cancelled = atomic_load(&s->cancelled),
        .preempted = atomic_load(&s->preempted),
        .rejected = atomic_load(&s->rejected),
        .guessed = atomic_load(&s->guessed),
        .guessed_right = atomic_load(&s->guessed_right),
    };
    kv_stats(s->kv, &ret->kv);
    histogram_read(&s->step, &ret->step);
    histogram_read(&s->between, &ret->between);
    histogram_read(&s->gap, &ret->gap);
    histogram_read(&s->running_gap, &ret->running_gap);
    ret->decode_step_max = (double)atomic_load(&s->decode_step_max_ns) / 1e9;
}

void sched_forget(struct sched *s)
{
    pthread_mutex_lock(&s->lock);
    s->forget++;
    s->poked = true;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
}

void sched_preempt_one(struct sched *s)
{
    pthread_mutex_lock(&s->lock);
    s->preempt++;
    s->poked = true;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
}
