/* arch.c - the table of model families, and what follows from a model's shapes.
 *
 * All families here are Llama's block with small differences: where biases are, whether heads of q
 * and k are normalised, which layers see a sliding window.  config.json leaves many of these to
 * the defaults of the family's class in transformers; the readers below spell those out. */
#include "engine/arch.h"
#include "engine/arch_int.h"

#include <stdio.h>
#include <stdlib.h>
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

/* Names that all four share. */
#define LLAMA_NAMES                                                                              \
    .module_path = {                                                                             \
        [MOD_Q] = "model.layers.%d.self_attn.q_proj",                                            \
        [MOD_K] = "model.layers.%d.self_attn.k_proj",                                            \
        [MOD_V] = "model.layers.%d.self_attn.v_proj",                                            \
        [MOD_O] = "model.layers.%d.self_attn.o_proj",                                            \
        [MOD_GATE] = "model.layers.%d.mlp.gate_proj",                                            \
        [MOD_UP] = "model.layers.%d.mlp.up_proj",                                                \
        [MOD_DOWN] = "model.layers.%d.mlp.down_proj",                                            \
    },                                                                                           \
    .norm_attn = "model.layers.%d.input_layernorm",                                              \
    .norm_mlp = "model.layers.%d.post_attention_layernorm",                                      \
    .embed = "model.embed_tokens", .norm_final = "model.norm", .head = "lm_head"

const struct family arch_families[] = {
    {
        .model_type = "llama",
        .architecture = "LlamaForCausalLM",
        LLAMA_NAMES,
        .read_config = read_llama,
    },
    {
        .model_type = "mistral",
        .architecture = "MistralForCausalLM",
        LLAMA_NAMES,
        .read_config = read_mistral,
    },
    {
        .model_type = "qwen2",
        .architecture = "Qwen2ForCausalLM",
        LLAMA_NAMES,
        .read_config = read_qwen2,
    },
    {
        .model_type = "qwen3",
        .architecture = "Qwen3ForCausalLM",
        LLAMA_NAMES,
        .q_norm = "model.layers.%d.self_attn.q_norm",
        .k_norm = "model.layers.%d.self_attn.k_norm",
        .read_config = read_qwen3,
    },
};
const size_t arch_nfamilies = sizeof arch_families / sizeof arch_families[0];

const struct family *family_find(const char *model_type)
{
    for (size_t i = 0; i < arch_nfamilies; i++)
        if (strcmp(arch_families[i].model_type, model_type) == 0)
            return &arch_families[i];
    return NULL;
}

const char *family_list(void) { return "llama, mistral, qwen2, qwen3"; }

/* --- shapes and names ----------------------------------------------------------------- */

int arch_in(const struct arch *a, enum module m)
{
    return m == MOD_O ? a->H * a->hd : m == MOD_DOWN ? a->F : a->D;
}

int arch_out(const struct arch *a, enum module m)
{
    switch (m) {
    case MOD_Q:
        return a->H * a->hd;
    case MOD_K:
    case MOD_V:
        return a->G * a->hd;
    case MOD_GATE:
    case MOD_UP:
        return a->F;
    default:
        return a->D;
    }
}

bool arch_has_bias(const struct arch *a, enum module m)
{
    return m <= MOD_V ? a->qkv_bias : m == MOD_O ? a->o_bias : a->mlp_bias;
}

bool arch_layer_windowed(const struct arch *a, int layer)
{
    return a->windowed[layer / 8] >> (layer % 8) & 1;
}

void arch_set_windowed(struct arch *a, int layer)
{
    a->windowed[layer / 8] |= (uint8_t)(1 << (layer % 8));
}

void arch_module_path(const struct arch *a, int layer, enum module m, char *ret, size_t cap)
{
    snprintf(ret, cap, family_find(a->family)->module_path[m], layer);
}

/* Does `path` read as `format` with a layer number in place of %d?  -1 if not. */
static int match_layer(const char *format, const char *path, int L)
{
    size_t prefix = (size_t)(strstr(format, "%d") - format);
    if (strncmp(path, format, prefix) != 0)
        return -1;
    const char *digits = path + prefix;
    size_t n = strspn(digits, "0123456789");
    if (n == 0 || n > 3 || (n > 1 && digits[0] == '0') ||
        strcmp(digits + n, format + prefix + 2) != 0)
        return -1;
    int layer = atoi(digits);
    return layer < L ? layer : -1;
}

bool arch_module_parse(const struct arch *a, const char *path, int *ret_layer,
                       enum module *ret_module)
{
    const struct family *f = family_find(a->family);
    for (int m = 0; m < MOD_COUNT; m++) {
        int layer = match_layer(f->module_path[m], path, a->L);
        if (layer < 0)
            continue;
        *ret_layer = layer;
        *ret_module = (enum module)m;
        return true;
    }
    return false;
}
