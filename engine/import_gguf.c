/* import_gguf.c - a GGUF file as a source: its metadata become a config.json, its vocabulary a
 * tokenizer.json, its tensors get Hugging Face's names.
 *
 * Two things in it are not as in the folder it was made from.  Rows of q and k of a Llama are in
 * another order: llama.cpp rotates neighbours, so row 2i + j of a head is row i + j * hd/2 of the
 * original (j = 0, 1).  And Llama 3's rope scaling is a tensor of divisors, rope_freqs.weight, from
 * which the settings are found again. */
#include "engine/gguf.h"
#include "engine/import_int.h"
#include "engine/tok_make.h"

#include <jansson.h>
#include <libgen.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct gg {
    struct source *s;
    struct gguf *g;
    struct st_file *st;   /* the same tensors, by Hugging Face's names */
    char arch[24];        /* general.architecture */
    json_t *config;
};

/* --- names ---------------------------------------------------------------------------- */

static const struct {
    const char *gguf, *hf;
} model_names[] = {
    { "token_embd.weight", "model.embed_tokens.weight" },
    { "output_norm.weight", "model.norm.weight" },
    { "output.weight", "lm_head.weight" },
}, layer_names[] = {
    { "attn_norm", "input_layernorm" },      { "attn_q", "self_attn.q_proj" },
    { "attn_k", "self_attn.k_proj" },        { "attn_v", "self_attn.v_proj" },
    { "attn_output", "self_attn.o_proj" },   { "attn_q_norm", "self_attn.q_norm" },
    { "attn_k_norm", "self_attn.k_norm" },   { "ffn_norm", "post_attention_layernorm" },
    { "ffn_gate", "mlp.gate_proj" },         { "ffn_up", "mlp.up_proj" },
    { "ffn_down", "mlp.down_proj" },
};
#define COUNT(t) (sizeof(t) / sizeof(t)[0])

enum { NAME_BYTES = 320 };

/* A name that stands for nothing keeps itself, and the tensor is refused later by that name. */
static void hf_name(const char *name, char ret[NAME_BYTES])
{
    snprintf(ret, NAME_BYTES, "%s", name);
    for (size_t i = 0; i < COUNT(model_names); i++)
        if (strcmp(name, model_names[i].gguf) == 0)
            snprintf(ret, NAME_BYTES, "%s", model_names[i].hf);
    size_t digits = strncmp(name, "blk.", 4) == 0 ? strspn(name + 4, "0123456789") : 0;
    if (digits == 0 || name[4 + digits] != '.')
        return;
    const char *part = name + 4 + digits + 1, *dot = strchr(part, '.');
    for (size_t i = 0; dot != NULL && i < COUNT(layer_names); i++)
        if (strncmp(part, layer_names[i].gguf, (size_t)(dot - part)) == 0 &&
            layer_names[i].gguf[dot - part] == '\0')
            snprintf(ret, NAME_BYTES, "model.layers.%.*s.%s%s", (int)digits, name + 4,
                     layer_names[i].hf, dot);
}

static void to_st(const struct gguf_tensor *from, const char *name, struct st_tensor *t)
{
    static const enum dtype plain[] = { DT_F32, DT_F16, DT_BF16 };
    static const char *const names[] = { "F32", "F16", "BF16" };
    *t = (struct st_tensor){ .name = name, .dtype = DT_OTHER, .data = from->data,
                             .bytes = from->bytes, .ndim = from->ndim };
    snprintf(t->dtype_name, sizeof t->dtype_name, "%s", from->type->name);
    memcpy(t->shape, from->dims, sizeof from->dims);
    for (size_t i = 0; i < COUNT(plain); i++)
        if (strcmp(from->type->name, names[i]) == 0)
            t->dtype = plain[i];
}

static int make_tensors(struct gg *x, struct err *err)
{
    const size_t n = x->g->ntensors;
    char *names = malloc((n + 1) * NAME_BYTES);
    x->st->names = names;
    x->st->tensors = calloc(n + 1, sizeof *x->st->tensors);
    if (names == NULL || x->st->tensors == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < n; i++) {
        char name[256]; /* gguf.c checked the length */
        const struct gguf_tensor *t = &x->g->tensors[i];
        snprintf(name, sizeof name, "%.*s", (int)t->name.len, t->name.s);
        hf_name(name, names + i * NAME_BYTES);
        to_st(t, names + i * NAME_BYTES, &x->st->tensors[i]);
    }
    x->st->ntensors = n;
    return ERR_OK;
}

/* What makes numbers of the tensors, besides their type. */
static void mark_tensors(struct gg *x)
{
    struct source *s = x->s;
    for (size_t i = 0; i < s->ntensors; i++) {
        struct source_tensor *e = &s->tensors[i];
        const char *name = e->t->name;
        if (e->t->dtype == DT_OTHER)
            e->blocks = x->g->tensors[e->t - x->st->tensors].type;
        if (strcmp(x->arch, "llama") == 0 &&
            (strstr(name, ".self_attn.q_proj.") || strstr(name, ".self_attn.k_proj.")))
            e->head_rows = s->arch.hd;
        e->used |= strcmp(name, "rope_freqs.weight") == 0;
    }
}

/* --- config ---------------------------------------------------------------------------- */

/* "llama.block_count" */
static struct part_name key_of(const struct gg *x, const char *key)
{
    struct part_name p;
    snprintf(p.s, sizeof p.s, "%s.%s", x->arch, key);
    return p;
}

/* An integer of the metadata into the config; a missing one is an error if it is `required`. */
static int copy_int(struct gg *x, const char *key, const char *to, bool required, struct err *err)
{
    int64_t v = 0;
    bool there = false;
    int rc = gguf_int(x->g, key_of(x, key).s, 0, INT32_MAX, &v, &there, err);
    if (rc == ERR_OK && there)
        json_object_set_new(x->config, to, json_integer(v));
    if (rc == ERR_OK && !there && required)
        rc = err_set(err, ERR_INVALID, "GGUF key %s is missing", key_of(x, key).s);
    return rc;
}

static int copy_shapes(struct gg *x, struct err *err)
{
    static const struct {
        const char *key, *to;
        bool required;
    } fields[] = {
        { "block_count", "num_hidden_layers", true },
        { "embedding_length", "hidden_size", true },
        { "feed_forward_length", "intermediate_size", true },
        { "context_length", "max_position_embeddings", true },
        { "attention.head_count", "num_attention_heads", true },
        { "attention.head_count_kv", "num_key_value_heads", false },
        { "attention.key_length", "head_dim", false },
    };
    int rc = ERR_OK;
    for (size_t i = 0; i < COUNT(fields) && rc == ERR_OK; i++)
        rc = copy_int(x, fields[i].key, fields[i].to, fields[i].required, err);
    if (rc != ERR_OK)
        return rc;
    json_int_t D = json_integer_value(json_object_get(x->config, "hidden_size"));
    json_int_t H = json_integer_value(json_object_get(x->config, "num_attention_heads"));
    if (json_object_get(x->config, "num_key_value_heads") == NULL)
        json_object_set_new(x->config, "num_key_value_heads", json_integer(H));
    if (json_object_get(x->config, "head_dim") == NULL && H > 0 && D % H == 0)
        json_object_set_new(x->config, "head_dim", json_integer(D / H));
    return ERR_OK;
}

/* Heads of keys, values and rotation are all as wide as head_dim. */
static int check_widths(const struct gg *x, struct err *err)
{
    static const char *const keys[] = { "attention.value_length", "rope.dimension_count" };
    json_int_t hd = json_integer_value(json_object_get(x->config, "head_dim"));
    int rc = ERR_OK;
    for (size_t i = 0; i < COUNT(keys) && rc == ERR_OK; i++) {
        int64_t v = hd;
        rc = gguf_int(x->g, key_of(x, keys[i]).s, 0, INT32_MAX, &v, NULL, err);
        if (rc == ERR_OK && v != hd)
            rc = err_set(err, ERR_INVALID, "GGUF key %s is %lld, where the heads are %lld wide",
                         key_of(x, keys[i]).s, (long long)v, (long long)hd);
    }
    return rc;
}

/* A key of the architecture that is not here could change the result. */
static int check_keys(const struct gg *x, struct err *err)
{
    static const char *const known[] = {
        "block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size",
        "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
        "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout",
    };
    const size_t prefix = strlen(x->arch);
    for (size_t i = 0; i < x->g->nkeys; i++) {
        const struct gguf_text name = x->g->keys[i].name;
        if (name.len <= prefix + 1 || memcmp(name.s, x->arch, prefix) != 0 || name.s[prefix] != '.')
            continue;
        size_t k = 0;
        while (k < COUNT(known) && (strlen(known[k]) != name.len - prefix - 1 ||
                                    memcmp(known[k], name.s + prefix + 1, strlen(known[k])) != 0))
            k++;
        int64_t experts = 0; /* written as 0 for models that have none */
        char text[256];
        snprintf(text, sizeof text, "%.*s", (int)name.len, name.s);
        if (k == COUNT(known) && !(strstr(text, ".expert_") != NULL &&
                                   gguf_int(x->g, text, 0, 0, &experts, NULL, NULL) == ERR_OK))
            return err_set(err, ERR_INVALID, "GGUF key %s is not known for this architecture",
                           text);
    }
    return ERR_OK;
}

/* --- rope ------------------------------------------------------------------------------ */

static void set_llama3(struct gg *x, double factor, double high, int64_t original)
{
    json_object_set_new(x->config, "rope_scaling",
                        json_pack("{s:s, s:f, s:f, s:f, s:I}", "rope_type", "llama3", "factor",
                                  factor, "low_freq_factor", 1.0, "high_freq_factor", high,
                                  "original_max_position_embeddings", (json_int_t)original));
}

/* What Llama 3 divides frequency i by, with low_freq_factor 1. */
static double divisor(double theta, int i, int hd, double factor, double high, int64_t original)
{
    const double pi = 3.14159265358979323846;
    double waves = (double)original * pow(theta, -2.0 * i / hd) / (2 * pi);
    double keep = (waves - 1) / (high - 1);
    keep = keep < 0 ? 0 : keep > 1 ? 1 : keep;
    return 1 / ((1 - keep) / factor + keep);
}

/* The divisors are those of Llama 3 for a factor, with the settings that all its models have but
 * for the length they were trained with first. */
static int read_divisors(struct gg *x, double theta, const struct st_tensor *t, struct err *err)
{
    int hd = (int)json_integer_value(json_object_get(x->config, "head_dim"));
    int64_t original = 8192;
    float d[1 << 11];
    int rc = gguf_int(x->g, key_of(x, "rope.scaling.original_context_length").s, 1, INT32_MAX,
                      &original, NULL, err);
    if (rc != ERR_OK)
        return rc;
    if (t->ndim != 1 || t->shape[0] * 2 != hd || t->shape[0] > (int64_t)COUNT(d))
        return err_set(err, ERR_INVALID, "tensor rope_freqs.weight has no number for each half "
                                         "of a head of %d", hd);
    rc = st_f32(t, 0, (size_t)t->shape[0], d, err);
    double factor = 1;
    for (int i = 0; i < hd / 2 && rc == ERR_OK; i++)
        factor = (double)d[i] > factor ? (double)d[i] : factor;
    for (int i = 0; i < hd / 2 && rc == ERR_OK; i++)
        if (!(fabs((double)d[i] / divisor(theta, i, hd, factor, 4, original) - 1) < 1e-4))
            return err_set(err, ERR_INVALID,
                           "tensor rope_freqs.weight: %g at %d is not what Llama 3's scaling by %g "
                           "from %lld positions gives",
                           (double)d[i], i, factor, (long long)original);
    if (rc == ERR_OK && factor > 1)
        set_llama3(x, factor, 4, original);
    return rc;
}

static bool is(struct gguf_text t, const char *s)
{
    return t.len == strlen(s) && memcmp(t.s, s, t.len) == 0;
}

static int copy_rope(struct gg *x, struct err *err)
{
    double theta = 10000, factor = 1;
    struct gguf_text type;
    int rc = gguf_double(x->g, key_of(x, "rope.freq_base").s, &theta, NULL, err);
    if (rc == ERR_OK)
        rc = gguf_double(x->g, key_of(x, "rope.scaling.factor").s, &factor, NULL, err);
    if (rc == ERR_OK)
        rc = gguf_string(x->g, key_of(x, "rope.scaling.type").s, &type, err);
    if (rc != ERR_OK)
        return rc;
    json_object_set_new(x->config, "rope_theta", json_real(theta));
    const struct source_tensor *freqs = source_find(x->s, "rope_freqs.weight");
    if (type.s == NULL || is(type, "none"))
        return freqs ? read_divisors(x, theta, freqs->t, err) : ERR_OK;
    if (!is(type, "linear") || freqs != NULL)
        return err_set(err, ERR_INVALID,
                       "GGUF key %s.rope.scaling.type is \"%.*s\"; none and linear are supported, "
                       "and rope_freqs.weight as Llama 3 has it",
                       x->arch, (int)(type.len < 40 ? type.len : 40), type.s);
    json_object_set_new(x->config, "rope_scaling",
                        json_pack("{s:s, s:f}", "rope_type", "linear", "factor", factor));
    return ERR_OK;
}

/* --- vocabulary ------------------------------------------------------------------------ */

/* An array of `n` elements of this kind; NULL if there is none and it may be missing. */
static int find_array(const struct gg *x, const char *name, enum gguf_kind kind, size_t n,
                      const struct gguf_key **ret, struct err *err)
{
    const struct gguf_key *k = *ret = gguf_find(x->g, name);
    if (k != NULL && (!k->is_array || k->kind != kind || (n != 0 && k->n != n)))
        return err_set(err, ERR_INVALID, "GGUF key %s is no array of the type or length needed",
                       name);
    return ERR_OK;
}

static int read_pieces(const struct gg *x, struct vocab *v, struct piece **ret_pieces,
                       struct err *err)
{
    const struct gguf_key *tokens, *scores = NULL, *types = NULL;
    int rc = find_array(x, "tokenizer.ggml.tokens", GGUF_STRING, 0, &tokens, err);
    if (rc == ERR_OK && tokens == NULL)
        rc = err_set(err, ERR_INVALID, "GGUF key tokenizer.ggml.tokens is missing");
    if (rc == ERR_OK)
        rc = find_array(x, "tokenizer.ggml.scores", GGUF_F32, tokens->n, &scores, err);
    if (rc == ERR_OK)
        rc = find_array(x, "tokenizer.ggml.token_type", GGUF_I32, tokens->n, &types, err);
    if (rc != ERR_OK)
        return rc;
    struct piece *p = *ret_pieces = calloc(tokens->n + 1, sizeof *p);
    if (p == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < tokens->n; i++) {
        int32_t type = types ? gguf_i32_at(types, i) : PIECE_NORMAL;
        p[i] = (struct piece){ .s = tokens->texts[i].s, .len = tokens->texts[i].len,
                               .score = scores ? gguf_f32_at(scores, i) : 0,
                               .type = type < 0 || type > PIECE_BYTE ? (enum piece_type)0
                                                                     : (enum piece_type)type };
    }
    v->pieces = p;
    v->n = tokens->n;
    return ERR_OK;
}

static int read_merges(const struct gg *x, struct vocab *v, struct piece_merge **ret,
                       struct err *err)
{
    const struct gguf_key *k;
    int rc = find_array(x, "tokenizer.ggml.merges", GGUF_STRING, 0, &k, err);
    if (rc != ERR_OK || k == NULL)
        return rc;
    struct piece_merge *m = *ret = calloc(k->n + 1, sizeof *m);
    if (m == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < k->n; i++)
        m[i] = (struct piece_merge){ k->texts[i].s, k->texts[i].len };
    v->merges = m;
    v->nmerges = k->n;
    return ERR_OK;
}

static int read_ids(const struct gg *x, struct vocab *v, struct err *err)
{
    const struct {
        const char *key;
        int *ret;
    } ids[] = { { "tokenizer.ggml.bos_token_id", &v->bos },
                { "tokenizer.ggml.eos_token_id", &v->eos },
                { "tokenizer.ggml.unknown_token_id", &v->unk } };
    int rc = ERR_OK;
    for (size_t i = 0; i < COUNT(ids) && rc == ERR_OK; i++) {
        int64_t id = *ids[i].ret;
        rc = gguf_int(x->g, ids[i].key, 0, INT32_MAX, &id, NULL, err);
        *ids[i].ret = (int)id;
    }
    if (rc == ERR_OK)
        rc = gguf_bool(x->g, "tokenizer.ggml.add_bos_token", &v->add_bos, err);
    if (rc == ERR_OK)
        rc = gguf_bool(x->g, "tokenizer.ggml.add_eos_token", &v->add_eos, err);
    if (rc == ERR_OK)
        rc = gguf_bool(x->g, "tokenizer.ggml.add_space_prefix", &v->prefix_space, err);
    return rc;
}

static int make_bytelevel(const struct gg *x, struct vocab *v, char **ret, struct err *err)
{
    struct gguf_text pre;
    struct piece_merge *merges = NULL;
    char name[64];
    int rc = gguf_string(x->g, "tokenizer.ggml.pre", &pre, err);
    if (rc != ERR_OK)
        return rc;
    if (pre.s == NULL || pre.len >= sizeof name)
        return err_set(err, ERR_INVALID,
                       "GGUF key tokenizer.ggml.pre is missing or too long: the file does not say "
                       "how words are cut");
    snprintf(name, sizeof name, "%.*s", (int)pre.len, pre.s);
    v->add_bos = tok_make_adds_bos(name);
    rc = read_ids(x, v, err);
    if (rc == ERR_OK)
        rc = read_merges(x, v, &merges, err);
    if (rc == ERR_OK)
        rc = tok_make_bytelevel(v, name, ret, err);
    free(merges);
    return rc;
}

static int make_spm(const struct gg *x, struct vocab *v, char **ret, struct err *err)
{
    v->bos = 1;
    v->eos = 2;
    v->unk = 0;
    v->add_bos = v->prefix_space = true;
    int rc = read_ids(x, v, err);
    return rc == ERR_OK ? tok_make_spm(v, ret, err) : rc;
}

/* *ret_ids: bos and the tokens that end a text, as config.json has them. */
static int make_tokenizer(const struct gg *x, char **ret_json, char **ret_config, json_t *ret_ids,
                          struct err *err)
{
    struct vocab v = { .bos = -1, .eos = -1, .unk = -1 };
    struct gguf_text model;
    struct piece *pieces = NULL;
    int rc = gguf_string(x->g, "tokenizer.ggml.model", &model, err);
    if (rc == ERR_OK && !is(model, "gpt2") && !is(model, "llama"))
        rc = err_set(err, ERR_INVALID,
                     "GGUF key tokenizer.ggml.model is \"%.*s\"; gpt2 and llama are read",
                     (int)(model.len < 40 ? model.len : 40), model.s ? model.s : "");
    if (rc == ERR_OK)
        rc = read_pieces(x, &v, &pieces, err);
    if (rc == ERR_OK)
        rc = is(model, "gpt2") ? make_bytelevel(x, &v, ret_json, err)
                               : make_spm(x, &v, ret_json, err);
    if (rc == ERR_OK)
        rc = tok_make_config(&v, ret_config, err);
    int64_t eot = -1;
    if (rc == ERR_OK)
        rc = gguf_int(x->g, "tokenizer.ggml.eot_token_id", 0, INT32_MAX, &eot, NULL, err);
    free(pieces);
    if (rc != ERR_OK)
        return rc;
    json_t *ends = json_array();
    if (v.bos >= 0)
        json_object_set_new(ret_ids, "bos_token_id", json_integer(v.bos));
    if (v.eos >= 0)
        json_array_append_new(ends, json_integer(v.eos));
    if (eot >= 0 && eot != v.eos)
        json_array_append_new(ends, json_integer(eot));
    json_object_set_new(ret_ids, "eos_token_id", ends);
    return ERR_OK;
}

int gguf_tokenizer(const struct gguf *g, char **ret_json, struct err *err)
{
    const struct gg x = { .g = (struct gguf *)g };
    char *config = NULL;
    json_t *ids = json_object();
    int rc = make_tokenizer(&x, ret_json, &config, ids, err);
    json_decref(ids);
    free(config);
    return rc;
}

/* --- all of it -------------------------------------------------------------------------- */

static int read_arch(struct gg *x, struct err *err)
{
    struct gguf_text arch;
    int rc = gguf_string(x->g, "general.architecture", &arch, err);
    if (rc == ERR_OK && !is(arch, "llama") && !is(arch, "qwen2") && !is(arch, "qwen3"))
        rc = err_set(err, ERR_INVALID,
                     "GGUF key general.architecture is \"%.*s\"; llama (Mistral too), qwen2 and "
                     "qwen3 are read",
                     (int)(arch.len < 40 ? arch.len : 40), arch.s ? arch.s : "");
    if (rc == ERR_OK)
        snprintf(x->arch, sizeof x->arch, "%.*s", (int)arch.len, arch.s);
    return rc;
}

static int make_config(struct gg *x, struct err *err)
{
    const struct source_tensor *embed = source_find(x->s, "model.embed_tokens.weight");
    double eps = 0;
    bool there = false;
    if (embed == NULL)
        return err_set(err, ERR_INVALID, "tensor token_embd.weight is missing");
    json_object_set_new(x->config, "model_type", json_string(x->arch));
    json_object_set_new(x->config, "vocab_size", json_integer(embed->t->shape[0]));
    json_object_set_new(x->config, "tie_word_embeddings",
                        json_boolean(source_find(x->s, "lm_head.weight") == NULL));
    json_object_set_new(
        x->config, "attention_bias",
        json_boolean(source_find(x->s, "model.layers.0.self_attn.q_proj.bias") != NULL));
    int rc = copy_shapes(x, err);
    if (rc == ERR_OK)
        rc = check_widths(x, err);
    if (rc == ERR_OK)
        rc = check_keys(x, err);
    if (rc == ERR_OK)
        rc = gguf_double(x->g, key_of(x, "attention.layer_norm_rms_epsilon").s, &eps, &there, err);
    if (rc == ERR_OK && !there)
        rc = err_set(err, ERR_INVALID, "GGUF key %s.attention.layer_norm_rms_epsilon is missing",
                     x->arch);
    json_object_set_new(x->config, "rms_norm_eps", json_real(eps));
    return rc == ERR_OK ? copy_rope(x, err) : rc;
}

static int read_template(struct gg *x, struct err *err)
{
    struct gguf_text t;
    int rc = gguf_string(x->g, "tokenizer.chat_template", &t, err);
    if (rc != ERR_OK || t.s == NULL)
        return rc;
    if (memchr(t.s, '\0', t.len) != NULL)
        return err_set(err, ERR_INVALID, "GGUF key tokenizer.chat_template has a zero byte");
    x->s->chat_template = strndup(t.s, t.len);
    return x->s->chat_template ? ERR_OK : err_nomem(err);
}

static int read_model(struct gg *x, struct err *err)
{
    char *json = NULL, *config = NULL;
    int rc = read_arch(x, err);
    if (rc == ERR_OK)
        rc = make_tensors(x, err);
    if (rc == ERR_OK)
        rc = source_list_tensors(x->s, err);
    if (rc == ERR_OK)
        rc = make_config(x, err);
    if (rc == ERR_OK)
        rc = make_tokenizer(x, &json, &config, x->config, err);
    if (rc == ERR_OK)
        rc = source_add_made(x->s, "tokenizer.json", json, err);
    if (rc == ERR_OK)
        rc = source_add_made(x->s, "tokenizer_config.json", config, err);
    if (rc == ERR_OK)
        rc = read_template(x, err);
    char *text = rc == ERR_OK ? json_dumps(x->config, JSON_COMPACT) : NULL;
    if (rc == ERR_OK)
        rc = text ? arch_from_config(text, NULL, &x->s->arch, err) : err_nomem(err);
    if (rc == ERR_OK)
        mark_tensors(x);
    free(text);
    free(json);
    free(config);
    return rc;
}

int source_open_gguf(const char *path, struct source *s, struct err *err)
{
    char *copy = strdup(path);
    struct gg x = { .s = s, .config = json_object() };
    int rc = copy && x.config ? source_add_mapped(s, path, basename(copy), &x.st, err)
                              : err_nomem(err);
    if (rc == ERR_OK)
        rc = gguf_open_mem(x.st->map, x.st->map_len, path, &x.g, err);
    if (rc == ERR_OK)
        rc = read_model(&x, err);
    gguf_close(x.g);
    json_decref(x.config);
    free(copy);
    return rc;
}

/* --- values ------------------------------------------------------------------------------ */

/* Row of the file that holds row `row` of the original. */
static size_t row_in_file(const struct source_tensor *t, size_t row)
{
    if (t->head_rows == 0)
        return row;
    const size_t hd = (size_t)t->head_rows, half = hd / 2, in = row % hd;
    return row - in + 2 * (in % half) + in / half;
}

void gguf_digest(const struct source_tensor *t, struct sha256 *h)
{
    const size_t rows = (size_t)t->t->shape[0], bytes = t->t->bytes / rows;
    for (size_t row = 0; row < rows; row++)
        sha256_add(h, t->t->data + row_in_file(t, row) * bytes, bytes);
}

/* `n` numbers from column `col` on of a row in the file. */
static int row_f32(const struct source_tensor *t, size_t K, size_t row, size_t col, size_t n,
                   float *ret, struct err *err)
{
    const struct ggml_type *b = t->blocks;
    if (b == NULL)
        return st_f32(t->t, row * K + col, n, ret, err);
    while (n > 0) {
        float block[GGML_MAX_BLOCK];
        const size_t in = col % b->block, m = b->block - in < n ? b->block - in : n;
        b->f32(t->t->data + (row * K + col) / b->block * b->bytes, block);
        for (size_t i = 0; i < m; i++)
            if (!isfinite(block[in + i]))
                return err_set(err, ERR_INVALID, "tensor %s holds no finite number at %zu",
                               t->t->name, row * K + col + i);
        memcpy(ret, block + in, m * sizeof *ret);
        ret += m;
        col += m;
        n -= m;
    }
    return ERR_OK;
}

int gguf_f32(const struct source_tensor *t, size_t first, size_t n, float *ret, struct err *err)
{
    const size_t K = t->t->ndim == 2 ? (size_t)t->t->shape[1] : t->head_rows ? 1 : st_count(t->t);
    int rc = ERR_OK;
    while (n > 0 && rc == ERR_OK) {
        const size_t col = first % K, m = K - col < n ? K - col : n;
        rc = row_f32(t, K, row_in_file(t, first / K), col, m, ret, err);
        first += m;
        ret += m;
        n -= m;
    }
    return rc;
}
