/* gen_start.c - submits a request's sequences and says in headers how to replay them. */
#include "api/gen.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { DEFAULT_TEXT_TOKENS = 16 }; /* OpenAI's default for completions */

/* 53 bits, so that every JSON reader hands the seed back unchanged. */
static int random_seed(uint64_t *ret, struct err *err)
{
    uint64_t r;
    if (getrandom(&r, sizeof r, 0) != (ssize_t)sizeof r)
        return err_set(err, ERR_INTERNAL, "getrandom gave no random bytes");
    *ret = r >> 11;
    return ERR_OK;
}

/* Changes with everything that decides the result besides the request itself. */
static void fingerprint(const struct api *a, const struct gen_target *t, char ret[20])
{
    struct sha256 h;
    uint8_t hash[32];
    char hex[65];
    sha256_init(&h);
    sha256_add(&h, a->o.base->hash, 32);
    for (int i = 0; i < t->n; i++) {
        sha256_add(&h, t->item[i].use.hash, 32);
        sha256_add(&h, &t->item[i].use.weight, sizeof t->item[i].use.weight);
    }
    const char *precision = precision_name(a->o.compute->precision);
    sha256_add(&h, precision, strlen(precision));
    sha256_add(&h, a->o.version, strlen(a->o.version));
    sha256_end(&h, hash);
    hex32(hash, hex);
    snprintf(ret, 20, "fp_%.12s", hex);
}

static void replay_headers(const struct api_call *call, struct api_resp *r)
{
    const struct api *a = call->api;
    api_resp_header(r, "X-Lorad-Base", "%s", a->o.base->hash_hex);
    for (int i = 0; i < call->target.n; i++) {
        const float w = call->target.item[i].use.weight;
        const char *id = call->target.item[i].id, *hash = call->target.item[i].hash;
        if (w == 1.0f)
            api_resp_header(r, "X-Lorad-Adapter", "%s %s", id, hash);
        else
            api_resp_header(r, "X-Lorad-Adapter", "%s %s %.9g", id, hash, (double)w);
    }
    api_resp_header(r, "X-Lorad-Precision", "%s", precision_name(a->o.compute->precision));
    api_resp_header(r, "X-Lorad-Seed", "%lld", (long long)call->seed);
}

static int make_call(struct api_ctx *c, const struct gen_params *p, size_t nprompts,
                     struct api_call **ret, struct err *err)
{
    struct api_call *call = calloc(1, sizeof *call);
    if (call == NULL) {
        err_nomem(err);
        return ERR_NOMEM;
    }
    call->choices = calloc(nprompts * (size_t)p->n, sizeof *call->choices);
    uint64_t id = 0;
    call->seed = p->sample.seed;
    int rc = call->choices ? random_seed(&id, err) : err_nomem(err);
    if (rc == ERR_OK && !p->seeded)
        rc = random_seed(&call->seed, err);
    if (rc != ERR_OK) {
        gen_call_free(call);
        return rc;
    }
    call->api = c->api;
    call->wake = c->wake;
    call->wake_ud = c->wake_ud;
    call->chat = p->chat;
    call->stream = p->stream;
    call->include_usage = p->include_usage;
    call->echo = p->echo;
    call->hide_output = p->max_tokens == 0;
    call->logprobs = p->logprobs;
    call->top_logprobs = p->top_logprobs;
    call->n = p->n;
    call->created = now_unix_ms() / 1000;
    snprintf(call->id, sizeof call->id, "%s-%014llx", p->chat ? "chatcmpl" : "cmpl",
             (unsigned long long)id);
    *ret = call;
    return ERR_OK;
}

/* On the engine's thread, after each token.  An answer in one piece has no use for less than the
 * whole. */
static void wake_choice(void *ud)
{
    struct gen_choice *ch = ud;
    struct gen *g = atomic_load(&ch->seen);
    enum gen_finish finish = GEN_STOP;
    if (g != NULL && !ch->call->stream)
        gen_read(g, SIZE_MAX, NULL, 0, 0, NULL, &finish);
    if (finish != GEN_RUNNING)
        ch->call->wake(ch->call->wake_ud);
}

static int submit(struct api_ctx *c, const struct gen_params *p, struct api_call *call,
                  struct err *err)
{
    struct gen_request r = {
        .tenant = c->plan->tenant,
        .max_tokens = p->max_tokens > 0 ? p->max_tokens : 1,
        .sample = p->sample,
        .nadapters = call->target.n,
        .nstop = p->nstop,
        .ignore_eos = p->ignore_eos,
        .echo_logprobs = p->echo && p->logprobs,
        .wake = wake_choice,
    };
    if (p->max_tokens < 0)
        r.max_tokens = p->chat ? sched_max_context(c->api->o.sched) : DEFAULT_TEXT_TOKENS;
    if (c->api->o.request_seconds > 0)
        r.deadline = now_mono() + c->api->o.request_seconds;
    memcpy(r.stop, p->stop, sizeof r.stop);
    for (int i = 0; i < call->target.n; i++)
        r.adapters[i] = call->target.item[i].use;
    r.sample.seed = call->seed;

    for (size_t i = 0; i < call->nprompts; i++) {
        r.prompt = call->prompts[i].ids.ids;
        r.nprompt = (int)call->prompts[i].ids.n;
        for (int k = 0; k < p->n; k++) {
            struct gen_choice *ch = &call->choices[call->nchoices];
            r.sample.choice = (uint32_t)k;
            r.wake_ud = ch;
            ch->call = call;
            ch->prompt = &call->prompts[i];
            buf_init(&ch->text, SIZE_MAX);
            int rc = sched_submit(c->api->o.sched, &r, &ch->gen, err);
            if (rc != ERR_OK)
                return rc;
            ch->index = call->nchoices++;
            atomic_store(&ch->seen, ch->gen);
        }
    }
    return ERR_OK;
}

/* Sequences that do not fit the queue even when it is empty: trying again would not help. */
static int check_queue(const struct api_ctx *c, const struct gen_params *p, size_t nprompts,
                       struct err *err)
{
    const size_t room = (size_t)sched_max_queue(c->api->o.sched), wanted = nprompts * (size_t)p->n;
    if (wanted <= room)
        return ERR_OK;
    return err_set_slug(err, ERR_INVALID, "invalid_value", p->n > 1 ? "n" : "prompt",
                        "%zu prompts with n = %d ask for %zu choices: this server takes at most %zu at "
                        "once (--max-queue)", nprompts, p->n, wanted, room);
}

int gen_start(struct api_ctx *c, const struct gen_params *p, struct gen_target *target,
              struct gen_prompt *prompts, size_t nprompts, struct err *err)
{
    struct api_call *call = NULL;
    int rc = check_queue(c, p, nprompts, err);
    if (rc == ERR_OK)
        rc = make_call(c, p, nprompts, &call, err);
    if (rc != ERR_OK || call == NULL) {
        gen_prompts_free(prompts, nprompts);
        return rc;
    }
    call->prompts = prompts;
    call->nprompts = nprompts;
    call->target = *target;
    *target = (struct gen_target){ 0 };
    fingerprint(c->api, &call->target, call->fingerprint);
    rc = submit(c, p, call, err);
    if (rc != ERR_OK) {
        gen_call_free(call);
        return rc;
    }
    replay_headers(call, c->resp);
    c->call = call;
    return ERR_OK;
}

void gen_prompts_free(struct gen_prompt *p, size_t n)
{
    for (size_t i = 0; p != NULL && i < n; i++) {
        free(p[i].ids.ids);
        free(p[i].text);
    }
    free(p);
}

/* Cancels what still runs. */
void gen_call_free(struct api_call *call)
{
    if (call == NULL)
        return;
    for (int i = 0; i < call->nchoices; i++) {
        gen_release(call->choices[i].gen);
        buf_free(&call->choices[i].text);
        json_decref(call->choices[i].logprobs);
    }
    free(call->choices);
    gen_prompts_free(call->prompts, call->nprompts);
    gen_target_free(&call->target);
    free(call);
}
