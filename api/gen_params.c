/* gen_params.c - every field that a generation may carry, in one table.
 *
 * A field is read exactly, or it has no say in the result and is let pass, or it is refused by
 * name: a client that asks for tools or JSON must not get plain text that looks like an answer.
 * Fields that are refused may still be sent with the value that means "nothing" (null, [], 1),
 * as client libraries do. */
#include "api/gen.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum kind {
    F_BOOL,
    F_INT,
    F_NUMBER,
    F_OWN,     /* a reader below */
    F_LATER,   /* read by the route itself: the prompt */
    F_PASS,    /* changes nothing in the result */
    F_REFUSE,  /* unless it says "nothing" */
};
enum { CHAT = 1, TEXT = 2, BOTH = 3 };

typedef int (*reader)(const json_t *v, const char *name, struct gen_params *p, struct err *err);
static int read_model(const json_t *v, const char *name, struct gen_params *p, struct err *err);
static int read_adapters(const json_t *v, const char *name, struct gen_params *p, struct err *err);
static int read_stop(const json_t *v, const char *name, struct gen_params *p, struct err *err);
static int read_seed(const json_t *v, const char *name, struct gen_params *p, struct err *err);
static int read_bias(const json_t *v, const char *name, struct gen_params *p, struct err *err);
static int read_options(const json_t *v, const char *name, struct gen_params *p, struct err *err);
static int read_logprobs(const json_t *v, const char *name, struct gen_params *p, struct err *err);

#define AT(member) offsetof(struct gen_params, member)

static const struct field {
    const char *name;
    int where;
    enum kind kind;
    size_t at;       /* int, float or bool in struct gen_params */
    double lo, hi;
    reader read;
    const char *nothing; /* F_REFUSE: JSON of the value that may be sent; null and [] always may */
} fields[] = {
    { "messages", CHAT, F_LATER, 0, 0, 0, NULL, NULL },
    { "tools", CHAT, F_LATER, 0, 0, 0, NULL, NULL },
    { "tool_choice", CHAT, F_LATER, 0, 0, 0, NULL, NULL },
    { "documents", CHAT, F_LATER, 0, 0, 0, NULL, NULL },
    { "chat_template_kwargs", CHAT, F_LATER, 0, 0, 0, NULL, NULL },
    { "prompt", TEXT, F_LATER, 0, 0, 0, NULL, NULL },
    { "model", BOTH, F_OWN, 0, 0, 0, read_model, NULL },
    { "adapters", BOTH, F_OWN, 0, 0, 0, read_adapters, NULL },
    { "max_tokens", BOTH, F_INT, AT(max_tokens), 0, 1 << 24, NULL, NULL },
    { "max_completion_tokens", CHAT, F_INT, AT(max_tokens), 1, 1 << 24, NULL, NULL },
    { "n", BOTH, F_INT, AT(n), 1, GEN_MAX_CHOICES, NULL, NULL },
    { "stop", BOTH, F_OWN, 0, 0, 0, read_stop, NULL },
    { "seed", BOTH, F_OWN, 0, 0, 0, read_seed, NULL },
    { "stream", BOTH, F_BOOL, AT(stream), 0, 0, NULL, NULL },
    { "stream_options", BOTH, F_OWN, 0, 0, 0, read_options, NULL },
    { "echo", TEXT, F_BOOL, AT(echo), 0, 0, NULL, NULL },
    { "logprobs", BOTH, F_OWN, 0, 0, 0, read_logprobs, NULL },
    { "top_logprobs", CHAT, F_INT, AT(top_logprobs), 0, SAMPLE_TOP_MAX, NULL, NULL },
    { "logit_bias", BOTH, F_OWN, 0, 0, 0, read_bias, NULL },
    { "temperature", BOTH, F_NUMBER, AT(sample.temperature), 0, 2, NULL, NULL },
    { "top_p", BOTH, F_NUMBER, AT(sample.top_p), 0, 1, NULL, NULL },
    { "presence_penalty", BOTH, F_NUMBER, AT(sample.presence_penalty), -2, 2, NULL, NULL },
    { "frequency_penalty", BOTH, F_NUMBER, AT(sample.frequency_penalty), -2, 2, NULL, NULL },
    /* not OpenAI's, but spelled alike by other servers */
    { "top_k", BOTH, F_INT, AT(sample.top_k), -1, 1 << 24, NULL, NULL },
    { "min_p", BOTH, F_NUMBER, AT(sample.min_p), 0, 1, NULL, NULL },
    { "repetition_penalty", BOTH, F_NUMBER, AT(sample.repetition_penalty), 0.01, 100, NULL, NULL },
    { "ignore_eos", BOTH, F_BOOL, AT(ignore_eos), 0, 0, NULL, NULL },
    /* for the caller's own books */
    { "user", BOTH, F_PASS, 0, 0, 0, NULL, NULL },
    { "metadata", BOTH, F_PASS, 0, 0, 0, NULL, NULL },
    { "store", BOTH, F_PASS, 0, 0, 0, NULL, NULL },
    { "service_tier", BOTH, F_PASS, 0, 0, 0, NULL, NULL },
    { "safety_identifier", BOTH, F_PASS, 0, 0, 0, NULL, NULL },
    { "prompt_cache_key", BOTH, F_PASS, 0, 0, 0, NULL, NULL },
    { "prompt_cache_retention", BOTH, F_PASS, 0, 0, 0, NULL, NULL },
    { "parallel_tool_calls", CHAT, F_PASS, 0, 0, 0, NULL, NULL },
    { "prediction", CHAT, F_PASS, 0, 0, 0, NULL, NULL }, /* a hint for speed */
    /* would change the result */
    { "best_of", TEXT, F_REFUSE, 0, 0, 0, NULL, "1" },
    { "suffix", TEXT, F_REFUSE, 0, 0, 0, NULL, "\"\"" },
    { "functions", CHAT, F_REFUSE, 0, 0, 0, NULL, NULL },
    { "function_call", CHAT, F_REFUSE, 0, 0, 0, NULL, "\"none\"" },
    { "response_format", BOTH, F_REFUSE, 0, 0, 0, NULL, "{\"type\":\"text\"}" },
    { "modalities", CHAT, F_REFUSE, 0, 0, 0, NULL, "[\"text\"]" },
    { "audio", CHAT, F_REFUSE, 0, 0, 0, NULL, NULL },
    { "reasoning_effort", CHAT, F_REFUSE, 0, 0, 0, NULL, "\"none\"" },
    { "verbosity", CHAT, F_REFUSE, 0, 0, 0, NULL, NULL },
    { "web_search_options", CHAT, F_REFUSE, 0, 0, 0, NULL, NULL },
};

static int wrong(const char *name, const char *want, const json_t *v, struct err *err)
{
    return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must be %s, not %s", name, want,
                        json_kind(v));
}

static int read_number(const struct field *f, const json_t *v, struct gen_params *p,
                       struct err *err)
{
    if (f->kind == F_INT ? !json_is_integer(v) : !json_is_number(v))
        return wrong(f->name, f->kind == F_INT ? "an integer" : "a number", v, err);
    const double x = json_number_value(v);
    if (!(x >= f->lo && x <= f->hi))
        return err_set_slug(err, ERR_INVALID, NULL, f->name,
                            f->kind == F_INT ? "`%s` must be from %.0f to %.0f, not %.0f"
                                             : "`%s` must be from %g to %g, not %g",
                            f->name, f->lo, f->hi, x);
    char *at = (char *)p + f->at;
    if (f->kind == F_INT)
        *(int *)(void *)at = (int)x;
    else
        *(float *)(void *)at = (float)x;
    return ERR_OK;
}

static int refuse(const struct field *f, const json_t *v, struct err *err)
{
    if (json_is_array(v) && json_array_size(v) == 0)
        return ERR_OK;
    json_t *nothing = f->nothing ? json_loads(f->nothing, JSON_DECODE_ANY, NULL) : NULL;
    const bool fine = nothing != NULL && json_equal(nothing, v);
    json_decref(nothing);
    if (fine)
        return ERR_OK;
    return err_set_slug(err, ERR_INVALID, "unsupported_parameter", f->name,
                        "`%s` is not supported here%s%s: leave it out", f->name,
                        f->nothing ? " other than as " : "", f->nothing ? f->nothing : "");
}

static int read_field(const struct field *f, const json_t *v, struct gen_params *p,
                      struct err *err)
{
    switch (f->kind) {
    case F_LATER:
    case F_PASS:
        return ERR_OK;
    case F_REFUSE:
        return refuse(f, v, err);
    case F_OWN:
        return f->read(v, f->name, p, err);
    case F_BOOL:
        if (!json_is_boolean(v))
            return wrong(f->name, "true or false", v, err);
        *(bool *)(void *)((char *)p + f->at) = json_is_true(v);
        return ERR_OK;
    default:
        return read_number(f, v, p, err);
    }
}

/* What belongs together. */
static int check(struct gen_params *p, json_t *body, struct err *err)
{
    if (p->chat && p->top_logprobs > 0 && !p->logprobs)
        return err_set_slug(err, ERR_INVALID, NULL, "top_logprobs",
                            "`top_logprobs` needs `logprobs`: true");
    if (p->include_usage && !p->stream)
        return err_set_slug(err, ERR_INVALID, NULL, "stream_options",
                            "`stream_options` needs `stream`: true");
    if (p->max_tokens == 0 && !p->echo)
        return err_set_slug(err, ERR_INVALID, NULL, "max_tokens",
                            "`max_tokens` must be at least 1%s",
                            p->chat ? "" : " (0 is for `echo`: true alone)");
    if (json_object_get(body, "max_tokens") && json_object_get(body, "max_completion_tokens") &&
        !json_equal(json_object_get(body, "max_tokens"),
                    json_object_get(body, "max_completion_tokens")))
        return err_set_slug(err, ERR_INVALID, NULL, "max_tokens",
                            "`max_tokens` and `max_completion_tokens` disagree: send one");
    if (p->sample.top_k == -1) /* another spelling of "off" */
        p->sample.top_k = 0;
    if (p->sample.top_p == 0.0f) /* the most likely token alone, which greedy is */
        p->sample.top_p = 1.0f, p->sample.temperature = 0.0f;
    p->sample.top_logprobs = p->logprobs ? p->top_logprobs : -1;
    p->sample.bias = p->bias;
    return ERR_OK;
}

int gen_params_parse(json_t *body, bool chat, int vocab, struct gen_params *ret, struct err *err)
{
    struct gen_params p = { .chat = chat, .n = 1, .max_tokens = -1 };
    sample_defaults(&p.sample);
    const char *key;
    json_t *v;
    int rc = ERR_OK;
    json_object_foreach(body, key, v)
    {
        const struct field *f = NULL;
        for (size_t i = 0; i < sizeof fields / sizeof fields[0] && f == NULL; i++)
            if (strcmp(fields[i].name, key) == 0 && (fields[i].where & (chat ? CHAT : TEXT)))
                f = &fields[i];
        if (f == NULL)
            rc = err_set_slug(err, ERR_INVALID, "unknown_parameter", NULL,
                              "unknown field `%.80s`", key);
        else if (!json_is_null(v))
            rc = read_field(f, v, &p, err);
        if (rc != ERR_OK)
            break;
    }
    if (rc == ERR_OK)
        rc = check(&p, body, err);
    if (rc == ERR_OK)
        rc = sample_check(&p.sample, vocab, err);
    if (rc != ERR_OK) {
        gen_params_free(&p);
        return rc;
    }
    *ret = p;
    return ERR_OK;
}

void gen_params_free(struct gen_params *p)
{
    free(p->bias);
    p->bias = NULL;
    p->sample.bias = NULL;
    p->sample.nbias = 0;
}

/* --- readers --------------------------------------------------------------------------------- */

static int read_model(const json_t *v, const char *name, struct gen_params *p, struct err *err)
{
    if (!json_is_string(v))
        return wrong(name, "a string", v, err);
    if (strlen(json_string_value(v)) != json_string_length(v) || json_string_length(v) == 0)
        return err_set_slug(err, ERR_INVALID, NULL, name,
                            "`model` must be the name of a model: GET /v1/models lists them");
    p->model = json_string_value(v);
    return ERR_OK;
}

/* [{"name": "support", "weight": 0.5}, ...] */
static int read_adapters(const json_t *v, const char *name, struct gen_params *p, struct err *err)
{
    if (!json_is_array(v))
        return wrong(name, "an array of {\"name\", \"weight\"}", v, err);
    if (json_array_size(v) > LORA_SET_MAX)
        return err_set_slug(err, ERR_INVALID, NULL, name,
                            "`adapters` may name at most %d, not %zu", LORA_SET_MAX,
                            json_array_size(v));
    for (size_t i = 0; i < json_array_size(v); i++) {
        static const char *const known[] = { "name", "weight", NULL };
        json_t *one = json_array_get(v, i);
        const json_t *weight = json_object_get(one, "weight");
        const char *text = NULL;
        double w = 1;
        if (!json_is_object(one))
            return err_set_slug(err, ERR_INVALID, NULL, name,
                                "`adapters`[%zu] must be an object {\"name\", \"weight\"}, not %s",
                                i, json_kind(one));
        int rc = json_only(one, known, err);
        if (rc == ERR_OK)
            rc = json_get_str(one, "name", &text, err);
        if (rc != ERR_OK)
            return rc;
        if (text == NULL)
            return err_set_slug(err, ERR_INVALID, NULL, name, "`adapters`[%zu] has no `name`", i);
        if (weight != NULL && !json_is_null(weight)) {
            if (!json_is_number(weight))
                return err_set_slug(err, ERR_INVALID, NULL, name,
                                    "the `weight` of `adapters`[%zu] must be a number, not %s", i,
                                    json_kind(weight));
            w = json_number_value(weight);
        }
        if (!(fabs(w) <= 100))
            return err_set_slug(err, ERR_INVALID, NULL, name,
                                "the `weight` of `adapters`[%zu] must be from -100 to 100, not %g",
                                i, w);
        p->adapters[p->nadapters].name = text;
        p->adapters[p->nadapters++].weight = w;
    }
    return ERR_OK;
}

static int read_stop(const json_t *v, const char *name, struct gen_params *p, struct err *err)
{
    const bool one = json_is_string(v);
    if (!one && !json_is_array(v))
        return wrong(name, "a string or an array of strings", v, err);
    const size_t n = one ? 1 : json_array_size(v);
    if (n > STOP_MAX)
        return err_set_slug(err, ERR_INVALID, NULL, name,
                            "`stop` may have at most %d strings, not %zu", STOP_MAX, n);
    for (size_t i = 0; i < n; i++) {
        const json_t *s = one ? v : json_array_get(v, i);
        if (!json_is_string(s))
            return err_set_slug(err, ERR_INVALID, NULL, name,
                                "`stop`[%zu] must be a string, not %s", i, json_kind(s));
        const size_t len = json_string_length(s);
        if (len == 0 || len > GEN_STOP_LEN || strlen(json_string_value(s)) != len)
            return err_set_slug(err, ERR_INVALID, NULL, name,
                                "`stop`[%zu] must have 1 to %d bytes and no NUL, not %zu bytes", i,
                                GEN_STOP_LEN, len);
        p->stop[p->nstop++] = json_string_value(s);
    }
    return ERR_OK;
}

static int read_seed(const json_t *v, const char *name, struct gen_params *p, struct err *err)
{
    if (!json_is_integer(v))
        return wrong(name, "an integer", v, err);
    p->sample.seed = (uint64_t)json_integer_value(v);
    p->seeded = true;
    return ERR_OK;
}

/* {"token id": bias} */
static int read_bias(const json_t *v, const char *name, struct gen_params *p, struct err *err)
{
    if (!json_is_object(v))
        return wrong(name, "an object from token ids to numbers", v, err);
    const size_t n = json_object_size(v);
    if (n > SAMPLE_BIAS_MAX)
        return err_set_slug(err, ERR_INVALID, NULL, name,
                            "`logit_bias` may name at most %d tokens, not %zu", SAMPLE_BIAS_MAX, n);
    p->bias = malloc((n + 1) * sizeof *p->bias);
    if (p->bias == NULL)
        return err_nomem(err);
    const char *key;
    json_t *b;
    json_object_foreach((json_t *)v, key, b)
    {
        char *end;
        const long id = strtol(key, &end, 10);
        const bool zeros = key[0] == '0' && key[1] != '\0'; /* "05" beside "5" is the same token */
        if (key[0] < '0' || key[0] > '9' || *end != '\0' || id > INT32_MAX || zeros)
            return err_set_slug(err, ERR_INVALID, NULL, name,
                                "\"%.40s\" in `logit_bias` is not a token id", key);
        if (!json_is_number(b) || !(fabs(json_number_value(b)) <= 100))
            return err_set_slug(err, ERR_INVALID, NULL, name,
                                "the bias of token %ld must be a number from -100 to 100", id);
        p->bias[p->sample.nbias++] = (struct sample_bias){ (int32_t)id,
                                                           (float)json_number_value(b) };
    }
    return ERR_OK;
}

static int read_options(const json_t *v, const char *name, struct gen_params *p, struct err *err)
{
    static const char *const known[] = { "include_usage", "include_obfuscation", NULL };
    if (!json_is_object(v))
        return wrong(name, "an object", v, err);
    int rc = json_only((json_t *)v, known, err);
    if (rc == ERR_OK)
        rc = json_get_bool((json_t *)v, "include_usage", &p->include_usage, err);
    return rc;
}

/* Chat: a boolean beside top_logprobs.  Completions: how many alternatives. */
static int read_logprobs(const json_t *v, const char *name, struct gen_params *p, struct err *err)
{
    if (p->chat) {
        if (!json_is_boolean(v))
            return wrong(name, "true or false", v, err);
        p->logprobs = json_is_true(v);
        return ERR_OK;
    }
    if (json_is_false(v))
        return ERR_OK;
    if (!json_is_integer(v))
        return wrong(name, "an integer", v, err);
    const json_int_t n = json_integer_value(v);
    if (n < 0 || n > SAMPLE_TOP_MAX)
        return err_set_slug(err, ERR_INVALID, NULL, name,
                            "`logprobs` must be from 0 to %d, not %lld", SAMPLE_TOP_MAX,
                            (long long)n);
    p->logprobs = true;
    p->top_logprobs = (int)n;
    return ERR_OK;
}
