/* sched_admit.c - who runs, who waits, and what each gets of the next step.
 *
 * Admission goes through `waiting` in order of arrival.  It needs
 *   adapters  a generation whose adapters are still being loaded is overtaken by the others;
 *   a seat    at most max_seqs run;
 *   pages     for everything known of the sequence, plus one for its own growth and one for each
 *             that runs already, so that it is not preempted at once.  Here nobody overtakes, or
 *             long prompts would wait for ever.
 *
 * Adapters are pinned when they are ready, while the generation still waits for a seat.  Pins of
 * those that wait could keep each other from ever getting all they need, so when a generation
 * finds no room in the adapter cache and nothing runs (or it has been so for PATIENCE seconds),
 * everyone who came later gives up adapters and waits behind it.
 *
 * Pages run out only when running sequences grow.  Then the youngest is preempted. */
#include "engine/sched_int.h"

#include <string.h>

#define PATIENCE 1.0  /* seconds */
#define GIVE_UP 30.0  /* seconds without room although nothing runs */

/* --- adapters ------------------------------------------------------------------------------ */
void sched_drop_adapters(struct sched *s, struct gen *g)
{
    for (int i = 0; i < g->nadapters; i++) {
        if (g->pinned[i] != NULL)
            adapter_cache_release(s->adapters, g->pinned[i]);
        g->pinned[i] = NULL;
        if (g->tickets[i] != 0)
            adapter_cache_abandon(s->adapters, g->adapters[i].hash, &g->tickets[i]);
    }
    g->no_room_since = 0;
}

/* Pin what is there and ask for the rest: the worst state of all. */
static enum adapter_state take_adapters(struct sched *s, struct gen *g, struct err *err)
{
    enum adapter_state worst = ADAPTER_READY;
    for (int i = 0; i < g->nadapters; i++) {
        const struct gen_adapter *a = &g->adapters[i];
        if (a->resident != NULL || g->pinned[i] != NULL)
            continue;
        enum adapter_state st = adapter_cache_acquire(s->adapters, a->hash, a->version_id, a->bytes,
                                                      &g->tickets[i], &g->pinned[i], err);
        worst = st > worst ? st : worst;
    }
    if (worst != ADAPTER_NO_ROOM)
        g->no_room_since = 0;
    else if (g->no_room_since == 0)
        g->no_room_since = now_mono();
    return worst;
}

/* All are pinned: the set, or why there is none of them. */
static bool set_lora(struct gen *g, struct err *err)
{
    g->lora.n = g->nadapters;
    for (int i = 0; i < g->nadapters; i++) {
        const struct gen_adapter *a = &g->adapters[i];
        g->lora.item[i].adapter = a->resident != NULL ? a->resident : g->pinned[i];
        g->lora.item[i].weight = a->weight;
    }
    lora_set_sort(&g->lora);
    return lora_set_check(&g->lora, err) == ERR_OK;
}

bool sched_room_wanted(const struct sched *s)
{
    for (const struct gen *g = s->waiting.first; g != NULL; g = g->next)
        if (g->no_room_since != 0)
            return true;
    return false;
}

/* --- pages --------------------------------------------------------------------------------- */
/* Tokens whose shared pages may be attached.  A prompt that is echoed needs the logits of every
 * position that was not reported yet, so those are computed even if their pages exist. */
static int shareable(const struct gen *g)
{
    if (!g->echo || g->echoed >= g->nprompt)
        return g->ntokens;
    return g->echoed > 1 ? g->echoed : 1;
}

/* Attach and reserve pages for all tokens; false when there are not enough. */
static bool take_pages(struct sched *s, struct gen *g)
{
    const bool alone = s->running.n == 0;
    if (!alone && kv_available(s->kv) < g->pages_wanted)
        return false;
    lora_set_seed(&g->lora, g->tenant, s->base->hash, g->seed);
    if (kv_open(s->kv, g->seed, g->tokens, shareable(g), &g->kv, NULL) != ERR_OK)
        return false;
    int limit = g->nprompt + g->max_tokens;
    int len = alone ? g->ntokens : g->ntokens + KV_PAGE < limit ? g->ntokens + KV_PAGE : limit;
    int missing = kv_pages_for(len) - g->kv.npages + s->running.n - kv_available(s->kv);
    if (missing <= 0 && kv_grow(&g->kv, limit) && kv_reserve(s->kv, &g->kv, g->ntokens)) {
        g->pages_wanted = 0;
        return true;
    }
    kv_close(s->kv, &g->kv);
    g->pages_wanted = kv_available(s->kv) + (missing > 0 ? missing : 0);
    return false;
}

/* --- admission ----------------------------------------------------------------------------- */
static void start(struct sched *s, struct gen *g)
{
    list_remove(&s->waiting, g);
    list_insert(&s->running, g);
    if (g->admitted)
        return;
    g->admitted = true;
    gen_started(g, g->kv.len);
    atomic_fetch_add(&s->prompt_tokens, (uint64_t)g->nprompt);
    pthread_mutex_lock(&s->lock);
    s->queued--;
    pthread_mutex_unlock(&s->lock);
}

static void end_with(struct sched *s, struct gen *g, enum err_code code, const char *why)
{
    struct err err = { .code = ERR_OK };
    err_set(&err, code, "%s", why);
    sched_end(s, &s->waiting, g, GEN_ERROR, &err);
}

/* The order of admission, in this one place: by arrival. */
void sched_admit(struct sched *s)
{
    bool no_seat = false, reserved = false;
    int ahead = 0;
    for (struct gen *g = s->waiting.first, *next; g != NULL && ahead < SCHED_LOOKAHEAD; g = next) {
        next = g->next;
        if (reserved && g->nadapters > 0) {
            sched_drop_adapters(s, g);
            continue;
        }
        struct err err = { .code = ERR_OK };
        enum adapter_state st = take_adapters(s, g, &err);
        const double crowded = g->no_room_since != 0 ? now_mono() - g->no_room_since : 0;
        if (st == ADAPTER_FAILED) {
            sched_end(s, &s->waiting, g, GEN_ERROR, &err);
        } else if (st == ADAPTER_NO_ROOM && s->running.n == 0 && crowded > GIVE_UP) {
            end_with(s, g, ERR_UNAVAILABLE, "the adapter cache has no room for this request's "
                                            "adapters");
        } else if (st == ADAPTER_NO_ROOM) {
            reserved = s->running.n == 0 || crowded > PATIENCE;
        } else if (st == ADAPTER_READY && !set_lora(g, &err)) {
            sched_end(s, &s->waiting, g, GEN_ERROR, &err);
        } else if (st == ADAPTER_READY) {
            no_seat = no_seat || s->running.n >= s->max_seqs || !take_pages(s, g);
            if (!no_seat) {
                start(s, g);
            } else if (s->running.n > 0) {
                ahead++;
            } else { /* all pages are free and enough for any one, so it was not pages */
                end_with(s, g, ERR_NOMEM, "out of memory");
                no_seat = false;
            }
        }
    }
}

void sched_preempt(struct sched *s, struct gen *g)
{
    kv_close(s->kv, &g->kv);
    list_remove(&s->running, g);
    list_insert(&s->waiting, g);
    g->rows = g->nlogits = 0;
    g->put_back = true;
    gen_preempted(g);
    atomic_fetch_add(&s->preempted, 1);
}

/* --- the next step ------------------------------------------------------------------------- */
/* A page for one more token of g, taking it from the youngest if need be.  false: g itself had to
 * go. */
static bool grow(struct sched *s, struct gen *g)
{
    while (!kv_reserve(s->kv, &g->kv, g->kv.len + 1)) {
        struct gen *youngest = s->running.last;
        bool self = youngest == g;
        if (self && s->running.n == 1) {
            struct err err = { .code = ERR_OK };
            err_nomem(&err);
            sched_end(s, &s->running, g, GEN_ERROR, &err);
            return false;
        }
        sched_preempt(s, youngest);
        if (self)
            return false;
    }
    return true;
}

/* Rows of a prompt: as many as are left in the step.  Echoed positions also need rows of logits,
 * of which there are fewer. */
static void plan_chunk(struct gen *g, int *rows, int *echo_rows)
{
    int todo = g->ntokens - g->kv.len;
    int n = todo < *rows ? todo : *rows;
    if (g->echo && g->echoed < g->nprompt) {
        int known = g->echoed - 1 > g->kv.len ? g->echoed - 1 - g->kv.len : 0;
        if (n > known + *echo_rows)
            n = known + *echo_rows;
        g->nlogits = n > known ? n - known : 0;
        *echo_rows -= g->nlogits;
    } else {
        g->nlogits = n == todo;
    }
    g->rows = n;
    *rows -= n;
}

void sched_plan(struct sched *s)
{
    int rows = s->max_rows, echo_rows = s->max_logits - s->max_seqs;
    for (struct gen *g = s->running.first, *next; g != NULL; g = next) {
        next = g->next; /* only younger ones are preempted, and only g itself when it is the last */
        g->rows = g->nlogits = g->guessed = 0;
        if (g->ntokens - g->kv.len != 1)
            continue;
        if (!grow(s, g))
            break;
        next = g->next;
        g->rows = g->nlogits = 1;
        rows--;
    }
    if (rows < s->max_rows && rows > s->max_chunk)
        rows = s->max_chunk;
    for (struct gen *g = s->running.first; g != NULL && rows > 0; g = g->next)
        if (g->rows == 0)
            plan_chunk(g, &rows, &echo_rows);
}
