/* test_gen.c - what a generation hands out: text in whole characters and without stop strings,
 * echoed prompts, and the tokens that the reference implementation finds. */
#include "tests/support_lora.h"
#include "tests/support_model.h"
#include "tests/support_sched.h"

#include "engine/safetensors.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* A random model that can say nothing but small letters, so that its text is easy to cut. */
static struct base *base;
static struct rig rig;
static struct sample_bias letters[26];
static int32_t prompt[8] = { 1, 70, 80, 90, 100, 110, 120, 75 };

static int make_rig(void **state)
{
    (void)state;
    struct support_model m = support_model_default("qwen3");
    base = support_base(&m, "nf4", NULL, PREC_FAST);
    rig_open(&rig, base, 1, ISA_SCALAR, PREC_FAST, 0,
             (struct sched_opts){ .kv_bytes = rig_pages(base, 64) });
    for (int i = 0; i < 26; i++)
        letters[i] = (struct sample_bias){ 3 + 'a' + i, 100 };
    return 0;
}

static int free_rig(void **state)
{
    (void)state;
    rig_close(&rig);
    base_free(base);
    return 0;
}

static struct gen_request spell(int n)
{
    struct gen_request q = rig_request(prompt, 8, n);
    q.sample.temperature = 2;
    q.sample.seed = 12;
    q.sample.bias = letters;
    q.sample.nbias = 26;
    return q;
}

/* Ranges follow each other and cover the text. */
static void check_ranges(const struct result *r)
{
    uint32_t at = 0;
    for (size_t i = 0; i < r->n; i++) {
        assert_int_equal(r->tokens[i].text_begin, at);
        assert_true(r->tokens[i].text_end >= at);
        at = r->tokens[i].text_end;
    }
    assert_int_equal(at, r->text.len);
}

static void every_token_says_which_text_became_certain(void **state)
{
    (void)state;
    struct gen_request q = spell(30);
    struct result r = rig_run(&rig, &q);
    assert_int_equal(r.n, 30);
    assert_int_equal(r.text.len, 30);
    for (size_t i = 0; i < r.n; i++)
        assert_int_equal(r.text.data[i], r.tokens[i].token - 3);
    check_ranges(&r);
    assert_int_equal(r.finish, GEN_LENGTH);
    result_free(&r);
}

/* Read after every token: what is handed out early is never taken back. */
static struct result watch(const struct gen_request *q, const char *want, size_t want_len)
{
    struct gen *g = rig_submit(&rig, q);
    struct gen_token t[64];
    enum gen_finish f = GEN_RUNNING;
    size_t from = 0;
    while (f == GEN_RUNNING) {
        struct buf text;
        buf_init(&text, 4096);
        gen_wait(g, from);
        from += gen_read(g, from, t, 1, 0, &text, &f);
        assert_true(text.len <= want_len);
        if (text.len > 0)
            assert_memory_equal(text.data, want, text.len);
        buf_free(&text);
    }
    return rig_finish(g);
}

static void a_stop_string_over_several_tokens_is_cut_out_whole(void **state)
{
    (void)state;
    struct gen_request q = spell(40);
    struct result all = rig_run(&rig, &q);
    for (int len = 1; len <= 9; len += 2)
        for (int at = 3; at < 30; at += 9) {
            char stop[16] = { 0 };
            memcpy(stop, all.text.data + at, (size_t)len);
            const char *first = strstr(all.text.data, stop);
            size_t want = (size_t)(first - all.text.data);
            q.nstop = 3;
            q.stop[0] = "never";
            q.stop[1] = stop;
            q.stop[2] = "NOR THIS";
            struct result r = watch(&q, all.text.data, want);
            assert_int_equal(r.finish, GEN_STOP);
            assert_int_equal(r.text.len, want);
            assert_memory_equal(r.text.data, all.text.data, want);
            assert_int_equal(r.n, want + (size_t)len); /* no token more than it takes */
            check_ranges(&r);
            result_free(&r);
        }
    result_free(&all);
}

static void what_only_began_a_stop_string_comes_out_in_the_end(void **state)
{
    (void)state;
    struct gen_request q = spell(20);
    struct result all = rig_run(&rig, &q);
    char stop[32];
    snprintf(stop, sizeof stop, "%sX", all.text.data + 14); /* its last character never comes */
    q.nstop = 1;
    q.stop[0] = stop;
    struct result r = rig_run(&rig, &q);
    assert_int_equal(r.finish, GEN_LENGTH);
    assert_int_equal(r.text.len, 20);
    assert_memory_equal(r.text.data, all.text.data, 20);
    check_ranges(&r);
    assert_int_equal(r.tokens[18].text_end, 14); /* held back until then */
    result_free(&r);

    q.max_tokens = 300; /* the same when it is cut off: nothing is lost */
    snprintf(stop, sizeof stop, "%.3sX", all.text.data + 17);
    struct gen *g = rig_submit(&rig, &q);
    gen_wait(g, 19);
    gen_cancel(g);
    r = rig_finish(g);
    assert_int_equal(r.text.len, r.n);
    result_free(&r), result_free(&all);
}

static void the_earliest_of_several_stop_strings_wins(void **state)
{
    (void)state;
    struct gen_request q = spell(30);
    struct result all = rig_run(&rig, &q);
    char late[4] = { 0 }, early[4] = { 0 };
    memcpy(late, all.text.data + 10, 1); /* both are complete with the same token or before */
    memcpy(early, all.text.data + 8, 3);
    size_t a = (size_t)(strstr(all.text.data, late) - all.text.data);
    size_t b = (size_t)(strstr(all.text.data, early) - all.text.data);
    q.nstop = 2;
    q.stop[0] = late;
    q.stop[1] = early;
    struct result r = rig_run(&rig, &q);
    /* whichever is complete first; at the same token the one that begins first */
    size_t want = a + 1 < b + 3 ? a : b;
    assert_int_equal(r.text.len, want);
    result_free(&r), result_free(&all);
}

static void an_end_token_stops_without_text_unless_it_is_ignored(void **state)
{
    (void)state;
    struct sample_bias end = { base->arch.eos[0], 100 };
    struct gen_request q = rig_request(prompt, 8, 5);
    assert_true(base->arch.neos > 0);
    q.sample.bias = &end;
    q.sample.nbias = 1;
    struct result r = rig_run(&rig, &q);
    assert_int_equal(r.finish, GEN_STOP);
    assert_int_equal(r.n, 1);
    assert_int_equal(r.tokens[0].token, base->arch.eos[0]);
    assert_int_equal(r.text.len, 0);
    assert_int_equal(r.usage.completion_tokens, 1);
    result_free(&r);
    q.ignore_eos = true;
    r = rig_run(&rig, &q);
    assert_int_equal(r.finish, GEN_LENGTH);
    assert_int_equal(r.n, 5);
    result_free(&r);
}

/* All 256 bytes at random: what comes out at any time ends between characters. */
static void text_is_handed_out_in_whole_characters(void **state)
{
    (void)state;
    struct sample_bias bytes[60];
    for (int i = 0; i < 60; i++) /* lead bytes and continuations, so that most of it is broken */
        bytes[i] = (struct sample_bias){ 3 + 0xbe + i, 100 };
    struct gen_request q = rig_request(prompt, 8, 60);
    q.sample.temperature = 2;
    q.sample.bias = bytes;
    q.sample.nbias = 60;
    q.nstop = 1;
    q.stop[0] = "\xbd?"; /* not text: begins in the middle of U+FFFD */
    for (uint64_t seed = 0; seed < 5; seed++) {
        q.sample.seed = seed;
        struct result r = rig_run(&rig, &q);
        check_ranges(&r);
        for (size_t i = 0; i < r.n; i++)
            if (r.tokens[i].text_end < r.text.len)
                assert_int_not_equal((unsigned char)r.text.data[r.tokens[i].text_end] & 0xc0, 0x80);
        result_free(&r);
    }
}

static void reading_in_pieces_gives_the_same_as_reading_at_once(void **state)
{
    (void)state;
    struct gen_request q = spell(25);
    struct gen *g = rig_submit(&rig, &q);
    struct gen_token t[8], all[32];
    enum gen_finish f = GEN_RUNNING;
    struct buf text;
    buf_init(&text, 100);
    gen_wait(g, 24);
    while (f == GEN_RUNNING) /* the reason follows the last token */
        gen_read(g, 0, all, 32, 0, NULL, &f);
    size_t n = 0;
    do {
        size_t got = gen_read(g, n, t, 8, text.len, &text, &f);
        assert_memory_equal(t, all + n, got * sizeof *t);
        n += got;
        assert_int_equal(f == GEN_RUNNING, n < 25);
    } while (f == GEN_RUNNING);
    assert_int_equal(n, 25);
    assert_int_equal(text.len, 25);
    buf_free(&text);
    buf_init(&text, 10); /* too small */
    gen_read(g, 25, t, 8, 0, &text, &f);
    assert_int_equal(f, GEN_ERROR);
    buf_free(&text);
    gen_release(g);
}

/* --- echo ---------------------------------------------------------------------------------- */
static void echoed_prompt_tokens_are_scored_however_the_prompt_is_cut(void **state)
{
    (void)state;
    struct gen_request q = rig_request(NULL, 0, 3);
    int32_t t[150];
    for (int i = 0; i < 150; i++)
        t[i] = 3 + i * 7 % 300;
    q.prompt = t;
    q.nprompt = 150;
    q.sample.top_logprobs = 2;
    struct result plain = rig_run(&rig, &q); /* leaves its pages to be found */
    q.echo_logprobs = true;
    struct result echo = rig_run(&rig, &q);
    assert_int_equal(echo.n, 153);
    assert_int_equal(echo.usage.completion_tokens, 3);
    for (size_t i = 0; i < 150; i++) {
        assert_true(echo.tokens[i].prompt);
        assert_int_equal(echo.tokens[i].token, t[i]);
        assert_int_equal(echo.tokens[i].ntop, i == 0 ? 0 : 2);
        assert_true(i == 0 ? echo.tokens[i].logprob == 0 : echo.tokens[i].logprob < 0);
        assert_int_equal(echo.tokens[i].text_end, 0);
    }
    for (size_t i = 0; i < 3; i++) { /* and the output is the same as without */
        assert_int_equal(echo.tokens[150 + i].token, plain.tokens[i].token);
        assert_memory_equal(&echo.tokens[150 + i].logprob, &plain.tokens[i].logprob, 4);
    }
    struct rig small; /* preempted in the middle of it, too */
    rig_open(&small, base, 1, ISA_SCALAR, PREC_FAST, 0,
             (struct sched_opts){ .kv_bytes = rig_pages(base, 64), .step_tokens = 9 });
    struct gen *g = rig_submit(&small, &q);
    gen_wait(g, 40);
    sched_preempt_one(small.sched);
    struct result again = rig_finish(g);
    assert_true(result_equal(&echo, &again));
    assert_true(again.usage.preemptions <= 1);
    rig_close(&small);
    result_free(&plain), result_free(&echo), result_free(&again);

    q.nprompt = 1;
    echo = rig_run(&rig, &q);
    assert_int_equal(echo.n, 4);
    assert_true(echo.tokens[0].prompt && !echo.tokens[1].prompt);
    result_free(&echo);
}

static void a_base_without_tokenizer_works_on_ids(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    m.no_tokenizer = true;
    struct base *b = support_base(&m, "f32", NULL, PREC_F32);
    struct rig r;
    rig_open(&r, b, 1, ISA_SCALAR, PREC_F32, 0, (struct sched_opts){ .kv_bytes = 1 << 20 });
    struct gen_request q = rig_request(prompt, 8, 4);
    q.ignore_eos = true;
    struct result got = rig_run(&r, &q);
    assert_int_equal(got.n, 4);
    assert_int_equal(got.text.len, 0);
    assert_int_equal(got.finish, GEN_LENGTH);
    result_free(&got);
    q.nstop = 1;
    q.stop[0] = "x";
    struct gen *g;
    struct err err = { 0 };
    assert_int_equal(sched_submit(r.sched, &q, &g, &err), ERR_INVALID);
    assert_string_equal(err.param, "stop");
    rig_close(&r);
    base_free(b);
}

/* --- the reference ------------------------------------------------------------------------- */
static int32_t *read_ids(const struct st_file *f, const char *name, int *ret_n)
{
    const struct st_tensor *t = st_find(f, name);
    assert_non_null(t);
    *ret_n = (int)st_count(t);
    int32_t *ids = malloc((size_t)*ret_n * sizeof *ids);
    assert_non_null(ids);
    for (int i = 0; i < *ret_n; i++) {
        int64_t v;
        memcpy(&v, t->data + 8 * i, 8);
        ids[i] = (int32_t)v;
    }
    return ids;
}

/* logits.safetensors of the reference has what transformers continues tokens_1 with. */
static void check_greedy(const char *model, const char *type, const char *wanted)
{
    char at[128];
    snprintf(at, sizeof at, "golden/models/%s", model);
    const char *dir = support_shared(at);
    if (dir == NULL)
        skip();
    char *copy = strdup(dir), *path = path_join(copy, "logits.safetensors");
    struct st_file *f;
    struct err err = { 0 };
    assert_int_equal(st_open(path, &f, &err), ERR_OK);
    int n, nwant;
    int32_t *ids = read_ids(f, "tokens_1", &n), *want = read_ids(f, wanted, &nwant);
    struct base *b = support_base_dir(copy, type, "f32", PREC_F32);
    struct rig r;
    rig_open(&r, b, 2, ISA_SCALAR, PREC_F32, 0, (struct sched_opts){ .kv_bytes = 1 << 20 });
    struct gen_request q = rig_request(ids, n, nwant);
    q.ignore_eos = true;
    struct result got = rig_run(&r, &q);
    assert_int_equal(got.n, nwant);
    for (int i = 0; i < nwant; i++)
        if (got.tokens[i].token != want[i])
            fail_msg("%s %s: token %d is %d, the reference has %d", model, type, i,
                     (int)got.tokens[i].token, (int)want[i]);
    result_free(&got);
    rig_close(&r);
    base_free(b);
    st_close(f);
    free(ids), free(want), free(path), free(copy);
}

static void greedy_continuations_are_those_of_transformers(void **state)
{
    (void)state;
    static const char *const models[] = { "tiny-llama", "tiny-llama3", "tiny-mistral",
                                          "tiny-qwen2", "tiny-qwen3" };
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        check_greedy(models[i], "f32", "greedy_from_tokens_1");
        check_greedy(models[i], "nf4", "greedy_nf4dq_from_tokens_1");
    }
}

static struct base *stories(void)
{
    const char *dir = support_shared("models/stories260K");
    if (dir == NULL)
        skip();
    return support_base_dir(dir, "f32", "f32", PREC_F32);
}

/* The sentence's loss was computed in float64 from the model's files. */
static void echo_gives_the_known_loss_of_a_sentence(void **state)
{
    (void)state;
    static const int32_t ids[] = { 1,   385, 328, 432, 261, 280, 305, 330, 272, 414, 444, 272,
                                   277, 264, 261, 262, 415, 271, 422, 410, 354, 422, 318, 264,
                                   285, 265, 334, 341, 334, 412, 433, 259, 276, 411, 426 };
    struct base *b = stories();
    struct rig r;
    rig_open(&r, b, 2, ISA_SCALAR, PREC_F32, 0, (struct sched_opts){ .kv_bytes = 1 << 20 });
    struct gen_request q = rig_request(ids, 35, 1);
    q.echo_logprobs = true;
    q.sample.top_logprobs = 0;
    struct result got = rig_run(&r, &q);
    double nll = 0;
    for (int i = 1; i < 35; i++)
        nll -= (double)got.tokens[i].logprob;
    assert_float_equal(nll, 54.4041, 2e-4);
    result_free(&got);
    rig_close(&r);
    base_free(b);
}

static const char story[] = ", there was a little girl named Lily. She loved to play outside in the "
                            "park. One day, she saw a big, red ball.";

static void stories260k_tells_its_story_up_to_where_it_is_stopped(void **state)
{
    (void)state;
    static const struct { const char *stop; int max_tokens; } cases[] = {
        { NULL, 40 }, { "Lily", 40 }, { " the park", 40 }, { "y. S", 40 }, { "ball?", 40 },
    };
    struct base *b = stories();
    struct rig r;
    struct tok_ids ids = { .ids = NULL };
    rig_open(&r, b, 2, ISA_SCALAR, PREC_F32, 0, (struct sched_opts){ .kv_bytes = 1 << 20 });
    assert_int_equal(tokenizer_encode(r.tokenizer, "Once upon a time", 16, true, false, 0, &ids,
                                      NULL), ERR_OK);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct gen_request q = rig_request(ids.ids, (int)ids.n, cases[i].max_tokens);
        q.nstop = cases[i].stop != NULL;
        q.stop[0] = cases[i].stop;
        const char *end = cases[i].stop != NULL ? strstr(story, cases[i].stop) : NULL;
        size_t len = end != NULL ? (size_t)(end - story) : strlen(story);
        struct result got = rig_run(&r, &q);
        assert_int_equal(got.finish, end != NULL ? GEN_STOP : GEN_LENGTH);
        assert_int_equal(got.text.len, len);
        assert_memory_equal(got.text.data, story, len);
        result_free(&got);
    }
    free(ids.ids);
    rig_close(&r);
    base_free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_token_says_which_text_became_certain),
        cmocka_unit_test(a_stop_string_over_several_tokens_is_cut_out_whole),
        cmocka_unit_test(what_only_began_a_stop_string_comes_out_in_the_end),
        cmocka_unit_test(the_earliest_of_several_stop_strings_wins),
        cmocka_unit_test(an_end_token_stops_without_text_unless_it_is_ignored),
        cmocka_unit_test(text_is_handed_out_in_whole_characters),
        cmocka_unit_test(reading_in_pieces_gives_the_same_as_reading_at_once),
        cmocka_unit_test(echoed_prompt_tokens_are_scored_however_the_prompt_is_cut),
        cmocka_unit_test(a_base_without_tokenizer_works_on_ids),
        cmocka_unit_test(greedy_continuations_are_those_of_transformers),
        cmocka_unit_test(echo_gives_the_known_loss_of_a_sentence),
        cmocka_unit_test(stories260k_tells_its_story_up_to_where_it_is_stopped),
    };
    return cmocka_run_group_tests(tests, make_rig, free_rig);
}
