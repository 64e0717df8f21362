/* base.h - the one base model: made by base_import(), loaded by base_load(), immutable after.
 *
 * File format: a safetensors file.  __metadata__ has
 *   lorad.format     "1"
 *   lorad.arch       arch_to_json()
 *   lorad.name       the name it answers to (the source folder's, unless told otherwise)
 *   lorad.tokenizer  tokenizer.json, as it was
 *   lorad.tokenizer_config, lorad.chat_template   as they were, if there were any
 *   lorad.source     sha256 of what `sha256sum FILE...` prints for the source's files, in ascending
 *                    order of their names
 *   lorad.hash       the base's canonical hash, see base_hash in base.h below
 *   lorad.digests    JSON {tensor: sha256}, what lorad.hash is made from
 *   lorad.type, lorad.head, lorad.embed   the options of import
 * and, per weight X (Hugging Face's names):
 *   NF4, K % 64 == 0   X U8 [p16_bytes], X.absmax U8 [blocks] (double-quantised codes in reference
 *                      order), X.nested_absmax F32, X.nested_offset F32 [1]
 *   NF4, other K       X U8 [bytes] in the reference layout, and the same scale tensors
 *   NF4, plain scales  X.absmax F32 [blocks] alone: taken over from a source that had no double
 *                      quantisation; never made by import itself
 *   8 bit (head)       X U8 [q8_bytes], X.scale F16
 *   f32 / bf16         X F32 or BF16 in its own shape; norms and biases are always F32
 * Weights that the source stores as [in, out] (GPT-2) are transposed first, and names have the
 * prefix that its files may leave away.  Tied heads are written as their own tensor
 * `lm_head.weight` unless head and embedding have the same type.
 *
 * Tensors named __pad.N fill up to 64-byte boundaries and mean nothing.
 *
 * Canonical hash: sha256 over, for every source tensor that is used, in ascending name order, the
 * name, a NUL, and the 32 bytes of its digest.  A digest is sha256 over a line of text and bytes:
 *   quantised linear layers   "NF4 [N,K]\n", reference codes, nested codes, nested absmax, offset
 *   with plain scales         "NF4 plain [N,K]\n", reference codes, absmax
 *   all others                "DTYPE [shape]\n", the source's shape and bytes
 * So packing, head type and format version do not change the hash, and `--type f32` does.
 *
 * The digest of a matrix that bitsandbytes has quantised to NF4 is always made from its codes and
 * scales, also with `--type f32`.  So such a checkpoint has the hash of the original, imported as
 * NF4, where both hold the same numbers: double quantisation, and embedding, head, norms and biases
 * stored in the same types.  One bit in an offset (a mean, summed in another order on a GPU) or
 * another code in a block of zeros makes it another base.  A GGUF file has its own hash: it keeps
 * norms and biases in F32, whatever they were. */
#ifndef ENGINE_BASE_H
#define ENGINE_BASE_H

#include "engine/arch.h"
#include "engine/compute.h"
#include "engine/linear.h"

struct base_linear {
    struct matrix w;
    const float *bias; /* [N] or NULL */
};

/* w NULL: the model has no such norm.  bias: of a LayerNorm, else NULL. */
struct base_norm {
    const float *w, *bias;
};

struct base_layer {
    struct base_norm norm[LAYER_NORMS]; /* [D]; of q and k [hd] */
    struct base_linear mod[MOD_COUNT];  /* those of the family */
};

struct base {
    struct arch arch;
    char *name;
    char *path;
    char hash_hex[65];
    uint8_t hash[32];
    bool is_f32;               /* made with --type f32: KV is fp32 then */
    struct matrix embed;       /* [V, D], MAT_F32 or MAT_BF16 */
    struct matrix positions;   /* [max_positions, D] with POS_LEARNED: as embed */
    struct matrix head;        /* [V, D] */
    struct base_norm norm_embed, norm_final; /* [D]; norm_embed.w may be NULL */
    struct base_layer *layers; /* [L] */
    const char *tokenizer_json; /* NUL-terminated */
    size_t tokenizer_json_len;
    const char *tokenizer_config; /* or NULL */
    const char *chat_template;    /* or NULL */
    size_t bytes;              /* resident: weights, scales, everything */
    uint64_t params;           /* numbers in the model's weights; a tied head counts once */
    void *own;                 /* private to base.c */
};

struct base_import_opts {
    const char *name;         /* NULL: the folder's name */
    const char *type;         /* "nf4" (default when NULL) or "f32" */
    const char *head;         /* "8bit" (default), "bf16", "f32" (default of type f32), "nf4" */
    const char *embed;        /* "bf16" (default) or "f32" (default of type f32) */
    const char *chat_template; /* a file with the template to keep, instead of the source's; or NULL */
    bool requantize;          /* 4-bit weights of another kind may become NF4 */
    /* called before each tensor and at the end with bytes done and in all; true: stop, which is
     * ERR_CANCELLED; may be NULL */
    bool (*progress)(void *ud, const char *tensor, size_t done, size_t total);
    /* a sentence for the user that is no error; may be NULL */
    void (*note)(void *ud, const char *sentence);
    void *ud;
};

/* Hugging Face folder or GGUF file -> base file.  Streams tensor by tensor; writes to a temporary name and
 * renames at the end, so a failure leaves no output file.  ERR_INVALID with a sentence that
 * names the tensor or the field for anything it does not fully understand. */
int base_import(const char *dir, const char *out, const struct base_import_opts *opts,
                struct err *err);

/* `precision` decides which scales are kept in memory (PREC_F32 needs fp32 scales).  `use_mmap`
 * maps what needs no conversion instead of copying it to huge pages. */
int base_load(const char *path, enum precision precision, bool use_mmap, struct base **ret,
              struct err *err);
void base_free(struct base *b); /* NULL is fine */
/* Bytes that base_load() would take, from the header alone (for the memory plan); PREC_F32 takes
 * the fp32 scales on top. */
int base_size(const char *path, size_t *ret, struct err *err);

#endif
