/* chat.c - /v1/chat/completions and /apply-template: messages become one prompt.
 *
 * chat_render() is the one place that does it.  A base's chat template gets the messages as they
 * were sent, after a check of what every template relies on; it writes its own special tokens.  A
 * base without one gets plain lines with the speaker's role, and generation stops where the next
 * user line would begin. */
#include "api/gen.h"
#include "engine/chat_messages.h"

#include <stdlib.h>
#include <string.h>

/* A rendered conversation. */
struct rendered {
    struct buf text;
    bool add_special;   /* run the tokenizer's post-processor (BOS) */
    bool parse_special; /* markers in the text are tokens */
    const char *stop;   /* ends the turn, or NULL */
};

/* A list of objects; null and [] are as good as absent. */
static int get_list(const json_t *body, const char *name, const json_t **ret, struct err *err)
{
    const json_t *v = json_object_get(body, name);
    *ret = NULL;
    if (v == NULL || json_is_null(v) || (json_is_array(v) && json_array_size(v) == 0))
        return ERR_OK;
    if (!json_is_array(v))
        return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must be an array of objects, not %s",
                            name, json_kind(v));
    for (size_t i = 0; i < json_array_size(v); i++)
        if (!json_is_object(json_array_get(v, i)))
            return err_set_slug(err, ERR_INVALID, NULL, name, "`%s`[%zu] must be an object, not %s",
                                name, i, json_kind(json_array_get(v, i)));
    *ret = v;
    return ERR_OK;
}

/* "auto" gives the tools to the template, "none" does not; the answer is text in any case, so a call
 * cannot be promised. */
static int read_choice(const json_t *body, const json_t **tools, struct err *err)
{
    const json_t *v = json_object_get(body, "tool_choice");
    const char *s = json_string_value(v);
    if (v == NULL || json_is_null(v) || (s != NULL && strcmp(s, "auto") == 0))
        return ERR_OK;
    if (s == NULL || strcmp(s, "none") != 0)
        return err_set_slug(err, ERR_INVALID, "unsupported_parameter", "tool_choice",
                            "`tool_choice` is not supported here other than as \"auto\" or \"none\": "
                            "leave it out");
    *tools = NULL;
    return ERR_OK;
}

static int get_more(const json_t *body, const json_t **ret, struct err *err)
{
    static const char name[] = "chat_template_kwargs";
    static const char *const taken[] = { "messages", "tools", "documents", "add_generation_prompt" };
    const json_t *v = json_object_get(body, name);
    *ret = NULL;
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_object(v))
        return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must be an object, not %s", name,
                            json_kind(v));
    for (size_t i = 0; i < sizeof taken / sizeof taken[0]; i++)
        if (json_object_get(v, taken[i]) != NULL)
            return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` cannot set `%s`", name,
                                taken[i]);
    *ret = json_object_size(v) > 0 ? v : NULL;
    return ERR_OK;
}

static int chat_render(const struct api *a, const json_t *body, struct rendered *r, struct err *err)
{
    const json_t *messages = json_object_get(body, "messages"), *tools, *documents, *more;
    if (!json_is_array(messages) || json_array_size(messages) == 0)
        return err_set_slug(err, ERR_INVALID, NULL, "messages",
                            "`messages` must be an array with at least one message");
    int rc = get_list(body, "tools", &tools, err);
    if (rc == ERR_OK)
        rc = read_choice(body, &tools, err);
    if (rc == ERR_OK)
        rc = get_list(body, "documents", &documents, err);
    if (rc == ERR_OK)
        rc = get_more(body, &more, err);
    if (rc != ERR_OK)
        return rc;
    if (a->o.chat_template == NULL) {
        if (tools != NULL || documents != NULL || more != NULL)
            return err_set_slug(err, ERR_INVALID, "unsupported_parameter",
                                tools ? "tools" : documents ? "documents" : "chat_template_kwargs",
                                "`%s` needs a chat template, and %s has none", tools ? "tools"
                                : documents ? "documents" : "chat_template_kwargs", a->o.base->name);
        r->add_special = true;
        r->stop = CHAT_LINES_STOP;
        return chat_lines_render(messages, json_array_size(messages), &r->text, err);
    }
    rc = chat_messages_check(messages, err);
    if (rc == ERR_OK)
        rc = chat_template_render(a->o.chat_template, messages, tools, documents, more, &r->text,
                                  err);
    r->parse_special = true; /* the template wrote <s> and the like itself */
    return rc;
}

/* --- the routes ---------------------------------------------------------------------------------- */

static void rendered_init(const struct api *a, struct rendered *r)
{
    *r = (struct rendered){ 0 };
    buf_init(&r->text, 2 * a->o.max_json_bytes + ((size_t)1 << 20));
}

static int run(struct api_ctx *c, json_t *body, struct gen_params *p, struct gen_target *target,
               struct err *err)
{
    struct rendered r;
    rendered_init(c->api, &r);
    struct gen_prompt *prompt = calloc(1, sizeof *prompt);
    if (prompt == NULL)
        return err_nomem(err);
    int rc = chat_render(c->api, body, &r, err);
    if (rc == ERR_OK)
        rc = tokenizer_encode(c->api->o.tokenizer, r.text.data ? r.text.data : "", r.text.len, r.add_special,
                              r.parse_special, 0, &prompt->ids, err);
    if (rc == ERR_OK && r.stop != NULL && p->nstop < GEN_STOP_MAX)
        p->stop[p->nstop++] = r.stop;
    buf_free(&r.text);
    if (rc != ERR_OK) {
        gen_prompts_free(prompt, 1);
        return rc;
    }
    return gen_start(c, p, target, prompt, 1, err);
}

int chat_completions(struct api_ctx *c, struct err *err)
{
    struct gen_params p = { 0 };
    struct gen_target target = { 0 };
    json_t *body;
    int rc = body_json(c->req, false, &body, err);
    if (rc != ERR_OK)
        return rc;
    rc = gen_params_parse(body, true, c->api->o.base->arch.V, &p, err);
    if (rc == ERR_OK)
        rc = gen_target_find(c, &p, &target, err);
    if (rc == ERR_OK)
        rc = run(c, body, &p, &target, err);
    gen_target_free(&target);
    gen_params_free(&p);
    json_decref(body);
    return rc;
}

/* {"messages"} -> {"prompt"}: what /v1/chat/completions would give to the model. */
int apply_template(struct api_ctx *c, struct err *err)
{
    static const char *const known[] = { "messages", "tools", "tool_choice", "documents",
                                         "chat_template_kwargs", "model", NULL };
    struct rendered r;
    json_t *body;
    int rc = body_json(c->req, false, &body, err);
    if (rc != ERR_OK)
        return rc;
    rendered_init(c->api, &r);
    rc = json_only(body, known, err);
    if (rc == ERR_OK)
        rc = chat_render(c->api, body, &r, err);
    if (rc == ERR_OK)
        rc = resp_json(c, 200, json_pack("{s:o}", "prompt",
                                         json_text(r.text.data ? r.text.data : "", r.text.len)),
                       err);
    buf_free(&r.text);
    json_decref(body);
    return rc;
}
