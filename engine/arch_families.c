/* arch_families.c - the table of model families, and what each reads from its config.json.
 *
 * One forward pass serves them all (forward.c); a family says which norms, linear layers, positions
 * and activation it has, and what its tensors are called.  config.json leaves many settings to the
 * defaults of the family's class in transformers; the tables and readers below spell those out. */
#include "engine/arch.h"
#include "engine/arch_int.h"

#include <math.h>
#include <string.h>

/* attention_bias puts a bias on q, k, v and o alike; mlp_bias on gate, up and down. */
static int read_llama(const void *json, struct arch *a, struct err *err)
{
    int rc = cfg_bool(json, "attention_bias", false, &a->qkv_bias, err);
    a->o_bias = a->qkv_bias;
    if (rc == ERR_OK)
        rc = cfg_bool(json, "mlp_bias", false, &a->mlp_bias, err);
    return rc;
}

/* Every layer has the window.  An absent field means 4096 there; null means none. */
static int read_mistral(const void *json, struct arch *a, struct err *err)
{
    int rc = ERR_OK;
    if (json_object_get(json, "sliding_window") == NULL)
        a->window = 4096;
    else
        rc = cfg_int(json, "sliding_window", 0, 1, INT32_MAX, &a->window, err);
    if (a->window > 0)
        for (int l = 0; l < a->L; l++)
            arch_set_windowed(a, l);
    return rc;
}

/* layer_types, where present, says for each layer which attention it has. */
static int read_layer_types(const json_t *types, struct arch *a, struct err *err)
{
    if (!json_is_array(types) || json_array_size(types) != (size_t)a->L)
        return err_set(err, ERR_INVALID,
                       "config.json: layer_types is not a list of num_hidden_layers = %d entries",
                       a->L);
    for (int l = 0; l < a->L; l++) {
        const char *t = json_string_value(json_array_get(types, (size_t)l));
        if (t != NULL && strcmp(t, "sliding_attention") == 0)
            arch_set_windowed(a, l);
        else if (t == NULL || strcmp(t, "full_attention") != 0)
            return err_set(err, ERR_INVALID,
                           "config.json: layer_types[%d] is \"%.60s\"; known are full_attention "
                           "and sliding_attention",
                           l, t ? t : "(no string)");
    }
    return ERR_OK;
}

/* The window counts only with use_sliding_window, and only from layer max_window_layers on. */
static int read_qwen_window(const json_t *json, struct arch *a, struct err *err)
{
    bool use = false;
    int first = 0, window = 0;
    int rc = cfg_bool(json, "use_sliding_window", false, &use, err);
    if (rc == ERR_OK && use)
        rc = cfg_int(json, "sliding_window",
                     json_object_get(json, "sliding_window") == NULL ? 4096 : 0, 1, INT32_MAX,
                     &window, err);
    if (rc == ERR_OK)
        rc = cfg_int(json, "max_window_layers", 28, 0, INT32_MAX, &first, err);
    if (rc != ERR_OK)
        return rc;
    const json_t *types = json_object_get(json, "layer_types");
    if (types != NULL && !json_is_null(types))
        rc = read_layer_types(types, a, err);
    else
        for (int l = first; l < a->L && window > 0; l++)
            arch_set_windowed(a, l);
    bool any = false;
    for (int l = 0; l < a->L; l++)
        any |= arch_layer_windowed(a, l);
    if (rc == ERR_OK && any && window == 0)
        return err_set(err, ERR_INVALID,
                       "config.json: layer_types has sliding_attention, but use_sliding_window and "
                       "sliding_window give no window");
    a->window = any ? window : 0;
    return rc;
}

static int read_qwen2(const void *json, struct arch *a, struct err *err)
{
    a->qkv_bias = true;
    return read_qwen_window(json, a, err);
}

static int read_qwen3(const void *json, struct arch *a, struct err *err)
{
    a->qk_norm = true;
    int rc = cfg_bool(json, "attention_bias", false, &a->qkv_bias, err);
    a->o_bias = a->qkv_bias;
    return rc == ERR_OK ? read_qwen_window(json, a, err) : rc;
}

/* A setting that the engine computes in one way only. */
static int only(const json_t *json, const char *key, bool value, struct err *err)
{
    bool got;
    int rc = cfg_bool(json, key, value, &got, err);
    if (rc == ERR_OK && got != value)
        return err_set(err, ERR_INVALID, "config.json: %s is %s; only %s is supported", key,
                       got ? "true" : "false", value ? "true" : "false");
    return rc;
}

static int read_gpt2(const void *json, struct arch *a, struct err *err)
{
    bool scale;
    a->qkv_bias = a->o_bias = a->mlp_bias = true;
    int rc = cfg_bool(json, "scale_attn_weights", true, &scale, err);
    if (rc == ERR_OK && !scale)
        a->attn_scale = 1;
    if (rc == ERR_OK)
        rc = only(json, "scale_attn_by_inverse_layer_idx", false, err);
    return rc == ERR_OK ? only(json, "add_cross_attention", false, err) : rc;
}

static int read_neox(const void *json, struct arch *a, struct err *err)
{
    a->mlp_bias = true;
    int rc = cfg_bool(json, "attention_bias", true, &a->qkv_bias, err);
    a->o_bias = a->qkv_bias;
    return rc == ERR_OK ? cfg_bool(json, "use_parallel_residual", true, &a->parallel, err) : rc;
}

static int read_bloom(const void *json, struct arch *a, struct err *err)
{
    a->qkv_bias = a->o_bias = a->mlp_bias = true;
    return only(json, "apply_residual_connection_post_layernorm", false, err);
}

/* --- names ------------------------------------------------------------------------------ */

#define HF_KEYS                                                                                   \
    .L = "num_hidden_layers", .D = "hidden_size", .H = "num_attention_heads", .V = "vocab_size",  \
    .positions = "max_position_embeddings", .F = "intermediate_size"

static const struct config_keys llama_keys = {
    HF_KEYS, .eps = "rms_norm_eps", .G = "num_key_value_heads", .hd = "head_dim",
    .act = "hidden_act", .theta = "rope_theta",
};
static const struct config_keys neox_keys = {
    HF_KEYS, .eps = "layer_norm_eps", .act = "hidden_act", .theta = "rotary_emb_base|rope_theta",
    .rotary = "rotary_pct|partial_rotary_factor",
};
static const struct config_keys gpt2_keys = {
    .L = "num_hidden_layers|n_layer", .D = "hidden_size|n_embd", .H = "num_attention_heads|n_head",
    .V = "vocab_size", .positions = "max_position_embeddings|n_positions",
    .eps = "layer_norm_epsilon", .F = "n_inner", .act = "activation_function",
};
static const struct config_keys bloom_keys = {
    .L = "num_hidden_layers|n_layer", .D = "n_embed|hidden_size", .H = "num_attention_heads|n_head",
    .V = "vocab_size", .positions = "seq_length", .eps = "layer_norm_epsilon",
};

#define LLAMA_ATTENTION                                                                          \
    [MOD_Q] = "model.layers.%d.self_attn.q_proj", [MOD_K] = "model.layers.%d.self_attn.k_proj",  \
    [MOD_V] = "model.layers.%d.self_attn.v_proj", [MOD_O] = "model.layers.%d.self_attn.o_proj"
#define LLAMA_MODULES                                                                            \
    .module_path = {                                                                             \
        LLAMA_ATTENTION,                                                                         \
        [MOD_GATE] = "model.layers.%d.mlp.gate_proj",                                            \
        [MOD_UP] = "model.layers.%d.mlp.up_proj",                                                \
        [MOD_DOWN] = "model.layers.%d.mlp.down_proj",                                            \
    }
#define LLAMA_NORMS                                                                              \
    [NORM_ATTN] = "model.layers.%d.input_layernorm", [NORM_FINAL] = "model.norm",                \
    [NORM_MLP] = "model.layers.%d.post_attention_layernorm"
#define HEAD_NORMS                                                                               \
    [NORM_Q] = "model.layers.%d.self_attn.q_norm", [NORM_K] = "model.layers.%d.self_attn.k_norm"
#define LLAMA_ENDS .embed = "model.embed_tokens", .head = "lm_head"

/* --- the table -------------------------------------------------------------------------- */

const struct family arch_families[] = {
    {
        .model_type = "llama",
        .architecture = { "LlamaForCausalLM" },
        .keys = &llama_keys,
        .absent = { .G_is_H = true, .eps = 1e-6, .theta = 10000 },
        LLAMA_MODULES,
        .norm_path = { LLAMA_NORMS },
        LLAMA_ENDS,
        .read_config = read_llama,
    },
    {
        .model_type = "mistral",
        .architecture = { "MistralForCausalLM" },
        .keys = &llama_keys,
        .absent = { .eps = 1e-6, .theta = 10000 },
        LLAMA_MODULES,
        .norm_path = { LLAMA_NORMS },
        LLAMA_ENDS,
        .read_config = read_mistral,
    },
    {
        .model_type = "qwen2",
        .architecture = { "Qwen2ForCausalLM" },
        .keys = &llama_keys,
        .absent = { .eps = 1e-6, .theta = 10000 },
        LLAMA_MODULES,
        .norm_path = { LLAMA_NORMS },
        LLAMA_ENDS,
        .read_config = read_qwen2,
    },
    {
        .model_type = "qwen3",
        .architecture = { "Qwen3ForCausalLM" },
        .keys = &llama_keys,
        .absent = { .hd = 128, .eps = 1e-6, .theta = 10000 },
        LLAMA_MODULES,
        .norm_path = { LLAMA_NORMS, HEAD_NORMS },
        LLAMA_ENDS,
        .read_config = read_qwen3,
    },
    {
        .model_type = "gpt2",
        .architecture = { "GPT2LMHeadModel" },
        .norm_kind = NORM_LAYER,
        .position = POS_LEARNED,
        .act = ACT_GELU_TANH,
        .transposed = true,
        .optional_prefix = "transformer.",
        .keys = &gpt2_keys,
        .absent = { .F_is_4D = true, .eps = 1e-5, .tied = true },
        .module_path = {
            [MOD_QKV] = "transformer.h.%d.attn.c_attn",
            [MOD_O] = "transformer.h.%d.attn.c_proj",
            [MOD_UP] = "transformer.h.%d.mlp.c_fc",
            [MOD_DOWN] = "transformer.h.%d.mlp.c_proj",
        },
        .norm_path = {
            [NORM_ATTN] = "transformer.h.%d.ln_1",
            [NORM_MLP] = "transformer.h.%d.ln_2",
            [NORM_FINAL] = "transformer.ln_f",
        },
        .embed = "transformer.wte", .positions = "transformer.wpe", .head = "lm_head",
        .read_config = read_gpt2,
    },
    {
        .model_type = "gpt_neox",
        .architecture = { "GPTNeoXForCausalLM" },
        .norm_kind = NORM_LAYER,
        .act = ACT_GELU_ERF,
        .qkv_by_head = true,
        .keys = &neox_keys,
        .absent = { .eps = 1e-5, .theta = 10000, .rotary = 0.25 },
        .module_path = {
            [MOD_QKV] = "gpt_neox.layers.%d.attention.query_key_value",
            [MOD_O] = "gpt_neox.layers.%d.attention.dense",
            [MOD_UP] = "gpt_neox.layers.%d.mlp.dense_h_to_4h",
            [MOD_DOWN] = "gpt_neox.layers.%d.mlp.dense_4h_to_h",
        },
        .norm_path = {
            [NORM_ATTN] = "gpt_neox.layers.%d.input_layernorm",
            [NORM_MLP] = "gpt_neox.layers.%d.post_attention_layernorm",
            [NORM_FINAL] = "gpt_neox.final_layer_norm",
        },
        .embed = "gpt_neox.embed_in", .head = "embed_out",
        .read_config = read_neox,
    },
    {
        .model_type = "bloom",
        .architecture = { "BloomForCausalLM" },
        .norm_kind = NORM_LAYER,
        .position = POS_ALIBI,
        .act = ACT_GELU_TANH,
        .qkv_by_head = true,
        .optional_prefix = "transformer.",
        .keys = &bloom_keys,
        .absent = { .F_is_4D = true, .positions = 2048, .eps = 1e-5, .tied = true },
        .module_path = {
            [MOD_QKV] = "transformer.h.%d.self_attention.query_key_value",
            [MOD_O] = "transformer.h.%d.self_attention.dense",
            [MOD_UP] = "transformer.h.%d.mlp.dense_h_to_4h",
            [MOD_DOWN] = "transformer.h.%d.mlp.dense_4h_to_h",
        },
        .norm_path = {
            [NORM_EMBED] = "transformer.word_embeddings_layernorm",
            [NORM_ATTN] = "transformer.h.%d.input_layernorm",
            [NORM_MLP] = "transformer.h.%d.post_attention_layernorm",
            [NORM_FINAL] = "transformer.ln_f",
        },
        .embed = "transformer.word_embeddings", .head = "lm_head",
        .read_config = read_bloom,
    },
};
const size_t arch_nfamilies = sizeof arch_families / sizeof arch_families[0];

const char *family_list(void) { return "llama, mistral, qwen2, qwen3, gpt2, gpt_neox, bloom"; }
