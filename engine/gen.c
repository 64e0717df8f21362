/* gen.c - one generation's output: a log of tokens and text, written by the engine, read by its
 * owner.
 *
 * Text goes tokens -> tok_stream -> `held` -> `text`.  What reaches `text` is final: `held` keeps
 * back the longest tail that is the beginning of a stop string, so that a stop string spread over
 * any number of tokens is found whole and none of it is ever seen.  Both ends of what is published
 * lie between UTF-8 characters. */
#include "engine/sched_int.h"

#include <stdlib.h>
#include <string.h>

enum { TEXT_MAX = 1 << 30, TEXT_PER_TOKEN = 8, HELD = 1024 };

/* --- making and freeing -------------------------------------------------------------------- */
static int copy_stops(struct gen *g, const struct gen_request *r, struct err *err)
{
    for (int i = 0; i < r->nstop; i++) {
        size_t n = strlen(r->stop[i]);
        if (n < 1 || n > GEN_STOP_LEN)
            return err_set_slug(err, ERR_INVALID, "invalid_value", "stop",
                                "a stop string must have 1 to %d bytes, not %zu", GEN_STOP_LEN, n);
        g->stop[i] = strdup(r->stop[i]);
        if (g->stop[i] == NULL)
            return err_nomem(err);
        g->stop_len[i] = n;
        g->nstop++;
    }
    return ERR_OK;
}

/* The log of all tokens there can be: memory that is not touched before it is used. */
static int make_log(struct gen *g, struct err *err)
{
    const size_t n = (size_t)g->max_tokens + (g->echo ? (size_t)g->nprompt : 0);
    const size_t tops = g->sample.top_logprobs > 0 ? (size_t)g->sample.top_logprobs : 0;
    g->log = malloc(n * sizeof *g->log);
    g->tops = malloc(n * tops * sizeof *g->tops + 1);
    size_t text = (size_t)g->max_tokens * TEXT_PER_TOKEN;
    text = text < TEXT_MAX ? text : TEXT_MAX;
    if (g->log == NULL || g->tops == NULL ||
        (g->tokenizer != NULL && (buf_reserve(&g->text, text) != ERR_OK ||
                                  buf_reserve(&g->held, HELD) != ERR_OK)))
        return err_nomem(err);
    return ERR_OK;
}

static int copy_request(struct gen *g, const struct gen_request *r, struct err *err)
{
    g->tokens = malloc(((size_t)g->nprompt + (size_t)g->max_tokens) * sizeof *g->tokens);
    g->bias = malloc((size_t)(r->sample.nbias + 1) * sizeof *g->bias);
    if (g->tokens == NULL || g->bias == NULL)
        return err_nomem(err);
    memcpy(g->tokens, r->prompt, (size_t)g->nprompt * sizeof *g->tokens);
    g->ntokens = g->nprompt;
    if (r->sample.nbias > 0)
        memcpy(g->bias, r->sample.bias, (size_t)r->sample.nbias * sizeof *g->bias);
    g->sample = r->sample;
    g->sample.bias = g->bias;
    g->nadapters = r->nadapters;
    memcpy(g->adapters, r->adapters, sizeof g->adapters);
    int rc = copy_stops(g, r, err);
    if (rc == ERR_OK)
        rc = make_log(g, err);
    if (rc == ERR_OK && g->tokenizer != NULL)
        rc = tok_stream_open(g->tokenizer, true, true, &g->stream, err);
    return rc;
}

int gen_create(struct sched *s, const struct gen_request *r, struct gen **ret, struct err *err)
{
    struct gen *g = calloc(1, sizeof *g);
    if (g == NULL)
        return err_nomem(err);
    pthread_mutex_init(&g->lock, NULL);
    pthread_mutex_init(&g->wake_lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    buf_init(&g->held, TEXT_MAX);
    buf_init(&g->text, TEXT_MAX);
    g->refs = 1;
    g->sched = s;
    g->tokenizer = s->tokenizer;
    g->tenant = r->tenant;
    g->nprompt = r->nprompt;
    g->max_tokens = r->max_tokens < s->max_context - r->nprompt ? r->max_tokens
                                                                : s->max_context - r->nprompt;
    g->ignore_eos = r->ignore_eos;
    g->echo = r->echo_logprobs;
    g->deadline = r->deadline;
    g->submitted = now_mono();
    g->wake = r->wake;
    g->wake_ud = r->wake_ud;
    g->usage.prompt_tokens = r->nprompt;
    int rc = copy_request(g, r, err);
    if (rc != ERR_OK) {
        gen_unref(g);
        return rc;
    }
    *ret = g;
    return ERR_OK;
}

static void close_stream(struct gen *g)
{
    tok_stream_free(g->stream);
    g->stream = NULL;
}

void gen_unref(struct gen *g)
{
    if (atomic_fetch_sub(&g->refs, 1) > 1)
        return;
    pthread_mutex_destroy(&g->lock);
    pthread_mutex_destroy(&g->wake_lock);
    pthread_cond_destroy(&g->changed);
    for (int i = 0; i < g->nstop; i++)
        free(g->stop[i]);
    close_stream(g);
    buf_free(&g->held);
    buf_free(&g->text);
    free(g->tokens);
    free(g->bias);
    free(g->log);
    free(g->tops);
    free(g);
}

/* --- stop strings -------------------------------------------------------------------------- */
/* The largest n' <= n at which `held` can be cut without splitting a character. */
static size_t char_boundary(const struct buf *b, size_t n)
{
    while (n > 0 && n < b->len && ((unsigned char)b->data[n] & 0xc0) == 0x80)
        n--;
    return n;
}

/* Where the first stop string begins in `held`; false if there is none. */
static bool find_stop(const struct gen *g, size_t *ret)
{
    bool found = false;
    for (int i = 0; i < g->nstop; i++) {
        size_t len = found ? *ret + g->stop_len[i] - 1 : g->held.len; /* only if earlier */
        if (len > g->held.len)
            len = g->held.len;
        const char *p = g->held.len == 0
                            ? NULL
                            : memmem(g->held.data, len, g->stop[i], g->stop_len[i]);
        if (p != NULL) {
            *ret = (size_t)(p - g->held.data);
            found = true;
        }
    }
    return found;
}

/* Length of the longest tail of `held` that begins a stop string. */
static size_t stop_tail(const struct gen *g)
{
    size_t keep = 0;
    for (int i = 0; i < g->nstop; i++) {
        size_t n = g->stop_len[i] - 1 < g->held.len ? g->stop_len[i] - 1 : g->held.len;
        for (; n > keep; n--)
            if (memcmp(g->held.data + g->held.len - n, g->stop[i], n) == 0)
                keep = n;
    }
    return keep;
}

/* --- writing (engine thread) --------------------------------------------------------------- */
/* Decode one token into `held` (none when token < 0); end the stream if it is the last. */
static int decode(struct gen *g, int32_t token, bool last)
{
    if (g->stream == NULL)
        return ERR_OK;
    int rc = token >= 0 ? tok_stream_add(g->stream, token, &g->held) : ERR_OK;
    if (rc == ERR_INVALID) /* models have rows that the tokenizer has no text for */
        rc = ERR_OK;
    if (rc == ERR_OK && last) {
        rc = tok_stream_end(g->stream, &g->held);
        close_stream(g);
    }
    return rc;
}

/* How much of `held` may be published now; *ret_stop when a stop string ends it. */
static size_t certain(struct gen *g, bool last, bool *ret_stop)
{
    size_t n;
    *ret_stop = find_stop(g, &n);
    if (!*ret_stop)
        n = last ? g->held.len : g->held.len - stop_tail(g);
    return char_boundary(&g->held, n);
}

/* Move n bytes from `held` to `text`.  The lock is held. */
static bool publish(struct gen *g, size_t n)
{
    if (buf_add(&g->text, g->held.data, n) != ERR_OK)
        return false;
    if (n > 0)
        memmove(g->held.data, g->held.data + n, g->held.len - n);
    g->held.len -= n;
    return true;
}

/* There is room: tokens of the prompt and of the output are logged once each. */
static struct log_entry *log_token(struct gen *g, const struct sample_result *r)
{
    if (r->ntop > 0) /* at most top_logprobs */
        memcpy(g->tops + g->nlog * (size_t)g->sample.top_logprobs, r->top,
               (size_t)r->ntop * sizeof *r->top);
    struct log_entry *e = &g->log[g->nlog++];
    *e = (struct log_entry){ .token = r->token, .logprob = r->logprob, .ntop = (int16_t)r->ntop };
    return e;
}

/* Entry i as its reader sees it. */
static void read_token(const struct gen *g, size_t i, struct gen_token *ret)
{
    const struct log_entry *e = &g->log[i];
    *ret = (struct gen_token){ .token = e->token, .logprob = e->logprob, .prompt = e->prompt,
                               .text_begin = e->text_begin, .text_end = e->text_end,
                               .ntop = e->ntop };
    if (e->ntop > 0)
        memcpy(ret->top, g->tops + i * (size_t)g->sample.top_logprobs,
               (size_t)e->ntop * sizeof *ret->top);
}

enum gen_finish gen_add(struct gen *g, const struct sample_result *r, bool end_token, bool last)
{
    bool stop = false;
    bool ok = decode(g, end_token ? -1 : r->token, last) == ERR_OK;
    size_t n = ok ? certain(g, last, &stop) : 0;
    pthread_mutex_lock(&g->lock);
    uint32_t begin = (uint32_t)g->text.len;
    ok = ok && publish(g, n);
    if (ok) {
        struct log_entry *e = log_token(g, r);
        e->text_begin = begin;
        e->text_end = (uint32_t)g->text.len;
        if (++g->usage.completion_tokens == 1)
            g->usage.first_token = now_mono() - g->submitted;
        pthread_cond_broadcast(&g->changed);
    }
    pthread_mutex_unlock(&g->lock);
    if (stop) { /* nothing of the stop string or after it */
        buf_free(&g->held);
        close_stream(g);
    }
    return !ok ? GEN_ERROR : stop ? GEN_STOP : GEN_RUNNING;
}

void gen_echo(struct gen *g, const struct sample_result *r)
{
    pthread_mutex_lock(&g->lock);
    log_token(g, r)->prompt = true;
    g->echoed++;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

void gen_started(struct gen *g, int cached)
{
    pthread_mutex_lock(&g->lock);
    g->usage.cached_tokens = cached;
    g->usage.queued = now_mono() - g->submitted;
    pthread_mutex_unlock(&g->lock);
}

void gen_preempted(struct gen *g)
{
    pthread_mutex_lock(&g->lock);
    g->usage.preemptions++;
    pthread_mutex_unlock(&g->lock);
}

void gen_end(struct gen *g, enum gen_finish finish, const struct err *err)
{
    bool stop = false;
    decode(g, -1, true); /* a failure only loses an incomplete character */
    size_t n = certain(g, true, &stop);
    pthread_mutex_lock(&g->lock);
    publish(g, n);
    if (err != NULL)
        g->err = *err;
    g->finish = finish;
    g->usage.total = now_mono() - g->submitted;
    g->sched = NULL;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

void gen_wake(struct gen *g)
{
    pthread_mutex_lock(&g->wake_lock);
    if (g->wake != NULL)
        g->wake(g->wake_ud);
    pthread_mutex_unlock(&g->wake_lock);
}

/* --- reading (the owner) ------------------------------------------------------------------- */
/* Room in `text` for what there is from byte `from` on.  The lock, which the engine waits for, is open
 * while memory is taken. */
static bool text_room(struct gen *g, size_t from, struct buf *text)
{
    while (from < g->text.len && text->cap - text->len <= g->text.len - from) {
        const size_t need = g->text.len - from;
        pthread_mutex_unlock(&g->lock);
        const bool ok = buf_reserve(text, need) == ERR_OK;
        pthread_mutex_lock(&g->lock);
        if (!ok)
            return false;
    }
    return true;
}

size_t gen_read(struct gen *g, size_t from, struct gen_token *ret, size_t max, size_t text_from,
                struct buf *text, enum gen_finish *ret_finish)
{
    pthread_mutex_lock(&g->lock);
    bool ok = text == NULL || text_room(g, text_from, text);
    size_t n = from < g->nlog ? g->nlog - from : 0;
    n = n < max ? n : max;
    for (size_t i = 0; i < n; i++)
        read_token(g, from + i, &ret[i]);
    if (ok && text != NULL && text_from < g->text.len)
        ok = buf_add(text, g->text.data + text_from, g->text.len - text_from) == ERR_OK;
    *ret_finish = !ok ? GEN_ERROR : from + n >= g->nlog ? g->finish : GEN_RUNNING;
    pthread_mutex_unlock(&g->lock);
    return n;
}

void gen_wait(struct gen *g, size_t from)
{
    pthread_mutex_lock(&g->lock);
    while (g->nlog <= from && g->finish == GEN_RUNNING)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

void gen_usage(struct gen *g, struct gen_usage *ret)
{
    pthread_mutex_lock(&g->lock);
    *ret = g->usage;
    pthread_mutex_unlock(&g->lock);
}

void gen_error(struct gen *g, struct err *ret)
{
    pthread_mutex_lock(&g->lock);
    *ret = g->err;
    pthread_mutex_unlock(&g->lock);
}

void gen_cancel(struct gen *g)
{
    atomic_store(&g->cancelled, true);
    pthread_mutex_lock(&g->lock);
    if (g->sched != NULL) /* it cannot go away: ending this generation needs the lock */
        sched_poke(g->sched);
    pthread_mutex_unlock(&g->lock);
}

void gen_release(struct gen *g)
{
    if (g == NULL)
        return;
    gen_cancel(g);
    pthread_mutex_lock(&g->wake_lock);
    g->wake = NULL;
    pthread_mutex_unlock(&g->wake_lock);
    gen_unref(g);
}
