/* test_dataset_files.c - training data from files, real ones among them, and from tensors. */
#include "engine/safetensors.h"
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
    char *text = data_slurp(path, &len);
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
    struct data_model m = { .tok = data_markers(&size) }; /* of bytes: decoding gives the very text */
    m.base = data_base(size, 1 << 20, tokenizer_id(m.tok, "<|im_end|>"), "{\"eos_token\":\"<|im_end|>\"}");
    data_template(&m, "chatml", DATA_CHATML);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *path = support_shared(cases[i].path);
        if (path == NULL)
            break;
        size_t lines;
        struct dataset_report rep;
        struct err err = { 0 };
        char *text = converted(path, cases[i].convert, &lines), *save;
        struct train_set *s = data_read(&m, text, NULL, &rep);
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
    const struct dataset_model dm = data_of(&demo);
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

/* With the base as it is imported and loaded, and with what the other tests make do with. */
static void a_loaded_base_is_read_for_in_the_same_way(void **state)
{
    (void)state;
    static const char text[] = "{\"text\":\"The sea was calm.\"}\n"
                               "{\"prompt\":\"How\",\"completion\":\" so\"}\n" CHAT(USER("a") "," SAYS("b")) "\n";
    struct base *base = support_base_dir("examples/demo-base", "nf4", NULL, PREC_EXACT);
    const struct dataset_model real = { base, demo.tok, NULL };
    struct dataset_report rep;
    struct train_set *a = NULL, *b = data_read(&demo, text, NULL, NULL);
    struct err err = { 0 };
    assert_int_equal(data_feed(&real, text, strlen(text), 5, NULL, &rep, &a, &err), ERR_OK);
    assert_memory_equal(a->hash, b->hash, 32);
    dataset_report_free(&rep);
    train_set_free(a);
    train_set_free(b);
    base_free(base);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(real_files_are_read_whole),
        cmocka_unit_test(a_file_is_read_and_can_be_stopped),
        cmocka_unit_test(ids_of_a_tensor_are_learned_but_the_first),
        cmocka_unit_test(a_loaded_base_is_read_for_in_the_same_way),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
