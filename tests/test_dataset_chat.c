/* test_dataset_chat.c - conversations as training data: what of them is learned, with many templates. */
#include "tests/support_dataset.h"
#include "tests/support_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* --- conversations with a template --------------------------------------------------------------- */

/* What is learned, as text, appended; runs are parted by |. */
static void learned(const struct data_model *m, const struct train_example *e, struct buf *ret)
{
    struct err err = { 0 };
    for (int i = 0; i < e->n; i++) {
        if (e->learn[i] && i > 0 && !e->learn[i - 1] && ret->len > 0)
            buf_puts(ret, "|");
        if (e->learn[i])
            assert_int_equal(tokenizer_decode(m->tok, e->tokens + i, 1, false, ret, &err), ERR_OK);
    }
}

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
    struct data_model m = { .tok = data_markers(&size) };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char path[200], want[300], both[300];
        snprintf(path, sizeof path, "chat-templates/%s.jinja", cases[i].file);
        const char *at = support_shared(path);
        if (at == NULL)
            break;
        size_t len;
        char *text = data_slurp(at, &len);
        m.base = data_base(size, 32768, tokenizer_id(m.tok, cases[i].stop), "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\"}");
        data_template(&m, cases[i].file, text);
        char line[1200];
        snprintf(line, sizeof line, "{%s%s", strstr(cases[i].file, "tool_use") ? tools : "", messages);
        struct train_set *s = data_read(&m, line, NULL, NULL);
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
static void assert_learns(struct data_model *m, const char *name, const char *text, const char *line, const char *want)
{
    struct err err = { 0 };
    struct buf b;
    buf_init(&b, 100000);
    data_template(m, name, text);
    const struct dataset_opts o = { .now = 1700000000 };
    struct train_set *s = data_read(m, line, &o, NULL);
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

static void answers_are_learned_behind_the_prompt_that_serving_makes(void **state)
{
    (void)state;
    int size;
    struct data_model m = { .tok = data_markers(&size) };
    m.base = data_base(size, 32768, tokenizer_id(m.tok, "<|im_end|>"), "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\"}");
    assert_learns(&m, "chatml", DATA_CHATML, CHAT(SYSTEM("s") "," USER("a") "," SAYS("b") "," USER("c") "," OFF("d") ","
                  USER("e") "," SAYS("f") "," USER("g")),
                  "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n*b<|im_end|>*\n"
                  "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
                  "<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n*f<|im_end|>*;");
    assert_learns(&m, "chatml", DATA_CHATML, "{\"prompt\":[" USER("a") "," SAYS("b") "," USER("c") "],\"completion\":["
                  SAYS("d") "," USER("e") "," SAYS("f") "]}",
                  "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
                  "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n*d<|im_end|>*\n"
                  "<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n*f<|im_end|>*;");
    assert_learns(&m, "chatml", DATA_CHATML, CHAT(USER("a") ",{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":"
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
    data_template(&m, "twice", twice);
    const struct dataset_model dm = data_of(&m);
    static const char line[] = CHAT(USER("a") "," SAYS("b"));
    assert_int_equal(data_feed(&dm, line, strlen(line), 7, NULL, &rep, &s, &err), ERR_INVALID);
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
    char *json = data_slurp(path, &len);
    struct data_model m = { .tok = data_tokenizer(json, len) };
    free(json);
    m.base = data_base(32000, 2048, 2, "{\"bos_token\":{\"content\":\"<s>\"},\"eos_token\":\"</s>\"}");
    data_template(&m, "llama2", llama2);
    struct data_want w = { 0 };
    data_want_id(&w, 1, 0);
    data_want_text(&w, &m, "[INST] How are you? [/INST]", 0);
    data_want_text(&w, &m, "Fine, thanks. ", 1); /* this vocabulary puts a space before a text */
    data_want_id(&w, 2, 1);
    data_want_id(&w, 1, 0);
    data_want_text(&w, &m, "[INST] Good [/INST]", 0);
    data_want_text(&w, &m, "Bye ", 1);
    data_want_id(&w, 2, 1);
    struct train_set *s = data_read(&m, line, NULL, NULL);
    assert_int_equal(s->n, 1);
    data_assert(s, 0, &w);
    train_set_free(s);
    chat_template_free(m.chat);
    tokenizer_free(m.tok);

    path = support_shared("tokenizers/qwen2.5/tokenizer.json");
    if (path == NULL)
        return;
    json = data_slurp(path, &len);
    m = (struct data_model){ .tok = data_tokenizer(json, len) };
    free(json);
    m.base = data_base(151936, 2048, 151643, "{\"eos_token\":\"<|im_end|>\",\"bos_token\":null}");
    char *text = data_slurp(support_shared("chat-templates/Qwen-Qwen2.5-7B-Instruct.jinja"), &len);
    data_template(&m, "qwen2.5", text);
    memset(&w, 0, sizeof w);
    data_want_text(&w, &m, "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
              "<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n", 0);
    data_want_text(&w, &m, "Fine, thanks.", 1);
    data_want_id(&w, 151645, 1);
    data_want_text(&w, &m, "\n<|im_start|>user\nGood<|im_end|>\n<|im_start|>assistant\n", 0);
    data_want_text(&w, &m, "Bye", 1);
    data_want_id(&w, 151645, 1);
    s = data_read(&m, line, NULL, NULL);
    assert_int_equal(s->n, 1);
    data_assert(s, 0, &w);
    train_set_free(s);
    free(text);
    chat_template_free(m.chat);
    tokenizer_free(m.tok);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(of_every_template_the_answers_and_their_ends_are_learned),
        cmocka_unit_test(answers_are_learned_behind_the_prompt_that_serving_makes),
        cmocka_unit_test(ids_of_real_models_are_those_of_the_pieces),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
