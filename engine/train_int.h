/* train_int.h - shared by the files of the trainer.
 *
 *   train.c          a run: its step, its evaluation, which examples a step takes
 *   train_opts.c     options, and which modules they mean
 *   train_params.c   the trainable tensors, their first values, DoRA's norms
 *   train_linear.c   forward and backward of linear layers, adapted or not
 *   train_block.c    forward and backward of a block
 *   train_pass.c     one micro-batch: embedding, blocks, loss, and back
 *   train_state.c    saving and restoring a run
 *   train_export.c   the adapter as PEFT would write it
 *   train_loop.c, train_estimate.c   see train.h
 *
 * Dimensions as in arch.h; R rows of a micro-batch, at most T; r the rank of a module. */
#ifndef ENGINE_TRAIN_INT_H
#define ENGINE_TRAIN_INT_H

#include "engine/adalora.h"
#include "engine/linear.h"
#include "engine/ops.h"
#include "engine/optim.h"
#include "engine/rope.h"
#include "engine/train.h"
#include "engine/train_attn.h"

/* One adapted linear layer. */
struct train_module {
    int layer;
    enum module module;
    int r, init_r, in, out; /* init_r: AdaLoRA, what scaling was made from; else r */
    double alpha;
    float scaling;
    const struct matrix *w;
    float *A, *B, *E, *m;       /* [r][in], [out][r]; AdaLoRA [r]; DoRA [out]; into train.p */
    float *gA, *gB, *gE, *gm;   /* gradients, into train.g */
    double *w_norm2;            /* DoRA: [out], |W_o|^2 */
    float *norm, *gain;         /* DoRA: [out], n = |W_o + s (BA)_o| and m / n */
    float *h;                   /* [T][r]: (dropped) x A^T, of the block at hand */
    float *u;                   /* DoRA: [T][out], (dropped) x W^T + s h B^T */
    uint8_t *mask;              /* AdaLoRA that goes on from a pruned version: [init_r]; or NULL */
};

/* Rows of one micro-batch. */
struct train_batch {
    int rows, nsegs;
    struct train_segment *segs; /* [T] */
    int32_t *tokens;            /* [T] */
    int *pos;                   /* [T] */
    int ntargets;
    int *target_rows;           /* [T]: rows whose next token is learned, ... */
    int32_t *targets;           /* [T]: ... and those tokens */
};

/* What the way back of a block needs of the way there and costs products to compute again; [T][...]
 * each.  One for the block at hand, and one for each block that there is memory to keep it for. */
struct train_values {
    struct train_heads q, k, v;    /* after norm and rope */
    float *q_raw, *k_raw;          /* before, where there are norms of q and k: [H hd], [G hd] */
    float *att, *t1, *xm, *gate, *up, *t2; /* t2 is only used where a norm or DoRA follows */
};

/* Buffers of one block, [T][...] each. */
struct train_buffers {
    struct train_values *at;       /* of the block at hand */
    float *h1, *h2, *act;
    int ld_gate;
    struct train_heads dq, dk, dv; /* the same shape as q, k, v */
    float *dh, *dt, *dact, *datt;  /* dt: gradient of what attention or MLP add */
    float *drop, *ddrop;           /* dropped inputs and their gradient: [widest input] */
    float *dyg, *gram;             /* DoRA: [widest output]; [largest r][largest r] in all */
    float *hs, *dr;                /* [largest r] */
    float *attn;                   /* scratch of attention */
    void *dx;                      /* scratch of matmul_dx */
    float *logits, *capped, *hn, *dhn; /* chunks of TRAIN_HEAD_ROWS rows: [V], [V], [D], [D] */
};
enum { TRAIN_HEAD_ROWS = 64 };
/* Steps of a run: what the streams of dropout (30 bits), PEFT's total_step and version numbers hold. */
enum { TRAIN_STEPS_MAX = 1000000000 };

struct train {
    const struct base *base;
    const struct compute *compute;
    const struct family *family;
    const struct ops *ops;
    struct train_opts o;         /* with every 0 that means "auto" resolved */
    const struct train_set *data, *valid;
    bool continued;              /* from a version: AdaLoRA prunes no more */
    char *from_config;           /* its adapter_config.json, or NULL */

    /* trainable */
    struct train_module *modules;
    size_t nmodules;
    struct train_module **slots; /* [L][MOD_COUNT], NULL: not adapted */
    int first;                   /* lowest layer with an adapted module */
    size_t nparams;
    float *p, *g, *best;         /* [nparams]; best: NULL without validation and patience */
    size_t p_bytes;
    struct optim *optim;
    struct adalora *adalora;     /* NULL: another method */
    int64_t adalora_first;       /* number of the first step for AdaLoRA: 0, as PEFT counts */
    struct adalora_report allocated;
    struct train_rank *ranks;

    /* where the run stands */
    int64_t step, steps;
    int64_t epoch_in_order;      /* epoch that `order` is of; -1: none */
    uint32_t *order;             /* [data->n] */
    double best_loss;
    bool has_best, ended;        /* ended: stopped early */
    char elsewhere[64];          /* where a restored state was computed; empty: not restored */
    int worse;                   /* evaluations since the best */

    /* workspace */
    int T;
    void *mem;
    size_t mem_bytes;
    struct act act, act_drop;
    struct rope *rope[2];
    int nropes;
    float *slopes, *cos, *sin;   /* [H]; [T][nropes][rot / 2]; the same twice, the second negated */
    float *xs, *dx;              /* [L - first + 1][T][D], of the batch at hand; [T][D] */
    struct train_batch batch;
    struct train_buffers b;
    struct train_values shared;    /* of the block at hand, unless it is kept */
    struct train_values *kept;     /* [nkept]: of layers first_kept .. L - 2 */
    int first_kept, nkept;
};

/* --- train.c --- */
/* Everything but tensors, optimiser and workspace, which is enough for an estimate: t has base, compute,
 * data and valid; the rest is zero. */
int train_plan(struct train *t, const struct train_opts *o, const struct adapter_src *from,
               struct err *err);

/* --- train_opts.c --- */
/* Every linear layer of the base that the options adapt, with rank and alpha, ascending; free() it. */
int train_targets(const struct base *base, const struct train_opts *o, struct train_module **ret,
                  size_t *ret_n, struct err *err);
/* Steps of the whole run. */
int64_t train_opts_steps(const struct train_opts *o, size_t examples);
/* The zeros that mean "auto", for this many steps. */
void train_opts_resolve(struct train_opts *o, int64_t steps);
/* One line of text that holds every option. */
int train_opts_text(const struct train_opts *o, struct buf *ret);
/* adapter_config.json for a run of these options; free() it, NULL: out of memory. */
char *train_config_json(const struct train *t, bool pruned);

/* --- train_params.c --- */
int train_params_create(struct train *t, const struct adapter_src *from, struct err *err);
void train_params_free(struct train *t);
/* DoRA: norms and gains from A, B and m as they are now. */
void train_norms(struct train *t);
size_t train_params_bytes(const struct train *t);

static inline struct train_module *train_slot(const struct train *t, int layer, enum module m)
{
    return t->slots[layer * MOD_COUNT + (int)m];
}

/* --- train_linear.c --- */
/* What dropout masks are made from: unlike for every step, layer and module, and for every
 * micro-batch of a step but that they come again after 8192. */
struct train_where {
    int64_t step;
    int micro;
    bool learning; /* false: evaluation, nothing is dropped */
};
/* y[i] = W_i x + b_i + change, for modules of a layer that share x (rows ldx apart). */
void train_linear(struct train *t, const struct train_where *at, int layer, const enum module *mods,
                  int nmods, const float *x, int ldx, float *const *y);
/* Only the module's h (not DoRA's u), for the way back. */
void train_linear_h(struct train *t, const struct train_where *at, int layer, enum module m,
                    const float *x, int ldx);
/* Gradients of the module's tensors from dy (rows W.N apart) and x; and dx = or += what goes on to
 * its input, unless dx is NULL. */
void train_linear_back(struct train *t, const struct train_where *at, int layer, enum module m,
                       const float *x, int ldx, const float *dy, float *dx, int lddx, bool add);

/* --- train_block.c --- */
/* x_out = block(x_in), leaving in t->b what the way back needs.  Again, for that alone: x_out is NULL;
 * of a kept block only what it does not keep is computed then. */
void train_block(struct train *t, const struct train_where *at, int layer, const float *x_in,
                 float *x_out);
static inline bool train_is_kept(const struct train *t, int layer)
{
    return layer >= t->first_kept && layer < t->first_kept + t->nkept;
}
/* dx in place: of x_out becomes of x_in (untouched where nothing below is trained). */
void train_block_back(struct train *t, const struct train_where *at, int layer, const float *x_in,
                      float *dx);
/* Loops over the rows of the batch, in pieces that do not depend on the threads. */
void train_rows(struct train *t, int elements, pool_fn fn, void *arg);
void train_norm(const struct train *t, const struct base_norm *n, const float *x, int len, float *y);
void train_norm_back(const struct train *t, const struct base_norm *n, const float *x, int len,
                     const float *dy, float *dx);

/* --- train_pass.c --- */
struct train_sum { double loss; uint64_t hits; };
/* Loss over the targets of t->batch, summed into *ret.  With at->learning also gradients, those of
 * the sum times `scale`.  ERR_CANCELLED. */
int train_pass(struct train *t, const struct train_where *at, float scale, train_stop_fn stop,
               void *ud, struct train_sum *ret, struct err *err);
/* Bytes of the workspace; needs base, compute, o, modules, first and T. */
size_t train_pass_bytes(struct train *t);
/* What keeping one more block takes, and t->nkept and first_kept from o.keep_bytes. */
size_t train_kept_bytes(const struct train *t);
void train_pass_keep(struct train *t);
int train_pass_create(struct train *t, struct err *err);
void train_pass_free(struct train *t);

#endif
