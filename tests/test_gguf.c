/* test_gguf.c - GGUF files: their block types against numbers of another program, their vocabularies
 * against other people's token ids, and their models against the folders they were made from. */
#include "engine/base.h"
#include "engine/import_int.h"
#include "engine/tokenizer.h"
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
#include <cmocka.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])

/* --- block types ----------------------------------------------------------------------------- */
static void from_hex(const char *hex, uint8_t *ret)
{
    for (size_t i = 0; i < strlen(hex) / 2; i++) {
        unsigned v = 0;
        assert_int_equal(sscanf(hex + 2 * i, "%2x", &v), 1);
        ret[i] = (uint8_t)v;
    }
}

static void every_block_type_gives_the_numbers_of_another_program(void **state)
{
    (void)state;
    json_t *all = json_load_file("tests/data/gguf_blocks.json", 0, NULL);
    assert_int_equal(json_array_size(all), 24);
    for (size_t i = 0; i < json_array_size(all); i++) {
        const json_t *o = json_array_get(all, i);
        const char *name = json_string_value(json_object_get(o, "name"));
        const struct ggml_type *t =
            ggml_type_of((uint32_t)json_integer_value(json_object_get(o, "type")));
        const char *block = json_string_value(json_object_get(o, "block"));
        const char *bits = json_string_value(json_object_get(o, "bits"));
        uint8_t in[256], want[4 * GGML_MAX_BLOCK];
        float got[GGML_MAX_BLOCK], w;
        assert_string_equal(t->name, name);
        assert_int_equal(strlen(block), 2 * t->bytes);
        assert_int_equal(strlen(bits), 8 * t->block);
        from_hex(block, in);
        from_hex(bits, want);
        t->f32(in, got);
        for (size_t k = 0; k < t->block; k++) {
            memcpy(&w, want + 4 * k, 4);
            if (w != got[k])
                fail_msg("%s element %zu is %g, not %g", name, k, (double)got[k], (double)w);
        }
    }
    json_decref(all);
}

/* Small enough to do with a pencil. */
static void blocks_done_by_hand(void **state)
{
    (void)state;
    float got[GGML_MAX_BLOCK];
    uint8_t q4_0[18] = { 0x00, 0x3c, 0x9f, [17] = 0x80 }; /* scale 1: 15 - 8, 9 - 8 */
    ggml_type_of(2)->f32(q4_0, got);
    assert_true(got[0] == 7 && got[16] == 1 && got[1] == -8 && got[31] == 0);
    uint8_t q8_0[34] = { 0x00, 0x40, 0x80, 0x7f }; /* scale 2: -128, 127 */
    ggml_type_of(8)->f32(q8_0, got);
    assert_true(got[0] == -256 && got[1] == 254 && got[2] == 0);
    /* d 1, dmin 2; scale of sub-block 0 is 3, its minimum 5; of sub-block 4: 1 + 16 * 2 and 2 */
    uint8_t q4_k[144] = { 0x00, 0x3c, 0x00, 0x40, 0x83, 0, 0, 0, 0x05, 0, 0, 0, 0x21, [16] = 0x0a,
                          [16 + 64] = 0x07 };
    ggml_type_of(12)->f32(q4_k, got);
    assert_true(got[0] == 3 * 10 - 2 * 5 && got[1] == -10 && got[128] == 33 * 7 - 2 * 2);
    /* d 1; scale of group 0 is -1; element 0: 5 + 16 * 2 - 32 */
    uint8_t q6_k[210] = { 0x05, [128] = 0x02, [192] = 0xff, [209] = 0x3c };
    ggml_type_of(14)->f32(q6_k, got);
    assert_true(got[0] == -5 && got[1] == 32 && got[16] == 0);
}

/* --- a file made by the test ------------------------------------------------------------------ */
struct file {
    struct buf b;
    uint64_t nkeys, ntensors;
};

static void put(struct file *f, const void *data, size_t n) { assert_int_equal(buf_add(&f->b, data, n), 0); }
static void put32(struct file *f, uint32_t v) { put(f, &v, 4); }
static void put64(struct file *f, uint64_t v) { put(f, &v, 8); }

static void put_text(struct file *f, const char *s)
{
    put64(f, strlen(s));
    put(f, s, strlen(s));
}

static void key(struct file *f, const char *name, uint32_t kind)
{
    put_text(f, name);
    put32(f, kind);
    f->nkeys++;
}

static void key_int(struct file *f, const char *name, uint32_t v)
{
    key(f, name, GGUF_U32);
    put32(f, v);
}

static void key_float(struct file *f, const char *name, float v)
{
    key(f, name, GGUF_F32);
    put(f, &v, 4);
}

static void key_text(struct file *f, const char *name, const char *v)
{
    key(f, name, GGUF_STRING);
    put_text(f, v);
}

static void begin(struct file *f, uint64_t ntensors)
{
    buf_init(&f->b, 64 << 20);
    f->nkeys = 0;
    put(f, "GGUF", 4);
    put32(f, 3);
    put64(f, ntensors);
    put64(f, 0); /* keys, known later */
}

/* 256 tokens named by their number, byte-level. */
static void put_vocab(struct file *f, const char *pre)
{
    key_text(f, "tokenizer.ggml.model", "gpt2");
    key_text(f, "tokenizer.ggml.pre", pre);
    key(f, "tokenizer.ggml.tokens", GGUF_ARRAY);
    put32(f, GGUF_STRING);
    put64(f, 256);
    for (int i = 0; i < 256; i++) {
        char name[16];
        snprintf(name, sizeof name, "t%d", i);
        put_text(f, name);
    }
    key_int(f, "tokenizer.ggml.bos_token_id", 1);
    key_int(f, "tokenizer.ggml.eos_token_id", 2);
}

/* Hugging Face's name to GGUF's. */
static void gguf_name(const char *name, char ret[160])
{
    static const char *const parts[][2] = {
        { "input_layernorm", "attn_norm" },       { "post_attention_layernorm", "ffn_norm" },
        { "self_attn.q_proj", "attn_q" },         { "self_attn.k_proj", "attn_k" },
        { "self_attn.v_proj", "attn_v" },         { "self_attn.o_proj", "attn_output" },
        { "self_attn.q_norm", "attn_q_norm" },    { "self_attn.k_norm", "attn_k_norm" },
        { "mlp.gate_proj", "ffn_gate" },          { "mlp.up_proj", "ffn_up" },
        { "mlp.down_proj", "ffn_down" },
    };
    int layer, at = 0;
    if (sscanf(name, "model.layers.%d.%n", &layer, &at) == 1) {
        for (size_t i = 0; i < COUNT(parts); i++) {
            size_t n = strlen(parts[i][0]);
            if (strncmp(name + at, parts[i][0], n) == 0 && name[at + (int)n] == '.')
                snprintf(ret, 160, "blk.%d.%s%s", layer, parts[i][1], name + at + n);
        }
        return;
    }
    snprintf(ret, 160, "%s", strstr(name, "embed_tokens") ? "token_embd.weight"
                             : strstr(name, "lm_head")    ? "output.weight"
                                                          : "output_norm.weight");
}

struct shape { /* of the golden models */
    const char *arch;
    int H, G, hd;
    float eps, theta;
};

/* llama.cpp's order: the two halves of a head's rows, taken in turns. */
static void in_turns(float *v, size_t rows, size_t K, size_t hd)
{
    float *copy = malloc(rows * K * sizeof *copy);
    memcpy(copy, v, rows * K * sizeof *copy);
    for (size_t h = 0; h < rows / hd; h++)
        for (size_t j = 0; j < 2; j++)
            for (size_t i = 0; i < hd / 2; i++)
                memcpy(v + (h * hd + 2 * i + j) * K, copy + (h * hd + j * (hd / 2) + i) * K, K * 4);
    free(copy);
}

static void put_tensor_info(struct file *f, const char *name, const struct st_tensor *t,
                            uint32_t type, uint64_t *offset)
{
    put_text(f, name);
    put32(f, (uint32_t)t->ndim);
    for (int d = t->ndim - 1; d >= 0; d--)
        put64(f, (uint64_t)t->shape[d]);
    put32(f, type);
    put64(f, *offset);
    const struct ggml_type *g = ggml_type_of(type);
    *offset += (st_count(t) / g->block * g->bytes + 31) / 32 * 32;
}

/* Numbers to Q8_0, and what that stands for. */
static void to_q8_0(const float *v, uint8_t block[34], float *ret)
{
    float most = 0;
    for (int i = 0; i < 32; i++)
        most = fmaxf(most, fabsf(v[i]));
    const uint16_t d = f32_to_f16(most / 127);
    memcpy(block, &d, 2);
    for (int i = 0; i < 32; i++) {
        float code = d ? fminf(fmaxf(rintf(v[i] / f16_to_f32(d)), -127), 127) : 0;
        block[2 + i] = (uint8_t)(int8_t)code;
        ret[i] = f16_to_f32(d) * (float)(int8_t)block[2 + i];
    }
}

static void put_values(struct file *f, const struct st_tensor *t, const struct shape *s,
                       uint32_t type)
{
    size_t n = st_count(t), rows = (size_t)t->shape[0];
    float *v = malloc(n * 4);
    assert_int_equal(st_f32(t, 0, n, v, NULL), ERR_OK);
    if (strcmp(s->arch, "llama") == 0 && (strstr(t->name, ".q_proj") || strstr(t->name, ".k_proj")))
        in_turns(v, rows, n / rows, (size_t)s->hd);
    for (size_t i = 0; i < n && type < 2; i++) {
        uint16_t h = f32_to_f16(v[i]);
        put(f, type == 1 ? (void *)&h : (void *)&v[i], type == 1 ? 2 : 4);
    }
    for (size_t i = 0; i < n && type == 8; i += 32) {
        uint8_t block[34];
        to_q8_0(v + i, block, v + i);
        put(f, block, sizeof block);
    }
    while ((f->b.len & 31) != 0)
        put(f, "", 1);
    free(v);
}

/* A model's folder as GGUF: matrices in `type` (F32, F16 or Q8_0), vectors in F32 as llama.cpp writes them.
 * `divisors` [hd/2] may be NULL. */
static void make_gguf(struct file *f, const struct st_file *in, const struct shape *s,
                      uint32_t type, const float *divisors)
{
    char name[160];
    uint64_t offset = 0;
    const struct st_tensor *embed = st_find(in, "model.embed_tokens.weight");
    const struct st_tensor *up = st_find(in, "model.layers.0.mlp.up_proj.weight");
    const struct st_tensor freqs = { .name = "rope_freqs.weight", .dtype = DT_F32, .ndim = 1,
                                     .shape = { s->hd / 2 }, .data = (const uint8_t *)divisors,
                                     .bytes = 4 * (size_t)s->hd / 2 };
    begin(f, in->ntensors + (divisors != NULL));
    key_text(f, "general.architecture", s->arch);
    const struct {
        const char *key;
        int v;
    } ints[] = { { "block_count", 2 },
                 { "embedding_length", (int)embed->shape[1] },
                 { "feed_forward_length", (int)up->shape[0] },
                 { "context_length", 128 },
                 { "attention.head_count", s->H },
                 { "attention.head_count_kv", s->G },
                 { "attention.key_length", s->hd } };
    for (size_t i = 0; i < COUNT(ints); i++) {
        snprintf(name, sizeof name, "%s.%s", s->arch, ints[i].key);
        key_int(f, name, (uint32_t)ints[i].v);
    }
    snprintf(name, sizeof name, "%s.attention.layer_norm_rms_epsilon", s->arch);
    key_float(f, name, s->eps);
    snprintf(name, sizeof name, "%s.rope.freq_base", s->arch);
    key_float(f, name, s->theta);
    if (divisors != NULL)
        key_int(f, "llama.rope.scaling.original_context_length", 64);
    put_vocab(f, "gpt-2");
    for (size_t i = 0; i < in->ntensors; i++) {
        gguf_name(in->tensors[i].name, name);
        put_tensor_info(f, name, &in->tensors[i], in->tensors[i].ndim == 2 ? type : 0, &offset);
    }
    if (divisors != NULL)
        put_tensor_info(f, freqs.name, &freqs, 0, &offset);
    while ((f->b.len & 31) != 0)
        put(f, "", 1);
    for (size_t i = 0; i < in->ntensors; i++)
        put_values(f, &in->tensors[i], s, in->tensors[i].ndim == 2 ? type : 0);
    if (divisors != NULL)
        put_values(f, &freqs, s, 0);
    memcpy(f->b.data + 16, &f->nkeys, 8);
}

/* --- models -------------------------------------------------------------------------------------- */
struct fix {
    char dir[64], *gguf, *out, *folder, *ref;
};

static int setup(void **state)
{
    struct fix *f = malloc(sizeof *f);
    support_tmpdir(f->dir);
    f->gguf = path_join(f->dir, "m.gguf");
    f->out = path_join(f->dir, "m.base");
    f->folder = path_join(f->dir, "hf");
    f->ref = path_join(f->dir, "ref.base");
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fix *f = *state;
    support_remove(f->dir);
    free(f->gguf);
    free(f->out);
    free(f->folder);
    free(f->ref);
    free(f);
    return 0;
}

static struct st_file *must_open(const char *path)
{
    struct st_file *f = NULL;
    struct err err = { 0 };
    if (st_open(path, &f, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return f;
}

static void must_import(const char *from, const char *to, const struct base_import_opts *o)
{
    struct err err = { 0 };
    if (base_import(from, to, o, &err) != ERR_OK)
        fail_msg("%s: %s", from, err.msg);
}

/* The folder with its matrices rounded to F16, or to Q8_0 and back to F32. */
static void round_folder(const struct fix *f, const struct st_file *in, uint32_t type,
                         const char *config, size_t len)
{
    char command[120];
    struct st_writer *w;
    snprintf(command, sizeof command, "mkdir -p %s", f->folder);
    assert_int_equal(system(command), 0);
    support_write_file(f->folder, "config.json", config, len);
    char *path = path_join(f->folder, "model.safetensors");
    assert_int_equal(st_writer_open(path, false, &w, NULL), ERR_OK);
    for (size_t i = 0; i < in->ntensors; i++) {
        const struct st_tensor *t = &in->tensors[i];
        const bool f16 = type == 1 && t->ndim == 2;
        assert_int_equal(st_writer_tensor(w, t->name, f16 ? "F16" : "F32", t->ndim, t->shape,
                                          st_count(t) * (f16 ? 2 : 4), NULL), ERR_OK);
    }
    assert_int_equal(st_writer_begin(w, NULL), ERR_OK);
    for (size_t i = 0; i < in->ntensors; i++) {
        const struct st_tensor *t = &in->tensors[i];
        for (size_t k = 0; k < st_count(t); k += 32) {
            float v[32];
            uint8_t block[34];
            const size_t n = st_count(t) - k < 32 ? st_count(t) - k : 32;
            assert_int_equal(st_f32(t, k, n, v, NULL), ERR_OK);
            if (type == 8 && t->ndim == 2)
                to_q8_0(v, block, v);
            for (size_t e = 0; e < n; e++) {
                uint16_t h = f32_to_f16(v[e]);
                assert_int_equal(type == 1 && t->ndim == 2 ? st_writer_data(w, &h, 2, NULL)
                                                           : st_writer_data(w, &v[e], 4, NULL),
                                 ERR_OK);
            }
        }
    }
    assert_int_equal(st_writer_commit(w, NULL), ERR_OK);
    free(path);
}

/* Everything that the model computes with is equal; config and tokenizer may be said otherwise. */
static void same_tensors(const char *a, const char *b, bool same_hash)
{
    struct st_file *x = must_open(a), *y = must_open(b);
    assert_int_equal(x->ntensors, y->ntensors);
    for (size_t i = 0; i < x->ntensors; i++) {
        assert_string_equal(x->tensors[i].name, y->tensors[i].name);
        assert_int_equal(x->tensors[i].bytes, y->tensors[i].bytes);
        if (memcmp(x->tensors[i].data, y->tensors[i].data, x->tensors[i].bytes) != 0)
            fail_msg("%s differs", x->tensors[i].name);
    }
    if (same_hash)
        assert_string_equal(st_meta(x, "lorad.hash"), st_meta(y, "lorad.hash"));
    st_close(x);
    st_close(y);
}

/* The settings that decide what is computed. */
static void same_arch(const char *a, const char *b)
{
    struct base *x = NULL, *y = NULL;
    assert_int_equal(base_load(a, PREC_EXACT, false, &x, NULL), ERR_OK);
    assert_int_equal(base_load(b, PREC_EXACT, false, &y, NULL), ERR_OK);
    assert_string_equal(x->arch.family, y->arch.family);
    assert_int_equal(x->arch.hd, y->arch.hd);
    assert_int_equal(x->arch.V, y->arch.V);
    assert_int_equal(x->arch.tied, y->arch.tied);
    assert_int_equal(x->arch.qkv_bias, y->arch.qkv_bias);
    assert_int_equal(x->arch.bos, y->arch.bos);
    assert_int_equal(x->arch.eos[0], y->arch.eos[0]);
    assert_true(x->arch.norm_eps == y->arch.norm_eps);
    assert_true(x->arch.rope_theta == y->arch.rope_theta);
    assert_int_equal(x->arch.rope_scaling, y->arch.rope_scaling);
    assert_true(x->arch.rope_factor == y->arch.rope_factor);
    assert_true(x->arch.rope_high_freq == y->arch.rope_high_freq);
    assert_true(x->arch.rope_low_freq == y->arch.rope_low_freq);
    assert_int_equal(x->arch.rope_original_max, y->arch.rope_original_max);
    base_free(x);
    base_free(y);
}

/* The golden model as GGUF, in three types, against the same folder. */
static void check_model(struct fix *f, const char *model, const struct shape *s,
                        const float *divisors)
{
    char relative[80], dir[500], *config;
    size_t len;
    snprintf(relative, sizeof relative, "golden/models/%s", model);
    const char *found = support_shared(relative);
    if (found == NULL)
        skip();
    snprintf(dir, sizeof dir, "%s", found);
    char *weights = path_join(dir, "model.safetensors"), *path = path_join(dir, "config.json");
    assert_int_equal(file_read(path, 1 << 20, &config, &len, NULL), ERR_OK);
    struct st_file *in = must_open(weights);
    static const uint32_t kinds[] = { 0, 1, 8 };
    for (size_t k = 0; k < COUNT(kinds); k++) {
        struct file g;
        make_gguf(&g, in, s, kinds[k], divisors);
        support_write_file(f->dir, "m.gguf", g.b.data, g.b.len);
        buf_free(&g.b);
        static const char *const types[] = { "nf4", "f32" };
        for (size_t i = 0; i < COUNT(types); i++) {
            const struct base_import_opts o = { .type = types[i], .name = "m" };
            if (kinds[k] != 0)
                round_folder(f, in, kinds[k], config, len);
            must_import(kinds[k] != 0 ? f->folder : dir, f->ref, &o);
            must_import(f->gguf, f->out, &o);
            same_tensors(f->out, f->ref, kinds[k] != 8); /* other bytes mean the same there */
            same_arch(f->out, f->ref);
        }
    }
    st_close(in);
    free(weights);
    free(path);
    free(config);
}

static void tiny_llama_gives_the_codes_of_its_folder(void **state)
{
    check_model(*state, "tiny-llama", &(struct shape){ .arch = "llama", .H = 4, .G = 2, .hd = 16,
                                                        .eps = 1e-5f, .theta = 10000 }, NULL);
}

static void tiny_qwen2_gives_the_codes_of_its_folder(void **state)
{
    check_model(*state, "tiny-qwen2", &(struct shape){ .arch = "qwen2", .H = 4, .G = 2, .hd = 16,
                                                        .eps = 1e-6f, .theta = 1000000 }, NULL);
}

static void tiny_qwen3_gives_the_codes_of_its_folder(void **state)
{
    check_model(*state, "tiny-qwen3", &(struct shape){ .arch = "qwen3", .H = 4, .G = 2, .hd = 32,
                                                        .eps = 1e-6f, .theta = 1000000 }, NULL);
}

/* Bytes of 4-bit codes that differ, of how many. */
static size_t other_codes(const char *a, const char *b, size_t *ret_all)
{
    struct st_file *x = must_open(a), *y = must_open(b);
    size_t other = 0;
    *ret_all = 0;
    for (size_t i = 0; i < x->ntensors; i++) {
        const struct st_tensor *t = &x->tensors[i], *u = st_find(y, t->name);
        const size_t len = strlen(t->name);
        if (strstr(t->name, "_proj.weight") == NULL || strcmp(t->name + len - 7, ".weight") != 0)
            continue;
        assert_int_equal(t->bytes, u->bytes);
        for (size_t k = 0; k < t->bytes; k++)
            other += t->data[k] != u->data[k];
        *ret_all += t->bytes;
    }
    st_close(x);
    st_close(y);
    return other;
}

static void import_golden(const char *model, const char *to)
{
    char relative[80];
    snprintf(relative, sizeof relative, "golden/models/%s", model);
    const char *dir = support_shared(relative);
    if (dir == NULL)
        skip();
    must_import(dir, to, &(struct base_import_opts){ .type = "nf4", .name = "m" });
}

/* The same fp32 weights as a folder, quantised by bitsandbytes itself, and as GGUF F32: one base,
 * byte for byte.  F16 and BF16 round the weights first, so other codes are right there: those of a
 * folder that was rounded (check_model(), and for BF16 test_import_bnb.c). */
static void a_folder_a_4_bit_checkpoint_and_a_gguf_of_the_same_weights_are_one_base(void **state)
{
    struct fix *f = *state;
    struct shape s = { .arch = "llama", .H = 4, .G = 2, .hd = 16, .eps = 1e-5f, .theta = 10000 };
    size_t all;
    import_golden("tiny-llama", f->ref);
    import_golden("tiny-llama-bnb-4bit", f->out);
    same_tensors(f->out, f->ref, true);
    char *weights = path_join(support_shared("golden/models/tiny-llama"), "model.safetensors");
    struct st_file *in = must_open(weights);
    for (uint32_t kind = 0; kind < 2; kind++) { /* F32, F16 */
        struct file g;
        make_gguf(&g, in, &s, kind, NULL);
        support_write_file(f->dir, "m.gguf", g.b.data, g.b.len);
        buf_free(&g.b);
        must_import(f->gguf, f->out, &(struct base_import_opts){ .type = "nf4", .name = "m" });
        const size_t other = other_codes(f->out, f->ref, &all);
        if (kind == 0)
            same_tensors(f->out, f->ref, true);
        else
            assert_true(other > 0 && other < all / 100);
    }
    st_close(in);
    free(weights);
    /* this one was rounded to BF16 before it was quantised */
    import_golden("tiny-qwen2", f->ref);
    import_golden("tiny-qwen2-bnb-4bit", f->out);
    const size_t other = other_codes(f->out, f->ref, &all);
    assert_true(other > 0 && other < all / 50);
}

/* Divisors as the converter computes them: by wavelength, not by waves per context. */
static void tiny_llama3_gets_its_rope_scaling_back_from_the_divisors(void **state)
{
    float d[16];
    for (int i = 0; i < 16; i++) {
        double wavelength = 2 * 3.14159265358979323846 * pow(500000, 2.0 * i / 32);
        double smooth = (64 / wavelength - 1) / (4 - 1);
        d[i] = (float)(wavelength < 64.0 / 4   ? 1
                       : wavelength > 64.0 / 1 ? 8
                                               : 1 / ((1 - smooth) / 8 + smooth));
    }
    const struct shape s = { .arch = "llama", .H = 4, .G = 1, .hd = 32, .eps = 1e-5f,
                             .theta = 500000 };
    check_model(*state, "tiny-llama3", &s, d);
}

static void a_real_file_imports_and_keeps_its_name_and_tokenizer(void **state)
{
    const struct fix *f = *state;
    struct base *b = NULL;
    const char *path = support_shared("models/llama-2-tiny-random/llama-2-tiny-random.gguf");
    if (path == NULL)
        skip();
    must_import(path, f->out, NULL);
    assert_int_equal(base_load(f->out, PREC_EXACT, false, &b, NULL), ERR_OK);
    assert_string_equal(b->name, "llama-2-tiny-random");
    assert_int_equal(b->arch.V, 32000);
    assert_int_equal(b->arch.max_positions, 4096);
    struct tokenizer *t = NULL;
    assert_int_equal(tokenizer_load(b->tokenizer_json, b->tokenizer_json_len, &t, NULL), ERR_OK);
    struct tok_ids ids = { 0 };
    assert_int_equal(tokenizer_encode(t, "Hello world", 11, true, true, 0, &ids, NULL), ERR_OK);
    const int32_t want[] = { 1, 15043, 3186 }; /* Llama 2's own */
    assert_int_equal(ids.n, 3);
    assert_memory_equal(ids.ids, want, sizeof want);
    free(ids.ids);
    tokenizer_free(t);
    base_free(b);
}

/* --- vocabularies ---------------------------------------------------------------------------------- */
static char *read_shared(const char *name, size_t *ret_len)
{
    char *text;
    const char *path = support_shared(name);
    if (path == NULL)
        skip();
    assert_int_equal(file_read(path, 64 << 20, &text, ret_len, NULL), ERR_OK);
    return text;
}

static struct tokenizer *vocabulary(const char *name)
{
    size_t len;
    struct err err = { 0 };
    struct gguf *g = NULL;
    struct tokenizer *t = NULL;
    char *data = read_shared(name, &len), *json = NULL;
    if (gguf_open_mem(data, len, name, &g, &err) != ERR_OK ||
        gguf_tokenizer(g, &json, &err) != ERR_OK ||
        tokenizer_load(json, strlen(json), &t, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    gguf_close(g);
    free(json);
    free(data);
    return t;
}

static void check_cases(const char *vocab, const char *folder)
{
    static const char mark[] = "\n__ggml_vocab_test__\n";
    char path[100];
    size_t in_len, out_len;
    struct tokenizer *t = vocabulary(vocab);
    snprintf(path, sizeof path, "tokenizers/%s/cases.inp", folder);
    char *in = read_shared(path, &in_len), *at = in;
    snprintf(path, sizeof path, "tokenizers/%s/cases.out", folder);
    char *out = read_shared(path, &out_len), *line = out;
    int cases = 0;
    while (at != NULL && *line != '\0') {
        char *stop = memmem(at, (size_t)(in + in_len - at), mark, strlen(mark));
        struct tok_ids got = { 0 };
        assert_int_equal(tokenizer_encode(t, at, (size_t)((stop ? stop : in + in_len) - at), false,
                                          true, 0, &got, NULL), ERR_OK);
        for (size_t i = 0; i < got.n; i++) {
            long want = strtol(line, &line, 10);
            if (want != got.ids[i])
                fail_msg("%s, case %d: id %zu is %d, not %ld", vocab, cases, i, got.ids[i], want);
        }
        line += strspn(line, " ");
        assert_true(*line == '\n' || *line == '\0');
        line += *line == '\n';
        free(got.ids);
        at = stop ? stop + strlen(mark) : NULL;
        cases++;
    }
    assert_true(cases >= 46);
    tokenizer_free(t);
    free(in);
    free(out);
}

static void gpt2s_vocabulary_answers_every_case(void **state)
{
    (void)state;
    check_cases("tokenizers/gguf-vocab/ggml-vocab-gpt-2.gguf", "gpt2");
}

static void llamas_vocabulary_answers_every_case(void **state)
{
    (void)state;
    check_cases("tokenizers/gguf-vocab/ggml-vocab-llama-spm.gguf", "llama2-tinyllama");
}

/* --- hostile ----------------------------------------------------------------------------------------- */
static void change(struct file *f, const char *from, const char *to)
{
    assert_int_equal(strlen(from), strlen(to));
    char *at = memmem(f->b.data, f->b.len, from, strlen(from));
    assert_non_null(at);
    memcpy(at, to, strlen(to));
}

static void make_small(struct fix *f, struct file *g)
{
    struct support_model m = support_model_default("llama");
    char command[120];
    m.L = 2;
    m.D = 64;
    m.H = 4;
    m.hd = 16;
    m.F = 64;
    m.V = 256;
    m.no_tokenizer = true;
    snprintf(command, sizeof command, "mkdir -p %s", f->folder);
    assert_int_equal(system(command), 0);
    support_model_write(&m, f->folder);
    char *weights = path_join(f->folder, "model.safetensors");
    struct st_file *in = must_open(weights);
    make_gguf(g, in, &(struct shape){ .arch = "llama", .H = 4, .G = 2, .hd = 16, .eps = 1e-5f,
                                      .theta = 10000 }, 1, NULL);
    st_close(in);
    free(weights);
}

static void what_is_not_understood_is_refused_by_name(void **state)
{
    struct fix *f = *state;
    static const struct {
        const char *from, *to, *says;
    } cases[] = {
        { "GGUF", "GGUG", "not a GGUF file" },
        { "GGUF\3", "GGUF\4", "version 4" },
        { "output.weight", "outqut.weight", "tensor outqut.weight does not belong" },
        { "blk.1.ffn_up.weight", "blk.1.ffn_op.weight", "mlp.up_proj.weight is missing" },
        { "blk.1.ffn_up.weight", "blk.2.ffn_up.weight", "model.layers.1.mlp.up_proj.weight" },
        { "blk.1.ffn_up.weight", "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight" },
        { "blk.1.ffn_up.weight", "blk.1.ffn up.weight", "is not 1 to 255 bytes without spaces" },
        { "llama.block_count", "llama.block_coumt", "llama.block_count is missing" },
        { "llama.rope.freq_base", "llama.rope.freq_bass", "llama.rope.freq_bass is not known" },
        { "llama.context_length", "llbma.context_length", "llama.context_length is missing" },
        { "general.architecture", "general.brchitecture", "general.architecture" },
        { "gpt-2", "gpt-9", "\"gpt-9\"" },
        { "gpt2", "bert", "tokenizer.ggml.model is \"bert\"" },
        { "tokenizer.ggml.tokens", "tokenizer.ggml.tocens", "tokenizer.ggml.tokens is missing" },
        { "t255", "t254", "is there twice" },
        { "t255", "t\xff\xff\xff", "is not UTF-8" },
        { "tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id", "is there twice" },
    };
    struct file g, copy;
    make_small(f, &g);
    support_write_file(f->dir, "m.gguf", g.b.data, g.b.len);
    must_import(f->gguf, f->out, NULL); /* as it is, it is fine */
    remove(f->out);
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct err err = { 0 };
        buf_init(&copy.b, 64 << 20);
        put(&copy, g.b.data, g.b.len);
        change(&copy, cases[i].from, cases[i].to);
        support_write_file(f->dir, "m.gguf", copy.b.data, copy.b.len);
        int rc = base_import(f->gguf, f->out, NULL, &err);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("case %zu: code %d, \"%s\"", i, rc, err.msg);
        assert_false(file_exists(f->out));
        buf_free(&copy.b);
    }
    buf_free(&g.b);
}

/* Any change of the file gives a model or a sentence, never anything else (run under sanitizers). */
static void damaged_files_end_in_a_sentence(void **state)
{
    struct fix *f = *state;
    const char *many = getenv("LORAD_FUZZ"); /* rounds, for longer runs by hand */
    const int rounds = many ? atoi(many) : 300;
    struct file g;
    uint64_t seed = 1;
    make_small(f, &g);
    char *last = g.b.data; /* name of the last tensor: what comes after it are only numbers */
    for (char *at = g.b.data; (at = memmem(at, (size_t)(g.b.data + g.b.len - at), ".weight", 7)); at++)
        last = at;
    const size_t header = (size_t)(last - g.b.data) + 64;
    for (int i = 0; i < rounds; i++) {
        struct gguf *x = NULL;
        struct err err = { 0 };
        char *json = NULL, *copy = malloc(g.b.len);
        size_t len = g.b.len;
        memcpy(copy, g.b.data, len);
        for (int k = 0; k < 1 + i % 3; k++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            size_t at = (seed >> 33) % header;
            copy[at] = i % 2 ? (char)(seed >> 20) : (char)(copy[at] ^ 1 << (seed >> 20 & 7));
        }
        if (i % 5 == 0)
            len = (seed >> 30) % len;
        copy = realloc(copy, len + 1);
        int rc = gguf_open_mem(copy, len, "damaged", &x, &err);
        if (rc == ERR_OK)
            rc = gguf_tokenizer(x, &json, &err);
        assert_true(rc == ERR_OK || err.msg[0] != '\0');
        gguf_close(x);
        free(json);
        if (i % 10 == 0 || many) {
            struct err why = { 0 };
            support_write_file(f->dir, "m.gguf", copy, len);
            rc = base_import(f->gguf, f->out, NULL, &why);
            assert_true(rc == ERR_OK || why.msg[0] != '\0');
        }
        free(copy);
    }
    buf_free(&g.b);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_block_type_gives_the_numbers_of_another_program),
        cmocka_unit_test(blocks_done_by_hand),
        T(tiny_llama_gives_the_codes_of_its_folder),
        T(tiny_qwen2_gives_the_codes_of_its_folder),
        T(tiny_qwen3_gives_the_codes_of_its_folder),
        T(a_folder_a_4_bit_checkpoint_and_a_gguf_of_the_same_weights_are_one_base),
        T(tiny_llama3_gets_its_rope_scaling_back_from_the_divisors),
        T(a_real_file_imports_and_keeps_its_name_and_tokenizer),
        cmocka_unit_test(gpt2s_vocabulary_answers_every_case),
        cmocka_unit_test(llamas_vocabulary_answers_every_case),
        T(what_is_not_understood_is_refused_by_name),
        T(damaged_files_end_in_a_sentence),
    };
    return cmocka_run_group_tests_name("gguf", tests, NULL, NULL);
}
