/* chat_messages.c - what a message may be; plain lines for models without a template. */
#include "engine/chat_messages.h"

#include "engine/json_kind.h"

#include <string.h>

static int bad_message(size_t i, struct err *err, const char *what, const char *detail)
{
    return err_set_slug(err, ERR_INVALID, NULL, "messages", "`messages`[%zu]%s%.60s", i, what,
                        detail);
}

/* `content`: a string, or an array of {"type": "text", "text": ...}. */
int chat_content_text(const json_t *content, size_t i, struct buf *ret, struct err *err)
{
    if (json_is_string(content)) {
        if (buf_add(ret, json_string_value(content), json_string_length(content)) != ERR_OK)
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
        if (buf_add(ret, json_string_value(text), json_string_length(text)) != ERR_OK)
            return err_nomem(err);
    }
    return ERR_OK;
}

/* Plain lines: every member of a message is used or refused. */
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
int chat_lines_render(const json_t *messages, size_t n, struct buf *ret, struct err *err)
{
    static const struct { const char *role, *before, *after; } roles[] = {
        { "system", "", "\n\n" },
        { "developer", "", "\n\n" },
        { "user", "User: ", "\n" },
        { "assistant", "Assistant: ", "\n" },
    };
    for (size_t i = 0; i < n; i++) {
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
        if (buf_puts(ret, roles[k].before) != ERR_OK)
            return err_nomem(err);
        rc = chat_content_text(json_object_get(m, "content"), i, ret, err);
        if (rc != ERR_OK)
            return rc;
        if (buf_puts(ret, roles[k].after) != ERR_OK)
            return err_nomem(err);
    }
    if (buf_puts(ret, "Assistant:") != ERR_OK)
        return err_nomem(err);
    return ERR_OK;
}

/* --- with a template --------------------------------------------------------------------------- */

/* `content` of a message for a template: text, text parts, or nothing (a message of tool calls). */
static int check_content(const json_t *content, size_t i, struct err *err)
{
    struct buf text;
    if (content == NULL || json_is_null(content))
        return ERR_OK;
    buf_init(&text, SIZE_MAX / 2);
    int rc = chat_content_text(content, i, &text, err);
    buf_free(&text);
    return rc;
}

int chat_messages_check(const json_t *messages, struct err *err)
{
    for (size_t i = 0; i < json_array_size(messages); i++) {
        const json_t *m = json_array_get(messages, i);
        if (!json_is_object(m))
            return bad_message(i, err, " must be an object, not ", json_kind(m));
        if (!json_is_string(json_object_get(m, "role")))
            return bad_message(i, err, ".role must be a string", "");
        int rc = check_content(json_object_get(m, "content"), i, err);
        if (rc != ERR_OK)
            return rc;
    }
    return ERR_OK;
}
