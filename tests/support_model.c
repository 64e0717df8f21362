/* support_model.c - random models for tests; see the header. */
#include "tests/support_model.h"

#include "engine/base_int.h"
#include "engine/safetensors.h"
#include "engine/util.h"

#include <ftw.h>
#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static _Noreturn void die(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fputs("test support: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    abort();
}

static void must(int rc, const struct err *err)
{
    if (rc != ERR_OK)
        die("%s", err->msg);
}

/* --- files ---------------------------------------------------------------------------- */

void support_tmpdir(char ret[64])
{
    const char *tmp = getenv("TMPDIR");
    snprintf(ret, 64, "%s/lorad-test-XXXXXX", tmp && strlen(tmp) < 40 ? tmp : "/tmp");
    if (mkdtemp(ret) == NULL)
        die("cannot make a folder %s", ret);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

void support_remove(const char *dir) { nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS); }

void support_write_file(const char *dir, const char *name, const void *data, size_t len)
{
    char *path = path_join(dir, name);
    FILE *f = path ? fopen(path, "wb") : NULL;
    if (f == NULL || (len > 0 && fwrite(data, len, 1, f) != 1) || fclose(f) != 0)
        die("cannot write %s", path ? path : name);
    free(path);
}

static void write_json(const char *dir, const char *name, json_t *v)
{
    char *text = json_dumps(v, JSON_INDENT(2));
    if (text == NULL)
        die("cannot make %s", name);
    support_write_file(dir, name, text, strlen(text));
    free(text);
    json_decref(v);
}

const char *support_shared(const char *relative)
{
    static _Thread_local char path[1024];
    const char *root = getenv("LORAD_SHARED");
    snprintf(path, sizeof path, "%s/%s", root && *root ? root : "../shared", relative);
    if (access(path, R_OK) == 0)
        return path;
    fprintf(stderr, "SKIPPED: %s is not there (set LORAD_SHARED to the reference files)\n", path);
    return NULL;
}

/* --- weights -------------------------------------------------------------------------- */

static uint64_t splitmix64(uint64_t *s)
{
    uint64_t z = *s += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Sum of four uniforms: near enough to a bell, and the same on every machine. */
void support_model_values(const struct support_model *m, const char *name, float scale,
                          float offset, size_t n, float *ret)
{
    uint64_t s = m->seed * 0x2545f4914f6cdd1du + 1;
    for (const char *p = name; *p != '\0'; p++)
        s = (s ^ (unsigned char)*p) * 0x100000001b3u;
    for (size_t i = 0; i < n; i++) {
        uint64_t r = splitmix64(&s);
        int sum = (int)(r & 0xffff) + (int)(r >> 16 & 0xffff) + (int)(r >> 32 & 0xffff) +
                  (int)(r >> 48) - 2 * 0xffff;
        ret[i] = offset + scale * (float)sum * (1.7320508f / 65536.0f);
    }
}

struct drawn {
    char name[128];
    int rows, cols; /* cols 0: a vector */
    float scale, offset;
};

struct weights {
    struct drawn *list;
    size_t n, cap;
};

static void add(struct weights *w, int rows, int cols, float scale, float offset, const char *fmt,
                ...)
{
    if (w->n == w->cap) {
        w->cap = w->cap ? 2 * w->cap : 64;
        w->list = realloc(w->list, w->cap * sizeof *w->list);
        if (w->list == NULL)
            die("out of memory");
    }
    struct drawn *t = &w->list[w->n++];
    *t = (struct drawn){ .rows = rows, .cols = cols, .scale = scale, .offset = offset };
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(t->name, sizeof t->name, fmt, ap);
    va_end(ap);
}

static void list_layer(const struct support_model *m, int l, struct weights *w)
{
    bool qwen2 = strcmp(m->family, "qwen2") == 0;
    int q = m->H * m->hd, kv = m->G * m->hd;
    const struct {
        const char *name;
        int out, in;
        bool bias;
    } mods[] = {
        { "self_attn.q_proj", q, m->D, m->attention_bias || qwen2 },
        { "self_attn.k_proj", kv, m->D, m->attention_bias || qwen2 },
        { "self_attn.v_proj", kv, m->D, m->attention_bias || qwen2 },
        { "self_attn.o_proj", m->D, q, m->attention_bias && !qwen2 },
        { "mlp.gate_proj", m->F, m->D, m->mlp_bias },
        { "mlp.up_proj", m->F, m->D, m->mlp_bias },
        { "mlp.down_proj", m->D, m->F, m->mlp_bias },
    };
    for (size_t i = 0; i < sizeof mods / sizeof mods[0]; i++) {
        float scale = 1 / sqrtf((float)mods[i].in);
        add(w, mods[i].out, mods[i].in, scale, 0, "model.layers.%d.%s.weight", l, mods[i].name);
        if (mods[i].bias)
            add(w, mods[i].out, 0, 0.1f, 0, "model.layers.%d.%s.bias", l, mods[i].name);
    }
    add(w, m->D, 0, 0.1f, 1, "model.layers.%d.input_layernorm.weight", l);
    add(w, m->D, 0, 0.1f, 1, "model.layers.%d.post_attention_layernorm.weight", l);
    if (strcmp(m->family, "qwen3") == 0) {
        add(w, m->hd, 0, 0.1f, 1, "model.layers.%d.self_attn.q_norm.weight", l);
        add(w, m->hd, 0, 0.1f, 1, "model.layers.%d.self_attn.k_norm.weight", l);
    }
}

static size_t count_of(const struct drawn *t)
{
    return (size_t)t->rows * (size_t)(t->cols ? t->cols : 1);
}

static void write_weight(const struct support_model *m, const struct drawn *t,
                         struct st_writer *w)
{
    struct err err = { 0 };
    size_t n = count_of(t);
    float *v = malloc(n * sizeof *v);
    if (v == NULL)
        die("out of memory");
    support_model_values(m, t->name, t->scale, t->offset, n, v);
    if (m->dtype != DT_F32) { /* in place: element i is read before bytes 2i, 2i+1 are written */
        uint8_t *out = (uint8_t *)v;
        for (size_t i = 0; i < n; i++) {
            float x;
            memcpy(&x, out + 4 * i, 4);
            uint16_t h = m->dtype == DT_BF16 ? f32_to_bf16(x) : f32_to_f16(x);
            memcpy(out + 2 * i, &h, 2);
        }
    }
    must(st_writer_data(w, v, n * dtype_size(m->dtype), &err), &err);
    free(v);
}

/* Frees the list. */
static void write_list(const struct support_model *m, struct weights *w, const char *dir)
{
    static const char *const names[] = { "F32", "F16", "BF16" };
    struct st_writer *out;
    struct err err = { 0 };
    char *path = path_join(dir, "model.safetensors");
    must(st_writer_open(path, false, &out, &err), &err);
    must(st_writer_meta(out, "format", "pt", 2, &err), &err);
    for (size_t i = 0; i < w->n; i++) {
        const struct drawn *t = &w->list[i];
        must(st_writer_tensor(out, t->name, names[m->dtype], t->cols ? 2 : 1,
                              (const int64_t[]){ t->rows, t->cols },
                              count_of(t) * dtype_size(m->dtype), &err),
             &err);
    }
    must(st_writer_begin(out, &err), &err);
    for (size_t i = 0; i < w->n; i++)
        write_weight(m, &w->list[i], out);
    must(st_writer_commit(out, &err), &err);
    free(path);
    free(w->list);
}

static void write_weights(const struct support_model *m, const char *dir)
{
    struct weights w = { 0 };
    add(&w, m->V, m->D, 1, 0, "model.embed_tokens.weight");
    for (int l = 0; l < m->L; l++)
        list_layer(m, l, &w);
    add(&w, m->D, 0, 0.1f, 1, "model.norm.weight");
    if (!m->tied)
        add(&w, m->V, m->D, 2 / sqrtf((float)m->D), 0, "lm_head.weight");
    write_list(m, &w, dir);
}

/* --- config.json ---------------------------------------------------------------------- */

static void write_config(const struct support_model *m, const char *dir)
{
    const struct family *f = family_find(m->family);
    if (f == NULL)
        die("no family %s", m->family);
    bool qwen = strncmp(m->family, "qwen", 4) == 0;
    json_t *o = json_pack("{s:[s], s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:b, s:i, "
                          "s:i, s:s}",
                          "architectures", f->architecture[0], "model_type", m->family, "hidden_act",
                          "silu", "hidden_size", m->D, "intermediate_size", m->F,
                          "num_hidden_layers", m->L, "num_attention_heads", m->H,
                          "num_key_value_heads", m->G, "head_dim", m->hd, "vocab_size", m->V,
                          "max_position_embeddings", m->max_positions, "rms_norm_eps", 1e-5,
                          "tie_word_embeddings", m->tied, "bos_token_id", 1, "eos_token_id", 2,
                          "transformers_version", m->old_spelling ? "4.40.0" : "5.0.0");
    if (strcmp(m->family, "qwen2") != 0)
        json_object_set_new(o, "attention_bias", json_boolean(m->attention_bias));
    if (strcmp(m->family, "llama") == 0)
        json_object_set_new(o, "mlp_bias", json_boolean(m->mlp_bias));
    if (qwen) {
        json_object_set_new(o, "use_sliding_window", json_boolean(m->window > 0));
        json_object_set_new(o, "max_window_layers", json_integer(m->L / 2));
    }
    if (qwen || strcmp(m->family, "mistral") == 0)
        json_object_set_new(o, "sliding_window", m->window ? json_integer(m->window) : json_null());
    if (m->old_spelling) {
        json_object_set_new(o, "rope_theta", json_real(10000));
        json_object_set_new(o, "rope_scaling", json_null());
    } else {
        json_object_set_new(o, "rope_parameters", json_pack("{s:f, s:s}", "rope_theta", 10000.0,
                                                            "rope_type", "default"));
    }
    write_json(dir, "config.json", o);
    write_json(dir, "generation_config.json", json_pack("{s:i, s:i}", "bos_token_id", 1,
                                                        "eos_token_id", 2));
}

/* --- tokenizer.json ------------------------------------------------------------------- */

static const char *const specials[] = { "<pad>", "<s>", "</s>" };
enum { NSPECIALS = 3, FIRST_MERGE = NSPECIALS + 256 };

/* Pairs of letters of English; a space is written as a space here. */
static const char merges[][2][5] = {
    { " ", "t" },  { "h", "e" },   { " ", "a" },   { "i", "n" },  { "r", "e" },  { "o", "n" },
    { " t", "he" }, { "e", "r" },  { " ", "s" },   { "a", "t" },  { " ", "w" },  { " ", "o" },
    { "e", "n" },  { " ", "c" },   { "i", "t" },   { "i", "s" },  { "a", "n" },  { "o", "r" },
    { "e", "s" },  { " ", "b" },   { "e", "d" },   { " ", "f" },  { "in", "g" }, { " ", "p" },
    { "o", "u" },  { " a", "n" },  { "a", "l" },   { "a", "r" },  { " t", "o" }, { " ", "m" },
    { " o", "f" }, { " ", "in" },  { " ", "d" },   { " ", "h" },  { " an", "d" }, { "i", "c" },
    { "a", "s" },  { "l", "e" },   { " t", "h" },  { "i", "on" }, { "o", "m" },  { "l", "l" },
    { "en", "t" }, { " ", "n" },   { " ", "l" },   { "s", "t" },  { " ", "re" }, { "v", "e" },
    { " ", "e" },  { "r", "o" },   { "l", "y" },   { " b", "e" }, { " ", "g" },  { " ", "T" },
    { "c", "t" },  { " ", "S" },   { "i", "d" },   { "o", "t" },  { " ", "I" },  { "u", "t" },
    { "e", "t" },
};
enum { NMERGES = sizeof merges / sizeof merges[0] };

/* GPT-2's printable stand-in for a byte, as UTF-8. */
static void byte_char(unsigned byte, char ret[4])
{
    unsigned cp = byte;
    if (!((byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174))
        cp = byte <= 32 ? 256 + byte : byte <= 160 ? 256 + 33 + byte - 127 : 256 + 67;
    if (cp < 0x80) {
        ret[0] = (char)cp;
        ret[1] = '\0';
    } else {
        ret[0] = (char)(0xc0 | cp >> 6);
        ret[1] = (char)(0x80 | (cp & 0x3f));
        ret[2] = '\0';
    }
}

static void spell(const char *part, char ret[16])
{
    ret[0] = '\0';
    for (; *part != '\0'; part++)
        byte_char((unsigned char)*part, ret + strlen(ret));
}

static json_t *template_piece(const char *kind, const char *id)
{
    return json_pack("{s:{s:s, s:i}}", kind, "id", id, "type_id", 0);
}

static json_t *tokenizer_model(int V)
{
    json_t *vocab = json_object(), *list = json_array();
    for (int i = 0; i < NSPECIALS; i++)
        json_object_set_new(vocab, specials[i], json_integer(i));
    for (unsigned b = 0; b < 256; b++) {
        char c[4];
        byte_char(b, c);
        json_object_set_new(vocab, c, json_integer(NSPECIALS + (int)b));
    }
    for (int i = 0; i < NMERGES && FIRST_MERGE + i < V; i++) {
        char a[16], b[16], pair[33], whole[33];
        spell(merges[i][0], a);
        spell(merges[i][1], b);
        snprintf(pair, sizeof pair, "%s %s", a, b);
        snprintf(whole, sizeof whole, "%s%s", a, b);
        if (json_object_get(vocab, whole) != NULL)
            die("merge %s is there twice", pair);
        json_object_set_new(vocab, whole, json_integer(FIRST_MERGE + i));
        json_array_append_new(list, json_string(pair));
    }
    return json_pack("{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:b, s:o, s:o}", "type", "BPE", "dropout",
                     "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0,
                     "byte_fallback", 0, "ignore_merges", 0, "vocab", vocab, "merges", list);
}

static void write_tokenizer(const struct support_model *m, const char *dir)
{
    if (m->V < FIRST_MERGE)
        die("a vocabulary of %d is too small for a tokenizer", m->V);
    json_t *added = json_array();
    for (int i = 0; i < NSPECIALS; i++)
        json_array_append_new(
            added, json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", i, "content", specials[i],
                             "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special",
                             1));
    json_t *post = json_pack(
        "{s:s, s:[o,o], s:[o,o,o,o], s:{s:{s:s, s:[i], s:[s]}}}", "type", "TemplateProcessing",
        "single", template_piece("SpecialToken", "<s>"), template_piece("Sequence", "A"), "pair",
        template_piece("SpecialToken", "<s>"), template_piece("Sequence", "A"),
        template_piece("SpecialToken", "<s>"), template_piece("Sequence", "B"), "special_tokens",
        "<s>", "id", "<s>", "ids", 1, "tokens", "<s>");
    json_t *level = json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0,
                              "trim_offsets", 1, "use_regex", 1);
    json_t *o = json_pack("{s:s, s:n, s:n, s:o, s:n, s:O, s:o, s:o, s:o}", "version", "1.0",
                          "truncation", "padding", "added_tokens", added, "normalizer",
                          "pre_tokenizer", level, "post_processor", post, "decoder", level, "model",
                          tokenizer_model(m->V));
    if (o == NULL)
        die("cannot make tokenizer.json");
    write_json(dir, "tokenizer.json", o);
    write_json(dir, "tokenizer_config.json",
               json_pack("{s:s, s:s, s:s, s:b, s:s}", "tokenizer_class", "PreTrainedTokenizerFast",
                         "bos_token", "<s>", "eos_token", "</s>", "add_bos_token", 1,
                         "chat_template",
                         "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: "
                         "{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
                         "{% if add_generation_prompt %}assistant: {% endif %}"));
}

/* --- public --------------------------------------------------------------------------- */

struct support_model support_model_default(const char *family)
{
    return (struct support_model){ .family = family, .D = 128, .H = 4, .G = 2, .hd = 32, .F = 256,
                                   .L = 3, .V = 320, .max_positions = 512, .dtype = DT_F32,
                                   .seed = 1 };
}

void support_model_write(const struct support_model *m, const char *dir)
{
    write_config(m, dir);
    write_weights(m, dir);
    if (!m->no_tokenizer)
        write_tokenizer(m, dir);
}

/* Weights of a model as the engine lists them, in the shape that the family's files have. */
static void list_weights(const struct arch *a, struct weights *w)
{
    const struct family *f = family_find(a->family);
    struct weight *list;
    struct err err = { 0 };
    size_t n;
    must(base_weights(a, &list, &n, &err), &err);
    for (size_t i = 0; i < n; i++) {
        const struct weight *e = &list[i];
        const bool turned = e->kind == W_LINEAR && f->transposed, vector = e->K == 0;
        const float offset = e->kind == W_NORM && f->norm_kind != NORM_RMS_PLUS_ONE ? 1 : 0;
        const float scale = vector ? 0.1f : e->kind == W_LINEAR ? 1 / sqrtf((float)e->K) : 0.5f;
        if (e->kind != W_HEAD || !a->tied)
            add(w, turned ? e->K : e->N, turned ? e->N : e->K, scale, offset, "%s", e->name);
    }
    free(list);
}

void support_config_write(const char *config, uint64_t seed, const char *dir)
{
    const struct support_model m = { .seed = seed, .dtype = DT_F32 };
    struct weights w = { 0 };
    struct arch a;
    struct err err = { 0 };
    must(arch_from_config(config, NULL, &a, &err), &err);
    support_write_file(dir, "config.json", config, strlen(config));
    list_weights(&a, &w);
    write_list(&m, &w, dir);
}
