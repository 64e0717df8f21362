/* test_sentencepiece.c - a tokenizer.model gives the tokens that the tokenizer.json beside it gives, or
 * is refused by name. */
#include "engine/base.h"
#include "engine/sentencepiece.h"
#include "engine/tokenizer.h"
#include "engine/util.h"
#include "tests/support_model.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])

static char *read_file(const char *path, size_t *ret_len)
{
    char *text;
    struct err err = { 0 };
    if (file_read(path, 64 << 20, &text, ret_len, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return text;
}

static char *json_of(const void *model, size_t len, const char *config)
{
    struct err err = { 0 };
    char *json = NULL;
    if (spm_tokenizer(model, len, config, NULL, &json, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return json;
}

static struct tokenizer *load(const char *json)
{
    struct err err = { 0 };
    struct tokenizer *t = NULL;
    if (tokenizer_load(json, strlen(json), &t, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return t;
}

static struct tok_ids encode(const struct tokenizer *t, const char *s, size_t len, bool special)
{
    struct tok_ids ids = { 0 };
    assert_int_equal(tokenizer_encode(t, s, len, special, true, 0, &ids, NULL), ERR_OK);
    return ids;
}

static void same_ids(const struct tokenizer *a, const struct tokenizer *b, const char *s, size_t len)
{
    struct tok_ids x = encode(a, s, len, true), y = encode(b, s, len, true);
    assert_int_equal(x.n, y.n);
    assert_memory_equal(x.ids, y.ids, x.n * sizeof *x.ids);
    free(x.ids);
    free(y.ids);
}

static void check_ids(const struct tokenizer *t, const char *s, const int32_t *want, size_t n)
{
    struct tok_ids got = encode(t, s, strlen(s), true);
    for (size_t i = 0; i < got.n && i < n; i++)
        if (got.ids[i] != want[i])
            fail_msg("\"%s\": id %zu is %d, not %d", s, i, got.ids[i], want[i]);
    assert_int_equal(got.n, n);
    free(got.ids);
}

/* --- against others' files --------------------------------------------------------------------- */

/* The very merges, in their order, that Hugging Face's converter wrote. */
static void llama2s_merges_are_those_of_its_tokenizer_json(void **state)
{
    (void)state;
    size_t len;
    const char *path = support_shared("tokenizers/llama2-tinyllama/tokenizer.model");
    if (path == NULL)
        skip();
    char *model = read_file(path, &len), *json = json_of(model, len, NULL);
    json_t *got = json_loads(json, 0, NULL);
    json_t *want = json_load_file(support_shared("tokenizers/llama2-tinyllama/tokenizer.json"), 0, NULL);
    const json_t *gm = json_object_get(got, "model"), *wm = json_object_get(want, "model");
    assert_true(json_equal(json_object_get(gm, "vocab"), json_object_get(wm, "vocab")));
    const json_t *a = json_object_get(gm, "merges"), *b = json_object_get(wm, "merges");
    assert_int_equal(json_array_size(a), json_array_size(b));
    for (size_t i = 0; i < json_array_size(a); i++) {
        char text[400];
        const json_t *pair = json_array_get(a, i);
        snprintf(text, sizeof text, "%s %s", json_string_value(json_array_get(pair, 0)),
                 json_string_value(json_array_get(pair, 1)));
        assert_string_equal(text, json_string_value(json_array_get(b, i)));
    }
    json_decref(got);
    json_decref(want);
    free(json);
    free(model);
}

static void llama2_gives_the_ids_of_its_tokenizer_json_in_every_case(void **state)
{
    (void)state;
    static const char mark[] = "\n__ggml_vocab_test__\n";
    size_t len, json_len, in_len;
    const char *path = support_shared("tokenizers/llama2-tinyllama/tokenizer.model");
    if (path == NULL)
        skip();
    char *model = read_file(path, &len), *mine = json_of(model, len, NULL);
    char *theirs = read_file(support_shared("tokenizers/llama2-tinyllama/tokenizer.json"), &json_len);
    char *in = read_file(support_shared("tokenizers/llama2-tinyllama/cases.inp"), &in_len);
    struct tokenizer *a = load(mine), *b = load(theirs);
    int cases = 0;
    for (char *at = in; at != NULL; cases++) {
        char *stop = memmem(at, (size_t)(in + in_len - at), mark, strlen(mark));
        same_ids(a, b, at, (size_t)((stop ? stop : in + in_len) - at));
        at = stop ? stop + strlen(mark) : NULL;
    }
    assert_true(cases >= 46);
    tokenizer_free(a);
    tokenizer_free(b);
    free(model);
    free(mine);
    free(theirs);
    free(in);
}

static void the_demo_imports_from_its_model_alone_and_reads_texts_the_same(void **state)
{
    (void)state;
    char dir[64], command[300];
    struct base *a = NULL, *b = NULL;
    support_tmpdir(dir);
    snprintf(command, sizeof command,
             "cp examples/demo-base/config.json examples/demo-base/model.safetensors "
             "examples/demo-base/tokenizer.model examples/demo-base/tokenizer_config.json %s", dir);
    assert_int_equal(system(command), 0);
    a = support_base_dir(dir, "nf4", NULL, PREC_EXACT);
    b = support_base_dir("examples/demo-base", "nf4", NULL, PREC_EXACT);
    struct tokenizer *x = load(a->tokenizer_json), *y = load(b->tokenizer_json);
    static const char *const texts[] = {
        "The sea", "Once upon a time, there was a KING.", "two  spaces, three   of them", "", " x",
        "line\nbreaks\n\nand\ttabs", "na\xc3\xafve \xe2\x98\x83 <s> </s> <unk>", "1234567890",
    };
    for (size_t i = 0; i < COUNT(texts); i++)
        same_ids(x, y, texts[i], strlen(texts[i]));
    size_t len;
    char *readme = read_file("README.md", &len);
    same_ids(x, y, readme, len);
    free(readme);
    tokenizer_free(x);
    tokenizer_free(y);
    base_free(a);
    base_free(b);
    support_remove(dir);
}

/* Sums in fp32, the longest entry of the map, spaces squeezed: all as SentencePiece itself
 * (make_spm_cases.py made the model and asked). */
static void a_unigram_model_spells_as_sentencepiece_does(void **state)
{
    (void)state;
    size_t len, i;
    char *model = read_file("tests/data/spm_unigram.model", &len);
    char *json = json_of(model, len, "{\"add_bos_token\": false}");
    struct tokenizer *t = load(json);
    json_t *cases = json_load_file("tests/data/spm_cases.json", JSON_ALLOW_NUL, NULL), *c;
    assert_true(json_array_size(cases) > 200);
    json_array_foreach(cases, i, c) {
        const json_t *text = json_array_get(c, 0), *want = json_array_get(c, 1);
        struct tok_ids got = encode(t, json_string_value(text), json_string_length(text), true);
        bool same = got.n == json_array_size(want);
        for (size_t k = 0; same && k < got.n; k++)
            same = got.ids[k] == json_integer_value(json_array_get(want, k));
        if (!same)
            fail_msg("case %zu, \"%s\", has other ids", i, json_string_value(text));
        free(got.ids);
    }
    json_decref(cases);
    tokenizer_free(t);
    free(json);
    free(model);
}

/* --- a model made by hand ---------------------------------------------------------------------------- */
static void put(struct buf *b, const void *data, size_t n) { assert_int_equal(buf_add(b, data, n), 0); }

static void put_varint(struct buf *b, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        put(b, (uint8_t[]){ (uint8_t)(v | 0x80) }, 1);
    put(b, (uint8_t[]){ (uint8_t)v }, 1);
}

static void put_bytes(struct buf *b, unsigned number, const void *data, size_t n)
{
    put_varint(b, number << 3 | 2);
    put_varint(b, n);
    put(b, data, n);
}

static void put_int(struct buf *b, unsigned number, uint64_t v)
{
    put_varint(b, number << 3);
    put_varint(b, v);
}

static void put_piece(struct buf *b, const char *s, float score, unsigned type)
{
    struct buf p;
    buf_init(&p, 1 << 20);
    put_bytes(&p, 1, s, strlen(s));
    put_varint(&p, 2 << 3 | 5);
    put(&p, &score, 4);
    if (type != PIECE_NORMAL)
        put_int(&p, 3, type);
    put_bytes(b, 1, p.data, p.len);
    buf_free(&p);
}

struct settings {
    unsigned kind;         /* 2: BPE */
    bool prefix, squeeze;
    const char *charsmap;
    const char *last;      /* one more piece */
};

/* 0 <unk> 1 <s> 2 </s> 3 bytes of "?", 4 U+2581, 5 a, 6 b, 7 ab, 8 U+2581 a, 9 U+2581 ab, 10 <user> */
static void make(struct buf *b, const struct settings *s)
{
    struct buf m;
    buf_init(b, 1 << 20);
    put_piece(b, "<unk>", 0, PIECE_UNKNOWN);
    put_piece(b, "<s>", 0, PIECE_CONTROL);
    put_piece(b, "</s>", 0, PIECE_CONTROL);
    put_piece(b, "<0x3F>", 0, PIECE_BYTE);
    put_piece(b, "\xe2\x96\x81", -10, PIECE_NORMAL);
    put_piece(b, "a", -11, PIECE_NORMAL);
    put_piece(b, "b", -12, PIECE_NORMAL);
    put_piece(b, "ab", -1, PIECE_NORMAL);
    put_piece(b, "\xe2\x96\x81" "a", -2, PIECE_NORMAL);
    put_piece(b, "\xe2\x96\x81" "ab", -3, PIECE_NORMAL);
    put_piece(b, "<user>", 0, PIECE_USER);
    if (s->last != NULL)
        put_piece(b, s->last, -4, PIECE_NORMAL);
    buf_init(&m, 1 << 20);
    put_int(&m, 3, s->kind);
    put_int(&m, 43, (uint64_t)-1); /* no padding */
    put_bytes(b, 2, m.data, m.len);
    buf_free(&m);
    buf_init(&m, 1 << 20);
    put_bytes(&m, 1, "identity", 8);
    put_bytes(&m, 2, s->charsmap ? s->charsmap : "", s->charsmap ? strlen(s->charsmap) : 0);
    put_int(&m, 3, s->prefix);
    put_int(&m, 4, s->squeeze);
    put_bytes(b, 3, m.data, m.len);
    buf_free(&m);
}

static struct tokenizer *made(const struct settings *s, const char *config)
{
    struct buf b;
    make(&b, s);
    char *json = json_of(b.data, b.len, config);
    struct tokenizer *t = load(json);
    free(json);
    buf_free(&b);
    return t;
}

static void the_best_score_merges_first_and_bytes_stand_in(void **state)
{
    (void)state;
    struct tokenizer *t = made(&(struct settings){ .kind = 2, .prefix = true }, NULL);
    check_ids(t, "ab", (const int32_t[]){ 1, 9 }, 2);            /* a b first, then the space */
    check_ids(t, "aab", (const int32_t[]){ 1, 8, 7 }, 3);
    check_ids(t, "a?", (const int32_t[]){ 1, 8, 3 }, 3);         /* the byte */
    check_ids(t, "a!", (const int32_t[]){ 1, 8, 0 }, 3);         /* no byte for this one */
    check_ids(t, "a<user>b", (const int32_t[]){ 1, 8, 10, 4, 6 }, 5);
    check_ids(t, "a  a", (const int32_t[]){ 1, 8, 4, 8 }, 4);
    tokenizer_free(t);
}

static void the_best_sum_of_scores_spells_and_nothing_else_does(void **state)
{
    (void)state;
    struct tokenizer *t = made(&(struct settings){ .kind = 1, .prefix = true }, NULL);
    check_ids(t, "ab", (const int32_t[]){ 1, 9 }, 2);
    check_ids(t, "aab", (const int32_t[]){ 1, 8, 7 }, 3);
    check_ids(t, "a?", (const int32_t[]){ 1, 8, 3 }, 3);      /* the byte */
    check_ids(t, "a!!", (const int32_t[]){ 1, 8, 0 }, 3);     /* unknown, together */
    check_ids(t, "a<user>b", (const int32_t[]){ 1, 8, 10, 4, 6 }, 5);
    /* names of bytes and of control pieces are no spelling of a text */
    check_ids(t, "a<0x3F>", (const int32_t[]){ 1, 8, 0 }, 3);
    struct tok_ids got = { 0 };
    assert_int_equal(tokenizer_encode(t, "<s>", 3, false, false, 0, &got, NULL), ERR_OK);
    for (size_t i = 0; i < got.n; i++)
        assert_true(got.ids[i] == 4 || got.ids[i] == 0);
    free(got.ids);
    tokenizer_free(t);
}

static void spaces_are_treated_as_the_model_says(void **state)
{
    (void)state;
    struct tokenizer *t = made(&(struct settings){ .kind = 2, .prefix = false }, NULL);
    check_ids(t, "ab ab", (const int32_t[]){ 1, 7, 9 }, 3);
    tokenizer_free(t);
    t = made(&(struct settings){ .kind = 2, .prefix = true, .squeeze = true }, NULL);
    check_ids(t, "  a   ab ", (const int32_t[]){ 1, 8, 9 }, 3);
    check_ids(t, "a \n ab \n", (const int32_t[]){ 1, 8, 4, 0, 9, 4, 0 }, 7); /* ends of lines are no ends */
    check_ids(t, "a\xe2\x96\x81 ", (const int32_t[]){ 1, 8 }, 2);             /* marks at the end go, too */
    tokenizer_free(t);
}

static void the_config_beside_it_is_used(void **state)
{
    (void)state;
    const struct settings s = { .kind = 2, .prefix = true };
    struct tokenizer *t = made(&s, "{\"add_bos_token\": false, \"add_eos_token\": true}");
    check_ids(t, "a", (const int32_t[]){ 8, 2 }, 2);
    tokenizer_free(t);
    t = made(&s, "{\"legacy\": false}"); /* no second space after the user's token */
    check_ids(t, "a<user>b", (const int32_t[]){ 1, 8, 10, 6 }, 4);
    tokenizer_free(t);
    t = made(&s, "{\"add_prefix_space\": false}");
    check_ids(t, "a", (const int32_t[]){ 1, 5 }, 2);
    tokenizer_free(t);
    t = made(&s, "{\"added_tokens_decoder\": {\"11\": {\"content\": \"<pad>\", \"special\": true, "
                 "\"normalized\": false}, \"2\": {\"content\": \"</s>\", \"special\": true, "
                 "\"normalized\": false, \"lstrip\": true}}}");
    check_ids(t, "a<pad>", (const int32_t[]){ 1, 8, 11 }, 3);
    check_ids(t, "a  </s>", (const int32_t[]){ 1, 8, 2 }, 3); /* lstrip takes the spaces */
    assert_true(tokenizer_is_special(t, 11));
    tokenizer_free(t);
}

static void what_is_not_understood_is_refused_by_name(void **state)
{
    (void)state;
    static const struct {
        struct settings s;
        const char *config, *added, *says;
    } cases[] = {
        { { .kind = 4 }, NULL, NULL, "character model" },
        { { .kind = 3 }, NULL, NULL, "word model" },
        { { .kind = 2, .last = "ab" }, NULL, NULL, "piece 11, \"ab\", is there twice" },
        { { .kind = 2, .last = "\xff" }, NULL, NULL, "piece 11 is not UTF-8" },
        { { .kind = 2, .last = "" }, NULL, NULL, "piece 11 is empty" },
        { { .kind = 2 }, "{\"add_bos_token\": 1}", NULL, "add_bos_token" },
        { { .kind = 2 }, "{\"bos_token\": \"<bos>\"}", NULL, "<bos>" },
        { { .kind = 2 }, "{\"tokenizer_class\": \"T5Tokenizer\"}", NULL, "T5Tokenizer" },
        { { .kind = 2 }, "{\"added_tokens_decoder\": {\"x\": {\"content\": \"y\"}}}", NULL,
          "added_tokens_decoder" },
        { { .kind = 2 }, "{\"added_tokens_decoder\": {\"2\": {\"content\": \"y\"}}}", NULL, "\"y\"" },
        { { .kind = 2 }, NULL, "{\"<pad>\": 11}", "<pad>" },
        { { .kind = 2 }, NULL, "[]", "added_tokens.json" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buf b;
        struct err err = { 0 };
        char *json = NULL;
        make(&b, &cases[i].s);
        int rc = spm_tokenizer(b.data, b.len, cases[i].config, cases[i].added, &json, &err);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("case %zu: code %d, \"%s\"", i, rc, err.msg);
        buf_free(&b);
    }
}

static void damaged_models_end_in_a_sentence(void **state)
{
    (void)state;
    const char *many = getenv("LORAD_FUZZ"); /* rounds, for longer runs by hand */
    const int rounds = many ? atoi(many) : 2000;
    struct buf b;
    uint64_t seed = 1;
    make(&b, &(struct settings){ .kind = 2, .prefix = true });
    for (int i = 0; i < rounds; i++) {
        struct err err = { 0 };
        char *json = NULL;
        size_t len = (size_t)i < b.len ? (size_t)i : b.len; /* first cut off everywhere */
        char *copy = malloc(len + 1);
        memcpy(copy, b.data, len);
        for (int k = 0; (size_t)i >= b.len && k < 1 + i % 3; k++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            copy[(seed >> 33) % len] = i % 2 ? (char)(seed >> 20)
                                             : (char)(copy[(seed >> 33) % len] ^ 1 << (seed >> 20 & 7));
        }
        copy = realloc(copy, len ? len : 1);
        int rc = spm_tokenizer(copy, len, NULL, NULL, &json, &err);
        assert_true(rc == ERR_OK ? json != NULL : err.msg[0] != '\0');
        free(json);
        free(copy);
    }
    buf_free(&b);
}

/* The same for a Unigram model with its map, whose damage only the tokenizer finds. */
static void a_damaged_map_or_score_ends_in_a_sentence(void **state)
{
    (void)state;
    size_t len;
    char *model = read_file("tests/data/spm_unigram.model", &len);
    uint64_t seed = 7;
    int good = 0, bad = 0;
    for (int i = 0; i < 150; i++) {
        struct err err = { 0 };
        char *json = NULL, *copy = malloc(len);
        struct tokenizer *t = NULL;
        memcpy(copy, model, len);
        for (int k = 0; k < 4; k++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            copy[(seed >> 33) % len] = (char)(seed >> 20);
        }
        int rc = spm_tokenizer(copy, len, NULL, NULL, &json, &err);
        if (rc == ERR_OK)
            rc = tokenizer_load(json, strlen(json), &t, &err);
        assert_true(rc == ERR_OK || err.msg[0] != '\0');
        if (rc == ERR_OK) {
            struct tok_ids ids = { 0 };
            rc = tokenizer_encode(t, "na\xc3\xafve e\xcc\x81 \xef\xac\x81", 14, true, true, 0, &ids, &err);
            assert_true(rc == ERR_OK || err.msg[0] != '\0');
            free(ids.ids);
        }
        good += rc == ERR_OK;
        bad += rc != ERR_OK;
        tokenizer_free(t);
        free(json);
        free(copy);
    }
    assert_true(good > 0 && bad > 0);
    free(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(llama2s_merges_are_those_of_its_tokenizer_json),
        cmocka_unit_test(llama2_gives_the_ids_of_its_tokenizer_json_in_every_case),
        cmocka_unit_test(the_demo_imports_from_its_model_alone_and_reads_texts_the_same),
        cmocka_unit_test(a_unigram_model_spells_as_sentencepiece_does),
        cmocka_unit_test(the_best_score_merges_first_and_bytes_stand_in),
        cmocka_unit_test(the_best_sum_of_scores_spells_and_nothing_else_does),
        cmocka_unit_test(spaces_are_treated_as_the_model_says),
        cmocka_unit_test(the_config_beside_it_is_used),
        cmocka_unit_test(what_is_not_understood_is_refused_by_name),
        cmocka_unit_test(damaged_models_end_in_a_sentence),
        cmocka_unit_test(a_damaged_map_or_score_ends_in_a_sentence),
    };
    return cmocka_run_group_tests_name("sentencepiece", tests, NULL, NULL);
}
