/* test_jinja.c - chat templates against Python's Jinja2.
 *
 * tests/data/jinja_cases.json has small templates with what Python makes of them (the script beside
 * it says how); whole chat templates are compared live when python3-jinja2 and the reference
 * templates are there. */
#include "engine/jinja.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { NOW = 1700000000 };

struct got {
    int rc;
    struct err err;
    struct buf text;
};

static void render(const char *name, const char *text, size_t len, const json_t *vars,
                   const struct jinja_opts *o, struct got *g)
{
    struct jinja *t = NULL;
    memset(g, 0, sizeof *g);
    buf_init(&g->text, 1 << 30);
    g->rc = jinja_parse(name, text, len, &t, &g->err);
    if (g->rc == ERR_OK)
        g->rc = jinja_render(t, vars, o, &g->text, &g->err);
    if (g->rc != ERR_OK && (g->err.msg[0] == '\0' || (int)g->err.code != g->rc || g->text.len != 0))
        fail_msg("%s: failed with %d, \"%s\", %zu bytes of text", name, g->rc, g->err.msg,
                 g->text.len);
    jinja_free(t);
}

/* Equal to what Python gave, or both fail; counts differences and prints the first ones. */
static int differs(const json_t *c, const char *name, const char *text, size_t len,
                   const json_t *vars)
{
    static int shown;
    const json_t *want = json_object_get(c, "out");
    const char *message = json_string_value(json_object_get(c, "e"));
    const struct jinja_opts o = { .now = NOW };
    struct got g;
    render(name, text, len, vars, &o, &g);
    bool same;
    if (json_is_string(want))
        same = g.rc == ERR_OK && g.text.len == json_string_length(want) &&
               memcmp(g.text.data ? g.text.data : "", json_string_value(want), g.text.len) == 0;
    else
        same = g.rc != ERR_OK;
    if (message != NULL)
        same = same && strcmp(g.err.msg, message) == 0;
    if (!same && shown++ < 40)
        print_error("%s\n  template %.*s\n  Python   %s\n  here     %s\n", name,
                    len < 300 ? (int)len : 300, text,
                    json_is_string(want) ? json_string_value(want)
                                         : message ? message : "(fails)",
                    g.rc == ERR_OK ? g.text.data ? g.text.data : "" : g.err.msg);
    buf_free(&g.text);
    return !same;
}

static void small_templates_give_what_python_gives(void **state)
{
    (void)state;
    json_error_t why;
    json_t *all = json_load_file("tests/data/jinja_cases.json", JSON_ALLOW_NUL, &why);
    if (all == NULL)
        fail_msg("jinja_cases.json: %s, line %d", why.text, why.line);
    const json_t *vars = json_object_get(json_array_get(all, 0), "v");
    int bad = 0;
    for (size_t i = 1; i < json_array_size(all); i++) {
        const json_t *c = json_array_get(all, i), *t = json_object_get(c, "t");
        bad += differs(c, "case", json_string_value(t), json_string_length(t), vars);
    }
    if (bad > 0)
        fail_msg("%d of %zu templates differ", bad, json_array_size(all) - 1);
    assert_true(json_array_size(all) > 1000);
    json_decref(all);
}

/* --- whole templates, live --------------------------------------------------------------------- */

static json_t *python_says(const char *shared)
{
    char command[1024];
    json_error_t why;
    snprintf(command, sizeof command,
             "/usr/bin/python3 tests/data/make_jinja_cases.py --templates %s/chat-templates/*.jinja "
             "%s/tokenizers/smollm2/chat_template.jinja", shared, shared);
    FILE *p = popen(command, "r");
    assert_non_null(p);
    json_t *all = json_loadf(p, JSON_ALLOW_NUL, &why);
    assert_int_equal(pclose(p), 0);
    if (all == NULL)
        fail_msg("make_jinja_cases.py: %s", why.text);
    return all;
}

static void chat_templates_give_what_python_gives(void **state)
{
    (void)state;
    const char *shared = getenv("LORAD_SHARED") ? getenv("LORAD_SHARED") : "../shared";
    char dir[512];
    snprintf(dir, sizeof dir, "%s/chat-templates", shared);
    if (!file_exists(dir) || system("/usr/bin/python3 -c 'import jinja2' 2>/dev/null") != 0) {
        print_message("SKIPPED: whole chat templates need %s and python3-jinja2\n", dir);
        skip();
    }
    json_t *all = python_says(shared);
    int bad = 0, rendered = 0;
    char *text = NULL;
    size_t len = 0;
    const char *last = "";
    for (size_t i = 0; i < json_array_size(all); i++) {
        const json_t *c = json_array_get(all, i);
        const char *path = json_string_value(json_object_get(c, "file"));
        struct err err = { 0 };
        if (strcmp(path, last) != 0) {
            free(text);
            assert_int_equal(file_read(path, 1 << 20, &text, &len, &err), ERR_OK);
            last = path;
        }
        bad += differs(c, json_string_value(json_object_get(c, "label")), text, len,
                       json_object_get(c, "v"));
        rendered += json_is_string(json_object_get(c, "out"));
    }
    free(text);
    if (bad > 0)
        fail_msg("%d of %zu differ", bad, json_array_size(all));
    assert_true(rendered > 2000);
    json_decref(all);
}

/* --- limits and messages ---------------------------------------------------------------------- */

static void a_hostile_template_ends_with_a_sentence(void **state)
{
    (void)state;
    static const char *const cases[] = {
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'a' * 9000000000 }}",
        "{{ 'abcdefgh' * 100000000 }}",
        "{{ [1] * 1000000000 }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}"
        "{{ ns.s }}",
        "{% set ns = namespace(s=[]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}"
        "{{ ns.s|tojson }}",
        "{% set ns = namespace(s=[], t=[]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}"
        "{% set ns.t = [ns.t] %}{% endfor %}{{ ns.s == ns.t }}",
        "{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
        "{{ ns.s|string|length }}",
        "{{ 'x'|center(90000000000) }}", "{{ 'x'.zfill(90000000000) }}", "{{ '%999999999d' % 1 }}",
        "{{ [1]|batch(9000000000, 0)|list }}", "{{ [1]|slice(9000000000)|list }}",
        "{{ 'a'|indent(9000000000) }}", "{{ [[1]]|tojson(indent=9000000000) }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ 9223372036854775807 + 1 }}", "{{ 99999999999999999999 }}", "{{ 2 ** 64 }}",
        "{{ -9223372036854775807 - 2 }}", "{{ 9223372036854775807 * -2 }}",
        "{{ (-9223372036854775807 - 1) // -1 }}", "{{ -(-9223372036854775807 - 1) }}",
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct got g;
        render("hostile", cases[i], strlen(cases[i]), NULL, NULL, &g);
        if (g.rc != ERR_INVALID && g.rc != ERR_TOO_LARGE)
            fail_msg("case %zu: %d \"%s\"", i, g.rc, g.err.msg);
        buf_free(&g.text);
    }
}

/* Text of one piece many times, around a middle. */
static void nested(const char *before, const char *mid, const char *after, int n, struct got *g)
{
    struct buf b;
    buf_init(&b, 1 << 24);
    for (int i = 0; i < n; i++)
        buf_puts(&b, before);
    buf_puts(&b, mid);
    for (int i = 0; i < n; i++)
        buf_puts(&b, after);
    render("deep", b.data, b.len, NULL, NULL, g);
    buf_free(&b);
}

static void nesting_is_bounded_when_parsing_too(void **state)
{
    (void)state;
    static const struct { const char *before, *mid, *after; } cases[] = {
        { "{{ (", "1", ")" }, { "(", "{{ 1 }}", ")" }, { "[", "1", "]" },
        { "{% if 1 %}", "x", "{% endif %}" }, { "{% for a in [1] %}", "x", "{% endfor %}" },
        { "{% if 0 %}{% elif 1 %}", "x", "{% endif %}" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct got g;
        nested(cases[i].before, cases[i].mid, cases[i].after, 20000, &g);
        assert_true(g.rc == ERR_OK || g.rc == ERR_INVALID || g.rc == ERR_TOO_LARGE);
        buf_free(&g.text);
    }
    static const char *const prefix[] = { "(", "[", "-", "not ", "{1:", "1 if ", "x.a(", "x|join(", "x is in " };
    for (size_t i = 0; i < sizeof prefix / sizeof prefix[0]; i++) {
        struct buf b;
        struct got g;
        buf_init(&b, 1 << 24);
        buf_puts(&b, "{{ ");
        for (int k = 0; k < 20000; k++)
            buf_puts(&b, prefix[i]);
        render("deep", b.data, b.len, NULL, NULL, &g);
        assert_int_not_equal(g.rc, ERR_OK);
        buf_free(&g.text);
        buf_free(&b);
    }
    struct got g;
    nested("", "{{ 1", " + 1", 20000, &g); /* deep to the left: made in a loop, walked by recursion */
    buf_free(&g.text);
    nested("{% if 1 %}", "x", "{% endif %}", 50, &g); /* and what people write still works */
    assert_int_equal(g.rc, ERR_OK);
    assert_string_equal(g.text.data, "x");
    buf_free(&g.text);
}

static void messages_name_the_template_and_the_line(void **state)
{
    (void)state;
    static const struct { const char *text, *says; } cases[] = {
        { "a\nb\n{% if x %}\n", "tpl, line 3: the template ends where 'elif' is looked for" },
        { "a\n\n{{ 'x }}", "tpl, line 3: a string has no end" },
        { "{{ x|nope }}", "tpl, line 1: there is no filter named 'nope'" },
        { "\n{{ x is nope }}", "tpl, line 2: there is no test named 'nope'" },
        { "\n\n{% include 'a' %}", "tpl, line 3: unknown tag 'include'" },
        { "{{ a.b }}", "tpl, line 1: 'a' is undefined" },
        { "{% set a = {} %}\n{{ a.b.c }}", "tpl, line 2: 'dict object' has no attribute 'b'" },
        { "{{ raise_exception('Roles must alternate') }}", "Roles must alternate" },
        { "\xff", "tpl is not UTF-8 text" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct got g;
        render("tpl", cases[i].text, strlen(cases[i].text), NULL, NULL, &g);
        assert_string_equal(g.err.msg, cases[i].says);
        assert_int_equal(g.rc, ERR_INVALID);
        buf_free(&g.text);
    }
}

static void limits_can_be_set_and_leave_the_buffer_alone(void **state)
{
    (void)state;
    static const struct jinja_opts opts[] = { { .steps = 100 }, { .output = 50 }, { .memory = 5000 } };
    static const char text[] = "{% for i in range(300) %}abc{{ i }}{% endfor %}";
    struct jinja *t;
    struct err err = { 0 };
    struct buf b;
    buf_init(&b, 10000);
    assert_int_equal(jinja_parse("t", text, strlen(text), &t, &err), ERR_OK);
    for (size_t i = 0; i < 3; i++) {
        err_clear(&err);
        buf_puts(&b, "x");
        assert_int_equal(jinja_render(t, NULL, &opts[i], &b, &err), ERR_TOO_LARGE);
        assert_int_equal(b.len, i + 1);
    }
    err_clear(&err);
    assert_int_equal(jinja_render(t, NULL, NULL, &b, &err), ERR_OK);
    assert_int_equal(b.len, 3 + 300 * 3 + 10 + 180 + 600);
    buf_free(&b);
    jinja_free(t);
}

static void renderings_can_share_their_steps(void **state)
{
    (void)state;
    static const char text[] = "{% for i in range(300) %}abc{{ i }}{% endfor %}";
    int64_t left = 1000000;
    const struct jinja_opts o = { .left = &left };
    struct jinja *t;
    struct err err = { 0 };
    struct buf b;
    buf_init(&b, 10000);
    assert_int_equal(jinja_parse("t", text, strlen(text), &t, &err), ERR_OK);
    assert_int_equal(jinja_render(t, NULL, &o, &b, &err), ERR_OK);
    const int64_t takes = 1000000 - left;
    assert_true(takes > 300 && takes < 10000);
    left = 2 * takes;
    assert_int_equal(jinja_render(t, NULL, &o, &b, &err), ERR_OK);
    assert_int_equal(jinja_render(t, NULL, &o, &b, &err), ERR_OK);
    assert_int_equal(left, 0);
    assert_int_equal(jinja_render(t, NULL, &o, &b, &err), ERR_TOO_LARGE);
    err_clear(&err);
    left = takes - 1;
    assert_int_equal(jinja_render(t, NULL, &o, &b, &err), ERR_TOO_LARGE);
    assert_string_equal(err.msg, "t, line 1: the template takes too many steps");
    assert_int_equal(left, 0);
    buf_free(&b);
    jinja_free(t);
}

/* Long text is paid for by its length, whatever looks at it. */
static void long_text_costs_steps(void **state)
{
    (void)state;
    static const char *const looks[] = { "{s: 1}", "s in s", "b.split()", "b.rsplit()", "s == t", "s < t", "s|e" };
    for (size_t i = 0; i < sizeof looks / sizeof looks[0]; i++) {
        char text[200];
        struct jinja *j;
        struct err err = { 0 };
        struct buf b;
        int64_t cost[2];
        buf_init(&b, 10000);
        for (int more = 0; more < 2; more++) {
            snprintf(text, sizeof text, "{%% set n = %d %%}{%% set s = 'a' * n %%}{%% set t = 'a' * (n - 1) ~ 'a' %%}"
                     "{%% set b = ' ' * n %%}{%% set x = %s %%}", 100000 + 64000 * more, looks[i]);
            int64_t left[2] = { 20000000, 20000000 }; /* without the look, and with it */
            for (int k = 0; k < 2; k++) {
                const struct jinja_opts o = { .left = &left[k] };
                const size_t len = k == 1 ? strlen(text) : (size_t)(strstr(text, "{% set x") - text);
                assert_int_equal(jinja_parse("t", text, len, &j, &err), ERR_OK);
                assert_int_equal(jinja_render(j, NULL, &o, &b, &err), ERR_OK);
                jinja_free(j);
            }
            cost[more] = left[0] - left[1];
        }
        if (cost[1] - cost[0] < 1000)
            fail_msg("%s: %lld steps more for 64000 bytes more", looks[i], (long long)(cost[1] - cost[0]));
        buf_free(&b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_templates_give_what_python_gives),
        cmocka_unit_test(chat_templates_give_what_python_gives),
        cmocka_unit_test(a_hostile_template_ends_with_a_sentence),
        cmocka_unit_test(nesting_is_bounded_when_parsing_too),
        cmocka_unit_test(messages_name_the_template_and_the_line),
        cmocka_unit_test(limits_can_be_set_and_leave_the_buffer_alone),
        cmocka_unit_test(renderings_can_share_their_steps),
        cmocka_unit_test(long_text_costs_steps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
