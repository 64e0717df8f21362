/* forward_int.h - shared by forward.c (memory and the block), forward_vocab.c (embedding and head) and
 * forward_plan.c (which rows a step has). */
#ifndef ENGINE_FORWARD_INT_H
#define ENGINE_FORWARD_INT_H

#include "engine/attn.h"
#include "engine/forward.h"
#include "engine/lora.h"
#include "engine/ops.h"
#include "engine/rope.h"

/* One row of the step. */
struct row {
    const struct span *span;
    int pos;
    int32_t token;
};

/* Where q, k or v are: head h of row r at p + r * ld + h * step. */
struct heads {
    float *p;
    int ld, step;
};

struct forward {
    const struct base *base;
    const struct family *family;
    const struct compute *compute;
    struct kv_cache *kv;
    const struct ops *ops;
    struct rope *rope[2];      /* rope[1]: of layers with a window, if they have their own */
    int nropes;
    float *slopes;             /* [H] with ALiBi */
    int max_rows, max_logits;
    struct act act;
    void *mem;
    size_t mem_bytes;
    /* [max_rows][...] unless said otherwise */
    float *x, *h, *t;          /* residual stream; a normed copy; what a block adds.  [D] */
    struct heads q, k, v;      /* in matrices of their own, or in one */
    float *att;                /* [H hd] */
    float *gate, *up;          /* rows ld_gate apart, in the same memory as q, k, v, att */
    int ld_gate;               /* F, or 2 F if they are halves of one product */
    float *cos, *sin;          /* [nropes][rot / 2] */
    float *lora;
    float *logits;             /* [max_logits][V] */
    struct row *rows;
    struct lora_group *groups;
    struct attn_span *spans;   /* neighbouring rows of one sequence */
    struct attn_work attn;
    /* of the step */
    int nrows, ngroups, nspans;
};

/* Are q, k and v one product? */
static inline bool forward_joined(const struct forward *f)
{
    return f->family->module_path[MOD_QKV] != NULL;
}

/* Rows, groups and spans of a step. */
void forward_plan(struct forward *f, const struct span *spans, int nspans);
/* Keep only the rows whose logits are wanted: x, h, the angles, and q if it came with k and v. */
void forward_trim(struct forward *f);
/* x [D] = the embedding of a token: the base's row or the adapter's own, and LoRA on it. */
void forward_embed(const struct forward *f, const struct lora_set *set, int32_t token, float *x);
/* f->logits of the rows that are left, from f->h. */
void forward_head(struct forward *f);

#endif
