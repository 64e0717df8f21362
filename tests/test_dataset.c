/* test_dataset.c - training data: ids and what is learned of them, against what the test puts together
 * by hand; every way in which a line can be bad. */
#include "engine/dataset.h"
#include "tests/support_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define DEMO "examples/demo-base"

/* A model as far as training data is concerned. */
struct model {
    struct base base;
    struct tokenizer *tok;
    struct chat_template *chat;
};
static struct model demo;

static char *slurp(const char *path, size_t *len)
{
    struct err err = { 0 };
    char *s;
    if (file_read(path, 64 << 20, &s, len, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return s;
}

static struct tokenizer *load(const char *json, size_t len)
{
    struct err err = { 0 };
    struct tokenizer *t = NULL;
    if (tokenizer_load(json, len, &t, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return t;
}

static struct base shape(int V, int positions, int eos, const char *tokenizer_config)
{
    static char name[] = "test";
    struct base b = { .name = name, .tokenizer_config = tokenizer_config };
    b.arch.V = V;
    b.arch.max_positions = positions;
    b.arch.eos[0] = eos;
    b.arch.neos = eos >= 0;
    return b;
}

static int setup(void **state)
{
    (void)state;
    size_t len;
    char *json = slurp(DEMO "/tokenizer.json", &len);
    demo.tok = load(json, len);
    free(json);
    demo.base = shape(2048, 512, 2, "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\"}");
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tokenizer_free(demo.tok);
    return 0;
}

static struct dataset_model model_of(const struct model *m)
{
    return (struct dataset_model){ &m->base, m->tok, m->chat };
}

/* Feeds the text in pieces of n bytes. */
static int feed(const struct dataset_model *m, const char *text, size_t len, size_t n,
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

static struct train_set *read_ok(const struct model *m, const char *text, const struct dataset_opts *o,
                                 struct dataset_report *rep)
{
    struct dataset_report local, *r = rep ? rep : &local;
    struct err err = { 0 };
    struct train_set *set = NULL;
    const struct dataset_model dm = model_of(m);
    if (feed(&dm, text, strlen(text), SIZE_MAX / 2, o, r, &set, &err) != ERR_OK)
        fail_msg("%s: %s", text, err.msg);
    if (rep == NULL)
        dataset_report_free(r);
    return set;
}

/* --- expected examples, put together by hand -------------------------------------------------- */

struct want {
    int32_t ids[32768];
    uint8_t learn[32768];
    int n;
};

static void want_id(struct want *w, int32_t id, int learn)
{
    w->ids[w->n] = id;
    w->learn[w->n++] = (uint8_t)learn;
}

/* The ids of a text alone, without special tokens in front. */
static void want_text(struct want *w, const struct model *m, const char *text, int learn)
{
    struct tok_ids ids = { 0 };
    struct err err = { 0 };
    assert_int_equal(tokenizer_encode(m->tok, text, strlen(text), false, true, 0, &ids, &err), ERR_OK);
    for (size_t i = 0; i < ids.n; i++)
        want_id(w, ids.ids[i], learn);
    free(ids.ids);
}

static void assert_example(const struct train_set *s, size_t i, const struct want *w)
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

/* --- text ------------------------------------------------------------------------------------------ */

static void text_is_learned_up_to_eos(void **state)
{
    (void)state;
    struct want w = { 0 };
    want_id(&w, 1, 0);
    want_text(&w, &demo, "The sea was calm.", 1);
    want_id(&w, 2, 1);
    static const char *const same[] = {
        "{\"text\":\"The sea was calm.\"}\n",
        "{\"text\":\"The sea was calm.\"}",
        "{\"text\":\"The sea was calm.</s>\"}",       /* EOS is there already */
        "{\"text\":\"<s>The sea was calm.\"}",         /* and BOS */
        "\xef\xbb\xbf{\"text\":\"The sea was calm.\"}\r\n",
        "\n \t\r\n{ \"text\" : \"The sea was calm.\", \"id\": [1] }  \n\n",
        "[{\"text\":\"The sea was calm.\"}]",
        "\xef\xbb\xbf [\n {\n\"text\":\n\"The sea was calm.\"}\n ]\n ",
        "{\"prompt\":\"\",\"completion\":\"The sea was calm.\"}",
        "{\"messages\":null,\"text\":\"The sea was calm.\"}",
    };
    for (size_t i = 0; i < sizeof same / sizeof same[0]; i++) {
        struct dataset_report rep;
        struct train_set *s = read_ok(&demo, same[i], NULL, &rep);
        assert_int_equal(s->n, 1);
        assert_example(s, 0, &w);
        assert_int_equal(rep.lines, 1);
        assert_int_equal(rep.examples, 1);
        assert_int_equal(rep.tokens, w.n);
        assert_int_equal(rep.targets, w.n - 1);
        assert_int_equal(rep.longest, w.n);
        assert_int_equal(rep.cut + rep.empty + rep.bad_lines, 0);
        train_set_free(s);
    }
}

/* In the vocabulary of the demo base a text's first word has a space in front, and a word behind
 * another text has none unless it is written: so prompt and completion are pieces of one text. */
static void of_prompt_and_completion_the_second_is_learned(void **state)
{
    (void)state;
    struct want w = { 0 };
    want_id(&w, 1, 0);
    want_text(&w, &demo, "Question: how are you?", 0);
    want_text(&w, &demo, "I am well.", 1); /* " I am well." behind a text */
    want_id(&w, 2, 1);
    static const char line[] = "{\"prompt\":\"Question: how are you?\",\"completion\":\" I am well.\"}";
    struct train_set *s = read_ok(&demo, line, NULL, NULL);
    assert_example(s, 0, &w);
    train_set_free(s);

    const struct dataset_opts all = { .learn_prompts = true };
    for (int i = 1; i < w.n; i++)
        w.learn[i] = 1;
    s = read_ok(&demo, line, &all, NULL);
    assert_example(s, 0, &w);
    train_set_free(s);
}

/* A token across the border belongs to the completion: it holds its first letters. */
static void a_token_that_holds_prompt_and_completion_is_learned(void **state)
{
    (void)state;
    struct want whole = { 0 };
    want_text(&whole, &demo, "the weather", 0);
    struct train_set *s = read_ok(&demo, "{\"prompt\":\"the wea\",\"completion\":\"ther\"}", NULL, NULL);
    const struct train_example *e = &s->examples[0];
    assert_int_equal(e->n, whole.n + 2);
    int first = 0;
    while (!e->learn[first])
        first++;
    struct buf b;
    struct err err = { 0 };
    buf_init(&b, 1000);
    assert_int_equal(tokenizer_decode(demo.tok, e->tokens + first, (size_t)(e->n - first), true, &b, &err),
                     ERR_OK);
    assert_non_null(strstr(b.data, "ther"));
    for (int i = 0; i < whole.n; i++)
        assert_int_equal(e->tokens[i + 1], whole.ids[i]);
    buf_free(&b);
    train_set_free(s);
}

static void alpaca_lines_have_the_known_prompt(void **state)
{
    (void)state;
    static const char *const lines[][2] = {
        { "{\"instruction\":\"Name a tree.\",\"input\":\"\",\"output\":\"An oak.\"}",
          "Below is an instruction that describes a task. Write a response that appropriately completes "
          "the request.\\n\\n### Instruction:\\nName a tree.\\n\\n### Response:\\n" },
        { "{\"output\":\"An oak.\",\"instruction\":\"Name a tree.\"}",
          "Below is an instruction that describes a task. Write a response that appropriately completes "
          "the request.\\n\\n### Instruction:\\nName a tree.\\n\\n### Response:\\n" },
        { "{\"instruction\":\"Name a tree.\",\"input\":\"It is old.\",\"output\":\"An oak.\",\"text\":\"x\"}",
          "Below is an instruction that describes a task, paired with an input that provides further "
          "context. Write a response that appropriately completes the request.\\n\\n### Instruction:\\n"
          "Name a tree.\\n\\n### Input:\\nIt is old.\\n\\n### Response:\\n" },
    };
    for (size_t i = 0; i < 3; i++) {
        char other[1000];
        snprintf(other, sizeof other, "{\"prompt\":\"%s\",\"completion\":\"An oak.\"}", lines[i][1]);
        struct train_set *a = read_ok(&demo, lines[i][0], NULL, NULL);
        struct train_set *b = read_ok(&demo, other, NULL, NULL);
        assert_memory_equal(a->hash, b->hash, 32);
        assert_int_equal(a->examples[0].n, b->examples[0].n);
        train_set_free(a);
        train_set_free(b);
    }
}

/* --- conversations without a template ------------------------------------------------------------ */

static void plain_conversations_are_an_example_for_each_answer(void **state)
{
    (void)state;
    struct want a = { 0 }, b = { 0 };
    want_id(&a, 1, 0);
    want_text(&a, &demo, "Be brief.\n\nUser: Hello.\nAssistant:", 0);
    want_text(&a, &demo, "Good day.", 1);
    want_id(&a, 2, 1);
    want_id(&b, 1, 0);
    want_text(&b, &demo, "Be brief.\n\nUser: Hello.\nAssistant: Good day.\nUser: Who?\nAssistant:", 0);
    want_text(&b, &demo, "Nobody.", 1);
    want_id(&b, 2, 1);
    static const char *const lines[] = {
        "{\"messages\":[{\"role\":\"system\",\"content\":\"Be brief.\"},{\"role\":\"user\",\"content\":\"Hello.\"},"
        "{\"role\":\"assistant\",\"content\":\"Good day.\"},{\"role\":\"user\",\"content\":\"Who?\"},"
        "{\"role\":\"assistant\",\"content\":\"Nobody.\",\"weight\":1}]}",
        "{\"conversations\":[{\"from\":\"system\",\"value\":\"Be brief.\"},{\"from\":\"human\",\"value\":\"Hello.\"},"
        "{\"from\":\"gpt\",\"value\":\"Good day.\"},{\"from\":\"human\",\"value\":\"Who?\"},"
        "{\"from\":\"gpt\",\"value\":\"Nobody.\"}]}",
        "{\"system\":\"Be brief.\",\"conversations\":[{\"from\":\"user\",\"value\":\"Hello.\"},"
        "{\"from\":\"assistant\",\"value\":\"Good day.\"},{\"from\":\"human\",\"value\":\"Who?\"},"
        "{\"from\":\"gpt\",\"value\":\"Nobody.\"}]}",
    };
    for (size_t i = 0; i < 3; i++) {
        struct train_set *s = read_ok(&demo, lines[i], NULL, NULL);
        assert_int_equal(s->n, 2);
        assert_example(s, 0, &a);
        assert_example(s, 1, &b);
        train_set_free(s);
    }
    static const char *const second_only[] = {
        "{\"messages\":[{\"role\":\"system\",\"content\":\"Be brief.\"},{\"role\":\"user\",\"content\":\"Hello.\"},"
        "{\"role\":\"assistant\",\"content\":\"Good day.\",\"weight\":0},{\"role\":\"user\",\"content\":\"Who?\"},"
        "{\"role\":\"assistant\",\"content\":[{\"type\":\"text\",\"text\":\"Nobody.\"}]}]}",
        "{\"prompt\":[{\"role\":\"system\",\"content\":\"Be brief.\"},{\"role\":\"user\",\"content\":\"Hello.\"},"
        "{\"role\":\"assistant\",\"content\":\"Good day.\"},{\"role\":\"user\",\"content\":\"Who?\"}],"
        "\"completion\":[{\"role\":\"assistant\",\"content\":\"Nobody.\"}]}",
    };
    for (size_t i = 0; i < 2; i++) {
        struct train_set *s = read_ok(&demo, second_only[i], NULL, NULL);
        assert_int_equal(s->n, 1);
        assert_example(s, 0, &b);
        train_set_free(s);
    }
}

/* --- conversations with a template --------------------------------------------------------------- */

/* A byte-level tokenizer that has every marker of the templates as a special token. */
static const char *const markers[] = {
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<end_of_turn>", "<start_of_turn>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]",
    "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<\xef\xbd\x9c" "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>",
    "<\xef\xbd\x9c" "User\xef\xbd\x9c>", "<\xef\xbd\x9c" "Assistant\xef\xbd\x9c>", "<think>", "</think>",
};
enum { MARKERS = sizeof markers / sizeof markers[0] };

static struct tokenizer *with_markers(int *ret_size)
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
    struct tokenizer *tok = load(text, strlen(text));
    free(text);
    json_decref(t);
    *ret_size = next;
    return tok;
}

static void open_template(struct model *m, const char *name, const char *text)
{
    struct err err = { 0 };
    if (chat_template_open(name, text, m->base.tokenizer_config, &m->chat, &err) != ERR_OK)
        fail_msg("%s", err.msg);
}

/* What is learned, as text, appended; runs are parted by |. */
static void learned(const struct model *m, const struct train_example *e, struct buf *ret)
{
    struct err err = { 0 };
    for (int i = 0; i < e->n; i++) {
        if (e->learn[i] && i > 0 && !e->learn[i - 1] && ret->len > 0)
            buf_puts(ret, "|");
        if (e->learn[i])
            assert_int_equal(tokenizer_decode(m->tok, e->tokens + i, 1, false, ret, &err), ERR_OK);
    }
}

#define USER(x) "{\"role\":\"user\",\"content\":\"" x "\"}"
#define SAYS(x) "{\"role\":\"assistant\",\"content\":\"" x "\"}"
#define EOT "<\xef\xbd\x9c" "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>"

static void of_every_template_the_answers_and_their_ends_are_learned(void **state)
{
    (void)state;
    static const struct { const char *file, *stop, *want; } cases[] = {
        { "CohereForAI-c4ai-command-r-plus-tool_use", "<|END_OF_TURN_TOKEN|>", NULL },
        { "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "<|END_OF_TURN_TOKEN|>",
          "<|START_RESPONSE|><b>one</b><|END_RESPONSE|><|END_OF_TURN_TOKEN|>|"
          "<|START_RESPONSE|>two<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" },
        { "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "<|im_end|>", NULL },
        { "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "<|im_end|>", NULL },
        { "Qwen-Qwen2.5-7B-Instruct", "<|im_end|>", NULL },
        { "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", EOT, NULL },
        { "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", EOT, NULL },
        { "google-gemma-2-2b-it", "<end_of_turn>", NULL },
        { "llama-cpp-deepseek-r1", EOT, NULL },
        { "meetkai-functionary-medium-v3.1", "<|eot_id|>", NULL },
        { "meetkai-functionary-medium-v3.2", "<|eot_id|>", /* names who is spoken to */
          "all\n<b>one</b><|eot_id|>|all\ntwo<|eot_id|>" },
        { "meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>", NULL },
        { "meta-llama-Llama-3.2-3B-Instruct", "<|eot_id|>", NULL },
        { "meta-llama-Llama-3.3-70B-Instruct", "<|eot_id|>", NULL },
        { "microsoft-Phi-3.5-mini-instruct", "<|end|>", NULL },
        { "mistralai-Mistral-Nemo-Instruct-2407", "</s>", NULL },
    };
    static const char messages[] = "\"messages\":[" USER("first") "," SAYS("<b>one</b>") "," USER("second") ","
                                   SAYS("two") "," USER("more") "]}";
    static const char tools[] = "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"description\":"
                                "\"d\",\"parameters\":{\"type\":\"object\",\"properties\":{\"x\":{\"type\":"
                                "\"string\",\"description\":\"e\"}},\"required\":[\"x\"]}}}],";
    int size;
    struct model m = { .tok = with_markers(&size) };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char path[200], want[300], both[300];
        snprintf(path, sizeof path, "chat-templates/%s.jinja", cases[i].file);
        const char *at = support_shared(path);
        if (at == NULL)
            break;
        size_t len;
        char *text = slurp(at, &len);
        m.base = shape(size, 32768, tokenizer_id(m.tok, cases[i].stop), "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\"}");
        open_template(&m, cases[i].file, text);
        char line[1200];
        snprintf(line, sizeof line, "{%s%s", strstr(cases[i].file, "tool_use") ? tools : "", messages);
        struct train_set *s = read_ok(&m, line, NULL, NULL);
        snprintf(want, sizeof want, "<b>one</b>%s|two%s", cases[i].stop, cases[i].stop);
        struct buf got;
        buf_init(&got, 10000);
        for (size_t k = 0; k < s->n; k++)
            learned(&m, &s->examples[k], &got);
        snprintf(both, sizeof both, "%s (%zu)", cases[i].file, s->n);
        if (strcmp(got.data, cases[i].want ? cases[i].want : want) != 0)
            fail_msg("%s learns %s", both, got.data);
        buf_free(&got);
        train_set_free(s);
        chat_template_free(m.chat);
        free(text);
    }
    tokenizer_free(m.tok);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(text_is_learned_up_to_eos),
        cmocka_unit_test(of_prompt_and_completion_the_second_is_learned),
        cmocka_unit_test(a_token_that_holds_prompt_and_completion_is_learned),
        cmocka_unit_test(alpaca_lines_have_the_known_prompt),
        cmocka_unit_test(plain_conversations_are_an_example_for_each_answer),
        cmocka_unit_test(of_every_template_the_answers_and_their_ends_are_learned),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
