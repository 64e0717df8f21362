/* arch.h - what a model family is: shapes, names of its weights, kinds of rope and norm.
 *
 * One `struct family` per family (a table in arch.c); one `struct arch` per model, made from
 * config.json by the family's reader, or from the base file.  Adding a family that the
 * forward pass can already express is a table and a test.
 *
 * Letters used everywhere: L layers, D width of the residual stream, H query heads, G key/value
 * heads, hd size of a head, F width of the MLP, V vocabulary, T token rows of a step. */
#ifndef ENGINE_ARCH_H
#define ENGINE_ARCH_H

#include "engine/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The linear layers of a block, in the order the forward pass uses them. */
enum module { MOD_Q, MOD_K, MOD_V, MOD_O, MOD_GATE, MOD_UP, MOD_DOWN, MOD_COUNT };

enum rope_scaling { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };

enum { ARCH_MAX_EOS = 8 };

struct arch {
    char family[24];  /* "llama", "mistral", "qwen2", "qwen3": config.json's model_type */
    int L, D, H, G, hd, F, V;
    int max_positions;
    float norm_eps;
    /* rope: rotated pairs (i, i + hd/2); angle = pos * f_i, f_i = theta^(-2i/hd), scaled */
    double rope_theta;
    enum rope_scaling rope_scaling;
    double rope_factor, rope_low_freq, rope_high_freq;
    int rope_original_max;
    /* sliding window: layer l sees the last `window` positions if window > 0 and
     * l is in the set; bit l/8 of windowed[] */
    int window;
    uint8_t windowed[64];  /* up to 512 layers */
    bool qkv_bias, o_bias, mlp_bias; /* which linear layers carry a bias */
    bool qk_norm;                    /* RMSNorm over each head of q and k, before rope */
    bool tied;                       /* logits use the embedding */
    int bos;                         /* -1: none */
    int eos[ARCH_MAX_EOS], neos;
};

struct family {
    const char *model_type;   /* config.json */
    const char *architecture; /* ...ForCausalLM */
    /* printf formats with the layer number, without ".weight" / ".bias" */
    const char *module_path[MOD_COUNT];
    const char *norm_attn, *norm_mlp;
    const char *q_norm, *k_norm;            /* NULL if the family has none */
    const char *embed, *norm_final, *head;
    /* Family-specific reading of config.json (a json_t object) after the common fields. */
    int (*read_config)(const void *json, struct arch *a, struct err *err);
};

/* NULL if unknown. */
const struct family *family_find(const char *model_type);
/* "llama, mistral, qwen2, qwen3": for messages. */
const char *family_list(void);

/* config.json (and generation_config.json or NULL), both NUL-terminated, both spellings of
 * rope settings.  Every product of shapes is checked; ERR_INVALID names the field. */
int arch_from_config(const char *config, const char *generation_config, struct arch *ret,
                     struct err *err);
/* The normalised form kept in a base file, and back. */
char *arch_to_json(const struct arch *a); /* free() it */
int arch_from_json(const char *json, struct arch *ret, struct err *err);

/* Inputs and outputs of a module's linear layer. */
int arch_in(const struct arch *a, enum module m);
int arch_out(const struct arch *a, enum module m);
bool arch_has_bias(const struct arch *a, enum module m);
bool arch_layer_windowed(const struct arch *a, int layer);
/* "model.layers.3.self_attn.q_proj" */
void arch_module_path(const struct arch *a, int layer, enum module m, char *ret, size_t cap);
/* The inverse; false if the path names no linear layer of this model. */
bool arch_module_parse(const struct arch *a, const char *path, int *ret_layer,
                       enum module *ret_module);

#endif
