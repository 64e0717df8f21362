/* fuzz_template.c - chat templates: the template, a NUL, a JSON object with its variables.  What the
 * template makes of them in a few steps has laws; a template that gets by with few steps is then
 * opened and rendered as for a request. */
#include "engine/chat_template.h"
#include "engine/jinja.h"
#include "tests/fuzz.h"

enum { STEPS = 20000, MEMORY = 16 << 20, OUTPUT = 1 << 20 };

static bool is_utf8(const struct buf *b)
{
    json_t *s = json_stringn(b->data ? b->data : "", b->len);
    json_decref(s);
    return s != NULL;
}

/* Twice, for the same text. */
static bool check_jinja(const struct jinja *t, const json_t *vars)
{
    static const struct jinja_opts o = { .now = 1700000000, .steps = STEPS, .memory = MEMORY,
                                         .output = OUTPUT };
    struct buf b[2];
    int rc[2];
    for (int i = 0; i < 2; i++) {
        struct err err = { 0 };
        buf_init(&b[i], 1 << 30);
        rc[i] = jinja_render(t, vars, &o, &b[i], &err);
        law(rc[i] == ERR_OK ? b[i].len <= OUTPUT && is_utf8(&b[i])
                            : b[i].len == 0 && (int)err.code == rc[i] && err.msg[0] != '\0',
            "bounded valid text, or a failure that says why and no text");
    }
    law(rc[0] == rc[1] && b[0].len == b[1].len &&
            (b[0].len == 0 || memcmp(b[0].data, b[1].data, b[0].len) == 0),
        "the same again");
    buf_free(&b[0]);
    buf_free(&b[1]);
    return rc[0] == ERR_OK;
}

static void check_request(const char *text, json_t *vars)
{
    static const char config[] = "{\"bos_token\":\"<s>\",\"eos_token\":{\"content\":\"</s>\"}}";
    struct chat_template *t = NULL;
    struct buf b;
    struct err err = { 0 };
    buf_init(&b, 1 << 30);
    if (chat_template_open("t", text, config, &t, &err) != ERR_OK ||
        chat_template_render(t, json_object_get(vars, "messages"), json_object_get(vars, "tools"),
                             NULL, NULL, &b, &err) != ERR_OK)
        law(err.msg[0] != '\0' && b.len == 0, "a failure says why");
    chat_template_free(t);
    buf_free(&b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    const size_t cut = fuzz_cut(data, len), rest = cut < len ? len - cut - 1 : 0;
    char *text = fuzz_text(data, cut);
    json_t *vars = json_loadb((const char *)data + len - rest, rest, 0, NULL);
    struct jinja *t = NULL;
    struct err err = { 0 };
    if (jinja_parse("t", text, cut, &t, &err) != ERR_OK)
        law(err.msg[0] != '\0', "a failure says why");
    else if (check_jinja(t, vars) && json_is_array(json_object_get(vars, "messages")))
        check_request(text, vars);
    jinja_free(t);
    json_decref(vars);
    free(text);
    return 0;
}
