/* test_web.c - the page that is compiled in keeps to what its Content-Security-Policy allows, and
 * its parts agree. */
#include "api/web.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

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
    has_none_of("app.js", js);
}

static void every_element_that_the_script_uses_is_in_the_page(void **state)
{
    (void)state;
    char *html = text_of("index.html"), *js = text_of("app.js");
    int n = 0;
    for (const char *p = js; (p = strstr(p, "$('")) != NULL; n++) {
        char id[80];
        p += 3;
        size_t len = strcspn(p, "'");
        assert_true(p[len] == '\'' && len < 60);
        if (p[len + 1] == ')') {
            snprintf(id, sizeof id, "id=\"%.*s\"", (int)len, p);
            if (strstr(html, id) == NULL)
                fail_msg("index.html has no %s", id);
        }
    }
    assert_true(n > 20);
    free(html);
    free(js);
}

static void the_files_that_the_page_names_are_there_with_their_types(void **state)
{
    (void)state;
    static const char *const want[][2] = { { "index.html", "text/html; charset=utf-8" },
                                           { "app.js", "text/javascript; charset=utf-8" },
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
        cmocka_unit_test(every_element_that_the_script_uses_is_in_the_page),
        cmocka_unit_test(the_files_that_the_page_names_are_there_with_their_types),
    };
    return cmocka_run_group_tests_name("web", tests, NULL, NULL);
}
