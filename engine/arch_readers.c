/* arch_readers.c - what each family reads from its config.json beside the common fields: where
 * biases are, which layers see a window or rotate, and settings that only one family has. */
#include "engine/arch.h"
#include "engine/arch_int.h"
#include "engine/num.h"

#include <math.h>
#include <string.h>

/* attention_bias puts a bias on q, k, v and o alike; mlp_bias on gate, up and down. */
int arch_read_llama(const void *json, struct arch *a, struct err *err)
{
    int rc = cfg_bool(json, "attention_bias", false, &a->qkv_bias, err);
    a->o_bias = a->qkv_bias;
    if (rc == ERR_OK)
        rc = cfg_bool(json, "mlp_bias", false, &a->mlp_bias, err);
    return rc;
}

/* Every layer has the window.  An absent field means 4096 there; null means none. */
int arch_read_mistral(const void *json, struct arch *a, struct err *err)
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

/* The window of the layers that are in the set; without any there is none. */
static int set_window(struct arch *a, int window, struct err *err)
{
    bool any = false;
    for (int l = 0; l < a->L; l++)
        any |= arch_layer_windowed(a, l);
    if (any && window == 0)
        return err_set(err, ERR_INVALID,
                       "config.json: layer_types has sliding_attention, but use_sliding_window and "
                       "sliding_window give no window");
    a->window = any ? window : 0;
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
    return rc == ERR_OK ? set_window(a, window, err) : rc;
}

int arch_read_qwen2(const void *json, struct arch *a, struct err *err)
{
    a->qkv_bias = true;
    return read_qwen_window(json, a, err);
}

int arch_read_qwen3(const void *json, struct arch *a, struct err *err)
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

int arch_read_gpt2(const void *json, struct arch *a, struct err *err)
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

int arch_read_neox(const void *json, struct arch *a, struct err *err)
{
    a->mlp_bias = true;
    int rc = cfg_bool(json, "attention_bias", true, &a->qkv_bias, err);
    a->o_bias = a->qkv_bias;
    return rc == ERR_OK ? cfg_bool(json, "use_parallel_residual", true, &a->parallel, err) : rc;
}

int arch_read_bloom(const void *json, struct arch *a, struct err *err)
{
    a->qkv_bias = a->o_bias = a->mlp_bias = true;
    return only(json, "apply_residual_connection_post_layernorm", false, err);
}

/* ChatGLM2, ChatGLM3 and GLM-4-9b, as their own modelling code reads it: half of each head
 * rotates. */
int arch_read_chatglm(const void *json, struct arch *a, struct err *err)
{
    bool linear, qkv, grouped;
    double ratio;
    int bits, rc = cfg_bool(json, "add_bias_linear", true, &linear, err);
    if (rc == ERR_OK)
        rc = cfg_bool(json, "add_qkv_bias", false, &qkv, err);
    if (rc == ERR_OK)
        rc = cfg_bool(json, "multi_query_attention", false, &grouped, err);
    if (rc == ERR_OK)
        rc = cfg_double(json, "rope_ratio", 1, 1e-4, 1e8, &ratio, err);
    if (rc == ERR_OK)
        rc = only(json, "rmsnorm", true, err);
    if (rc == ERR_OK)
        rc = only(json, "post_layer_norm", true, err);
    if (rc == ERR_OK)
        rc = only(json, "original_rope", true, err);
    if (rc == ERR_OK)
        rc = only(json, "apply_residual_connection_post_layernorm", false, err);
    if (rc == ERR_OK)
        rc = cfg_int(json, "quantization_bit", 0, 0, 0, &bits, err);
    if (rc == ERR_OK)
        rc = cfg_int(json, "pre_seq_len", 0, 0, 0, &bits, err);
    if (rc != ERR_OK)
        return rc;
    a->o_bias = a->mlp_bias = linear;
    a->qkv_bias = linear || qkv;
    a->G = grouped ? a->G : a->H;
    a->rope_theta = 10000 * ratio;
    a->rot = a->hd / 2;
    return ERR_OK;
}

int arch_read_glm(const void *json, struct arch *a, struct err *err)
{
    return cfg_bool(json, "attention_bias", false, &a->qkv_bias, err);
}

/* One window for all layers, if any. */
int arch_read_phi3(const void *json, struct arch *a, struct err *err)
{
    int rc = cfg_int(json, "sliding_window", 0, 1, INT32_MAX, &a->window, err);
    for (int l = 0; l < a->L && a->window > 0; l++)
        arch_set_windowed(a, l);
    return rc;
}

/* no_rope_layers has a 1 for a layer that does rotate.  Without it every fourth layer does not. */
static int read_no_rope(const json_t *json, struct arch *a, struct err *err)
{
    const json_t *list = json_object_get(json, "no_rope_layers");
    int interval;
    int rc = cfg_int(json, "no_rope_layer_interval", 4, 1, 1 << 20, &interval, err);
    if (rc == ERR_OK && list != NULL && !json_is_null(list) &&
        (!json_is_array(list) || json_array_size(list) != (size_t)a->L))
        rc = err_set(err, ERR_INVALID,
                     "config.json: no_rope_layers is not a list of num_hidden_layers = %d entries",
                     a->L);
    for (int l = 0; l < a->L && rc == ERR_OK; l++) {
        const json_t *v = json_array_get(list, (size_t)l);
        const json_int_t rotates = v ? json_integer_value(v) : (l + 1) % interval != 0;
        if (v != NULL && (!json_is_integer(v) || rotates < 0 || rotates > 1))
            rc = err_set(err, ERR_INVALID, "config.json: no_rope_layers[%d] is neither 0 nor 1", l);
        if (!rotates)
            arch_set_no_rope(a, l);
    }
    return rc;
}

/* A window, where it is used, is for the layers without rope. */
int arch_read_smollm3(const void *json, struct arch *a, struct err *err)
{
    bool use = false;
    int window = 0, rc = arch_read_llama(json, a, err);
    if (rc == ERR_OK)
        rc = read_no_rope(json, a, err);
    if (rc == ERR_OK)
        rc = cfg_bool(json, "use_sliding_window", false, &use, err);
    if (rc == ERR_OK && use)
        rc = cfg_int(json, "sliding_window", 0, 1, INT32_MAX, &window, err);
    if (rc != ERR_OK)
        return rc;
    const json_t *types = json_object_get(json, "layer_types");
    const bool listed = types != NULL && !json_is_null(types);
    if (listed)
        rc = read_layer_types(types, a, err);
    for (int l = 0; l < a->L && window > 0 && !listed; l++)
        if (!arch_layer_rope(a, l))
            arch_set_windowed(a, l);
    return rc == ERR_OK ? set_window(a, window, err) : rc;
}

/* --- Gemma ------------------------------------------------------------------------------ */

/* null means none, an absent field the default. */
static int read_softcap(const json_t *json, const char *key, double def, double *ret,
                        struct err *err)
{
    if (json_is_null(json_object_get(json, key)))
        return ERR_OK;
    return cfg_double(json, key, def, 0, 1e6, ret, err);
}

/* Embeddings are multiplied by sqrt(D), which was rounded to the type that the model was trained
 * in. */
static void scale_embeddings(const json_t *json, struct arch *a)
{
    const json_t *v = json_object_get(json, "dtype");
    const char *type = json_string_value(v ? v : json_object_get(json, "torch_dtype"));
    const float root = sqrtf((float)a->D);
    a->embed_scale = root;
    if (type != NULL && strcmp(type, "bfloat16") == 0)
        a->embed_scale = bf16_to_f32(f32_to_bf16(root));
    else if (type != NULL && strcmp(type, "float16") == 0)
        a->embed_scale = f16_to_f32(f32_to_f16(root));
}

/* Every `pattern`-th layer sees everything, the others a window. */
static int read_gemma(const json_t *json, int pattern, double attn_cap, double final_cap,
                      struct arch *a, struct err *err)
{
    double scalar;
    int window, rc = cfg_bool(json, "attention_bias", false, &a->qkv_bias, err);
    a->o_bias = a->qkv_bias;
    scale_embeddings(json, a);
    if (rc == ERR_OK)
        rc = cfg_double(json, "query_pre_attn_scalar", 256, 1e-3, 1e6, &scalar, err);
    if (rc == ERR_OK)
        rc = read_softcap(json, "attn_logit_softcapping", attn_cap, &a->attn_softcap, err);
    if (rc == ERR_OK)
        rc = read_softcap(json, "final_logit_softcapping", final_cap, &a->final_softcap, err);
    if (rc == ERR_OK)
        rc = only(json, "use_bidirectional_attention", false, err);
    if (rc == ERR_OK)
        rc = cfg_int(json, "sliding_window", 4096, 1, INT32_MAX, &window, err);
    if (rc != ERR_OK)
        return rc;
    a->attn_scale = 1 / sqrt(scalar);
    const json_t *types = json_object_get(json, "layer_types");
    const bool listed = types != NULL && !json_is_null(types);
    if (listed)
        rc = read_layer_types(types, a, err);
    for (int l = 0; l < a->L && !listed; l++)
        if ((l + 1) % pattern != 0)
            arch_set_windowed(a, l);
    return rc == ERR_OK ? set_window(a, window, err) : rc;
}

int arch_read_gemma2(const void *json, struct arch *a, struct err *err)
{
    return read_gemma(json, 2, 50, 30, a, err);
}

/* Layers with a window rotate by a base of their own, which nothing scales. */
int arch_read_gemma3(const void *json, struct arch *a, struct err *err)
{
    const json_t *params = json_object_get(json, "rope_parameters");
    const json_t *local = json_object_get(params, "sliding_attention");
    struct arch other = { 0 };
    const char *key = "_sliding_window_pattern";
    int pattern;
    if (json_object_get(json, key) == NULL)
        key++;
    a->qk_norm = true;
    int rc = cfg_int(json, key, 6, 1, 1 << 20, &pattern, err);
    if (rc == ERR_OK)
        rc = local != NULL ? cfg_double(local, "rope_theta", 10000, 1, 1e15, &a->rope_theta_local,
                                        err)
                           : cfg_double(json, "rope_local_base_freq", 10000, 1, 1e15,
                                        &a->rope_theta_local, err);
    if (rc == ERR_OK && local != NULL)
        rc = cfg_rope_scaling(json, local, &other, err);
    if (rc == ERR_OK && other.rope_scaling != ROPE_PLAIN)
        rc = err_set(err, ERR_INVALID,
                     "config.json: rope_parameters of sliding_attention are scaled; only those of "
                     "full_attention can be");
    return rc == ERR_OK ? read_gemma(json, pattern, 0, 0, a, err) : rc;
}
