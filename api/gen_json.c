/* gen_json.c - the shapes of OpenAI's answers, with a `lorad` object that says how to replay one. */
#include "api/gen.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *gen_finish_name(enum gen_finish f) { return f == GEN_LENGTH ? "length" : "stop"; }

/* --- logprobs ---------------------------------------------------------------------------------- */

json_t *gen_logprobs_new(const struct api_call *call)
{
    if (call->chat)
        return json_pack("{s:[], s:n}", "content", "refusal");
    if (call->top_logprobs == 0)
        return json_pack("{s:[], s:[], s:n, s:[]}", "tokens", "token_logprobs", "top_logprobs",
                         "text_offset");
    return json_pack("{s:[], s:[], s:[], s:[]}", "tokens", "token_logprobs", "top_logprobs",
                     "text_offset");
}

/* A token of chat: its text, its bytes (which may be part of a character), its logprob. */
static json_t *chat_token(const struct api_call *call, int32_t id, float logprob)
{
    struct buf b;
    buf_init(&b, 1 << 16);
    tokenizer_piece(call->api->o.tokenizer, id, &b);
    json_t *bytes = json_array();
    for (size_t i = 0; b.data != NULL && i < b.len; i++)
        json_array_append_new(bytes, json_integer((unsigned char)b.data[i]));
    json_t *j = json_pack("{s:o, s:f, s:o}", "token", json_text(b.data ? b.data : "", b.len),
                          "logprob", (double)logprob, "bytes", bytes);
    buf_free(&b);
    return j;
}

static int add_chat(const struct api_call *call, json_t *list, const struct gen_token *t)
{
    json_t *j = chat_token(call, t->token, t->logprob), *top = json_array();
    for (int i = 0; i < t->ntop; i++)
        json_array_append_new(top, chat_token(call, t->top[i].token, t->top[i].logprob));
    if (j == NULL || json_object_set_new(j, "top_logprobs", top) != 0)
        return ERR_NOMEM;
    return json_array_append_new(json_object_get(list, "content"), j) == 0 ? ERR_OK : ERR_NOMEM;
}

/* A token of completions is its text, or "bytes:\xe2\x80" where that is no text. */
static void token_name(const struct api_call *call, int32_t id, struct buf *ret)
{
    tokenizer_piece(call->api->o.tokenizer, id, ret);
    json_t *fine = json_stringn(ret->data ? ret->data : "", ret->len);
    if (fine == NULL) {
        struct buf hex;
        buf_init(&hex, SIZE_MAX);
        buf_puts(&hex, "bytes:");
        for (size_t i = 0; ret->data != NULL && i < ret->len; i++)
            buf_printf(&hex, "\\x%02x", (unsigned char)ret->data[i]);
        buf_free(ret);
        *ret = hex;
    }
    json_decref(fine);
}

static int set_top(const struct api_call *call, json_t *obj, int32_t id, float logprob)
{
    struct buf name;
    buf_init(&name, SIZE_MAX);
    token_name(call, id, &name);
    const int rc = json_object_setn_new(obj, name.data ? name.data : "", name.len,
                                        json_real((double)logprob));
    buf_free(&name);
    return rc == 0 ? ERR_OK : ERR_NOMEM;
}

/* The most likely tokens, and the one that was taken. */
static json_t *text_top(const struct api_call *call, const struct gen_token *t)
{
    json_t *obj = json_object();
    int rc = obj ? ERR_OK : ERR_NOMEM;
    bool seen = false;
    for (int i = 0; i < t->ntop && rc == ERR_OK; i++) {
        rc = set_top(call, obj, t->top[i].token, t->top[i].logprob);
        seen = seen || t->top[i].token == t->token;
    }
    if (rc == ERR_OK && !seen)
        rc = set_top(call, obj, t->token, t->logprob);
    if (rc != ERR_OK) {
        json_decref(obj);
        return NULL;
    }
    return obj;
}

static int add_text(const struct api_call *call, struct gen_choice *ch, json_t *list,
                    const struct gen_token *t)
{
    /* Nothing comes before the first token of a prompt, so nothing is likely. */
    const bool first = t->prompt && !ch->logged;
    ch->logged = true;
    struct buf name;
    buf_init(&name, SIZE_MAX);
    token_name(call, t->token, &name);
    int bad = json_array_append_new(json_object_get(list, "tokens"),
                                    json_text(name.data ? name.data : "", name.len));
    bad |= json_array_append_new(json_object_get(list, "token_logprobs"),
                                 first ? json_null() : json_real((double)t->logprob));
    bad |= json_array_append_new(json_object_get(list, "text_offset"),
                                 json_integer((json_int_t)ch->offset));
    if (call->top_logprobs > 0)
        bad |= json_array_append_new(json_object_get(list, "top_logprobs"),
                                     first ? json_null() : text_top(call, t));
    ch->offset += utf8_count(name.data ? name.data : "", name.len);
    buf_free(&name);
    return bad ? ERR_NOMEM : ERR_OK;
}

int gen_logprobs_add(const struct api_call *call, struct gen_choice *ch, json_t *logprobs,
                     const struct gen_token *t)
{
    return call->chat ? add_chat(call, logprobs, t) : add_text(call, ch, logprobs, t);
}

/* --- usage and replay ---------------------------------------------------------------------------- */

/* A prompt counts once, however many choices were made from it. */
json_t *gen_usage_json(const struct api_call *call)
{
    json_int_t prompt = 0, cached = 0, made = 0;
    for (int i = 0; i < call->nchoices; i++) {
        struct gen_usage u;
        gen_usage(call->choices[i].gen, &u);
        if (i % call->n == 0) {
            prompt += u.prompt_tokens;
            cached += u.cached_tokens;
        }
        if (!call->hide_output)
            made += u.completion_tokens;
    }
    return json_pack("{s:I, s:I, s:I, s:{s:I}, s:{s:i}}", "prompt_tokens", prompt,
                     "completion_tokens", made, "total_tokens", prompt + made,
                     "prompt_tokens_details", "cached_tokens", cached,
                     "completion_tokens_details", "reasoning_tokens", 0);
}

json_t *gen_replay_json(const struct api_call *call)
{
    const struct api *a = call->api;
    json_t *adapters = json_array();
    for (int i = 0; i < call->target.n; i++)
        json_array_append_new(adapters,
                              json_pack("{s:s, s:s, s:f}", "id", call->target.item[i].id, "sha256",
                                        call->target.item[i].hash, "weight",
                                        (double)call->target.item[i].use.weight));
    return json_pack("{s:s, s:s, s:o, s:s, s:I}", "base", a->o.base->name, "base_sha256",
                     a->o.base->hash_hex, "adapters", adapters, "precision",
                     precision_name(a->o.compute->precision), "seed", (json_int_t)call->seed);
}

/* --- whole answers -------------------------------------------------------------------------------- */

/* The members that answers and events share; takes `choices`. */
static json_t *envelope(const struct api_call *call, const char *object, json_t *choices)
{
    return json_pack("{s:s, s:s, s:I, s:s, s:s, s:o}", "id", call->id, "object", object, "created",
                     (json_int_t)call->created, "model", call->target.model, "system_fingerprint",
                     call->fingerprint, "choices", choices);
}

static json_t *choice_json(const struct api_call *call, const struct gen_choice *ch)
{
    const char *text = ch->text.data ? ch->text.data : "";
    const char *finish = gen_finish_name(ch->finish);
    json_t *logprobs = ch->logprobs ? json_incref(ch->logprobs) : json_null();
    if (call->chat)
        return json_pack("{s:i, s:{s:s, s:o, s:n}, s:o, s:s}", "index", ch->index, "message",
                         "role", "assistant", "content", json_text(text, ch->text.len), "refusal",
                         "logprobs", logprobs, "finish_reason", finish);
    json_t *whole;
    if (call->echo) {
        struct buf b;
        buf_init(&b, SIZE_MAX);
        buf_add(&b, ch->prompt->text, ch->prompt->text_len);
        buf_add(&b, text, ch->text.len);
        whole = json_text(b.data ? b.data : "", b.len);
        buf_free(&b);
    } else {
        whole = json_text(text, ch->text.len);
    }
    return json_pack("{s:i, s:o, s:o, s:s}", "index", ch->index, "text", whole, "logprobs",
                     logprobs, "finish_reason", finish);
}

json_t *gen_answer_json(const struct api_call *call)
{
    json_t *choices = json_array();
    for (int i = 0; i < call->nchoices; i++)
        if (json_array_append_new(choices, choice_json(call, &call->choices[i])) != 0) {
            json_decref(choices);
            return NULL;
        }
    json_t *j = envelope(call, call->chat ? "chat.completion" : "text_completion", choices);
    if (j != NULL && (json_object_set_new(j, "usage", gen_usage_json(call)) != 0 ||
                      json_object_set_new(j, "lorad", gen_replay_json(call)) != 0)) {
        json_decref(j);
        return NULL;
    }
    return j;
}

json_t *gen_chunk_json(const struct api_call *call, json_t *choices)
{
    json_t *j = envelope(call, call->chat ? "chat.completion.chunk" : "text_completion", choices);
    if (j != NULL && !call->opened) /* once is enough */
        json_object_set_new(j, "lorad", gen_replay_json(call));
    if (j != NULL && call->include_usage)
        json_object_set_new(j, "usage", json_null());
    return j;
}

json_t *gen_delta_json(const struct api_call *call, struct gen_choice *ch, const char *text,
                       size_t len, json_t *logprobs, const char *finish)
{
    json_t *lp = logprobs ? logprobs : json_null();
    if (!call->chat)
        return json_pack("{s:i, s:o, s:o, s:s?}", "index", ch->index, "text", json_text(text, len),
                         "logprobs", lp, "finish_reason", finish);
    json_t *delta = json_object();
    if (!ch->started)
        json_object_set_new(delta, "role", json_string("assistant"));
    if (finish == NULL)
        json_object_set_new(delta, "content", json_text(text, len));
    return json_pack("{s:i, s:o, s:o, s:s?}", "index", ch->index, "delta", delta, "logprobs", lp,
                     "finish_reason", finish);
}
