/* test_web.c - the page that is compiled in keeps to what its Content-Security-Policy allows, and
 * its parts agree. */
#include "api/train_params.h"
#include "api/web.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const char *const scripts[] = { "app.js", "chart.js", "train.js", "job.js" };
enum { NSCRIPTS = sizeof scripts / sizeof scripts[0] };

/* A file of web/ as a string; free() it. */
static char *text_of(const char *path)
{
    for (const struct web_file *f = web_files; f->path != NULL; f++) {
        if (strcmp(f->path, path) != 0)
            continue;
        char *s = malloc(f->len + 1);
        assert_non_null(s);
        memcpy(s, f->data, f->len);
        s[f->len] = '\0';
        assert_int_equal(strlen(s), f->len);
        return s;
    }
    fail_msg("there is no %s", path);
    return NULL;
}

static void has_none_of(const char *path, const char *const *words)
{
    char *text = text_of(path);
    for (; *words != NULL; words++)
        if (strstr(text, *words) != NULL)
            fail_msg("%s has %s", path, *words);
    free(text);
}

static void nothing_is_inline_and_nothing_comes_from_elsewhere(void **state)
{
    (void)state;
    static const char *const html[] = { "<script>", "<style",      "style=", "onclick",
                                        "onload",   "onsubmit",    "http:",  "https:",
                                        "//",       "javascript:", NULL };
    static const char *const css[] = { "http:", "https:", "//", "@import", "url(", NULL };
    static const char *const js[] = { "innerHTML",
                                      "outerHTML",
                                      "insertAdjacentHTML",
                                      "document.write",
                                      "eval(",
                                      "new Function",
                                      "http:",
                                      "https:",
                                      "localStorage",
                                      NULL };
    has_none_of("index.html", html);
    has_none_of("style.css", css);
    for (size_t i = 0; i < NSCRIPTS; i++)
        has_none_of(scripts[i], js);
}

/* How many elements it uses; each is in the page. */
static int elements_of(const char *path, const char *html)
{
    char *js = text_of(path);
    int n = 0;
    for (const char *p = js; (p = strstr(p, "$('")) != NULL; n++) {
        char id[80];
        p += 3;
        size_t len = strcspn(p, "'");
        assert_true(len < 60 && p[len] == '\'');
        if (p[len + 1] == ')') {
            snprintf(id, sizeof id, "id=\"%.*s\"", (int)len, p);
            if (strstr(html, id) == NULL)
                fail_msg("index.html has no %s", id);
        }
    }
    free(js);
    return n;
}

static void every_element_that_the_scripts_use_is_in_the_page(void **state)
{
    (void)state;
    char *html = text_of("index.html");
    assert_true(elements_of("app.js", html) > 20);
    assert_true(elements_of("train.js", html) > 20);
    assert_true(elements_of("job.js", html) > 20);
    free(html);
}

/* "{ name: 'NAME', ... usual: 'USUAL', ... }" of train.js. */
struct form_field {
    char name[40], usual[40];
    bool fixed, of_lora;
};

static void quoted(const char *from, const char *end, const char *key, char ret[40])
{
    const char *p = strstr(from, key);
    assert_true(p != NULL && p < end);
    p += strlen(key);
    const size_t len = strcspn(p, "'");
    assert_true(len > 0 && len < 40 && p + len < end);
    memcpy(ret, p, len);
    ret[len] = '\0';
}

static bool says(const char *from, const char *end, const char *what)
{
    const char *p = strstr(from, what);
    return p != NULL && p < end;
}

/* The next field from *at on; false: there is none. */
static bool next_field(const char **at, struct form_field *ret)
{
    const char *p = strstr(*at, "{ name: '");
    const char *end = p != NULL ? strstr(p, " },") : NULL;
    if (end == NULL || !says(p, end, "usual: '"))
        return false;
    quoted(p, end, "name: '", ret->name);
    quoted(p, end, "usual: '", ret->usual);
    ret->fixed = says(p, end, "fixed: true");
    ret->of_lora = !says(p, end, "only: 'adalora'");
    *at = end;
    return true;
}

/* {"type": T, T: {NAME: null}}: null is as if it were not there, but its name must be known. */
static json_t *method_with(const char *name, bool lora)
{
    const char *type = lora ? "lora" : "adalora";
    json_t *method = json_pack("{s:s, s:{s:n}}", "type", type, type, name);
    assert_non_null(method);
    return method;
}

/* The page shows the default and leaves the field out of the request. */
static void has_usual(const struct form_field *f, const struct train_opts *opts)
{
    json_t *all = api_train_params_json(opts);
    const char *type = json_string_value(json_object_get(all, "type"));
    const json_t *v = json_object_get(json_object_get(all, type), f->name);
    char *end;
    const double number = strtod(f->usual, &end);
    assert_non_null(v);
    if (json_is_string(v))
        assert_string_equal(f->usual, json_string_value(v));
    else if (*end == '\0')
        assert_true(number == json_number_value(v));
    else
        assert_true(json_number_value(v) <= 0); /* in words: the trainer finds it out */
    json_decref(all);
}

/* One that the server does not know would be refused with every job. */
static void every_field_of_the_form_is_an_option_of_the_trainer(void **state)
{
    (void)state;
    char *js = text_of("train.js");
    const char *at = js;
    struct form_field f;
    int n = 0;
    for (; next_field(&at, &f); n++) {
        struct err err = { 0 };
        struct train_opts opts;
        json_t *method = method_with(f.name, f.of_lora);
        if (api_train_params(method, &opts, &err) != ERR_OK)
            fail_msg("%s", err.msg);
        if (f.fixed != (api_train_params_fixed(method) != NULL))
            fail_msg("%s: is it decided by the version to start from?", f.name);
        has_usual(&f, &opts);
        train_opts_free(&opts);
        json_decref(method);
    }
    assert_true(n > 30);
    free(js);
}

static void the_files_that_the_page_names_are_there_with_their_types(void **state)
{
    (void)state;
    static const char *const want[][2] = { { "index.html", "text/html; charset=utf-8" },
                                           { "app.js", "text/javascript; charset=utf-8" },
                                           { "chart.js", "text/javascript; charset=utf-8" },
                                           { "train.js", "text/javascript; charset=utf-8" },
                                           { "job.js", "text/javascript; charset=utf-8" },
                                           { "style.css", "text/css; charset=utf-8" },
                                           { "icon.svg", "image/svg+xml" } };
    char *html = text_of("index.html");
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        const struct web_file *f = web_files;
        while (f->path != NULL && strcmp(f->path, want[i][0]) != 0)
            f++;
        assert_non_null(f->path);
        assert_string_equal(f->type, want[i][1]);
        if (i > 0)
            assert_non_null(strstr(html, want[i][0]));
    }
    free(html);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nothing_is_inline_and_nothing_comes_from_elsewhere),
        cmocka_unit_test(every_element_that_the_scripts_use_is_in_the_page),
        cmocka_unit_test(every_field_of_the_form_is_an_option_of_the_trainer),
        cmocka_unit_test(the_files_that_the_page_names_are_there_with_their_types),
    };
    return cmocka_run_group_tests_name("web", tests, NULL, NULL);
}
