/* test_tokenizer.c - ids and texts equal to the reference's, streams equal to the whole, hostile
 * files and texts.
 *
 * tests/data/tokenizer_cases.json holds what the reference (Hugging Face's tokenizers) answered for
 * some hundred settings of the pipeline; tokenizer_make.mjs beside it made it.  The larger
 * vocabularies and their cases are in the reference folder. */
#include "engine/tokenizer.h"
#include "tests/support_model.h"

#include <jansson.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const char demo_path[] = "examples/demo-base/tokenizer.json";
static const char bytes_path[] = "tests/data/tokenizer_bytelevel.json";
static const char unigram_path[] = "tests/data/tokenizer_unigram.json";
static struct tokenizer *demo, *bytes, *unigram;

static char *read_file(const char *path, size_t *len)
{
    struct err err = { 0 };
    char *s;
    if (file_read(path, 64 << 20, &s, len, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return s;
}

static struct tokenizer *load_text(const char *json, size_t len)
{
    struct err err = { 0 };
    struct tokenizer *t = NULL;
    if (tokenizer_load(json, len, &t, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return t;
}

static struct tokenizer *load_file(const char *path)
{
    size_t len;
    char *json = read_file(path, &len);
    struct tokenizer *t = load_text(json, len);
    free(json);
    return t;
}

static struct tokenizer *load_json(const json_t *v)
{
    char *s = json_dumps(v, JSON_COMPACT);
    struct tokenizer *t = load_text(s, strlen(s));
    free(s);
    return t;
}

static int setup(void **state)
{
    (void)state;
    demo = load_file(demo_path);
    bytes = load_file(bytes_path);
    unigram = load_file(unigram_path);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tokenizer_free(demo);
    tokenizer_free(bytes);
    tokenizer_free(unigram);
    return 0;
}

static struct tok_ids encode(const struct tokenizer *t, const char *s, size_t len, bool special)
{
    struct tok_ids ids = { 0 };
    struct err err = { 0 };
    if (tokenizer_encode(t, s, len, special, true, 0, &ids, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return ids;
}

static void assert_ids(const char *what, const struct tok_ids *got, const int32_t *want, size_t n)
{
    bool same = got->n == n;
    for (size_t i = 0; same && i < n; i++)
        same = got->ids[i] == want[i];
    if (same)
        return;
    for (size_t i = 0; i < got->n; i++)
        print_error("%d ", (int)got->ids[i]);
    print_error("instead of\n");
    for (size_t i = 0; i < n; i++)
        print_error("%d ", (int)want[i]);
    fail_msg("%s: %zu ids instead of %zu, or others", what, got->n, n);
}

/* --- streams --------------------------------------------------------------------------------- */
/* The same bytes as jansson's strict reader takes. */
static bool is_utf8(const char *s, size_t len)
{
    json_t *v = json_stringn(s, len);
    json_decref(v);
    return v != NULL;
}

static void stream_equals_whole(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip)
{
    struct buf whole, out;
    struct tok_stream *s;
    buf_init(&whole, 1 << 24);
    buf_init(&out, 1 << 24);
    assert_int_equal(tokenizer_decode(t, ids, n, skip, &whole, NULL), ERR_OK);
    assert_int_equal(tok_stream_open(t, skip, false, &s, NULL), ERR_OK);
    for (size_t i = 0; i <= n; i++) {
        size_t before = out.len;
        int rc = i < n ? tok_stream_add(s, ids[i], &out) : tok_stream_end(s, &out);
        assert_int_equal(rc, ERR_OK);
        if (out.len > before)
            assert_true(is_utf8(out.data + before, out.len - before));
    }
    assert_int_equal(out.len, whole.len);
    if (whole.len > 0)
        assert_memory_equal(out.data, whole.data, whole.len);
    tok_stream_free(s);
    buf_free(&whole);
    buf_free(&out);
}

static void a_stream_of_random_ids_equals_their_text(void **state)
{
    (void)state;
    srand(7);
    for (int round = 0; round < 600; round++) {
        const struct tokenizer *t = round % 4 == 0 ? unigram : round % 2 ? demo : bytes;
        int32_t ids[40];
        int n = rand() % 40;
        for (int i = 0; i < n; i++) /* mostly byte tokens: they are the hard ones */
            ids[i] = rand() % (rand() % 4 ? 259 : tokenizer_size(t));
        stream_equals_whole(t, ids, (size_t)n, round % 3 == 0);
    }
}

static void a_stream_that_continues_keeps_its_first_space(void **state)
{
    (void)state;
    struct tok_ids ids = encode(demo, "there was", 9, false);
    struct tok_stream *s;
    struct buf out;
    buf_init(&out, 1 << 20);
    for (int continues = 0; continues < 2; continues++) {
        out.len = 0;
        assert_int_equal(tok_stream_open(demo, true, continues, &s, NULL), ERR_OK);
        for (size_t i = 0; i < ids.n; i++)
            assert_int_equal(tok_stream_add(s, ids.ids[i], &out), ERR_OK);
        assert_int_equal(tok_stream_end(s, &out), ERR_OK);
        assert_string_equal(out.data, continues ? " there was" : "there was");
        tok_stream_free(s);
    }
    buf_free(&out);
    free(ids.ids);
}

/* U+1F600 in bytes: nothing comes before the run of bytes is over, then all of it. */
static void a_character_of_byte_tokens_comes_whole(void **state)
{
    (void)state;
    struct tok_stream *s;
    struct buf out;
    buf_init(&out, 1 << 20);
    assert_int_equal(tok_stream_open(demo, true, false, &s, NULL), ERR_OK);
    static const char *const run[] = { "<0xF0>", "<0x9F>", "<0x98>", "<0x80>" };
    for (int i = 0; i < 4; i++)
        assert_int_equal(tok_stream_add(s, tokenizer_id(demo, run[i]), &out), ERR_OK);
    assert_int_equal(out.len, 0);
    assert_int_equal(tok_stream_add(s, tokenizer_id(demo, "a"), &out), ERR_OK);
    assert_string_equal(out.data, "\xF0\x9F\x98\x80" "a");
    assert_int_equal(tok_stream_add(s, tokenizer_id(demo, run[0]), &out), ERR_OK);
    assert_int_equal(tok_stream_end(s, &out), ERR_OK);
    assert_string_equal(out.data, "\xF0\x9F\x98\x80" "a\xEF\xBF\xBD");
    assert_int_equal(tok_stream_add(s, 1 << 30, &out), ERR_INVALID);
    tok_stream_free(s);
    buf_free(&out);
}

/* --- the reference's answers ------------------------------------------------------------------- */
/* A base file with some members changed; those of the model one by one. */
static json_t *changed(const char *path, const json_t *change)
{
    json_t *file = json_load_file(path, JSON_ALLOW_NUL, NULL);
    assert_non_null(file);
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)change, key, value) {
        if (strcmp(key, "model") == 0 && json_object_get(value, "type") == NULL)
            json_object_update(json_object_get(file, "model"), value);
        else
            json_object_set(file, key, value);
    }
    return file;
}

static void check_case(const struct tokenizer *t, const char *name, const json_t *c)
{
    const json_t *text = json_array_get(c, 0), *want = json_array_get(c, 1);
    const json_t *decoded = json_array_get(c, 2);
    size_t n = json_array_size(want);
    int32_t *ids = calloc(n + 1, sizeof *ids);
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(want, i));
    char what[400];
    snprintf(what, sizeof what, "%s: \"%.300s\"", name, json_string_value(text));
    struct tok_ids got = encode(t, json_string_value(text), json_string_length(text), true);
    assert_ids(what, &got, ids, n);

    struct buf out;
    buf_init(&out, 1 << 20);
    assert_int_equal(tokenizer_decode(t, ids, n, false, &out, NULL), ERR_OK);
    if (out.len != json_string_length(decoded) ||
        (out.len > 0 && memcmp(out.data, json_string_value(decoded), out.len) != 0))
        fail_msg("%s is decoded as \"%s\"", what, out.data);
    stream_equals_whole(t, ids, n, false);
    stream_equals_whole(t, ids, n, true);
    buf_free(&out);
    free(got.ids);
    free(ids);
}

static void every_setting_answers_as_the_reference(void **state)
{
    (void)state;
    json_t *all = json_load_file("tests/data/tokenizer_cases.json", JSON_ALLOW_NUL, NULL);
    assert_non_null(all);
    size_t cases = 0;
    for (size_t i = 1; i < json_array_size(all); i++) { /* entry 0 is a comment */
        const json_t *v = json_array_get(all, i);
        const char *base = json_string_value(json_object_get(v, "base"));
        json_t *file = changed(strcmp(base, "demo") == 0        ? demo_path
                               : strcmp(base, "unigram") == 0 ? unigram_path
                                                              : bytes_path,
                               json_object_get(v, "change"));
        struct tokenizer *t = load_json(file);
        const json_t *list = json_object_get(v, "cases");
        for (size_t k = 0; k < json_array_size(list); k++, cases++)
            check_case(t, json_string_value(json_object_get(v, "name")), json_array_get(list, k));
        tokenizer_free(t);
        json_decref(file);
    }
    json_decref(all);
    assert_true(cases > 700);
}

static void check_decoding(const struct tokenizer *t, const char *name, const json_t *c)
{
    const json_t *list = json_array_get(c, 0), *want = json_array_get(c, 1);
    const size_t n = json_array_size(list);
    int32_t *ids = calloc(n + 1, sizeof *ids);
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(list, i));
    struct buf out;
    buf_init(&out, 1 << 20);
    assert_int_equal(tokenizer_decode(t, ids, n, false, &out, NULL), ERR_OK);
    if (out.len != json_string_length(want) ||
        (out.len > 0 && memcmp(out.data, json_string_value(want), out.len) != 0))
        fail_msg("%s: ids are decoded as \"%s\", not \"%s\"", name, out.data,
                 json_string_value(want));
    stream_equals_whole(t, ids, n, false);
    buf_free(&out);
    free(ids);
}

/* What is hard in them is hard for others: tokenizer_hard.mjs. */
static void nasty_texts_get_the_reference_s_ids(void **state)
{
    (void)state;
    json_t *all = json_load_file("tests/data/tokenizer_hard.json", JSON_ALLOW_NUL, NULL), *v, *c;
    const char *name;
    size_t i;
    assert_int_equal(json_object_size(all), 4);
    json_object_foreach(all, name, v) {
        char rel[100];
        snprintf(rel, sizeof rel, "tokenizers/%s/tokenizer.json", name);
        const char *path = support_shared(rel);
        if (path == NULL) {
            json_decref(all);
            skip();
        }
        struct tokenizer *t = load_file(path);
        assert_true(json_array_size(json_object_get(v, "encode")) >= 40);
        json_array_foreach(json_object_get(v, "encode"), i, c)
            check_case(t, name, c);
        json_array_foreach(json_object_get(v, "decode"), i, c)
            check_decoding(t, name, c);
        tokenizer_free(t);
    }
    json_decref(all);
}

/* Texts lie between lines with this mark; ids are one line each. */
static void check_folder(const char *folder)
{
    static const char mark[] = "\n__ggml_vocab_test__\n";
    char path[3][64];
    static const char *const names[] = { "tokenizer.json", "cases.inp", "cases.out" };
    char *text[3] = { NULL };
    size_t len[3];
    for (int i = 0; i < 3; i++) {
        snprintf(path[i], sizeof path[i], "tokenizers/%s/%s", folder, names[i]);
        const char *p = support_shared(path[i]);
        if (p == NULL) {
            for (int k = 0; k < i; k++)
                free(text[k]);
            skip();
        }
        text[i] = read_file(p, &len[i]);
    }
    struct tokenizer *t = load_text(text[0], len[0]);
    const char *in = text[1], *end = text[1] + len[1];
    char *out = text[2];
    int cases = 0;
    while (in != NULL && *out != '\0') {
        const char *stop = memmem(in, (size_t)(end - in), mark, strlen(mark));
        int32_t want[1000];
        size_t n = 0;
        while (*out != '\n' && *out != '\0')
            if (*out == ' ')
                out++;
            else
                want[n++] = (int32_t)strtol(out, &out, 10);
        struct tok_ids got = encode(t, in, (size_t)((stop != NULL ? stop : end) - in), false);
        assert_ids(in, &got, want, n);
        stream_equals_whole(t, got.ids, got.n, false);
        free(got.ids);
        in = stop != NULL ? stop + strlen(mark) : NULL;
        out += *out == '\n';
        cases++;
    }
    assert_true(cases >= 46);
    tokenizer_free(t);
    for (int i = 0; i < 3; i++)
        free(text[i]);
}

static void gpt2_cases_match(void **state) { (void)state; check_folder("gpt2"); }
static void llama2_cases_match(void **state) { (void)state; check_folder("llama2-tinyllama"); }
static void qwen_cases_match(void **state) { (void)state; check_folder("qwen2.5"); }

static void the_fox_of_stories260K_has_these_ids(void **state)
{
    (void)state;
    static const int32_t want[] = { 1, 385, 328, 432, 261, 280, 305, 330, 272, 414, 444, 272,
                                    277, 264, 261, 262, 415, 271, 422, 410, 354, 422, 318, 264,
                                    285, 265, 334, 341, 334, 412, 433, 259, 276, 411, 426 };
    const char *path = support_shared("models/stories260K/tokenizer.json");
    if (path == NULL)
        skip();
    struct tokenizer *t = load_file(path);
    static const char fox[] = "One day, a clever fox found a shiny key under the old oak tree.";
    struct tok_ids got = encode(t, fox, strlen(fox), true);
    assert_ids("fox", &got, want, sizeof want / sizeof want[0]);
    assert_int_equal(tokenizer_size(t), 512);
    free(got.ids);
    tokenizer_free(t);
}

/* --- what the header promises -------------------------------------------------------------------- */
static void bad_bytes_are_replaced_as_unicode_recommends(void **state)
{
    (void)state;
    /* the first is the example of Unicode's chapter 3 */
    static const struct { const char *bad, *good; } cases[] = {
        { "\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64",
          "a\uFFFD\uFFFD\uFFFDb\uFFFDc\uFFFD\uFFFDd" },
        { "\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41",
          "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\x41" },
        { "\xED\xA0\x80\xED\xBF\xBF", "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD" },
        { "\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42",
          "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\x41\uFFFD\uFFFD\x42" },
        { "\xE2\x82", "\uFFFD" },
        { "\xFF", "\uFFFD" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct tok_ids a = encode(demo, cases[i].bad, strlen(cases[i].bad), false);
        struct tok_ids b = encode(demo, cases[i].good, strlen(cases[i].good), false);
        assert_ids(cases[i].good, &a, b.ids, b.n);
        free(a.ids);
        free(b.ids);
    }
}

static void the_bound_holds_and_leaves_the_list_alone(void **state)
{
    (void)state;
    static const char text[] = "one two three four";
    struct tok_ids all = encode(demo, text, strlen(text), true), ids = { 0 };
    struct err err = { 0 };
    assert_int_equal(tokenizer_encode(demo, text, strlen(text), true, true, all.n, &ids, &err), 0);
    assert_int_equal(ids.n, all.n);
    assert_int_equal(tokenizer_encode(demo, text, strlen(text), true, true, all.n - 1, &ids, &err),
                     ERR_TOO_LARGE);
    assert_int_equal(ids.n, all.n);
    /* appended */
    err_clear(&err);
    assert_int_equal(tokenizer_encode(demo, "x", 1, true, true, 9, &ids, &err), ERR_OK);
    assert_true(ids.n > all.n && ids.ids[all.n] == 1);
    assert_memory_equal(ids.ids, all.ids, all.n * sizeof *all.ids);
    free(all.ids);
    free(ids.ids);
}

static void special_tokens_are_plain_text_when_not_parsed(void **state)
{
    (void)state;
    static const char text[] = "a</s><s>b<|end|>";
    const struct tokenizer *both[] = { demo, bytes };
    for (int i = 0; i < 2; i++) {
        struct tok_ids ids = { 0 };
        struct buf out;
        buf_init(&out, 1 << 20);
        assert_int_equal(tokenizer_encode(both[i], text, strlen(text), false, false, 0, &ids, NULL), 0);
        for (size_t k = 0; k < ids.n; k++)
            assert_false(tokenizer_is_special(both[i], ids.ids[k]));
        assert_int_equal(tokenizer_decode(both[i], ids.ids, ids.n, true, &out, NULL), ERR_OK);
        assert_string_equal(out.data, text);
        buf_free(&out);
        free(ids.ids);
    }
}

static void pieces_put_together_are_the_text(void **state)
{
    (void)state;
    static const char text[] = "He said caf\xC3\xA9 \xF0\x9F\x98\x80 1842.\n\0z";
    const struct tokenizer *both[] = { demo, bytes };
    for (int i = 0; i < 2; i++) {
        struct tok_ids ids = encode(both[i], text, sizeof text - 1, false);
        struct buf out;
        buf_init(&out, 1 << 20);
        for (size_t k = 0; k < ids.n; k++)
            assert_int_equal(tokenizer_piece(both[i], ids.ids[k], &out), ERR_OK);
        size_t space = i == 0; /* the demo base's normaliser puts one before */
        assert_int_equal(out.len, sizeof text - 1 + space);
        assert_memory_equal(out.data + space, text, sizeof text - 1);
        assert_int_equal(tokenizer_piece(both[i], tokenizer_size(both[i]), &out), ERR_INVALID);
        buf_free(&out);
        free(ids.ids);
    }
    struct buf name;
    buf_init(&name, 100);
    assert_int_equal(tokenizer_piece(demo, 2, &name), ERR_OK);
    assert_string_equal(name.data, "</s>");
    buf_free(&name);
}

static void ids_are_found_by_name(void **state)
{
    (void)state;
    assert_int_equal(tokenizer_id(demo, "<s>"), 1);
    assert_int_equal(tokenizer_id(demo, "<0x00>"), 3);
    assert_int_equal(tokenizer_id(demo, "no such token"), -1);
    assert_int_equal(tokenizer_id(bytes, "<|end|>"), tokenizer_size(bytes) - 1);
    assert_true(tokenizer_is_special(demo, 1));
    assert_false(tokenizer_is_special(demo, 3));
    assert_false(tokenizer_is_special(demo, -1));
    assert_false(tokenizer_is_special(demo, 1 << 30));
    struct buf out;
    struct err err = { 0 };
    buf_init(&out, 100);
    assert_int_equal(buf_puts(&out, "before"), ERR_OK);
    const int32_t ids[] = { 300, 2048 };
    assert_int_equal(tokenizer_decode(demo, ids, 2, true, &out, &err), ERR_INVALID);
    assert_string_equal(err.msg, "token id 2048 is not in the vocabulary (0 to 2047)");
    assert_string_equal(out.data, "before");
    buf_free(&out);
}

/* --- hostile texts ------------------------------------------------------------------------------ */
/* Merging a word by looking for the best pair again and again would take hours here. */
static void long_words_do_not_take_quadratic_time(void **state)
{
    (void)state;
    const size_t n = 1 << 20;
    static const char *const units[] = { "a", "the", " ", "\n", "\xCC\x81\xCC\xA3", "=-" };
    char *text = malloc(n);
    for (size_t u = 0; u < sizeof units / sizeof units[0]; u++) {
        size_t len = strlen(units[u]);
        for (size_t i = 0; i < n; i++)
            text[i] = units[u][i % len];
        for (int i = 0; i < 3; i++) {
            const struct tokenizer *t = i == 0 ? demo : i == 1 ? bytes : unigram;
            struct tok_ids ids = encode(t, text, n - n % len, false);
            assert_true(ids.n > 0);
            stream_equals_whole(t, ids.ids, ids.n, false);
            free(ids.ids);
        }
    }
    free(text);
}

static json_t *with_pre_tokenizer(const char *pattern, const char *normalizer)
{
    json_t *change = json_pack("{s:{s:s, s:[{s:s, s:{s:s}, s:s, s:b}, {s:s, s:b, s:b, s:b}]}}",
                               "pre_tokenizer", "type", "Sequence", "pretokenizers", "type", "Split",
                               "pattern", "Regex", pattern, "behavior", "Isolated", "invert", 0, "type",
                               "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1, "use_regex", 0);
    assert_non_null(change);
    if (normalizer != NULL)
        json_object_set_new(change, "normalizer", json_pack("{s:s}", "type", normalizer));
    json_t *file = changed(bytes_path, change);
    json_decref(change);
    return file;
}

/* Exponential at one place, and quadratic over all places (half a minute if it were let). */
static void a_pattern_that_explodes_is_an_error(void **state)
{
    (void)state;
    static const char *const patterns[] = { "(?:a|aa|a+)+[bc]", "(a*)*\\1[bc]",
                                            "(?:a?){60}a{60}[bc]", "(?:ax|a)+[bc]" };
    char text[30000];
    memset(text, 'a', sizeof text);
    for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++) {
        json_t *file = with_pre_tokenizer(patterns[i], NULL);
        struct tokenizer *t = load_json(file);
        struct tok_ids ids = { 0 };
        struct err err = { 0 };
        assert_int_equal(tokenizer_encode(t, text, sizeof text, false, true, 0, &ids, &err),
                         ERR_INVALID);
        assert_non_null(strstr(err.msg, "gave up"));
        assert_int_equal(ids.n, 0);
        free(ids.ids);
        tokenizer_free(t);
        json_decref(file);
    }
}

/* Sorting combining marks by insertion would not end either. */
static void a_text_of_marks_is_normalised(void **state)
{
    (void)state;
    const size_t n = 400000;
    char *text = malloc(n), *want = malloc(n);
    for (size_t i = 0; i < n; i += 4) {
        memcpy(text + i, "\xCC\x81\xCC\xA3", 4); /* classes 230 and 220 */
        memcpy(want + i / 2, "\xCC\xA3", 2);
        memcpy(want + n / 2 + i / 2, "\xCC\x81", 2);
    }
    json_t *file = with_pre_tokenizer("\\s+", "NFD");
    struct tokenizer *t = load_json(file);
    struct tok_ids ids = encode(t, text, n, false);
    struct buf out;
    buf_init(&out, 2 * n);
    assert_int_equal(tokenizer_decode(t, ids.ids, ids.n, false, &out, NULL), ERR_OK);
    assert_int_equal(out.len, n);
    assert_memory_equal(out.data, want, n);
    buf_free(&out);
    free(ids.ids);
    tokenizer_free(t);
    json_decref(file);
    free(text);
    free(want);
}

static void *work(void *ud)
{
    struct tok_ids *ret = ud;
    static const char text[] = "The water was over the hill, and they've gone 1842 days. caf\xC3\xA9";
    for (int i = 0; i < 50; i++) {
        ret->n = 0;
        tokenizer_encode(bytes, text, strlen(text), true, true, 0, ret, NULL);
    }
    return NULL;
}

static void threads_share_a_tokenizer(void **state)
{
    (void)state;
    struct tok_ids ids[4] = { 0 };
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, &ids[i]), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    for (int i = 1; i < 4; i++)
        assert_ids("thread", &ids[i], ids[0].ids, ids[0].n);
    for (int i = 0; i < 4; i++)
        free(ids[i].ids);
}

/* --- hostile files ----------------------------------------------------------------------------- */
#define MODEL(rest)                                                                               \
    "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]" rest "}"
#define UNIGRAM(vocab, rest) "{\"model\":{\"type\":\"Unigram\",\"vocab\":[" vocab "]" rest "}}"
#define WITH(rest) "{" MODEL("") "," rest "}"

#define CHARSMAP(base64)                                                                          \
    WITH("\"normalizer\":{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"" base64 "\"}")

static void a_bad_file_is_refused_with_a_sentence(void **state)
{
    (void)state;
    static const struct { const char *json, *says; } cases[] = {
        { "", "line 1" },
        { "[]", "not an object" },
        { "{}", "no model" },
        { "{\"model\":{\"type\":\"WordPiece\",\"vocab\":{\"a\":0}}}", "WordPiece" },
        { "{\"model\":{\"type\":\"WordLevel\",\"vocab\":{\"a\":0}}}", "unk_token" },
        { "{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", "no vocabulary" },
        { "{\"model\":{\"type\":\"Unigram\",\"vocab\":{\"a\":0}}}", "no vocabulary" },
        { UNIGRAM("[\"a\"]", ""), "token 0 is not a text with a score" },
        { UNIGRAM("[\"a\",\"1\"]", ""), "token 0 is not a text with a score" },
        { UNIGRAM("[\"a\",1]", ",\"unk_id\":1"), "unk_id" },
        { UNIGRAM("[\"a\",1]", ",\"unk_id\":-1"), "unk_id" },
        { UNIGRAM("[\"a\",1]", ",\"alpha\":0.1"), "alpha" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}", "no vocabulary" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0}}}", "no list of merges" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}", "id -1" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":99999999999},\"merges\":[]}}", "99999999999" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":\"0\"},\"merges\":[]}}", "not a number" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", "id 0 belongs to" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a b\"]}}", "names \"b\"" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a a\"]}}", "makes \"aa\"" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a a a\"]}}", "not a pair" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a\"]}}", "not a pair" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[[\"a\",0]]}}", "not a pair" },
        { "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"\":0,\"a\":1},\"merges\":[[\"a\",\"\"]]}}", "not a pair" },
        { "{" MODEL(",\"dropout\":0.1") "}", "dropout" },
        { "{" MODEL(",\"end_of_word_suffix\":\"</w>\"") "}", "end_of_word_suffix" },
        { "{" MODEL(",\"continuing_subword_prefix\":\"##\"") "}", "continuing_subword_prefix" },
        { "{" MODEL(",\"fuse_unk\":1") "}", "fuse_unk" },
        { "{" MODEL(",\"magic\":1") "}", "magic" },
        { WITH("\"extra\":1"), "extra" },
        { WITH("\"version\":\"2.0\""), "version" },
        { WITH("\"added_tokens\":{}"), "added_tokens" },
        { WITH("\"added_tokens\":[{\"id\":7}]"), "no content" },
        { WITH("\"added_tokens\":[{\"id\":0,\"content\":\"x\"}]"), "id 0 belongs to" },
        { WITH("\"added_tokens\":[{\"id\":7,\"content\":\"a\"}]"), "the vocabulary says 0" },
        { WITH("\"added_tokens\":[{\"id\":7,\"content\":\"x\"},{\"id\":8,\"content\":\"x\"}]"), "twice" },
        { WITH("\"added_tokens\":[{\"id\":7,\"content\":\"x\",\"special\":3}]"), "special" },
        { WITH("\"added_tokens\":[{\"id\":7,\"content\":\" \"}],\"normalizer\":{\"type\":\"Strip\"}"),
          "nothing is left" },
        { WITH("\"normalizer\":{\"type\":\"BertNormalizer\",\"odd\":1}"), "odd" },
        { WITH("\"normalizer\":{\"type\":\"Prompt\"}"), "Prompt" },
        { WITH("\"normalizer\":{\"type\":\"Precompiled\"}"), "Precompiled" },
        { CHARSMAP("AAAA*"), "not base64" },
        { CHARSMAP(""), "damaged" },
        { CHARSMAP("BAAAAA=="), "damaged" },         /* four bytes of trie, none there */
        { CHARSMAP("BAAAAAAEAAAAAA=="), "damaged" }, /* the children lie outside */
        { CHARSMAP("/////wAEAAAAAA=="), "damaged" },
        { WITH("\"normalizer\":{}"), "no type" },
        { WITH("\"normalizer\":{\"type\":\"Sequence\"}"), "normalizers" },
        { WITH("\"normalizer\":{\"type\":\"NFC\",\"more\":1}"), "more" },
        { WITH("\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"String\":\"\"},\"content\":\"\"}"),
          "empty string" },
        { WITH("\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"(\"},\"content\":\"\"}"),
          "not closed" },
        { WITH("\"pre_tokenizer\":{\"type\":\"UnicodeScripts\"}"), "UnicodeScripts" },
        { WITH("\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"ab\"}"), "one character" },
        { WITH("\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"_\",\"prepend_scheme\":\"x\"}"),
          "prepend_scheme" },
        { WITH("\"pre_tokenizer\":{\"type\":\"Punctuation\",\"behavior\":\"Odd\"}"), "Odd" },
        { WITH("\"pre_tokenizer\":{\"type\":\"CharDelimiterSplit\",\"delimiter\":\"ab\"}"), "one character" },
        { WITH("\"pre_tokenizer\":{\"type\":\"FixedLength\",\"length\":0}"), "1 to 65535" },
        { WITH("\"decoder\":{\"type\":\"WordPiece\"}"), "WordPiece" },
        { WITH("\"decoder\":{\"type\":\"CTC\"}"), "CTC" },
        { WITH("\"decoder\":{\"type\":\"Strip\",\"content\":\" \",\"start\":-1,\"stop\":0}"), "start" },
        { WITH("\"post_processor\":{\"type\":\"RobertaProcessing\"}"), "RobertaProcessing" },
        { WITH("\"post_processor\":{\"type\":\"BertProcessing\",\"cls\":[\"a\",9],\"sep\":[\"b\",1]}"),
          "no token" },
        { WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[]}"), "text itself" },
        { WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":"
               "\"x\"}}]}"), "does not say its ids" },
        { WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":"
               "\"x\"}}],\"special_tokens\":{\"x\":{\"ids\":[77]}}}"), "no token" },
        { WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":"
               "\"A\"}},{\"Sequence\":{\"id\":\"A\"}}]}"), "piece 1" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct err err = { 0 };
        struct tokenizer *t = NULL;
        if (tokenizer_load(cases[i].json, strlen(cases[i].json), &t, &err) != ERR_INVALID)
            fail_msg("taken: %s", cases[i].json);
        if (strstr(err.msg, cases[i].says) == NULL)
            fail_msg("%s: \"%s\" does not say \"%s\"", cases[i].json, err.msg, cases[i].says);
    }
}

static void a_pattern_that_cannot_be_translated_is_refused(void **state)
{
    (void)state;
    static const char *const patterns[] = {
        "[a&&b]", "[a[bc]]", "\\p{Klingon}", "\\pL", "a{2}+", "a{2}?", "(?x:a b)", "\\R", "\\K", "[\\W]",
        "[]a]", "(*UTF8)", "(*LIMIT_MATCH=1)a", "a)", "[a", "\\", "\\xff", "\\x", "(?~a)", "\\Qa\\E", "\\Ga",
    };
    for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++) {
        json_t *file = with_pre_tokenizer(patterns[i], NULL);
        char *s = json_dumps(file, 0);
        struct err err = { 0 };
        struct tokenizer *t;
        if (tokenizer_load(s, strlen(s), &t, &err) != ERR_INVALID)
            fail_msg("taken: %s", patterns[i]);
        assert_non_null(strstr(err.msg, "pattern"));
        free(s);
        json_decref(file);
    }
}

static void nesting_and_size_are_bounded(void **state)
{
    (void)state;
    struct buf b;
    struct err err = { 0 };
    struct tokenizer *t;
    buf_init(&b, 1 << 24);
    buf_puts(&b, "{" MODEL("") ",\"normalizer\":");
    for (int i = 0; i < 1000; i++)
        buf_puts(&b, "{\"type\":\"Sequence\",\"normalizers\":[");
    buf_puts(&b, "{\"type\":\"NFC\"}");
    for (int i = 0; i < 1000; i++)
        buf_puts(&b, "]}");
    buf_puts(&b, "}");
    assert_int_equal(tokenizer_load(b.data, b.len, &t, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "too many sequences"));

    b.len = 0;
    err_clear(&err);
    buf_puts(&b, WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":["
                      "{\"SpecialToken\":{\"id\":\"x\"}},{\"Sequence\":{\"id\":\"A\"}}],"
                      "\"special_tokens\":{\"x\":{\"ids\":[0"));
    b.len--; /* the brace that WITH() adds */
    for (int i = 0; i < 100000; i++)
        buf_puts(&b, ",0");
    buf_puts(&b, "]}}}}");
    assert_int_equal(tokenizer_load(b.data, b.len, &t, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "more than 256"));
    buf_free(&b);
}

/* Whatever comes of a damaged file, it is a tokenizer that works or a sentence. */
static void damage(const char *path)
{
    size_t len;
    char *json = read_file(path, &len);
    srand(3);
    for (int round = 0; round < 1500; round++) {
        char *copy = malloc(len);
        memcpy(copy, json, len);
        size_t n = len;
        if (round % 3 == 0)
            n = (size_t)rand() % len;
        for (int k = rand() % 6; k > 0 && n > 0; k--)
            copy[(size_t)rand() % n] = (char)(rand() % 3 ? "0123456789{}[],:\"aN "[rand() % 20] : rand());
        struct err err = { 0 };
        struct tokenizer *t = NULL;
        if (tokenizer_load(copy, n, &t, &err) == ERR_OK) {
            struct tok_ids ids = { 0 };
            static const char text[] = "the w\xC3\xA9 <|end|> 42\n";
            if (tokenizer_encode(t, text, strlen(text), true, true, 0, &ids, NULL) == ERR_OK)
                stream_equals_whole(t, ids.ids, ids.n, false);
            free(ids.ids);
            tokenizer_free(t);
        } else {
            assert_true(err.msg[0] != '\0');
        }
        free(copy);
    }
    free(json);
}

static void damaged_files_do_not_crash(void **state)
{
    (void)state;
    damage(bytes_path);
    damage(unigram_path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_setting_answers_as_the_reference),
        cmocka_unit_test(nasty_texts_get_the_reference_s_ids),
        cmocka_unit_test(gpt2_cases_match),
        cmocka_unit_test(llama2_cases_match),
        cmocka_unit_test(qwen_cases_match),
        cmocka_unit_test(the_fox_of_stories260K_has_these_ids),
        cmocka_unit_test(a_stream_of_random_ids_equals_their_text),
        cmocka_unit_test(a_stream_that_continues_keeps_its_first_space),
        cmocka_unit_test(a_character_of_byte_tokens_comes_whole),
        cmocka_unit_test(bad_bytes_are_replaced_as_unicode_recommends),
        cmocka_unit_test(the_bound_holds_and_leaves_the_list_alone),
        cmocka_unit_test(special_tokens_are_plain_text_when_not_parsed),
        cmocka_unit_test(pieces_put_together_are_the_text),
        cmocka_unit_test(ids_are_found_by_name),
        cmocka_unit_test(long_words_do_not_take_quadratic_time),
        cmocka_unit_test(a_pattern_that_explodes_is_an_error),
        cmocka_unit_test(a_text_of_marks_is_normalised),
        cmocka_unit_test(threads_share_a_tokenizer),
        cmocka_unit_test(a_bad_file_is_refused_with_a_sentence),
        cmocka_unit_test(a_pattern_that_cannot_be_translated_is_refused),
        cmocka_unit_test(nesting_and_size_are_bounded),
        cmocka_unit_test(damaged_files_do_not_crash),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, setup, teardown);
}
