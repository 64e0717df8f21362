/* test_import.c - a folder becomes exactly the base file that engine/base.h describes, or is refused
 * with a sentence that names the tensor, and then nothing is written. */
#include "engine/base.h"
#include "engine/nf4.h"
#include "engine/safetensors.h"
#include "engine/util.h"
#include "tests/support_model.h"

#include <dirent.h>
#include <jansson.h>
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
    char dir[64], *src, *weights, *out, *outdir;
};

static int setup(void **state)
{
    struct fix *f = malloc(sizeof *f);
    support_tmpdir(f->dir);
    f->src = path_join(f->dir, "src");
    f->outdir = path_join(f->dir, "out");
    f->weights = path_join(f->src, "model.safetensors");
    f->out = path_join(f->outdir, "m.base");
    char command[200];
    snprintf(command, sizeof command, "mkdir %s %s", f->src, f->outdir);
    assert_int_equal(system(command), 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fix *f = *state;
    support_remove(f->dir);
    free(f->src);
    free(f->weights);
    free(f->out);
    free(f->outdir);
    free(f);
    return 0;
}

static int import(const struct fix *f, const struct base_import_opts *opts, struct err *err)
{
    err_clear(err);
    return base_import(f->src, f->out, opts, err);
}

static void must_import(const struct fix *f, const struct base_import_opts *opts)
{
    struct err err;
    if (import(f, opts, &err) != ERR_OK)
        fail_msg("%s", err.msg);
}

static struct st_file *open_file(const char *path)
{
    struct st_file *f = NULL;
    struct err err = { 0 };
    if (st_open(path, &f, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return f;
}

static size_t files_in(const char *dir)
{
    size_t n = 0;
    DIR *d = opendir(dir);
    for (const struct dirent *e; (e = readdir(d)) != NULL;)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

/* --- what is written ------------------------------------------------------------------ */

static const struct st_tensor *part(const struct st_file *f, const char *name, const char *suffix)
{
    char full[200];
    snprintf(full, sizeof full, "%s%s", name, suffix);
    const struct st_tensor *t = st_find(f, full);
    if (t == NULL)
        fail_msg("%s is missing", full);
    return t;
}

static void check_codes_of(const struct st_file *base, const struct st_file *ref, const char *name,
                           size_t N, size_t K)
{
    uint8_t *codes = malloc(nf4_bytes(N * K));
    const struct st_tensor *packed = part(base, name, "");
    assert_int_equal(packed->bytes, p16_bytes(N, K));
    p16_unpack(packed->data, N, K, codes);
    const struct st_tensor *want = part(ref, name, "");
    assert_int_equal(want->bytes, nf4_bytes(N * K));
    assert_memory_equal(codes, want->data, want->bytes);
    static const char *const parts[] = { ".absmax", ".nested_absmax" };
    for (size_t i = 0; i < COUNT(parts); i++) {
        const struct st_tensor *a = part(base, name, parts[i]), *b = part(ref, name, parts[i]);
        assert_int_equal(a->bytes, b->bytes);
        assert_memory_equal(a->data, b->data, b->bytes);
    }
    char key[200];
    snprintf(key, sizeof key, "%s.quant_state.bitsandbytes__nf4", name);
    const struct st_tensor *state = part(ref, key, "");
    json_t *o = json_loadb((const char *)state->data, state->bytes, 0, NULL);
    float offset;
    memcpy(&offset, part(base, name, ".nested_offset")->data, 4);
    assert_true((double)offset == json_real_value(json_object_get(o, "nested_offset")));
    json_decref(o);
    free(codes);
}

static void imported_codes_and_scales_are_those_of_bitsandbytes(void **state)
{
    const struct fix *f = *state;
    const char *p = support_shared("golden/models/tiny-llama");
    if (p == NULL)
        skip();
    struct err err = { 0 };
    if (base_import(p, f->out, NULL, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    struct st_file *base = open_file(f->out);
    struct st_file *ref = open_file(support_shared("golden/models/tiny-llama-bnb-4bit/model.safetensors"));
    const struct {
        const char *name;
        size_t N, K;
    } mods[] = {
        { "self_attn.q_proj", 64, 64 }, { "self_attn.k_proj", 32, 64 }, { "self_attn.v_proj", 32, 64 },
        { "self_attn.o_proj", 64, 64 }, { "mlp.gate_proj", 128, 64 },   { "mlp.up_proj", 128, 64 },
        { "mlp.down_proj", 64, 128 },
    };
    for (int l = 0; l < 2; l++)
        for (size_t i = 0; i < COUNT(mods); i++) {
            char name[100];
            snprintf(name, sizeof name, "model.layers.%d.%s.weight", l, mods[i].name);
            check_codes_of(base, ref, name, mods[i].N, mods[i].K);
        }
    st_close(base);
    st_close(ref);
}

static void rows_that_are_no_whole_blocks_keep_the_reference_layout(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    m.F = 172; /* down_proj has 172 inputs */
    support_model_write(&m, f->src);
    must_import(f, NULL);
    struct st_file *base = open_file(f->out), *src = open_file(f->weights);
    const char *name = "model.layers.1.mlp.down_proj.weight";
    size_t n = 128 * 172;
    float *w = malloc(n * 4), *absmax = malloc(nf4_blocks(n) * 4), *big = malloc(nf4_nested_blocks(n) * 4), mean;
    uint8_t *codes = malloc(nf4_bytes(n)), *nested = malloc(nf4_blocks(n));
    struct err err = { 0 };
    assert_int_equal(st_f32(st_find(src, name), 0, n, w, &err), ERR_OK);
    q4_quantize(Q4_NF4, w, n, codes, absmax);
    q4_nest(absmax, nf4_blocks(n), nested, big, &mean);
    assert_memory_equal(part(base, name, "")->data, codes, nf4_bytes(n));
    assert_memory_equal(part(base, name, ".absmax")->data, nested, nf4_blocks(n));
    assert_memory_equal(part(base, name, ".nested_absmax")->data, big, nf4_nested_blocks(n) * 4);
    assert_memory_equal(part(base, name, ".nested_offset")->data, &mean, 4);
    free(w);
    free(absmax);
    free(big);
    free(codes);
    free(nested);
    st_close(base);
    st_close(src);
}

static void every_tensor_begins_on_a_64_byte_boundary(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("qwen3");
    support_model_write(&m, f->src);
    must_import(f, NULL);
    struct st_file *base = open_file(f->out);
    for (size_t i = 0; i < base->ntensors; i++)
        if (strncmp(base->tensors[i].name, "__pad.", 6) != 0)
            assert_int_equal((base->tensors[i].data - base->map) % 64, 0);
    st_close(base);
}

static void the_metadata_hold_tokenizer_template_name_and_source(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    support_model_write(&m, f->src);
    must_import(f, NULL);
    struct st_file *base = open_file(f->out);
    struct err err = { 0 };
    char *text, *path = path_join(f->src, "tokenizer.json");
    size_t len;
    assert_int_equal(file_read(path, 1 << 20, &text, &len, &err), ERR_OK);
    assert_string_equal(st_meta(base, "lorad.tokenizer"), text);
    assert_string_equal(st_meta(base, "lorad.format"), "1");
    assert_string_equal(st_meta(base, "lorad.name"), "src");
    assert_string_equal(st_meta(base, "lorad.type"), "nf4");
    assert_string_equal(st_meta(base, "lorad.head"), "8bit");
    assert_string_equal(st_meta(base, "lorad.embed"), "bf16");
    assert_non_null(strstr(st_meta(base, "lorad.chat_template"), "for m in messages"));
    char command[300], hex[65] = "";
    snprintf(command, sizeof command,
             "cd %s && sha256sum config.json generation_config.json model.safetensors "
             "tokenizer.json tokenizer_config.json | sha256sum", f->src);
    FILE *p = popen(command, "r");
    assert_int_equal(fread(hex, 1, 64, p), 64);
    pclose(p);
    assert_string_equal(st_meta(base, "lorad.source"), hex);
    free(text);
    free(path);
    st_close(base);
}

static void a_chat_template_may_stand_in_three_places(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    support_model_write(&m, f->src);
    const struct {
        const char *config, *jinja, *want;
    } cases[] = {
        { "{\"chat_template\":\"A\"}", NULL, "A" },
        { "{\"chat_template\":[{\"name\":\"tool_use\",\"template\":\"T\"},"
          "{\"name\":\"default\",\"template\":\"B\"}]}", NULL, "B" },
        { "{\"chat_template\":null}", NULL, NULL },
        { "{}", NULL, NULL },
        { "{\"chat_template\":\"A\"}", "C", "C" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        support_write_file(f->src, "tokenizer_config.json", cases[i].config, strlen(cases[i].config));
        if (cases[i].jinja)
            support_write_file(f->src, "chat_template.jinja", cases[i].jinja, strlen(cases[i].jinja));
        must_import(f, NULL);
        struct st_file *base = open_file(f->out);
        const char *got = st_meta(base, "lorad.chat_template");
        if (cases[i].want == NULL)
            assert_null(got);
        else
            assert_string_equal(got, cases[i].want);
        st_close(base);
    }
}

/* --- the canonical hash --------------------------------------------------------------- */

static void hash_of(const struct fix *f, const struct base_import_opts *opts, char ret[65])
{
    must_import(f, opts);
    struct st_file *base = open_file(f->out);
    snprintf(ret, 65, "%s", st_meta(base, "lorad.hash"));
    st_close(base);
}

static void packing_head_and_embedding_do_not_change_the_hash_but_the_type_does(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    m.dtype = DT_BF16;
    support_model_write(&m, f->src);
    char want[65], got[65];
    hash_of(f, NULL, want);
    static const char *const heads[] = { "8bit", "bf16", "f32", "nf4" };
    static const char *const embeds[] = { "bf16", "f32" };
    for (size_t h = 0; h < COUNT(heads); h++)
        for (size_t e = 0; e < COUNT(embeds); e++) {
            hash_of(f, &(struct base_import_opts){ .head = heads[h], .embed = embeds[e], .name = "x" }, got);
            assert_string_equal(got, want);
        }
    hash_of(f, &(struct base_import_opts){ .type = "f32" }, got);
    assert_string_not_equal(got, want);
    m.seed = 2;
    support_model_write(&m, f->src);
    hash_of(f, NULL, got);
    assert_string_not_equal(got, want);
}

/* The definition in base.h, computed here from the source and from nothing else. */
static void the_hash_is_the_one_that_the_header_defines(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("qwen2");
    m.tied = true;
    support_model_write(&m, f->src);
    char got[65], want[65];
    hash_of(f, NULL, got);
    struct st_file *src = open_file(f->weights);
    struct sha256 all;
    uint8_t digest[32];
    sha256_init(&all);
    for (size_t i = 0; i < src->ntensors; i++) { /* ascending by name */
        const struct st_tensor *t = &src->tensors[i];
        size_t n = st_count(t), blocks = nf4_blocks(n), big = nf4_nested_blocks(n);
        struct sha256 h;
        char line[80];
        sha256_init(&h);
        if (strstr(t->name, "_proj.weight") != NULL) {
            float *absmax = malloc(blocks * 4), *nested_absmax = malloc(big * 4), mean;
            uint8_t *codes = malloc(nf4_bytes(n)), *nested = malloc(blocks);
            q4_quantize(Q4_NF4, (const float *)(const void *)t->data, n, codes, absmax);
            q4_nest(absmax, blocks, nested, nested_absmax, &mean);
            sprintf(line, "NF4 [%d,%d]\n", (int)t->shape[0], (int)t->shape[1]);
            sha256_add(&h, line, strlen(line));
            sha256_add(&h, codes, nf4_bytes(n));
            sha256_add(&h, nested, blocks);
            sha256_add(&h, nested_absmax, big * 4);
            sha256_add(&h, &mean, 4);
            free(absmax);
            free(nested_absmax);
            free(codes);
            free(nested);
        } else {
            sprintf(line, t->ndim == 2 ? "F32 [%d,%d]\n" : "F32 [%d]\n", (int)t->shape[0], (int)t->shape[1]);
            sha256_add(&h, line, strlen(line));
            sha256_add(&h, t->data, t->bytes);
        }
        sha256_end(&h, digest);
        sha256_add(&all, t->name, strlen(t->name) + 1);
        sha256_add(&all, digest, 32);
    }
    sha256_end(&all, digest);
    hex32(digest, want);
    assert_string_equal(got, want);
    st_close(src);
}

/* --- shards --------------------------------------------------------------------------- */

enum { CUT_NONE, CUT_DROP, CUT_NAN, CUT_RESHAPE, CUT_RETYPE, CUT_EXTRA };

/* Copy tensors [first, last) of the model's file to `path`, changing the one called `name`. */
static void copy_weights(const struct st_file *in, const char *path, size_t first, size_t last, int cut,
                         const char *name)
{
    struct st_writer *w;
    struct err err = { 0 };
    assert_int_equal(st_writer_open(path, false, &w, &err), ERR_OK);
    for (size_t i = first; i < last; i++) {
        const struct st_tensor *t = &in->tensors[i];
        bool it = strcmp(t->name, name) == 0;
        int64_t flat[] = { (int64_t)st_count(t) };
        if (it && cut == CUT_DROP)
            continue;
        bool reshape = it && cut == CUT_RESHAPE;
        assert_int_equal(st_writer_tensor(w, t->name, it && cut == CUT_RETYPE ? "I32" : t->dtype_name,
                                          reshape ? 1 : t->ndim, reshape ? flat : t->shape, t->bytes,
                                          &err), ERR_OK);
    }
    if (cut == CUT_EXTRA)
        assert_int_equal(st_writer_tensor(w, name, "F32", 1, (const int64_t[]){ 1 }, 4, &err), ERR_OK);
    assert_int_equal(st_writer_begin(w, &err), ERR_OK);
    for (size_t i = first; i < last; i++) {
        const struct st_tensor *t = &in->tensors[i];
        bool it = strcmp(t->name, name) == 0;
        if (it && cut == CUT_DROP)
            continue;
        const uint32_t nan = 0x7fc00000;
        size_t at = it && cut == CUT_NAN ? t->bytes / 8 * 4 : t->bytes;
        assert_int_equal(st_writer_data(w, t->data, at, &err), ERR_OK);
        if (at < t->bytes) {
            assert_int_equal(st_writer_data(w, &nan, 4, &err), ERR_OK);
            assert_int_equal(st_writer_data(w, t->data + at + 4, t->bytes - at - 4, &err), ERR_OK);
        }
    }
    if (cut == CUT_EXTRA)
        assert_int_equal(st_writer_data(w, "\0\0\0", 4, &err), ERR_OK);
    assert_int_equal(st_writer_commit(w, &err), ERR_OK);
}

/* Split the model's file in two and write the index; `lie` puts a tensor into the wrong file. */
static void make_shards(const struct fix *f, bool lie)
{
    struct st_file *in = open_file(f->weights);
    char *a = path_join(f->src, "m-1.safetensors"), *b = path_join(f->src, "m-2.safetensors");
    size_t half = in->ntensors / 2;
    copy_weights(in, a, 0, half, CUT_NONE, "");
    copy_weights(in, b, half, in->ntensors, CUT_NONE, "");
    json_t *map = json_object();
    for (size_t i = 0; i < in->ntensors; i++)
        json_object_set_new(map, in->tensors[i].name,
                            json_string((i < half) != (lie && i == 3) ? "m-1.safetensors" : "m-2.safetensors"));
    json_t *index = json_pack("{s:o}", "weight_map", map);
    char *text = json_dumps(index, 0);
    support_write_file(f->src, "model.safetensors.index.json", text, strlen(text));
    free(text);
    json_decref(index);
    st_close(in);
    unlink(f->weights);
    free(a);
    free(b);
}

static void shards_give_the_same_base_as_one_file(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    support_model_write(&m, f->src);
    char one[65], two[65];
    hash_of(f, NULL, one);
    make_shards(f, false);
    hash_of(f, NULL, two);
    assert_string_equal(one, two);
}

static void an_index_that_disagrees_with_its_files_is_refused(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    struct err err;
    support_model_write(&m, f->src);
    make_shards(f, true);
    assert_int_equal(import(f, NULL, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "index.json says"));
    static const struct {
        const char *index, *says;
    } cases[] = {
        { "{}", "no weight_map" },
        { "{\"weight_map\":{\"a\":\"../m-1.safetensors\"}}", "not a plain file name" },
        { "{\"weight_map\":{\"a\":1}}", "not a plain file name" },
        { "{\"weight_map\":{\"a\":\"none.safetensors\"}}", "No such file" },
        { "{\"weight_map\":{\"a\":\"m-1.safetensors\"}}", "does not list it" },
        { "[", "not valid JSON" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        support_write_file(f->src, "model.safetensors.index.json", cases[i].index, strlen(cases[i].index));
        assert_int_not_equal(import(f, NULL, &err), ERR_OK);
        if (strstr(err.msg, cases[i].says) == NULL)
            fail_msg("case %zu: %s", i, err.msg);
        assert_int_equal(files_in(f->outdir), 0);
    }
}

/* --- refusals ------------------------------------------------------------------------- */

static void a_source_that_is_not_understood_is_refused_naming_the_tensor(void **state)
{
    const struct fix *f = *state;
    const struct {
        int cut;
        const char *name, *says;
    } cases[] = {
        { CUT_NAN, "model.layers.1.mlp.up_proj.weight", "holds NaN at element 16384" },
        { CUT_NAN, "model.embed_tokens.weight", "holds NaN" },
        { CUT_NAN, "lm_head.weight", "holds NaN" },
        { CUT_NAN, "model.norm.weight", "holds NaN" },
        { CUT_DROP, "model.layers.2.self_attn.k_proj.weight", "is missing" },
        { CUT_DROP, "lm_head.weight", "is missing" },
        { CUT_RESHAPE, "model.layers.0.self_attn.q_proj.weight", "has shape [16384], but config.json asks for [128, 128]" },
        { CUT_RETYPE, "model.layers.0.self_attn.q_proj.weight", "has type I32" },
        { CUT_EXTRA, "model.layers.0.self_attn.q_proj.bias", "does not belong to a llama model" },
        { CUT_EXTRA, "model.layers.3.input_layernorm.weight", "does not belong" },
        { CUT_EXTRA, "model.layers.0.self_attn.q_norm.weight", "does not belong" },
    };
    struct support_model m = support_model_default("llama");
    support_model_write(&m, f->src);
    struct st_file *in = open_file(f->weights);
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct err err;
        char want[200];
        copy_weights(in, f->weights, 0, in->ntensors, cases[i].cut, cases[i].name);
        int rc = import(f, NULL, &err);
        snprintf(want, sizeof want, "tensor %s ", cases[i].name);
        if (rc != ERR_INVALID || strstr(err.msg, want) == NULL || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("case %zu: code %d, \"%s\"", i, rc, err.msg);
        assert_int_equal(files_in(f->outdir), 0);
    }
    st_close(in);
}

static void stray_buffers_are_ignored_and_do_not_change_the_hash(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    support_model_write(&m, f->src);
    char want[65], got[65];
    hash_of(f, NULL, want);
    static const char *const strays[] = { "model.layers.0.self_attn.rotary_emb.inv_freq",
                                          "model.layers.0.attn.masked_bias", "model.h.0.attn.bias" };
    struct st_file *in = open_file(f->weights);
    for (size_t i = 0; i < COUNT(strays); i++) {
        copy_weights(in, f->weights, 0, in->ntensors, CUT_EXTRA, strays[i]);
        hash_of(f, NULL, got);
        assert_string_equal(got, want);
    }
    st_close(in);
}

static void a_config_that_promises_other_sizes_is_refused(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    support_model_write(&m, f->src);
    struct support_model lies[] = { m, m, m, m, m };
    lies[0].V = 1 << 22;
    lies[1].F = 1 << 20;
    lies[2].L = 512;
    lies[3].D = 1 << 16;
    lies[4].attention_bias = true;
    for (size_t i = 0; i < COUNT(lies); i++) {
        struct err err;
        /* only config.json: the weights stay the small ones */
        struct st_file *in = open_file(f->weights);
        char *keep = path_join(f->dir, "keep");
        copy_weights(in, keep, 0, in->ntensors, CUT_NONE, "");
        char *config = NULL, *path = path_join(f->src, "config.json");
        size_t len;
        assert_int_equal(file_read(path, 1 << 20, &config, &len, &err), ERR_OK);
        json_t *o = json_loads(config, 0, NULL);
        json_object_set_new(o, "vocab_size", json_integer(lies[i].V));
        json_object_set_new(o, "intermediate_size", json_integer(lies[i].F));
        json_object_set_new(o, "num_hidden_layers", json_integer(lies[i].L));
        json_object_set_new(o, "hidden_size", json_integer(lies[i].D));
        json_object_set_new(o, "attention_bias", json_boolean(lies[i].attention_bias));
        char *text = json_dumps(o, 0);
        support_write_file(f->src, "config.json", text, strlen(text));
        int rc = import(f, NULL, &err);
        if (rc != ERR_INVALID || strstr(err.msg, "tensor ") == NULL)
            fail_msg("case %zu: code %d, \"%s\"", i, rc, err.msg);
        assert_int_equal(files_in(f->outdir), 0);
        support_write_file(f->src, "config.json", config, len);
        json_decref(o);
        free(text);
        free(config);
        free(path);
        free(keep);
        st_close(in);
    }
}

static void a_tied_model_with_a_head_must_hold_the_embedding_there(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    struct err err;
    support_model_write(&m, f->src); /* untied: embedding and head differ */
    char *path = path_join(f->src, "config.json"), *config;
    size_t len;
    assert_int_equal(file_read(path, 1 << 20, &config, &len, &err), ERR_OK);
    json_t *o = json_loads(config, 0, NULL);
    json_object_set_new(o, "tie_word_embeddings", json_true());
    char *text = json_dumps(o, 0);
    support_write_file(f->src, "config.json", text, strlen(text));
    assert_int_equal(import(f, NULL, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "tensor lm_head.weight differs from model.embed_tokens.weight"));
    assert_int_equal(files_in(f->outdir), 0);
    json_decref(o);
    free(text);
    free(config);
    free(path);
}

static void folders_and_options_that_are_none_are_refused(void **state)
{
    const struct fix *f = *state;
    struct err err;
    assert_int_equal(import(f, NULL, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "no config.json"));
    struct support_model m = support_model_default("llama");
    support_model_write(&m, f->src);
    const struct {
        struct base_import_opts opts;
        const char *says;
    } cases[] = {
        { { .type = "nf8" }, "type \"nf8\" is unknown; known: f32, nf4" },
        { { .head = "4bit" }, "head \"4bit\" is unknown; known: f32, bf16, nf4, 8bit" },
        { { .embed = "8bit" }, "embed \"8bit\" is unknown; known: f32, bf16" },
        { { .name = "" }, "name" },
        { { .name = "a b" }, "name" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        assert_int_equal(import(f, &cases[i].opts, &err), ERR_INVALID);
        if (strstr(err.msg, cases[i].says) == NULL)
            fail_msg("%s", err.msg);
    }
    support_write_file(f->src, "tokenizer.json", "{\"a\":", 5);
    assert_int_equal(import(f, NULL, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "tokenizer.json is not valid JSON"));
    support_model_write(&m, f->src);
    unlink(f->weights);
    support_write_file(f->src, "pytorch_model.bin", "x", 1);
    assert_int_equal(import(f, NULL, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "pytorch_model.bin"));
    support_write_file(f->src, "model.safetensors", "garbage!garbage!", 16);
    assert_int_equal(import(f, NULL, &err), ERR_INVALID);
    assert_int_equal(files_in(f->outdir), 0);
}

static bool stop_at_five(void *ud, const char *tensor, size_t done, size_t total)
{
    (void)tensor;
    assert_true(done <= total);
    return ++*(int *)ud == 5;
}

static void a_stopped_import_leaves_nothing(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    struct err err;
    int calls = 0;
    support_model_write(&m, f->src);
    assert_int_equal(import(f, &(struct base_import_opts){ .progress = stop_at_five, .ud = &calls }, &err),
                     ERR_CANCELLED);
    assert_int_equal(calls, 5);
    assert_int_equal(files_in(f->outdir), 0);
}

static void count_notes(void *ud, const char *sentence)
{
    assert_non_null(strstr(sentence, "not a multiple of 64"));
    ++*(int *)ud;
}

static void a_head_without_whole_blocks_is_kept_as_bf16_and_says_so(void **state)
{
    const struct fix *f = *state;
    struct support_model m = support_model_default("llama");
    m.D = 96;
    support_model_write(&m, f->src);
    static const char *const heads[] = { "8bit", "nf4", "bf16", "f32" };
    for (size_t i = 0; i < COUNT(heads); i++) {
        int notes = 0;
        must_import(f, &(struct base_import_opts){ .head = heads[i], .note = count_notes, .ud = &notes });
        struct st_file *base = open_file(f->out);
        assert_string_equal(st_find(base, "lm_head.weight")->dtype_name, i < 3 ? "BF16" : "F32");
        assert_int_equal(notes, i < 2);
        st_close(base);
    }
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
int main(void)
{
    const struct CMUnitTest tests[] = {
        T(imported_codes_and_scales_are_those_of_bitsandbytes),
        T(rows_that_are_no_whole_blocks_keep_the_reference_layout),
        T(every_tensor_begins_on_a_64_byte_boundary),
        T(the_metadata_hold_tokenizer_template_name_and_source),
        T(a_chat_template_may_stand_in_three_places),
        T(packing_head_and_embedding_do_not_change_the_hash_but_the_type_does),
        T(the_hash_is_the_one_that_the_header_defines),
        T(shards_give_the_same_base_as_one_file),
        T(an_index_that_disagrees_with_its_files_is_refused),
        T(a_source_that_is_not_understood_is_refused_naming_the_tensor),
        T(stray_buffers_are_ignored_and_do_not_change_the_hash),
        T(a_config_that_promises_other_sizes_is_refused),
        T(a_tied_model_with_a_head_must_hold_the_embedding_there),
        T(folders_and_options_that_are_none_are_refused),
        T(a_stopped_import_leaves_nothing),
        T(a_head_without_whole_blocks_is_kept_as_bf16_and_says_so),
    };
    return cmocka_run_group_tests_name("import", tests, NULL, NULL);
}
