/* sched.c - the engine thread: look around, admit, compute one step, hand out what came of it.
 *
 * A step is: rows for every running generation (sched_plan), one forward pass, one choice per
 * sequence whose tokens are all computed (on all threads, a sampler each), and the results into
 * the generations' logs.  Admission and preemption are in sched_admit.c, the logs in gen.c; the
 * states of a generation and the locks are explained in sched_int.h. */
#include "engine/sched_int.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { DEFAULT_SEQS = 64, DEFAULT_ROWS = 512, DEFAULT_QUEUE = 256 };
/* Rows of logits of a step beside one per sequence, for prompts that are echoed. */
enum { ECHO_ROWS = 32 };

#define ROOM_POLL 0.25 /* seconds between looks while adapters wait for room */

/* --- lists --------------------------------------------------------------------------------- */
void list_insert(struct gen_list *l, struct gen *g)
{
    struct gen *after = l->last;
    while (after != NULL && after->number > g->number)
        after = after->prev;
    g->prev = after;
    g->next = after != NULL ? after->next : l->first;
    *(g->prev != NULL ? &g->prev->next : &l->first) = g;
    *(g->next != NULL ? &g->next->prev : &l->last) = g;
    l->n++;
}

void list_remove(struct gen_list *l, struct gen *g)
{
    *(g->prev != NULL ? &g->prev->next : &l->first) = g->next;
    *(g->next != NULL ? &g->next->prev : &l->last) = g->prev;
    l->n--;
}

/* --- results of a step --------------------------------------------------------------------- */
static bool is_end_token(const struct sched *s, const struct gen *g, int32_t token)
{
    for (int i = 0; i < s->base->arch.neos && !g->ignore_eos; i++)
        if (s->base->arch.eos[i] == token)
            return true;
    return false;
}

void sched_end(struct sched *s, struct gen_list *from, struct gen *g, enum gen_finish finish,
               const struct err *err)
{
    list_remove(from, g);
    if (from == &s->running)
        kv_close(s->kv, &g->kv);
    sched_drop_adapters(s, g);
    atomic_store(&s->nrunning, s->running.n);
    atomic_store(&s->nwaiting, s->waiting.n);
    bool cut = finish == GEN_CANCELLED || finish == GEN_DEADLINE;
    atomic_fetch_add(cut ? &s->cancelled : &s->finished, 1);

    pthread_mutex_lock(&s->lock);
    if (!g->admitted)
        s->queued--;
    pthread_mutex_unlock(&s->lock);
    gen_end(g, finish, err);
    gen_wake(g);
    gen_unref(g);
    pthread_mutex_lock(&s->lock);
    if (--s->active == 0)
        pthread_cond_broadcast(&s->done);
    pthread_mutex_unlock(&s->lock);
}

static void count_gap(struct sched *s, struct gen *g)
{
    if (g->last_token != 0) {
        histogram_add(&s->gap, s->chosen_at - g->last_token);
        if (!g->put_back)
            histogram_add(&s->running_gap, s->chosen_at - g->last_token);
    }
    g->last_token = s->chosen_at;
    g->put_back = false;
}

/* The next token of a sequence; why it ends with it, or GEN_RUNNING. */
static enum gen_finish add_token(struct sched *s, struct gen *g, const struct sample_result *r)
{
    g->tokens[g->ntokens++] = r->token;
    atomic_fetch_add(&s->generated_tokens, 1);
    count_gap(s, g);
    bool end_token = is_end_token(s, g, r->token);
    bool last = end_token || g->ntokens == g->nprompt + g->max_tokens;
    enum gen_finish finish = gen_add(g, r, end_token, last);
    return finish != GEN_RUNNING ? finish
         : end_token             ? GEN_STOP
         : last                  ? GEN_LENGTH
                                 : GEN_RUNNING;
}

static enum gen_finish take_job(struct sched *s, struct gen *g, const struct job *j,
                                struct err *err)
{
    if (!j->ok) {
        err_set(err, ERR_INTERNAL, "the model's output after %d tokens is not a number", j->pos);
        return GEN_ERROR;
    }
    if (j->score) {
        gen_echo(g, &j->result);
        return GEN_RUNNING;
    }
    const enum gen_finish f = add_token(s, g, &j->result);
    if (f == GEN_ERROR)
        err_nomem(err);
    return f;
}

/* All jobs of one generation; returns how many. */
static int take_jobs(struct sched *s, struct gen *g, const struct job *jobs)
{
    struct err err = { .code = ERR_OK };
    enum gen_finish f = GEN_RUNNING;
    const int n = g->nlogits;
    if (n > 0 && g->echo && g->echoed == 0) {
        const struct sample_result first = { .token = g->tokens[0] };
        gen_echo(g, &first);
    }
    int right = 0;
    for (int i = 0; i < n && f == GEN_RUNNING; i++) {
        const bool good = i < g->guessed && jobs[i].result.token == g->tokens[g->ntokens];
        f = take_job(s, g, &jobs[i], &err);
        right += good;
        if (g->guessed > 0 && !good) /* the rest was computed on top of a wrong guess */
            break;
        if (good && f == GEN_RUNNING)
            kv_commit(s->kv, &g->kv, g->tokens, g->kv.len + 1);
    }
    lookup_learn(s, g, right);
    if (f != GEN_RUNNING)
        sched_end(s, &s->running, g, f, f == GEN_ERROR ? &err : NULL);
    else if (n > 0)
        gen_wake(g);
    return n;
}

/* --- a step -------------------------------------------------------------------------------- */
/* An order in which equal sets are neighbours; any will do. */
static int by_lora(const struct lora_set *a, const struct lora_set *b)
{
    if (a->n != b->n)
        return a->n < b->n ? -1 : 1;
    for (int i = 0; i < a->n; i++) {
        uintptr_t x = (uintptr_t)a->item[i].adapter, y = (uintptr_t)b->item[i].adapter;
        if (x != y)
            return x < y ? -1 : 1;
        if (a->item[i].weight != b->item[i].weight)
            return a->item[i].weight < b->item[i].weight ? -1 : 1;
    }
    return 0;
}

/* Shell sort: qsort() may allocate. */
static void sort(struct gen **g, int n)
{
    for (int gap = n / 2; gap > 0; gap /= 2)
        for (int i = gap; i < n; i++) {
            struct gen *x = g[i];
            int at = i;
            for (; at >= gap && by_lora(&g[at - gap]->lora, &x->lora) > 0; at -= gap)
                g[at] = g[at - gap];
            g[at] = x;
        }
}

static int gather(struct sched *s)
{
    int n = 0;
    for (struct gen *g = s->running.first; g != NULL; g = g->next)
        if (g->rows > 0)
            s->batch[n++] = g;
    sort(s->batch, n);
    for (int i = 0; i < n; i++) {
        struct gen *g = s->batch[i];
        s->spans[i] = (struct span){ .kv = &g->kv, .pos = g->kv.len, .n = g->rows,
                                     .tokens = g->tokens + g->kv.len, .lora = &g->lora,
                                     .nlogits = g->nlogits };
    }
    return n;
}

static int make_jobs(struct sched *s, int nbatch, const float *logits)
{
    int n = 0;
    for (int i = 0; i < nbatch; i++) {
        struct gen *g = s->batch[i];
        for (int r = g->rows - g->nlogits; r < g->rows; r++, n++) {
            int next = s->spans[i].pos + r + 1; /* the position these logits are for */
            s->jobs[n] = (struct job){ .gen = g, .pos = next, .score = next < g->ntokens,
                                       .logits = logits + (size_t)n * (size_t)s->base->arch.V };
        }
    }
    return n;
}

static void run_jobs(void *arg, int64_t begin, int64_t end, int thread)
{
    struct sched *s = arg;
    for (int64_t i = begin; i < end; i++) {
        struct job *j = &s->jobs[i];
        const struct gen *g = j->gen;
        j->ok = j->score ? sampler_score(s->samplers[thread], j->logits, g->tokens[j->pos],
                                         g->sample.top_logprobs, &j->result)
                         : sampler_run(s->samplers[thread], &g->sample, j->logits, g->tokens,
                                       j->pos, g->nprompt, &j->result);
    }
}

static void count_step(struct sched *s, double seconds)
{
    const uint64_t ns = (uint64_t)(fmax(seconds, 0) * 1e9);
    bool waits = false; /* whether a sequence that had its last token waits for the next */
    for (const struct gen *g = s->running.first; g != NULL && !waits; g = g->next)
        waits = g->last_token != 0 && !g->put_back;
    histogram_add(&s->step, seconds);
    if (waits && ns > atomic_load(&s->decode_step_max_ns))
        atomic_store(&s->decode_step_max_ns, ns);
}

static void step(struct sched *s)
{
    const double begin = now_mono();
    if (s->chosen_at != 0)
        histogram_add(&s->between, begin - s->chosen_at);
    sched_plan(s);
    lookup_plan(s);
    const int n = gather(s);
    if (n == 0) /* whoever ran had to be ended */
        return;
    const float *logits = forward_run(s->forward, s->spans, n);
    uint64_t rows = 0;
    for (int i = 0; i < n; i++) {
        struct gen *g = s->batch[i];
        kv_commit(s->kv, &g->kv, g->tokens, g->kv.len + g->rows - g->guessed);
        rows += (uint64_t)g->rows;
    }
    atomic_fetch_add(&s->steps, 1);
    atomic_fetch_add(&s->rows, rows);
    pool_run(s->compute->pool, make_jobs(s, n, logits), 1, run_jobs, s);
    s->chosen_at = now_mono();
    count_step(s, s->chosen_at - begin);
    const struct job *j = s->jobs;
    for (int i = 0; i < n; i++)
        j += take_jobs(s, s->batch[i], j);
}

/* --- the thread ---------------------------------------------------------------------------- */
void sched_poke(struct sched *s)
{
    pthread_mutex_lock(&s->lock);
    s->poked = true;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
}

static void on_adapter_ready(void *ud) { sched_poke(ud); }

/* What others asked for since the last look. */
struct orders {
    bool cancel_all, stop, preempt, forget;
};

static struct orders look_around(struct sched *s)
{
    pthread_mutex_lock(&s->lock);
    for (struct gen *g = s->inbox.first, *next; g != NULL; g = next) {
        next = g->next;
        list_remove(&s->inbox, g);
        list_insert(&s->waiting, g);
    }
    struct orders o = { .cancel_all = s->cancel_all, .stop = s->stopping, .forget = s->forget > 0,
                        .preempt = s->preempt > 0 && s->running.n > 0 };
    s->preempt -= o.preempt;
    s->forget = 0;
    s->poked = false;
    atomic_store(&s->nwaiting, s->waiting.n);
    pthread_mutex_unlock(&s->lock);
    return o;
}

static void end_cut_off(struct sched *s, struct gen_list *l, bool all)
{
    const double now = now_mono();
    for (struct gen *g = l->first, *next; g != NULL; g = next) {
        next = g->next;
        if (all || atomic_load(&g->cancelled))
            sched_end(s, l, g, GEN_CANCELLED, NULL);
        else if (g->deadline != 0 && now >= g->deadline)
            sched_end(s, l, g, GEN_DEADLINE, NULL);
    }
}

/* When to look again although nobody poked: 0 for never. */
static double next_look(const struct sched *s)
{
    double at = sched_room_wanted(s) ? now_mono() + ROOM_POLL : 0;
    for (const struct gen *g = s->waiting.first; g != NULL; g = g->next)
        if (g->deadline != 0 && (at == 0 || g->deadline < at))
            at = g->deadline;
    return at;
}

static void sleep_until_poked(struct sched *s)
{
    const double at = next_look(s);
    const double whole = floor(at);
    const struct timespec t = { .tv_sec = (time_t)whole, .tv_nsec = (long)((at - whole) * 1e9) };
    pthread_mutex_lock(&s->lock);
    while (!s->poked) {
        int rc = at == 0 ? pthread_cond_wait(&s->work, &s->lock)
                         : pthread_cond_timedwait(&s->work, &s->lock, &t);
        if (rc == ETIMEDOUT)
            break;
    }
    pthread_mutex_unlock(&s->lock);
}

static void *engine_main(void *ud)
{
    struct sched *s = ud;
    for (;;) {
        const struct orders o = look_around(s);
        end_cut_off(s, &s->running, o.cancel_all);
        end_cut_off(s, &s->waiting, o.cancel_all);
        if (o.stop)
            return NULL; /* cancel_all came with it, and nothing is submitted any more */
        if (o.preempt && s->running.n > 0)
            sched_preempt(s, s->running.last);
        if (o.forget)
            kv_forget(s->kv);
        sched_admit(s);
        atomic_store(&s->nrunning, s->running.n);
        atomic_store(&s->nwaiting, s->waiting.n);
        if (s->running.n > 0) {
            step(s);
        } else {
            s->chosen_at = 0;
            sleep_until_poked(s);
        }
    }
}

/* --- making and ending --------------------------------------------------------------------- */
static int positive(int given, int otherwise) { return given > 0 ? given : otherwise; }

/* The limits of `o` with defaults filled in. */
static void set_limits(struct sched *s, const struct sched_opts *o)
{
    s->max_rows = positive(o->step_tokens, DEFAULT_ROWS);
    s->max_chunk = positive(o->chunk_tokens, SCHED_CHUNK);
    s->max_seqs = positive(o->max_seqs, DEFAULT_SEQS);
    if (s->max_seqs > s->max_rows)
        s->max_seqs = s->max_rows;
    s->max_logits = s->max_seqs + ECHO_ROWS;
    s->lookup = o->lookup < SCHED_LOOKUP_MAX ? o->lookup : SCHED_LOOKUP_MAX;
    if (s->max_logits < s->lookup + 1)
        s->max_logits = s->lookup + 1;
    s->max_queue = positive(o->max_queue, DEFAULT_QUEUE);
    s->max_context = positive(o->max_context, o->base->arch.max_positions);
    if (s->max_context > o->base->arch.max_positions)
        s->max_context = o->base->arch.max_positions;
    s->nsamplers = o->compute->pool != NULL ? pool_threads(o->compute->pool) : 1;
}

size_t sched_work_bytes(const struct sched_opts *o)
{
    struct sched s = { .stopping = false };
    set_limits(&s, o);
    return forward_bytes(o->base, s.max_rows, s.max_logits) +
           (size_t)s.nsamplers * sampler_bytes(o->base->arch.V) +
           (size_t)s.max_logits * sizeof(struct job);
}

static int make_parts(struct sched *s, const struct sched_opts *o, struct err *err)
{
    const struct base *b = s->base;
    int rc = kv_create(&b->arch, o->kv_type, o->kv_bytes, &s->kv, err);
    if (rc != ERR_OK)
        return rc;
    const int context = s->max_context; /* how much memory there is must not choose the angles */
    int64_t positions = (int64_t)kv_pages(s->kv) * KV_PAGE;
    if (s->max_context > positions)
        s->max_context = (int)positions;
    rc = forward_create(b, s->compute, s->kv, context, s->max_rows, s->max_logits, &s->forward,
                        err);
    if (rc != ERR_OK)
        return rc;
    s->batch = calloc((size_t)s->max_seqs, sizeof(struct gen *));
    s->spans = calloc((size_t)s->max_seqs, sizeof *s->spans);
    s->jobs = calloc((size_t)s->max_logits, sizeof *s->jobs);
    s->samplers = calloc((size_t)s->nsamplers, sizeof(struct sampler *));
    if (s->batch == NULL || s->spans == NULL || s->jobs == NULL || s->samplers == NULL)
        return err_nomem(err);
    for (int i = 0; i < s->nsamplers && rc == ERR_OK; i++)
        rc = sampler_create(b->arch.V, &s->samplers[i], err);
    return rc;
}

static void free_parts(struct sched *s)
{
    for (int i = 0; s->samplers != NULL && i < s->nsamplers; i++)
        sampler_destroy(s->samplers[i]);
    free(s->samplers);
    free(s->jobs);
    free(s->spans);
    free(s->batch);
    forward_destroy(s->forward);
    kv_destroy(s->kv);
    pthread_cond_destroy(&s->work);
    pthread_cond_destroy(&s->done);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

int sched_create(const struct sched_opts *o, struct sched **ret, struct err *err)
{
    struct sched *s = calloc(1, sizeof *s);
    if (s == NULL)
        return err_nomem(err);
    s->base = o->base;
    s->tokenizer = o->tokenizer;
    s->compute = o->compute;
    s->adapters = o->adapters;
    set_limits(s, o);
    pthread_condattr_t mono; /* deadlines are on the clock of now_mono() */
    pthread_condattr_init(&mono);
    pthread_condattr_setclock(&mono, CLOCK_MONOTONIC);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->work, &mono);
    pthread_cond_init(&s->done, &mono);
    pthread_condattr_destroy(&mono);

    int rc = make_parts(s, o, err);
    if (rc == ERR_OK && pthread_create(&s->thread, NULL, engine_main, s) != 0)
        rc = err_set(err, ERR_NOMEM, "the engine's thread could not be started");
    if (rc != ERR_OK) {
        free_parts(s);
        return rc;
    }
    if (s->adapters != NULL)
        adapter_cache_on_ready(s->adapters, on_adapter_ready, s);
    *ret = s;
    return ERR_OK;
}

void sched_drain(struct sched *s, double seconds)
{
    const double end = now_mono() + (seconds > 0 ? seconds : 0), whole = floor(end);
    const struct timespec t = { .tv_sec = (time_t)whole, .tv_nsec = (long)((end - whole) * 1e9) };
    pthread_mutex_lock(&s->lock);
    s->draining = true;
    int rc = 0;
    while (s->active > 0 && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&s->done, &s->lock, &t);
    if (s->active > 0) {
        s->cancel_all = s->poked = true;
        pthread_cond_signal(&s->work);
    }
    while (s->active > 0)
        pthread_cond_wait(&s->done, &s->lock);
    pthread_mutex_unlock(&s->lock);
}

void sched_destroy(struct sched *s)
{
    if (s == NULL)
        return;
    if (s->adapters != NULL)
        adapter_cache_on_ready(s->adapters, NULL, NULL);
    pthread_mutex_lock(&s->lock);
    s->draining = s->cancel_all = s->stopping = s->poked = true;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    free_parts(s);
}

int sched_max_context(const struct sched *s) { return s->max_context; }
int sched_max_queue(const struct sched *s) { return s->max_queue; }
