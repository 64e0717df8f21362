/* chat.c - /v1/chat/completions: messages become one prompt.
 *
 * render_messages() is the one place that does it.  A base without a chat template gets plain
 * lines with the speaker's role, and generation stops where the next user line would begin. */
#include "api/gen.h"

#include <stdlib.h>
#include <string.h>

/* A rendered conversation. */
struct rendered {
    struct buf text;
    bool add_special;   /* run the tokenizer's post-processor (BOS) */
    bool parse_special; /* markers in the text are tokens; never with user text unescaped */
    const char *stop;   /* ends the turn, or NULL */
};

static int bad_message(size_t i, struct err *err, const char *what, const char *detail)
{
    return err_set_slug(err, ERR_INVALID, NULL, "messages", "`messages`[%zu]%s%.60s", i, what,
                        detail);
}

/* `content`: a string, or an array of {"type": "text", "text": ...}. */
static int add_content(const json_t *content, size_t i, struct buf *out, struct err *err)
{
    if (json_is_string(content)) {
        if (buf_add(out, json_string_value(content), json_string_length(content)) != ERR_OK)
            return err_nomem(err);
        return ERR_OK;
    }
    if (!json_is_array(content))
        return bad_message(i, err, ".content must be a string or an array of text parts, not ",
                           content ? json_kind(content) : "absent");
    for (size_t k = 0; k < json_array_size(content); k++) {
        const json_t *part = json_array_get(content, k);
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *text = json_object_get(part, "text");
        if (type == NULL || strcmp(type, "text") != 0)
            return bad_message(i, err, ".content has a part of a type that is not supported: only "
                               "text is, not ", type ? type : "nothing");
        if (!json_is_string(text))
            return bad_message(i, err, ".content has a text part without `text`", "");
        if (buf_add(out, json_string_value(text), json_string_length(text)) != ERR_OK)
            return err_nomem(err);
    }
    return ERR_OK;
}

/* Every member of a message is used or refused. */
static int check_message(const json_t *m, size_t i, struct err *err)
{
    if (!json_is_object(m))
        return bad_message(i, err, " must be an object, not ", json_kind(m));
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)m, key, v)
    {
        const bool nothing = json_is_null(v) || (json_is_array(v) && json_array_size(v) == 0);
        if (strcmp(key, "role") != 0 && strcmp(key, "content") != 0 && !nothing)
            return bad_message(i, err, " has a field that is not supported: ", key);
    }
    return ERR_OK;
}

/* "User: ...\nAssistant: ...\nAssistant:"; system messages stand without a name. */
static int render_plain(const json_t *messages, struct rendered *r, struct err *err)
{
    static const struct { const char *role, *before, *after; } roles[] = {
        { "system", "", "\n\n" },
        { "developer", "", "\n\n" },
        { "user", "User: ", "\n" },
        { "assistant", "Assistant: ", "\n" },
    };
    for (size_t i = 0; i < json_array_size(messages); i++) {
        const json_t *m = json_array_get(messages, i);
        int rc = check_message(m, i, err);
        if (rc != ERR_OK)
            return rc;
        const char *role = json_string_value(json_object_get(m, "role"));
        size_t k = 0;
        while (k < 4 && (role == NULL || strcmp(roles[k].role, role) != 0))
            k++;
        if (k == 4)
            return bad_message(i, err, ".role must be system, developer, user or assistant, not ",
                               role ? role : "absent");
        if (buf_puts(&r->text, roles[k].before) != ERR_OK)
            return err_nomem(err);
        rc = add_content(json_object_get(m, "content"), i, &r->text, err);
        if (rc != ERR_OK)
            return rc;
        if (buf_puts(&r->text, roles[k].after) != ERR_OK)
            return err_nomem(err);
    }
    if (buf_puts(&r->text, "Assistant:") != ERR_OK)
        return err_nomem(err);
    r->add_special = true;
    r->stop = "\nUser:";
    return ERR_OK;
}

static int render_messages(const struct base *base, const json_t *messages, struct rendered *r,
                           struct err *err)
{
    if (!json_is_array(messages) || json_array_size(messages) == 0)
        return err_set_slug(err, ERR_INVALID, NULL, "messages",
                            "`messages` must be an array with at least one message");
    if (base->chat_template != NULL)
        return err_set_slug(err, ERR_INVALID, "not_supported", "messages",
                            "%s has a chat template of its own, which this server cannot render: "
                            "send the rendered text to /v1/completions", base->name);
    return render_plain(messages, r, err);
}

static int run(struct api_ctx *c, json_t *body, struct gen_params *p, struct gen_target *target,
               struct err *err)
{
    struct rendered r = { 0 };
    buf_init(&r.text, 2 * c->api->o.max_json_bytes + 64);
    struct gen_prompt *prompt = calloc(1, sizeof *prompt);
    if (prompt == NULL)
        return err_nomem(err);
    int rc = render_messages(c->api->o.base, json_object_get(body, "messages"), &r, err);
    if (rc == ERR_OK)
        rc = tokenizer_encode(c->api->o.tokenizer, r.text.data, r.text.len, r.add_special,
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
