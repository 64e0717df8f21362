/* arch.h - what a model family is: shapes, names of its weights, kinds of positions and norms.
 *
 * One `struct family` per family (a table in arch_families.c); one `struct arch` per model, made from
 * config.json by the family's reader, or from the base file.  What all models of a family share is
 * in the first, what their configs decide in the second.  Adding a family that the forward pass can
 * already express is a table and a test.
 *
 * Letters used everywhere: L layers, D width of the residual stream, H query heads, G key/value
 * heads, hd size of a head, F width of the MLP, V vocabulary, T token rows of a step. */
#ifndef ENGINE_ARCH_H
#define ENGINE_ARCH_H

#include "engine/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The linear layers of a block.  A family has those that its table names: MOD_QKV stands for q, k
 * and v in one matrix, MOD_GATE_UP for gate (first) and up; an MLP without a gate has MOD_UP
 * alone. */
enum module {
    MOD_Q, MOD_K, MOD_V, MOD_O, MOD_GATE, MOD_UP, MOD_DOWN, MOD_QKV, MOD_GATE_UP, MOD_COUNT
};

/* Norms of a block, then of the model.  POST norms act on what attention or MLP gave, before it is
 * added to the residual stream. */
enum norm {
    NORM_ATTN, NORM_MLP, NORM_POST_ATTN, NORM_POST_MLP, NORM_Q, NORM_K, LAYER_NORMS,
    NORM_EMBED = LAYER_NORMS, NORM_FINAL, NORM_COUNT
};

enum norm_kind {
    NORM_RMS,          /* x / sqrt(mean(x^2) + eps) * w */
    NORM_RMS_PLUS_ONE, /* the same with 1 + w, which is added when the base is loaded */
    NORM_LAYER,        /* mean taken away first, bias added last */
};

enum activation { ACT_SILU, ACT_GELU_TANH, ACT_GELU_ERF };

enum position {
    POS_ROPE_HALF,        /* pairs (i, i + rot/2) */
    POS_ROPE_INTERLEAVED, /* pairs (2i, 2i + 1) */
    POS_ALIBI,            /* slope_h * (j - i) is added to scores */
    POS_LEARNED,          /* a table of embeddings */
};

enum rope_scaling { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN, ROPE_LONGROPE };

enum { ARCH_MAX_EOS = 8, ARCH_MAX_LONGROPE = 128 };

struct arch {
    char family[24];  /* config.json's model_type, e.g. "llama" */
    int L, D, H, G, hd, F, V;
    int max_positions;
    float norm_eps;
    enum activation act;
    /* rope: the first `rot` numbers of a head rotate; angle = pos * f_i, f_i = theta^(-2i/rot),
     * scaled.  rot is 0 without rope. */
    int rot;
    double rope_theta;
    enum rope_scaling rope_scaling;
    double rope_factor, rope_low_freq, rope_high_freq;
    int rope_original_max;
    double rope_amplitude;   /* cos and sin are multiplied by it; 0: 1 */
    double rope_beta_fast, rope_beta_slow; /* YaRN: turns within rope_original_max */
    bool rope_truncate;                    /* YaRN: the range between them in whole angles */
    float rope_short[ARCH_MAX_LONGROPE];   /* LongRoPE: what f_i is divided by, [rot / 2] */
    float rope_long[ARCH_MAX_LONGROPE];    /* the same for contexts over rope_original_max */
    double rope_theta_local; /* of layers with a window, unscaled; 0: as the others */
    uint8_t no_rope[64];     /* bit l % 8 of no_rope[l / 8]: layer l does without */
    /* sliding window: layer l sees the last `window` positions if window > 0 and
     * l is in the set; bit l % 8 of windowed[l / 8] */
    int window;
    uint8_t windowed[64];  /* up to 512 layers */
    double attn_scale;     /* of scores; 0: 1 / sqrt(hd) */
    double attn_softcap, final_softcap; /* c tanh(x / c) over scores and logits; 0: none */
    double embed_scale;    /* 1 for most */
    bool parallel;         /* x + attn(norm(x)) + mlp(norm(x)), not one after the other */
    bool qkv_bias, o_bias, mlp_bias; /* which linear layers carry a bias */
    bool qk_norm;                    /* RMSNorm over each head of q and k, before rope */
    bool tied;                       /* logits use the embedding */
    int bos;                         /* -1: none */
    int eos[ARCH_MAX_EOS], neos;
};

/* Names in config.json; "a|b" are alternatives, of which the first that is there counts. */
struct config_keys {
    const char *L, *D, *H, *V, *positions, *eps;
    const char *F;      /* NULL: always 4 D */
    const char *G;      /* NULL: as many as query heads */
    const char *hd;     /* NULL: D / H */
    const char *act;    /* NULL: fixed */
    const char *theta;  /* NULL: the family's reader sees to rope, if there is any */
    const char *rotary; /* part of a head that rotates; NULL: all of it, always */
};

struct family {
    const char *model_type;      /* config.json */
    const char *architecture[3]; /* ...ForCausalLM, and other names that it goes by */
    enum norm_kind norm_kind;
    enum position position;
    enum activation act;     /* without another word in the config */
    bool qkv_by_head;        /* rows of MOD_QKV: q, k, v of head 0, of head 1, ...; else q, k, v */
    bool transposed;         /* linear weights are stored [in, out] */
    const char *optional_prefix; /* that files may leave away in front of names of tensors */
    bool local_rope;         /* layers with a window have a rope of their own */
    /* what an absent field of the config means */
    struct {
        bool F_is_4D, G_is_H;  /* else required */
        int hd, positions;     /* 0: D / H; required */
        double eps, theta, rotary;
        bool tied;
    } absent;
    const struct config_keys *keys;
    /* printf formats with the layer number, without ".weight" / ".bias"; NULL: has none */
    const char *module_path[MOD_COUNT];
    const char *norm_path[NORM_COUNT];
    const char *embed, *positions, *head; /* positions: with POS_LEARNED */
    /* Family-specific reading of config.json (a json_t object) after the common fields. */
    int (*read_config)(const void *json, struct arch *a, struct err *err);
};

/* NULL if unknown. */
const struct family *family_find(const char *model_type);
/* "llama, mistral, ...": for messages. */
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
bool arch_has_module(const struct arch *a, enum module m);
bool arch_layer_windowed(const struct arch *a, int layer);
bool arch_layer_rope(const struct arch *a, int layer); /* does it rotate q and k? */
/* "model.layers.3.self_attn.q_proj"; "" if the family has no such module */
void arch_module_path(const struct arch *a, int layer, enum module m, char *ret, size_t cap);
/* The inverse; false if the path names no linear layer of this model. */
bool arch_module_parse(const struct arch *a, const char *path, int *ret_layer,
                       enum module *ret_module);

#endif
