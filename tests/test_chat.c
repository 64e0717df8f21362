/* test_chat.c - chat templates from the request to the prompt, without sockets. */
#include "engine/chat_template.h"
#include "engine/jinja.h"
#include "tests/support_serve.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const char template[] =
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls %}<{{ c.function.arguments|tojson }}>{% endfor %}{% endfor %}"
    "{% if messages[0].role == 'x' %}{{ raise_exception('no x here') }}{% endif %}"
    "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}"
    "{% for d in documents or [] %}{{ '{' ~ d.text ~ '}' }}{% endfor %}{{ more }}"
    "{% if add_generation_prompt %}[assistant]{% endif %}";

static int setup(void **state)
{
    const struct serve_opts o = { .chat_template = template };
    *state = serve_open(&o);
    return 0;
}

static int teardown(void **state)
{
    serve_close(*state);
    return 0;
}

static void call(struct serve *s, const char *path, const char *body, struct serve_resp *ret)
{
    const struct serve_req r = { .method = "POST", .path = path, .body = body };
    serve_call(s, &r, ret);
}

#define HI "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"

static void the_template_gets_what_the_request_says(void **state)
{
    static const struct { const char *body, *want; } cases[] = {
        { "{" HI "}", "[user]hi[assistant]" },
        { "{" HI ",\"tools\":[],\"documents\":null}", "[user]hi[assistant]" },
        { "{" HI ",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]}", "[user]hi(f)[assistant]" },
        { "{" HI ",\"tools\":[{\"function\":{\"name\":\"f\"}}],\"tool_choice\":\"none\"}", "[user]hi[assistant]" },
        { "{" HI ",\"documents\":[{\"text\":\"d\"}]}", "[user]hi{d}[assistant]" },
        { "{" HI ",\"chat_template_kwargs\":{\"more\":1.5}}", "[user]hi1.5[assistant]" },
        { "{\"messages\":[{\"role\":\"developer\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},"
          "{\"type\":\"text\",\"text\":\"b\"}]}]}", "[system]ab[assistant]" },
        { "{\"messages\":[{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"1\",\"type\":"
          "\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"b\\\": 0.1, \\\"a\\\": \\\"é\\\"}\"}}]}]}",
          "[assistant]None<{\"b\": 0.1, \"a\": \"é\"}>[assistant]" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct serve_resp r;
        call(*state, "/apply-template", cases[i].body, &r);
        const char *got = json_string_value(json_object_get(r.json, "prompt"));
        if (r.status != 200 || got == NULL)
            fail_msg("case %zu: %d %s", i, r.status, serve_message(&r));
        const char *at = strchr(got, '['); /* behind bos_token */
        assert_string_equal(at, cases[i].want);
        serve_resp_free(&r);
    }
}

static void the_prompt_has_the_tokens_of_the_rendered_text_and_no_more(void **state)
{
    struct serve *s = *state;
    struct serve_resp prompt, tokens, chat;
    call(s, "/apply-template", "{" HI "}", &prompt);
    json_t *in = json_pack("{s:O}", "content", json_object_get(prompt.json, "prompt"));
    char *body = json_dumps(in, 0);
    call(s, "/tokenize", body, &tokens);
    call(s, "/v1/chat/completions", "{" HI ",\"max_tokens\":2,\"temperature\":0}", &chat);
    assert_int_equal(chat.status, 200);
    const json_t *usage = json_object_get(chat.json, "usage");
    assert_int_equal(json_integer_value(json_object_get(usage, "prompt_tokens")),
                     json_array_size(json_object_get(tokens.json, "tokens")));
    free(body);
    json_decref(in);
    serve_resp_free(&prompt);
    serve_resp_free(&tokens);
    serve_resp_free(&chat);
}

static void what_is_wrong_is_400_with_a_sentence(void **state)
{
    static const struct { const char *body, *says; } cases[] = {
        { "{\"messages\":[{\"role\":\"x\",\"content\":\"a\"}]}", "no x here" },
        { "{\"messages\":[1]}", "must be an object" },
        { "{\"messages\":[{\"content\":\"a\"}]}", "role" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":5}]}", "content" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", "image_url" },
        { "{" HI ",\"tools\":5}", "tools" },
        { "{" HI ",\"tools\":[5]}", "`tools`[0]" },
        { "{" HI ",\"tools\":[{}]}", "'dict object' has no attribute 'function'" },
        { "{" HI ",\"tool_choice\":\"required\"}", "tool_choice" },
        { "{" HI ",\"documents\":[\"a\"]}", "documents" },
        { "{" HI ",\"chat_template_kwargs\":[]}", "chat_template_kwargs" },
        { "{" HI ",\"chat_template_kwargs\":{\"messages\":[]}}", "messages" },
        { "{}", "messages" },
    };
    static const char *const paths[] = { "/apply-template", "/v1/chat/completions" };
    for (size_t i = 0; i < 2 * sizeof cases / sizeof cases[0]; i++) {
        struct serve_resp r;
        call(*state, paths[i % 2], cases[i / 2].body, &r);
        if (r.status != 400 || strstr(serve_message(&r), cases[i / 2].says) == NULL)
            fail_msg("%s %s: %d %s", paths[i % 2], cases[i / 2].body, r.status, serve_message(&r));
        serve_resp_free(&r);
    }
}

/* --- what a template wants ---------------------------------------------------------------------- */

static void rendered(const char *text, const char *config, const char *messages, const char *tools,
                     const char *want)
{
    struct chat_template *t;
    struct err err = { 0 };
    struct buf b;
    buf_init(&b, 1 << 20);
    json_t *m = json_loads(messages, 0, NULL), *l = tools ? json_loads(tools, 0, NULL) : NULL;
    assert_non_null(m);
    if (chat_template_open("t", text, config, &t, &err) != ERR_OK ||
        chat_template_render(t, m, l, NULL, NULL, &b, &err) != ERR_OK)
        fail_msg("%s: %s", text, err.msg);
    assert_string_equal(b.data ? b.data : "", want);
    chat_template_free(t);
    buf_free(&b);
    json_decref(m);
    json_decref(l);
}

#define CALLS "[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"content\":null,\"tool_calls\":" \
    "[{\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":1}\"}}]}]"

static void messages_are_fitted_to_the_template(void **state)
{
    (void)state;
    rendered("{% for m in messages %}{% for p in m.content or [] %}{{ p.text }}{% endfor %}{% endfor %}", NULL,
             "[{\"role\":\"user\",\"content\":\"abc\"}]", NULL, "abc"); /* parts only */
    rendered("{% for m in messages %}{{ m.content ~ '' }}{% for c in m.tool_calls %}"
             "{{ c.function.arguments + '' }}{% endfor %}{% endfor %}", NULL, CALLS, NULL,
             "qNone{\"a\":1}"); /* text only */
    rendered("{% for m in messages %}{{ m.role == 'developer' }}{% endfor %}", NULL,
             "[{\"role\":\"developer\",\"content\":\"a\"}]", NULL, "True");
    static const char config[] =
        "{\"bos_token\":{\"content\":\"<b>\"},\"eos_token\":\"<e>\",\"pad_token\":null,"
        "\"chat_template\":[{\"name\":\"default\",\"template\":\"{{ bos_token ~ eos_token ~ pad_token }}\"},"
        "{\"name\":\"tool_use\",\"template\":\"T{{ tools|length }}\"}]}";
    rendered("{{ bos_token ~ eos_token ~ pad_token }}", config, "[]", NULL, "<b><e>");
    rendered("{{ bos_token ~ eos_token ~ pad_token }}", config, "[]", "[{}]", "T1");
    rendered("other{{ tools|length }}", config, "[]", "[{}]", "other1");
}

static void a_template_that_cannot_be_parsed_is_refused_by_name_and_line(void **state)
{
    (void)state;
    struct chat_template *t;
    struct err err = { 0 };
    assert_int_equal(chat_template_open("the chat template of m", "a\n{% if %}", NULL, &t, &err),
                     ERR_INVALID);
    assert_non_null(strstr(err.msg, "the chat template of m, line 2: "));
    err_clear(&err);
    assert_int_equal(chat_template_open("m", "x", "{\"chat_template\":[{\"name\":\"default\",\"template\":\"x\"},"
                                        "{\"name\":\"tool_use\",\"template\":\"{{\"}]}", &t, &err),
                     ERR_INVALID);
    assert_non_null(strstr(err.msg, "m (tool_use), line 1: "));
}

/* A loop that shows nothing is rendered for every question that there is: six times. */
static int64_t steps_of(const char *text)
{
    int64_t left = 20000000;
    const struct jinja_opts o = { .left = &left };
    struct jinja *j;
    struct err err = { 0 };
    struct buf b;
    buf_init(&b, 1 << 20);
    assert_int_equal(jinja_parse("t", text, strlen(text), &j, &err), ERR_OK);
    assert_int_equal(jinja_render(j, NULL, &o, &b, &err), ERR_OK);
    jinja_free(j);
    buf_free(&b);
    return 20000000 - left;
}

static void opening_takes_a_bounded_number_of_steps(void **state)
{
    (void)state;
    static const char little[] = "{% for i in range(20) %}{% for j in range(1300) %}{% endfor %}{% endfor %}";
    static const char much[] = "{% for i in range(90) %}{% for j in range(1300) %}{% endfor %}{% endfor %}";
    static const char endless[] = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}";
    const int64_t few = steps_of(little), many = steps_of(much);
    assert_true(6 * few < 1000000 && 12 * few > 1000000);
    assert_true(many < 1000000 && 6 * many > 1000000);
    struct chat_template *t;
    struct err err = { 0 };
    assert_int_equal(chat_template_open("m", little, NULL, &t, &err), ERR_OK);
    chat_template_free(t);
    static const struct { const char *text, *why; } refused[] = {
        { much, "m, line 1: the template takes too many steps" },
        { endless, "m, line 1: the template takes too many steps" },
        { "{% for i in range(99) %}{{ '0123456789abcdef' * 999 }}{% endfor %}",
          "m, line 1: the text is longer than 1048576 bytes" },
        { "{% macro m() %}{{ m() }}{% endmacro %}\n{{ m() }}", "m, line 1: nested too deep" },
    };
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        assert_int_equal(chat_template_open("m", refused[i].text, NULL, &t, &err), ERR_TOO_LARGE);
        assert_string_equal(err.msg, refused[i].why);
        err_clear(&err);
    }
    /* the template for tools has what the other one left */
    json_t *config = json_pack("{s:[{s:s, s:s}, {s:s, s:s}]}", "chat_template", "name", "default",
                               "template", little, "name", "tool_use", "template", little);
    char *json = json_dumps(config, 0);
    assert_int_equal(chat_template_open("m", little, json, &t, &err), ERR_TOO_LARGE);
    assert_non_null(strstr(err.msg, "m (tool_use), line 1: the template takes too many steps"));
    free(json);
    json_decref(config);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(the_template_gets_what_the_request_says, setup, teardown),
        cmocka_unit_test_setup_teardown(the_prompt_has_the_tokens_of_the_rendered_text_and_no_more, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(what_is_wrong_is_400_with_a_sentence, setup, teardown),
        cmocka_unit_test(messages_are_fitted_to_the_template),
        cmocka_unit_test(a_template_that_cannot_be_parsed_is_refused_by_name_and_line),
        cmocka_unit_test(opening_takes_a_bounded_number_of_steps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
