/* test_tokens.c - trainable_token_indices: rows of the embedding and the head that an adapter replaces.
 *
 * Names and shapes are those that PEFT writes; what it computes is what modules_to_save computes
 * with a whole table in which only these rows are new (which test_golden.c holds against PEFT's
 * numbers), so the two must give the same bits here. */
#include "engine/forward.h"
#include "engine/util.h"
#include "store/store.h"
#include "tests/support_adapter.h"
#include "tests/support_lora.h"
#include "tests/support_model.h"
#include "tests/support_store.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define P "base_model.model."
#define DELTA ".token_adapter.trainable_tokens_delta"

enum { TENSORS = 64, LEN = 9, NSEQ = 4 };

static struct err err;

static void ok(int rc)
{
    if (rc != ERR_OK)
        fail_msg("error %d: %s", rc, err.msg);
}

/* LoRA on every q_proj, and then some more of the config and of tensors. */
struct file {
    char config[2048];
    struct support_tensor t[TENSORS];
    size_t n;
};

static void start(struct file *f, const struct arch *a, const char *more)
{
    snprintf(f->config, sizeof f->config,
             "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":2,\"target_modules\":[\"q_proj\"]%s%s}",
             more[0] != '\0' ? "," : "", more);
    f->n = support_lora_tensors(a, "q_proj", 2, false, "F32", f->t, TENSORS);
}

static void put(struct file *f, const char *name, const char *dtype, int64_t rows, int64_t cols)
{
    struct support_tensor *t = &f->t[f->n++];
    assert_true(f->n <= TENSORS);
    *t = (struct support_tensor){ .dtype = dtype, .rows = rows, .cols = cols };
    snprintf(t->name, sizeof t->name, P "%s", name);
}

static struct adapter_src *parse(const struct arch *a, const struct file *f)
{
    struct adapter_src *src = NULL;
    ok(support_parse(a, f->config, f->t, f->n, &src, &err));
    return src;
}

static struct adapter *built(const struct arch *arch, const struct adapter_src *src, uint8_t name)
{
    struct adapter *a = NULL, *spare = support_spare(adapter_build_bytes(arch, src));
    ok(adapter_build(arch, src, 0, &spare, &a, &err)); /* in memory that is not zeros */
    assert_null(spare);
    assert_int_equal(a->bytes, adapter_build_bytes(arch, src));
    a->hash[0] = name;
    return a;
}

static struct base *base_of(const char *family, bool tied, const char *type, enum precision p)
{
    struct support_model m = support_model_default(family);
    m.tied = tied;
    return support_base(&m, type, NULL, p);
}

/* All logits of the sequences [from, to): sequence i uses set[i] and tokens i, i + 3, ... */
static float *run(const struct base *b, const struct lora_set *set, int from, int to,
                  enum precision p, enum isa isa, int threads)
{
    struct compute c = { .isa = isa, .precision = p };
    struct kv_cache *kv;
    struct forward *f;
    struct kv_seq s[NSEQ];
    struct span spans[NSEQ];
    int32_t tokens[NSEQ][LEN];
    ok(pool_create(threads, &c.pool, &err));
    ok(kv_create(&b->arch, kv_type_default(b->is_f32), 16 * kv_page_bytes(&b->arch, kv_type_default(b->is_f32)), &kv, &err));
    ok(forward_create(b, &c, kv, b->arch.max_positions, NSEQ * LEN, NSEQ * LEN, &f, &err));
    for (int i = from; i < to; i++) {
        const uint8_t seed[32] = { (uint8_t)(i + 1) };
        for (int k = 0; k < LEN; k++)
            tokens[i][k] = i % 2 + 3 * k;
        memset(&s[i], 0, sizeof s[i]);
        ok(kv_open(kv, seed, tokens[i], LEN, &s[i], NULL));
        assert_true(kv_reserve(kv, &s[i], LEN));
        spans[i - from] = (struct span){ &s[i], 0, LEN, tokens[i], &set[i], LEN };
    }
    const size_t bytes = (size_t)(to - from) * LEN * (size_t)b->arch.V * sizeof(float);
    float *out = malloc(bytes);
    assert_non_null(out);
    memcpy(out, forward_run(f, spans, to - from), bytes);
    for (int i = from; i < to; i++)
        kv_close(kv, &s[i]);
    forward_destroy(f);
    kv_destroy(kv);
    pool_destroy(c.pool);
    return out;
}

static const struct adapter_src_extra *extra(const struct adapter_src *a, enum adapter_extra kind)
{
    for (size_t i = 0; i < a->nextras; i++)
        if (a->extras[i].kind == kind)
            return &a->extras[i];
    return NULL;
}

/* --- what is computed ---------------------------------------------------------------------------- */
/* In `whole`, the base's table with the rows of `rows`. */
static void fill_table(const struct base *b, const struct adapter_src *whole, enum adapter_extra table,
                       const struct adapter_src *rows, enum adapter_extra kind)
{
    const struct adapter_src_extra *to = extra(whole, table), *r = extra(rows, kind);
    const struct matrix *from = table == EXTRA_HEAD ? &b->head : &b->embed;
    const size_t row = (size_t)b->arch.D * 4;
    char *p = (char *)(uintptr_t)to->data;
    memcpy(p, from->codes, (size_t)b->arch.V * row);
    for (int i = 0; r != NULL && i < r->rows; i++) {
        int32_t id;
        memcpy(&id, (const char *)r[1].data + 4 * i, 4);
        memcpy(p + (size_t)id * row, (const char *)r->data + (size_t)i * row, row);
    }
}

/* `tokens` as in the config; rows of the embedding and of the head in the file (0: none); whether
 * the head takes those of the embedding. */
static void check_rows(const char *family, bool tied, const char *tokens, int nembed, int nhead,
                       bool follows)
{
    struct base *b = base_of(family, tied, "f32", PREC_EXACT);
    const struct arch *a = &b->arch;
    struct file *f = calloc(1, sizeof *f);
    char more[1024];
    assert_non_null(f);
    snprintf(more, sizeof more, "\"trainable_token_indices\":%s", tokens);
    start(f, a, more);
    if (nembed > 0)
        put(f, "model.embed_tokens" DELTA, "F32", nembed, a->D);
    if (nhead > 0)
        put(f, "lm_head" DELTA, "F32", nhead, a->D);
    struct adapter_src *rows = parse(a, f);
    start(f, a, "\"modules_to_save\":[\"embed_tokens\",\"lm_head\"]");
    put(f, "model.embed_tokens.weight", "F32", a->V, a->D);
    put(f, "lm_head.weight", "F32", a->V, a->D);
    struct adapter_src *whole = parse(a, f);
    fill_table(b, whole, EXTRA_EMBED, rows, EXTRA_EMBED_ROWS);
    fill_table(b, whole, EXTRA_HEAD, rows, follows ? EXTRA_EMBED_ROWS : EXTRA_HEAD_ROWS);

    struct adapter *x = built(a, rows, 1), *y = built(a, whole, 2);
    struct adapter *plain = support_lora(a, METHOD_LORA, 2, 0.1f, 3);
    const struct lora_set set[3] = { { 1, { { x, 1 } } }, { 0 }, { 1, { { y, 1 } } } };
    float *got = run(b, set, 0, 3, PREC_EXACT, ISA_SCALAR, 1);
    const size_t one = LEN * (size_t)a->V;
    if (memcmp(got, got + 2 * one, one * sizeof *got) != 0)
        fail_msg("%s with %s: not what the whole tables give", family, tokens);
    free(got);
    /* only the rows are kept */
    assert_true(x->bytes < y->bytes - (size_t)(a->V - nembed - nhead) * (size_t)a->D * 4);
    adapter_free(plain);
    adapter_free(x);
    adapter_free(y);
    adapter_src_free(rows);
    adapter_src_free(whole);
    free(f);
    base_free(b);
}

static void replaced_rows_are_whole_tables_with_these_rows(void **state)
{
    (void)state;
    char many[1024] = "[";
    for (int i = 0; i < 200; i++) /* more than the width, in no order */
        sprintf(many + strlen(many), "%s%d", i > 0 ? "," : "", i * 7 % 320);
    strcat(many, "]");
    check_rows("llama", false, "[6,3,319]", 3, 0, false);
    check_rows("llama", false, "{\"embed_tokens\":[12,0],\"lm_head\":[5,4,0]}", 2, 3, false);
    check_rows("llama", false, "{\"lm_head\":[5]}", 0, 1, false);
    check_rows("llama", true, "[6,3,319]", 3, 0, true);
    check_rows("qwen3", true, "{\"model.embed_tokens\":[9]}", 1, 0, true);
    check_rows("llama", true, "{\"embed_tokens\":[9,6],\"lm_head\":[9,6]}", 2, 0, true);
    check_rows("llama", true, "{\"embed_tokens\":[9,6],\"lm_head\":[6,9]}", 2, 2, false);
    check_rows("llama", true, "{\"lm_head\":[3,2,1]}", 0, 3, false);
    check_rows("llama", true, many, 200, 0, true);
    check_rows("llama", false, many, 200, 0, false);
}

/* Rows of each type, beside other adapters, in a base of 4 bits. */
static void a_batch_has_the_bits_that_its_rows_have_alone(void **state)
{
    (void)state;
    static const char *const types[] = { "F32", "F16", "BF16" };
    enum isa isa;
    ok(isa_select("auto", &isa, &err));
    for (int i = 0; i < 3; i++) {
        struct base *b = base_of("qwen2", true, "nf4", i == 1 ? PREC_FAST : PREC_EXACT);
        const enum precision p = i == 1 ? PREC_FAST : PREC_EXACT;
        struct file *f = calloc(1, sizeof *f);
        assert_non_null(f);
        start(f, &b->arch, "\"trainable_token_indices\":[0,3,300,6]");
        put(f, "model.embed_tokens" DELTA, types[i], 4, b->arch.D);
        struct adapter_src *src = parse(&b->arch, f);
        struct adapter *x = built(&b->arch, src, 1);
        struct adapter *plain = support_lora(&b->arch, METHOD_ADALORA, 4, 0.3f, 7);
        const struct lora_set set[NSEQ] = { { 1, { { x, 1 } } }, { 1, { { plain, 0.5f } } },
                                            { 0 }, { 1, { { x, 1 } } } };
        const size_t one = LEN * (size_t)b->arch.V;
        float *all = run(b, set, 0, NSEQ, p, isa, 3);
        for (int s = 0; s < NSEQ; s++) {
            float *alone = run(b, set, s, s + 1, p, ISA_SCALAR, 1);
            for (size_t k = 0; k < one; k++)
                assert_true(isfinite(alone[k]));
            assert_memory_equal(alone, all + (size_t)s * one, one * sizeof *all);
            free(alone);
        }
        for (int k = 0; k < LEN; k++) /* the head's row 300 is the adapter's */
            assert_true(all[(size_t)k * (size_t)b->arch.V + 300] !=
                        all[2 * one + (size_t)k * (size_t)b->arch.V + 300]);
        free(all);
        const struct lora_set half = { 1, { { x, 0.5f } } };
        const struct lora_set two = { 2, { { x, 1 }, { plain, 1 } } };
        for (int k = 0; k < 2; k++) {
            err_clear(&err);
            assert_int_equal(lora_set_check(k ? &two : &half, &err), ERR_INVALID);
            assert_non_null(strstr(err.msg, "replaces rows"));
        }
        err_clear(&err);
        adapter_free(plain);
        adapter_free(x);
        adapter_src_free(src);
        free(f);
        base_free(b);
    }
}

/* --- what is refused ------------------------------------------------------------------------------ */
static const struct {
    bool tied;
    const char *more, *name;
    int rows, cols; /* of the tensor */
    const char *says;
} wrongs[] = {
    { false, "\"trainable_token_indices\":[3,5,3]", "", 3, 128, "names the id 3 twice" },
    { false, "\"trainable_token_indices\":[3,320]", "", 2, 128, "has 320 among its ids" },
    { false, "\"trainable_token_indices\":[-1]", "", 1, 128, "has -1 among its ids" },
    { false, "\"trainable_token_indices\":[1.0]", "", 1, 128, "has 1.0 among its ids" },
    { false, "\"trainable_token_indices\":[true]", "", 1, 128, "has true among its ids" },
    { false, "\"trainable_token_indices\":[9223372036854775807]", "", 1, 128, "has 9223372036854775807" },
    { false, "\"trainable_token_indices\":\"x\"", "", 1, 128, "must be a list of ids" },
    { false, "\"trainable_token_indices\":{\"embed_tokens\":[]}", "", 1, 128, "without any ids" },
    { false, "\"trainable_token_indices\":{\"embed_tokens\":3}", "", 1, 128, "must have lists of ids" },
    { false, "\"trainable_token_indices\":{\"wte\":[3]}", "", 1, 128, "names wte: this base (llama)" },
    { false, "\"trainable_token_indices\":{\"tokens\":[3]}", "", 1, 128, "names tokens: this base" },
    { false, "\"trainable_token_indices\":{\"\":[3]}", "", 1, 128, "names : this base" },
    { false, "\"trainable_token_indices\":{\"embed_tokens\":[3],\"model.embed_tokens\":[4]}", "", 1, 128,
      "names model.embed_tokens twice" },
    { false, "\"trainable_token_indices\":[3],\"modules_to_save\":[\"embed_tokens\"]", "", 1, 128,
      "which modules_to_save changes too" },
    { true, "\"trainable_token_indices\":[3],\"modules_to_save\":[\"lm_head\"]", "", 1, 128,
      "rows of lm_head, which modules_to_save changes too" },
    { true, "\"trainable_token_indices\":[3],\"target_modules\":[\"q_proj\",\"lm_head\"]", "", 1, 128,
      "rows of lm_head, which target_modules changes too" },
    { false, "\"trainable_token_indices\":[3],\"target_modules\":[\"q_proj\",\"embed_tokens\"]", "", 1,
      128, "rows of model.embed_tokens, which target_modules changes too" },
    { true, "\"ensure_weight_tying\":true,\"trainable_token_indices\":"
            "{\"embed_tokens\":[3],\"lm_head\":[4]}", "", 1, 128, "ensure_weight_tying is true, but" },
    { false, "\"trainable_token_indices\":[3,4]", "", 1, 128, "has shape [1, 128], not [2, 128]" },
    { false, "\"trainable_token_indices\":[3]", "", 1, 127, "not [1, 128]" },
    { false, "\"trainable_token_indices\":{\"lm_head\":[3]}", "", 1, 128, "does not ask for here" },
    { false, "\"bias\":\"none\"", "", 1, 128, "does not ask for here" },
    { false, "\"trainable_token_indices\":{\"embed_tokens\":[3],\"lm_head\":[3]}", "", 1, 128,
      "lm_head" DELTA " is missing: trainable_token_indices names its rows" },
};

static void what_has_no_exact_meaning_is_refused_by_name(void **state)
{
    (void)state;
    struct file *f = calloc(1, sizeof *f);
    assert_non_null(f);
    for (int tied = 0; tied < 2; tied++) {
        struct base *b = base_of("llama", tied, "nf4", PREC_EXACT);
        for (size_t i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++) {
            struct adapter_src *src = NULL;
            if (wrongs[i].tied != tied)
                continue;
            start(f, &b->arch, wrongs[i].more);
            if (strstr(wrongs[i].more, "target_modules") != NULL) /* instead of the first one */
                snprintf(f->config, sizeof f->config, "{\"peft_type\":\"LORA\",\"r\":2,%s}",
                         wrongs[i].more);
            put(f, "model.embed_tokens" DELTA, "F32", wrongs[i].rows, wrongs[i].cols);
            err_clear(&err);
            int rc = support_parse(&b->arch, f->config, f->t, f->n, &src, &err);
            if (rc != ERR_INVALID || strstr(err.msg, wrongs[i].says) == NULL)
                fail_msg("%s: %d \"%s\"", wrongs[i].more, rc, err.msg);
        }
        base_free(b);
    }
    err_clear(&err);
    free(f);
}

/* A tied head's tensor is not in the file: the embedding's is for both. */
static void a_second_tensor_for_a_tied_head_is_refused(void **state)
{
    (void)state;
    struct base *b = base_of("llama", true, "nf4", PREC_EXACT);
    struct file *f = calloc(1, sizeof *f);
    struct adapter_src *src = NULL;
    assert_non_null(f);
    start(f, &b->arch, "\"trainable_token_indices\":{\"embed_tokens\":[3],\"lm_head\":[3]}");
    put(f, "model.embed_tokens" DELTA, "F32", 1, b->arch.D);
    put(f, "lm_head" DELTA, "F32", 1, b->arch.D);
    assert_int_equal(support_parse(&b->arch, f->config, f->t, f->n, &src, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "lm_head" DELTA));
    err_clear(&err);
    free(f);
    base_free(b);
}

/* What the store could hand over after damage that the hash does not see. */
static void rows_without_their_ids_are_not_built(void **state)
{
    (void)state;
    struct base *b = base_of("llama", false, "nf4", PREC_EXACT);
    struct file *f = calloc(1, sizeof *f);
    struct adapter *a = NULL;
    assert_non_null(f);
    start(f, &b->arch, "\"trainable_token_indices\":{\"embed_tokens\":[3,4],\"lm_head\":[3,4]}");
    put(f, "model.embed_tokens" DELTA, "F32", 2, b->arch.D);
    put(f, "lm_head" DELTA, "F32", 2, b->arch.D);
    struct adapter_src *src = parse(&b->arch, f);
    assert_int_equal(src->nextras, 4);
    int32_t *ids = (int32_t *)(uintptr_t)extra(src, EXTRA_HEAD_IDS)->data;
    for (int i = 0; i < 3; i++) {
        ids[0] = i == 0 ? -1 : i == 1 ? b->arch.V : 4;
        err_clear(&err);
        assert_int_equal(adapter_build(&b->arch, src, 0, NULL, &a, &err), ERR_INVALID);
        assert_non_null(strstr(err.msg, "lm_head" DELTA ": token"));
    }
    ids[0] = 3;
    for (int i = 0; i < 4; i++) { /* one of the four is something else */
        const struct adapter_src_extra was = src->extras[i];
        src->extras[i].kind = i == 0 ? EXTRA_HEAD_ROWS : EXTRA_EMBED_ROWS;
        if (src->extras[i].kind == was.kind)
            src->extras[i].kind = EXTRA_EMBED_IDS;
        err_clear(&err);
        assert_int_equal(adapter_build(&b->arch, src, 0, NULL, &a, &err), ERR_INVALID);
        src->extras[i] = was;
    }
    err_clear(&err);
    adapter_free(built(&b->arch, src, 1));
    adapter_src_free(src);
    free(f);
    base_free(b);
}

/* --- the store and files ----------------------------------------------------------------------------- */
static void what_is_stored_and_written_comes_back_the_same(void **state)
{
    (void)state;
    struct base *b = base_of("llama", false, "nf4", PREC_EXACT);
    struct file *f = calloc(1, sizeof *f);
    struct store *st;
    struct adapter_src *c;
    struct store_version v;
    bool is_new;
    char dir[64], path[96];
    assert_non_null(f);
    start(f, &b->arch, "\"trainable_token_indices\":{\"embed_tokens\":[12,0],\"lm_head\":[5,4,0]}");
    put(f, "model.embed_tokens" DELTA, "BF16", 2, b->arch.D);
    put(f, "lm_head" DELTA, "F16", 3, b->arch.D);
    struct adapter_src *a = parse(&b->arch, f);
    assert_int_equal(a->params, (uint64_t)3 * 2 * (128 + 128) + 5 * 128);
    ok(store_open(":memory:", &st, &err));
    const struct store_put_opts o = { .activate = true, .base_hash_hex = b->hash_hex,
                                      .base_claimed = true, .origin = "upload" };
    ok(store_adapter_put(st, 1, "a", a, &o, &v, &is_new, &err));
    ok(store_version_load(st, v.id, &c, &err));
    support_same_adapter(a, c, true);
    assert_int_equal(c->nextras, 4);
    for (size_t i = 0; i < 4; i++) {
        const struct adapter_src_extra *x = &a->extras[i], *y = &c->extras[i];
        assert_int_equal(x->kind, y->kind);
        assert_string_equal(x->name, y->name);
        assert_int_equal(x->dtype, y->dtype);
        assert_int_equal(x->rows, y->rows);
        assert_int_equal(x->cols, y->cols);
        assert_memory_equal(x->data, y->data, adapter_extra_count(x) * dtype_size(x->dtype));
    }
    struct adapter *one = built(&b->arch, a, 1), *two = built(&b->arch, c, 1);
    assert_int_equal(one->bytes, two->bytes);
    adapter_free(one);
    adapter_free(two);
    adapter_src_free(c);
    ok(store_check(st, &err));

    support_tmpdir(dir);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
    ok(peft_write_weights(a, path, &err));
    support_write_file(dir, "adapter_config.json", a->config, a->config_len);
    ok(peft_load_dir(&b->arch, dir, &c, &err));
    assert_memory_equal(a->hash, c->hash, 32);
    assert_int_equal(c->nextras, 4);
    adapter_src_free(c);
    support_remove(dir);

    /* the same rows for other tokens are another adapter */
    uint8_t hash[32];
    int32_t *ids = (int32_t *)(uintptr_t)extra(a, EXTRA_EMBED_IDS)->data;
    ids[0] = 13;
    adapter_src_hash(a, hash);
    assert_memory_not_equal(hash, a->hash, 32);
    store_version_free(&v);
    adapter_src_free(a);
    store_close(st);
    free(f);
    base_free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(replaced_rows_are_whole_tables_with_these_rows),
        cmocka_unit_test(a_batch_has_the_bits_that_its_rows_have_alone),
        cmocka_unit_test(what_has_no_exact_meaning_is_refused_by_name),
        cmocka_unit_test(a_second_tensor_for_a_tied_head_is_refused),
        cmocka_unit_test(rows_without_their_ids_are_not_built),
        cmocka_unit_test(what_is_stored_and_written_comes_back_the_same),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
