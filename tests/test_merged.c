/* test_merged.c - enable_lora: the MergedLinear layers of the first versions of PEFT become plain LoRA.
 *
 * What such a layer computed is written out here as PEFT's code had it: lora_A, a convolution of
 * width 1 in two groups, and zeros for the outputs of parts that are off. */
#include "engine/peft_int.h"
#include "engine/torch_file.h"
#include "tests/support_adapter.h"
#include "tests/support_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { TENSORS = 8 };

static struct err err;

static void ok(int rc)
{
    if (rc != ERR_OK)
        fail_msg("error %d: %s", rc, err.msg);
}

static struct arch arch_of(const char *config)
{
    struct arch a;
    ok(arch_from_config(config, NULL, &a, &err));
    return a;
}

static const char gpt2[] = "{\"model_type\":\"gpt2\",\"n_embd\":8,\"n_layer\":1,\"n_head\":2,"
                           "\"n_positions\":16,\"vocab_size\":16}";
static const char bloom[] = "{\"model_type\":\"bloom\",\"n_embed\":8,\"n_layer\":1,"
                            "\"num_attention_heads\":2,\"vocab_size\":16}";
static const char bloom_560m[] = "{\"model_type\":\"bloom\",\"n_embed\":1024,\"n_layer\":24,"
                                 "\"num_attention_heads\":16,\"vocab_size\":250880}";

/* PEFT's layer on one input: ret[out] = zero_pad(conv(A x)) * scaling, in fp64. */
static void merged_linear(const bool *on, int parts, int r, double alpha, int in, int out,
                          const float *A, const float *B, const float *x, double *ret)
{
    int s = 0;
    for (int i = 0; i < parts; i++)
        s += on[i];
    const int ranks = s * r, rows = out / parts * s;
    double *after_a = calloc((size_t)ranks, sizeof *after_a);
    assert_non_null(after_a);
    for (int j = 0; j < ranks; j++)
        for (int k = 0; k < in; k++)
            after_a[j] += (double)A[j * in + k] * (double)x[k];
    int next = 0; /* row of B */
    for (int o = 0; o < out; o++) {
        ret[o] = 0;
        if (!on[o * parts / out])
            continue;
        const int first = next < rows / 2 ? 0 : ranks / 2; /* the group's channels */
        for (int j = 0; j < ranks / 2; j++)
            ret[o] += (double)B[next * (ranks / 2) + j] * after_a[first + j];
        ret[o] *= alpha / r;
        next++;
    }
    assert_int_equal(next, rows);
    free(after_a);
}

/* A plain module on one input. */
static void plain_linear(const struct adapter_src_module *m, const float *x, double *ret)
{
    const float *A = m->A, *B = m->B;
    for (int o = 0; o < m->out; o++) {
        ret[o] = 0;
        for (int j = 0; j < m->rank; j++) {
            double u = 0;
            for (int k = 0; k < m->in; k++)
                u += (double)A[j * m->in + k] * (double)x[k];
            ret[o] += (double)B[o * m->rank + j] * u;
        }
        ret[o] *= m->scaling;
    }
}

static const float *data_of(const struct st_file *f, const char *path, const char *suffix)
{
    char name[160];
    snprintf(name, sizeof name, "base_model.model.%s.%s", path, suffix);
    const struct st_tensor *t = st_find(f, name);
    assert_non_null(t);
    float *copy = malloc(t->bytes);
    assert_non_null(copy);
    memcpy(copy, t->data, t->bytes);
    return copy;
}

/* The module, against what the file's tensors say. */
static void check_module(const struct adapter_src_module *m, const struct st_file *f, const bool *on,
                         int parts, int r, double alpha)
{
    const float *A = data_of(f, m->path, "lora_A.weight"), *B = data_of(f, m->path, "lora_B.weight");
    double *want = malloc((size_t)m->out * sizeof *want), *got = malloc((size_t)m->out * sizeof *got);
    float *x = malloc((size_t)m->in * sizeof *x);
    assert_non_null(want);
    assert_non_null(got);
    assert_non_null(x);
    for (int k = 0; k < m->in; k++)
        x[k] = sinf((float)(3 * k + 1));
    merged_linear(on, parts, r, alpha, m->in, m->out, A, B, x, want);
    plain_linear(m, x, got);
    double most = 0;
    for (int o = 0; o < m->out; o++) {
        assert_true(fabs(want[o] - got[o]) <= 1e-12 * (1 + fabs(want[o])));
        most = fmax(most, fabs(got[o]));
        assert_int_equal(on[o * parts / m->out] || got[o] == 0, 1);
    }
    assert_true(most > 1e-4);
    free((void *)(uintptr_t)A);
    free((void *)(uintptr_t)B);
    free(want);
    free(got);
    free(x);
}

/* --- small ones ---------------------------------------------------------------------------------- */
struct file {
    char config[512];
    struct support_tensor t[TENSORS];
    size_t n;
};

/* c_attn or query_key_value of the one layer. */
static void describe(struct file *f, const struct arch *a, const char *enable, int r, int ranks, int rows)
{
    char path[96];
    arch_module_path(a, 0, MOD_QKV, path, sizeof path);
    *f = (struct file){ .n = 2 };
    snprintf(f->config, sizeof f->config,
             "{\"peft_type\":\"LORA\",\"r\":%d,\"lora_alpha\":3,\"fan_in_fan_out\":true,"
             "\"target_modules\":[\"c_attn\",\"query_key_value\"],\"merge_weights\":true,"
             "\"enable_lora\":%s}", r, enable);
    f->t[0] = (struct support_tensor){ .dtype = "F32", .rows = ranks, .cols = a->D };
    snprintf(f->t[0].name, sizeof f->t[0].name, "base_model.model.%s.lora_A.weight", path);
    f->t[1] = (struct support_tensor){ .dtype = "F32", .rows = rows, .cols = ranks / 2, .conv = true };
    snprintf(f->t[1].name, sizeof f->t[1].name, "base_model.model.%s.lora_B.weight", path);
}

static void check_small(const char *model, const char *enable, const bool *on, int parts, int on_count,
                        int r)
{
    const struct arch a = arch_of(model);
    struct file f;
    size_t len;
    struct st_file *st = NULL;
    struct adapter_src *src = NULL;
    struct adapter *built = NULL;
    describe(&f, &a, enable, r, r * on_count, 24 / parts * on_count);
    ok(support_parse(&a, f.config, f.t, f.n, &src, &err));
    char *bytes = support_tensors_file(f.t, f.n, &len);
    ok(st_open_mem(bytes, len, "weights", &st, &err));
    assert_int_equal(src->nmodules, 1);
    assert_int_equal(src->method, METHOD_LORA);
    assert_int_equal(src->modules[0].rank, r * on_count);
    assert_true(src->modules[0].scaling == 3.0 / r);
    check_module(&src->modules[0], st, on, parts, r, 3);
    ok(adapter_build(&a, src, 0, NULL, &built, &err));
    adapter_free(built);
    st_close(st);
    free(bytes);

    /* What is downloaded is plain LoRA, and reads as the same adapter. */
    char dir[64], path[96];
    struct adapter_src *back = NULL;
    support_tmpdir(dir);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
    ok(peft_write_weights(src, path, &err));
    support_write_file(dir, "adapter_config.json", src->config, src->config_len);
    assert_null(strstr(src->config, "enable_lora"));
    assert_null(strstr(src->config, "merge_weights"));
    ok(peft_load_dir(&a, dir, &back, &err));
    assert_memory_equal(back->hash, src->hash, 32);
    assert_true(back->alpha == src->alpha);
    adapter_src_free(back);
    adapter_src_free(src);
    support_remove(dir);
}

static void a_layer_of_parts_becomes_plain_lora(void **state)
{
    (void)state;
    const char *const models[] = { gpt2, bloom };
    for (int i = 0; i < 2; i++) {
        check_small(models[i], "[true,false,true]", (const bool[]){ true, false, true }, 3, 2, 2);
        check_small(models[i], "[true,true,false]", (const bool[]){ true, true, false }, 3, 2, 3);
        check_small(models[i], "[true,true,true]", (const bool[]){ true, true, true }, 3, 3, 2);
        check_small(models[i], "[false,true]", (const bool[]){ false, true }, 2, 1, 4);
        check_small(models[i], "[true]", (const bool[]){ true }, 1, 1, 2);
        check_small(models[i], "[true,true,true,true]", (const bool[]){ true, true, true, true }, 4, 4, 1);
    }
}

static void what_is_not_such_a_layer_is_refused_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *enable, *field, *value;
        int ranks, rows;
        bool flat, nan;
        const char *says;
    } cases[] = {
        { "[true,false,true]", NULL, NULL, 4, 15, false, false, "lora_B.weight has another shape than [16, 2, 1]" },
        { "[true,false,true]", NULL, NULL, 4, 16, true, false, "lora_B.weight has another shape than [16, 2, 1]" },
        { "[true,false,true]", NULL, NULL, 2, 16, false, false, "lora_A.weight has shape [2, 8], not [4, 8]" },
        { "[true,false,true]", NULL, NULL, 4, 16, false, true, "lora_B.weight holds a value that is not finite" },
        { "[true,false,true,true,true]", NULL, NULL, 8, 16, false, false, "24 outputs into 5 parts" },
        { "[true,false,false]", "r", "3", 3, 8, false, false, "does not come out even" },
        { "[false,false,false]", NULL, NULL, 2, 8, false, false, "enable_lora turns no part on" },
        { "[1,0,1]", NULL, NULL, 4, 16, false, false, "enable_lora must be a list of booleans" },
        { "{\"q\":true}", NULL, NULL, 4, 16, false, false, "enable_lora must be a list of booleans" },
        { "[true,false,true]", "bias", "\"lora_only\"", 4, 16, false, false, "enable_lora does not go with bias" },
        { "[true,false,true]", "use_dora", "true", 4, 16, false, false, "enable_lora does not go with use_dora" },
        { "[true,false,true]", "use_rslora", "true", 4, 16, false, false, "does not go with use_rslora" },
        { "[true,false,true]", "rank_pattern", "{\"c_attn\":4}", 4, 16, false, false, "with rank_pattern" },
        { "[true,false,true]", "target_modules", "[\"c_attn\",\"lm_head\"]", 4, 16, false, false,
          "target_modules names lm_head: enable_lora is read for" },
        { "[true,false,true]", "target_modules", "[\"c_attn\",\"wte\"]", 4, 16, false, false,
          "target_modules names transformer.wte: enable_lora" },
        { "[true,false,true]", "r", "4096", 4, 16, false, false, "cannot be written as plain LoRA" },
        { "[true,false,true]", "peft_type", "\"ADALORA\"", 4, 16, false, false, "enable_lora is [true,false,true]: AdaLoRA has no such" },
    };
    const struct arch a = arch_of(gpt2);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct file f;
        struct adapter_src *src = NULL;
        describe(&f, &a, cases[i].enable, 2, cases[i].ranks, cases[i].rows);
        if (cases[i].flat)
            f.t[1].conv = false;
        if (cases[i].nan)
            f.t[1].bad = "nan";
        json_t *config = json_loads(f.config, 0, NULL);
        if (cases[i].field != NULL)
            json_object_set_new(config, cases[i].field, json_loads(cases[i].value, JSON_DECODE_ANY, NULL));
        char *text = json_dumps(config, 0);
        err_clear(&err);
        int rc = support_parse(&a, text, f.t, f.n, &src, &err);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("%s, %s: %d \"%s\"", cases[i].enable, cases[i].says, rc, err.msg);
        free(text);
        json_decref(config);
    }
    err_clear(&err);
}

/* --- a real one ----------------------------------------------------------------------------------- */
static void the_public_one_for_bloom_is_read(void **state)
{
    (void)state;
    const char *dir = support_shared("adapters/bloom-560m-legacy-mergedlinear-bin");
    if (dir == NULL)
        skip();
    const struct arch a = arch_of(bloom_560m);
    struct adapter_src *src = NULL;
    struct st_file *f = NULL;
    char *path = path_join(dir, "adapter_model.bin");
    ok(peft_load_dir(&a, dir, &src, &err));
    ok(weights_open(path, &f, &err));
    assert_int_equal(src->nmodules, 24);
    assert_int_equal(src->rank_max, 16);
    assert_true(src->alpha == 32);
    for (size_t i = 0; i < src->nmodules; i += 11) {
        assert_true(src->modules[i].scaling == 2);
        check_module(&src->modules[i], f, (const bool[]){ true, false, true }, 3, 8, 16);
    }
    st_close(f);
    free(path);
    adapter_src_free(src);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_layer_of_parts_becomes_plain_lora),
        cmocka_unit_test(what_is_not_such_a_layer_is_refused_by_name),
        cmocka_unit_test(the_public_one_for_bloom_is_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
