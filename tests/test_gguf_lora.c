/* test_gguf_lora.c - adapters in GGUF: what our export and llama.cpp's converter write is read back to
 * the same tensors, everything else is refused by name.
 *
 * Files are built here byte by byte.  The order of q's and k's rows is that of llama.cpp's
 * permute(): [heads][2][hd / 2] becomes [heads][hd / 2][2]. */
#include "engine/delta.h"
#include "engine/export.h"
#include "engine/gguf.h"
#include "engine/util.h"
#include "tests/support_lora.h"
#include "tests/support_model.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static struct err err;

static void ok(int rc)
{
    if (rc != ERR_OK)
        fail_msg("error %d: %s", rc, err.msg);
}

/* Heads of 16 rows, 4 of q and 2 of k. */
static struct arch arch_of(const char *family, bool tied)
{
    char config[512];
    struct arch a;
    snprintf(config, sizeof config,
             "{\"model_type\":\"%s\",\"hidden_size\":64,\"num_hidden_layers\":2,"
             "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":16,"
             "\"intermediate_size\":96,\"vocab_size\":40,\"hidden_act\":\"silu\","
             "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-5,\"tie_word_embeddings\":%s}",
             family, tied ? "true" : "false");
    ok(arch_from_config(config, NULL, &a, &err));
    return a;
}

/* --- a round trip ------------------------------------------------------------------------------------ */

static const void *f32_copy(const void *t, enum dtype type, size_t n)
{
    float *copy = malloc(n * sizeof *copy);
    assert_non_null(copy);
    for (size_t i = 0; i < n; i++)
        copy[i] = delta_element(t, type, i);
    return copy;
}

static void same_numbers(const void *x, enum dtype tx, const void *y, enum dtype ty, size_t n)
{
    const void *a = f32_copy(x, tx, n), *b = f32_copy(y, ty, n);
    assert_memory_equal(a, b, n * sizeof(float));
    free((void *)(uintptr_t)a);
    free((void *)(uintptr_t)b);
}

static void what_is_exported_comes_back_the_same(void **state)
{
    (void)state;
    const char *const families[] = { "llama", "mistral", "qwen2", "qwen3" };
    for (uint64_t i = 0; i < 12; i++) {
        const struct arch a = arch_of(families[i % 4], false);
        struct adapter_src *src = support_lora_src(&a, METHOD_LORA, 4, 0.3f, i), *back = NULL;
        char dir[64], path[96];
        support_tmpdir(dir);
        snprintf(path, sizeof path, "%s/a.gguf", dir);
        for (size_t k = 0; k < src->nmodules; k++) { /* one alpha, which GGUF can say */
            struct adapter_src_module *m = &src->modules[k];
            m->alpha = src->alpha = 8;
            m->scaling = 8.0 / m->rank;
        }
        ok(export_gguf(&a, src, path, &err));
        ok(adapter_load(&a, path, &back, &err));
        assert_int_equal(back->nmodules, src->nmodules);
        assert_int_equal(back->rank_max, src->rank_max);
        assert_true(back->alpha == 8);
        for (size_t k = 0; k < src->nmodules; k++) {
            const struct adapter_src_module *m = &src->modules[k], *b = &back->modules[k];
            assert_string_equal(m->path, b->path);
            assert_int_equal(m->rank, b->rank);
            assert_true(m->scaling == b->scaling);
            assert_int_equal(b->dtype, DT_F32);
            same_numbers(m->A, m->dtype, b->A, b->dtype, (size_t)m->rank * (size_t)m->in);
            same_numbers(m->B, m->dtype, b->B, b->dtype, (size_t)m->rank * (size_t)m->out);
        }
        /* and as PEFT's files it is the same adapter */
        struct adapter_src *peft = NULL;
        snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
        ok(peft_write_weights(back, path, &err));
        support_write_file(dir, "adapter_config.json", back->config, back->config_len);
        ok(adapter_load(&a, dir, &peft, &err));
        assert_memory_equal(peft->hash, back->hash, 32);
        adapter_src_free(peft);
        adapter_src_free(back);
        adapter_src_free(src);
        support_remove(dir);
    }
}

/* --- files by hand ------------------------------------------------------------------------------------ */
enum { F32 = 0, F16 = 1, Q4_0 = 2, Q8_0 = 8, BF16 = 30 };

struct tensor {
    const char *name;
    uint32_t type;
    uint64_t rows, cols; /* rows outermost; cols 0: one dimension */
    const char *bad;     /* "nan": the last value */
};

struct file {
    const char *type, *kind, *arch; /* general.type, adapter.type, general.architecture; NULL: not there */
    float alpha;                    /* NAN: not there */
    const char *key;                /* one more, with the text "1" */
    const struct tensor *t;
    size_t n;
};

static void number(struct buf *b, uint64_t v, size_t bytes)
{
    uint8_t le[8];
    for (size_t i = 0; i < bytes; i++)
        le[i] = (uint8_t)(v >> 8 * i);
    ok(buf_add(b, le, bytes));
}

static void text(struct buf *b, const char *s)
{
    number(b, strlen(s), 8);
    ok(buf_add(b, s, strlen(s)));
}

static size_t key(struct buf *b, const char *name, const char *value)
{
    if (value == NULL)
        return 0;
    text(b, name);
    number(b, 8, 4);
    text(b, value);
    return 1;
}

/* Element i of tensor `name`: halves from -3.5 to 3.5, exact in every type. */
static float value(const char *name, size_t i)
{
    uint32_t h = (uint32_t)i * 2654435761u;
    for (; *name != '\0'; name++)
        h = (h ^ (uint8_t)*name) * 16777619u;
    return ((float)(h >> 16 & 15) - 7) * 0.5f;
}

static void put_data(struct buf *b, const struct tensor *t)
{
    const size_t n = t->rows * (t->cols > 0 ? t->cols : 1);
    for (size_t i = 0; i < n; i++) {
        float v = value(t->name, i);
        if (t->bad != NULL && i == n - 1)
            v = NAN;
        if (t->type == F32)
            number(b, f32_bits(v), 4);
        else if (t->type == F16 || t->type == BF16)
            number(b, t->type == F16 ? f32_to_f16(v) : f32_to_bf16(v), 2);
        else if (t->type == Q4_0) { /* zeros will do */
            if (i % 32 == 0)
                ok(buf_add(b, (const char[18]){ 0 }, 18));
        } else if (t->type == Q8_0) {
            if (i % 32 == 0)
                number(b, f32_to_f16(0.5f), 2); /* the scale */
            number(b, (uint8_t)(int8_t)(2 * v), 1);
        }
    }
    while (b->len % 32 != 0)
        number(b, 0, 1);
}

static size_t bytes_of(const struct tensor *t)
{
    const size_t n = t->rows * (t->cols > 0 ? t->cols : 1);
    const size_t bytes = t->type == F32    ? 4 * n
                         : t->type == Q8_0 ? n / 32 * 34
                         : t->type == Q4_0 ? n / 32 * 18
                                           : 2 * n;
    return (bytes + 31) / 32 * 32;
}

static char *file_of(const struct file *f, size_t *ret_len)
{
    struct buf b, keys;
    size_t n = 0, at = 0;
    buf_init(&b, 16 << 20);
    buf_init(&keys, 1 << 20);
    n += key(&keys, "general.type", f->type);
    n += key(&keys, "adapter.type", f->kind);
    n += key(&keys, "general.architecture", f->arch);
    n += key(&keys, "general.name", "something");
    if (f->key != NULL)
        n += key(&keys, f->key, "1");
    if (!isnan(f->alpha)) {
        text(&keys, "adapter.lora.alpha");
        number(&keys, 6, 4);
        number(&keys, f32_bits(f->alpha), 4);
        n++;
    }
    ok(buf_add(&b, "GGUF", 4));
    number(&b, 3, 4);
    number(&b, f->n, 8);
    number(&b, n, 8);
    ok(buf_add(&b, keys.data, keys.len));
    for (size_t i = 0; i < f->n; i++) {
        const struct tensor *t = &f->t[i];
        text(&b, t->name);
        number(&b, t->cols > 0 ? 2 : 1, 4);
        if (t->cols > 0)
            number(&b, t->cols, 8);
        number(&b, t->rows, 8);
        number(&b, t->type, 4);
        number(&b, at, 8);
        at += bytes_of(t);
    }
    while (b.len % 32 != 0)
        number(&b, 0, 1);
    for (size_t i = 0; i < f->n; i++)
        put_data(&b, &f->t[i]);
    buf_free(&keys);
    *ret_len = b.len;
    return buf_take(&b);
}

static int parse(const struct arch *a, const struct file *f, struct adapter_src **ret)
{
    size_t len;
    char *bytes = file_of(f, &len);
    err_clear(&err);
    int rc = peft_gguf_parse(a, bytes, len, "the file", ret, &err);
    free(bytes);
    return rc;
}

enum { HD = 16 };

/* Does module i hold the tensors of these names?  `permuted`: B's rows are. */
static void check_module(const struct adapter_src *src, size_t i, const char *a, const char *b,
                         bool permuted, enum dtype type)
{
    const struct adapter_src_module *m = &src->modules[i];
    assert_int_equal(m->dtype, type);
    const bool flip = (int)m->module == MOD_EMBED;
    for (int j = 0; j < m->rank; j++)
        for (int k = 0; k < m->in; k++) {
            const size_t at = flip ? (size_t)(k * m->rank + j) : (size_t)(j * m->in + k);
            assert_true(delta_element(m->A, type, (size_t)(j * m->in + k)) == value(a, at));
        }
    for (int o = 0; o < m->out; o++) {
        int row = o;
        if (permuted) { /* row (head, half, i) of the original is (head, i, half) of the file */
            const int head = o / HD, half = o % HD / (HD / 2), n = o % (HD / 2);
            row = head * HD + n * 2 + half;
        }
        for (int j = 0; j < m->rank; j++)
            assert_true(delta_element(m->B, type, (size_t)(o * m->rank + j)) ==
                        value(b, (size_t)(row * m->rank + j)));
    }
}

#define Q "blk.0.attn_q.weight.lora_"
#define K "blk.0.attn_k.weight.lora_"
#define V "blk.0.attn_v.weight.lora_"
#define O "blk.1.attn_output.weight.lora_"
#define D "blk.1.ffn_down.weight.lora_"
#define E "token_embd.weight.lora_"
#define H "output.weight.lora_"

static const struct tensor several[] = {
    { D "b", F16, 64, 4, NULL }, { D "a", Q8_0, 4, 96, NULL },  /* as the converter writes q8_0 */
    { Q "a", F16, 2, 64, NULL }, { Q "b", F16, 64, 2, NULL },   { K "a", BF16, 3, 64, NULL },
    { K "b", BF16, 32, 3, NULL }, { V "a", F32, 1, 64, NULL },  { V "b", F32, 32, 1, NULL },
    { O "a", F32, 2, 64, NULL }, { O "b", BF16, 64, 2, NULL },  { E "a", F16, 40, 2, NULL },
    { E "b", F16, 64, 2, NULL }, { H "a", F32, 2, 64, NULL },   { H "b", F32, 40, 2, NULL },
};

static void each_type_and_place_is_read(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        const struct arch a = arch_of(i ? "qwen2" : "llama", false);
        const struct file f = { "adapter", "lora", i ? "qwen2" : "llama", 6, "adapter.lora.task_name",
                                several, sizeof several / sizeof several[0] };
        struct adapter_src *src = NULL;
        struct adapter *built = NULL;
        ok(parse(&a, &f, &src));
        assert_int_equal(src->nmodules, 7);
        check_module(src, 0, Q "a", Q "b", i == 0, DT_F16);
        check_module(src, 1, K "a", K "b", i == 0, DT_BF16);
        check_module(src, 2, V "a", V "b", false, DT_F32);
        check_module(src, 3, H "a", H "b", false, DT_F32);
        check_module(src, 4, E "a", E "b", false, DT_F16);
        check_module(src, 5, O "a", O "b", false, DT_F32);
        check_module(src, 6, D "a", D "b", false, DT_F32);
        assert_true(src->modules[1].scaling == 2 && src->modules[2].scaling == 6);
        ok(adapter_build(&a, src, 0, NULL, &built, &err));
        adapter_free(built);
        json_t *config = json_loads(src->config, 0, NULL);
        assert_int_equal(json_array_size(json_object_get(config, "target_modules")), 7);
        json_decref(config);
        adapter_src_free(src);
    }
}

/* llama.cpp adds B A as it is if alpha is 0 or missing. */
static void without_an_alpha_the_scaling_is_1(void **state)
{
    (void)state;
    const struct arch a = arch_of("llama", true);
    for (int i = 0; i < 2; i++) {
        const struct file f = { "adapter", "lora", "llama", i ? 0 : NAN, NULL, several, 10 };
        struct adapter_src *src = NULL;
        ok(parse(&a, &f, &src));
        for (size_t k = 0; k < src->nmodules; k++)
            assert_true(src->modules[k].scaling == 1 && src->modules[k].alpha == src->modules[k].rank);
        adapter_src_free(src);
    }
}

/* --- what is refused ------------------------------------------------------------------------------------ */
static void every_other_file_is_refused_by_name(void **state)
{
    (void)state;
    static const struct tensor good[2] = { { Q "a", F32, 2, 64, NULL }, { Q "b", F32, 64, 2, NULL } };
    static const struct {
        const char *family, *type, *kind, *arch, *key;
        struct tensor t;
        const char *says;
    } cases[] = {
        { "llama", NULL, "lora", "llama", NULL, { .name = NULL }, "general.type must be \"adapter\"" },
        { "llama", "model", "lora", "llama", NULL, { .name = NULL }, "not \"model\"" },
        { "llama", "adapter", "control_vector", "llama", NULL, { .name = NULL }, "adapter.type must be \"lora\"" },
        { "llama", "adapter", "lora", "qwen2", NULL, { .name = NULL }, "general.architecture must be \"llama\"" },
        { "qwen2", "adapter", "lora", "llama", NULL, { .name = NULL }, "for this base (qwen2), not \"llama\"" },
        { "llama", "adapter", "lora", "llama", "adapter.alora.invocation_tokens", { .name = NULL },
          "adapter.alora.invocation_tokens: this server does not know" },
        { "llama", "adapter", "lora", "llama", "adapter.lora.prompt_prefix", { .name = NULL }, "prompt_prefix" },
        { "llama", "adapter", "lora", "llama", NULL, { "blk.0.attn_norm.weight", F32, 64, 0, NULL },
          "tensor blk.0.attn_norm.weight: its name does not end" },
        { "llama", "adapter", "lora", "llama", NULL, { "blk.2.attn_q.weight.lora_a", F32, 2, 64, NULL },
          "blk.2.attn_q.weight.lora_a: this base (llama with 2 layers)" },
        { "llama", "adapter", "lora", "llama", NULL, { "blk.01.attn_q.weight.lora_a", F32, 2, 64, NULL }, "no such" },
        { "llama", "adapter", "lora", "llama", NULL, { "blk.4294967296.attn_q.weight.lora_a", F32, 2, 64, NULL }, "no such" },
        { "llama", "adapter", "lora", "llama", NULL, { "blk.0.attn_qkv.weight.lora_a", F32, 2, 64, NULL }, "no such" },
        { "llama", "adapter", "lora", "llama", NULL, { "blk.0.attn_q.bias.lora_a", F32, 2, 64, NULL }, "does not end" },
        { "llama", "adapter", "lora", "llama", NULL, { V "a", F32, 2, 64, NULL }, V "a has no lora_b beside it" },
        { "llama", "adapter", "lora", "llama", NULL, { V "b", F32, 32, 2, NULL }, V "b has no lora_a beside it" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct arch a = arch_of(cases[i].family, false);
        const struct tensor t[3] = { good[0], good[1], cases[i].t };
        const struct file f = { cases[i].type, cases[i].kind, cases[i].arch, 2, cases[i].key, t,
                                cases[i].t.name != NULL ? 3 : 2 };
        struct adapter_src *src = NULL;
        const int rc = parse(&a, &f, &src);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("%zu, %s: %d \"%s\"", i, cases[i].says, rc, err.msg);
    }
    err_clear(&err);
}

static void every_tensor_that_does_not_fit_is_refused_by_name(void **state)
{
    (void)state;
    static const struct {
        struct tensor a, b;
        const char *says;
    } cases[] = {
        { { Q "a", F32, 2, 63, NULL }, { Q "b", F32, 64, 2, NULL }, Q "a has 2 dimensions, 2 by 63" },
        { { Q "a", F32, 3, 64, NULL }, { Q "b", F32, 64, 2, NULL }, "not 2 by 64" },
        { { Q "a", F32, 2, 64, NULL }, { Q "b", F32, 63, 2, NULL }, Q "b has 2 dimensions, 63 by 2" },
        { { Q "a", F32, 2, 64, NULL }, { Q "b", F32, 64, 0, NULL }, "its rank must be 1 to 4096" },
        { { Q "a", F32, 64, 0, NULL }, { Q "b", F32, 64, 1, NULL }, Q "a has 1 dimensions" },
        { { Q "a", F32, 5000, 64, NULL }, { Q "b", F32, 64, 5000, NULL }, "its rank must be 1 to 4096" },
        { { Q "a", Q4_0, 2, 64, NULL }, { Q "b", F32, 64, 2, NULL }, Q "a has type Q4_0" },
        { { Q "a", F32, 2, 64, "nan" }, { Q "b", F32, 64, 2, NULL }, Q "a holds a value that is not finite, at element 127" },
        { { Q "a", F16, 2, 64, NULL }, { Q "b", F16, 64, 2, "nan" }, Q "b holds a value that is not finite, at element 127" },
        { { Q "a", BF16, 2, 64, NULL }, { Q "b", F16, 64, 2, "nan" }, "not finite" },
        { { E "a", F32, 2, 40, NULL }, { E "b", F32, 64, 2, NULL }, "not 40 by 2" },
        { { H "a", F32, 2, 64, NULL }, { H "b", F32, 41, 2, NULL }, H "b has 2 dimensions, 41 by 2" },
    };
    const struct arch a = arch_of("llama", false);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct tensor t[2] = { cases[i].a, cases[i].b };
        const struct file f = { "adapter", "lora", "llama", 2, NULL, t, 2 };
        struct adapter_src *src = NULL;
        const int rc = parse(&a, &f, &src);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("%zu, %s: %d \"%s\"", i, cases[i].says, rc, err.msg);
    }
    err_clear(&err);
}

static void bases_and_adapters_that_do_not_go_together_are_refused(void **state)
{
    (void)state;
    struct adapter_src *src = NULL;
    struct file f = { "adapter", "lora", "llama", 2, NULL, several, 14 };
    struct arch a = arch_of("llama", true); /* the head is the embedding */
    assert_int_equal(parse(&a, &f, &src), ERR_INVALID);
    assert_non_null(strstr(err.msg, "token_embd.weight.lora_a: the head of this base is its embedding"));
    f.n = 0;
    assert_int_equal(parse(&a, &f, &src), ERR_INVALID);
    assert_non_null(strstr(err.msg, "has no tensors"));
    f.n = 4;
    static const char gpt2[] = "{\"model_type\":\"gpt2\",\"n_embd\":64,\"n_layer\":2,\"n_head\":4,"
                               "\"n_positions\":64,\"vocab_size\":40}";
    err_clear(&err);
    ok(arch_from_config(gpt2, NULL, &a, &err));
    assert_int_equal(parse(&a, &f, &src), ERR_INVALID);
    assert_non_null(strstr(err.msg, "not possible for a base of the family gpt2"));
    err_clear(&err);
}

/* Cut anywhere, or with any byte changed, it is read or refused, and nothing else. */
static void a_damaged_file_is_read_or_refused(void **state)
{
    (void)state;
    const struct arch a = arch_of("llama", false);
    const struct file f = { "adapter", "lora", "llama", 2, NULL, several + 2, 6 };
    size_t len;
    char *bytes = file_of(&f, &len);
    for (size_t n = 0; n < len; n += n < 700 ? 1 : 97) {
        struct adapter_src *src = NULL;
        char *part = malloc(n + 1); /* so that a byte too far is seen */
        assert_non_null(part);
        memcpy(part, bytes, n);
        err_clear(&err);
        assert_int_equal(peft_gguf_parse(&a, part, n, "the file", &src, &err), ERR_INVALID);
        free(part);
    }
    for (size_t n = 0; n < 700; n++)
        for (int bit = 0; bit < 8; bit += 3) {
            struct adapter_src *src = NULL;
            bytes[n] = (char)(bytes[n] ^ 1 << bit);
            err_clear(&err);
            const int rc = peft_gguf_parse(&a, bytes, len, "the file", &src, &err);
            assert_true(rc == ERR_OK || (rc == ERR_INVALID && err.msg[0] != '\0'));
            adapter_src_free(src);
            bytes[n] = (char)(bytes[n] ^ 1 << bit);
        }
    err_clear(&err);
    free(bytes);
}

static void a_file_that_is_something_else_is_refused(void **state)
{
    (void)state;
    const struct arch a = arch_of("llama", false);
    struct adapter_src *src = NULL;
    char dir[64], path[96];
    support_tmpdir(dir);
    snprintf(path, sizeof path, "%s/x", dir);
    assert_int_equal(adapter_load(&a, path, &src, &err), ERR_NOT_FOUND);
    for (int i = 0; i < 2; i++) {
        support_write_file(dir, "x", "GGUX and more", i ? 13 : 0);
        err_clear(&err);
        assert_int_equal(adapter_load(&a, path, &src, &err), ERR_INVALID);
        assert_non_null(strstr(err.msg, "neither an adapter's folder nor a GGUF file"));
    }
    err_clear(&err);
    support_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_exported_comes_back_the_same),
        cmocka_unit_test(each_type_and_place_is_read),
        cmocka_unit_test(without_an_alpha_the_scaling_is_1),
        cmocka_unit_test(every_other_file_is_refused_by_name),
        cmocka_unit_test(every_tensor_that_does_not_fit_is_refused_by_name),
        cmocka_unit_test(bases_and_adapters_that_do_not_go_together_are_refused),
        cmocka_unit_test(a_damaged_file_is_read_or_refused),
        cmocka_unit_test(a_file_that_is_something_else_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
