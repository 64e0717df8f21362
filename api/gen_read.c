/* gen_read.c - reading the engine's output: an answer in one piece, or server-sent events.
 *
 * The engine appends to one log per choice; this side reads from where it stopped, a few tokens at
 * a time, when it is woken or when the client has taken what there was.  Nothing is kept for a
 * slow client besides those logs.
 *
 * A stream's headers go out with its first token, so that what fails before (an adapter that
 * cannot be loaded) is still an error with a status of its own. */
#include "api/gen.h"

#include <stdlib.h>
#include <string.h>

/* What is new in a choice. */
struct news {
    size_t n;        /* tokens in call->tokens */
    struct buf text;
    enum gen_finish finish; /* GEN_RUNNING: more may come */
};

static void read_news(struct api_call *call, struct gen_choice *ch, struct news *ret)
{
    const size_t max = sizeof call->tokens / sizeof call->tokens[0];
    *ret = (struct news){ 0 };
    buf_init(&ret->text, SIZE_MAX);
    ret->n = gen_read(ch->gen, ch->ntokens, call->tokens, max, ch->text_from, &ret->text,
                      &ret->finish);
    /* Text of tokens that were not handed out yet comes with them. */
    if (ret->finish == GEN_RUNNING) {
        const size_t end = ret->n ? call->tokens[ret->n - 1].text_end : ch->text_from;
        const size_t keep = end > ch->text_from ? end - ch->text_from : 0;
        if (keep < ret->text.len)
            ret->text.len = keep;
    }
    ch->ntokens += ret->n;
    ch->text_from += ret->text.len;
    if (call->hide_output)
        ret->text.len = 0;
}

/* Why a choice has no good end; ERR_OK if it has (or has none yet). */
static int failure(const struct gen_choice *ch, enum gen_finish finish, struct err *err)
{
    switch (finish) {
    case GEN_ERROR:
        gen_error(ch->gen, err);
        return err->code != ERR_OK ? (int)err->code : err_nomem(err);
    case GEN_CANCELLED:
        return err_set(err, ERR_CANCELLED, "the generation was cut off: the server is shutting "
                       "down");
    case GEN_DEADLINE:
        return err_set_slug(err, ERR_UNAVAILABLE, "deadline_exceeded", NULL,
                            "the generation took longer than a request may; ask for fewer tokens "
                            "or raise --request-timeout");
    default:
        return ERR_OK;
    }
}

static int add_logprobs(struct api_call *call, struct gen_choice *ch, json_t *list, size_t n,
                        struct err *err)
{
    for (size_t i = 0; i < n; i++) {
        if (call->hide_output && !call->tokens[i].prompt)
            continue;
        if (gen_logprobs_add(call, ch, list, &call->tokens[i]) != ERR_OK)
            return err_nomem(err);
    }
    return ERR_OK;
}

/* --- an answer in one piece -------------------------------------------------------------------- */

static int collect_choice(struct api_call *call, struct gen_choice *ch, struct err *err)
{
    struct news w;
    int rc = ERR_OK;
    if (call->logprobs && ch->logprobs == NULL) {
        ch->logprobs = gen_logprobs_new(call);
        if (ch->logprobs == NULL)
            return err_nomem(err);
    }
    do {
        read_news(call, ch, &w);
        if (buf_add(&ch->text, w.text.data, w.text.len) != ERR_OK)
            rc = err_nomem(err);
        buf_free(&w.text);
        if (rc == ERR_OK && call->logprobs)
            rc = add_logprobs(call, ch, ch->logprobs, w.n, err);
        if (rc == ERR_OK)
            rc = failure(ch, w.finish, err);
    } while (rc == ERR_OK && w.finish == GEN_RUNNING && w.n > 0);
    ch->done = w.finish != GEN_RUNNING;
    ch->finish = w.finish;
    return rc;
}

/* True when *ret is the answer or an error. */
static bool collect(struct api_call *call, struct api_resp *ret)
{
    struct err err = { 0 };
    int rc = ERR_OK;
    bool all = true;
    for (int i = 0; i < call->nchoices && rc == ERR_OK; i++) {
        if (!call->choices[i].done)
            rc = collect_choice(call, &call->choices[i], &err);
        all = all && call->choices[i].done;
    }
    if (rc == ERR_OK && !all)
        return false;
    if (rc == ERR_OK)
        rc = resp_json_to(ret, 200, gen_answer_json(call), &err);
    if (rc != ERR_OK)
        api_resp_error(ret, &err);
    return true;
}

/* --- events -------------------------------------------------------------------------------------- */

static int dump_to_buf(const char *s, size_t len, void *ud)
{
    return buf_add(ud, s, len) == ERR_OK ? 0 : -1;
}

/* "data: {...}\n\n"; takes `j`. */
static int event(struct buf *out, json_t *j)
{
    int rc = j == NULL ? ERR_NOMEM : buf_puts(out, "data: ");
    if (rc == ERR_OK &&
        json_dump_callback(j, dump_to_buf, out, JSON_COMPACT | JSON_REAL_PRECISION(9)) != 0)
        rc = ERR_NOMEM;
    if (rc == ERR_OK)
        rc = buf_puts(out, "\n\n");
    json_decref(j);
    return rc;
}

static int choice_event(struct api_call *call, struct gen_choice *ch, const char *text, size_t len,
                        json_t *logprobs, const char *finish, struct buf *out)
{
    json_t *delta = gen_delta_json(call, ch, text, len, logprobs, finish);
    int rc = event(out, delta ? gen_chunk_json(call, json_pack("[o]", delta)) : NULL);
    call->opened = true;
    return rc;
}

/* The role (chat), or the prompt (completions with echo). */
static int first_event(struct api_call *call, struct gen_choice *ch, struct buf *out)
{
    const bool needed = call->chat || call->echo;
    int rc = ERR_OK;
    if (needed) /* gen_delta_json() adds the role while started is false */
        rc = choice_event(call, ch, call->echo ? ch->prompt->text : "",
                          call->echo ? ch->prompt->text_len : 0, NULL, NULL, out);
    ch->started = true;
    return rc;
}

static int stream_choice(struct api_call *call, struct gen_choice *ch, struct buf *out,
                         struct err *err)
{
    struct news w;
    json_t *logprobs = NULL;
    read_news(call, ch, &w);
    bool any = w.n > 0;
    /* Tokens without text make no event, and nobody may wake us for those after them. */
    while (w.n > 0 && w.text.len == 0 && w.finish == GEN_RUNNING && !call->logprobs) {
        buf_free(&w.text);
        read_news(call, ch, &w);
    }
    any = any || w.n > 0 || w.finish != GEN_RUNNING;
    int rc = failure(ch, w.finish, err);
    if (rc == ERR_OK && !ch->started && any)
        rc = first_event(call, ch, out);
    if (rc == ERR_OK && call->logprobs && w.n > 0) {
        logprobs = gen_logprobs_new(call);
        rc = logprobs ? add_logprobs(call, ch, logprobs, w.n, err) : err_nomem(err);
    }
    if (rc == ERR_OK && (w.text.len > 0 || logprobs != NULL)) {
        rc = choice_event(call, ch, w.text.data ? w.text.data : "", w.text.len, logprobs, NULL,
                          out);
        logprobs = NULL;
    }
    if (rc == ERR_OK && w.finish != GEN_RUNNING) {
        ch->done = true;
        rc = choice_event(call, ch, "", 0, NULL, gen_finish_name(w.finish), out);
    }
    json_decref(logprobs);
    buf_free(&w.text);
    if (rc != ERR_OK && err->code == ERR_OK)
        err_nomem(err);
    return rc;
}

static bool stream_next(void *ud, struct buf *out)
{
    struct api_call *call = ud;
    struct err err = { 0 };
    bool all = true;
    if (call->failed)
        return false;
    for (int i = 0; i < call->nchoices && err.code == ERR_OK; i++) {
        if (!call->choices[i].done)
            stream_choice(call, &call->choices[i], out, &err);
        all = all && call->choices[i].done;
    }
    if (err.code != ERR_OK) { /* one choice failed: the request did */
        call->failed = true;
        event(out, error_json(&err));
        return false;
    }
    if (!all)
        return true;
    if (call->include_usage && !call->usage_sent) {
        json_t *j = gen_chunk_json(call, json_array());
        json_object_set_new(j, "usage", gen_usage_json(call));
        call->usage_sent = true;
        event(out, j);
    }
    buf_puts(out, "data: [DONE]\n\n");
    return false;
}

static void stream_close(void *ud) { gen_call_free(ud); }

/* True when the first token is there, or an error instead of it. */
static bool open_stream(struct api_call *call, struct api_resp *ret, bool *ret_taken)
{
    struct err err = { 0 };
    bool any = false;
    for (int i = 0; i < call->nchoices && err.code == ERR_OK; i++) {
        enum gen_finish finish;
        const size_t n = gen_read(call->choices[i].gen, 0, call->tokens, 1, 0, NULL, &finish);
        any = any || n > 0 || finish != GEN_RUNNING;
        if (n == 0)
            failure(&call->choices[i], finish, &err);
    }
    if (err.code != ERR_OK) {
        api_resp_error(ret, &err);
        return true;
    }
    if (!any)
        return false;
    ret->status = 200;
    ret->type = "text/event-stream";
    api_resp_header(ret, "Cache-Control", "no-cache");
    api_resp_header(ret, "X-Accel-Buffering", "no");
    ret->stream = (struct api_stream){ .next = stream_next, .close = stream_close, .ud = call };
    *ret_taken = true;
    return true;
}

/* --- the call ------------------------------------------------------------------------------------- */

bool api_continue(struct api_call *call, struct api_resp *ret)
{
    bool taken = false;
    if (!(call->stream ? open_stream(call, ret, &taken) : collect(call, ret)))
        return false;
    if (!taken)
        gen_call_free(call);
    return true;
}

void api_abandon(struct api_call *call) { gen_call_free(call); }
