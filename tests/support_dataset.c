/* support_dataset.c - see support_dataset.h. */
#include "tests/support_dataset.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

char *data_slurp(const char *path, size_t *len)
{
    struct err err = { 0 };
    char *s;
    if (file_read(path, 64 << 20, &s, len, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return s;
}

struct tokenizer *data_tokenizer(const char *json, size_t len)
{
    struct err err = { 0 };
    struct tokenizer *t = NULL;
    if (tokenizer_load(json, len, &t, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return t;
}

struct base data_base(int V, int positions, int eos, const char *tokenizer_config)
{
    static char name[] = "test";
    struct base b = { .name = name, .tokenizer_config = tokenizer_config };
    b.arch.V = V;
    b.arch.max_positions = positions;
    b.arch.eos[0] = eos;
    b.arch.neos = eos >= 0;
    return b;
}

struct data_model data_demo(void)
{
    size_t len;
    char *json = data_slurp("examples/demo-base/tokenizer.json", &len);
    struct data_model m = { .tok = data_tokenizer(json, len) };
    free(json);
    m.base = data_base(2048, 512, 2, "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\"}");
    return m;
}

struct dataset_model data_of(const struct data_model *m)
{
    return (struct dataset_model){ &m->base, m->tok, m->chat };
}

/* Feeds the text in pieces of n bytes. */
int data_feed(const struct dataset_model *m, const char *text, size_t len, size_t n,
                const struct dataset_opts *o, struct dataset_report *rep, struct train_set **ret,
                struct err *err)
{
    struct dataset *d;
    int rc = dataset_open(m, o, &d, err);
    assert_int_equal(rc, ERR_OK);
    for (size_t i = 0; i < len; i += n) {
        rc = dataset_feed(d, text + i, len - i < n ? len - i : n, err);
        if (rc != ERR_OK) {
            dataset_abort(d);
            *rep = (struct dataset_report){ 0 };
            return rc;
        }
    }
    return dataset_end(d, rep, ret, err);
}

struct train_set *data_read(const struct data_model *m, const char *text, const struct dataset_opts *o,
                                 struct dataset_report *rep)
{
    struct dataset_report local, *r = rep ? rep : &local;
    struct err err = { 0 };
    struct train_set *set = NULL;
    const struct dataset_model dm = data_of(m);
    if (data_feed(&dm, text, strlen(text), SIZE_MAX / 2, o, r, &set, &err) != ERR_OK)
        fail_msg("%s: %s", text, err.msg);
    if (rep == NULL)
        dataset_report_free(r);
    return set;
}

void data_want_id(struct data_want *w, int32_t id, int learn)
{
    w->ids[w->n] = id;
    w->learn[w->n++] = (uint8_t)learn;
}

/* The ids of a text alone, without special tokens in front. */
void data_want_text(struct data_want *w, const struct data_model *m, const char *text, int learn)
{
    struct tok_ids ids = { 0 };
    struct err err = { 0 };
    assert_int_equal(tokenizer_encode(m->tok, text, strlen(text), false, true, 0, &ids, &err), ERR_OK);
    for (size_t i = 0; i < ids.n; i++)
        data_want_id(w, ids.ids[i], learn);
    free(ids.ids);
}

void data_assert(const struct train_set *s, size_t i, const struct data_want *w)
{
    assert_true(i < s->n);
    const struct train_example *e = &s->examples[i];
    bool same = e->n == w->n;
    for (int k = 0; same && k < w->n; k++)
        same = e->tokens[k] == w->ids[k] && e->learn[k] == w->learn[k];
    if (same)
        return;
    for (int k = 0; k < e->n; k++)
        print_error("%d%s ", (int)e->tokens[k], e->learn[k] ? "*" : "");
    print_error("instead of\n");
    for (int k = 0; k < w->n; k++)
        print_error("%d%s ", (int)w->ids[k], w->learn[k] ? "*" : "");
    fail_msg("example %zu differs", i);
}

/* A byte-level tokenizer that has every marker of the templates as a special token. */
static const char *const markers[] = {
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<end_of_turn>", "<start_of_turn>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]",
    "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<\xef\xbd\x9c" "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>",
    "<\xef\xbd\x9c" "User\xef\xbd\x9c>", "<\xef\xbd\x9c" "Assistant\xef\xbd\x9c>", "<think>", "</think>",
};
enum { MARKERS = sizeof markers / sizeof markers[0] };

struct tokenizer *data_markers(int *ret_size)
{
    json_error_t why;
    json_t *t = json_load_file("tests/data/tokenizer_bytelevel.json", 0, &why);
    assert_non_null(t);
    json_t *added = json_object_get(t, "added_tokens");
    json_t *vocab = json_object_get(json_object_get(t, "model"), "vocab");
    int next = 0;
    const char *key;
    json_t *v;
    json_object_foreach(vocab, key, v)
        if (json_integer_value(v) >= next)
            next = (int)json_integer_value(v) + 1;
    size_t k;
    json_array_foreach(added, k, v)
        if (json_integer_value(json_object_get(v, "id")) >= next)
            next = (int)json_integer_value(json_object_get(v, "id")) + 1;
    for (size_t i = 0; i < MARKERS; i++)
        json_array_append_new(added, json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", next++, "content",
                                               markers[i], "single_word", 0, "lstrip", 0, "rstrip", 0,
                                               "normalized", 0, "special", 1));
    char *text = json_dumps(t, 0);
    struct tokenizer *tok = data_tokenizer(text, strlen(text));
    free(text);
    json_decref(t);
    *ret_size = next;
    return tok;
}

void data_template(struct data_model *m, const char *name, const char *text)
{
    struct err err = { 0 };
    if (chat_template_open(name, text, m->base.tokenizer_config, &m->chat, &err) != ERR_OK)
        fail_msg("%s", err.msg);
}
