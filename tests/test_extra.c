/* test_extra.c - adapters with more than factors: DoRA, biases, replaced tensors, the embedding and
 * the head.  What they compute is compared with PEFT's own numbers in test_golden.c; here: what is
 * refused, what the store keeps, and that neighbours in a batch do not notice. */
#include "engine/forward.h"
#include "engine/util.h"
#include "store/store_int.h"
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
#include <jansson.h>

static struct err err;

static void ok(int rc)
{
    if (rc != ERR_OK)
        fail_msg("error %d: %s", rc, err.msg);
}

/* --- adapters in PEFT's format ------------------------------------------------------------------- */
enum { DORA = 1, LORA_BIAS = 2, BIAS = 4, SAVE = 8, OUTER = 16, ALL_BIAS = 32, TENSORS = 256, RANK = 3 };
#define P "base_model.model."

static const char gpt2[] =
    "{\"model_type\":\"gpt2\",\"n_embd\":128,\"n_layer\":2,\"n_head\":4,\"n_positions\":128,"
    "\"vocab_size\":320}";

/* A family's small model, or the model of a config. */
static struct base *base_of(const char *model, const char *type, enum precision p)
{
    const struct support_model m = support_model_default(model);
    return model[0] == '{' ? support_base_config(model, type, p) : support_base(&m, type, NULL, p);
}

struct file {
    char config[1024];
    struct support_tensor t[TENSORS];
    size_t n;
};

static struct support_tensor *put(struct file *f, const char *dtype, int64_t rows, int64_t cols,
                                  const char *path, const char *suffix)
{
    assert_true(f->n < TENSORS);
    struct support_tensor *t = &f->t[f->n++];
    *t = (struct support_tensor){ .dtype = dtype, .rows = rows, .cols = cols };
    snprintf(t->name, sizeof t->name, P "%s%s", path, suffix);
    return t;
}

static const char *last_part(const char *path)
{
    const char *dot = strrchr(path, '.');
    return dot != NULL ? dot + 1 : path;
}

/* All norms of the model, and modules_to_save for them, the head and the embedding. */
static void put_saved(struct file *f, const struct arch *a, const char *dtype, char save[512])
{
    const struct family *family = family_find(a->family);
    char path[96];
    snprintf(save, 512, "[\"%s\",\"%s\"", family->head, last_part(family->embed));
    for (int i = 0; i < NORM_COUNT; i++) {
        const bool of_heads = i == NORM_Q || i == NORM_K;
        const char *format = family->norm_path[i];
        if (format == NULL || (of_heads && !a->qk_norm))
            continue;
        snprintf(save + strlen(save), 512 - strlen(save), ",\"%s\"", last_part(format));
        for (int l = 0; l < (i < LAYER_NORMS ? a->L : 1); l++) {
            snprintf(path, sizeof path, format, l);
            put(f, i == NORM_MLP ? "BF16" : "F32", of_heads ? a->hd : a->D, -1, path, ".weight");
            if (family->norm_kind == NORM_LAYER)
                put(f, "F32", a->D, -1, path, ".bias");
        }
    }
    strcat(save, "]");
    put(f, dtype, a->V, a->D, family->head, ".weight");
    put(f, "F16", a->V, a->D, family->embed, ".weight");
}

/* Every linear layer of the blocks, and what the flags say. */
static void describe(struct file *f, const struct arch *a, int flags, const char *dtype)
{
    char save[512] = "null";
    memset(f, 0, sizeof *f);
    if (flags & SAVE)
        put_saved(f, a, dtype, save);
    snprintf(f->config, sizeof f->config,
             "{\"peft_type\":\"LORA\",\"r\":%d,\"lora_alpha\":2,\"target_modules\":[\"q_proj\","
             "\"k_proj\",\"v_proj\",\"o_proj\",\"gate_proj\",\"up_proj\",\"down_proj\","
             "\"c_attn\",\"c_proj\",\"c_fc\"%s],"
             "\"use_dora\":%s,\"lora_bias\":%s,\"bias\":\"%s\",\"modules_to_save\":%s}",
             RANK, flags & OUTER ? ",\"lm_head\",\"embed_tokens\",\"wte\"" : "",
             flags & DORA ? "true" : "false", flags & LORA_BIAS ? "true" : "false",
             flags & ALL_BIAS ? "all" : flags & BIAS ? "lora_only" : "none", save);
    for (int l = 0; l < a->L; l++)
        for (int m = 0; m < MOD_COUNT; m++) {
            char path[96];
            if (!arch_has_module(a, (enum module)m))
                continue;
            arch_module_path(a, l, (enum module)m, path, sizeof path);
            const int out = arch_out(a, (enum module)m);
            put(f, dtype, RANK, arch_in(a, (enum module)m), path, ".lora_A.weight");
            put(f, dtype, out, RANK, path, ".lora_B.weight");
            if (flags & DORA)
                put(f, dtype, out, -1, path, ".lora_magnitude_vector");
            if (flags & LORA_BIAS)
                put(f, dtype, out, -1, path, ".lora_B.bias");
            if (flags & (BIAS | ALL_BIAS) && arch_has_bias(a, (enum module)m))
                put(f, dtype, out, -1, path, ".base_layer.bias");
        }
    if (flags & OUTER) {
        const char *embed = family_find(a->family)->embed;
        put(f, dtype, RANK, a->D, "lm_head", ".lora_A.weight");
        put(f, dtype, a->V, RANK, "lm_head", ".lora_B.weight");
        put(f, dtype, RANK, a->V, embed, ".lora_embedding_A");
        put(f, dtype, a->D, RANK, embed, ".lora_embedding_B");
        put(f, dtype, a->V, a->D, embed, ".base_layer.weight");
    }
    if ((flags & (OUTER | DORA)) == (OUTER | DORA) || (flags & (OUTER | LORA_BIAS)) == (OUTER | LORA_BIAS))
        fail_msg("an embedding takes LoRA only");
}

static struct adapter_src *source(const struct arch *a, int flags, const char *dtype)
{
    struct file *f = malloc(sizeof *f);
    struct adapter_src *src = NULL;
    assert_non_null(f);
    describe(f, a, flags, dtype);
    ok(support_parse(a, f->config, f->t, f->n, &src, &err));
    free(f);
    return src;
}

static struct adapter *built(const struct base *b, struct adapter_src *src, uint8_t name)
{
    struct adapter *a = NULL, *spare = support_spare(adapter_build_bytes(&b->arch, src));
    ok(adapter_norms(b, src, &err));
    ok(adapter_build(&b->arch, src, 0, &spare, &a, &err)); /* in memory that is not zeros */
    assert_null(spare);
    assert_int_equal(a->bytes, adapter_build_bytes(&b->arch, src));
    a->hash[0] = name; /* some are the same but for their flags */
    return a;
}

/* --- batches --------------------------------------------------------------------------------------- */
enum { NSEQ = 8, LEN = 9 };

struct scene {
    struct base *base;
    struct adapter *adapters[7];
    struct lora_set set[NSEQ];
    int32_t tokens[NSEQ][LEN];
};

static void scene_open(struct scene *sc, const char *family, const char *type, enum precision p)
{
    static const int flags[] = { DORA, BIAS | SAVE, OUTER, LORA_BIAS | BIAS, LORA_BIAS };
    static const char *const types[] = { "F32", "BF16", "F16", "F32", "BF16" };
    sc->base = base_of(family, type, p);
    for (int i = 0; i < 5; i++) {
        struct adapter_src *src = source(&sc->base->arch, flags[i], types[i]);
        sc->adapters[i] = built(sc->base, src, (uint8_t)(10 + i));
        sc->set[i] = (struct lora_set){ 1, { { sc->adapters[i], 1 } } };
        adapter_src_free(src);
    }
    sc->adapters[5] = support_lora(&sc->base->arch, METHOD_LORA, 4, 0.3f, 7);
    sc->adapters[6] = support_lora(&sc->base->arch, METHOD_ADALORA, 4, 0.3f, 8);
    sc->set[5] = (struct lora_set){ 0 };
    sc->set[6] = (struct lora_set){ 1, { { sc->adapters[6], 1 } } };
    sc->set[7] = (struct lora_set){ 3, { { sc->adapters[5], 0.5f }, { sc->adapters[2], -0.25f },
                                         { sc->adapters[4], 0.75f } } };
    for (int i = 0; i < NSEQ; i++) {
        lora_set_sort(&sc->set[i]);
        ok(lora_set_check(&sc->set[i], &err));
        for (int k = 0; k < LEN; k++)
            sc->tokens[i][k] = (i * 31 + k * 57 + 5) % sc->base->arch.V;
    }
}

static void scene_close(struct scene *sc)
{
    for (int i = 0; i < 7; i++)
        adapter_free(sc->adapters[i]);
    base_free(sc->base);
}

/* The last two logits of the sequences [from, to), `nlogits` of each. */
static float *run(const struct scene *sc, int from, int to, enum precision p, enum isa isa,
                  int threads, int nlogits)
{
    const struct base *b = sc->base;
    struct compute c = { .isa = isa, .precision = p };
    struct kv_cache *kv;
    struct forward *f;
    struct kv_seq s[NSEQ];
    struct span spans[NSEQ];
    ok(pool_create(threads, &c.pool, &err));
    ok(kv_create(&b->arch, kv_type_default(b->is_f32), 16 * kv_page_bytes(&b->arch, kv_type_default(b->is_f32)), &kv, &err));
    ok(forward_create(b, &c, kv, LEN, NSEQ * LEN, NSEQ * LEN, &f, &err));
    for (int i = from; i < to; i++) {
        const uint8_t seed[32] = { (uint8_t)(i + 1) };
        memset(&s[i], 0, sizeof s[i]);
        ok(kv_open(kv, seed, sc->tokens[i], LEN, &s[i], NULL));
        assert_true(kv_reserve(kv, &s[i], LEN));
        spans[i - from] = (struct span){ &s[i], 0, LEN, sc->tokens[i], &sc->set[i], nlogits };
    }
    const size_t bytes = (size_t)(to - from) * (size_t)nlogits * (size_t)b->arch.V * sizeof(float);
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

static void check_batches(const char *family, const char *type, enum precision p)
{
    struct scene sc;
    enum isa isa;
    scene_open(&sc, family, type, p);
    ok(isa_select("auto", &isa, &err));
    const int nlogits[] = { 2, LEN };
    for (int n = 0; n < 2; n++) {
        const size_t one = (size_t)nlogits[n] * (size_t)sc.base->arch.V;
        float *all = run(&sc, 0, NSEQ, p, isa, 3, nlogits[n]);
        for (int i = 0; i < NSEQ; i++) {
            float *alone = run(&sc, i, i + 1, p, ISA_SCALAR, 1, nlogits[n]);
            for (size_t k = 0; k < one; k++)
                assert_true(isfinite(alone[k]));
            if (memcmp(alone, all + (size_t)i * one, one * sizeof *alone) != 0)
                fail_msg("%s %s: sequence %d has other bits in the batch", family, type, i);
            free(alone);
        }
        /* and they are not all the same */
        for (int i = 0; i < NSEQ; i++)
            for (int k = 0; k < i; k++)
                assert_memory_not_equal(all + (size_t)i * one, all + (size_t)k * one, 64);
        free(all);
    }
    scene_close(&sc);
}

static void rows_beside_dora_and_replaced_tensors_have_the_bits_they_have_alone(void **state)
{
    (void)state;
    check_batches("qwen2", "nf4", PREC_EXACT);
    check_batches("qwen2", "nf4", PREC_FAST);
    check_batches("qwen3", "f32", PREC_EXACT);
    check_batches(gpt2, "nf4", PREC_EXACT);
}

/* --- replaced tensors ------------------------------------------------------------------------------ */
static const void *own(const struct base *b, const struct adapter_src_extra *x)
{
    const struct base_norm *n = x->module == NORM_FINAL ? &b->norm_final
                                : x->module == NORM_EMBED
                                    ? &b->norm_embed
                                    : &b->layers[x->layer].norm[x->module];
    return x->kind == EXTRA_NORM        ? n->w
           : x->kind == EXTRA_NORM_BIAS ? n->bias
           : x->kind == EXTRA_HEAD      ? b->head.codes
                                        : b->embed.codes;
}

/* A number that may lie unaligned. */
static void add_to(char *p, float add)
{
    float x;
    memcpy(&x, p, sizeof x);
    x += add;
    memcpy(p, &x, sizeof x);
}

/* An adapter that replaces norms, embedding and head with what the base has already changes no bit;
 * if one number of any of them is another, it does. */
static void check_replaced(const char *family)
{
    struct scene sc = { .base = base_of(family, "f32", PREC_EXACT) };
    const struct arch *a = &sc.base->arch;
    struct file *f = malloc(sizeof *f);
    assert_non_null(f);
    describe(f, a, SAVE, "F32");
    for (size_t i = 0; i < f->n; i++)
        f->t[i].dtype = "F32";
    struct adapter_src *plain = source(a, 0, "F32"), *src = NULL;
    ok(support_parse(a, f->config, f->t, f->n, &src, &err));
    assert_true(src->nextras > 4);
    for (size_t i = 0; i < src->nextras; i++)
        memcpy((void *)(uintptr_t)src->extras[i].data, own(sc.base, &src->extras[i]),
               adapter_extra_count(&src->extras[i]) * sizeof(float));
    sc.adapters[0] = built(sc.base, plain, 1);
    sc.set[0] = sc.set[1] = (struct lora_set){ 1, { { sc.adapters[0], 1 } } };
    for (int k = 0; k < LEN; k++)
        sc.tokens[0][k] = sc.tokens[1][k] = 3 * k + 1;
    const size_t one = (size_t)LEN * (size_t)a->V;
    for (size_t n = 0; n <= src->nextras; n++) { /* the first time all is the base's own */
        const size_t i = n > 0 ? n - 1 : src->nextras;
        char *x = i < src->nextras ? (char *)(uintptr_t)src->extras[i].data : NULL;
        if (x != NULL) /* number 5, in tables of the row of token 4 */
            x += 4 * (5 + (src->extras[i].cols > 0 ? 4 * a->D : 0));
        if (x != NULL)
            add_to(x, 1);
        sc.adapters[1] = built(sc.base, src, 2);
        sc.set[1].item[0].adapter = sc.adapters[1];
        float *got = run(&sc, 0, 2, PREC_EXACT, ISA_SCALAR, 1, LEN);
        if ((memcmp(got, got + one, one * sizeof *got) == 0) != (x == NULL))
            fail_msg("%s: %s has %s effect", family, x ? src->extras[i].name : "all of them",
                     x ? "no" : "an");
        if (x != NULL)
            add_to(x, -1);
        free(got);
        adapter_free(sc.adapters[1]);
        sc.adapters[1] = NULL;
    }
    free(f);
    adapter_src_free(plain);
    adapter_src_free(src);
    scene_close(&sc);
}

static void what_is_replaced_is_replaced_exactly(void **state)
{
    (void)state;
    check_replaced("qwen3"); /* norms of q and k */
    check_replaced(gpt2);    /* norms with a bias */
}

/* With bias "all", layers that are not adapted and norms bring theirs. */
static void all_biases_of_the_base_are_asked_for(void **state)
{
    (void)state;
    struct base *b = base_of(gpt2, "nf4", PREC_EXACT);
    struct file *f = malloc(sizeof *f);
    struct adapter_src *src = NULL;
    assert_non_null(f);
    describe(f, &b->arch, ALL_BIAS, "F32");
    for (int l = 0; l < b->arch.L; l++)
        for (int i = 1; i < 3; i++) {
            char path[64];
            snprintf(path, sizeof path, "transformer.h.%d.ln_%d", l, i);
            put(f, "F32", b->arch.D, -1, path, ".bias");
        }
    assert_int_equal(support_parse(&b->arch, f->config, f->t, f->n, &src, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "tensor base_model.model.transformer.ln_f.bias is missing"));
    err_clear(&err);
    put(f, "F32", b->arch.D, -1, "transformer.ln_f", ".bias");
    ok(support_parse(&b->arch, f->config, f->t, f->n, &src, &err));
    assert_int_equal(src->nextras, 2 * (4 + 2) + 1);
    struct adapter *a = built(b, src, 1);
    assert_true(a->alone != NULL && a->vectors);
    const struct base_norm *n = &a->norms[adapter_norm_index(b->arch.L, b->arch.L, NORM_FINAL)];
    assert_true(n->bias != NULL && n->w == NULL);
    adapter_free(a);
    adapter_src_free(src);
    free(f);
    base_free(b);
}

/* --- alone ------------------------------------------------------------------------------------------- */
static void what_replaces_the_base_is_neither_combined_nor_weighted(void **state)
{
    (void)state;
    struct scene sc;
    scene_open(&sc, "qwen2", "nf4", PREC_EXACT);
    const char *const says[] = { "DoRA", "replaces", NULL, "biases", NULL };
    for (int i = 0; i < 5; i++) {
        struct lora_set half = { 1, { { sc.adapters[i], 0.5f } } };
        struct lora_set two = { 2, { { sc.adapters[5], 1 }, { sc.adapters[i], 1 } } };
        struct lora_set twice = { 2, { { sc.adapters[i], 0.5f }, { sc.adapters[i], 0.5f } } };
        const int want = says[i] != NULL ? ERR_INVALID : ERR_OK;
        for (int k = 0; k < 2; k++) {
            err_clear(&err);
            assert_int_equal(lora_set_check(k ? &two : &half, &err), want);
            if (says[i] != NULL)
                assert_non_null(strstr(err.msg, says[i]));
        }
        lora_set_sort(&twice); /* which is the adapter once, with weight 1 */
        assert_int_equal(lora_set_check(&twice, NULL), ERR_OK);
    }
    err_clear(&err);
    scene_close(&sc);
}

/* --- what is refused ------------------------------------------------------------------------------- */
/* The file with one thing changed: the tensor whose name ends so gets what is not 0 or NULL here. */
static const struct {
    int flags;
    const char *find, *drop, *dtype, *bad;
    int64_t rows;
    int cols;
    const char *says;
} wrongs[] = {
    { DORA, "1.self_attn.q_proj.lora_magnitude_vector", "yes", NULL, NULL, 0, 0, "is missing: use_dora" },
    { DORA, "1.self_attn.q_proj.lora_magnitude_vector", NULL, NULL, "nan", 0, 0, "not finite" },
    { DORA, "1.self_attn.q_proj.lora_magnitude_vector", NULL, NULL, NULL, 127, 0, "has shape [127]" },
    { DORA, "1.self_attn.q_proj.lora_magnitude_vector", NULL, NULL, NULL, 1, 128, "shape [1, 128]" },
    { DORA, "1.self_attn.q_proj.lora_magnitude_vector", NULL, "I32", NULL, 0, 0, "type I32" },
    { LORA_BIAS, "0.mlp.up_proj.lora_B.bias", "yes", NULL, NULL, 0, 0, "is missing: lora_bias" },
    { LORA_BIAS, "0.mlp.up_proj.lora_B.bias", NULL, NULL, "inf", 0, 0, "not finite" },
    { BIAS, "2.self_attn.k_proj.base_layer.bias", "yes", NULL, NULL, 0, 0, "is missing: the config's bias" },
    { BIAS, "2.self_attn.k_proj.base_layer.bias", NULL, NULL, NULL, 63, 0, "has shape [63], not [64]" },
    { SAVE, "lm_head.weight", "yes", NULL, NULL, 0, 0, "is missing: modules_to_save" },
    { SAVE, "lm_head.weight", NULL, NULL, NULL, 319, 128, "not [320, 128]" },
    { SAVE, "embed_tokens.weight", NULL, NULL, "nan", 0, 0, "not finite" },
    { SAVE, "model.norm.weight", NULL, NULL, NULL, 128, 1, "not [128]" },
    { SAVE, "0.input_layernorm.weight", "yes", NULL, NULL, 0, 0, "input_layernorm.weight is missing" },
    { OUTER, "embed_tokens.lora_embedding_A", "yes", NULL, NULL, 0, 0, "lora_embedding_A is missing" },
    { OUTER, "embed_tokens.lora_embedding_A", NULL, NULL, NULL, 320, 3, "not [3, 320]" },
    { OUTER, "lm_head.lora_B.weight", NULL, NULL, NULL, 321, 3, "not [320, 3]" },
    { OUTER, "embed_tokens.base_layer.weight", NULL, NULL, NULL, 321, 128, "not [320, 128]" },
    { OUTER, "embed_tokens.base_layer.weight", NULL, NULL, "nan", 0, 0, "not finite" },
};

static void a_tensor_that_is_wrong_or_missing_is_refused_by_name(void **state)
{
    (void)state;
    struct support_model m = support_model_default("qwen2");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct file *f = malloc(sizeof *f);
    assert_non_null(f);
    for (size_t i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++) {
        struct adapter_src *src = NULL;
        size_t at = 0;
        describe(f, &b->arch, wrongs[i].flags, "F32");
        const size_t k = strlen(wrongs[i].find);
        while (at < f->n && strcmp(f->t[at].name + strlen(f->t[at].name) - k, wrongs[i].find) != 0)
            at++;
        assert_true(at < f->n);
        struct support_tensor *t = &f->t[at];
        const struct support_tensor was = *t;
        if (wrongs[i].rows != 0) {
            t->rows = wrongs[i].rows;
            t->cols = wrongs[i].cols > 0 ? wrongs[i].cols : -1;
        }
        t->dtype = wrongs[i].dtype != NULL ? wrongs[i].dtype : t->dtype;
        t->bad = wrongs[i].bad;
        if (wrongs[i].drop != NULL)
            *t = f->t[--f->n];
        err_clear(&err);
        int rc = support_parse(&b->arch, f->config, f->t, f->n, &src, &err);
        if (rc != ERR_INVALID || strstr(err.msg, wrongs[i].says) == NULL ||
            strstr(err.msg, was.name) == NULL)
            fail_msg("%s, %s: %d \"%s\"", was.name, wrongs[i].says, rc, err.msg);
    }
    err_clear(&err);
    free(f);
    base_free(b);
}

static void a_setting_that_has_no_exact_meaning_is_refused_by_name(void **state)
{
    (void)state;
    static const struct {
        int flags;
        const char *field, *value, *says;
    } cases[] = {
        { DORA | LORA_BIAS, "r", "3", "lora_bias must be false with use_dora" },
        { OUTER, "use_dora", "true", "names model.embed_tokens" },
        { OUTER, "lora_bias", "true", "names model.embed_tokens" },
        { SAVE, "modules_to_save", "[\"lm_head\",\"mlp\"]", "means model.layers.0.mlp:" },
        { SAVE, "modules_to_save", "[\"1.self_attn.v_proj\"]", "means model.layers.1.self_attn.v_proj" },
        { SAVE, "modules_to_save", "[\"score\"]", "names score, which this base (qwen2) has not got" },
        { SAVE, "modules_to_save", "[\"lm_head\"]", "config does not ask for" },
        { SAVE, "modules_to_save", "null", "config does not ask for" },
        { SAVE, "modules_to_save", "[\"(norm)+\"]", "letters, digits" },
        { SAVE, "ensure_weight_tying", "true", "ensure_weight_tying is true" },
        { BIAS, "bias", "\"none\"", "replace a bias of the base" },
        { BIAS, "bias", "\"yes\"", "bias must be none, lora_only or all" },
        { DORA, "use_dora", "false", "belongs to DoRA" },
        { LORA_BIAS, "lora_bias", "false", "biases inside lora_B" },
    };
    struct support_model m = support_model_default("qwen2");
    m.tied = true;
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct file *f = malloc(sizeof *f);
    assert_non_null(f);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct adapter_src *src = NULL;
        describe(f, &b->arch, cases[i].flags, "F32");
        json_t *config = json_loads(f->config, 0, NULL);
        json_object_set_new(config, cases[i].field, json_loads(cases[i].value, JSON_DECODE_ANY, NULL));
        char *text = json_dumps(config, 0);
        err_clear(&err);
        int rc = support_parse(&b->arch, text, f->t, f->n, &src, &err);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("%s = %s: %d \"%s\"", cases[i].field, cases[i].value, rc, err.msg);
        free(text);
        json_decref(config);
    }
    err_clear(&err);
    free(f);
    base_free(b);
}

/* --- the store --------------------------------------------------------------------------------------- */
static int64_t number(struct store *st, const char *query)
{
    struct sql q = sql_open(st, query, &err);
    assert_int_equal(sql_step(&q), 1);
    int64_t n = sql_col_int(&q, 0);
    ok(sql_close(&q));
    return n;
}

static int64_t store_it(struct store *st, const char *name, const struct adapter_src *src,
                        const char *base_hash)
{
    const struct store_put_opts o = { .activate = true, .base_hash_hex = base_hash,
                                      .base_claimed = true, .origin = "upload" };
    struct store_version v;
    bool is_new;
    ok(store_adapter_put(st, 1, name, src, &o, &v, &is_new, &err));
    assert_true(is_new);
    assert_int_equal(v.bytes, src->bytes);
    assert_int_equal(v.params, src->params);
    const int64_t id = v.id;
    store_version_free(&v);
    return id;
}

static void same_extras(const struct adapter_src *a, const struct adapter_src *b, bool data)
{
    assert_int_equal(a->nextras, b->nextras);
    for (size_t i = 0; i < a->nextras; i++) {
        const struct adapter_src_extra *x = &a->extras[i], *y = &b->extras[i];
        assert_int_equal(x->kind, y->kind);
        assert_int_equal(x->layer, y->layer);
        assert_int_equal(x->module, y->module);
        assert_string_equal(x->name, y->name);
        assert_int_equal(x->dtype, y->dtype);
        assert_int_equal(x->rows, y->rows);
        assert_int_equal(x->cols, y->cols);
        if (data)
            assert_memory_equal(x->data, y->data, adapter_extra_count(x) * dtype_size(x->dtype));
        else
            assert_null(y->data);
    }
}

static void what_is_stored_and_written_comes_back_the_same(void **state)
{
    (void)state;
    static const int flags[] = { DORA, BIAS | SAVE, OUTER, LORA_BIAS | BIAS };
    struct support_model m = support_model_default("qwen2");
    m.V = 9000; /* so that tables take more than one chunk */
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct store *st;
    ok(store_open(":memory:", &st, &err));
    for (int i = 0; i < 4; i++) {
        char name[16], dir[64], path[96];
        struct adapter_src *a = source(&b->arch, flags[i], i == 1 ? "F32" : "BF16"), *c;
        assert_int_equal(a->nextras > 0, flags[i] != OUTER);
        snprintf(name, sizeof name, "a%d", i);
        const int64_t id = store_it(st, name, a, b->hash_hex);
        ok(store_version_load(st, id, &c, &err));
        support_same_adapter(a, c, true);
        same_extras(a, c, true);
        adapter_src_free(c);
        ok(store_version_modules(st, id, &c, &err));
        support_same_adapter(a, c, false);
        same_extras(a, c, false);
        adapter_src_free(c);

        support_tmpdir(dir);
        snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
        ok(peft_write_weights(a, path, &err));
        support_write_file(dir, "adapter_config.json", a->config, a->config_len);
        ok(peft_load_dir(&b->arch, dir, &c, &err));
        same_extras(a, c, true);
        assert_memory_equal(a->hash, c->hash, 32);
        adapter_src_free(c);
        support_remove(dir);
        for (size_t k = 0; k < a->nextras; k++) { /* every byte counts */
            uint8_t hash[32], *last = (uint8_t *)(uintptr_t)a->extras[k].data +
                                      adapter_extra_count(&a->extras[k]) *
                                          dtype_size(a->extras[k].dtype) - 1;
            *last ^= 1;
            adapter_src_hash(a, hash);
            assert_memory_not_equal(hash, a->hash, 32);
            *last ^= 1;
        }
        adapter_src_free(a);
    }
    ok(store_check(st, &err));
    assert_true(number(st, "SELECT count(*) FROM extra_chunk WHERE chunk = 1") >= 1);
    assert_int_equal(number(st, "SELECT sum(bytes) FROM v_extra WHERE kind = 'head'"), 9000 * 128 * 4);
    /* damage is found */
    ok(sql_exec(st, "DELETE FROM extra_chunk WHERE version_id = 1 AND seq = 3", &err));
    assert_int_equal(store_check(st, &err), ERR_DB);
    err_clear(&err);
    ok(store_adapter_delete(st, 1, "a0", &err));
    ok(store_adapter_delete(st, 1, "a1", &err));
    ok(store_check(st, &err));
    assert_int_equal(number(st, "SELECT count(*) FROM extra_tensor WHERE version_id < 3"), 0);
    assert_int_equal(number(st, "SELECT count(*) FROM extra_chunk WHERE version_id < 3"), 0);
    store_close(st);
    base_free(b);
}

static void check_norms(const struct base *b, const struct adapter_src *a)
{
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        float *row = malloc((size_t)m->in * sizeof *row);
        for (int o = 0; o < m->out; o += 17) {
            double sum = 0;
            matrix_row(&b->layers[m->layer].mod[m->module].w, o, row);
            for (int k = 0; k < m->in; k++) {
                double w = row[k];
                for (int j = 0; j < m->rank; j++)
                    w += m->scaling * ((const float *)m->B)[o * m->rank + j] *
                         ((const float *)m->A)[j * m->in + k];
                sum += w * w;
            }
            assert_true(fabs(m->norms[o] / sqrt(sum) - 1) < 1e-6);
        }
        free(row);
    }
}

/* A version with the norms that a DoRA needs. */
static int load_for(struct store *st, int64_t id, const struct base *b, struct adapter_src **ret,
                    struct err *e)
{
    ok(store_version_load(st, id, ret, e));
    const int rc = extras_add_norms(st, id, b, *ret, e);
    if (rc != ERR_OK)
        adapter_src_free(*ret);
    return rc;
}

static void same_numbers(const void *x, const void *y, size_t bytes)
{
    assert_true((x != NULL) == (y != NULL));
    if (x != NULL)
        assert_memory_equal(x, y, bytes);
}

static void same_built(const struct base *b, const struct adapter *x, const struct adapter *y)
{
    assert_int_equal(x->bytes, y->bytes);
    assert_int_equal(x->version_id, y->version_id);
    assert_memory_equal(x->hash, y->hash, 32);
    for (int i = 0; i < b->arch.L * MOD_SLOTS; i++) {
        const struct lora_module *m = &x->modules[i], *n = &y->modules[i];
        const size_t rank = (size_t)m->rank, one = dtype_size(m->dtype), out = (size_t)m->out;
        assert_int_equal(m->rank, n->rank);
        assert_int_equal(m->dtype, n->dtype);
        same_numbers(m->A, n->A, rank * (size_t)m->in * one);
        same_numbers(m->B, n->B, rank * out * one);
        same_numbers(m->gain, n->gain, rank * sizeof(float));
        same_numbers(m->scale, n->scale, out * sizeof(float));
        same_numbers(m->lora_bias, n->lora_bias, out * sizeof(float));
    }
}

/* From the store the same comes as from what was put in, and of what is damaged nothing. */
static void check_built(struct store *st, const struct base *b, const struct base *other, const char *name,
                        struct adapter_src *src)
{
    char damage[192], hex[65];
    struct adapter *direct, *c = NULL;
    const int64_t id = store_it(st, name, src, b->hash_hex);
    ok(adapter_norms(b, src, &err));
    ok(adapter_build(&b->arch, src, id, NULL, &direct, &err));
    for (int i = 0; i < 2; i++) { /* a DoRA's norms are stored the second time */
        struct adapter *spare = i == 1 ? support_spare(direct->bytes) : NULL;
        ok(store_version_build(st, id, b, &spare, &c, &err));
        assert_null(spare);
        same_built(b, direct, c);
        adapter_free(c);
        c = NULL;
    }
    assert_int_equal(store_version_build(st, id, other, NULL, &c, &err), ERR_INVALID);
    err_clear(&err);
    /* what is known by its sum is not taken for what another hash stands for */
    snprintf(damage, sizeof damage, "UPDATE version SET hash = zeroblob(32) WHERE id = %d", (int)id);
    ok(sql_exec(st, damage, &err));
    assert_int_equal(store_version_build(st, id, b, NULL, &c, &err), ERR_DB);
    err_clear(&err);
    hex32(src->hash, hex);
    snprintf(damage, sizeof damage, "UPDATE version SET hash = x'%s' WHERE id = %d", hex, (int)id);
    ok(sql_exec(st, damage, &err));
    ok(store_version_build(st, id, b, NULL, &c, &err));
    adapter_free(c);
    c = NULL;
    snprintf(damage, sizeof damage, "UPDATE tensor_chunk SET data = zeroblob(length(data))"
             " WHERE version_id = %d AND seq = 1 AND part = 'A'", (int)id);
    ok(sql_exec(st, damage, &err));
    assert_int_equal(store_version_build(st, id, b, NULL, &c, &err), ERR_DB);
    assert_non_null(strstr(err.msg, "is damaged"));
    err_clear(&err);
    /* that it fits no base does not hide it */
    assert_int_equal(store_version_build(st, id, other, NULL, &c, &err), ERR_DB);
    err_clear(&err);
    assert_null(c);
    adapter_free(direct);
    adapter_src_free(src);
}

static void a_version_is_built_as_it_was_put_in_or_not_at_all(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    m.D = 64, m.hd = 16;
    struct base *other = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct store *st;
    struct adapter *c = NULL;
    ok(store_open(":memory:", &st, &err));
    check_built(st, b, other, "lora", source(&b->arch, LORA_BIAS, "BF16"));
    check_built(st, b, other, "dora", source(&b->arch, DORA, "F32"));
    check_built(st, b, other, "adalora", support_lora_src(&b->arch, METHOD_ADALORA, 16, 0.1f, 1));
    /* large enough for a thread that hashes what another still reads */
    struct adapter_src *large = support_lora_src(&b->arch, METHOD_LORA, 256, 0.1f, 2);
    assert_true(large->bytes > 2 << 20);
    check_built(st, b, other, "large", large);
    assert_int_equal(store_version_build(st, 99, b, NULL, &c, &err), ERR_NOT_FOUND);
    err_clear(&err);
    store_close(st);
    base_free(other);
    base_free(b);
}

static void weight_norms_are_computed_once_per_version_and_base(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct store *st;
    struct adapter_src *a = source(&b->arch, DORA, "F32"), *c;
    ok(store_open(":memory:", &st, &err));
    const int64_t id = store_it(st, "d", a, b->hash_hex);
    assert_int_equal(number(st, "SELECT count(*) FROM weight_norm"), 0);
    ok(load_for(st, id, b, &c, &err));
    check_norms(b, c);
    const float first = c->modules[5].norms[0];
    adapter_src_free(c);
    assert_int_equal(number(st, "SELECT count(*) FROM weight_norm"), a->nmodules);
    assert_int_equal(number(st, "SELECT sum(outputs) FROM v_weight_norm WHERE module = 'q'"), 3 * 128);

    /* What is stored is used: these norms are nobody's. */
    ok(sql_exec(st, "UPDATE weight_norm SET norms = (SELECT norms FROM weight_norm WHERE seq = 4)"
                    " WHERE seq = 5", &err));
    ok(load_for(st, id, b, &c, &err));
    assert_true(c->modules[5].norms[0] == c->modules[4].norms[0] && c->modules[5].norms[0] != first);
    adapter_src_free(c);
    /* A norm of the wrong size is damage; one that is missing is computed again. */
    ok(sql_exec(st, "UPDATE weight_norm SET norms = x'00000000' WHERE seq = 5", &err));
    assert_int_equal(load_for(st, id, b, &c, &err), ERR_DB);
    err_clear(&err);
    ok(sql_exec(st, "DELETE FROM weight_norm WHERE seq = 5", &err));
    ok(load_for(st, id, b, &c, &err));
    assert_true(c->modules[5].norms[0] == first);
    adapter_src_free(c);
    assert_int_equal(number(st, "SELECT count(*) FROM weight_norm"), a->nmodules);
    base_free(b);

    /* Another base, and the same one held in another form, have their own. */
    m.seed++;
    b = support_base(&m, "nf4", NULL, PREC_F32);
    ok(load_for(st, id, b, &c, &err));
    check_norms(b, c);
    adapter_src_free(c);
    assert_int_equal(number(st, "SELECT count(*) FROM weight_norm"), 2 * a->nmodules);
    assert_int_equal(number(st, "SELECT count(*) FROM weight_norm WHERE form = 'nf4/f32'"), a->nmodules);
    ok(store_adapter_delete(st, 1, "d", &err));
    assert_int_equal(number(st, "SELECT count(*) FROM weight_norm"), 0);
    base_free(b);
    adapter_src_free(a);
    store_close(st);
}

static void a_norm_of_zero_is_refused(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct adapter_src *a = source(&b->arch, DORA, "F32");
    struct adapter *c = NULL;
    assert_int_equal(adapter_build(&b->arch, a, 0, NULL, &c, &err), ERR_INTERNAL); /* no norms at all */
    err_clear(&err);
    ok(adapter_norms(b, a, &err));
    a->modules[2].norms[7] = 0;
    assert_int_equal(adapter_build(&b->arch, a, 0, NULL, &c, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "v_proj.lora_magnitude_vector: element 7"));
    err_clear(&err);
    adapter_src_free(a);
    base_free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_beside_dora_and_replaced_tensors_have_the_bits_they_have_alone),
        cmocka_unit_test(what_is_replaced_is_replaced_exactly),
        cmocka_unit_test(all_biases_of_the_base_are_asked_for),
        cmocka_unit_test(what_replaces_the_base_is_neither_combined_nor_weighted),
        cmocka_unit_test(a_tensor_that_is_wrong_or_missing_is_refused_by_name),
        cmocka_unit_test(a_setting_that_has_no_exact_meaning_is_refused_by_name),
        cmocka_unit_test(what_is_stored_and_written_comes_back_the_same),
        cmocka_unit_test(a_version_is_built_as_it_was_put_in_or_not_at_all),
        cmocka_unit_test(weight_norms_are_computed_once_per_version_and_base),
        cmocka_unit_test(a_norm_of_zero_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
