/* test_base.c - a base file loads to the values it was made from, and a damaged one is refused. */
#include "engine/base.h"
#include "engine/nf4.h"
#include "engine/safetensors.h"
#include "engine/util.h"
#include "tests/support_model.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])

struct fix {
    char dir[64], *path;
};

static int setup(void **state)
{
    struct fix *f = malloc(sizeof *f);
    support_tmpdir(f->dir);
    f->path = path_join(f->dir, "m.base");
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fix *f = *state;
    support_remove(f->dir);
    free(f->path);
    free(f);
    return 0;
}

static void import(const struct fix *f, const struct support_model *m,
                   const struct base_import_opts *opts)
{
    struct err err = { 0 };
    support_model_write(m, f->dir);
    if (base_import(f->dir, f->path, opts, &err) != ERR_OK)
        fail_msg("%s", err.msg);
}

static struct base *load(const struct fix *f, enum precision precision, bool use_mmap)
{
    struct base *b = NULL;
    struct err err = { 0 };
    if (base_load(f->path, precision, use_mmap, &b, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return b;
}

static struct st_file *open_file(const char *path)
{
    struct st_file *f = NULL;
    struct err err = { 0 };
    if (st_open(path, &f, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return f;
}

/* Largest difference between a matrix's rows and a tensor, relative to the row's largest value. */
static double distance(const struct matrix *w, const struct st_tensor *t)
{
    float *row = malloc((size_t)w->K * 4), *want = malloc((size_t)w->K * 4);
    struct err err = { 0 };
    double worst = 0;
    assert_int_equal(t->shape[0], w->N);
    assert_int_equal(t->shape[1], w->K);
    for (int n = 0; n < w->N; n++) {
        matrix_row(w, n, row);
        assert_int_equal(st_f32(t, (size_t)n * (size_t)w->K, (size_t)w->K, want, &err), ERR_OK);
        double top = 1e-30;
        for (int k = 0; k < w->K; k++)
            top = fmax(top, fabs((double)want[k]));
        for (int k = 0; k < w->K; k++)
            worst = fmax(worst, fabs((double)row[k] - (double)want[k]) / top);
    }
    free(row);
    free(want);
    return worst;
}

/* Values that bitsandbytes itself gave for the dequantised weights of the same model. */
static void loaded_weights_are_the_reference_s_dequantised_weights(void **state)
{
    const struct fix *f = *state;
    const char *p = support_shared("golden/models/tiny-llama");
    if (p == NULL)
        skip();
    struct err err = { 0 };
    assert_int_equal(base_import(p, f->path, NULL, &err), ERR_OK);
    struct st_file *ref = open_file(support_shared("golden/models/tiny-llama-bnb-4bit/dequantised.safetensors"));
    struct base *f32 = load(f, PREC_F32, false), *fast = load(f, PREC_FAST, false);
    for (int l = 0; l < 2; l++)
        for (int m = 0; m < MOD_COUNT; m++) {
            char path[120];
            if (!arch_has_module(&f32->arch, (enum module)m))
                continue;
            arch_module_path(&f32->arch, l, (enum module)m, path, 100);
            const struct st_tensor *t = st_find(ref, strcat(path, ".weight"));
            assert_true(distance(&f32->layers[l].mod[m].w, t) == 0);
            /* scales rounded to fp16: half a unit of 2^-11 */
            assert_true(distance(&fast->layers[l].mod[m].w, t) <= ldexp(1, -11));
        }
    base_free(f32);
    base_free(fast);
    st_close(ref);
}

static void a_width_that_is_no_multiple_of_64_dequantises_as_the_reference_does(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    m.F = 172;
    import(f, &m, NULL);
    struct base *b = load(f, PREC_FAST, false);
    char *weights = path_join(f->dir, "model.safetensors");
    struct st_file *src = open_file(weights);
    struct err err = { 0 };
    size_t n = 128 * 172, blocks = nf4_blocks(n);
    float *w = malloc(n * 4), *absmax = malloc(blocks * 4), big[2], mean, row[172];
    uint8_t *codes = malloc(nf4_bytes(n)), *nested = malloc(blocks);
    assert_true(nf4_nested_blocks(n) <= 2);
    const struct matrix *down = &b->layers[2].mod[MOD_DOWN].w;
    assert_int_equal(down->type, MAT_NF4_FLAT);
    assert_int_equal(b->layers[2].mod[MOD_UP].w.type, MAT_NF4_P16);
    assert_int_equal(st_f32(st_find(src, "model.layers.2.mlp.down_proj.weight"), 0, n, w, &err), 0);
    q4_quantize(Q4_NF4, w, n, codes, absmax);
    q4_nest(absmax, blocks, nested, big, &mean);
    q4_unnest(nested, big, mean, blocks, absmax);
    q4_dequantize(Q4_NF4, codes, absmax, n, w);
    for (int r = 0; r < 128; r++) {
        matrix_row(down, r, row);
        assert_memory_equal(row, w + r * 172, sizeof row);
    }
    free(w);
    free(absmax);
    free(codes);
    free(nested);
    free(weights);
    st_close(src);
    base_free(b);
}

static void f32_bases_of_every_family_hold_the_source_s_values(void **state)
{
    static const char *const families[] = { "llama", "mistral", "qwen2", "qwen3" };
    const struct fix *f = *state;
    for (size_t i = 0; i < COUNT(families); i++) {
        struct support_model m = support_model_default(families[i]);
        m.attention_bias = strcmp(families[i], "llama") == 0;
        m.mlp_bias = m.attention_bias;
        m.old_spelling = i % 2;
        m.window = 16;
        import(f, &m, &(struct base_import_opts){ .type = "f32" });
        struct base *b = load(f, PREC_F32, false);
        assert_true(b->is_f32);
        assert_string_equal(b->arch.family, families[i]);
        char *weights = path_join(f->dir, "model.safetensors");
        struct st_file *src = open_file(weights);
        assert_true(distance(&b->embed, st_find(src, "model.embed_tokens.weight")) == 0);
        assert_true(distance(&b->head, st_find(src, "lm_head.weight")) == 0);
        assert_memory_equal(b->norm_final.w, st_find(src, "model.norm.weight")->data, 128 * 4);
        for (int l = 0; l < m.L; l++) {
            const struct base_layer *layer = &b->layers[l];
            for (int k = 0; k < MOD_COUNT; k++) {
                char path[120];
                if (!arch_has_module(&b->arch, (enum module)k))
                    continue;
                arch_module_path(&b->arch, l, (enum module)k, path, 100);
                size_t end = strlen(path);
                assert_true(distance(&layer->mod[k].w, st_find(src, strcat(path, ".weight"))) == 0);
                strcpy(path + end, ".bias");
                const struct st_tensor *bias = st_find(src, path);
                assert_true((bias != NULL) == (layer->mod[k].bias != NULL));
                if (bias != NULL)
                    assert_memory_equal(layer->mod[k].bias, bias->data, bias->bytes);
            }
            const struct {
                const float *got;
                const char *name;
            } vectors[] = { { layer->norm[NORM_ATTN].w, "input_layernorm" },
                            { layer->norm[NORM_MLP].w, "post_attention_layernorm" },
                            { layer->norm[NORM_Q].w, "self_attn.q_norm" },
                            { layer->norm[NORM_K].w, "self_attn.k_norm" } };
            for (size_t v = 0; v < COUNT(vectors); v++) {
                char name[100];
                snprintf(name, sizeof name, "model.layers.%d.%s.weight", l, vectors[v].name);
                const struct st_tensor *t = st_find(src, name);
                assert_true((t != NULL) == (vectors[v].got != NULL));
                if (t != NULL)
                    assert_memory_equal(vectors[v].got, t->data, t->bytes);
            }
        }
        st_close(src);
        free(weights);
        base_free(b);
    }
}

/* How far each kind of storage may be from an F32 source, relative to the row's largest value. */
static void embedding_and_head_are_as_close_as_their_type_allows(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    const struct {
        const char *head;
        enum mat_type type;
        double least, most;
    } cases[] = {
        { "f32", MAT_F32, 0, 0 },
        { "bf16", MAT_BF16, 1e-5, ldexp(1, -8) },
        { "8bit", MAT_Q8_P16, 1e-5, 0.5 / 127 + ldexp(1, -10) },
        { "nf4", MAT_NF4_P16, 1e-2, 0.16 }, /* half the widest gap between codes */
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        for (int tied = 0; tied < 2; tied++) {
            m.tied = tied;
            import(f, &m, &(struct base_import_opts){ .head = cases[i].head });
            struct base *b = load(f, PREC_EXACT, false);
            char *weights = path_join(f->dir, "model.safetensors");
            struct st_file *src = open_file(weights);
            const struct st_tensor *embed = st_find(src, "model.embed_tokens.weight");
            double e = distance(&b->embed, embed);
            double h = distance(&b->head, tied ? embed : st_find(src, "lm_head.weight"));
            assert_int_equal(b->embed.type, MAT_BF16);
            assert_true(e > 0 && e <= ldexp(1, -8));
            assert_int_equal(b->head.type, cases[i].type);
            if (h < cases[i].least || h > cases[i].most)
                fail_msg("head %s, tied %d: distance %g", cases[i].head, tied, h);
            assert_true((b->head.codes == b->embed.codes) ==
                        (tied && cases[i].type == MAT_BF16)); /* stored once */
            st_close(src);
            free(weights);
            base_free(b);
        }
}

static void a_mapped_base_equals_a_copied_one_and_size_is_known_before(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("qwen3");
    import(f, &m, NULL);
    struct base *a = load(f, PREC_FAST, false), *b = load(f, PREC_FAST, true);
    size_t size = 0;
    struct err err = { 0 };
    assert_int_equal(base_size(f->path, &size, &err), ERR_OK);
    assert_int_equal(size, a->bytes);
    assert_int_equal(size, b->bytes);
    assert_string_equal(a->hash_hex, b->hash_hex);
    assert_string_equal(a->tokenizer_json, b->tokenizer_json);
    assert_int_equal(a->tokenizer_json_len, strlen(a->tokenizer_json));
    assert_non_null(a->chat_template);
    for (int l = 0; l < m.L; l++)
        for (int k = 0; k < MOD_COUNT; k++) {
            const struct matrix *x = &a->layers[l].mod[k].w, *y = &b->layers[l].mod[k].w;
            size_t N = (size_t)x->N, K = (size_t)x->K;
            assert_true((N > 0) == arch_has_module(&a->arch, (enum module)k));
            assert_int_equal((uintptr_t)x->codes % 64, 0);
            assert_int_equal((uintptr_t)y->codes % 64, 0);
            assert_memory_equal(x->codes, y->codes, p16_bytes(N, K));
            assert_memory_equal(x->scales16, y->scales16, p16_scales(N, K) * 2);
        }
    assert_memory_equal(a->head.codes, b->head.codes, q8_bytes(320, 128));
    base_free(a);
    base_free(b);
}

/* --- damage --------------------------------------------------------------------------- */

static void must_refuse(const char *path, const char *what)
{
    for (int use_mmap = 0; use_mmap < 2; use_mmap++) {
        struct base *b = NULL;
        struct err err = { 0 };
        int rc = base_load(path, PREC_FAST, use_mmap, &b, &err);
        if (rc == ERR_OK || err.msg[0] == '\0')
            fail_msg("%s: loaded", what);
    }
}

static void a_base_file_that_is_cut_off_anywhere_is_refused(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    m.L = 1;
    import(f, &m, NULL);
    struct err err = { 0 };
    char *whole;
    size_t len;
    assert_int_equal(file_read(f->path, 1 << 24, &whole, &len, &err), ERR_OK);
    for (size_t n = 0; n < len; n += 1 + n / 50) {
        char what[64];
        snprintf(what, sizeof what, "%zu of %zu bytes", n, len);
        support_write_file(f->dir, "cut.base", whole, n);
        char *path = path_join(f->dir, "cut.base");
        must_refuse(path, what);
        free(path);
    }
    free(whole);
}

struct damage {
    const char *meta, *value;         /* replace (value NULL: drop) */
    const char *drop, *extra, *nan;   /* tensors: leave out; add; fill with 0xff bytes */
    const char *says;
};

static void copy_damaged(const struct st_file *in, const char *path, const struct damage *d)
{
    struct st_writer *w;
    struct err err = { 0 };
    assert_int_equal(st_writer_open(path, false, &w, &err), 0);
    for (size_t i = 0; i < in->nmeta; i++) {
        bool it = d->meta && strcmp(in->meta[i].key, d->meta) == 0;
        const char *v = it ? d->value : in->meta[i].value;
        if (v)
            assert_int_equal(st_writer_meta(w, in->meta[i].key, v, strlen(v), &err), 0);
    }
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < in->ntensors; i++) {
            const struct st_tensor *t = &in->tensors[i];
            if (d->drop && strcmp(t->name, d->drop) == 0)
                continue;
            uint8_t *data = malloc(t->bytes);
            memcpy(data, t->data, t->bytes);
            if (d->nan && strcmp(t->name, d->nan) == 0)
                memset(data, 0xff, t->bytes);
            assert_int_equal(pass == 0 ? st_writer_tensor(w, t->name, t->dtype_name, t->ndim, t->shape,
                                                          t->bytes, &err)
                                       : st_writer_data(w, data, t->bytes, &err), 0);
            free(data);
        }
        if (d->extra)
            assert_int_equal(pass == 0 ? st_writer_tensor(w, d->extra, "U8", 1, (const int64_t[]){ 4 }, 4, &err)
                                       : st_writer_data(w, "abcd", 4, &err), 0);
        if (pass == 0)
            assert_int_equal(st_writer_begin(w, &err), 0);
    }
    assert_int_equal(st_writer_commit(w, &err), 0);
}

/* lorad.arch with one field changed; free() it. */
static char *arch_with(const struct st_file *in, const char *key, int value)
{
    json_t *o = json_loads(st_meta(in, "lorad.arch"), 0, NULL);
    json_object_set_new(o, key, json_integer(value));
    char *text = json_dumps(o, 0);
    json_decref(o);
    return text;
}

static void a_base_file_that_is_damaged_is_refused_with_a_sentence(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    import(f, &m, NULL);
    struct st_file *in = open_file(f->path);
    char *wide = arch_with(in, "F", 320), *tall = arch_with(in, "V", 384), *deep = arch_with(in, "L", 4);
    char *flat = arch_with(in, "L", 2), *vast = arch_with(in, "V", 1 << 22);
    const struct damage cases[] = {
        { .meta = "lorad.format", .value = "2", .says = "has format 2; this version of lorad reads format 1" },
        { .meta = "lorad.format", .says = "not a base file" },
        { .meta = "lorad.arch", .says = "lack lorad.arch" },
        { .meta = "lorad.arch", .value = "{", .says = "lorad.arch is not valid JSON" },
        { .meta = "lorad.arch", .value = "{}", .says = "family" },
        { .meta = "lorad.hash", .value = "abc", .says = "hash" },
        { .meta = "lorad.name", .says = "name" },
        { .meta = "lorad.arch", .value = wide, .says = "mlp.gate_proj.weight has" },
        { .meta = "lorad.arch", .value = tall, .says = "model.embed_tokens.weight has" },
        { .meta = "lorad.arch", .value = vast, .says = "model.embed_tokens.weight has" },
        { .meta = "lorad.arch", .value = deep, .says = "model.layers.3.input_layernorm.weight is missing" },
        { .meta = "lorad.arch", .value = flat, .says = "do not belong to a llama model" },
        { .drop = "model.layers.1.mlp.up_proj.weight", .says = "model.layers.1.mlp.up_proj.weight is missing" },
        { .drop = "model.layers.1.mlp.up_proj.weight.absmax", .says = "absmax is missing" },
        { .drop = "lm_head.weight", .says = "lm_head.weight is missing" },
        { .drop = "lm_head.weight.scale", .says = "lm_head.weight" },
        { .extra = "model.layers.0.mlp.up_proj.bias", .says = "1 tensors that do not belong" },
        { .nan = "model.layers.1.mlp.up_proj.weight.nested_absmax", .says = "nested_absmax holds NaN" },
        { .nan = "model.layers.1.mlp.up_proj.weight.nested_offset", .says = "nested_offset holds NaN" },
        { .nan = "model.norm.weight", .says = "model.norm.weight holds NaN" },
        { .nan = "model.embed_tokens.weight", .says = "model.embed_tokens.weight holds NaN" },
        { .nan = "lm_head.weight.scale", .says = "scale of tensor lm_head.weight is not finite" },
    };
    char *path = path_join(f->dir, "bad.base");
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct base *b = NULL;
        struct err err = { 0 };
        copy_damaged(in, path, &cases[i]);
        int rc = base_load(path, PREC_FAST, false, &b, &err);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("case %zu: code %d, \"%s\"", i, rc, err.msg);
        must_refuse(path, cases[i].says);
    }
    /* a copy that another tool made, without alignment, is as good */
    copy_damaged(in, path, &(struct damage){ .drop = "__pad.0" });
    struct base *b = NULL;
    struct err err = { 0 };
    assert_int_equal(base_load(path, PREC_FAST, true, &b, &err), ERR_OK);
    assert_int_equal((uintptr_t)b->layers[1].mod[MOD_Q].w.codes % 64, 0);
    base_free(b);
    free(path);
    free(wide);
    free(tall);
    free(deep);
    free(flat);
    free(vast);
    st_close(in);
}

/* Any byte of the header may be wrong; whatever happens, it is a sentence or a model. */
static void no_changed_byte_of_the_header_crashes_the_loader(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    m.L = 1;
    m.no_tokenizer = true;
    import(f, &m, NULL);
    struct err err = { 0 };
    char *whole, *path = path_join(f->dir, "bad.base");
    size_t len;
    assert_int_equal(file_read(f->path, 1 << 24, &whole, &len, &err), ERR_OK);
    size_t header = 8 + (size_t)(uint8_t)whole[0] + ((size_t)(uint8_t)whole[1] << 8);
    uint32_t seed = 1;
    for (size_t i = 0; i < header; i += 7) {
        char keep = whole[i];
        seed = seed * 1664525 + 1013904223;
        whole[i] = (char)(i % 3 ? '0' + (seed >> 24) % 10 : seed >> 24);
        support_write_file(f->dir, "bad.base", whole, len);
        struct base *b = NULL;
        err_clear(&err);
        int rc = base_load(path, PREC_FAST, false, &b, &err);
        assert_true(rc == ERR_OK || err.msg[0] != '\0');
        if (rc == ERR_OK)
            base_free(b);
        whole[i] = keep;
    }
    free(path);
    free(whole);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
int main(void)
{
    const struct CMUnitTest tests[] = {
        T(loaded_weights_are_the_reference_s_dequantised_weights),
        T(a_width_that_is_no_multiple_of_64_dequantises_as_the_reference_does),
        T(f32_bases_of_every_family_hold_the_source_s_values),
        T(embedding_and_head_are_as_close_as_their_type_allows),
        T(a_mapped_base_equals_a_copied_one_and_size_is_known_before),
        T(a_base_file_that_is_cut_off_anywhere_is_refused),
        T(a_base_file_that_is_damaged_is_refused_with_a_sentence),
        T(no_changed_byte_of_the_header_crashes_the_loader),
    };
    return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
