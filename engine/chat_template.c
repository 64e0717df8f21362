/* chat_template.c - OpenAI's messages to the variables of a chat template. */
#include "engine/chat_template.h"

#include "engine/jinja.h"

#include <stdlib.h>
#include <string.h>

/* What a template was written for. */
struct wants {
    bool parts;          /* content as an array only */
    bool text_arguments; /* arguments of tool calls as JSON text only */
    bool developer;      /* knows that role */
};

struct one {
    struct jinja *jinja;
    struct wants wants;
};

struct chat_template {
    struct one plain, tools; /* tools.jinja NULL: the same */
    json_t *tokens;          /* bos_token and the like */
};

/* --- messages ------------------------------------------------------------------------------------- */

/* Text parts as one string; anything else unchanged.  New references, here and below. */
static json_t *joined(json_t *content)
{
    struct buf b;
    buf_init(&b, (size_t)1 << 30);
    bool text = json_is_array(content);
    for (size_t i = 0; text && i < json_array_size(content); i++) {
        const json_t *s = json_object_get(json_array_get(content, i), "text");
        text = json_is_string(s) &&
               buf_add(&b, json_string_value(s), json_string_length(s)) == ERR_OK;
    }
    json_t *r = text ? json_stringn(b.data ? b.data : "", b.len) : json_incref(content);
    buf_free(&b);
    return r;
}

static json_t *as_parts(json_t *content)
{
    return json_is_string(content) ? json_pack("[{s:s, s:O}]", "type", "text", "text", content)
                                   : json_incref(content);
}

/* A tool call whose arguments are an object; NULL if memory is out. */
static json_t *call_with_object(json_t *call)
{
    json_t *function = json_object_get(call, "function");
    const json_t *text = json_object_get(function, "arguments");
    if (!json_is_string(text))
        return json_incref(call);
    json_t *arguments = json_loadb(json_string_value(text), json_string_length(text), 0, NULL);
    if (!json_is_object(arguments)) { /* not JSON: the template gets what was sent */
        json_decref(arguments);
        return json_incref(call);
    }
    json_t *c = json_copy(call), *f = json_copy(function);
    json_object_set_new(f, "arguments", arguments);
    json_object_set_new(c, "function", f);
    return c;
}

static json_t *calls_with_objects(const json_t *calls)
{
    json_t *r = json_array();
    for (size_t i = 0; i < json_array_size(calls); i++)
        json_array_append_new(r, call_with_object(json_array_get(calls, i)));
    return r;
}

static json_t *fit_message(json_t *m, const struct wants *w)
{
    json_t *r = json_copy(m);
    json_t *content = json_object_get(m, "content"), *calls = json_object_get(m, "tool_calls");
    const char *role = json_string_value(json_object_get(m, "role"));
    if (content != NULL)
        json_object_set_new(r, "content", w->parts ? as_parts(content) : joined(content));
    if (json_is_array(calls) && !w->text_arguments)
        json_object_set_new(r, "tool_calls", calls_with_objects(calls));
    if (role != NULL && strcmp(role, "developer") == 0 && !w->developer)
        json_object_set_new(r, "role", json_string("system"));
    return r;
}

static json_t *fit(const json_t *messages, size_t n, const struct wants *w)
{
    json_t *r = json_array();
    for (size_t i = 0; i < n; i++)
        if (json_array_append_new(r, fit_message(json_array_get(messages, i), w)) != 0) {
            json_decref(r);
            return NULL;
        }
    return r;
}

/* --- rendering ---------------------------------------------------------------------------------- */

static int render(const struct chat_template *t, const struct one *one,
                  const struct chat_turns *turns, const json_t *documents, const json_t *more,
                  const struct jinja_opts *opts, struct buf *ret, struct err *err)
{
    json_t *tools = (json_t *)turns->tools;
    json_t *v = json_copy(t->tokens);
    json_t *fitted = fit(turns->messages, turns->n, &one->wants);
    int rc = ERR_NOMEM;
    if (v != NULL && fitted != NULL && (more == NULL || json_object_update(v, (json_t *)more) == 0) &&
        json_object_set(v, "messages", fitted) == 0 &&
        json_object_set_new(v, "tools", tools ? json_incref(tools) : json_null()) == 0 &&
        json_object_set_new(v, "documents",
                            documents ? json_incref((json_t *)documents) : json_null()) == 0 &&
        json_object_set_new(v, "add_generation_prompt", json_boolean(!turns->whole)) == 0)
        rc = jinja_render(one->jinja, v, opts, ret, err);
    else
        err_nomem(err);
    json_decref(fitted);
    json_decref(v);
    return rc;
}

static const struct one *for_tools(const struct chat_template *t, const json_t *tools)
{
    return tools != NULL && t->tools.jinja != NULL ? &t->tools : &t->plain;
}

int chat_template_render(const struct chat_template *t, const json_t *messages,
                         const json_t *tools, const json_t *documents, const json_t *more,
                         struct buf *ret, struct err *err)
{
    const struct chat_turns turns = { .messages = messages, .n = json_array_size(messages),
                                      .tools = tools };
    return render(t, for_tools(t, tools), &turns, documents, more, NULL, ret, err);
}

int chat_template_turns(const struct chat_template *t, const struct chat_turns *turns,
                        struct buf *ret, struct err *err)
{
    const struct jinja_opts o = { .now = turns->now };
    return render(t, for_tools(t, turns->tools), turns, NULL, NULL, &o, ret, err);
}

/* --- finding out what a template wants ------------------------------------------------------------ */

/* All conversations of all templates of one file share these steps; templates of 18 models take 273 to
 * 966.  The memory is more than a loop can fill with so many steps. */
enum { PROBE_STEPS = 1000000, PROBE_MEMORY = 64 << 20, PROBE_OUTPUT = 1 << 20 };

struct probe {
    const struct chat_template *t;
    struct one *one;
    int64_t *left;   /* steps */
    struct err *err; /* ERR_TOO_LARGE is kept here, and ends it; other failures mean "no" */
};

/* Does the conversation render to text with `needle` in it? */
static bool shows(const struct probe *p, json_t *messages, const char *needle)
{
    const struct chat_turns turns = { .messages = messages, .n = json_array_size(messages) };
    const struct jinja_opts o = { .left = p->left, .memory = PROBE_MEMORY, .output = PROBE_OUTPUT };
    struct buf b;
    struct err err = { 0 };
    buf_init(&b, PROBE_OUTPUT);
    const bool yes = messages != NULL && p->err->code == ERR_OK &&
                     render(p->t, p->one, &turns, NULL, NULL, &o, &b, &err) == ERR_OK &&
                     b.data != NULL && strstr(b.data, needle) != NULL;
    if (err.code == ERR_TOO_LARGE)
        *p->err = err;
    buf_free(&b);
    json_decref(messages);
    return yes;
}

static json_t *talk(void)
{
    return json_pack("[{s:s, s:s}]", "role", "user", "content", "needle");
}

/* A call of a tool, written as OpenAI has it. */
static json_t *tool_talk(bool empty)
{
    json_t *content = empty ? json_null() : json_string("");
    return json_pack("[{s:s, s:s}, {s:s, s:o, s:[{s:s, s:s, s:{s:s, s:s}}]}]", "role", "user",
                     "content", "x", "role", "assistant", "content", content, "tool_calls", "id",
                     "abcdefghi", "type", "function", "function", "name", "f", "arguments",
                     "{\"needle\": \"x\"}");
}

static void probe(const struct probe *p, struct wants *w, const char *text)
{
    *w = (struct wants){ .developer = strstr(text, "developer") != NULL };
    if (!shows(p, talk(), "needle")) {
        w->parts = true;
        w->parts = shows(p, talk(), "needle");
    }
    for (int empty = 1; empty >= 0; empty--) {
        w->text_arguments = false;
        if (shows(p, tool_talk(empty != 0), "needle"))
            return;
        w->text_arguments = true;
        if (shows(p, tool_talk(empty != 0), "{\"needle\": \"x\"}"))
            return;
    }
    w->text_arguments = false; /* knows no tools */
}

/* --- opening ---------------------------------------------------------------------------------------- */

/* A token is a string, or an object whose `content` is one. */
static json_t *token(json_t *v)
{
    json_t *content = json_is_object(v) ? json_object_get(v, "content") : v;
    return json_is_string(content) ? content : NULL;
}

static int take_tokens(struct chat_template *t, const json_t *config, struct err *err)
{
    static const char *const names[] = { "bos_token", "eos_token", "unk_token", "sep_token",
                                         "pad_token", "cls_token", "mask_token" };
    t->tokens = json_object();
    int bad = t->tokens == NULL;
    for (size_t i = 0; i < sizeof names / sizeof names[0] && !bad; i++) {
        json_t *v = token(json_object_get(config, names[i]));
        bad = v != NULL && json_object_set(t->tokens, names[i], v) != 0;
    }
    json_t *list = json_object_get(config, "additional_special_tokens");
    json_t *extra = json_is_array(list) && json_array_size(list) > 0 ? json_array() : NULL;
    for (size_t i = 0; extra != NULL && i < json_array_size(list); i++) {
        json_t *v = token(json_array_get(list, i));
        bad |= v != NULL && json_array_append(extra, v) != 0;
    }
    if (extra != NULL)
        bad |= json_object_set_new(t->tokens, "additional_special_tokens", extra);
    return bad ? err_nomem(err) : ERR_OK;
}

static const char *named(const json_t *list, const char *name)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *e = json_array_get(list, i);
        const char *n = json_string_value(json_object_get(e, "name"));
        if (n != NULL && strcmp(n, name) == 0)
            return json_string_value(json_object_get(e, "template"));
    }
    return NULL;
}

static int open_one(struct chat_template *t, struct one *one, const char *name, const char *text,
                    int64_t *left, struct err *err)
{
    struct err why = { 0 };
    int rc = jinja_parse(name, text, strlen(text), &one->jinja, err);
    if (rc != ERR_OK)
        return rc;
    probe(&(struct probe){ .t = t, .one = one, .left = left, .err = &why }, &one->wants, text);
    return why.code != ERR_OK ? err_set(err, why.code, "%s", why.msg) : ERR_OK;
}

int chat_template_open(const char *name, const char *text, const char *tokenizer_config,
                       struct chat_template **ret, struct err *err)
{
    struct chat_template *t = calloc(1, sizeof *t);
    if (t == NULL)
        return err_nomem(err);
    json_t *config = tokenizer_config ? json_loads(tokenizer_config, 0, NULL) : NULL;
    const json_t *list = json_object_get(config, "chat_template");
    const char *same = named(list, "default"), *tools = named(list, "tool_use");
    int64_t left = PROBE_STEPS;
    int rc = take_tokens(t, config, err);
    if (rc == ERR_OK)
        rc = open_one(t, &t->plain, name, text, &left, err);
    if (rc == ERR_OK && same != NULL && tools != NULL && strcmp(same, text) == 0) {
        struct buf b;
        buf_init(&b, 4096);
        rc = buf_printf(&b, "%.2000s (tool_use)", name) == ERR_OK
                 ? open_one(t, &t->tools, b.data, tools, &left, err) : err_nomem(err);
        buf_free(&b);
    }
    json_decref(config);
    if (rc != ERR_OK) {
        chat_template_free(t);
        return rc;
    }
    *ret = t;
    return ERR_OK;
}

void chat_template_free(struct chat_template *t)
{
    if (t == NULL)
        return;
    jinja_free(t->plain.jinja);
    jinja_free(t->tools.jinja);
    json_decref(t->tokens);
    free(t);
}
