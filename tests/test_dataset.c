/* test_dataset.c - training data: ids and what is learned of them, against what the test puts together
 * by hand; every way in which a line can be bad. */
#include "engine/dataset.h"
#include "engine/safetensors.h"
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

static const char chatml[] =
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' ~ c.function.name ~ (c.function.arguments|tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/* As of Qwen3: reasoning stays in the last turn only. */
static const char thinking[] =
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/* As of Mistral: the system message stands in the last message, if that is the user's. */
static const char system_last[] =
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '[INST]' }}{% if loop.last and s is defined %}{{ s + '\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}";
static const char dated[] = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}";
/* Writes answers twice: nobody can tell what is prompt. */
static const char twice[] = "{{ messages|length }}{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}";

/* What a line gives: examples as text, learned parts between stars. */
static void assert_learns(struct model *m, const char *name, const char *text, const char *line, const char *want)
{
    struct err err = { 0 };
    struct buf b;
    buf_init(&b, 100000);
    open_template(m, name, text);
    const struct dataset_opts o = { .now = 1700000000 };
    struct train_set *s = read_ok(m, line, &o, NULL);
    for (size_t k = 0; k < s->n; k++) {
        const struct train_example *e = &s->examples[k];
        for (int i = 0; i < e->n; i++) {
            if (e->learn[i] != (i > 0 && e->learn[i - 1]))
                buf_puts(&b, "*");
            assert_int_equal(tokenizer_decode(m->tok, e->tokens + i, 1, false, &b, &err), ERR_OK);
        }
        buf_puts(&b, e->learn[e->n - 1] ? "*;" : ";");
    }
    if (strcmp(b.data, want) != 0)
        fail_msg("%s: %s\ngives\n%s\ninstead of\n%s", name, line, b.data, want);
    buf_free(&b);
    train_set_free(s);
    chat_template_free(m->chat);
    m->chat = NULL;
}

#define SYSTEM(x) "{\"role\":\"system\",\"content\":\"" x "\"}"
#define OFF(x) "{\"role\":\"assistant\",\"weight\":0,\"content\":\"" x "\"}"
#define CHAT(x) "{\"messages\":[" x "]}"

static void answers_are_learned_behind_the_prompt_that_serving_makes(void **state)
{
    (void)state;
    int size;
    struct model m = { .tok = with_markers(&size) };
    m.base = shape(size, 32768, tokenizer_id(m.tok, "<|im_end|>"), "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\"}");
    assert_learns(&m, "chatml", chatml, CHAT(SYSTEM("s") "," USER("a") "," SAYS("b") "," USER("c") "," OFF("d") ","
                  USER("e") "," SAYS("f") "," USER("g")),
                  "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n*b<|im_end|>*\n"
                  "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
                  "<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n*f<|im_end|>*;");
    assert_learns(&m, "chatml", chatml, "{\"prompt\":[" USER("a") "," SAYS("b") "," USER("c") "],\"completion\":["
                  SAYS("d") "," USER("e") "," SAYS("f") "]}",
                  "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
                  "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n*d<|im_end|>*\n"
                  "<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n*f<|im_end|>*;");
    assert_learns(&m, "chatml", chatml, CHAT(USER("a") ",{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":"
                  "\"x\",\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"n\\\":1}\"}}]},"
                  "{\"role\":\"tool\",\"tool_call_id\":\"x\",\"content\":\"r\"}," SAYS("")),
                  "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n*<call>f{\"n\": 1}<|im_end|>*\n"
                  "<|im_start|>tool\nr<|im_end|>\n<|im_start|>assistant\n*<|im_end|>*;");
    assert_learns(&m, "thinking", thinking, CHAT(USER("a") "," SAYS("<think>x</think>b") "," USER("c") "," SAYS("<think>y</think>d")),
                  "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n*<think>x</think>b<|im_end|>*;"
                  "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
                  "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n*<think>y</think>d<|im_end|>*;");
    assert_learns(&m, "dated", dated, CHAT(USER("a") "," SAYS("b")), "2023a<|im_end|>*b<|im_end|>*;");
    m.base.arch.eos[0] = tokenizer_id(m.tok, "</s>");
    assert_learns(&m, "system_last", system_last, CHAT(SYSTEM("s") "," USER("a") "," SAYS("a") "," USER("b") "," SAYS("s</s>")),
                  "<s>[INST]s\na[/INST]*a</s>*;<s>[INST]a[/INST]a</s>[INST]s\nb[/INST]*s</s>*;");

    struct err err = { 0 };
    struct dataset_report rep;
    struct train_set *s;
    open_template(&m, "twice", twice);
    const struct dataset_model dm = model_of(&m);
    static const char line[] = CHAT(USER("a") "," SAYS("b"));
    assert_int_equal(feed(&dm, line, strlen(line), 7, NULL, &rep, &s, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "line 1: the chat template writes what comes before"));
    dataset_report_free(&rep);
    chat_template_free(m.chat);
    tokenizer_free(m.tok);
}

/* Tokenizers of real models, ids put together from the pieces that special tokens part. */
static void ids_of_real_models_are_those_of_the_pieces(void **state)
{
    (void)state;
    static const char llama2[] =
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}";
    static const char line[] = CHAT(USER("How are you?") "," SAYS("Fine, thanks.") "," USER("Good") "," SAYS("Bye"));
    const char *path = support_shared("tokenizers/llama2-tinyllama/tokenizer.json");
    if (path == NULL)
        return;
    size_t len;
    char *json = slurp(path, &len);
    struct model m = { .tok = load(json, len) };
    free(json);
    m.base = shape(32000, 2048, 2, "{\"bos_token\":{\"content\":\"<s>\"},\"eos_token\":\"</s>\"}");
    open_template(&m, "llama2", llama2);
    struct want w = { 0 };
    want_id(&w, 1, 0);
    want_text(&w, &m, "[INST] How are you? [/INST]", 0);
    want_text(&w, &m, "Fine, thanks. ", 1); /* this vocabulary puts a space before a text */
    want_id(&w, 2, 1);
    want_id(&w, 1, 0);
    want_text(&w, &m, "[INST] Good [/INST]", 0);
    want_text(&w, &m, "Bye ", 1);
    want_id(&w, 2, 1);
    struct train_set *s = read_ok(&m, line, NULL, NULL);
    assert_int_equal(s->n, 1);
    assert_example(s, 0, &w);
    train_set_free(s);
    chat_template_free(m.chat);
    tokenizer_free(m.tok);

    path = support_shared("tokenizers/qwen2.5/tokenizer.json");
    if (path == NULL)
        return;
    json = slurp(path, &len);
    m = (struct model){ .tok = load(json, len) };
    free(json);
    m.base = shape(151936, 2048, 151643, "{\"eos_token\":\"<|im_end|>\",\"bos_token\":null}");
    char *text = slurp(support_shared("chat-templates/Qwen-Qwen2.5-7B-Instruct.jinja"), &len);
    open_template(&m, "qwen2.5", text);
    memset(&w, 0, sizeof w);
    want_text(&w, &m, "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
              "<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n", 0);
    want_text(&w, &m, "Fine, thanks.", 1);
    want_id(&w, 151645, 1);
    want_text(&w, &m, "\n<|im_start|>user\nGood<|im_end|>\n<|im_start|>assistant\n", 0);
    want_text(&w, &m, "Bye", 1);
    want_id(&w, 151645, 1);
    s = read_ok(&m, line, NULL, NULL);
    assert_int_equal(s->n, 1);
    assert_example(s, 0, &w);
    train_set_free(s);
    free(text);
    chat_template_free(m.chat);
    tokenizer_free(m.tok);
}

/* --- bad lines ------------------------------------------------------------------------------------------- */

static void every_bad_line_is_reported_by_number(void **state)
{
    (void)state;
    static const struct { const char *line, *says; } cases[] = {
        { "{", "it is not JSON: " },
        { "{\"text\":\"a\"} x", "it is not JSON: " },
        { "{\"text\":\"a\",\"text\":\"b\"}", "duplicate" },
        { "{\"text\":\"\xff\"}", "it is not JSON: " },
        { "{\"text\":\"\\ud800\"}", "it is not JSON: " },
        { "nope", "it is not JSON: " },
        { "7", "it must be an object, not an integer" },
        { "{}", "none of the forms" },
        { "{\"prompt\":\"a\"}", "none of the forms" },
        { "{\"question\":\"a\",\"answer\":\"b\"}", "none of the forms" },
        { "{\"input\":{},\"preferred_output\":[]}", "preferences" },
        { "{\"text\":5}", "`text` must be a string, not an integer" },
        { "{\"text\":\"\"}", "`text` is empty" },
        { "{\"prompt\":\"a\",\"completion\":null}", "`completion` must be a string, not null" },
        { "{\"prompt\":[],\"completion\":[]}", "`prompt` must be an array with at least one message, not empty" },
        { "{\"instruction\":\"a\",\"input\":3,\"output\":\"b\"}", "`input` must be a string" },
        { "{\"messages\":\"a\"}", "`messages` must be an array" },
        { "{\"messages\":[]}", "at least one message" },
        { "{\"messages\":[3]}", "`messages`[0] must be an object" },
        { CHAT(USER("a")), "nothing to learn" },
        { CHAT(USER("a") "," OFF("b")), "nothing to learn" },
        { CHAT(SAYS("a")), "nothing comes before it" },
        { "{\"messages\":[{\"role\":\"human\",\"content\":\"a\"}," SAYS("b") "]}", "[0].role must be" },
        { "{\"messages\":[{\"role\":\"user\"}," SAYS("b") "]}", "[0] has no content" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}," SAYS("b") "]}", "image_url" },
        { "{\"messages\":[" USER("a") ",{\"role\":\"assistant\"}]}", "[1] has neither content nor tool_calls" },
        { "{\"messages\":[" USER("a") ",{\"role\":\"assistant\",\"content\":\"b\",\"weight\":0.5}]}", "[1].weight must be 0 or 1" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":\"a\",\"weight\":1}," SAYS("b") "]}", "[0].weight is 1" },
        { "{\"functions\":[{}],\"messages\":[" USER("a") "," SAYS("b") "]}", "`functions`" },
        { "{\"tools\":[1],\"messages\":[" USER("a") "," SAYS("b") "]}", "`tools`[0]" },
        { "{\"conversations\":[{\"from\":\"x\",\"value\":\"a\"}]}", "`conversations`[0].from" },
        { "{\"conversations\":[{\"from\":\"gpt\"}]}", "`conversations`[0].value" },
        { "{\"conversations\":[null]}", "`conversations`[0].from" },
    };
    enum { N = sizeof cases / sizeof cases[0] };
    struct buf b;
    buf_init(&b, 1 << 20);
    for (size_t i = 0; i < N; i++) /* bad lines stand on even numbers */
        buf_printf(&b, "{\"text\":\"good %zu\"}\n%s\n", i, cases[i].line);
    const struct dataset_model dm = model_of(&demo);
    uint8_t hash[32];
    for (int k = 0; k < 8; k++) {
        const bool check_only = k & 1, skip = k & 2;
        const size_t piece = k & 4 ? 1 : 1000000;
        const struct dataset_opts o = { .skip_bad = skip };
        struct dataset_report rep;
        struct train_set *s = NULL;
        struct err err = { 0 };
        const int rc = feed(check_only ? NULL : &dm, b.data, b.len, piece, &o, &rep, &s, &err);
        assert_int_equal(rc, skip ? ERR_OK : ERR_INVALID);
        if (!skip)
            assert_non_null(strstr(err.msg, "lines are unusable; the first is line 2: it is not JSON"));
        assert_int_equal(rep.lines, 2 * N);
        assert_int_equal(rep.bad_lines, N);
        assert_int_equal(rep.nbad, N);
        for (size_t i = 0; i < N; i++) {
            assert_int_equal(rep.bad[i].line, 2 * i + 2);
            if (strstr(rep.bad[i].why, cases[i].says) == NULL)
                fail_msg("%s: %s", cases[i].line, rep.bad[i].why);
        }
        assert_int_equal(rep.examples, check_only ? 0 : N);
        if (s != NULL) {
            assert_int_equal(s->n, N);
            if (piece == 1)
                assert_memory_equal(s->hash, hash, 32);
            memcpy(hash, s->hash, 32);
        }
        dataset_report_free(&rep);
        train_set_free(s);
    }
    buf_free(&b);
}

static void refused(const char *text, size_t len, const struct dataset_opts *o, const char *says)
{
    for (size_t piece = 1; piece < 5000000; piece *= 999) {
        struct dataset_report rep;
        struct err err = { 0 };
        if (len > 1000000 && piece == 1)
            continue;
        assert_int_equal(feed(NULL, text, len, piece, o, &rep, NULL, &err), ERR_INVALID);
        if (strstr(err.msg, says) == NULL)
            fail_msg("%.100s: %s", text, err.msg);
        dataset_report_free(&rep);
    }
}

#define REFUSED(text, o, says) refused(text, sizeof text - 1, o, says)

static void files_that_are_none_are_refused_with_a_sentence(void **state)
{
    (void)state;
    REFUSED("", NULL, "there is nothing in the data");
    REFUSED(" \n\n\t", NULL, "there is nothing in the data");
    REFUSED("\xef\xbb\xbf", NULL, "there is nothing in the data");
    REFUSED("\xef\xbb", NULL, "line 1: the file is not UTF-8");
    REFUSED("\xef\xbb{\"text\":\"a\"}", NULL, "line 1: it is not JSON");
    REFUSED("\xff\xfe{\0\"\0", NULL, "UTF-16");
    REFUSED("[]", NULL, "there is nothing in the data");
    REFUSED("[{\"text\":\"a\"}", NULL, "line 1: the file ends inside the array");
    REFUSED("[\n{\"text\":\"a\"},\n]", NULL, "line 3: an element of the array is missing");
    REFUSED("[{\"text\":\"a\"}]\n{}", NULL, "line 2: there is something behind the end of the array");
    REFUSED("[\n{\"text\":\"],\\\"\"},\n\n{\"text\":\n0}]", NULL, "line 4: `text` must be a string");
    REFUSED("{\"text\":\"a\0\"}", NULL, "line 1: it is not JSON");

    const struct dataset_opts small = { .max_line = 20 };
    REFUSED("{\"text\":\"a\"}\n{\"text\":\"0123456789a\"}\n{\"text\":\"b\"}", &small, "line 2: it is longer than 20 bytes");
    REFUSED("[{\"text\":\"a\"},\n{\"text\":\"0123456789a\"},{\"text\":\"b\"}]", &small, "line 2: it is longer than 20 bytes");

    const size_t large = 20 << 20;
    char *s = malloc(large);
    assert_non_null(s);
    memset(s, 'a', large);
    refused(s, large, NULL, "line 1: it is longer than 16777216 bytes");
    memset(s, '[', large);
    s[0] = ' ', s[1] = '{', s[1000000] = '\n';
    refused(s, 1000001, NULL, "line 1: it has more than 262144 values");
    s[100000] = '\n';
    refused(s, 100001, NULL, "line 1: it is not JSON");
    free(s);
}

static void a_hundred_bad_lines_are_kept_and_all_are_counted(void **state)
{
    (void)state;
    struct buf b;
    struct dataset_report rep;
    struct err err = { 0 };
    buf_init(&b, 1 << 20);
    for (int i = 0; i < 250; i++)
        buf_puts(&b, "{\"\xc3\xa9\n");
    assert_int_equal(feed(NULL, b.data, b.len, 33, NULL, &rep, NULL, &err), ERR_INVALID);
    assert_int_equal(rep.bad_lines, 250);
    assert_int_equal(rep.nbad, DATASET_BAD_KEPT);
    for (size_t i = 0; i < rep.nbad; i++) {
        json_t *j = json_string(rep.bad[i].why); /* UTF-8 */
        assert_non_null(j);
        json_decref(j);
    }
    dataset_report_free(&rep);
    buf_free(&b);
}

/* A line of two answers, of which the second has no tokens that could be learned, leaves nothing. */
static void of_a_bad_line_nothing_is_kept(void **state)
{
    (void)state;
    int size;
    struct model m = { .tok = with_markers(&size) };
    m.base = shape(size, 512, -1, NULL);
    static const char good[] = "{\"text\":\"good\"}\n";
    static const char bad[] = CHAT(USER("a") "," SAYS("b") "," USER("c") "," SAYS("d") ",{\"role\":\"tool\",\"content\":\"x\"}") "\n";
    static const char broken[] =
        "{% for m in messages %}{{ m.content }}{% if messages|length == 4 and m.content == 'd' %}"
        "{{ raise_exception('no') }}{% endif %}{{ loop.last }}{% endfor %}";
    open_template(&m, "broken", broken);
    const struct dataset_opts o = { .skip_bad = true };
    struct dataset_report rep;
    char text[1000];
    snprintf(text, sizeof text, "%s%s%s", good, bad, good);
    struct train_set *a = read_ok(&m, text, &o, &rep);
    snprintf(text, sizeof text, "%s%s", good, good);
    struct train_set *b = read_ok(&m, text, &o, NULL);
    assert_int_equal(rep.bad_lines, 1);
    assert_non_null(strstr(rep.bad[0].why, "no"));
    assert_int_equal(a->n, 2);
    assert_int_equal(a->tokens, b->tokens);
    assert_memory_equal(a->hash, b->hash, 32);
    dataset_report_free(&rep);
    train_set_free(a);
    train_set_free(b);
    chat_template_free(m.chat);
    tokenizer_free(m.tok);
}

/* --- limits ------------------------------------------------------------------------------------------------ */

static void long_examples_are_cut_at_the_end_and_counted(void **state)
{
    (void)state;
    static const char lines[] = "{\"text\":\"one two three four five six\"}\n"
                                "{\"text\":\"one\"}\n"
                                "{\"prompt\":\"one two three four five six\",\"completion\":\" seven\"}\n";
    struct dataset_report all, rep;
    struct train_set *s = read_ok(&demo, lines, NULL, &all);
    assert_int_equal(s->n, 3);
    const struct dataset_opts o = { .max_length = 5 };
    struct train_set *c = read_ok(&demo, lines, &o, &rep);
    assert_int_equal(c->n, 2);
    assert_int_equal(rep.cut, 2);
    assert_int_equal(rep.empty, 1);
    assert_int_equal(rep.longest, all.longest);
    assert_int_equal(c->examples[0].n, 5);
    assert_memory_equal(c->examples[0].tokens, s->examples[0].tokens, 5 * sizeof(int32_t));
    assert_int_equal(c->examples[1].n, s->examples[1].n);
    assert_int_equal(rep.tokens, c->examples[0].n + c->examples[1].n);
    assert_memory_not_equal(s->hash, c->hash, 32);
    train_set_free(s);
    train_set_free(c);

    static const struct { struct dataset_opts o; const char *text, *says; } cases[] = {
        { { .max_length = 3 }, "{\"prompt\":\"one two three\",\"completion\":\"x\"}", "nothing is left to learn" },
        { { .max_tokens = 3 }, "{\"text\":\"one two three\"}", "more than 3 tokens" },
    };
    const struct dataset_model dm = model_of(&demo);
    for (size_t i = 0; i < 2; i++) {
        struct err err = { 0 };
        assert_int_not_equal(feed(&dm, cases[i].text, strlen(cases[i].text), 1, &cases[i].o, &rep, &s, &err), ERR_OK);
        assert_non_null(strstr(err.msg, cases[i].says));
        dataset_report_free(&rep);
    }
    for (int bad = -1; bad < 1000; bad += 514) { /* -1, 513 */
        struct dataset *d;
        struct err err = { 0 };
        const struct dataset_opts wrong = { .max_length = bad };
        assert_int_equal(dataset_open(&dm, &wrong, &d, &err), ERR_INVALID);
        assert_string_equal(err.param, "max_length");
    }
    struct model small = demo;
    small.base.arch.V = 300;
    struct err err = { 0 };
    const struct dataset_model sm = model_of(&small);
    assert_int_equal(feed(&sm, lines, strlen(lines), 10, NULL, &rep, &s, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "the model has only the 300 tokens"));
    dataset_report_free(&rep);
}

/* --- files ---------------------------------------------------------------------------------------------- */

static bool stop_at_once(void *ud, uint64_t done, uint64_t total)
{
    uint64_t *seen = ud;
    seen[0] = done;
    seen[1] = total;
    return true;
}

/* A file of another form, line by line in one of ours. */
static char *converted(const char *path, json_t *(*convert)(json_t *line), size_t *ret_lines)
{
    size_t len;
    char *text = slurp(path, &len);
    struct buf b;
    buf_init(&b, 64 << 20);
    *ret_lines = 0;
    char *save;
    for (char *line = strtok_r(text, "\n", &save); line != NULL; line = strtok_r(NULL, "\n", &save)) {
        json_t *in = json_loads(line, 0, NULL), *out = convert(in);
        assert_non_null(out);
        char *dump = json_dumps(out, 0);
        buf_printf(&b, "%s\n", dump);
        free(dump);
        json_decref(in);
        json_decref(out);
        ++*ret_lines;
    }
    free(text);
    return buf_take(&b);
}

static json_t *of_gsm8k(json_t *o)
{
    return json_pack("{s:O, s:O}", "prompt", json_object_get(o, "question"), "completion", json_object_get(o, "answer"));
}

static json_t *of_gsm8k_chat(json_t *o)
{
    return json_pack("{s:[{s:s, s:O}, {s:s, s:O}]}", "messages", "role", "user", "content", json_object_get(o, "question"),
                     "role", "assistant", "content", json_object_get(o, "answer"));
}

static json_t *of_self_instruct(json_t *o)
{
    json_t *i = json_array_get(json_object_get(o, "instances"), 0);
    return json_pack("{s:O, s:O, s:O}", "instruction", json_object_get(o, "instruction"), "input", json_object_get(i, "input"),
                     "output", json_object_get(i, "output"));
}

static json_t *as_it_is(json_t *o) { return json_incref(o); }

/* Learned ids say what the file says, and nothing else is learned. */
static void real_files_are_read_whole(void **state)
{
    (void)state;
    static const struct { const char *path; json_t *(*convert)(json_t *); const char *answer; } cases[] = {
        { "data/gsm8k/train-500.jsonl", of_gsm8k, "completion" },
        { "data/gsm8k/test-200.jsonl", of_gsm8k_chat, NULL },
        { "data/self-instruct/user_oriented_instructions.jsonl", of_self_instruct, "output" },
        { "data/alpaca/seed_tasks.jsonl", of_self_instruct, "output" },
        { "data/wikisql/train.jsonl", as_it_is, "text" },
    };
    int size;
    struct model m = { .tok = with_markers(&size) }; /* of bytes: decoding gives the very text */
    m.base = shape(size, 1 << 20, tokenizer_id(m.tok, "<|im_end|>"), "{\"eos_token\":\"<|im_end|>\"}");
    open_template(&m, "chatml", chatml);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *path = support_shared(cases[i].path);
        if (path == NULL)
            break;
        size_t lines;
        struct dataset_report rep;
        struct err err = { 0 };
        char *text = converted(path, cases[i].convert, &lines), *save;
        struct train_set *s = read_ok(&m, text, NULL, &rep);
        assert_int_equal(rep.lines, lines);
        assert_int_equal(s->n, lines);
        assert_int_equal(rep.cut + rep.empty + rep.bad_lines, 0);
        size_t k = 0;
        for (char *line = strtok_r(text, "\n", &save); line != NULL; line = strtok_r(NULL, "\n", &save), k++) {
            json_t *o = json_loads(line, 0, NULL);
            const json_t *want = cases[i].answer ? json_object_get(o, cases[i].answer)
                                 : json_object_get(json_array_get(json_object_get(o, "messages"), 1), "content");
            const struct train_example *e = &s->examples[k];
            int from = 0;
            while (!e->learn[from])
                from++;
            if (i == 4)
                from = 0; /* the first token of a text is learned by nothing */
            struct buf b;
            buf_init(&b, 1 << 20);
            assert_int_equal(tokenizer_decode(m.tok, e->tokens + from, (size_t)(e->n - from), true, &b, &err), ERR_OK);
            /* a token across the border has letters of the prompt in front */
            const size_t len = json_string_length(want);
            assert_true(b.len >= len && b.len <= len + 8);
            assert_memory_equal(b.data + b.len - len, json_string_value(want), len);
            buf_free(&b);
            json_decref(o);
        }
        free(text);
        dataset_report_free(&rep);
        train_set_free(s);
    }
    chat_template_free(m.chat);
    tokenizer_free(m.tok);
}

static void a_file_is_read_and_can_be_stopped(void **state)
{
    (void)state;
    char dir[64], path[100];
    static const char text[] = "{\"text\":\"one two\"}\n[]\n";
    support_tmpdir(dir);
    support_write_file(dir, "f.jsonl", text, sizeof text - 1);
    snprintf(path, sizeof path, "%s/f.jsonl", dir);
    const struct dataset_model dm = model_of(&demo);
    const struct dataset_opts skip = { .skip_bad = true };
    struct dataset_report rep;
    struct train_set *s = NULL;
    struct err err = { 0 };
    assert_int_equal(dataset_read(&dm, path, NULL, NULL, NULL, &rep, &s, &err), ERR_INVALID);
    assert_string_equal(err.msg, "line 2: it must be an object, not an array");
    assert_int_equal(rep.bad_lines, 1);
    dataset_report_free(&rep);
    err_clear(&err);
    assert_int_equal(dataset_read(&dm, path, &skip, NULL, NULL, NULL, &s, &err), ERR_OK);
    assert_int_equal(s->n, 1);
    train_set_free(s);
    uint64_t seen[2];
    assert_int_equal(dataset_read(&dm, path, &skip, stop_at_once, seen, &rep, &s, &err), ERR_CANCELLED);
    assert_int_equal(seen[0], sizeof text - 1);
    assert_int_equal(seen[1], sizeof text - 1);
    err_clear(&err);
    support_remove(dir);
    assert_int_equal(dataset_read(&dm, path, NULL, NULL, NULL, &rep, &s, &err), ERR_NOT_FOUND);
}

static void ids_of_a_tensor_are_learned_but_the_first(void **state)
{
    (void)state;
    char dir[64], path[100];
    support_tmpdir(dir);
    snprintf(path, sizeof path, "%s/t.safetensors", dir);
    static const int64_t wide[2][3] = { { 5, 6, 7 }, { 8, 9, 10 } };
    static const int32_t small[4] = { 1, 2, 3, 2047 }, one[1] = { 1 }, bad[2] = { 1, 2048 };
    static const float real[2] = { 1, 2 };
    const struct { const char *name, *type; int ndim; int64_t shape[2]; const void *data; size_t bytes; } tensors[] = {
        { "wide", "I64", 2, { 2, 3 }, wide, sizeof wide }, { "small", "I32", 1, { 4, 0 }, small, sizeof small },
        { "one", "I32", 1, { 1, 0 }, one, sizeof one }, { "bad", "I32", 1, { 2, 0 }, bad, sizeof bad },
        { "real", "F32", 1, { 2, 0 }, real, sizeof real }, { "none", "I32", 2, { 0, 2 }, NULL, 0 },
    };
    struct st_writer *w;
    struct err err = { 0 };
    assert_int_equal(st_writer_open(path, false, &w, &err), ERR_OK);
    for (size_t i = 0; i < 6; i++)
        assert_int_equal(st_writer_tensor(w, tensors[i].name, tensors[i].type, tensors[i].ndim, tensors[i].shape,
                                          tensors[i].bytes, &err), ERR_OK);
    assert_int_equal(st_writer_begin(w, &err), ERR_OK);
    for (size_t i = 0; i < 6; i++)
        assert_int_equal(st_writer_data(w, tensors[i].data, tensors[i].bytes, &err), ERR_OK);
    assert_int_equal(st_writer_commit(w, &err), ERR_OK);

    struct dataset_report rep;
    struct train_set *s;
    assert_int_equal(dataset_tokens(path, "wide", 2048, 512, &rep, &s, &err), ERR_OK);
    assert_int_equal(s->n, 2);
    assert_int_equal(s->tokens, 6);
    assert_int_equal(s->targets, 4);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(s->examples[1].tokens[i], 8 + i);
        assert_int_equal(s->examples[1].learn[i], i > 0);
    }
    /* the hash as the header says it */
    uint8_t bytes[2 * (4 + 3 * 4 + 3)] = { 0 }, hash[32];
    for (int k = 0, at = 0; k < 2; k++) {
        bytes[at] = 3;
        for (int i = 0; i < 3; i++) {
            bytes[at + 4 + 4 * i] = (uint8_t)wide[k][i];
            bytes[at + 16 + i] = i > 0;
        }
        at += 19;
    }
    sha256_of(bytes, sizeof bytes, hash);
    assert_memory_equal(s->hash, hash, 32);
    train_set_free(s);
    assert_int_equal(dataset_tokens(path, "small", 2048, 3, &rep, &s, &err), ERR_OK);
    assert_int_equal(s->examples[0].n, 3);
    assert_int_equal(rep.cut, 1);
    assert_int_equal(rep.longest, 4);
    train_set_free(s);
    static const struct { const char *name, *says; int code; } cases[] = {
        { "one", "rows of 1 ids", ERR_INVALID }, { "bad", "2048 at 1", ERR_INVALID }, { "real", "not I32 or I64", ERR_INVALID },
        { "none", "rows of 0 ids", ERR_INVALID }, { "other", "has no tensor other", ERR_NOT_FOUND },
    };
    for (size_t i = 0; i < 5; i++) {
        err_clear(&err);
        assert_int_equal(dataset_tokens(path, cases[i].name, 2048, 512, NULL, &s, &err), cases[i].code);
        assert_non_null(strstr(err.msg, cases[i].says));
    }
    support_remove(dir);
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
        cmocka_unit_test(answers_are_learned_behind_the_prompt_that_serving_makes),
        cmocka_unit_test(ids_of_real_models_are_those_of_the_pieces),
        cmocka_unit_test(every_bad_line_is_reported_by_number),
        cmocka_unit_test(files_that_are_none_are_refused_with_a_sentence),
        cmocka_unit_test(a_hundred_bad_lines_are_kept_and_all_are_counted),
        cmocka_unit_test(of_a_bad_line_nothing_is_kept),
        cmocka_unit_test(long_examples_are_cut_at_the_end_and_counted),
        cmocka_unit_test(real_files_are_read_whole),
        cmocka_unit_test(a_file_is_read_and_can_be_stopped),
        cmocka_unit_test(ids_of_a_tensor_are_learned_but_the_first),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
