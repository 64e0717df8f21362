/* test_import_bnb.c - checkpoints that bitsandbytes has quantised are taken over code for code, or
 * refused with a sentence that names the tensor. */
#include "engine/base.h"
#include "engine/nf4.h"
#include "engine/safetensors.h"
#include "engine/util.h"
#include "tests/support_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])
#define VICTIM "model.layers.0.mlp.up_proj.weight"

/* --- a checkpoint, tensor by tensor ------------------------------------------------------ */
struct part {
    char name[160], dtype[8];
    int ndim;
    int64_t shape[2];
    uint8_t *data;
    size_t bytes;
};

struct fix {
    char dir[64], *weights, *out;
    struct part part[400];
    size_t n;
};

static int setup(void **state)
{
    struct fix *f = calloc(1, sizeof *f);
    support_tmpdir(f->dir);
    f->weights = path_join(f->dir, "model.safetensors");
    f->out = path_join(f->dir, "m.base");
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fix *f = *state;
    support_remove(f->dir);
    for (size_t i = 0; i < f->n; i++)
        free(f->part[i].data);
    free(f->weights);
    free(f->out);
    free(f);
    return 0;
}

static struct part *add(struct fix *f, const char *name, const char *suffix, const char *dtype,
                        int64_t rows, int64_t cols, const void *data, size_t bytes)
{
    assert_true(f->n < COUNT(f->part));
    struct part *p = &f->part[f->n++];
    snprintf(p->name, sizeof p->name, "%s%s", name, suffix);
    snprintf(p->dtype, sizeof p->dtype, "%s", dtype);
    p->ndim = cols ? 2 : 1;
    p->shape[0] = rows;
    p->shape[1] = cols;
    p->data = malloc(bytes);
    p->bytes = bytes;
    memcpy(p->data, data, bytes);
    return p;
}

static struct part *find(struct fix *f, const char *suffix)
{
    char name[200];
    snprintf(name, sizeof name, "%s%s", VICTIM, suffix);
    for (size_t i = 0; i < f->n; i++)
        if (strcmp(f->part[i].name, name) == 0)
            return &f->part[i];
    fail_msg("%s is not there", name);
    return NULL;
}

static void write_checkpoint(const struct fix *f)
{
    struct st_writer *w;
    struct err err = { 0 };
    assert_int_equal(st_writer_open(f->weights, false, &w, &err), ERR_OK);
    for (size_t i = 0; i < f->n; i++)
        assert_int_equal(st_writer_tensor(w, f->part[i].name, f->part[i].dtype, f->part[i].ndim,
                                          f->part[i].shape, f->part[i].bytes, &err), ERR_OK);
    assert_int_equal(st_writer_begin(w, &err), ERR_OK);
    for (size_t i = 0; i < f->n; i++)
        assert_int_equal(st_writer_data(w, f->part[i].data, f->part[i].bytes, &err), ERR_OK);
    assert_int_equal(st_writer_commit(w, &err), ERR_OK);
}

struct kind {
    enum q4_type type;
    bool nested;
    const char *storage; /* type under which codes are stored */
    unsigned size;       /* of its elements */
    const char *leave;   /* a part of the names of linear layers that stay as they are */
};

static void add_quantised(struct fix *f, const struct st_tensor *t, const struct kind *k)
{
    const size_t n = st_count(t), blocks = nf4_blocks(n), big = nf4_nested_blocks(n);
    const bool nf4 = k->type == Q4_NF4;
    float *w = malloc(n * 4), *absmax = malloc(blocks * 4), *nested_absmax = malloc(big * 4), offset;
    uint8_t *codes = malloc(nf4_bytes(n)), *nested = malloc(blocks);
    char json[400];
    assert_int_equal(st_f32(t, 0, n, w, NULL), ERR_OK);
    q4_quantize(k->type, w, n, codes, absmax);
    q4_nest(absmax, blocks, nested, nested_absmax, &offset);
    add(f, t->name, "", k->storage, (int64_t)(nf4_bytes(n) / k->size), 1, codes, nf4_bytes(n));
    add(f, t->name, ".quant_map", "F32", 16, 0, nf4 ? nf4_code : fp4_code, 64);
    int len = snprintf(json, sizeof json,
                       "{\"quant_type\": \"%s\", \"blocksize\": 64, \"dtype\": \"bfloat16\", "
                       "\"shape\": [%d, %d]", nf4 ? "nf4" : "fp4", (int)t->shape[0],
                       (int)t->shape[1]);
    if (k->nested) {
        add(f, t->name, ".absmax", "U8", (int64_t)blocks, 0, nested, blocks);
        add(f, t->name, ".nested_absmax", "F32", (int64_t)big, 0, nested_absmax, big * 4);
        add(f, t->name, ".nested_quant_map", "F32", 256, 0, nf4_dynamic8, 1024);
        len += snprintf(json + len, sizeof json - (size_t)len,
                        ", \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", "
                        "\"nested_offset\": %.17g", (double)offset);
    } else {
        add(f, t->name, ".absmax", "F32", (int64_t)blocks, 0, absmax, blocks * 4);
    }
    len += snprintf(json + len, sizeof json - (size_t)len, "}");
    add(f, t->name, nf4 ? ".quant_state.bitsandbytes__nf4" : ".quant_state.bitsandbytes__fp4", "U8",
        len, 0, json, (size_t)len);
    free(w);
    free(absmax);
    free(nested_absmax);
    free(codes);
    free(nested);
}

/* A llama whose linear layers are as `k` says. */
static void make(struct fix *f, const struct kind *k)
{
    struct support_model m = support_model_default("llama");
    struct st_file *in = NULL;
    m.L = 2;
    m.dtype = DT_BF16;
    support_model_write(&m, f->dir);
    assert_int_equal(st_open(f->weights, &in, NULL), ERR_OK);
    for (size_t i = 0; i < f->n; i++)
        free(f->part[i].data);
    f->n = 0;
    for (size_t i = 0; i < in->ntensors; i++) {
        const struct st_tensor *t = &in->tensors[i];
        if (strstr(t->name, "_proj.weight") && !(k->leave && strstr(t->name, k->leave)))
            add_quantised(f, t, k);
        else
            add(f, t->name, "", t->dtype_name, t->shape[0], t->ndim == 2 ? t->shape[1] : 0, t->data,
                t->bytes);
    }
    st_close(in);
    write_checkpoint(f);
}

static const struct kind nested_nf4 = { Q4_NF4, true, "U8", 1, NULL };

/* --- what comes out ---------------------------------------------------------------------- */
static int import(const struct fix *f, const struct base_import_opts *o, struct err *err)
{
    err_clear(err);
    return base_import(f->dir, f->out, o, err);
}

static void must_import(const struct fix *f, const struct base_import_opts *o)
{
    struct err err;
    if (import(f, o, &err) != ERR_OK)
        fail_msg("%s", err.msg);
}

static void hash_of(const struct fix *f, const char *type, char ret[65])
{
    struct st_file *base = NULL;
    must_import(f, &(struct base_import_opts){ .type = type });
    assert_int_equal(st_open(f->out, &base, NULL), ERR_OK);
    snprintf(ret, 65, "%s", st_meta(base, "lorad.hash"));
    st_close(base);
}

static void the_hash_is_that_of_the_checkpoint_before_it_was_quantised(void **state)
{
    struct fix *f = *state;
    char want[65], got[65];
    struct support_model m = support_model_default("llama");
    m.L = 2;
    m.dtype = DT_BF16;
    support_model_write(&m, f->dir);
    hash_of(f, "nf4", want);
    static const struct kind kinds[] = {
        { Q4_NF4, true, "U8", 1, NULL },    { Q4_NF4, true, "BF16", 2, NULL },
        { Q4_NF4, true, "F32", 4, NULL },   { Q4_NF4, true, "U8", 1, "k_proj" },
        { Q4_NF4, true, "F16", 2, "layers.1" },
    };
    for (size_t i = 0; i < COUNT(kinds); i++) {
        make(f, &kinds[i]);
        hash_of(f, "nf4", got);
        assert_string_equal(got, want);
        if (kinds[i].leave != NULL)
            continue;
        hash_of(f, "f32", got);
        assert_string_equal(got, want);
    }
    make(f, &(struct kind){ Q4_NF4, false, "U8", 1, NULL });
    hash_of(f, "nf4", got);
    assert_string_not_equal(got, want); /* other scales: another base */
    hash_of(f, "f32", want);
    assert_string_equal(got, want);
}

static void plain_scales_stay_fp32_to_the_last_bit(void **state)
{
    struct fix *f = *state;
    struct base *b = NULL;
    struct err err = { 0 };
    make(f, &(struct kind){ Q4_NF4, false, "U8", 1, NULL });
    must_import(f, NULL);
    assert_int_equal(base_load(f->out, PREC_F32, false, &b, &err), ERR_OK);
    const struct matrix *w = &b->layers[0].mod[MOD_UP].w;
    const size_t N = (size_t)w->N, K = (size_t)w->K;
    float *want = malloc(N * K * 4), *got = malloc(K * 4);
    const struct part *absmax = find(f, ".absmax"), *codes = find(f, "");
    q4_dequantize(Q4_NF4, codes->data, (const float *)(void *)absmax->data, N * K, want);
    for (size_t n = 0; n < N; n++) {
        matrix_row(w, (int)n, got);
        assert_memory_equal(got, want + n * K, K * 4);
    }
    free(want);
    free(got);
    base_free(b);
}

static void note_once(void *ud, const char *sentence)
{
    assert_non_null(strstr(sentence, "a second time"));
    ++*(int *)ud;
}

static void fp4_needs_the_users_word_and_becomes_nf4_of_what_it_meant(void **state)
{
    struct fix *f = *state;
    struct base *b = NULL;
    struct err err = { 0 };
    int notes = 0;
    make(f, &(struct kind){ Q4_FP4, true, "U8", 1, NULL });
    assert_int_equal(import(f, NULL, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "is FP4 in blocks of 64"));
    assert_non_null(strstr(err.msg, "--requantize"));
    must_import(f, &(struct base_import_opts){ .requantize = true, .note = note_once, .ud = &notes });
    assert_int_equal(notes, 1);
    must_import(f, &(struct base_import_opts){ .type = "f32" }); /* loses nothing: needs no word */
    assert_int_equal(base_load(f->out, PREC_F32, false, &b, &err), ERR_OK);
    const struct matrix *w = &b->layers[0].mod[MOD_UP].w;
    const size_t n = (size_t)w->N * (size_t)w->K, blocks = nf4_blocks(n);
    float *want = malloc(n * 4), *scales = malloc(blocks * 4), offset;
    const char *at = strstr((const char *)find(f, ".quant_state.bitsandbytes__fp4")->data, "offset\": ");
    offset = strtof(at + 9, NULL);
    q4_unnest(find(f, ".absmax")->data, (const float *)(void *)find(f, ".nested_absmax")->data, offset,
              blocks, scales);
    q4_dequantize(Q4_FP4, find(f, "")->data, scales, n, want);
    assert_memory_equal(w->codes, want, n * 4);
    free(want);
    free(scales);
    base_free(b);
}

/* --- hostile ----------------------------------------------------------------------------- */
static void replace(struct part *p, const char *from, const char *to)
{
    char text[500], *at;
    assert_true(p->bytes < sizeof text);
    memcpy(text, p->data, p->bytes);
    text[p->bytes] = '\0';
    at = strstr(text, from);
    assert_non_null(at);
    char *out = malloc(500);
    p->bytes = (size_t)snprintf(out, 500, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    p->shape[0] = (int64_t)p->bytes;
    free(p->data);
    p->data = (uint8_t *)out;
}

static void a_checkpoint_that_contradicts_itself_is_refused_naming_the_tensor(void **state)
{
    struct fix *f = *state;
    static const struct {
        const char *part, *from, *to; /* in the JSON */
        int cut;                      /* bytes taken from the end of a part, or */
        float first;                  /* its first number, or */
        const char *rename;
    } cases[] = {
        { ".quant_state.bitsandbytes__nf4", "\"nf4\"", "\"fp4\"", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "64", "63", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "64", "128", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "[256", "[255", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "[256", "[4294967552", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "[256, 128]", "[128, 256]", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "[256, 128]", "[32768]", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "[256", "[-256", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "bfloat16", "int8", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "\"dtype\"", "\"dtipe\"", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "256,", "1e400,", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "}", ",\"more\": 1}", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", "}", "", 0, 0, NULL },
        { ".quant_state.bitsandbytes__nf4", NULL, NULL, 0, 0, ".quant_state" },
        { ".quant_map", NULL, NULL, 4, 0, NULL },
        { ".quant_map", NULL, NULL, 0, -2, NULL },
        { ".quant_map", NULL, NULL, 0, -INFINITY, NULL },
        { ".quant_map", NULL, NULL, 0, 0, ".map" },
        { ".quant_map", NULL, NULL, 0, -0.9f, NULL }, /* another codebook: not NF4's */
        { ".nested_quant_map", NULL, NULL, 4, 0, NULL },
        { ".absmax", NULL, NULL, 1, 0, NULL },
        { ".absmax", NULL, NULL, 0, 0, ".abs" },
        { ".nested_absmax", NULL, NULL, 4, 0, NULL },
        { ".nested_absmax", NULL, NULL, 0, INFINITY, NULL },
        { ".nested_absmax", NULL, NULL, 0, 0, ".nested" },
        { "", NULL, NULL, 1, 0, NULL },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct err err;
        make(f, &nested_nf4);
        struct part *p = find(f, cases[i].part);
        if (cases[i].from != NULL)
            replace(p, cases[i].from, cases[i].to);
        p->bytes -= (size_t)cases[i].cut;
        p->shape[0] = p->ndim == 1 ? (int64_t)(p->bytes / (strcmp(p->dtype, "F32") ? 1 : 4))
                                   : (int64_t)p->bytes;
        if (cases[i].first != 0)
            memcpy(p->data, &cases[i].first, 4);
        if (cases[i].rename != NULL)
            snprintf(p->name, sizeof p->name, "%s%s", VICTIM, cases[i].rename);
        write_checkpoint(f);
        int rc = import(f, NULL, &err);
        if (rc != ERR_INVALID || strstr(err.msg, "tensor " VICTIM) == NULL)
            fail_msg("case %zu: code %d, \"%s\"", i, rc, err.msg);
        assert_false(file_exists(f->out));
    }
}

static void other_quantisations_are_refused_by_name(void **state)
{
    struct fix *f = *state;
    static const struct {
        const char *config, *says;
    } cases[] = {
        { "{\"quant_method\": \"gptq\", \"bits\": 4}", "gptq" },
        { "{\"quant_method\": \"bitsandbytes\", \"load_in_8bit\": true}", "bitsandbytes" },
        { "{\"load_in_4bit\": true}", "no method named" },
    };
    make(f, &nested_nf4);
    char *path = path_join(f->dir, "config.json"), *config, text[4000];
    size_t len;
    struct err err = { 0 };
    assert_int_equal(file_read(path, 3000, &config, &len, &err), ERR_OK);
    for (size_t i = 0; i < COUNT(cases); i++) {
        snprintf(text, sizeof text, "{\"quantization_config\": %s,%s", cases[i].config, config + 1);
        support_write_file(f->dir, "config.json", text, strlen(text));
        assert_int_equal(import(f, NULL, &err), ERR_INVALID);
        assert_non_null(strstr(err.msg, cases[i].says));
    }
    snprintf(text, sizeof text, "{\"quantization_config\": %s,%s",
             "{\"quant_method\": \"bitsandbytes\", \"load_in_4bit\": true}", config + 1);
    support_write_file(f->dir, "config.json", text, strlen(text));
    must_import(f, NULL);
    free(config);
    free(path);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
int main(void)
{
    const struct CMUnitTest tests[] = {
        T(the_hash_is_that_of_the_checkpoint_before_it_was_quantised),
        T(plain_scales_stay_fp32_to_the_last_bit),
        T(fp4_needs_the_users_word_and_becomes_nf4_of_what_it_meant),
        T(a_checkpoint_that_contradicts_itself_is_refused_naming_the_tensor),
        T(other_quantisations_are_refused_by_name),
    };
    return cmocka_run_group_tests_name("import_bnb", tests, NULL, NULL);
}
