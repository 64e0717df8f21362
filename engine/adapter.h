/* adapter.h - low-rank adapters: what a PEFT folder says, and the form the engine computes with.
 *
 * Two structs.  `struct adapter_src` is what was uploaded or trained, validated: raw tensors in
 * their own type, per-module rank, alpha and scaling, pruning masks.  The store writes and reads
 * it.  `struct adapter` is made from it for one base: B in panels, scaling folded, ready for
 * lora.h.  Both are immutable after they are made.
 *
 * Arithmetic (spec: PEFT):  y += scaling * ((x A^T) * e) B^T, with e = 1 except for AdaLoRA.
 *   LoRA      scaling = alpha / r            rsLoRA   scaling = alpha / sqrt(r)
 *   AdaLoRA   scaling = (alpha > 0 ? alpha : init_r) / (init_r + 1e-5), whatever was pruned
 *   DoRA      y = g (x W^T + scaling (x A^T) B^T) + b,  g_o = m_o / |W_o + scaling (B A)_o|
 * r and alpha are per module, after rank_pattern and alpha_pattern.
 *
 * Beside its factors an adapter may hold extra tensors: DoRA's magnitudes, biases inside lora_B,
 * and replacements of the base's biases, norms, embedding or head, or of rows of these two.  What replaces or scales the
 * base's own results has no sum with another adapter: such an adapter is used alone, with weight
 * 1 (lora_set_check). */
#ifndef ENGINE_ADAPTER_H
#define ENGINE_ADAPTER_H

#include "engine/arch.h"
#include "engine/base.h"
#include "engine/err.h"
#include "engine/num.h"
#include "engine/safetensors.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum adapter_method { METHOD_LORA, METHOD_RSLORA, METHOD_ADALORA, METHOD_DORA };
const char *adapter_method_name(enum adapter_method m); /* "lora", "rslora", "adalora", "dora" */
bool adapter_method_parse(const char *name, enum adapter_method *ret);

enum { ADAPTER_MAX_RANK = 4096 };

/* What is adapted outside the blocks; their layer is 0.  Of the embedding, `in` is the vocabulary
 * and `out` the width: A holds a column, B a row of the change per token. */
enum { MOD_HEAD = MOD_COUNT, MOD_EMBED, MOD_SLOTS };

/* Path, inputs and outputs, for the modules of blocks and these two.  The path is false where the
 * buffer is too small. */
bool adapter_module_path(const struct arch *arch, int layer, int module, char *ret, size_t cap);
int adapter_module_in(const struct arch *arch, int module);
int adapter_module_out(const struct arch *arch, int module);

/* Place of a norm in a table: those of layer l, then (l = L) those of the model. */
static inline int adapter_norm_index(int L, int l, enum norm n)
{
    return l < L ? l * LAYER_NORMS + (int)n : L * LAYER_NORMS + (int)n - LAYER_NORMS;
}
static inline int adapter_norm_count(int L) { return L * LAYER_NORMS + NORM_COUNT - LAYER_NORMS; }

/* One adapted linear layer (or the embedding, or the head). */
struct adapter_src_module {
    int layer;
    enum module module; /* or MOD_HEAD, MOD_EMBED */
    char *path;        /* "model.layers.0.self_attn.q_proj" */
    int rank;          /* columns present; 0: pruned away entirely */
    int init_rank;     /* AdaLoRA: before pruning; else = rank */
    double alpha;      /* after alpha_pattern */
    double scaling;    /* as above */
    int in, out;
    enum dtype dtype;  /* of A, B (and E) */
    const void *A;     /* [rank][in] */
    const void *B;     /* [out][rank] */
    const void *E;     /* [rank] (file shape [rank,1]) or NULL */
    uint8_t *mask;     /* [init_rank], 1 = kept (AdaLoRA with a rank_pattern), or NULL */
    float *importance; /* [init_rank]: S of each triplet (adalora.h), or NULL: not trained here */
    float *norms;      /* DoRA: [out], |W_o + scaling (B A)_o|, or NULL: not known yet */
};

/* A tensor that is no factor. */
enum adapter_extra {
    EXTRA_MAGNITUDE, /* [out]: DoRA's m of a module */
    EXTRA_LORA_BIAS, /* [out]: the bias inside lora_B, added times scaling */
    EXTRA_BIAS,      /* [out]: in place of a module's bias */
    EXTRA_NORM,      /* [n]: in place of a norm's weight */
    EXTRA_NORM_BIAS, /* [n]: in place of a LayerNorm's bias */
    EXTRA_HEAD,      /* [V, D]: in place of the output head */
    EXTRA_EMBED,     /* [V, D]: in place of the embedding */
    EXTRA_EMBED_ROWS, /* [n, D]: in place of some rows of the embedding, and of a tied head that has
                         none of its own */
    EXTRA_HEAD_ROWS, /* [n, D]: in place of some rows of the head */
    EXTRA_EMBED_IDS, /* [n] I32: which rows, each once; follows EXTRA_EMBED_ROWS in the list.  In no
                        file: it comes from the config */
    EXTRA_HEAD_IDS,  /* the same for EXTRA_HEAD_ROWS */
    EXTRA_KINDS
};
const char *adapter_extra_name(enum adapter_extra k); /* "magnitude", "lora_bias", ... */
static inline bool adapter_extra_is_rows(enum adapter_extra k)
{
    return k == EXTRA_EMBED_ROWS || k == EXTRA_HEAD_ROWS;
}
static inline bool adapter_extra_is_ids(enum adapter_extra k)
{
    return k == EXTRA_EMBED_IDS || k == EXTRA_HEAD_IDS;
}

struct adapter_src_extra {
    enum adapter_extra kind;
    int layer, module; /* of the first three; of a norm: layer (0 for the model's) and enum norm */
    char *name;        /* in the file, without "base_model.model." */
    enum dtype dtype;
    int rows, cols;    /* cols 0: a vector */
    const void *data;
};
static inline size_t adapter_extra_count(const struct adapter_src_extra *x)
{
    return (size_t)x->rows * (size_t)(x->cols > 0 ? x->cols : 1);
}

struct adapter_src {
    enum adapter_method method;
    size_t nmodules;
    struct adapter_src_module *modules; /* ascending by (layer, module) */
    size_t nextras;
    struct adapter_src_extra *extras;   /* ascending by name */
    char *config;            /* adapter_config.json as it came, NUL-terminated */
    size_t config_len;
    char *base_name;         /* base_model_name_or_path, or NULL: what it claims */
    int rank_max, rank_min;
    double alpha;            /* lora_alpha of the config */
    uint64_t params;         /* scalars in all tensors */
    size_t bytes;            /* of all tensors */
    uint8_t hash[32];        /* content: see adapter_src_hash() */
    /* AdaLoRA's schedule, for the record; zero otherwise */
    int init_r, target_r, tinit, tfinal, deltaT, total_step;
    double beta1, beta2, orth_reg_weight;
    void *own;               /* tensor memory that adapter_src_free() gives to free(), or NULL */
};

/* Validate a PEFT adapter against a model: every field of the config is honoured or refused by
 * name, every tensor is used or refused by name, shapes and ranks agree with the base and with
 * the patterns, no value is NaN or infinite.  `weights` must stay open while *ret lives (tensors
 * are borrowed and may lie unaligned).  The table of fields is in peft_fields.c; docs/adapters.md
 * is made from it. */
int peft_parse(const struct arch *arch, const char *config, size_t config_len,
               const struct st_file *weights, struct adapter_src **ret, struct err *err);
/* The same from a folder with adapter_config.json and adapter_model.safetensors (or .bin, see
 * torch_file.h); the tensors are copied, so that nothing stays open. */
int peft_load_dir(const struct arch *arch, const char *dir, struct adapter_src **ret,
                  struct err *err);
/* A LoRA in a GGUF file, of the families that export.h lists: the same promise.  Nothing of `data` is
 * borrowed; `what` is named in messages. */
int peft_gguf_parse(const struct arch *arch, const void *data, size_t len, const char *what,
                    struct adapter_src **ret, struct err *err);
/* A folder of PEFT's or a GGUF file, whichever `path` is. */
int adapter_load(const struct arch *arch, const char *path, struct adapter_src **ret,
                 struct err *err);
void adapter_src_free(struct adapter_src *a); /* NULL is fine */
/* An alpha whose quotient by `rank` is `scaling` to the last bit; false if there is none near. */
bool adapter_alpha_of(double scaling, int rank, double *ret);

/* sha256 over the method's name and, per module in order: path, in, out, rank, init_rank (4 bytes
 * each), scaling (8 bytes of the double), dtype name, and the bytes of A, B, E; then, per extra
 * tensor in order: "extra", kind, name, rows, cols (4 bytes each), dtype name, bytes.  Names end
 * with a NUL, numbers are little-endian.  Same content, same hash, however the file was laid out. */
void adapter_src_hash(const struct adapter_src *a, uint8_t ret[32]);
/* The same while the tensors' bytes are still being filled in: `wait` returns when those of module i
 * (nmodules: of the extra tensors) are there, or false to give up; `ret` is unchanged then. */
void adapter_src_hash_following(const struct adapter_src *a, bool (*wait)(void *ud, size_t i), void *ud,
                                uint8_t ret[32]);

/* XXH3 of 128 bits over the same bytes: eight times as fast, and no protection against those who look for
 * two contents with one sum.  false: memory is out. */
bool adapter_src_sum(const struct adapter_src *a, uint8_t ret[16]);

/* adapter_model.safetensors of a src, PEFT's names, original types: byte-equal tensors.  Written
 * to `path` (a temporary file of the caller's). */
int peft_write_weights(const struct adapter_src *a, const char *path, struct err *err);

/* DoRA's norms of every module that lacks them, from the weights that `base` computes with.  Takes
 * about as long as a prompt of `rank` tokens: a loader's work, never the engine thread's.  Also
 * true of other methods: nothing to do. */
int adapter_norms(const struct base *base, struct adapter_src *src, struct err *err);
/* How `base` holds the weights of a module, which the norms depend on: "nf4/f16", "q8", ... */
const char *adapter_norms_form(const struct base *base, int layer, int module);

/* --- the form for computing ------------------------------------------------------------ */
/* B is kept in panels of as many outputs as a tile of the base's products has: what one tile needs
 * lies together. */
enum { ADAPTER_PANEL = 32 };
struct lora_module {
    int rank, in, out;
    enum dtype dtype;
    const void *A;       /* [rank][in]; of the embedding transposed: [in][rank] */
    const void *B;       /* [out / ADAPTER_PANEL][rank][ADAPTER_PANEL], the last one narrower */
    const float *gain;   /* [rank]: scaling * e_j */
    const float *scale;  /* [out]: DoRA's g, or NULL */
    const float *bias;   /* [out]: in place of the base's, or NULL */
    const float *lora_bias; /* [out]: scaling * the bias inside lora_B, or NULL */
};

/* A table of V rows that stands for the base's. */
struct adapter_table {
    enum dtype dtype;
    const void *data;    /* [V][D], or NULL: the base's own */
};

/* Rows that stand for some of the base's: row i for token ids[i]. */
struct adapter_rows {
    int n;               /* 0: none */
    const int32_t *ids;  /* [n], ascending */
    enum dtype dtype;
    const void *data;    /* [n][D] */
};
/* The row for a token, or NULL. */
const void *adapter_row(const struct adapter_rows *r, int D, int32_t token);

struct adapter {
    uint8_t hash[32];
    int64_t version_id;  /* of the store; 0 if it came from a folder */
    int L;
    size_t bytes;        /* resident */
    int rank_max;
    const struct lora_module *modules; /* [L][MOD_SLOTS]; rank 0: nothing to add */
    bool vectors;        /* some module has a scale, bias or lora_bias */
    const char *alone;   /* why it is used alone with weight 1, or NULL */
    struct base_norm *norms; /* [adapter_norm_count()], what is in place of the base's; or NULL */
    struct adapter_table embed, head;
    struct adapter_rows embed_rows, head_rows; /* of a tied base both may be the same */
    void *own;
};

/* Copies what it needs onto huge pages; `src` can be freed.  `spare` may be NULL; *spare may be NULL, or an
 * adapter that nobody uses any more: its memory is taken if it is as large as what is needed, and freed if
 * not, and *spare is NULL then.  It is still the caller's only where the shapes are not this base's.
 * ERR_INVALID if they are not, or if a weight norm of DoRA is 0.  DoRA needs its norms first. */
int adapter_build(const struct arch *arch, const struct adapter_src *src, int64_t version_id,
                  struct adapter **spare, struct adapter **ret, struct err *err);
void adapter_free(struct adapter *a); /* NULL is fine */
/* The `bytes` that adapter_build() would give, from ranks, shapes and types alone (A, B and E are
 * not looked at): for budgets. */
size_t adapter_build_bytes(const struct arch *arch, const struct adapter_src *src);
/* The element of B for output o and rank j. */
static inline size_t lora_b_index(const struct lora_module *m, int o, int j)
{
    const int first = o - o % ADAPTER_PANEL, left = m->out - first;
    const int width = left < ADAPTER_PANEL ? left : ADAPTER_PANEL;
    return (size_t)first * (size_t)m->rank + (size_t)j * (size_t)width + (size_t)(o - first);
}
static inline const struct lora_module *adapter_module(const struct adapter *a, int layer,
                                                       int m)
{
    return &a->modules[layer * MOD_SLOTS + m];
}

/* --- what one request asks for: adapters with weights ------------------------------------ */
enum { LORA_SET_MAX = 8 };
struct lora_set {
    int n;  /* 0: the bare base */
    struct lora_item { const struct adapter *adapter; float weight; } item[LORA_SET_MAX];
};
/* Canonical order (by content hash, then weight), so that the sum has one order.  Two items of
 * the same content are merged by adding their weights. */
void lora_set_sort(struct lora_set *s);
/* ERR_INVALID if an adapter that can only be used alone is not, or has another weight than 1. */
int lora_set_check(const struct lora_set *s, struct err *err);
/* Same adapters and weights? */
bool lora_set_equal(const struct lora_set *a, const struct lora_set *b);
/* What seeds the prefix cache: tenant, base hash, content hashes and weights; never names. */
void lora_set_seed(const struct lora_set *s, int64_t tenant, const uint8_t base_hash[32],
                   uint8_t ret[32]);

#endif
