/* test_dataset.c - training data: ids and what is learned of them, against what the test puts together
 * by hand; every way in which a line can be bad; limits. */
#include "tests/support_dataset.h"
#include "tests/support_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static struct data_model demo;

static int setup(void **state)
{
    (void)state;
    demo = data_demo();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tokenizer_free(demo.tok);
    return 0;
}

/* --- text ------------------------------------------------------------------------------------------ */

static void text_is_learned_up_to_eos(void **state)
{
    (void)state;
    struct data_want w = { 0 };
    data_want_id(&w, 1, 0);
    data_want_text(&w, &demo, "The sea was calm.", 1);
    data_want_id(&w, 2, 1);
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
        struct train_set *s = data_read(&demo, same[i], NULL, &rep);
        assert_int_equal(s->n, 1);
        data_assert(s, 0, &w);
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
    struct data_want w = { 0 };
    data_want_id(&w, 1, 0);
    data_want_text(&w, &demo, "Question: how are you?", 0);
    data_want_text(&w, &demo, "I am well.", 1); /* " I am well." behind a text */
    data_want_id(&w, 2, 1);
    static const char line[] = "{\"prompt\":\"Question: how are you?\",\"completion\":\" I am well.\"}";
    struct train_set *s = data_read(&demo, line, NULL, NULL);
    data_assert(s, 0, &w);
    train_set_free(s);

    const struct dataset_opts all = { .learn_prompts = true };
    for (int i = 1; i < w.n; i++)
        w.learn[i] = 1;
    s = data_read(&demo, line, &all, NULL);
    data_assert(s, 0, &w);
    train_set_free(s);
}

/* A token across the border belongs to the completion: it holds its first letters. */
static void a_token_that_holds_prompt_and_completion_is_learned(void **state)
{
    (void)state;
    struct data_want whole = { 0 };
    data_want_text(&whole, &demo, "the weather", 0);
    struct train_set *s = data_read(&demo, "{\"prompt\":\"the wea\",\"completion\":\"ther\"}", NULL, NULL);
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
        struct train_set *a = data_read(&demo, lines[i][0], NULL, NULL);
        struct train_set *b = data_read(&demo, other, NULL, NULL);
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
    struct data_want a = { 0 }, b = { 0 };
    data_want_id(&a, 1, 0);
    data_want_text(&a, &demo, "Be brief.\n\nUser: Hello.\nAssistant:", 0);
    data_want_text(&a, &demo, "Good day.", 1);
    data_want_id(&a, 2, 1);
    data_want_id(&b, 1, 0);
    data_want_text(&b, &demo, "Be brief.\n\nUser: Hello.\nAssistant: Good day.\nUser: Who?\nAssistant:", 0);
    data_want_text(&b, &demo, "Nobody.", 1);
    data_want_id(&b, 2, 1);
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
        struct train_set *s = data_read(&demo, lines[i], NULL, NULL);
        assert_int_equal(s->n, 2);
        data_assert(s, 0, &a);
        data_assert(s, 1, &b);
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
        struct train_set *s = data_read(&demo, second_only[i], NULL, NULL);
        assert_int_equal(s->n, 1);
        data_assert(s, 0, &b);
        train_set_free(s);
    }
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
    const struct dataset_model dm = data_of(&demo);
    uint8_t hash[32];
    for (int k = 0; k < 8; k++) {
        const bool check_only = k & 1, skip = k & 2;
        const size_t piece = k & 4 ? 1 : 1000000;
        const struct dataset_opts o = { .skip_bad = skip };
        struct dataset_report rep;
        struct train_set *s = NULL;
        struct err err = { 0 };
        const int rc = data_feed(check_only ? NULL : &dm, b.data, b.len, piece, &o, &rep, &s, &err);
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
        assert_int_equal(data_feed(NULL, text, len, piece, o, &rep, NULL, &err), ERR_INVALID);
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
    assert_int_equal(data_feed(NULL, b.data, b.len, 33, NULL, &rep, NULL, &err), ERR_INVALID);
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
    struct data_model m = { .tok = data_markers(&size) };
    m.base = data_base(size, 512, -1, NULL);
    static const char good[] = "{\"text\":\"good\"}\n";
    static const char bad[] = CHAT(USER("a") "," SAYS("b") "," USER("c") "," SAYS("d") ",{\"role\":\"tool\",\"content\":\"x\"}") "\n";
    static const char broken[] =
        "{% for m in messages %}{{ m.content }}{% if messages|length == 4 and m.content == 'd' %}"
        "{{ raise_exception('no') }}{% endif %}{{ loop.last }}{% endfor %}";
    data_template(&m, "broken", broken);
    const struct dataset_opts o = { .skip_bad = true };
    struct dataset_report rep;
    char text[1000];
    snprintf(text, sizeof text, "%s%s%s", good, bad, good);
    struct train_set *a = data_read(&m, text, &o, &rep);
    snprintf(text, sizeof text, "%s%s", good, good);
    struct train_set *b = data_read(&m, text, &o, NULL);
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
    struct train_set *s = data_read(&demo, lines, NULL, &all);
    assert_int_equal(s->n, 3);
    const struct dataset_opts o = { .max_length = 5 };
    struct train_set *c = data_read(&demo, lines, &o, &rep);
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
    const struct dataset_model dm = data_of(&demo);
    for (size_t i = 0; i < 2; i++) {
        struct err err = { 0 };
        assert_int_not_equal(data_feed(&dm, cases[i].text, strlen(cases[i].text), 1, &cases[i].o, &rep, &s, &err), ERR_OK);
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
    struct data_model small = demo;
    small.base.arch.V = 300;
    struct err err = { 0 };
    const struct dataset_model sm = data_of(&small);
    assert_int_equal(data_feed(&sm, lines, strlen(lines), 10, NULL, &rep, &s, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "the model has only the 300 tokens"));
    dataset_report_free(&rep);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(text_is_learned_up_to_eos),
        cmocka_unit_test(of_prompt_and_completion_the_second_is_learned),
        cmocka_unit_test(a_token_that_holds_prompt_and_completion_is_learned),
        cmocka_unit_test(alpaca_lines_have_the_known_prompt),
        cmocka_unit_test(plain_conversations_are_an_example_for_each_answer),
        cmocka_unit_test(every_bad_line_is_reported_by_number),
        cmocka_unit_test(files_that_are_none_are_refused_with_a_sentence),
        cmocka_unit_test(a_hundred_bad_lines_are_kept_and_all_are_counted),
        cmocka_unit_test(of_a_bad_line_nothing_is_kept),
        cmocka_unit_test(long_examples_are_cut_at_the_end_and_counted),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
